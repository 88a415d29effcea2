//! The fleet's state machine: what happened goes in, what to do comes out. PURE: no clock, no process, no channel.
//!
//! One engine (every exit that nobody asked for is a failure, whatever its code; a crashed vLLM exits with 0):
//! ```text
//!            Spawn            /health 200          canaries pass         stop asked
//!  Planned ────────> Starting ────────────> Healthy ────────────> Ready ────────────> Draining
//!   │   ^               │ exit, deadline       │ exit, canary       │ exit, hung          │ drained, deadline
//!   │   │               │                      └───────┬────────────┘                     v
//!   │   │ tree empty,   ├──────────────────────────────┴──> Backoff or Failed         Stopping: SIGTERM to the leader,
//!   │   │ wait over     │                                   (tree killed)             SIGKILL to the tree after its
//!   │   └───────────────│── incarnation + 1 ─────────────────┘   restart asked, ┐     grace
//!   v stop              │ stop: short grace                                     │        │
//!  Stopped <────────────┴──────────────── tree empty ───────────────────────────┴────────┘
//! ```
//! Before the fleet is ready a failure ends the run. After that cause and policy decide (`restart`): the engine waits in
//! Backoff until its tree is empty and its log has been asked for the cause, and then stays failed, or goes all the way
//! again while the others serve. A fleet that was taken over from an xpyd that is gone begins with engines that are Healthy
//! already, and its failures never end the run of the others.
//!
//! The fleet:
//! ```text
//!  Starting ──all healthy──> Verifying ──ok──> Ready ──stop──> Draining ──> Stopping ──trees gone──> Closing ──> Checking ──> Over
//!      └── stop, a failure, a deadline ──┴───── a role lost ──────────────────^        shim lost ──> Sweeping ──^
//! ```
//! Deadlines are part of the state: [`Fleet::next_deadline`] says when [`Event::Tick`] is due, so no timer can be stale.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use tokio::time::Instant;

use super::shim::protocol::LeftoverProcess;
use super::{Cause, Ending, Leftover, Outcome, restart};
use crate::fleet::{EngineId, EngineState, Exit, Incarnation, Load};
use crate::plan::{EngineSpec, RestartPolicy};

/// What an engine that has not served yet gets to leave: there is nothing to hand over, but workers to take along.
const START_GRACE: Duration = Duration::from_secs(2);

/// How long decode engines wait for prefill engines to leave first. KV in flight is pulled in far less.
const DECODE_TURN: Duration = Duration::from_secs(1);

/// How long the shim can take to say that a killed tree is empty or cannot be emptied; it reports the latter after 30 s.
const KILL_ANSWER: Duration = Duration::from_mins(1);

/// How long the look for a failure's cause in the engine's log may take; without an answer, nobody knows it.
const CAUSE_DEADLINE: Duration = Duration::from_secs(10);

/// How long the shim may take to end: it gives itself 3 s for trees and 3 s for strays.
const CLOSE_DEADLINE: Duration = Duration::from_secs(10);

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
    /// Until when the engine may stay as it is: starting, draining alone, stopping, or killed without an answer.
    until: Option<Instant>,
    goal: Goal,
    /// In backoff, the failure whose cause is not known yet.
    unexplained: Option<Unexplained>,
    /// In backoff, when it starts again, if its tree is empty by then.
    restart_at: Option<Instant>,
    restarts: restart::History,
}

/// What is to become of an engine, as far as others do not know better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Goal {
    /// It is there to serve.
    Serve,
    /// It is to stop and then start again.
    StartAgain,
    /// It is to stop and stay so.
    Stop,
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
    Verifying,
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

/// What bounds a fleet's waits and restarts.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    /// How long requests in flight may go on.
    pub(super) drain: Duration,
    /// How long the canaries of one round can take, for each pair of engines in it.
    pub(super) verify: Duration,
    /// Which engines start again.
    pub(super) restart: RestartPolicy,
}

impl Engine {
    fn planned(spec: EngineSpec) -> Self {
        Self {
            spec,
            incarnation: Incarnation::FIRST,
            state: EngineState::Planned,
            pid: None,
            reason: None,
            load: Arc::default(),
            tree: Tree::Absent,
            until: None,
            goal: Goal::Serve,
            unexplained: None,
            restart_at: None,
            restarts: restart::History::default(),
        }
    }
}

/// All engines and the run they are in.
#[derive(Debug)]
pub(super) struct Fleet {
    engines: Vec<Engine>,
    stage: Stage,
    limits: Limits,
    /// Spreads restarts; without it they come exactly when the policy says.
    random: Option<StdRng>,
    verification: Option<Verification>,
    checks: Checks,
    /// The engine that was restarted last because of a pair (prefill, decode) that fails alone; until the pair works.
    blamed: BTreeMap<(usize, usize), usize>,
    /// Rounds of canaries so far.
    rounds: u64,
    stop_asked: bool,
    /// Whether it was taken over from an earlier xpyd.
    is_attached: bool,
    /// Why the run ends, and since when it does.
    ending: Option<(Ending, Instant)>,
    strays: Vec<LeftoverProcess>,
    actions: Vec<Action>,
    changed: bool,
}

