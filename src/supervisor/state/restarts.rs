//! How single engines leave and come back while the fleet serves: by policy after a failure, or on request. PURE.

use rand::RngExt;
use tokio::time::Instant;

use super::{Action, Engine, Fleet, Goal, START_GRACE, Stage, Tree};
use crate::fleet::{EngineId, EngineState, Incarnation, Load, Retry};
use crate::plan::RestartWhen;
use crate::supervisor::restart::{self, Decision};
use crate::supervisor::{Ending, Refusal};

/// What is said of an engine that is given up.
const KEPT_FAILING: &str = "; it kept failing and is not started again";

impl Fleet {
    /// The engine failed at `since` while clients are served, and its cause is known as far as it will be.
    pub(super) fn restart_by_policy(&mut self, index: usize, retry: Retry, since: Instant, now: Instant) {
        let dice = self.random.as_mut().map_or(0.0, RngExt::random);
        let engine = &mut self.engines[index];
        match engine.restarts.failed(&self.limits.restart, retry, dice, since) {
            Decision::Restart(wait) => engine.restart_at = Some(since + wait),
            Decision::Leave => {
                engine.state = EngineState::Failed;
                if retry == Retry::Never && self.limits.restart.policy == RestartWhen::OnFailure {
                    let reason = engine.reason.get_or_insert_default();
                    reason.push_str("; that would come again, so it is not started again");
                }
                self.end_if_role_is_lost(index, false, now);
            }
            Decision::CrashLoop => {
                engine.state = EngineState::Failed;
                let reason = engine.reason.get_or_insert_default();
                reason.push_str(KEPT_FAILING);
                self.end_if_role_is_lost(index, true, now);
            }
        }
    }

    /// An engine that serves has been restarted in vain for its hand-offs as often as the policy allows.
    pub(super) fn give_up(&mut self, index: usize, reason: &str, now: Instant) {
        if self.mark_failed(index, &format!("{reason}{KEPT_FAILING}"), now) {
            self.end_if_role_is_lost(index, true, now);
        }
    }

    /// Ends the run if no engine of the failed one's role serves or will.
    fn end_if_role_is_lost(&mut self, index: usize, crash_loop: bool, now: Instant) {
        let failed = &self.engines[index];
        let role = failed.spec.role;
        let serves_or_will = |engine: &Engine| match engine.state {
            EngineState::Planned
            | EngineState::Starting
            | EngineState::Healthy
            | EngineState::Ready
            | EngineState::Backoff => true,
            EngineState::Draining | EngineState::Stopping | EngineState::Stopped => engine.goal == Goal::StartAgain,
            EngineState::Failed => false,
        };
        if self
            .engines
            .iter()
            .any(|engine| engine.spec.role == role && serves_or_will(engine))
        {
            return;
        }
        let (engine, reason) = (failed.spec.id.clone(), failed.reason.clone().unwrap_or_default());
        let ending = if crash_loop {
            Ending::CrashLoop { role, engine, reason }
        } else {
            Ending::LostRole { role, engine, reason }
        };
        self.end(ending, now);
    }

    /// Processes of the engine outlived SIGKILL, and a second incarnation must not run beside them.
    pub(super) fn cannot_restart(&mut self, index: usize, now: Instant) {
        let restarts = self.restarts_engines();
        let engine = &mut self.engines[index];
        let leaves = engine.state == EngineState::Backoff || engine.state == EngineState::Stopping;
        if restarts && leaves {
            let reason = engine.reason.get_or_insert_with(|| "was stopped".to_owned());
            reason.push_str("; some of its processes cannot be ended, so it is not started again");
            (engine.restart_at, engine.unexplained) = (None, None);
            let was_wanted = engine.goal != Goal::Stop;
            self.enter(index, EngineState::Failed, None);
            if was_wanted {
                self.end_if_role_is_lost(index, false, now);
            }
        }
    }

    /// The run ends: what failed stays so.
    pub(super) fn no_restart(&mut self, index: usize) {
        let engine = &mut self.engines[index];
        if engine.state == EngineState::Backoff {
            engine.state = EngineState::Failed;
            (engine.restart_at, engine.unexplained) = (None, None);
            if engine.tree == Tree::Absent {
                // Otherwise it is that of the kill.
                engine.until = None;
            }
            self.changed = true;
        }
    }

