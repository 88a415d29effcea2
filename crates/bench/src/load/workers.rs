//! The worker threads that send requests and read answers. Each has a runtime of its own, and no task moves between
//! threads.
//!
//! The threads are not bound to cores. The benchmark often shares its machine with the engines, and a bound thread that
//! cannot move aside for an engine is late itself.

use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::time::{ClockId, clock_gettime};
use tokio::runtime::{Builder, Handle};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::record::ClientUsage;

/// Most threads. One keeps up with more than 200,000 events per second, and each further one takes a core from other
/// processes on this machine.
const MOST: usize = 4;

/// The limit of open files that is requested: one descriptor per request in flight.
const DESCRIPTORS: u64 = 1 << 20;

/// The window over which the CPU use of a thread is measured. Longer than a hiccup, shorter than a run.
const WINDOW: Duration = Duration::from_millis(500);

/// The worker threads. They run until this is dropped.
#[derive(Debug)]
pub(crate) struct Workers {
    all: Vec<Worker>,
    threads: Vec<JoinHandle<()>>,
    stop: Option<DropGuard>,
}

/// One worker thread.
#[derive(Debug, Clone)]
pub(super) struct Worker {
    pub(super) handle: Handle,
    /// Whether it runs on real time. Tests can pause time.
    pub(super) is_precise: bool,
}

impl Workers {
    /// Starts one thread for every two cores, at most [`MOST`]: the other cores are for the server.
    ///
    /// # Errors
    /// When a runtime or a thread cannot be started.
    pub(crate) fn start() -> io::Result<Self> {
        xpyd_base::http1::descriptors(DESCRIPTORS);
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let stop = CancellationToken::new();
        let mut started = Self {
            all: Vec::new(),
            threads: Vec::new(),
            stop: Some(stop.clone().drop_guard()),
        };
        for number in 0..(cores / 2).clamp(1, MOST) {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            started.all.push(Worker {
                handle: runtime.handle().clone(),
                is_precise: true,
            });
            let stop = stop.clone();
            let thread = std::thread::Builder::new().name(format!("load-{number}"));
            let thread = thread.spawn(move || runtime.block_on(stop.cancelled()))?;
            started.threads.push(thread);
        }
        Ok(started)
    }

    /// Uses the caller's own runtime instead of a thread.
    #[cfg(test)]
    pub(super) fn here() -> Self {
        Self {
            all: vec![Worker {
                handle: Handle::current(),
                is_precise: false,
            }],
            threads: Vec::new(),
            stop: None,
        }
    }

    pub(super) fn all(&self) -> &[Worker] {
        &self.all
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        drop(self.stop.take());
        for thread in self.threads.drain(..) {
            // A thread that panicked has already printed its message.
            drop(thread.join());
        }
    }
}

/// The highest share of its core that a thread used in any window, in parts per million.
#[derive(Debug, Default)]
pub(super) struct BusyMeter(AtomicU64);

impl BusyMeter {
    /// Measures this thread for as long as the future is polled.
    pub(super) async fn watch(&self) {
        let mut turns = interval(WINDOW);
        turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut before = (Instant::now(), thread_time());
        loop {
            turns.tick().await;
            let now = (Instant::now(), thread_time());
            let window = now.0 - before.0;
            if window >= WINDOW / 2 {
                let parts = (now.1.saturating_sub(before.1)).as_micros() * 1_000_000 / window.as_micros();
                self.0
                    .fetch_max(u64::try_from(parts).unwrap_or(u64::MAX), Ordering::Relaxed);
                before = now;
            }
        }
    }

    /// The share, 0 to 1. 0 if the run was shorter than a window.
    pub(super) fn most(&self) -> f64 {
        self.0.load(Ordering::Relaxed) as f64 / 1e6
    }
}

/// CPU time of this thread.
fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Measures the CPU time of this process from its start on.
#[derive(Debug)]
pub(super) struct CpuMeter {
    start: Instant,
    used: Duration,
}

impl CpuMeter {
    pub(super) fn start() -> Self {
        Self {
            start: Instant::now(),
            used: process_time(),
        }
    }

    pub(super) fn usage(&self, threads: usize, busiest: f64) -> ClientUsage {
        ClientUsage {
            threads,
            busiest,
            processor_time: process_time().saturating_sub(self.used),
            wall_time: self.start.elapsed(),
            cores: std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
        }
    }
}

/// CPU time of all threads of this process, user and system.
fn process_time() -> Duration {
    let time = |value: nix::sys::time::TimeVal| {
        let micros = value.tv_sec() * 1_000_000 + value.tv_usec();
        Duration::from_micros(u64::try_from(micros).unwrap_or_default())
    };
    getrusage(UsageWho::RUSAGE_SELF).map_or(Duration::ZERO, |usage| {
        time(usage.user_time()) + time(usage.system_time())
    })
}
