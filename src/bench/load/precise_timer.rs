//! Waking at an instant, to some tens of microseconds. The runtime's own timers are rounded up to its tick of a millisecond.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};

/// Wakes one task, one instant at a time.
#[derive(Debug)]
pub(super) struct Alarm(Option<Timer>);

/// A timer of the kernel, which wakes the runtime as a socket does.
#[derive(Debug)]
struct Timer {
    timer: TimerFd,
    wakes: AsyncFd<OwnedFd>,
}

impl Alarm {
    /// `is_precise` is false where time may be paused, which no kernel knows of.
    pub(super) fn new(is_precise: bool) -> Self {
        Self(is_precise.then(Timer::new).and_then(Result::ok))
    }

    /// Waits until it is due; not at all if it is already, which a timer of the runtime would round up to its next tick.
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

impl Timer {
    #[expect(
        unsafe_code,
        reason = "the runtime must be told of a descriptor that it does not know"
    )]
    fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        let descriptor = timer.as_fd().try_clone_to_owned()?;
        // SAFETY: the descriptor is owned, so it is valid for as long as what it is registered with.
        let wakes = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?;
        Ok(Self { timer, wakes })
    }

    /// Waits for so long, or a little less.
    async fn wait(&self, left: Duration) -> io::Result<()> {
        self.timer
            .set(Expiration::OneShot(left.into()), TimerSetTimeFlags::empty())?;
        self.wakes.readable().await?.clear_ready();
        Ok(())
    }
}
