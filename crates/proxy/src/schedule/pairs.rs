//! Finds pairs of engines whose hand-offs fail or are slow, from clients' requests. Pure.
//!
//! It only raises a suspicion, because a busy engine is slow as well. The supervisor checks the pair with canaries
//! and decides.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use xpyd_base::fleet::{EngineId, EngineView, Incarnation};

/// A slow first event, measured from the decode leg. A KV transfer takes far less; vLLM gives up a handshake after 5
/// s.
pub(crate) const CRAWL: Duration = Duration::from_secs(2);

/// Bad hand-offs among the newest eight that make a pair suspect.
const TOLERATED: u32 = 3;

/// Minimum time between two suspicions.
const INTERVAL: Duration = Duration::from_secs(5);

/// The newest hand-offs of each pair.
#[derive(Debug, Default)]
pub(crate) struct Pairs {
    recent: BTreeMap<(EngineId, EngineId), Recent>,
    suspected_at: Option<Instant>,
}

#[derive(Debug)]
struct Recent {
    incarnations: (Incarnation, Incarnation),
    /// One bit for each hand-off, the newest lowest; 1 is bad.
    outcomes: u8,
}

impl Pairs {
    /// Records a good or bad hand-off. Returns whether the pair is suspect now.
    pub(crate) fn note(&mut self, prefill: &EngineView, decode: &EngineView, is_bad: bool, now: Instant) -> bool {
        let incarnations = (prefill.incarnation, decode.incarnation);
        let fresh = Recent {
            incarnations,
            outcomes: 0,
        };
        let recent = self
            .recent
            .entry((prefill.id.clone(), decode.id.clone()))
            .or_insert(fresh);
        if recent.incarnations != incarnations {
            *recent = Recent {
                incarnations,
                outcomes: 0,
            };
        }
        recent.outcomes = recent.outcomes << 1 | u8::from(is_bad);
        let is_quiet = self
            .suspected_at
            .is_none_or(|at| now.saturating_duration_since(at) >= INTERVAL);
        if recent.outcomes.count_ones() < TOLERATED || !is_quiet {
            return false;
        }
        recent.outcomes = 0;
        self.suspected_at = Some(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xpyd_base::fleet::Role;

    fn engine(role: Role, incarnation: u32) -> EngineView {
        EngineView {
            incarnation: Incarnation(incarnation),
            ..EngineView::fixture(role, 0)
        }
    }

    #[test]
    fn three_of_eight_bad_hand_offs_make_a_pair_suspect() {
        let (prefill, decode) = (engine(Role::Prefill, 1), engine(Role::Decode, 1));
        let (mut pairs, now) = (Pairs::default(), Instant::now());
        let mut note = |is_bad| pairs.note(&prefill, &decode, is_bad, now);
        assert!(!note(true) && !note(true));
        for _ in 0..7 {
            assert!(!note(false), "the first ones are forgotten");
        }
        assert!(!note(true) && !note(true) && note(true));
    }

    #[test]
    fn suspicions_are_rare_and_end_with_the_incarnation() {
        let (prefill, decode) = (engine(Role::Prefill, 1), engine(Role::Decode, 1));
        let (mut pairs, now) = (Pairs::default(), Instant::now());
        let count = |pairs: &mut Pairs, decode: &EngineView, now| {
            (0..12).filter(|_| pairs.note(&prefill, decode, true, now)).count()
        };
        assert_eq!(count(&mut pairs, &decode, now), 1);
        assert_eq!(count(&mut pairs, &decode, now + INTERVAL), 1);
        let renewed = engine(Role::Decode, 2);
        let later = now + INTERVAL * 3;
        assert!(!pairs.note(&prefill, &renewed, true, later) && !pairs.note(&prefill, &renewed, true, later));
    }
}
