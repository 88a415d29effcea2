//! The load loop: sends requests by a schedule and collects their records.
//!
//! Open loop: release times are absolute, no request waits for the answer to another one, and the client's own lag is
//! recorded. Requests run on worker threads (`workers`). The caller's thread only collects records and reports
//! progress. The loop knows no HTTP: a request is a future that the caller makes.

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

use self::precise_timer::PreciseTimer;
pub(super) use self::workers::Workers;
use self::workers::{CpuMeter, Worker};
use crate::load::conversation::Successor;
use crate::record::{Answer, ClientUsage, Record};
use crate::{Progress, RunPhase};

/// How often progress is reported while no request ends.
const TICK: Duration = Duration::from_millis(250);

/// Records between the workers and the caller. A finished request can wait here, because its times are already taken.
const RECORD_QUEUE: usize = 1024;

/// The result of a request's future.
#[derive(Debug)]
pub(super) struct Exchange {
    /// When it was sent.
    pub(super) started: Instant,
    pub(super) result: Result<Answer, String>,
}

/// The result of a load run.
#[derive(Debug)]
pub(super) struct LoadResult {
    /// Requests that have ended, in the order of the schedule.
    pub(super) records: Vec<Record>,
    /// From before the first wait to the end of the last request, or to the cancellation.
    pub(super) duration: Duration,
    /// Requests that were in flight when the run was cancelled.
    pub(super) dropped: usize,
    /// Requests that were not released before the run was cancelled.
    pub(super) unsent: usize,
    /// The CPU time that sending and reading took.
    pub(super) client_usage: ClientUsage,
}

/// The running sums behind [`Progress`].
#[derive(Debug)]
pub(super) struct RunningTotals {
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

/// Releases request `i` at `releases[i]` after now, at most `limit` of them at once, until all have ended or `stop` is
/// cancelled. `observe` gets the requests that have ended so far, in the order of their ends.
pub(super) async fn run_schedule<F>(
    workers: &Workers,
    releases: &[Duration],
    limit: Option<NonZeroUsize>,
    exchange: impl Fn(usize) -> F + Send + Sync + 'static,
    observe: impl Fn(&RunningTotals, &[Record]),
    stop: &CancellationToken,
) -> LoadResult
where
    F: Future<Output = Exchange> + Send + 'static,
{
    run_chained(workers, releases, limit, [].into(), exchange, observe, stop).await
}

/// As [`run_schedule`]; when request `i` ends, the request and the delay in `successors[i]` follow. A successor has no
/// time in the schedule.
pub(super) async fn run_chained<F>(
    workers: &Workers,
    releases: &[Duration],
    limit: Option<NonZeroUsize>,
    successors: Arc<[Successor]>,
    exchange: impl Fn(usize) -> F + Send + Sync + 'static,
    observe: impl Fn(&RunningTotals, &[Record]),
    stop: &CancellationToken,
) -> LoadResult
where
    F: Future<Output = Exchange> + Send + 'static,
{
    let follows: HashSet<usize> = successors.iter().flatten().map(|(next, _)| *next).collect();
    let start = Instant::now();
    let (ended, mut gathered) = mpsc::channel(RECORD_QUEUE);
    let shared = Arc::new(SharedState {
        start,
        permits: limit.map(|limit| Semaphore::new(limit.get().min(Semaphore::MAX_PERMITS))),
        released: AtomicUsize::new(0),
        successors,
        exchange,
    });
    let meter = CpuMeter::start();
    let mut running = JoinSet::new();
    for (number, worker) in workers.all().iter().enumerate() {
        let own_requests = releases.iter().copied().enumerate();
        let own_requests = own_requests.filter(|(index, _)| !follows.contains(index));
        let own_requests = own_requests.skip(number).step_by(workers.all().len()).collect();
        let run_worker = run_worker(worker.clone(), own_requests, Arc::clone(&shared), ended.clone());
        running.spawn_on(run_worker, &worker.handle);
    }
    drop(ended);

    let mut ticker = interval(TICK);
    ticker.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut records = Vec::with_capacity(releases.len());
    let mut totals = RunningTotals::new(start, releases.len());
    let mut busiest = 0.0_f64;
    let mut last = start;
    let stopped = loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break true,
            Some((record, end)) = gathered.recv() => {
                totals.count(&record);
                records.push(record);
                last = last.max(end);
            }
            ended = running.join_next() => match ended {
                // Nothing aborts these tasks before the loop ends, so what failed to join has panicked.
                Some(ended) => {
                    let busy = ended.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
                    busiest = busiest.max(busy);
                }
                // All senders have ended and no record is left.
                None => break false,
            },
            _ = ticker.tick() => {}
        }
        totals.released = shared.released.load(Ordering::Relaxed);
        let in_flight = totals.released.saturating_sub(totals.done);
        totals.in_flight = in_flight.min(limit.map_or(usize::MAX, NonZeroUsize::get));
        observe(&totals, &records);
    };

    let duration = if stopped { start.elapsed() } else { last - start };
    running.shutdown().await;
    while let Ok((record, _)) = gathered.try_recv() {
        records.push(record);
    }
    records.sort_unstable_by_key(|record: &Record| record.index);
    let released = shared.released.load(Ordering::Relaxed);
    LoadResult {
        duration,
        dropped: released - records.len(),
        unsent: releases.len() - released,
        client_usage: meter.usage(workers.all().len(), busiest),
        records,
    }
}

