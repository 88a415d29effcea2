//! What events lead to: the transitions of single engines and of the fleet. PURE, as the rest of `state`.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

use super::{Action, CLOSE_DEADLINE, DECODE_TURN, Engine, Fleet, KILL_ANSWER, START_GRACE, Stage, Tree};
use crate::fleet::Exit;
use crate::fleet::{EngineId, EngineState, Incarnation, Role};
use crate::supervisor::{Ending, gpus};

/// Why an engine ended.
#[derive(Debug)]
pub(super) struct Failure {
    /// In one line.
    pub(super) reason: String,
    /// How its leader ended, if that was it.
    pub(super) exit: Option<Exit>,
}

impl Failure {
    pub(super) fn without_exit(reason: String) -> Self {
        Self { reason, exit: None }
    }
}

impl Engine {
    /// Whether its processes are on their way out, and its GPUs' memory with them: to start another engine there meanwhile
    /// spoils that one's memory profile (vLLM issue 56830).
    fn gives_back(&self) -> bool {
        let leaves = matches!(
            self.state,
            EngineState::Stopping | EngineState::Backoff | EngineState::Failed | EngineState::Stopped
        );
        leaves && !matches!(self.tree, Tree::Absent | Tree::Left(_))
    }
}

impl Fleet {
    /// Spawns every planned engine whose GPUs are free of starts: two at once on one GPU spoil vLLM's memory profile.
    pub(super) fn start_next(&mut self, now: Instant) {
        if self.stage != Stage::Starting && !self.restarts_engines() {
            return;
        }
        let mut busy: BTreeSet<u32> = BTreeSet::new();
        for engine in self
            .engines
            .iter()
            .filter(|engine| engine.state == EngineState::Starting)
        {
            busy.extend(&engine.spec.gpus);
        }
        for engine in self.engines.iter().filter(|engine| engine.gives_back()) {
            busy.extend(&engine.spec.gpus);
        }
        for index in self.those(|engine| engine.state == EngineState::Planned) {
            let engine = &mut self.engines[index];
            let free = !engine.spec.gpus.iter().any(|gpu| busy.contains(gpu));
            // Whether it starts or waits, later engines on the same GPUs wait behind it.
            busy.extend(&engine.spec.gpus);
            if free {
                let (id, incarnation) = (engine.spec.id.clone(), engine.incarnation);
                let until = now + engine.spec.ready_deadline;
                if gpus::has_gpus(&engine.spec) {
                    self.actions.push(Action::Prepare(id, incarnation));
                } else {
                    engine.tree = Tree::Running;
                    self.actions.push(Action::Spawn(id, incarnation));
                }
                self.enter(index, EngineState::Starting, Some(until));
            }
        }
    }

    /// The engine's GPUs are free for it, or they are not; nobody may want it any more.
    pub(super) fn prepared(
        &mut self,
        id: &EngineId,
        incarnation: Incarnation,
        result: Result<(), String>,
        now: Instant,
    ) {
        let Some(index) = self.current(id, incarnation) else {
            return;
        };
        let engine = &mut self.engines[index];
        if engine.state != EngineState::Starting || engine.tree != Tree::Absent {
            return;
        }
        match result {
            Ok(()) => {
                engine.tree = Tree::Running;
                engine.until = Some(now + engine.spec.ready_deadline);
                self.actions.push(Action::Spawn(id.clone(), incarnation));
            }
            Err(reason) => self.fail(index, Failure::without_exit(reason), now),
        }
    }

    /// The engine ended, or must end, for a reason nobody asked for.
    pub(super) fn fail(&mut self, index: usize, failure: Failure, now: Instant) {
        if self.mark_failed(index, &failure.reason, now) {
            let Failure { reason, exit } = failure;
            let engine = self.engines[index].spec.id.clone();
            self.consequences(index, Ending::EngineFailed { engine, reason, exit }, exit, now);
        }
    }

    /// The engine's time to become healthy, or to show that it still tries, is over.
    pub(super) fn not_ready(&mut self, index: usize, reason: String, after: Duration, now: Instant) {
        if self.mark_failed(index, &reason, now) {
            let engine = Some(self.engines[index].spec.id.clone());
            self.consequences(index, Ending::NotReady { engine, reason, after }, None, now);
        }
    }

    /// False if it was not alive, or was meant to go.
    pub(super) fn mark_failed(&mut self, index: usize, reason: &str, now: Instant) -> bool {
        let engine = &mut self.engines[index];
        if !engine.state.is_alive() || engine.state == EngineState::Stopping {
            return false;
        }
        engine.load.close();
        engine.reason = Some(reason.to_owned());
        engine.restart_at = None;
        self.enter(index, EngineState::Failed, None);
        self.kill(index, now);
        true
    }

    /// What the failure of one engine means to the fleet.
    fn consequences(&mut self, index: usize, cause: Ending, exit: Option<Exit>, now: Instant) {
        match self.stage {
            _ if self.restarts_engines() => self.await_explanation(index, exit, now),
            Stage::Starting | Stage::Verifying | Stage::Ready => self.end(cause, now),
            Stage::Draining { .. }
            | Stage::Stopping { .. }
            | Stage::Closing { .. }
            | Stage::Sweeping
            | Stage::Checking
            | Stage::Over => {}
        }
    }

