//! Engines that outlive xpyd: taken over from an earlier one, and left to a later one. PURE.

use std::collections::BTreeSet;

use tokio::time::Instant;

use super::transitions::Failure;
use super::verification::Purpose;
use super::{Action, Fleet, Goal, Stage, Tree};
use crate::fleet::{EngineId, EngineState, Exit, Incarnation, Role};
use crate::supervisor::shim::protocol::KeptState;
use crate::supervisor::{Ending, Outcome};

impl Fleet {
    /// Takes over engines that outlived an earlier xpyd, before anything else happens. Those that serve need only canaries;
    /// those that ended meanwhile come back by policy, without ending the run for the others.
    ///
    /// Those that were asked to stop stay so, unless they still run.
    pub(in crate::supervisor) fn attach(
        &mut self,
        kept: &[(EngineId, Incarnation, KeptState)],
        stopped: &BTreeSet<EngineId>,
        now: Instant,
    ) {
        self.is_attached = true;
        for (id, incarnation, state) in kept {
            let Some(index) = self.engines.iter().position(|engine| engine.spec.id == *id) else {
                continue;
            };
            self.engines[index].incarnation = *incarnation;
            match *state {
                KeptState::Running { pid, settled } => self.take_over(index, pid, settled, now),
                KeptState::Leaving { exit } if stopped.contains(id) => self.stops(index, exit, now),
                KeptState::Gone { .. } if stopped.contains(id) => {
                    self.engines[index].goal = Goal::Stop;
                    self.enter(index, EngineState::Stopped, None);
                }
                KeptState::Leaving { exit } => self.ended_meanwhile(index, Tree::Leaderless, exit, now),
                KeptState::Gone { exit } => self.ended_meanwhile(index, Tree::Absent, exit, now),
            }
        }
    }

    fn take_over(&mut self, index: usize, pid: u32, settled: bool, now: Instant) {
        let engine = &mut self.engines[index];
        (engine.tree, engine.pid) = (Tree::Running, Some(pid));
        let (id, incarnation) = (engine.spec.id.clone(), engine.incarnation);
        if settled {
            self.enter(index, EngineState::Healthy, None);
            self.actions.push(Action::Watch(id, incarnation));
        } else {
            let until = now + engine.spec.ready_deadline;
            self.enter(index, EngineState::Starting, Some(until));
            self.actions.push(Action::Probe(id, incarnation));
        }
    }

    /// It was asked to stop, and does.
    fn stops(&mut self, index: usize, exit: Option<Exit>, now: Instant) {
        let engine = &mut self.engines[index];
        engine.goal = Goal::Stop;
        engine.tree = if exit.is_some() {
            Tree::Leaderless
        } else {
            Tree::Running
        };
        let until = now + engine.spec.stop_grace;
        self.enter(index, EngineState::Stopping, Some(until));
    }

    /// Engines that were asked to stop and to stay so.
    pub(in crate::supervisor) fn stopped_on_request(&self) -> BTreeSet<EngineId> {
        let stopped = self.engines.iter().filter(|engine| {
            let is_out = matches!(
                engine.state,
                EngineState::Draining | EngineState::Stopping | EngineState::Stopped
            );
            engine.goal == Goal::Stop && is_out
        });
        stopped.map(|engine| engine.spec.id.clone()).collect()
    }

    fn ended_meanwhile(&mut self, index: usize, tree: Tree, exit: Option<Exit>, now: Instant) {
        let engine = &mut self.engines[index];
        engine.tree = tree;
        // Only one that was there can fail.
        engine.state = EngineState::Healthy;
        let how = exit.map_or_else(|| "ended".to_owned(), |exit| exit.to_string());
        let reason = format!(
            "{how} while xpyd was away; see its log `{}`",
            engine.spec.log_file.display()
        );
        self.fail(index, Failure { reason, exit }, now);
    }

    /// Whether engines that failed start again now. Before a new fleet is ready, a failure ends the run instead.
    pub(super) fn restarts_engines(&self) -> bool {
        self.stage == Stage::Ready || self.is_attached && matches!(self.stage, Stage::Starting | Stage::Verifying)
    }

    /// Begins the canaries of the whole fleet once every engine is up. Of a fleet that was taken over, those that are on
    /// their way back are not waited for as long as others of their role are there.
    pub(super) fn verify_all_once_up(&mut self, now: Instant) {
        let is_away = |state| {
            matches!(
                state,
                EngineState::Backoff | EngineState::Failed | EngineState::Stopping | EngineState::Stopped
            )
        };
        let healthy = |role| self.those(|engine| engine.spec.role == role && engine.state == EngineState::Healthy);
        let (prefill, decode) = (healthy(Role::Prefill), healthy(Role::Decode));
        let all_up = self
            .engines
            .iter()
            .all(|engine| engine.state == EngineState::Healthy || self.is_attached && is_away(engine.state));
        if self.stage == Stage::Starting && all_up && !prefill.is_empty() && !decode.is_empty() {
            self.to(Stage::Verifying);
            let pairs = prefill
                .iter()
                .flat_map(|prefill| decode.iter().map(|decode| (*prefill, *decode)));
            self.verify(Purpose::Fleet, pairs.collect(), Vec::new(), now);
        }
    }

    /// The run ends, and its engines stay: once the clients that were accepted are served, or the drain's deadline has come.
    /// The engines serve until then.
    pub(super) fn leave_engines(&mut self, now: Instant) {
        match self.stage {
            Stage::Starting | Stage::Verifying => {
                self.ending = Some((Ending::Kept, now));
                self.left(now);
            }
            Stage::Ready => {
                self.ending = Some((Ending::Kept, now));
                self.to(Stage::Draining {
                    until: now + self.limits.drain,
                });
                self.actions.push(Action::HandOver);
            }
            Stage::Draining { .. }
            | Stage::Stopping { .. }
            | Stage::Closing { .. }
            | Stage::Sweeping
            | Stage::Checking
            | Stage::Over => {}
        }
    }

    /// Nothing is in flight any more, or may be.
    pub(super) fn drained(&mut self, now: Instant) {
        if matches!(self.ending, Some((Ending::Kept, _))) {
            self.left(now);
        } else {
            self.stop_all(now);
        }
    }

    fn left(&mut self, now: Instant) {
        self.to(Stage::Over);
        for engine in &self.engines {
            engine.load.close();
        }
        let (ending, since) = self.ending.clone().unwrap_or((Ending::Kept, now));
        self.actions.push(Action::Leave);
        self.actions.push(Action::Finish(Outcome {
            ending,
            left: Vec::new(),
            teardown: now - since,
        }));
    }
}
