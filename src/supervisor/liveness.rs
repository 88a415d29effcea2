//! Detects hung engines by their progress, not by how fast they answer: requests run, and no counter grows.
//!
//! `HangDetector` is pure. The names of the metrics come with the engine's spec.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::probe::reachable;
use crate::fleet::{Load, OutlivedKv, Role};
use crate::plan::EngineSpec;
use crate::report::lacks_descriptors;
use crate::samples::{as_text_format, sum};

/// Time between two polls; shorter where the deadline is short.
const INTERVAL: Duration = Duration::from_secs(5);

/// The least number of polls within the deadline.
const QUESTIONS: u32 = 5;

/// An engine that does not answer counts as hung only after this, however short its deadline: on a busy host an answer can be
/// late by many seconds.
const SILENCE: Duration = Duration::from_secs(30);

/// Timeout of one poll; two fit into [`SILENCE`], so one late answer is never a hang.
const QUESTION_DEADLINE: Duration = Duration::from_secs(15);

/// The largest metrics page, in bytes. vLLM's page has some hundred KiB.
const LARGEST_PAGE: usize = 16 << 20;

/// An engine's progress, read from its metrics.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Sample {
    /// Running requests.
    running: f64,
    /// The sum of its counters of finished work.
    done: f64,
}

/// Watches one incarnation.
#[derive(Debug)]
struct HangDetector {
    stall: Duration,
    last: Option<Sample>,
    /// When it answered last.
    answered: Instant,
    /// When it last had nothing to do, or had made progress.
    well: Instant,
}

impl HangDetector {
    fn new(stall: Duration, now: Instant) -> Self {
        Self {
            stall,
            last: None,
            answered: now,
            well: now,
        }
    }

    /// Does not count the time until now, because the engine was not polled.
    fn skip_time(&mut self, now: Instant) {
        self.answered = now;
        self.well = now;
    }

    /// Takes a sample, or `None` if the engine did not answer. Returns the evidence if the engine hangs.
    fn observe(&mut self, sample: Option<Sample>, now: Instant) -> Option<String> {
        let Some(sample) = sample else {
            let silent = now - self.answered;
            return (silent >= self.stall.max(SILENCE))
                .then(|| format!("hung: its metrics have not answered for {}", seconds(silent)));
        };
        self.answered = now;
        // Requests that did not run at the last answer can have begun just now.
        let last = self.last.replace(sample);
        let stood_still = last.is_some_and(|last| last.running > 0.0 && last.done.total_cmp(&sample.done).is_eq());
        if sample.running == 0.0 || !stood_still {
            self.well = now;
        }
        let waited = now - self.well;
        (waited >= self.stall).then(|| {
            format!(
                "hung: {} requests run, and no token was made for {}",
                sample.running,
                seconds(waited)
            )
        })
    }
}

/// A duration as people read it.
fn seconds(time: Duration) -> humantime::FormattedDuration {
    humantime::format_duration(Duration::from_secs(time.as_secs().max(1)))
}

/// An engine that hangs.
#[derive(Debug)]
pub(super) struct Hang {
    /// The evidence, one line.
    pub(super) reason: String,
    /// Its latest metrics, for the hang report.
    pub(super) metrics: String,
}

/// How many answers are kept for the report.
const REMEMBERED: usize = 20;

/// How many bytes of the last answer are kept for the report.
const MOST_METRICS: usize = 64 * 1024;

/// Its latest metrics.
#[derive(Debug, Default)]
struct RecentAnswers {
    samples: VecDeque<(Instant, Option<Sample>)>,
    last_answer: String,
}

impl RecentAnswers {
    fn keep(&mut self, answer: Option<String>, sample: Option<Sample>, now: Instant) {
        self.last_answer = answer.unwrap_or(std::mem::take(&mut self.last_answer));
        self.samples.push_back((now, sample));
        if self.samples.len() > REMEMBERED {
            self.samples.pop_front();
        }
    }