    pub(super) fn end(&mut self, cause: Ending, now: Instant) {
        self.ending.get_or_insert((cause, now));
        self.stop_all(now);
    }

    /// Asks every engine to stop: prefill at once, decode in its turn, those that never served with a short grace.
    pub(super) fn stop_all(&mut self, now: Instant) {
        self.to(Stage::Stopping {
            decode_turn: Some(now + DECODE_TURN),
        });
        for index in 0..self.engines.len() {
            let engine = &self.engines[index];
            engine.load.close();
            match (engine.state, engine.spec.role) {
                (EngineState::Planned, _) => self.enter(index, EngineState::Stopped, None),
                (EngineState::Starting, _) => self.terminate(index, START_GRACE, now),
                (EngineState::Healthy | EngineState::Ready | EngineState::Draining, Role::Prefill) => {
                    self.terminate(index, engine.spec.stop_grace, now);
                }
                (EngineState::Healthy | EngineState::Ready, Role::Decode) => {
                    self.enter(index, EngineState::Draining, None);
                }
                (EngineState::Draining, Role::Decode)
                | (EngineState::Stopping | EngineState::Stopped | EngineState::Failed, _) => {}
                (EngineState::Backoff, _) => self.no_restart(index),
            }
        }
    }

    pub(super) fn terminate(&mut self, index: usize, grace: Duration, now: Instant) {
        if self.engines[index].tree == Tree::Absent {
            // It was still waiting for memory.
            self.enter(index, EngineState::Stopped, None);
            return;
        }
        let id = self.engines[index].spec.id.clone();
        self.enter(index, EngineState::Stopping, Some(now + grace));
        self.actions.push(Action::Terminate(id));
    }

    pub(super) fn kill(&mut self, index: usize, now: Instant) {
        let engine = &mut self.engines[index];
        if matches!(engine.tree, Tree::Running | Tree::Leaderless) {
            engine.tree = Tree::Killed;
            engine.until = Some(now + KILL_ANSWER);
            self.actions.push(Action::Kill(engine.spec.id.clone()));
        } else if engine.tree == Tree::Killed && engine.until.is_none() {
            engine.until = Some(now + KILL_ANSWER);
        }
    }

    pub(super) fn sweep(&mut self) {
        self.to(Stage::Sweeping);
        self.actions.push(Action::Sweep);
    }

    /// What follows from the state alone.
    pub(super) fn go_on(&mut self, now: Instant) {
        if self.restarts_engines() {
            self.ask_for_explanations(now);
            self.renew_those_due(now);
            self.start_next(now);
        }
        match self.stage {
            Stage::Starting => self.verify_all_once_up(now),
            Stage::Ready => self.verify_next(now),
            _ => {}
        }
        let Stage::Stopping { decode_turn } = self.stage else {
            return;
        };
        if let Some(turn) = decode_turn {
            let prefill_runs = |engine: &Engine| engine.spec.role == Role::Prefill && engine.tree == Tree::Running;
            if turn <= now || !self.engines.iter().any(prefill_runs) {
                self.stage = Stage::Stopping { decode_turn: None };
                for index in self.those(|engine| engine.state == EngineState::Draining) {
                    self.terminate(index, self.engines[index].spec.stop_grace, now);
                }
            }
        }
        let gone = |engine: &Engine| matches!(engine.tree, Tree::Absent | Tree::Left(_));
        if self.engines.iter().all(gone) {
            self.to(Stage::Closing {
                until: now + CLOSE_DEADLINE,
            });
            self.actions.push(Action::Shutdown);
        }
    }

    /// The engine, if `incarnation` is its current one; events about older ones are stale.
    pub(super) fn current(&self, id: &EngineId, incarnation: Incarnation) -> Option<usize> {
        self.engines
            .iter()
            .position(|engine| engine.spec.id == *id && engine.incarnation == incarnation)
    }

    pub(super) fn those(&self, condition: impl Fn(&Engine) -> bool) -> Vec<usize> {
        (0..self.engines.len())
            .filter(|index| condition(&self.engines[*index]))
            .collect()
    }

    pub(super) fn to(&mut self, stage: Stage) {
        self.stage = stage;
        self.changed = true;
        if !matches!(stage, Stage::Verifying | Stage::Ready) {
            // Its canaries are of no use any more.
            self.verification = None;
        }
    }

    pub(super) fn enter(&mut self, index: usize, state: EngineState, until: Option<Instant>) {
        self.engines[index].state = state;
        self.engines[index].until = until;
        self.changed = true;
    }

    pub(super) fn tree_is(&mut self, index: usize, tree: Tree) {
        self.engines[index].tree = tree;
        self.engines[index].until = None;
        if self.engines[index].tree == Tree::Absent && self.engines[index].state == EngineState::Stopping {
            let waits = self.engines[index].restart_at.is_some() && self.restarts_engines();
            let state = if waits {
                EngineState::Backoff
            } else {
                EngineState::Stopped
            };
            self.enter(index, state, None);
        }
    }
}
