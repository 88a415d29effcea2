//! Engines that an earlier xpyd started and left running. PURE.

use std::collections::BTreeSet;

use tokio::time::Instant;

use super::verification::Purpose;
use super::{FleetMachine, RunStage};
use crate::fleet::{EngineId, EngineState, Incarnation, Role};
use crate::supervisor::shim::protocol::KeptState;
use crate::supervisor::state::engine::{DesiredState, ProcessTree};

impl FleetMachine {
    /// Takes over engines that outlived an earlier xpyd, before the first event. Those that serve need only canaries; those
    /// that ended meanwhile come back by policy, without ending the run for the others.
    ///
    /// Engines in `stopped` were drained on request and stay stopped, unless they still run.
    pub(in crate::supervisor) fn attach(
        &mut self,
        kept: &[(EngineId, Incarnation, KeptState)],
        stopped: &BTreeSet<EngineId>,
        now: Instant,
    ) {
        self.is_attached = true;
        for (id, incarnation, state) in kept {
            let Some(index) = self.engines.iter().position(|engine| engine.is_named(id)) else {
                continue;
            };
            let (engine, output) = (&mut self.engines[index], &mut self.output);
            engine.incarnation = *incarnation;
            let (tree, exit) = match *state {
                KeptState::Running { pid, startup_finished } => {
                    engine.attach_running(pid, startup_finished, now, output);
                    continue;
                }
                KeptState::Leaving { exit } if stopped.contains(id) => {
                    engine.attach_stopping(exit, now, output);
                    continue;
                }
                KeptState::Gone { .. } if stopped.contains(id) => {
                    engine.attach_stopped(output);
                    continue;
                }
                KeptState::Leaving { exit } => (ProcessTree::Leaderless, exit),
                KeptState::Gone { exit } => (ProcessTree::Absent, exit),
            };
            let failure = engine.attach_ended(tree, exit);
            self.fail(index, failure, now);
        }
    }

    /// Engines that were drained on request.
    pub(in crate::supervisor) fn stopped_on_request(&self) -> BTreeSet<EngineId> {
        let stopped = self.engines.iter().filter(|engine| {
            let is_out = matches!(
                engine.state,
                EngineState::Draining | EngineState::Stopping | EngineState::Stopped
            );
            engine.desired == DesiredState::Stopped && is_out
        });
        stopped.map(|engine| engine.spec.id.clone()).collect()
    }

    /// Begins the canaries of the whole fleet once every engine is up. An attached fleet does not wait for engines that are
    /// restarting, as long as others of their role are up.
    pub(super) fn verify_all_once_up(&mut self, now: Instant) {
        let is_away = |state| {
            matches!(
                state,
                EngineState::Backoff | EngineState::Failed | EngineState::Stopping | EngineState::Stopped
            )
        };
        let healthy =
            |role| self.indices_where(|engine| engine.spec.role == role && engine.state == EngineState::Healthy);
        let (prefill, decode) = (healthy(Role::Prefill), healthy(Role::Decode));
        let all_up = self
            .engines
            .iter()
            .all(|engine| engine.state == EngineState::Healthy || self.is_attached && is_away(engine.state));
        if self.stage == RunStage::Starting && all_up && !prefill.is_empty() && !decode.is_empty() {
            self.set_stage(RunStage::Verifying);
            let pairs = prefill
                .iter()
                .flat_map(|prefill| decode.iter().map(|decode| (*prefill, *decode)));
            self.verify(Purpose::Fleet, pairs.collect(), Vec::new(), now);
        }
    }
}
