//! The threads that requests run on: one runtime each, nothing of which ever moves to another thread.
//!
//! They are not bound to cores. The benchmark often shares its machine with the engines, and a thread that may not step
//! aside for one of theirs is late itself.

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

use crate::bench::record::Effort;

/// Threads at the most. One keeps up with more than 200,000 events per second, and every further one takes a core from
/// whatever else runs here.
const MOST: usize = 4;

/// Descriptors that are asked for: one per request in flight.
const DESCRIPTORS: u64 = 1 << 20;

/// Over how long a thread's use of its core is looked at. Longer than a hiccup, shorter than a run.
const WINDOW: Duration = Duration::from_millis(500);

/// Threads that run until this is dropped.
#[derive(Debug)]
pub(in crate::bench) struct Lanes {
    all: Vec<Lane>,
    threads: Vec<JoinHandle<()>>,
    stop: Option<DropGuard>,
}

/// One thread.
#[derive(Debug, Clone)]
pub(super) struct Lane {
    pub(super) handle: Handle,
    /// Whether its time is the kernel's, which tests may pause.
    pub(super) is_precise: bool,
}

impl Lanes {
    /// As many threads as half of the cores: the other half is for whom this is sent to.
    ///
    /// # Errors
    /// When a runtime or a thread cannot be started.
    pub(in crate::bench) fn start() -> io::Result<Self> {
        crate::wire::descriptors(DESCRIPTORS);
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let stop = CancellationToken::new();
        let mut started = Self {
            all: Vec::new(),
            threads: Vec::new(),
            stop: Some(stop.clone().drop_guard()),
        };
        for number in 0..(cores / 2).clamp(1, MOST) {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            started.all.push(Lane {
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

    /// The caller's own runtime in place of a thread.
    #[cfg(test)]
    pub(super) fn here() -> Self {
        Self {
            all: vec![Lane {
                handle: Handle::current(),
                is_precise: false,
            }],
            threads: Vec::new(),
            stop: None,
        }
    }

    pub(super) fn all(&self) -> &[Lane] {
        &self.all
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        drop(self.stop.take());
        for thread in self.threads.drain(..) {
            // One that panicked has said so.
            drop(thread.join());
        }
    }
}

/// How much of its core the thread that watches has used, in the window where it used most. Parts of a million.
#[derive(Debug, Default)]
pub(super) struct Busy(AtomicU64);

impl Busy {
    /// Watches this thread for as long as it is polled.
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

    /// The share, 0 to 1. 0 for what was shorter than a window.
    pub(super) fn most(&self) -> f64 {
        self.0.load(Ordering::Relaxed) as f64 / 1e6
    }
}

/// Time that this thread has spent on a core.
fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Counts what this process uses from its start on.
#[derive(Debug)]
pub(super) struct Meter {
    start: Instant,
    used: Duration,
}

impl Meter {
    pub(super) fn start() -> Self {
        Self {
            start: Instant::now(),
            used: process_time(),
        }
    }

    pub(super) fn effort(&self, threads: usize, busiest: f64) -> Effort {
        Effort {
            threads,
            busiest,
            processor_time: process_time().saturating_sub(self.used),
            wall_time: self.start.elapsed(),
            cores: std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
        }
    }
}

/// Time that all threads of this process have spent on cores, in and outside the kernel.
fn process_time() -> Duration {
    let time = |value: nix::sys::time::TimeVal| {
        let micros = value.tv_sec() * 1_000_000 + value.tv_usec();
        Duration::from_micros(u64::try_from(micros).unwrap_or_default())
    };
    getrusage(UsageWho::RUSAGE_SELF).map_or(Duration::ZERO, |usage| {
        time(usage.user_time()) + time(usage.system_time())
    })
}
