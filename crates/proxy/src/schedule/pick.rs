//! Picks the engine of a role for a request: pure functions of the candidates and the request.
//!
//! This module knows no HTTP. The chosen engine can still reject the request; the caller finds that out.

use std::cmp::Reverse;
use std::sync::Arc;

use crate::hash::hash_of;
use xpyd_base::fleet::{EngineId, EngineView};
use xpyd_base::proxy_config::Policy;

/// The `prefix` policy passes over an engine that has this many times the tokens of the least loaded one.
const TOO_LOADED: u64 = 3;

/// An engine that could get the request.
#[derive(Debug, Clone)]
pub(crate) struct Candidate<'view> {
    pub(crate) engine: &'view Arc<EngineView>,
    /// How many turns of the round robin it is away.
    pub(crate) rank: usize,
    /// Tokens of the requests on it.
    pub(crate) tokens: u64,
    /// Tokens of this prompt's beginning that it has read before.
    pub(crate) known: u64,
    /// Whether it has room for the request.
    pub(crate) has_room: bool,
    /// Whether this request has failed on it.
    pub(crate) tried: bool,
}

/// The properties of a request that decide the pick.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SelectionRequest {
    pub(crate) policy: Policy,
    /// The hash of the request's session, which overrides the policy.
    pub(crate) session: Option<u64>,
    /// The hash of the prompt's beginning.
    pub(crate) beginning: u64,
    /// Tokens of the prompt.
    pub(crate) tokens: u64,
}

/// The index of the best candidate with room. A tried candidate is the last resort: while another one serves, the
/// request waits for that one.
pub(crate) fn best(candidates: &[Candidate<'_>], request: &SelectionRequest) -> Option<usize> {
    let last_resort = candidates.iter().all(|candidate| candidate.tried);
    let eligible = || {
        let all = candidates.iter().enumerate();
        all.filter(|(_, candidate)| candidate.has_room && (last_resort || !candidate.tried))
    };
    let home = |key: u64| eligible().max_by_key(|(_, candidate)| affinity(key, &candidate.engine.id));
    let found = match (request.session, request.policy) {
        (Some(session), _) => home(session),
        (None, Policy::ConsistentHash) => home(request.beginning),
        (None, Policy::RoundRobin) => eligible().min_by_key(|(_, candidate)| candidate.rank),
        (None, Policy::LeastTokens) => eligible().min_by_key(|(_, candidate)| (candidate.tokens, candidate.rank)),
        (None, Policy::Prefix) => {
            let least = eligible().map(|(_, candidate)| candidate.tokens).min()?;
            let bound = least.saturating_add(request.tokens).saturating_mul(TOO_LOADED);
            eligible()
                .filter(|(_, candidate)| candidate.tokens.saturating_add(request.tokens) <= bound)
                .min_by_key(|(_, candidate)| (Reverse(candidate.known), candidate.tokens, candidate.rank))
        }
    };
    found.map(|(place, _)| place)
}

/// The candidates for a request without a policy, best first: in turn, or by session. Tried engines come last.
pub(crate) fn in_order<'view>(
    mut candidates: Vec<&'view Arc<EngineView>>,
    turn: usize,
    session: Option<&str>,
    tried: &[EngineId],
) -> Vec<&'view Arc<EngineView>> {
    if let Some(session) = session.map(hash_of) {
        candidates.sort_by_cached_key(|engine| Reverse(affinity(session, &engine.id)));
    } else if !candidates.is_empty() {
        let first = turn % candidates.len();
        candidates.rotate_left(first);
    }
    candidates.sort_by_key(|engine| tried.contains(&engine.id));
    candidates
}