    fn told(&self, now: Instant) -> String {
        let mut text = String::new();
        for (at, sample) in &self.samples {
            let ago = (now - *at).as_secs();
            let _ = match sample {
                Some(Sample { running, done }) => writeln!(text, "{ago} s ago: {running} running, {done} done"),
                None => writeln!(text, "{ago} s ago: no answer"),
            };
        }
        text.push_str("the last answer, without comments and buckets\n");
        let is_plain = |line: &&str| !line.starts_with('#') && !line.contains("_bucket{");
        for line in self.last_answer.lines().filter(is_plain) {
            if text.len() + line.len() > MOST_METRICS {
                break;
            }
            let _ = writeln!(text, "{line}");
        }
        text
    }
}

/// Completes once the engine hangs. `load` counts the requests in flight on it.
///
/// vLLM updates its metrics after a step, so the first request after a worker's last step is in none of them. Requests in flight
/// on a prefill engine are work; those on a decode engine can still wait for their prefill.
pub(super) async fn until_hung(client: &reqwest::Client, engine: &EngineSpec, load: &Load) -> Hang {
    let url = format!("http://{}{}", reachable(engine), engine.liveness.path);
    let mut memory = RecentAnswers::default();
    let mut judge = HangDetector::new(engine.liveness.stall, Instant::now());
    let pause = INTERVAL.min(engine.liveness.stall / QUESTIONS);
    loop {
        let answer = match ask(client, &url).await {
            Err(error) if lacks_descriptors(error.as_ref()) => {
                // It was not polled, so the silence is not its fault.
                judge.skip_time(Instant::now());
                sleep(pause).await;
                continue;
            }
            answer => answer.ok(),
        };
        let given = if engine.role == Role::Prefill {
            load.in_flight()
        } else {
            0
        };
        if let Some(text) = &answer {
            watch_leases(engine, load, text);
        }
        let now = Instant::now();
        let sample = answer.as_deref().map(|text| Sample::read(text, engine));
        let sample = sample.map(|sample| Sample {
            running: sample.running.max(given as f64),
            ..sample
        });
        memory.keep(answer, sample, now);
        if let Some(reason) = judge.observe(sample, now) {
            let metrics = memory.told(now);
            return Hang { reason, metrics };
        }
        sleep(pause).await;
    }
}

/// Reports KV that outlived its lease: such a request loses its hand-off, and in the worst case gets wrong text.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counters of whole events"
)]
fn watch_leases(engine: &EngineSpec, load: &Load, text: &str) {
    let count = |name: &str| sum(text, name, None) as u64;
    let now = OutlivedKv {
        expired: count(&engine.liveness.expired_leases),
        late: count(&engine.liveness.late_reads),
    };
    let before = load.note_outlived_kv(now);
    if now.expired > before.expired || now.late > before.late {
        tracing::warn!(
            engine = %engine.id,
            leases_expired = now.expired,
            late_reads = now.late,
            "KV was kept for a decode engine until its lease ended, or was read afterwards"
        );
    }
}

async fn ask(client: &reqwest::Client, url: &str) -> anyhow::Result<String> {
    let question = client.get(url).timeout(QUESTION_DEADLINE);
    let mut answer = question.send().await?.error_for_status()?;
    let mut page = Vec::new();
    while let Some(part) = answer.chunk().await? {
        page.extend_from_slice(&part);
        anyhow::ensure!(
            page.len() <= LARGEST_PAGE,
            "the page has more than {LARGEST_PAGE} bytes"
        );
    }
    Ok(as_text_format(&String::from_utf8_lossy(&page)).into_owned())
}

