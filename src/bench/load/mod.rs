//! The one loop that sends requests by a schedule and gathers what becomes of them.
//!
//! Open loop: instants are absolute, a request never waits for another one's answer, and how late the client itself was is
//! recorded. Requests run on threads of their own (`lanes`); the caller's only gathers and tells of progress. It knows no
//! HTTP: what a request does is a future that the caller makes.

pub(super) mod arrivals;
pub(super) mod conversation;
mod precise_timer;
pub(super) mod probe;
mod workers;

use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

use self::precise_timer::Alarm;
pub(super) use self::workers::Lanes;
use self::workers::{Lane, Meter};
use crate::bench::load::conversation::Successor;
use crate::bench::record::{Answer, Effort, Record};
use crate::bench::{Phase, Progress};

/// How often the caller hears of progress when nothing happens.
const TICK: Duration = Duration::from_millis(250);

/// Records on their way to the caller. A request that has ended may wait here: its times are known.
const RECORDS_ON_THEIR_WAY: usize = 1024;

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
    /// What sending and reading cost.
    pub(super) effort: Effort,
}

/// The running sums behind [`Progress`].
#[derive(Debug)]
pub(super) struct Tally {
    start: Instant,
    total: usize,
    released: usize,
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
    lanes: &Lanes,
    releases: &[Duration],
    limit: Option<NonZeroUsize>,
    exchange: impl Fn(usize) -> F + Send + Sync + 'static,
    observe: impl Fn(&Tally, &[Record]),
    stop: &CancellationToken,
) -> Outcome
where
    F: Future<Output = Exchange> + Send + 'static,
{
    drive_chained(lanes, releases, limit, [].into(), exchange, observe, stop).await
}

/// As [`drive`], where the end of request `i` releases the one that `successors[i]` names, so long after it. Such a request has
/// no time in the schedule.
pub(super) async fn drive_chained<F>(
    lanes: &Lanes,
    releases: &[Duration],
    limit: Option<NonZeroUsize>,
    successors: Arc<[Successor]>,
    exchange: impl Fn(usize) -> F + Send + Sync + 'static,
    observe: impl Fn(&Tally, &[Record]),
    stop: &CancellationToken,
) -> Outcome
where
    F: Future<Output = Exchange> + Send + 'static,
{
    let follows: HashSet<usize> = successors.iter().flatten().map(|(next, _)| *next).collect();
    let start = Instant::now();
    let (ended, mut gathered) = mpsc::channel(RECORDS_ON_THEIR_WAY);
    let common = Arc::new(Common {
        start,
        permits: limit.map(|limit| Semaphore::new(limit.get().min(Semaphore::MAX_PERMITS))),
        released: AtomicUsize::new(0),
        successors,
        exchange,
    });
    let meter = Meter::start();
    let mut shares = JoinSet::new();
    for (number, lane) in lanes.all().iter().enumerate() {
        let turns = releases.iter().copied().enumerate();
        let turns = turns.filter(|(index, _)| !follows.contains(index));
        let turns = turns.skip(number).step_by(lanes.all().len()).collect();
        let share = share(lane.clone(), turns, Arc::clone(&common), ended.clone());
        shares.spawn_on(share, &lane.handle);
    }
    drop(ended);

    let mut ticker = interval(TICK);
    ticker.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut records = Vec::with_capacity(releases.len());
    let mut tally = Tally::new(start, releases.len());
    let mut busiest = 0.0_f64;
    let mut last = start;
    let stopped = loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break true,
            Some((record, end)) = gathered.recv() => {
                tally.count(&record);
                records.push(record);
                last = last.max(end);
            }
            ended = shares.join_next() => match ended {
                // Nothing aborts these tasks before the loop ends, so what failed to join has panicked.
                Some(ended) => {
                    let busy = ended.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
                    busiest = busiest.max(busy);
                }
                // Whoever would send more records has ended, and none is left.
                None => break false,
            },
            _ = ticker.tick() => {}
        }
        tally.released = common.released.load(Ordering::Relaxed);
        let in_flight = tally.released.saturating_sub(tally.done);
        tally.in_flight = in_flight.min(limit.map_or(usize::MAX, NonZeroUsize::get));
        observe(&tally, &records);
    };

    let duration = if stopped { start.elapsed() } else { last - start };
    shares.shutdown().await;
    while let Ok((record, _)) = gathered.try_recv() {
        records.push(record);
    }
    records.sort_unstable_by_key(|record: &Record| record.index);
    let released = common.released.load(Ordering::Relaxed);
    Outcome {
        duration,
        dropped: released - records.len(),
        unsent: releases.len() - released,
        effort: meter.effort(lanes.all().len(), busiest),
        records,
    }
}

