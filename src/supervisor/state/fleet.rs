//! The state machine of the run: all engines, the stage, the order in which they start and stop. PURE.
//!
//! By subject: `verification` (canaries, Healthy to Ready), `recovery` (what a failure leads to; single engines that leave and
//! come back), `teardown` (from the first reason to end to the last check), `attach` (engines that outlived xpyd), `blame`
//! (which engine a failing pair convicts), `view` (what others read).

mod attach;
mod blame;
mod recovery;
mod teardown;
mod verification;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::rngs::StdRng;
use tokio::time::Instant;

#[cfg(test)]
pub(super) use self::teardown::{CLOSE_DEADLINE, DECODE_STOP_DELAY};
use self::verification::{CheckSchedule, Verification};
use super::engine::{EngineFailure, EngineMachine, ProcessTree};
use super::events::{Action, Event, Output};
use crate::fleet::{EngineId, EngineState, Exit, Incarnation};
use crate::plan::{EngineSpec, RestartPolicy};
use crate::supervisor::EndReason;
use crate::supervisor::hooks::FailureCause;
use crate::supervisor::shim::protocol::LeftoverProcess;

/// The stage of the run, with its deadlines. Readers see a [`crate::fleet::FleetStage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RunStage {
    Starting,
    Verifying,
    Ready,
    Draining {
        until: Instant,
    },
    /// Decode engines get SIGTERM at `decode_stop`; `None` once they got it.
    Stopping {
        decode_stop: Option<Instant>,
    },
    Closing {
        until: Instant,
    },
    Sweeping,
    Checking,
    Over,
}

/// The deadlines and the restart policy of a fleet.
#[derive(Debug, Clone)]
pub(in crate::supervisor) struct Limits {
    /// How long requests in flight can go on after a stop or drain was requested.
    pub(in crate::supervisor) drain: Duration,
    /// How long the canaries of one round can take, for each pair of engines in it.
    pub(in crate::supervisor) verify: Duration,
    /// Which engines start again, and when.
    pub(in crate::supervisor) restart: RestartPolicy,
}

/// All engines and the run they belong to.
#[derive(Debug)]
pub(in crate::supervisor) struct FleetMachine {
    engines: Vec<EngineMachine>,
    stage: RunStage,
    limits: Limits,
    /// Adds jitter to restarts; without it they come exactly when the policy says.
    random: Option<StdRng>,
    verification: Option<Verification>,
    checks: CheckSchedule,
    /// By pair (prefill, decode) that fails alone: the engine that was restarted last because of it, until the pair works.
    blamed: BTreeMap<(usize, usize), usize>,
    /// Rounds of canaries so far.
    rounds: u64,
    is_stop_requested: bool,
    /// Whether an earlier xpyd started it.
    is_attached: bool,
    /// Why the run ends, and since when it does.
    end: Option<(EndReason, Instant)>,
    /// Processes that outlived SIGKILL and belong to no known engine.
    unowned_processes: Vec<LeftoverProcess>,
    output: Output,
}

impl FleetMachine {
    pub(in crate::supervisor) fn new(engines: &[EngineSpec], limits: Limits, random: Option<StdRng>) -> Self {
        Self {
            engines: engines.iter().cloned().map(EngineMachine::planned).collect(),
            stage: RunStage::Starting,
            limits,
            random,
            verification: None,
            checks: CheckSchedule::default(),
            blamed: BTreeMap::new(),
            rounds: 0,
            is_stop_requested: false,
            is_attached: false,
            end: None,
            unowned_processes: Vec::new(),
            output: Output::with_first_view(),
        }
    }

