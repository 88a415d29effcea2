//! Decides when the scheduler avoids an engine that fails one request after the other.
//!
//! Pure. An open breaker only makes an engine the last choice: if no other engine is left, it still gets requests.

use std::time::Duration;

use tokio::time::Instant;

/// Failures in a row that open the breaker. One or two happen to a healthy engine.
const TOLERATED: u32 = 3;

/// How long the breaker stays open at first. Each further failure doubles it.
const FIRST: Duration = Duration::from_secs(1);

/// How long the breaker stays open at most.
const LONGEST: Duration = Duration::from_secs(30);

/// The failures of one incarnation.
#[derive(Debug, Default)]
pub(crate) struct Breaker {
    failures: u32,
    open_until: Option<Instant>,
}

impl Breaker {
    /// Whether other engines are preferred now.
    pub(crate) fn is_open(&self, now: Instant) -> bool {
        self.open_until.is_some_and(|until| now < until)
    }

    /// A request goes to the engine. If it is a probe after failures, other requests wait for its result.
    pub(crate) fn enter(&mut self, now: Instant) {
        if self.open_until.is_some() {
            self.open_until = Some(now + self.span());
        }
    }

    /// A request failed by the engine's fault. Returns whether that opened the breaker.
    pub(crate) fn fail(&mut self, now: Instant) -> bool {
        self.failures = self.failures.saturating_add(1);
        let was_open = self.open_until.is_some();
        if self.failures >= TOLERATED {
            self.open_until = Some(now + self.span());
        }
        !was_open && self.open_until.is_some()
    }

    /// A request was answered, so the count of failures starts again.
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
    fn the_breaker_opens_at_the_third_failure() {
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
    fn one_request_probes_a_failing_engine() {
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