/// The affinity of a key to an engine (rendezvous hashing): a key keeps its engine, and if an engine is lost only its
/// own keys move.
fn affinity(key: u64, engine: &EngineId) -> u64 {
    hash_of((key, engine.as_str()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use xpyd_base::fleet::Role;

    fn engines(count: usize) -> Vec<Arc<EngineView>> {
        (0..count)
            .map(|index| Arc::new(EngineView::fixture(Role::Decode, index)))
            .collect()
    }

    /// Candidates with these tokens and known tokens.
    fn candidates<'view>(engines: &'view [Arc<EngineView>], loads: &[(u64, u64)]) -> Vec<Candidate<'view>> {
        let engines = engines.iter().zip(loads).enumerate();
        engines
            .map(|(rank, (engine, (tokens, known)))| Candidate {
                engine,
                rank,
                tokens: *tokens,
                known: *known,
                has_room: true,
                tried: false,
            })
            .collect()
    }

    fn request(policy: Policy) -> SelectionRequest {
        SelectionRequest {
            policy,
            session: None,
            beginning: 7,
            tokens: 100,
        }
    }

    #[test]
    fn each_policy_has_its_own_first() {
        let engines = engines(3);
        let pick = |policy, loads: [(u64, u64); 3]| best(&candidates(&engines, &loads), &request(policy));
        let loads = [(500, 0), (300, 0), (400, 0)];
        assert_eq!(pick(Policy::RoundRobin, loads), Some(0));
        assert_eq!(pick(Policy::LeastTokens, loads), Some(1));
        assert_eq!(
            pick(Policy::LeastTokens, [(1, 0), (1, 0), (2, 0)]),
            Some(0),
            "in turn where all is equal"
        );
        assert_eq!(pick(Policy::Prefix, loads), Some(1), "nobody knows the prompt");
        assert_eq!(pick(Policy::Prefix, [(500, 64), (300, 0), (400, 128)]), Some(2));
        // Three times 0 + 100, of the least loaded one.
        assert_eq!(pick(Policy::Prefix, [(200, 128), (0, 0), (0, 0)]), Some(0));
        assert_eq!(pick(Policy::Prefix, [(201, 128), (0, 0), (0, 64)]), Some(2));
        assert_eq!(best(&[], &request(Policy::Prefix)), None);
    }

    #[test]
    fn a_full_engine_is_skipped_and_a_tried_one_comes_last() {
        let engines = engines(2);
        for policy in [
            Policy::RoundRobin,
            Policy::LeastTokens,
            Policy::Prefix,
            Policy::ConsistentHash,
        ] {
            let mut both = candidates(&engines, &[(0, 64), (9, 0)]);
            let first = best(&both, &request(policy)).expect("one has room");
            both[first].has_room = false;
            assert_eq!(best(&both, &request(policy)), Some(1 - first));
            both[first].tried = true;
            assert_eq!(best(&both, &request(policy)), Some(1 - first));
            (both[1 - first].has_room, both[first].has_room) = (false, true);
            assert_eq!(best(&both, &request(policy)), None, "the other one is worth the wait");
            both[1 - first].tried = true;
            assert_eq!(best(&both, &request(policy)), Some(first));
        }
    }

    #[test]
    fn requests_without_a_policy_take_turns_or_follow_their_session() {
        let engines = engines(3);
        let first = |session| in_order(engines.iter().collect(), 0, session, &[])[0].id.clone();
        assert_eq!(first(None), EngineId::new(Role::Decode, 0));
        let all = candidates(&engines, &[(0, 0); 3]);
        for session in ["a", "b", "c", "d"] {
            let request = SelectionRequest {
                session: Some(hash_of(session)),
                ..request(Policy::RoundRobin)
            };
            let home = best(&all, &request).expect("an engine");
            assert_eq!(first(Some(session)), all[home].engine.id);
        }
    }

    proptest! {
        #[test]
        fn a_key_stays_unless_its_own_engine_is_lost(key: u64, bound: bool, count in 2_usize..6, lost in 0_usize..6, load in 0_u64..1000) {
            let engines = engines(count);
            let session = bound.then_some(key);
            let policy = if bound { Policy::LeastTokens } else { Policy::ConsistentHash };
            let request = SelectionRequest { session, beginning: key, ..request(policy) };
            let mut all = candidates(&engines, &vec![(0, 0); count]);
            let home = best(&all, &request).expect("an engine");
            all[home].tokens = load;
            all.rotate_left(1);
            let again = best(&all, &request).expect("an engine");
            prop_assert_eq!(&all[again].engine.id, &engines[home].id);
            let lost = EngineId::new(Role::Decode, lost % count);
            all.retain(|candidate| candidate.engine.id != lost);
            let now = best(&all, &request).expect("an engine");
            prop_assert!(all[now].engine.id == engines[home].id || lost == engines[home].id);
        }
    }

    #[test]
    fn keys_spread_over_the_engines() {
        let engines = engines(2);
        let all = candidates(&engines, &[(0, 0); 2]);
        let homes: std::collections::HashSet<_> = (0..32)
            .map(|key| {
                best(
                    &all,
                    &SelectionRequest {
                        beginning: key,
                        ..request(Policy::ConsistentHash)
                    },
                )
            })
            .collect();
        assert_eq!(homes.len(), 2);
    }
}
