//! A timer that is precise to some tens of microseconds. The timers of the runtime are rounded up to its tick of 1 ms.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};

/// Wakes one task at one instant at a time.
#[derive(Debug)]
pub(super) struct PreciseTimer(Option<KernelTimer>);

/// A kernel timer (timerfd) that wakes the runtime like a socket.
#[derive(Debug)]
struct KernelTimer {
    timer: TimerFd,
    wakes: AsyncFd<OwnedFd>,
}

impl PreciseTimer {
    /// `is_precise` is false where tests pause time, which the kernel timer does not follow.
    pub(super) fn new(is_precise: bool) -> Self {
        Self(is_precise.then(KernelTimer::new).and_then(Result::ok))
    }

    /// Waits until `due`. Returns at once if it has passed: a timer of the runtime would wait for its next tick.
    pub(super) async fn wait_until(&mut self, due: Instant) {
        while let Some(left) = due
            .checked_duration_since(Instant::now())
            .filter(|left| !left.is_zero())
        {
            if !matches!(&self.0, Some(timer) if timer.wait(left).await.is_ok()) {
                sleep_until(due).await;
            }
        }
    }
}

impl KernelTimer {
    #[expect(unsafe_code, reason = "the runtime does not know this descriptor")]
    fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        let descriptor = timer.as_fd().try_clone_to_owned()?;
        // SAFETY: the descriptor is owned, so it is valid for as long as what it is registered with.
        let wakes = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?;
        Ok(Self { timer, wakes })
    }

    /// Waits for `left`, or a little less.
    async fn wait(&self, left: Duration) -> io::Result<()> {
        self.timer
            .set(Expiration::OneShot(left.into()), TimerSetTimeFlags::empty())?;
        self.wakes.readable().await?.clear_ready();
        Ok(())
    }
}