impl Fleet {
    pub(super) fn new(engines: &[EngineSpec], limits: Limits, random: Option<StdRng>) -> Self {
        Self {
            engines: engines.iter().cloned().map(Engine::planned).collect(),
            stage: Stage::Starting,
            limits,
            random,
            verification: None,
            checks: Checks::default(),
            blamed: BTreeMap::new(),
            rounds: 0,
            stop_asked: false,
            is_attached: false,
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
            Event::Prepared(id, incarnation, result) => self.prepared(&id, incarnation, result, now),
            Event::Spawned(id, incarnation, pid) => self.spawned(&id, incarnation, pid),
            Event::SpawnFailed(id, incarnation, reason) => self.gone(&id, incarnation, reason, now),
            Event::Moved(id, incarnation, endpoint) => {
                if let Some(index) = self.current(&id, incarnation) {
                    self.engines[index].spec.endpoint = endpoint;
                    self.changed = true;
                }
            }
            Event::Exited {
                engine,
                incarnation,
                exit,
            } => {
                if let Some(index) = self.current(&engine, incarnation) {
                    self.exited(index, exit, now);
                }
            }
            Event::TreeEmpty(id, incarnation) => {
                self.gone(&id, incarnation, "its processes are gone".to_owned(), now);
            }
            Event::Explained(id, incarnation, cause) => {
                if let Some(index) = self.current(&id, incarnation) {
                    self.explained(index, cause, now);
                }
            }
            Event::Leftover(id, processes) => self.left_over(id.as_ref(), processes, now),
            Event::Probed(id, incarnation) => self.probed(&id, incarnation, now),
            Event::Worked(round, prefill, decode) => self.worked(round, &prefill, &decode, now),
            Event::Verified(round, trials) => self.verified(round, trials, now),
            Event::Suspected(prefill, decode) => self.suspected(&prefill, &decode, now),
            Event::Hung(id, incarnation, reason) | Event::Usurped(id, incarnation, reason) => {
                if let Some(index) = self.current(&id, incarnation) {
                    self.fail(index, Failure::without_exit(reason), now);
                }
            }
            Event::StoodStill(id, incarnation, reason) => {
                if let Some(index) = self.current(&id, incarnation)
                    && self.engines[index].state == EngineState::Starting
                {
                    let after = self.engines[index].spec.start_stall;
                    self.not_ready(index, reason, after, now);
                }
            }
            Event::Join(spec) => {
                // Appended, so that the numbers of the others stay; it starts as one that comes back would.
                self.engines.push(Engine::planned(*spec));
                self.changed = true;
            }
            Event::Restart(id) => self.leave(&id, Goal::StartAgain, now),
            Event::TakeOut(id) => self.leave(&id, Goal::Stop, now),
            Event::Interrupt if self.stop_asked => self.force(now),
            Event::Interrupt | Event::Stop => self.stop(now),
            Event::Force => self.force(now),
            Event::Leave => self.leave_engines(now),
            Event::Drained(Some((id, incarnation))) => {
                if let Some(index) = self.current(&id, incarnation) {
                    self.drained_alone(index, now);
                }
            }
            Event::Drained(None) => {
                if matches!(self.stage, Stage::Draining { .. }) {
                    self.drained(now);
                }
            }
            Event::Tick => self.tick(now),
            Event::ShimGone(reason) => self.shim_gone(&reason, now),
            Event::Swept(processes) => self.swept(processes),
            Event::Checked(left) => self.checked(left, now),
        }
        self.go_on(now);
        std::mem::take(&mut self.actions)
    }

