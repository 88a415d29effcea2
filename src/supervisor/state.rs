//! The fleet's state machine: what happened goes in, what to do comes out. PURE: no clock, no process, no channel.
//!
//! One engine (every exit that nobody asked for is a failure, whatever its code; a crashed vLLM exits with 0):
//! ```text
//!            Spawn            /health 200          canaries pass         stop asked
//!  Planned ────────> Starting ────────────> Healthy ────────────> Ready ────────────> Draining
//!     │                 │ exit, deadline       │ exit               │ exit                │ drained, deadline
//!     │ stop            │                      └───────┬────────────┘                     v
//!     │                 ├──────────────────────────────┴──> Failed (tree killed)      Stopping: SIGTERM to the leader,
//!     v                 │ stop: short grace                                           SIGKILL to the tree after its
//!  Stopped <────────────┴──────────────── tree empty ───────────────────────────────  grace
//! ```
//! The fleet:
//! ```text
//!  Starting ──all healthy──> Verifying ──ok──> Ready ──stop──> Draining ──> Stopping ──trees gone──> Closing ──> Checking ──> Over
//!      └── stop, a failure, a deadline ──┴───── a role lost ──────────────────^        guardian lost ──> Sweeping ──^
//! ```
//! Deadlines are part of the state: [`Fleet::next_deadline`] says when [`Event::Tick`] is due, so no timer can be stale.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::guardian::protocol::{Exit, LeftoverProcess};
use super::{Ending, Leftover, Outcome};
use crate::fleet::{EngineId, EngineState, EngineView, FleetStage, FleetView, Incarnation, Load};
use crate::plan::EngineSpec;

/// What an engine that has not served yet gets to leave: there is nothing to hand over, but workers to take along.
const START_GRACE: Duration = Duration::from_secs(2);

/// What the rest of a tree gets once its leader is gone: vLLM's resource tracker leaves by itself within a second.
const LEADERLESS_GRACE: Duration = Duration::from_secs(2);

/// How long decode engines wait for prefill engines to leave first. KV in flight is pulled in far less.
const DECODE_TURN: Duration = Duration::from_secs(1);

/// How long the guardian may take to say that a killed tree is empty or cannot be emptied; it reports the latter after 5 s.
const KILL_ANSWER: Duration = Duration::from_secs(15);

/// How long the guardian may take to end: it gives itself 3 s for trees and 3 s for strays.
const CLOSE_DEADLINE: Duration = Duration::from_secs(10);

/// What happened.
#[derive(Debug, Clone)]
pub(super) enum Event {
    /// The run begins.
    Begin,
    /// The leader runs.
    Spawned(EngineId, Incarnation, u32),
    /// The program could not be started.
    SpawnFailed(EngineId, Incarnation, String),
    /// The leader ended.
    Exited(EngineId, Incarnation, Exit),
    /// No process of the engine is left.
    TreeEmpty(EngineId, Incarnation),
    /// Processes outlived SIGKILL; without an engine, strays.
    Leftover(Option<EngineId>, Vec<LeftoverProcess>),
    /// `/health` answered 200.
    Probed(EngineId, Incarnation),
    /// The canaries went through every pair, or one did not.
    Verified(Result<(), String>),
    /// A stop was asked for, by a signal or over the control socket. Asking again changes nothing.
    Stop,
    /// Ctrl+C: a stop, and the next one forces it.
    Interrupt,
    /// A stop without any grace.
    Force,
    /// Nothing is in flight any more.
    Drained,
    /// [`Fleet::next_deadline`] has come.
    Tick,
    /// The connection to the guardian is closed, asked for or not.
    GuardianGone(String),
    /// The sweep after a lost guardian is over; these processes are left.
    Swept(Vec<LeftoverProcess>),
    /// The last look is over; these are left.
    Checked(Vec<Leftover>),
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// Start the engine's process.
    Spawn(EngineId, Incarnation),
    /// Write down how the engine was started, with its process id.
    Record(EngineId, Incarnation, u32),
    /// Ask `/health` until it answers 200.
    Probe(EngineId, Incarnation),
    /// Tell the guardian that the engine's start is over.
    Settled(EngineId),
    /// Send canaries through these pairs of prefill and decode engine.
    Verify(Vec<(EngineId, EngineId)>),
    /// Wait until nothing is in flight.
    AwaitIdle,
    /// SIGTERM to the leader.
    Terminate(EngineId),
    /// SIGKILL to the tree.
    Kill(EngineId),
    /// Let the guardian end.
    Shutdown,
    /// Kill what the lost guardian had started.
    Sweep,
    /// See which processes and ports are still there.
    Check,
    /// The run is over.
    Finish(Outcome),
}

