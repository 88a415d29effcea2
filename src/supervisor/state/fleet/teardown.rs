//! From the first reason to end to the last check: drain, stop, kill, sweep. PURE.

use std::time::Duration;

use tokio::time::Instant;

use super::{Action, EngineMachine, FleetMachine, RunStage};
use crate::fleet::{EngineState, Role};
use crate::supervisor::shim::protocol::LeftoverProcess;
use crate::supervisor::state::engine::ProcessTree;
use crate::supervisor::{EndReason, Leftover, Outcome};

/// How long decode engines wait for prefill engines to stop first. KV in flight is pulled in far less.
pub(in crate::supervisor::state) const DECODE_STOP_DELAY: Duration = Duration::from_secs(1);

/// Time for the shim to end: it gives itself 3 s for engine trees and 3 s for unowned processes.
pub(in crate::supervisor::state) const CLOSE_DEADLINE: Duration = Duration::from_secs(10);

impl FleetMachine {
    /// The first request to stop: drains if clients are served, else begins the teardown.
    pub(super) fn stop(&mut self, now: Instant) {
        self.is_stop_requested = true;
        match self.stage {
            RunStage::Starting | RunStage::Verifying => self.end(EndReason::Stopped, now),
            RunStage::Ready => self.drain(EndReason::Stopped, now),
            // A stop overrides an earlier request to keep the engines.
            RunStage::Draining { .. } => {
                self.end = Some((EndReason::Stopped, now));
                self.output.view_changed();
            }
            RunStage::Stopping { .. }
            | RunStage::Closing { .. }
            | RunStage::Sweeping
            | RunStage::Checking
            | RunStage::Over => {}
        }
    }

    /// Rejects new requests, and waits for those in flight.
    fn drain(&mut self, reason: EndReason, now: Instant) {
        self.end = Some((reason, now));
        self.set_stage(RunStage::Draining {
            until: now + self.limits.drain,
        });
        for engine in &mut self.engines {
            if engine.state == EngineState::Ready {
                engine.enter(EngineState::Draining, None, &mut self.output);
            }
        }
        self.output.push(Action::AwaitIdle(None));
    }

    /// Kills everything now.
    pub(super) fn force(&mut self, now: Instant) {
        self.is_stop_requested = true;
        match self.stage {
            RunStage::Starting
            | RunStage::Verifying
            | RunStage::Ready
            | RunStage::Draining { .. }
            | RunStage::Stopping { .. } => {
                let since = self.end.take().map_or(now, |(_, since)| since);
                self.end = Some((EndReason::Forced, since));
                self.set_stage(RunStage::Stopping { decode_stop: None });
                for engine in &mut self.engines {
                    engine.force_stop(now, &mut self.output);
                }
            }
            // Everything that can be killed is gone already.
            RunStage::Closing { .. } | RunStage::Sweeping | RunStage::Checking | RunStage::Over => {}
        }
    }

    /// Ends the run for this reason, unless it ends for an earlier one.
    pub(super) fn end(&mut self, reason: EndReason, now: Instant) {
        self.end.get_or_insert((reason, now));
        self.stop_all(now);
    }

    fn stop_all(&mut self, now: Instant) {
        self.set_stage(RunStage::Stopping {
            decode_stop: Some(now + DECODE_STOP_DELAY),
        });
        for engine in &mut self.engines {
            engine.stop_with_fleet(now, &mut self.output);
        }
    }