    /// Handles what happened at `now`. Returns the actions to carry out, in this order.
    pub(in crate::supervisor) fn handle(&mut self, event: Event, now: Instant) -> Vec<Action> {
        match event {
            Event::Begin => self.start_planned(now),
            Event::Prepared(id, incarnation, result) => self.prepared(&id, incarnation, result, now),
            Event::Spawned(id, incarnation, pid) => self.with_current(&id, incarnation, |fleet, index| {
                fleet.engines[index].spawned(pid, &mut fleet.output);
            }),
            Event::SpawnFailed(id, incarnation, reason) => self.tree_gone(&id, incarnation, reason, now),
            Event::EndpointChanged(id, incarnation, endpoint) => self.with_current(&id, incarnation, |fleet, index| {
                fleet.engines[index].spec.endpoint = endpoint;
                fleet.output.view_changed();
            }),
            Event::Exited {
                engine,
                incarnation,
                exit,
            } => self.with_current(&engine, incarnation, |fleet, index| {
                if let Some(failure) = fleet.engines[index].exited(exit) {
                    fleet.fail(index, failure, now);
                }
            }),
            Event::TreeEmpty(id, incarnation) => {
                self.tree_gone(&id, incarnation, "its processes are gone".to_owned(), now);
            }
            Event::Diagnosed(id, incarnation, cause) => {
                self.with_current(&id, incarnation, |fleet, index| fleet.diagnosed(index, cause, now));
            }
            Event::Leftover(id, processes) => self.left_over(id.as_ref(), processes, now),
            Event::Probed(id, incarnation) => self.probed(&id, incarnation, now),
            Event::PairWorked(round, prefill, decode) => self.pair_worked(round, &prefill, &decode, now),
            Event::Verified(round, results) => self.verified(round, results, now),
            Event::Suspected(prefill, decode) => self.suspected(&prefill, &decode, now),
            Event::Hung(id, incarnation, reason) | Event::PortTaken(id, incarnation, reason) => {
                self.with_current(&id, incarnation, |fleet, index| {
                    fleet.fail(index, EngineFailure::without_exit(reason), now);
                });
            }
            Event::StartupStalled(id, incarnation, reason) => self.with_current(&id, incarnation, |fleet, index| {
                if fleet.engines[index].state == EngineState::Starting {
                    let after = fleet.engines[index].spec.start_stall;
                    fleet.not_ready(index, reason, after, now);
                }
            }),
            Event::Add(spec) => self.add(*spec),
            Event::Requested(id, verb) => self.request(&id, verb, now),
            Event::Interrupt if self.is_stop_requested => self.force(now),
            Event::Interrupt | Event::Stop => self.stop(now),
            Event::Force => self.force(now),
            Event::Leave => self.leave_engines(now),
            Event::Drained(Some((id, incarnation))) => {
                self.with_current(&id, incarnation, |fleet, index| fleet.engine_drained(index, now));
            }
            Event::Drained(None) => {
                if matches!(self.stage, RunStage::Draining { .. }) {
                    self.drained(now);
                }
            }
            Event::Tick => self.tick(now),
            Event::ShimGone(reason) => self.shim_gone(&reason, now),
            Event::SweepDone(processes) => self.sweep_done(processes),
            Event::Checked(left) => self.checked(left, now),
        }
        self.advance(now);
        self.output.take_actions()
    }

    /// When [`Event::Tick`] is due.
    pub(in crate::supervisor) fn next_deadline(&self) -> Option<Instant> {
        let stage = match self.stage {
            RunStage::Draining { until } | RunStage::Closing { until } => Some(until),
            RunStage::Stopping { decode_stop } => decode_stop,
            RunStage::Starting
            | RunStage::Verifying
            | RunStage::Ready
            | RunStage::Sweeping
            | RunStage::Checking
            | RunStage::Over => None,
        };
        let canaries = self.verification.as_ref().map(|verification| verification.until);
        let waits = self.engines.iter().filter_map(|engine| engine.until);
        let restarts = self
            .engines
            .iter()
            .filter_map(|engine| engine.restart_at.filter(|_| engine.tree == ProcessTree::Absent))
            .filter(|_| self.can_restart());
        waits.chain(restarts).chain(canaries).chain(stage).min()
    }

    /// Spawns every planned engine whose GPUs no other engine starts on or leaves: vLLM measures free GPU memory at its start,
    /// and two starts at once on one GPU spoil that.
    fn start_planned(&mut self, now: Instant) {
        if self.stage != RunStage::Starting && !self.can_restart() {
            return;
        }
        let mut busy: BTreeSet<u32> = BTreeSet::new();
        for engine in &self.engines {
            if engine.state == EngineState::Starting || engine.releases_gpus() {
                busy.extend(&engine.spec.gpus);
            }
        }
        for index in self.indices_where(|engine| engine.state == EngineState::Planned) {
            let engine = &mut self.engines[index];
            let is_free = !engine.spec.gpus.iter().any(|gpu| busy.contains(gpu));
            // Whether it starts or waits, later engines on the same GPUs wait behind it.
            busy.extend(&engine.spec.gpus);
            if is_free {
                engine.start(now, &mut self.output);
            }
        }
    }

    /// The memory of the engine's GPUs is free, or is not. The engine can have been stopped meanwhile.
    fn prepared(&mut self, id: &EngineId, incarnation: Incarnation, result: Result<(), String>, now: Instant) {
        let Some(index) = self.current(id, incarnation) else {
            return;
        };
        if !self.engines[index].waits_for_gpus() {
            return;
        }
        match result {
            Ok(()) => self.engines[index].prepared(now, &mut self.output),
            Err(reason) => self.fail(index, EngineFailure::without_exit(reason), now),
        }
    }

    fn probed(&mut self, id: &EngineId, incarnation: Incarnation, now: Instant) {
        if let Some(index) = self.current(id, incarnation)
            && self.engines[index].state == EngineState::Starting
        {
            self.engines[index].healthy(&mut self.output);
            self.start_planned(now);
        }
    }

    /// No process of the engine exists.
    fn tree_gone(&mut self, id: &EngineId, incarnation: Incarnation, reason: String, now: Instant) {
        if let Some(index) = self.current(id, incarnation) {
            let can_restart = self.can_restart();
            self.engines[index].set_tree(ProcessTree::Absent, can_restart, &mut self.output);
            self.fail(index, EngineFailure::without_exit(reason), now);
        }
    }

