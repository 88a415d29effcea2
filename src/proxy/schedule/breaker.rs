//! When an engine that fails one request after the other is left alone for a while.
//!
//! Pure. It only makes an engine the last choice: where no other is left, requests still go to it.

use std::time::Duration;

use tokio::time::Instant;

/// Failures in a row that open it. One or two happen to a healthy engine.
const TOLERATED: u32 = 3;

/// How long it stays open at first; doubled by every failure after that.
const FIRST: Duration = Duration::from_secs(1);

/// How long it stays open at most.
const LONGEST: Duration = Duration::from_secs(30);

/// What is known of one incarnation.
#[derive(Debug, Default)]
pub(crate) struct Breaker {
    failures: u32,
    open_until: Option<Instant>,
}

impl Breaker {
    /// Whether other engines are to be preferred now.
    pub(crate) fn is_open(&self, now: Instant) -> bool {
        self.open_until.is_some_and(|until| now < until)
    }

    /// A request goes to the engine. If that is to show whether it is well again, no other one follows until that is known.
    pub(crate) fn enter(&mut self, now: Instant) {
        if self.open_until.is_some() {
            self.open_until = Some(now + self.span());
        }
    }

    /// A request failed, and the engine is to blame. Whether that opened it.
    pub(crate) fn fail(&mut self, now: Instant) -> bool {
        self.failures = self.failures.saturating_add(1);
        let was_open = self.open_until.is_some();
        if self.failures >= TOLERATED {
            self.open_until = Some(now + self.span());
        }
        !was_open && self.open_until.is_some()
    }

    /// A request was answered.
    pub(crate) fn succeed(&mut self) {
        *self = Self::default();
    }

    fn span(&self) -> Duration {
        let doublings = self.failures.saturating_sub(TOLERATED).min(16);
        FIRST.saturating_mul(1 << doublings).min(LONGEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn it_opens_at_the_third_failure_in_a_row_for_longer_each_time() {
        let start = Instant::now();
        let mut breaker = Breaker::default();
        assert!(!breaker.fail(start) && !breaker.fail(start));
        breaker.succeed();
        assert!(!breaker.fail(start) && !breaker.fail(start) && !breaker.is_open(start));
        assert!(breaker.fail(start), "told once");
        assert!(breaker.is_open(start) && !breaker.is_open(after(start, 1)));
        assert!(!breaker.fail(after(start, 1)));
        assert!(breaker.is_open(after(start, 2)) && !breaker.is_open(after(start, 3)));
        for _ in 0..1000 {
            breaker.fail(start);
        }
        assert!(breaker.is_open(after(start, 29)) && !breaker.is_open(after(start, 30)));
    }

    #[test]
    fn one_request_shows_whether_the_engine_is_well_again() {
        let start = Instant::now();
        let mut breaker = Breaker::default();
        for _ in 0..TOLERATED {
            breaker.fail(start);
        }
        breaker.enter(after(start, 1));
        assert!(breaker.is_open(after(start, 1)), "others wait for the first one's end");
        breaker.succeed();
        assert!(!breaker.is_open(after(start, 1)));
        breaker.enter(start);
        assert!(!breaker.is_open(start));
    }
}
