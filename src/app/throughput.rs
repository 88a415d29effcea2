//! The throughput line: every ten seconds while the fleet has requests, from the proxy's metrics.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::fleet::{FleetStage, FleetView};
use crate::proxy::Proxy;
use crate::samples::{as_text_format, sum};

/// Time between two lines, as in vLLM.
const EVERY: Duration = Duration::from_secs(10);

/// Counters of the proxy at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Served {
    answers: f64,
    /// Responses with a first event, and the sum of the times to it.
    first_tokens: f64,
    first_token_seconds: f64,
    /// Reads of streams that contained tokens.
    reads: f64,
    in_flight: f64,
    queued: f64,
}

/// Sends a line every [`EVERY`], as long as it is polled.
pub(super) async fn follow(proxy: Proxy, view: watch::Receiver<Arc<FleetView>>, notes: mpsc::Sender<String>) {
    let mut turns = interval(EVERY);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut before, mut asked) = (Served::default(), Instant::now());
    loop {
        turns.tick().await;
        if view.borrow().stage != FleetStage::Ready {
            continue;
        }
        let (now, span) = (Served::read(&proxy.metrics_text()), asked.elapsed());
        if let Some(line) = now.since(&before, span) {
            // The reporter has ended, and this task will end soon.
            drop(notes.send(line).await);
        }
        (before, asked) = (now, Instant::now());
    }
}

impl Served {
    /// Reads the proxy's metrics page.
    fn read(page: &str) -> Self {
        let page = as_text_format(page);
        let of = |name, label| sum(&page, name, label);
        Self {
            answers: of("xpyd_request_seconds_count", Some("outcome=\"answered\"")),
            first_tokens: of("xpyd_time_to_first_token_seconds_count", None),
            first_token_seconds: of("xpyd_time_to_first_token_seconds_sum", None),
            reads: of("xpyd_inter_token_seconds_count", None),
            in_flight: of("xpyd_requests_in_flight", None),
            queued: of("xpyd_requests_queued", None),
        }
    }

    /// The line for the time since `before`; `None` if nothing was served.
    fn since(&self, before: &Self, span: Duration) -> Option<String> {
        let seconds = span.as_secs_f64();
        let (answers, first_tokens) = (self.answers - before.answers, self.first_tokens - before.first_tokens);
        let reads = self.reads - before.reads;
        if seconds <= 0.0 || (answers <= 0.0 && first_tokens <= 0.0 && reads <= 0.0 && self.in_flight <= 0.0) {
            return None;
        }
        let mut parts = vec![
            format!("{:.1} req/s", answers / seconds),
            format!("{:.1} tokens/s streamed", (first_tokens + reads) / seconds),
        ];
        if first_tokens > 0.0 {
            let mean = (self.first_token_seconds - before.first_token_seconds) / first_tokens * 1e3;
            parts.push(format!("mean TTFT {mean:.0} ms"));
        }
        parts.push(format!("{} in flight", self.in_flight));
        if self.queued > 0.0 {
            parts.push(format!("{} queued", self.queued));
        }
        Some(parts.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_throughput_line_covers_the_last_interval() {
        let page = "# HELP x y\nxpyd_request_seconds_count{outcome=\"answered\"} 30\n\
            xpyd_request_seconds_count{outcome=\"failed\"} 2\nxpyd_time_to_first_token_seconds_sum 12.0\n\
            xpyd_time_to_first_token_seconds_count 40\nxpyd_inter_token_seconds_count 1000\nxpyd_requests_in_flight 3\nxpyd_requests_queued 2\n";
        let now = Served::read(page);
        let before = Served {
            answers: 10.0,
            first_tokens: 20.0,
            first_token_seconds: 4.0,
            reads: 100.0,
            ..Served::default()
        };
        assert_eq!(
            now.since(&before, Duration::from_secs(10)).as_deref(),
            Some("2.0 req/s, 92.0 tokens/s streamed, mean TTFT 400 ms, 3 in flight, 2 queued")
        );
        let idle = Served {
            in_flight: 0.0,
            queued: 0.0,
            ..now
        };
        assert_eq!(idle.since(&idle, Duration::from_secs(10)), None);
    }
}