    fn left_over(&mut self, id: Option<&EngineId>, processes: Vec<LeftoverProcess>, now: Instant) {
        match self.engines.iter().position(|engine| Some(&engine.spec.id) == id) {
            // Only the reply to a kill counts; a tree that was found empty since stays so.
            Some(index) if self.engines[index].tree != ProcessTree::Absent => {
                self.engines[index].tree = ProcessTree::Left(processes);
                self.engines[index].until = None;
                self.cannot_be_killed(index, now);
            }
            Some(_) => {}
            None => self.unowned_processes = processes,
        }
    }

    /// The engine failed, or must be ended, for a reason that nobody requested.
    fn fail(&mut self, index: usize, failure: EngineFailure, now: Instant) {
        if self.engines[index].fail(&failure.reason, now, &mut self.output) {
            let EngineFailure { reason, exit } = failure;
            let engine = self.engines[index].id();
            self.engine_failed(index, EndReason::EngineFailed { engine, reason, exit }, exit, now);
        }
    }

    /// The engine did not become healthy in time, or its start does nothing any more.
    fn not_ready(&mut self, index: usize, reason: String, after: Duration, now: Instant) {
        if self.engines[index].fail(&reason, now, &mut self.output) {
            let engine = Some(self.engines[index].id());
            self.engine_failed(index, EndReason::NotReady { engine, reason, after }, None, now);
        }
    }

    /// Before a new fleet is ready, the failure of one engine ends the run. Later its diagnosis decides whether it restarts.
    fn engine_failed(&mut self, index: usize, end: EndReason, exit: Option<Exit>, now: Instant) {
        match self.stage {
            _ if self.can_restart() => self.engines[index].await_diagnosis(exit, now),
            RunStage::Starting | RunStage::Verifying | RunStage::Ready => self.end(end, now),
            RunStage::Draining { .. }
            | RunStage::Stopping { .. }
            | RunStage::Closing { .. }
            | RunStage::Sweeping
            | RunStage::Checking
            | RunStage::Over => {}
        }
    }

    /// A deadline has passed.
    fn tick(&mut self, now: Instant) {
        for index in self.indices_where(|engine| engine.until.is_some_and(|until| until <= now)) {
            if self.stage == RunStage::Sweeping {
                return;
            }
            self.engine_deadline(index, now);
        }
        if let Some(verification) = self
            .verification
            .as_ref()
            .filter(|verification| verification.until <= now)
        {
            self.verified(verification.round, Vec::new(), now);
        }
        match self.stage {
            RunStage::Draining { until } if until <= now => self.drained(now),
            RunStage::Closing { until } if until <= now => self.sweep(),
            _ => {}
        }
    }

    fn engine_deadline(&mut self, index: usize, now: Instant) {
        let engine = &mut self.engines[index];
        engine.until = None;
        if engine.tree == ProcessTree::Killed {
            self.shim_gone("the shim does not answer", now);
        } else if engine.state == EngineState::Starting {
            let after = engine.spec.ready_deadline;
            let reason = format!(
                "not healthy {} after its start; see its log `{}`",
                humantime::format_duration(after),
                engine.spec.log_file.display()
            );
            self.not_ready(index, reason, after, now);
        } else if engine.state == EngineState::Draining {
            self.engine_drained(index, now);
        } else if engine.diagnosis.is_some() {
            self.diagnosed(index, FailureCause::default(), now);
        } else {
            engine.kill(now, &mut self.output);
        }
    }

    /// Does what follows from the state alone.
    fn advance(&mut self, now: Instant) {
        if self.can_restart() {
            for engine in &mut self.engines {
                engine.request_diagnosis(now, &mut self.output);
            }
            for engine in self.engines.iter_mut().filter(|engine| engine.is_restart_due(now)) {
                engine.plan_next_start(&mut self.output);
            }
            self.start_planned(now);
        }
        match self.stage {
            RunStage::Starting => self.verify_all_once_up(now),
            RunStage::Ready => self.verify_next(now),
            RunStage::Stopping { decode_stop } => self.advance_stop(decode_stop, now),
            _ => {}
        }
    }

    /// Whether engines that failed start again now. Before a new fleet is ready, a failure ends the run instead.
    fn can_restart(&self) -> bool {
        self.stage == RunStage::Ready
            || self.is_attached && matches!(self.stage, RunStage::Starting | RunStage::Verifying)
    }

    /// The engine, if `incarnation` is its current one; events about older ones are stale.
    fn current(&self, id: &EngineId, incarnation: Incarnation) -> Option<usize> {
        self.engines
            .iter()
            .position(|engine| engine.is_named(id) && engine.incarnation == incarnation)
    }

    fn with_current(&mut self, id: &EngineId, incarnation: Incarnation, handle: impl FnOnce(&mut Self, usize)) {
        if let Some(index) = self.current(id, incarnation) {
            handle(self, index);
        }
    }

    fn indices_where(&self, condition: impl Fn(&EngineMachine) -> bool) -> Vec<usize> {
        (0..self.engines.len())
            .filter(|index| condition(&self.engines[*index]))
            .collect()
    }

    fn set_stage(&mut self, stage: RunStage) {
        self.stage = stage;
        self.output.view_changed();
        if !matches!(stage, RunStage::Verifying | RunStage::Ready) {
            // Canaries under way no longer matter.
            self.verification = None;
        }
    }
}