/// One engine.
#[derive(Debug)]
struct Engine {
    spec: EngineSpec,
    incarnation: Incarnation,
    state: EngineState,
    pid: Option<u32>,
    reason: Option<String>,
    load: Arc<Load>,
    tree: Tree,
    /// Until when the engine may stay as it is: starting, stopping, or killed without an answer.
    until: Option<Instant>,
}

/// What is known of an engine's processes.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Tree {
    /// There are none.
    Absent,
    /// The spawn was asked for, and the leader has not ended.
    Running,
    /// The leader has ended.
    Leaderless,
    /// The kill was asked for.
    Killed,
    /// These outlived SIGKILL.
    Left(Vec<LeftoverProcess>),
}

/// Where the fleet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Starting,
    Verifying {
        until: Instant,
    },
    Ready,
    Draining {
        until: Instant,
    },
    /// Decode engines are asked to stop at `decode_turn`; `None` once they were.
    Stopping {
        decode_turn: Option<Instant>,
    },
    Closing {
        until: Instant,
    },
    Sweeping,
    Checking,
    Over,
}

/// All engines and the run they are in.
#[derive(Debug)]
pub(super) struct Fleet {
    engines: Vec<Engine>,
    stage: Stage,
    drain_deadline: Duration,
    verify_deadline: Duration,
    stop_asked: bool,
    /// Why the run ends, and since when it does.
    ending: Option<(Ending, Instant)>,
    strays: Vec<LeftoverProcess>,
    actions: Vec<Action>,
    changed: bool,
}

impl Fleet {
    pub(super) fn new(engines: &[EngineSpec], drain_deadline: Duration, verify_deadline: Duration) -> Self {
        let engines = engines.iter().map(|spec| Engine {
            spec: spec.clone(),
            incarnation: Incarnation::FIRST,
            state: EngineState::Planned,
            pid: None,
            reason: None,
            load: Arc::default(),
            tree: Tree::Absent,
            until: None,
        });
        Self {
            engines: engines.collect(),
            stage: Stage::Starting,
            drain_deadline,
            verify_deadline,
            stop_asked: false,
            ending: None,
            strays: Vec::new(),
            actions: Vec::new(),
            changed: true,
        }
    }

    /// Takes in what happened at `now` and returns what to do, in this order.
    pub(super) fn handle(&mut self, event: Event, now: Instant) -> Vec<Action> {
        match event {
            Event::Begin => self.start_next(now),
            Event::Spawned(id, incarnation, pid) => self.spawned(&id, incarnation, pid),
            Event::SpawnFailed(id, incarnation, reason) => {
                if let Some(index) = self.current(&id, incarnation) {
                    self.tree_is(index, Tree::Absent);
                    self.fail(index, reason, None, now);
                }
            }
            Event::Exited(id, incarnation, exit) => {
                if let Some(index) = self.current(&id, incarnation) {
                    self.exited(index, exit, now);
                }
            }
            Event::TreeEmpty(id, incarnation) => {
                if let Some(index) = self.current(&id, incarnation) {
                    self.tree_is(index, Tree::Absent);
                    self.fail(index, "its processes are gone".to_owned(), None, now);
                }
            }
            Event::Leftover(id, processes) => self.left_over(id.as_ref(), processes),
            Event::Probed(id, incarnation) => self.probed(&id, incarnation, now),
            Event::Verified(result) => self.verified(result, now),
            Event::Interrupt if self.stop_asked => self.force(now),
            Event::Interrupt | Event::Stop => self.stop(now),
            Event::Force => self.force(now),
            Event::Drained => {
                if matches!(self.stage, Stage::Draining { .. }) {
                    self.stop_all(now);
                }
            }
            Event::Tick => self.tick(now),
            Event::GuardianGone(reason) => self.guardian_gone(&reason, now),
            Event::Swept(processes) => self.swept(processes),
            Event::Checked(left) => self.checked(left, now),
        }
        self.go_on(now);
        std::mem::take(&mut self.actions)
    }

