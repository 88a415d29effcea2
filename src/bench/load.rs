//! The one loop that sends requests by a schedule and gathers what becomes of them.
//!
//! Open loop: instants are absolute, a request never waits for another one's answer, and how late the loop itself was is
//! recorded. It knows no HTTP: what a request does is a future that the caller makes.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;

use super::record::{Answer, Record};
use super::{Phase, Progress};

/// How often the caller hears of progress when nothing happens.
const TICK: Duration = Duration::from_millis(250);

/// What a request's future gives.
#[derive(Debug)]
pub(super) struct Exchange {
    /// When it was sent.
    pub(super) started: Instant,
    pub(super) result: Result<Answer, String>,
}

/// What the loop gives.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Requests that have ended, in the order of the schedule.
    pub(super) records: Vec<Record>,
    /// From before the first wait to the end of the last request, or to the stop.
    pub(super) duration: Duration,
    /// Requests that were released and then dropped by the stop.
    pub(super) dropped: usize,
    /// Requests that the stop came before.
    pub(super) unsent: usize,
}

/// The running sums behind [`Progress`].
#[derive(Debug)]
pub(super) struct Tally {
    start: Instant,
    total: usize,
    done: usize,
    failed: usize,
    in_flight: usize,
    first_tokens: Mean,
    later_tokens: Mean,
}

#[derive(Debug, Default)]
struct Mean {
    sum: f64,
    count: u32,
}

/// Releases request `i` at `releases[i]` after now, at most `limit` of them running at once, until all have ended or
/// `stop` is cancelled. `observe` is told of the requests that have ended so far, in the order of their ends.
pub(super) async fn drive<F>(
    releases: &[Duration],
    limit: Option<NonZeroUsize>,
    exchange: impl Fn(usize) -> F,
    observe: impl Fn(&Tally, &[Record]),
    stop: &CancellationToken,
) -> Outcome
where
    F: Future<Output = Exchange> + Send + 'static,
{
    let permits = limit.map(|limit| Arc::new(Semaphore::new(limit.get())));
    let start = Instant::now();
    let mut ticker = interval(TICK);
    ticker.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut tasks = JoinSet::new();
    let mut records = Vec::with_capacity(releases.len());
    let mut tally = Tally::new(start, releases.len());
    let mut next = 0;

    while next < releases.len() || !tasks.is_empty() {
        let due = releases.get(next).map(|&release| start + release);
        // The order matters: a release that is due goes before the bookkeeping of answers.
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            () = wait_until(due.unwrap_or(start)), if due.is_some() => {
                let waiting = Waiting { index: next, scheduled: releases[next], released: Instant::now() };
                tasks.spawn(send(waiting, start, permits.clone(), exchange(next)));
                next += 1;
            }
            Some(ended) = tasks.join_next() => {
                // Nothing aborts these tasks before the loop ends, so what failed to join has panicked.
                let record = ended.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
                tally.count(&record);
                records.push(record);
            }
            _ = ticker.tick() => {}
        }
        tally.in_flight = tasks.len().min(limit.map_or(usize::MAX, NonZeroUsize::get));
        observe(&tally, &records);
    }

    let duration = start.elapsed();
    let dropped = tasks.len();
    tasks.shutdown().await;
    records.sort_unstable_by_key(|record| record.index);
    Outcome {
        records,
        duration,
        dropped,
        unsent: releases.len() - next,
    }
}

/// Waits for a release. A timer would round one that is due already up to its next tick of a millisecond.
async fn wait_until(due: Instant) {
    if Instant::now() < due {
        sleep_until(due).await;
    }
}

/// A request that has been released and may have to wait for its turn.
struct Waiting {
    index: usize,
    scheduled: Duration,
    released: Instant,
}

async fn send(
    waiting: Waiting,
    start: Instant,
    permits: Option<Arc<Semaphore>>,
    exchange: impl Future<Output = Exchange>,
) -> Record {
    let _permit = match permits {
        Some(permits) => Some(permits.acquire_owned().await.expect("nothing closes the semaphore")),
        None => None,
    };
    let Exchange { started, result } = exchange.await;
    Record {
        index: waiting.index,
        scheduled: waiting.scheduled,
        released: waiting.released - start,
        started: started - start,
        result,
    }
}

impl Tally {
    fn new(start: Instant, total: usize) -> Self {
        Self {
            start,
            total,
            done: 0,
            failed: 0,
            in_flight: 0,
            first_tokens: Mean::default(),
            later_tokens: Mean::default(),
        }
    }

    fn count(&mut self, record: &Record) {
        self.done += 1;
        match &record.result {
            Ok(answer) => {
                self.first_tokens.add(answer.first_token.as_secs_f64());
                if let Some(seconds) = answer.time_per_output_token() {
                    self.later_tokens.add(seconds);
                }
            }
            Err(_) => self.failed += 1,
        }
    }

    /// The state as others see it.
    pub(super) fn progress(&self, phase: Phase) -> Progress {
        Progress {
            phase,
            total: self.total,
            done: self.done,
            failed: self.failed,
            in_flight: self.in_flight,
            elapsed: self.start.elapsed(),
            mean_ttft_ms: self.first_tokens.milliseconds(),
            mean_tpot_ms: self.later_tokens.milliseconds(),
        }
    }
}

impl Mean {
    fn add(&mut self, seconds: f64) {
        self.sum += seconds;
        self.count += 1;
    }

    fn milliseconds(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / f64::from(self.count) * 1000.0)
    }
}

#[cfg(test)]
mod tests;
