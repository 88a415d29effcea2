//! Which engine of a role gets a request: pure functions of the candidates, a turn and a session.
//!
//! Knows nothing of HTTP; whether the chosen engine still lets a request in is the caller's to find out.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use crate::fleet::{EngineId, EngineView};

/// The candidates, best first.
///
/// Without a session the turn decides, like the reference proxy's counter. A session always prefers the same engine of
/// a role; when that one is lost only its own sessions move (rendezvous hashing). Engines already tried for this
/// request come last.
pub(super) fn in_order<'view>(
    mut candidates: Vec<&'view Arc<EngineView>>,
    turn: usize,
    session: Option<&str>,
    tried: &[EngineId],
) -> Vec<&'view Arc<EngineView>> {
    if let Some(session) = session {
        candidates.sort_by_cached_key(|engine| std::cmp::Reverse(affinity(session, &engine.id)));
    } else if !candidates.is_empty() {
        let first = turn % candidates.len();
        candidates.rotate_left(first);
    }
    candidates.sort_by_key(|engine| tried.contains(&engine.id));
    candidates
}

/// How much a session wants an engine.
fn affinity(session: &str, engine: &EngineId) -> u64 {
    let mut hasher = DefaultHasher::new();
    session.hash(&mut hasher);
    engine.as_str().hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fleet::{Endpoint, EngineState, Incarnation, Load, Role};

    fn engines(count: usize) -> Vec<Arc<EngineView>> {
        (0..count)
            .map(|index| EngineView {
                id: EngineId::new(Role::Decode, index),
                role: Role::Decode,
                incarnation: Incarnation::FIRST,
                state: EngineState::Ready,
                endpoint: Endpoint {
                    host: "127.0.0.1".into(),
                    port: 1,
                    tensor_parallel: 1,
                    receiver: None,
                },
                pid: None,
                reason: None,
                restart_at: None,
                load: Arc::new(Load::default()),
            })
            .map(Arc::new)
            .collect()
    }

    fn first(engines: &[Arc<EngineView>], turn: usize, session: Option<&str>, tried: &[EngineId]) -> Option<EngineId> {
        in_order(engines.iter().collect(), turn, session, tried)
            .first()
            .map(|engine| engine.id.clone())
    }

    #[test]
    fn turns_go_round() {
        let engines = engines(3);
        let picked: Vec<_> = (0..6).filter_map(|turn| first(&engines, turn, None, &[])).collect();
        let expected: Vec<_> = (0..6).map(|turn| EngineId::new(Role::Decode, turn % 3)).collect();
        assert_eq!(picked, expected);
        assert_eq!(first(&[], 5, None, &[]), None);
    }

    #[test]
    fn a_tried_engine_is_the_last_resort() {
        let engines = engines(2);
        let tried = [EngineId::new(Role::Decode, 0)];
        assert_eq!(first(&engines, 0, None, &tried), Some(EngineId::new(Role::Decode, 1)));
        assert_eq!(
            first(&engines[..1], 0, None, &tried),
            Some(EngineId::new(Role::Decode, 0))
        );
    }

    proptest! {
        #[test]
        fn a_session_stays_unless_its_own_engine_is_lost(session in "[a-z0-9]{1,8}", count in 2_usize..6, lost in 0_usize..6, turn: usize) {
            let all = engines(count);
            let home = first(&all, turn, Some(&session), &[]).expect("an engine");
            prop_assert_eq!(&first(&all, turn.wrapping_add(1), Some(&session), &[]).expect("an engine"), &home);
            let lost = EngineId::new(Role::Decode, lost % count);
            let rest: Vec<Arc<EngineView>> = all.into_iter().filter(|engine| engine.id != lost).collect();
            let now = first(&rest, turn, Some(&session), &[]).expect("an engine");
            prop_assert!(now == home || lost == home);
        }
    }

    #[test]
    fn sessions_spread_over_the_engines() {
        let engines = engines(2);
        let homes: std::collections::HashSet<_> = (0..32)
            .filter_map(|number| first(&engines, 0, Some(&format!("session {number}")), &[]))
            .collect();
        assert_eq!(homes.len(), 2);
    }
}
