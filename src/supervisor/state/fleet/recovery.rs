//! Single engines that leave and come back while the others serve: by policy after a failure, or on request. PURE.

use rand::RngExt;
use tokio::time::Instant;

use super::{EngineMachine, FleetMachine, RunStage};
use crate::fleet::{EngineId, EngineState, EngineVerb, Incarnation, Retry};
use crate::plan::{EngineSpec, RestartWhen};
use crate::supervisor::hooks::FailureCause;
use crate::supervisor::restart_policy::Decision;
use crate::supervisor::state::engine::{DesiredState, ProcessTree};
use crate::supervisor::{EndReason, Refusal};

/// Appended to the reason of an engine that is given up.
const KEPT_FAILING: &str = "; it kept failing and is not started again";

impl FleetMachine {
    /// The cause of the engine's failure is known, or stays unknown: the policy decides.
    pub(super) fn diagnosed(&mut self, index: usize, cause: FailureCause, now: Instant) {
        if let Some(failed_at) = self.engines[index].diagnosed(cause.found, &mut self.output) {
            self.restart_by_policy(index, cause.retry, failed_at, now);
        }
    }

    fn restart_by_policy(&mut self, index: usize, retry: Retry, failed_at: Instant, now: Instant) {
        let random = self.random_fraction();
        let engine = &mut self.engines[index];
        match engine.decide_restart(&self.limits.restart, retry, random, failed_at) {
            Decision::Restart(wait) => engine.restart_at = Some(failed_at + wait),
            Decision::Leave => {
                engine.state = EngineState::Failed;
                if retry == Retry::Never && self.limits.restart.policy == RestartWhen::OnFailure {
                    engine.append_to_reason("; that would come again, so it is not started again");
                }
                self.end_if_role_is_lost(index, false, now);
            }
            Decision::CrashLoop => {
                engine.state = EngineState::Failed;
                engine.append_to_reason(KEPT_FAILING);
                self.end_if_role_is_lost(index, true, now);
            }
        }
    }

    /// Restarts an engine whose hand-offs fail. One that serves first drains.
    pub(super) fn convict(&mut self, index: usize, reason: String, now: Instant) {
        if self.engines[index].state != EngineState::Ready {
            self.fail(index, super::EngineFailure::without_exit(reason), now);
            return;
        }
        let random = self.random_fraction();
        let engine = &mut self.engines[index];
        self.output.view_changed();
        match engine.decide_restart(&self.limits.restart, Retry::Yes, random, now) {
            Decision::Restart(wait) => {
                (engine.desired, engine.restart_at) = (DesiredState::Restarted, Some(now + wait));
                engine.reason = Some(reason);
                engine.drain(now + self.limits.drain, &mut self.output);
            }
            // The policy restarts nothing, and slow answers are better than none.
            Decision::Leave => engine.reason = Some(reason),
            Decision::CrashLoop => {
                if engine.fail(&format!("{reason}{KEPT_FAILING}"), now, &mut self.output) {
                    self.end_if_role_is_lost(index, true, now);
                }
            }
        }
    }

    fn random_fraction(&mut self) -> f64 {
        self.random.as_mut().map_or(0.0, RngExt::random)
    }

    /// Ends the run if no engine of the failed one's role serves or will serve.
    fn end_if_role_is_lost(&mut self, index: usize, crash_loop: bool, now: Instant) {
        let failed = &self.engines[index];
        let role = failed.spec.role;
        let serves_or_will = |engine: &EngineMachine| match engine.state {
            EngineState::Planned
            | EngineState::Starting
            | EngineState::Healthy
            | EngineState::Ready
            | EngineState::Backoff => true,
            EngineState::Draining | EngineState::Stopping | EngineState::Stopped => {
                engine.desired == DesiredState::Restarted
            }
            EngineState::Failed => false,
        };
        if self
            .engines
            .iter()
            .any(|engine| engine.spec.role == role && serves_or_will(engine))
        {
            return;
        }
        let (engine, reason) = (failed.id(), failed.reason.clone().unwrap_or_default());
        let end = if crash_loop {
            EndReason::CrashLoop { role, engine, reason }
        } else {
            EndReason::LostRole { role, engine, reason }
        };
        self.end(end, now);
    }

    /// Processes of the engine outlived SIGKILL.
    pub(super) fn cannot_be_killed(&mut self, index: usize, now: Instant) {
        if self.can_restart() && self.engines[index].give_up_restart(&mut self.output) == Some(true) {
            self.end_if_role_is_lost(index, false, now);
        }
    }

    /// Whether an engine can be added: only to a fleet that serves.
    pub(in crate::supervisor) fn check_add(&self) -> Result<(), Refusal> {
        match self.stage {
            RunStage::Ready => Ok(()),
            _ => Err(Refusal::FleetNotReady(self.view(0).stage)),
        }
    }

    /// Adds an engine at the end, so that the indices of the others stay. It starts as a restarted one does.
    pub(super) fn add(&mut self, spec: EngineSpec) {
        self.engines.push(EngineMachine::planned(spec));
        self.output.view_changed();
    }

    /// Whether the engine can be restarted or drained. Returns the incarnation that follows a restart.
    pub(in crate::supervisor) fn check_request(
        &self,
        id: &EngineId,
        verb: EngineVerb,
        force: bool,
    ) -> Result<Incarnation, Refusal> {
        if self.stage != RunStage::Ready {
            return Err(Refusal::FleetNotReady(self.view(0).stage));
        }
        let Some(engine) = self.engines.iter().find(|engine| engine.is_named(id)) else {
            return Err(Refusal::UnknownEngine);
        };
        let (state, role) = (engine.state, engine.spec.role);
        let is_possible = match state {
            EngineState::Starting | EngineState::Healthy | EngineState::Ready | EngineState::Backoff => true,
            EngineState::Stopped | EngineState::Failed => {
                verb == EngineVerb::Restart && engine.tree == ProcessTree::Absent
            }
            EngineState::Planned | EngineState::Draining | EngineState::Stopping => false,
        };
        if !is_possible {
            return Err(Refusal::State(state));
        }
        let other_serves =
            |other: &EngineMachine| other.spec.role == role && !other.is_named(id) && other.state.serves();
        if state.serves() && !force && !self.engines.iter().any(other_serves) {
            return Err(Refusal::LastOfRole(role));
        }
        Ok(Incarnation(engine.incarnation.0 + 1))
    }

    /// Restarts or drains an engine that [`FleetMachine::check_request`] allows; the others keep serving.
    pub(super) fn request(&mut self, id: &EngineId, verb: EngineVerb, now: Instant) {
        let Some(index) = self.engines.iter().position(|engine| engine.is_named(id)) else {
            return;
        };
        if self.check_request(id, verb, true).is_ok() {
            self.engines[index].request(verb, self.limits.drain, now, &mut self.output);
        }
    }

    /// An engine that drains alone is idle, or its drain deadline has passed.
    pub(super) fn engine_drained(&mut self, index: usize, now: Instant) {
        let engine = &mut self.engines[index];
        if self.stage == RunStage::Ready && engine.state == EngineState::Draining {
            engine.drained(now, &mut self.output);
        }
    }
}
