//! Between a failure and what follows from it: the cause, which the engine's log is asked for. PURE.
//!
//! The log is asked once the tree is empty: then nobody writes to it any more, and nothing could start earlier anyway.

use tokio::time::Instant;

use super::{Action, CAUSE_DEADLINE, Fleet, Goal, Tree};
use crate::fleet::{EngineState, Exit};
use crate::supervisor::Cause;

/// A failure whose cause is not known yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unexplained {
    /// When it failed.
    since: Instant,
    /// How its leader ended, if that was it.
    exit: Option<Exit>,
    /// Whether its log was asked.
    asked: bool,
}

impl Fleet {
    /// The engine has failed while clients are served: it waits until its cause is known.
    pub(super) fn await_explanation(&mut self, index: usize, exit: Option<Exit>, now: Instant) {
        let engine = &mut self.engines[index];
        if engine.goal != Goal::Stop {
            // Its `until` is that of the kill.
            engine.state = EngineState::Backoff;
            engine.unexplained = Some(Unexplained {
                since: now,
                exit,
                asked: false,
            });
        }
    }

    /// Has the logs asked of those that nobody writes to any more.
    pub(super) fn ask_for_explanations(&mut self, now: Instant) {
        for engine in self.engines.iter_mut().filter(|engine| engine.tree == Tree::Absent) {
            if let Some(unexplained) = engine.unexplained.as_mut().filter(|unexplained| !unexplained.asked) {
                unexplained.asked = true;
                engine.until = Some(now + CAUSE_DEADLINE);
                let explain = Action::Explain(engine.spec.id.clone(), engine.incarnation, unexplained.exit);
                self.actions.push(explain);
            }
        }
    }

    /// The log has answered, or its time is over.
    pub(super) fn explained(&mut self, index: usize, cause: Cause, now: Instant) {
        let engine = &mut self.engines[index];
        let Some(unexplained) = engine.unexplained.take() else {
            return;
        };
        engine.until = None;
        self.changed = true;
        if let Some(found) = cause.found {
            let reason = engine.reason.get_or_insert_default();
            reason.push_str(": ");
            reason.push_str(&found);
        }
        self.restart_by_policy(index, cause.retry, unexplained.since, now);
    }
}
