//! The restart policy: whether and when an engine that failed starts again. PURE: time and randomness are arguments.

use std::time::Duration;

use tokio::time::Instant;

use crate::fleet::Retry;
use crate::plan::{RestartPolicy, RestartWhen};

/// The largest jitter, as a share of the wait: engines that failed together must not start together for ever.
const SPREAD: f64 = 0.25;

/// The failures of one engine, over all its incarnations.
#[derive(Debug, Clone, Default)]
pub(super) struct History {
    /// Restarts since it was last stable.
    in_a_row: u32,
    /// Since it was last stable, it was restarted after a failure with [`Retry::Once`].
    raced: bool,
    /// Since when its current incarnation has been ready.
    ready_since: Option<Instant>,
}

/// The decision after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    /// It starts again after this wait.
    Restart(Duration),
    /// It stays failed: the policy says so, or its cause would come again.
    Leave,
    /// It stays failed: it reached the limit of restarts without being stable in between.
    CrashLoop,
}

impl History {
    /// Its current incarnation serves from `now` on.
    pub(super) fn ready(&mut self, now: Instant) {
        self.ready_since = Some(now);
    }

    /// It failed at `now`. `retry` says whether another start can help. `dice` lies in 0..1 and chooses the jitter.
    pub(super) fn failed(&mut self, policy: &RestartPolicy, retry: Retry, dice: f64, now: Instant) -> Decision {
        let stable = |since| now.saturating_duration_since(since) >= policy.stable_after;
        let was_stable = self.ready_since.take().is_some_and(stable);
        if was_stable {
            (self.in_a_row, self.raced) = (0, false);
        }
        match (policy.policy, retry) {
            (RestartWhen::Never, _) => return Decision::Leave,
            // An engine that was stable has disproved that this cause always comes again.
            (RestartWhen::OnFailure, Retry::Never) if !was_stable => return Decision::Leave,
            (RestartWhen::OnFailure, Retry::Once) if self.raced => return Decision::CrashLoop,
            (RestartWhen::OnFailure | RestartWhen::Always, _) => {}
        }
        self.raced |= retry == Retry::Once;
        if self.in_a_row >= policy.max_restarts {
            return Decision::CrashLoop;
        }
        let doubled = 2_u32.saturating_pow(self.in_a_row);
        let wait = policy.backoff.saturating_mul(doubled).min(policy.max_backoff);
        self.in_a_row += 1;
        Decision::Restart(wait.mul_f64(1.0 + SPREAD * dice))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn policy(policy: RestartWhen) -> RestartPolicy {
        RestartPolicy {
            policy,
            max_restarts: 4,
            backoff: Duration::from_secs(1),
            max_backoff: Duration::from_secs(5),
            stable_after: Duration::from_mins(5),
        }
    }

    fn seconds(seconds: u64) -> Decision {
        Decision::Restart(Duration::from_secs(seconds))
    }

    #[test]
    fn backoff_doubles_up_to_its_limit_then_is_a_crash_loop() {
        let (mut history, now) = (History::default(), Instant::now());
        let mut fail = || history.failed(&policy(RestartWhen::OnFailure), Retry::Yes, 0.0, now);
        let decisions = [(); 6].map(|()| fail());
        let expected = [seconds(1), seconds(2), seconds(4), seconds(5)];
        assert_eq!(decisions[..4], expected);
        assert_eq!(decisions[4..], [Decision::CrashLoop; 2]);
    }

    #[test]
    fn only_a_stable_time_resets_the_count() {
        let (mut history, policy) = (History::default(), policy(RestartWhen::OnFailure));
        let start = Instant::now();
        assert_eq!(history.failed(&policy, Retry::Yes, 0.0, start), seconds(1));
        history.ready(start);
        let almost = start + policy.stable_after.checked_sub(Duration::from_millis(1)).unwrap();
        assert_eq!(history.failed(&policy, Retry::Yes, 0.0, almost), seconds(2));
        history.ready(almost);
        let stable = almost + policy.stable_after;
        assert_eq!(history.failed(&policy, Retry::Yes, 0.0, stable), seconds(1));
        // The time that was stable counts once.
        assert_eq!(
            history.failed(&policy, Retry::Yes, 0.0, stable + policy.stable_after),
            seconds(2)
        );
    }

    #[test]
    fn policy_and_cause_decide_on_a_restart() {
        let now = Instant::now();
        let decide = |when, retry| History::default().failed(&policy(when), retry, 0.0, now);
        assert_eq!(decide(RestartWhen::Never, Retry::Yes), Decision::Leave);
        assert_eq!(decide(RestartWhen::OnFailure, Retry::Never), Decision::Leave);
        assert_eq!(decide(RestartWhen::Always, Retry::Never), seconds(1));
    }

    #[test]
    fn retry_once_allows_one_restart() {
        let (mut history, now) = (History::default(), Instant::now());
        let mut fail = |retry| history.failed(&policy(RestartWhen::OnFailure), retry, 0.0, now);
        let decisions = [Retry::Yes, Retry::Once, Retry::Yes, Retry::Once].map(&mut fail);
        assert_eq!(decisions, [seconds(1), seconds(2), seconds(4), Decision::CrashLoop]);
        let mut history = History::default();
        let mut fail = || history.failed(&policy(RestartWhen::Always), Retry::Once, 0.0, now);
        assert_eq!([fail(), fail()], [seconds(1), seconds(2)]);
    }

    #[test]
    fn a_stable_time_overrides_the_cause() {
        let policy = policy(RestartWhen::OnFailure);
        for retry in [Retry::Never, Retry::Once] {
            let (mut history, start) = (History::default(), Instant::now());
            history.failed(&policy, Retry::Once, 0.0, start);
            history.ready(start);
            let stable = start + policy.stable_after;
            assert_eq!(history.failed(&policy, retry, 0.0, stable), seconds(1));
            assert_ne!(history.failed(&policy, retry, 0.0, stable), seconds(2), "{retry:?}");
        }
    }

    proptest! {
        #[test]
        fn jitter_adds_at_most_a_quarter(failures in 0_u32..40, dice in 0.0..1.0) {
            let unbounded = RestartPolicy { max_restarts: u32::MAX, ..policy(RestartWhen::Always) };
            let mut history = History { in_a_row: failures, ..History::default() };
            let plain = history.clone().failed(&unbounded, Retry::Yes, 0.0, Instant::now());
            let spread = history.failed(&unbounded, Retry::Yes, dice, Instant::now());
            let (Decision::Restart(plain), Decision::Restart(spread)) = (plain, spread) else {
                return Err(TestCaseError::fail("not restarted"));
            };
            prop_assert!(plain <= spread && spread <= plain.mul_f64(1.25));
        }
    }
}