    /// Stops decode engines once prefill engines are gone or had their time, and ends the shim once all engines are gone.
    pub(super) fn advance_stop(&mut self, decode_stop: Option<Instant>, now: Instant) {
        if let Some(decode_stop) = decode_stop {
            let prefill_runs =
                |engine: &EngineMachine| engine.spec.role == Role::Prefill && engine.tree == ProcessTree::Running;
            if decode_stop <= now || !self.engines.iter().any(prefill_runs) {
                self.stage = RunStage::Stopping { decode_stop: None };
                for engine in &mut self.engines {
                    if engine.state == EngineState::Draining {
                        engine.terminate(engine.spec.stop_grace, now, &mut self.output);
                    }
                }
            }
        }
        if self.engines.iter().all(EngineMachine::is_gone) {
            self.set_stage(RunStage::Closing {
                until: now + CLOSE_DEADLINE,
            });
            self.output.push(Action::Shutdown);
        }
    }

    pub(super) fn shim_gone(&mut self, reason: &str, now: Instant) {
        match self.stage {
            RunStage::Closing { .. } => {
                self.set_stage(RunStage::Checking);
                self.output.push(Action::Check);
            }
            RunStage::Sweeping | RunStage::Checking | RunStage::Over => {}
            RunStage::Starting
            | RunStage::Verifying
            | RunStage::Ready
            | RunStage::Draining { .. }
            | RunStage::Stopping { .. } => {
                // A requested stop did not end as planned; a failure keeps its first cause.
                let lost = EndReason::SupervisionLost {
                    reason: reason.to_owned(),
                };
                match &mut self.end {
                    Some((end @ EndReason::Stopped, _)) => *end = lost,
                    Some(_) => {}
                    None => self.end = Some((lost, now)),
                }
                for engine in &mut self.engines {
                    engine.supervision_lost(reason, &mut self.output);
                }
                self.sweep();
            }
        }
    }

    pub(super) fn sweep(&mut self) {
        self.set_stage(RunStage::Sweeping);
        self.output.push(Action::Sweep);
    }

    pub(super) fn sweep_done(&mut self, processes: Vec<LeftoverProcess>) {
        if self.stage != RunStage::Sweeping {
            return;
        }
        for engine in &mut self.engines {
            engine.tree = ProcessTree::Absent;
        }
        self.unowned_processes = processes;
        self.set_stage(RunStage::Checking);
        self.output.push(Action::Check);
    }

    pub(super) fn checked(&mut self, left: Vec<Leftover>, now: Instant) {
        if self.stage == RunStage::Checking {
            self.set_stage(RunStage::Over);
            self.finish(EndReason::Stopped, left, now);
        }
    }

    /// The run ends and its engines stay for the next xpyd: once the accepted clients are served, or at the drain deadline. The
    /// engines serve until then.
    pub(super) fn leave_engines(&mut self, now: Instant) {
        match self.stage {
            RunStage::Starting | RunStage::Verifying => {
                self.end = Some((EndReason::EnginesKept, now));
                self.engines_left(now);
            }
            RunStage::Ready => {
                self.end = Some((EndReason::EnginesKept, now));
                self.set_stage(RunStage::Draining {
                    until: now + self.limits.drain,
                });
                self.output.push(Action::HandOver);
            }
            RunStage::Draining { .. }
            | RunStage::Stopping { .. }
            | RunStage::Closing { .. }
            | RunStage::Sweeping
            | RunStage::Checking
            | RunStage::Over => {}
        }
    }

    /// No request is in flight, or the drain deadline has passed.
    pub(super) fn drained(&mut self, now: Instant) {
        if matches!(self.end, Some((EndReason::EnginesKept, _))) {
            self.engines_left(now);
        } else {
            self.stop_all(now);
        }
    }

    fn engines_left(&mut self, now: Instant) {
        self.set_stage(RunStage::Over);
        for engine in &self.engines {
            engine.load.close();
        }
        self.output.push(Action::Leave);
        self.finish(EndReason::EnginesKept, Vec::new(), now);
    }

    fn finish(&mut self, default: EndReason, left: Vec<Leftover>, now: Instant) {
        let (ending, since) = self.end.clone().unwrap_or((default, now));
        self.output.push(Action::Finish(Outcome {
            reason: ending,
            left,
            teardown: now - since,
        }));
    }
}