impl Sample {
    fn read(text: &str, engine: &EngineSpec) -> Self {
        Self {
            running: sum(text, &engine.liveness.running, None),
            done: engine.liveness.counters.iter().map(|name| sum(text, name, None)).sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STALL: Duration = Duration::from_secs(10);

    /// What the judge says about one sample a second.
    fn judge(samples: impl IntoIterator<Item = Option<(f64, f64)>>) -> Option<String> {
        let start = Instant::now();
        let mut judge = HangDetector::new(STALL, start);
        let samples = samples
            .into_iter()
            .map(|sample| sample.map(|(running, done)| Sample { running, done }));
        samples
            .zip(0..)
            .find_map(|(sample, second)| judge.observe(sample, start + Duration::from_secs(second)))
    }

    #[test]
    fn requests_without_a_token_hang_exactly_at_the_deadline() {
        let stalled = |count| judge([Some((1.0, 7.0))].into_iter().cycle().take(count));
        assert_eq!(stalled(10), None);
        let reason = stalled(11).expect("hung");
        assert_eq!(reason, "hung: 1 requests run, and no token was made for 10s");
    }

    #[tokio::test]
    async fn an_endless_metrics_page_is_no_answer() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/metrics", listener.local_addr().expect("an address"));
        let engine = async {
            let (mut connection, _) = listener.accept().await.expect("a connection");
            connection.read_u8().await.expect("a request");
            let head = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n";
            let mut sent = connection.write(head).await.expect("the head");
            while let Ok(more) = connection.write(&[b'#'; 1 << 12]).await {
                sent += more;
            }
            sent
        };
        let client = super::super::probe::client().expect("a client");
        let (sent, answer) = tokio::join!(engine, ask(&client, &url));
        let error = answer.expect_err("a page without an end");
        assert_eq!(error.to_string(), "the page has more than 16777216 bytes");
        // What the kernel holds comes on top.
        assert!(sent < 2 * LARGEST_PAGE, "{sent} bytes were sent");
    }

    #[test]
    fn idle_and_slow_engines_do_not_hang() {
        assert_eq!(judge([Some((0.0, 7.0))].into_iter().cycle().take(100)), None);
        // One token in nine seconds.
        let slow = (0..100_u32).map(|second| Some((3.0, f64::from(second / 9))));
        assert_eq!(judge(slow), None);
    }

    #[test]
    fn time_without_work_does_not_count() {
        let idle = [Some((0.0, 7.0)); 9];
        let stalled = [Some((2.0, 7.0)); 9];
        assert_eq!(judge(idle.into_iter().chain(stalled)), None);
    }

    #[test]
    fn a_silent_engine_hangs_after_the_silence_limit() {
        let busy = (0..100_u32).map(|second| (second % 29 == 0).then(|| (1.0, f64::from(second))));
        assert_eq!(judge(busy), None);
        assert_eq!(judge([None; 30]), None);
        let silent = judge([None; 31]).expect("hung");
        assert_eq!(silent, "hung: its metrics have not answered for 30s");
    }

    #[test]
    fn a_request_that_began_during_a_silence_does_not_hang() {
        let idle = [Some((0.0, 7.0))];
        let new = [Some((1.0, 7.0)); 9];
        assert_eq!(judge(idle.into_iter().chain([None; 20]).chain(new)), None);
    }

    #[test]
    fn only_the_last_answers_are_kept() {
        let (start, mut memory) = (Instant::now(), RecentAnswers::default());
        let at = |second| start + Duration::from_secs(second);
        let answer = "# HELP x\nx_bucket{le=\"1\"} 3\nx_total 4\n".to_owned();
        let sample = Sample {
            running: 2.0,
            done: 7.0,
        };
        for second in 0..50 {
            memory.keep(Some(answer.clone()), Some(sample), at(second));
        }
        memory.keep(None, None, at(50));
        let told = memory.told(at(51));
        assert_eq!(told.matches("2 running, 7 done").count(), REMEMBERED - 1);
        assert!(told.contains("1 s ago: no answer"), "{told}");
        assert!(told.ends_with("buckets\nx_total 4\n"), "{told}");
    }
}