/// State that the workers of one load run share.
struct SharedState<E> {
    start: Instant,
    permits: Option<Semaphore>,
    /// Requests that all workers have released.
    released: AtomicUsize,
    /// The successor of each request.
    successors: Arc<[Successor]>,
    exchange: E,
}

/// Sends the requests of one worker. Returns the highest CPU share of its thread.
async fn run_worker<E, F>(
    worker: Worker,
    own_requests: Vec<(usize, Duration)>,
    shared: Arc<SharedState<E>>,
    ended: mpsc::Sender<(Record, Instant)>,
) -> f64
where
    E: Fn(usize) -> F + Send + Sync + 'static,
    F: Future<Output = Exchange> + Send + 'static,
{
    let busy = workers::BusyMeter::default();
    let work = async {
        let mut timer = PreciseTimer::new(worker.is_precise);
        let mut tasks = JoinSet::new();
        for (index, scheduled) in own_requests {
            timer.wait_until(shared.start + scheduled).await;
            let released = shared.start.elapsed();
            shared.released.fetch_add(1, Ordering::Relaxed);
            tasks.spawn(chain(index, scheduled, released, Arc::clone(&shared), ended.clone()));
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

/// Only the end of the worker aborts request tasks, so a task that failed to join has panicked.
fn resume_panic(joined: Result<(), tokio::task::JoinError>) {
    if let Err(error) = joined {
        std::panic::resume_unwind(error.into_panic());
    }
}

/// Sends a request and then its successors, one by one.
async fn chain<E, F>(
    mut index: usize,
    mut scheduled: Duration,
    mut released: Duration,
    shared: Arc<SharedState<E>>,
    ended: mpsc::Sender<(Record, Instant)>,
) where
    E: Fn(usize) -> F + Send + Sync,
    F: Future<Output = Exchange> + Send,
{
    loop {
        send(index, scheduled, released, Arc::clone(&shared), ended.clone()).await;
        let Some((next, pause)) = shared.successors.get(index).copied().flatten() else {
            return;
        };
        scheduled = shared.start.elapsed() + pause;
        sleep(pause).await;
        released = shared.start.elapsed();
        shared.released.fetch_add(1, Ordering::Relaxed);
        index = next;
    }
}

async fn send<E, F>(
    index: usize,
    scheduled: Duration,
    released: Duration,
    shared: Arc<SharedState<E>>,
    ended: mpsc::Sender<(Record, Instant)>,
) where
    E: Fn(usize) -> F,
    F: Future<Output = Exchange>,
{
    let permit = match &shared.permits {
        Some(permits) => Some(permits.acquire().await.expect("nothing closes the semaphore")),
        None => None,
    };
    // Without a limit the client itself causes any delay from here on.
    let admitted = permit.as_ref().map_or(released, |_| shared.start.elapsed());
    let Exchange { started, result } = (shared.exchange)(index).await;
    drop(permit);
    let end = Instant::now();
    let record = Record {
        index,
        scheduled,
        released,
        admitted,
        started: started - shared.start,
        result,
    };
    // The receiver is gone once the run has been cancelled.
    drop(ended.send((record, end)).await);
}

impl RunningTotals {
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

    /// The totals as a progress report.
    pub(super) fn progress(&self, phase: RunPhase, asked_rate: Option<f64>) -> Progress {
        Progress {
            phase,
            total: self.total,
            released: self.released,
            done: self.done,
            failed: self.failed,
            in_flight: self.in_flight,
            elapsed: self.start.elapsed(),
            asked_rate,
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
