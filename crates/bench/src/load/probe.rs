//! Probe requests: one-token requests sent one at a time during the run, which show how much the load delays another
//! client.

use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::record::Answer;
use crate::report::Probes;

/// Sends a probe, waits `1 / rate` seconds after its answer, and repeats until `over` (the load has ended) or `stop`
/// (the run is cancelled). A probe in flight when the load ends is awaited.
pub(crate) async fn run<F>(rate: f64, ask: impl Fn() -> F, over: &CancellationToken, stop: &CancellationToken) -> Probes
where
    F: Future<Output = Result<Answer, String>>,
{
    let interval = Duration::try_from_secs_f64(1.0 / rate).unwrap_or(Duration::MAX);
    let mut probes = Probes::default();
    while let Some(result) = stop.run_until_cancelled(ask()).await {
        match result {
            Ok(answer) => probes.latencies.push(answer.latency.as_secs_f64()),
            Err(_) => probes.failed += 1,
        }
        if over.run_until_cancelled(sleep(interval)).await.is_none() {
            break;
        }
    }
    probes
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn probes_are_sequential_and_the_last_one_is_awaited() {
        let (over, stop) = (CancellationToken::new(), CancellationToken::new());
        let asked = Cell::new(0);
        let ask = || async {
            asked.set(asked.get() + 1);
            if asked.get() == 3 {
                over.cancel();
            }
            sleep(Duration::from_millis(300)).await;
            let latency = Duration::from_millis(300);
            let answer = Answer {
                latency,
                ..Answer::default()
            };
            if asked.get() == 2 {
                Err("no".to_owned())
            } else {
                Ok(answer)
            }
        };
        let start = Instant::now();
        let probes = run(2.0, ask, &over, &stop).await;
        assert_eq!((probes.latencies.len(), probes.failed), (2, 1));
        // Three answers of 0.3 s and two pauses of 0.5 s; the last pause is skipped.
        assert_eq!(start.elapsed().as_millis(), 1900);
    }
}