    /// Makes new incarnations of those that may start again and of which nothing is left.
    pub(super) fn renew_those_due(&mut self, now: Instant) {
        for index in self.those(|engine| engine.tree == Tree::Absent) {
            let engine = &mut self.engines[index];
            let due = match engine.state {
                EngineState::Backoff => engine.restart_at.is_some_and(|at| at <= now),
                EngineState::Stopped => engine.goal == Goal::StartAgain,
                _ => false,
            };
            if due {
                engine.incarnation = Incarnation(engine.incarnation.0 + 1);
                engine.load = Load::default().into();
                // Its reason stays until it serves again: the next start may come at once.
                (engine.pid, engine.restart_at) = (None, None);
                engine.goal = Goal::Serve;
                self.enter(index, EngineState::Planned, None);
            }
        }
    }

    /// Whether another engine may join: single engines come to fleets that serve.
    pub(in crate::supervisor) fn may_grow(&self) -> Result<(), Refusal> {
        match self.stage {
            Stage::Ready => Ok(()),
            _ => Err(Refusal::FleetNotReady(self.view(0).stage)),
        }
    }

    /// Whether the engine may be restarted or stopped alone. For a restart, the incarnation that will follow.
    pub(in crate::supervisor) fn may_leave(
        &self,
        id: &EngineId,
        goal: Goal,
        force: bool,
    ) -> Result<Incarnation, Refusal> {
        if self.stage != Stage::Ready {
            return Err(Refusal::FleetNotReady(self.view(0).stage));
        }
        let Some(engine) = self.engines.iter().find(|engine| engine.spec.id == *id) else {
            return Err(Refusal::UnknownEngine);
        };
        let (state, role) = (engine.state, engine.spec.role);
        let is_possible = match state {
            EngineState::Starting | EngineState::Healthy | EngineState::Ready | EngineState::Backoff => true,
            EngineState::Stopped | EngineState::Failed => goal == Goal::StartAgain && engine.tree == Tree::Absent,
            EngineState::Planned | EngineState::Draining | EngineState::Stopping => false,
        };
        if !is_possible {
            return Err(Refusal::State(state));
        }
        let other_serves = |other: &Engine| other.spec.role == role && other.spec.id != *id && other.state.serves();
        if state.serves() && !force && !self.engines.iter().any(other_serves) {
            return Err(Refusal::LastOfRole(role));
        }
        Ok(Incarnation(engine.incarnation.0 + 1))
    }

    /// Takes an engine out that [`Fleet::may_leave`]; the others serve on.
    pub(super) fn leave(&mut self, id: &EngineId, goal: Goal, now: Instant) {
        let Some(index) = self.engines.iter().position(|engine| engine.spec.id == *id) else {
            return;
        };
        if self.may_leave(id, goal, true).is_err() {
            return;
        }
        let engine = &mut self.engines[index];
        engine.goal = goal;
        // Whoever asks has looked at it, so what it went through no longer counts.
        engine.restarts = restart::History::default();
        match engine.state {
            EngineState::Ready => {
                let incarnation = engine.incarnation;
                self.enter(index, EngineState::Draining, Some(now + self.limits.drain));
                self.actions.push(Action::AwaitIdle(Some((id.clone(), incarnation))));
            }
            EngineState::Healthy => {
                engine.load.close();
                let grace = engine.spec.stop_grace;
                self.terminate(index, grace, now);
            }
            EngineState::Starting => {
                engine.load.close();
                self.terminate(index, START_GRACE, now);
            }
            EngineState::Backoff if engine.tree != Tree::Absent => {
                // On its way out already; its `until` is that of the kill.
                engine.state = EngineState::Stopping;
                (engine.restart_at, engine.unexplained) = (None, None);
                self.changed = true;
            }
            EngineState::Backoff | EngineState::Failed | EngineState::Stopped => {
                (engine.restart_at, engine.unexplained) = (None, None);
                self.enter(index, EngineState::Stopped, None);
            }
            EngineState::Planned | EngineState::Draining | EngineState::Stopping => {}
        }
    }

    /// Nothing is in flight on an engine that leaves alone, or its time is over.
    pub(super) fn drained_alone(&mut self, index: usize, now: Instant) {
        let engine = &self.engines[index];
        if self.stage == Stage::Ready && engine.state == EngineState::Draining {
            engine.load.close();
            self.terminate(index, engine.spec.stop_grace, now);
        }
    }
}