/// What the shares of one drive have in common.
struct Common<E> {
    start: Instant,
    permits: Option<Semaphore>,
    /// Requests that were released, on all lanes.
    released: AtomicUsize,
    /// What the end of each request releases.
    successors: Arc<[Successor]>,
    exchange: E,
}

/// One lane's part of a drive. Gives how busy its thread was, at the most.
async fn share<E, F>(
    lane: Lane,
    turns: Vec<(usize, Duration)>,
    common: Arc<Common<E>>,
    ended: mpsc::Sender<(Record, Instant)>,
) -> f64
where
    E: Fn(usize) -> F + Send + Sync + 'static,
    F: Future<Output = Exchange> + Send + 'static,
{
    let busy = workers::Busy::default();
    let work = async {
        let mut alarm = Alarm::new(lane.is_precise);
        let mut tasks = JoinSet::new();
        for (index, scheduled) in turns {
            alarm.wait_until(common.start + scheduled).await;
            let released = common.start.elapsed();
            common.released.fetch_add(1, Ordering::Relaxed);
            tasks.spawn(chain(index, scheduled, released, Arc::clone(&common), ended.clone()));
            while let Some(joined) = tasks.try_join_next() {
                resume_panic(joined);
            }
        }
        while let Some(joined) = tasks.join_next().await {
            resume_panic(joined);
        }
    };
    tokio::select! {
        biased;
        () = work => {}
        () = busy.watch() => {}
    }
    busy.most()
}

/// Nothing aborts the tasks of requests but the end of their share, so one that failed to join has panicked.
fn resume_panic(joined: Result<(), tokio::task::JoinError>) {
    if let Err(error) = joined {
        std::panic::resume_unwind(error.into_panic());
    }
}

/// A request, and those that follow it one by one.
async fn chain<E, F>(
    mut index: usize,
    mut scheduled: Duration,
    mut released: Duration,
    common: Arc<Common<E>>,
    ended: mpsc::Sender<(Record, Instant)>,
) where
    E: Fn(usize) -> F + Send + Sync,
    F: Future<Output = Exchange> + Send,
{
    loop {
        send(index, scheduled, released, Arc::clone(&common), ended.clone()).await;
        let Some((next, pause)) = common.successors.get(index).copied().flatten() else {
            return;
        };
        scheduled = common.start.elapsed() + pause;
        sleep(pause).await;
        released = common.start.elapsed();
        common.released.fetch_add(1, Ordering::Relaxed);
        index = next;
    }
}

async fn send<E, F>(
    index: usize,
    scheduled: Duration,
    released: Duration,
    common: Arc<Common<E>>,
    ended: mpsc::Sender<(Record, Instant)>,
) where
    E: Fn(usize) -> F,
    F: Future<Output = Exchange>,
{
    let permit = match &common.permits {
        Some(permits) => Some(permits.acquire().await.expect("nothing closes the semaphore")),
        None => None,
    };
    // Without a limit nothing holds a request up, so whatever comes between is the client's own doing.
    let admitted = permit.as_ref().map_or(released, |_| common.start.elapsed());
    let Exchange { started, result } = (common.exchange)(index).await;
    drop(permit);
    let end = Instant::now();
    let record = Record {
        index,
        scheduled,
        released,
        admitted,
        started: started - common.start,
        result,
    };
    // Nobody gathers any more once the run has been stopped.
    drop(ended.send((record, end)).await);
}

impl Tally {
    fn new(start: Instant, total: usize) -> Self {
        Self {
            start,
            total,
            released: 0,
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
            released: self.released,
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