    /// When [`Event::Tick`] is due.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let stage = match self.stage {
            Stage::Verifying { until } | Stage::Draining { until } | Stage::Closing { until } => Some(until),
            Stage::Stopping { decode_turn } => decode_turn,
            Stage::Starting | Stage::Ready | Stage::Sweeping | Stage::Checking | Stage::Over => None,
        };
        self.engines.iter().filter_map(|engine| engine.until).chain(stage).min()
    }

    /// The view, if readers would see a difference since the last call.
    pub(super) fn changed_view(&mut self, generation: u64) -> Option<FleetView> {
        std::mem::take(&mut self.changed).then(|| self.view(generation))
    }

    /// The view now.
    pub(super) fn view(&self, generation: u64) -> FleetView {
        FleetView {
            generation,
            stage: match self.stage {
                Stage::Starting => FleetStage::Starting,
                Stage::Verifying { .. } => FleetStage::Verifying,
                Stage::Ready => FleetStage::Ready,
                Stage::Draining { .. } => FleetStage::Draining,
                Stage::Stopping { .. } | Stage::Closing { .. } | Stage::Sweeping | Stage::Checking => {
                    FleetStage::Stopping
                }
                Stage::Over => FleetStage::Stopped,
            },
            engines: self.engines.iter().map(Engine::view).collect(),
        }
    }

    /// The loads of all engines, for the wait until they are idle.
    pub(super) fn loads(&self) -> Vec<Arc<Load>> {
        self.engines.iter().map(|engine| Arc::clone(&engine.load)).collect()
    }

    /// Processes that were reported as left, with their engine.
    pub(super) fn leftovers(&self) -> Vec<(Option<EngineId>, LeftoverProcess)> {
        let mut left = Vec::new();
        for engine in &self.engines {
            if let Tree::Left(processes) = &engine.tree {
                left.extend(
                    processes
                        .iter()
                        .map(|process| (Some(engine.spec.id.clone()), process.clone())),
                );
            }
        }
        left.extend(self.strays.iter().map(|process| (None, process.clone())));
        left
    }

    fn spawned(&mut self, id: &EngineId, incarnation: Incarnation, pid: u32) {
        if let Some(index) = self.current(id, incarnation) {
            self.engines[index].pid = Some(pid);
            self.changed = true;
            self.actions.push(Action::Record(id.clone(), incarnation, pid));
            if self.engines[index].state == EngineState::Starting {
                self.actions.push(Action::Probe(id.clone(), incarnation));
            }
        }
    }

    fn exited(&mut self, index: usize, exit: Exit, now: Instant) {
        let engine = &mut self.engines[index];
        if engine.tree == Tree::Running {
            engine.tree = Tree::Leaderless;
        }
        match engine.state {
            EngineState::Stopping => {
                // A killed tree keeps the deadline of its kill.
                if engine.tree == Tree::Leaderless {
                    let grace = now + LEADERLESS_GRACE;
                    engine.until = Some(engine.until.map_or(grace, |until| until.min(grace)));
                }
            }
            EngineState::Starting => self.fail_by_exit(index, exit, "while starting", now),
            EngineState::Healthy | EngineState::Ready => self.fail_by_exit(index, exit, "unasked", now),
            EngineState::Draining => self.fail_by_exit(index, exit, "while draining", now),
            EngineState::Planned | EngineState::Stopped | EngineState::Failed => {}
        }
    }

    fn left_over(&mut self, id: Option<&EngineId>, processes: Vec<LeftoverProcess>) {
        match self.engines.iter_mut().find(|engine| Some(&engine.spec.id) == id) {
            // Only the answer to a kill; a tree that was found empty since stays so.
            Some(engine) if engine.tree != Tree::Absent => {
                engine.tree = Tree::Left(processes);
                engine.until = None;
            }
            Some(_) => {}
            None => self.strays = processes,
        }
    }

    fn probed(&mut self, id: &EngineId, incarnation: Incarnation, now: Instant) {
        let Some(index) = self.current(id, incarnation) else {
            return;
        };
        if self.engines[index].state != EngineState::Starting {
            return;
        }
        self.enter(index, EngineState::Healthy, None);
        self.actions.push(Action::Settled(id.clone()));
        self.start_next(now);
        if self.stage == Stage::Starting && self.engines.iter().all(|engine| engine.state == EngineState::Healthy) {
            self.to(Stage::Verifying {
                until: now + self.verify_deadline,
            });
            self.actions.push(Action::Verify(self.pairs()));
        }
    }

    fn verified(&mut self, result: Result<(), String>, now: Instant) {
        if !matches!(self.stage, Stage::Verifying { .. }) {
            return;
        }
        match result {
            Ok(()) => {
                self.to(Stage::Ready);
                for index in 0..self.engines.len() {
                    self.enter(index, EngineState::Ready, None);
                }
            }
            Err(reason) => {
                let after = self.verify_deadline;
                self.end(
                    Ending::NotReady {
                        engine: None,
                        reason,
                        after,
                    },
                    now,
                );
            }
        }
    }

    /// The first request to stop: drain if clients are served, else go on to the teardown.
    fn stop(&mut self, now: Instant) {
        self.stop_asked = true;
        match self.stage {
            Stage::Starting | Stage::Verifying { .. } => self.end(Ending::Stopped, now),
            Stage::Ready => {
                self.ending = Some((Ending::Stopped, now));
                self.to(Stage::Draining {
                    until: now + self.drain_deadline,
                });
                for index in self.those(|engine| engine.state == EngineState::Ready) {
                    self.enter(index, EngineState::Draining, None);
                }
                self.actions.push(Action::AwaitIdle);
            }
            Stage::Draining { .. }
            | Stage::Stopping { .. }
            | Stage::Closing { .. }
            | Stage::Sweeping
            | Stage::Checking
            | Stage::Over => {}
        }
    }

    /// Kills everything now.
    fn force(&mut self, now: Instant) {
        self.stop_asked = true;
        match self.stage {
            Stage::Starting
            | Stage::Verifying { .. }
            | Stage::Ready
            | Stage::Draining { .. }
            | Stage::Stopping { .. } => {
                let since = self.ending.take().map_or(now, |(_, since)| since);
                self.ending = Some((Ending::Forced, since));
                self.to(Stage::Stopping { decode_turn: None });
                for index in 0..self.engines.len() {
                    let engine = &self.engines[index];
                    engine.load.close();
                    if engine.state == EngineState::Planned {
                        self.enter(index, EngineState::Stopped, None);
                    } else if engine.state.is_alive() {
                        self.enter(index, EngineState::Stopping, None);
                    }
                    self.kill(index, now);
                }
            }
            // All that could be killed is gone already.
            Stage::Closing { .. } | Stage::Sweeping | Stage::Checking | Stage::Over => {}
        }
    }

    fn tick(&mut self, now: Instant) {
        for index in self.those(|engine| engine.until.is_some_and(|until| until <= now)) {
            if self.stage == Stage::Sweeping {
                return;
            }
            let engine = &mut self.engines[index];
            engine.until = None;
            if engine.tree == Tree::Killed {
                self.guardian_gone("the guardian does not answer", now);
            } else if engine.state == EngineState::Starting {
                let reason = format!(
                    "not healthy {} after its start; see its log `{}`",
                    humantime::format_duration(engine.spec.ready_deadline),
                    engine.spec.log_file.display()
                );
                self.not_ready(index, reason, now);
            } else {
                self.kill(index, now);
            }
        }
        match self.stage {
            Stage::Verifying { until } if until <= now => {
                let reason = "the canaries took too long".to_owned();
                self.verified(Err(reason), now);
            }
            Stage::Draining { until } if until <= now => self.stop_all(now),
            Stage::Closing { until } if until <= now => self.sweep(),
            Stage::Starting
            | Stage::Verifying { .. }
            | Stage::Ready
            | Stage::Draining { .. }
            | Stage::Stopping { .. }
            | Stage::Closing { .. }
            | Stage::Sweeping
            | Stage::Checking
            | Stage::Over => {}
        }
    }

    fn guardian_gone(&mut self, reason: &str, now: Instant) {
        match self.stage {
            Stage::Closing { .. } => {
                self.to(Stage::Checking);
                self.actions.push(Action::Check);
            }
            Stage::Sweeping | Stage::Checking | Stage::Over => {}
            Stage::Starting
            | Stage::Verifying { .. }
            | Stage::Ready
            | Stage::Draining { .. }
            | Stage::Stopping { .. } => {
                // A stop that was under way does not end as it was meant to; a failure keeps its first cause.
                let lost = Ending::SupervisionLost {
                    reason: reason.to_owned(),
                };
                match &mut self.ending {
                    Some((ending @ Ending::Stopped, _)) => *ending = lost,
                    Some(_) => {}
                    None => self.ending = Some((lost, now)),
                }
                for index in 0..self.engines.len() {
                    let engine = &mut self.engines[index];
                    engine.load.close();
                    engine.until = None;
                    if engine.state == EngineState::Planned {
                        self.enter(index, EngineState::Stopped, None);
                    } else if engine.state.is_alive() {
                        engine.reason = Some(reason.to_owned());
                        self.enter(index, EngineState::Failed, None);
                    }
                }
                self.sweep();
            }
        }
    }

    fn swept(&mut self, processes: Vec<LeftoverProcess>) {
        if self.stage != Stage::Sweeping {
            return;
        }
        for engine in &mut self.engines {
            engine.tree = Tree::Absent;
        }
        self.strays = processes;
        self.to(Stage::Checking);
        self.actions.push(Action::Check);
    }

    fn checked(&mut self, left: Vec<Leftover>, now: Instant) {
        if self.stage != Stage::Checking {
            return;
        }
        self.to(Stage::Over);
        let (ending, since) = self.ending.clone().unwrap_or((Ending::Stopped, now));
        self.actions.push(Action::Finish(Outcome {
            ending,
            left,
            teardown: now - since,
        }));
    }
}

impl Engine {
    fn view(&self) -> EngineView {
        EngineView {
            id: self.spec.id.clone(),
            role: self.spec.role,
            incarnation: self.incarnation,
            state: self.state,
            endpoint: self.spec.endpoint.clone(),
            pid: self.pid,
            reason: self.reason.clone(),
            load: Arc::clone(&self.load),
        }
    }
}

mod transitions;

#[cfg(test)]
pub(super) mod tests;