    /// When [`Event::Tick`] is due.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let stage = match self.stage {
            Stage::Draining { until } | Stage::Closing { until } => Some(until),
            Stage::Stopping { decode_turn } => decode_turn,
            Stage::Starting | Stage::Verifying | Stage::Ready | Stage::Sweeping | Stage::Checking | Stage::Over => None,
        };
        let canaries = self.verification.as_ref().map(|verification| verification.until);
        let waits = self.engines.iter().filter_map(|engine| engine.until);
        let restarts = self
            .engines
            .iter()
            .filter_map(|engine| engine.restart_at.filter(|_| engine.tree == Tree::Absent))
            .filter(|_| self.restarts_engines());
        waits.chain(restarts).chain(canaries).chain(stage).min()
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

    /// No process of the engine is there.
    fn gone(&mut self, id: &EngineId, incarnation: Incarnation, reason: String, now: Instant) {
        if let Some(index) = self.current(id, incarnation) {
            self.tree_is(index, Tree::Absent);
            self.fail(index, Failure::without_exit(reason), now);
        }
    }

    fn exited(&mut self, index: usize, exit: Exit, now: Instant) {
        let engine = &mut self.engines[index];
        if engine.tree == Tree::Running {
            engine.tree = Tree::Leaderless;
        }
        match engine.state {
            EngineState::Starting | EngineState::Healthy | EngineState::Ready | EngineState::Draining => {
                let when = match engine.state {
                    EngineState::Starting => "while starting",
                    EngineState::Draining => "while draining",
                    _ => "unasked",
                };
                let failure = Failure {
                    reason: format!("{exit} {when}; see its log `{}`", engine.spec.log_file.display()),
                    exit: Some(exit),
                };
                self.fail(index, failure, now);
            }
            // The shim asks the rest of the tree to leave, which has what is left of the leader's time.
            EngineState::Stopping
            | EngineState::Planned
            | EngineState::Stopped
            | EngineState::Backoff
            | EngineState::Failed => {}
        }
    }

    fn left_over(&mut self, id: Option<&EngineId>, processes: Vec<LeftoverProcess>, now: Instant) {
        match self.engines.iter().position(|engine| Some(&engine.spec.id) == id) {
            // Only the answer to a kill; a tree that was found empty since stays so.
            Some(index) if self.engines[index].tree != Tree::Absent => {
                self.engines[index].tree = Tree::Left(processes);
                self.engines[index].until = None;
                self.cannot_restart(index, now);
            }
            Some(_) => {}
            None => self.strays = processes,
        }
    }

    /// The first request to stop: drain if clients are served, else go on to the teardown.
    fn stop(&mut self, now: Instant) {
        self.stop_asked = true;
        match self.stage {
            Stage::Starting | Stage::Verifying => self.end(Ending::Stopped, now),
            Stage::Ready => self.drain(Ending::Stopped, now),
            // Whoever wanted to keep the engines has changed their mind.
            Stage::Draining { .. } => {
                self.ending = Some((Ending::Stopped, now));
                self.changed = true;
            }
            Stage::Stopping { .. } | Stage::Closing { .. } | Stage::Sweeping | Stage::Checking | Stage::Over => {}
        }
    }

    /// Lets nobody in any more, and waits for those inside.
    fn drain(&mut self, ending: Ending, now: Instant) {
        self.ending = Some((ending, now));
        self.to(Stage::Draining {
            until: now + self.limits.drain,
        });
        for index in self.those(|engine| engine.state == EngineState::Ready) {
            self.enter(index, EngineState::Draining, None);
        }
        self.actions.push(Action::AwaitIdle(None));
    }

    /// Kills everything now.
    fn force(&mut self, now: Instant) {
        self.stop_asked = true;
        match self.stage {
            Stage::Starting | Stage::Verifying | Stage::Ready | Stage::Draining { .. } | Stage::Stopping { .. } => {
                let since = self.ending.take().map_or(now, |(_, since)| since);
                self.ending = Some((Ending::Forced, since));
                self.to(Stage::Stopping { decode_turn: None });
                for index in 0..self.engines.len() {
                    let engine = &self.engines[index];
                    engine.load.close();
                    if engine.state == EngineState::Planned {
                        self.enter(index, EngineState::Stopped, None);
                    } else if engine.state.is_alive() && engine.tree == Tree::Absent {
                        // It waits for memory.
                        self.enter(index, EngineState::Stopped, None);
                    } else if engine.state.is_alive() {
                        self.enter(index, EngineState::Stopping, None);
                    }
                    self.no_restart(index);
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
                self.shim_gone("the shim does not answer", now);
            } else if engine.state == EngineState::Starting {
                let reason = format!(
                    "not healthy {} after its start; see its log `{}`",
                    humantime::format_duration(engine.spec.ready_deadline),
                    engine.spec.log_file.display()
                );
                let after = self.engines[index].spec.ready_deadline;
                self.not_ready(index, reason, after, now);
            } else if engine.state == EngineState::Draining {
                self.drained_alone(index, now);
            } else if engine.unexplained.is_some() {
                self.explained(index, Cause::default(), now);
            } else {
                self.kill(index, now);
            }
        }
        if let Some(verification) = self
            .verification
            .as_ref()
            .filter(|verification| verification.until <= now)
        {
            self.verified(verification.round, Vec::new(), now);
        }
        match self.stage {
            Stage::Draining { until } if until <= now => self.drained(now),
            Stage::Closing { until } if until <= now => self.sweep(),
            Stage::Starting
            | Stage::Verifying
            | Stage::Ready
            | Stage::Draining { .. }
            | Stage::Stopping { .. }
            | Stage::Closing { .. }
            | Stage::Sweeping
            | Stage::Checking
            | Stage::Over => {}
        }
    }

    fn shim_gone(&mut self, reason: &str, now: Instant) {
        match self.stage {
            Stage::Closing { .. } => {
                self.to(Stage::Checking);
                self.actions.push(Action::Check);
            }
            Stage::Sweeping | Stage::Checking | Stage::Over => {}
            Stage::Starting | Stage::Verifying | Stage::Ready | Stage::Draining { .. } | Stage::Stopping { .. } => {
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
                    self.no_restart(index);
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

mod attach;
mod blame;
mod events;
mod explanations;
mod restarts;
mod transitions;
mod verification;
mod view;

pub(super) use self::events::{Action, Event};
use self::explanations::Unexplained;
use self::transitions::Failure;
use self::verification::{Checks, Verification};

#[cfg(test)]
pub(super) mod tests;
