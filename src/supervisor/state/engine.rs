//! The state machine of one engine: its state, its process tree, its deadline, its restarts. PURE.
//!
//! It knows no other engine. What one engine means to the others, and what the stage of the run allows, `fleet` decides.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::events::{Action, Output};
use crate::fleet::{EngineId, EngineState, EngineVerb, EngineView, Exit, Incarnation, Load, Retry, Role};
use crate::plan::{EngineSpec, RestartPolicy};
use crate::supervisor::hooks::has_gpus;
use crate::supervisor::restart_policy::{Decision, History};
use crate::supervisor::shim::protocol::LeftoverProcess;

/// Time to exit after SIGTERM for an engine that does not serve yet: it has no requests to finish, only workers to stop.
pub(super) const START_GRACE: Duration = Duration::from_secs(2);

/// Time for the shim to report that a killed tree is empty or cannot be emptied; it reports the latter after 30 s.
pub(super) const KILL_REPLY_DEADLINE: Duration = Duration::from_mins(1);

/// Time for the diagnosis of a failure from the engine's log. Without a result the cause counts as unknown.
pub(super) const DIAGNOSIS_DEADLINE: Duration = Duration::from_secs(10);

/// One engine.
#[derive(Debug)]
pub(super) struct EngineMachine {
    pub(super) spec: EngineSpec,
    pub(super) incarnation: Incarnation,
    pub(super) state: EngineState,
    pub(super) pid: Option<u32>,
    /// Why it failed, or why its hand-offs failed; kept until it serves again.
    pub(super) reason: Option<String>,
    pub(super) load: Arc<Load>,
    pub(super) tree: ProcessTree,
    /// The deadline of the present state: of a start, of a drain of this engine alone, of a stop, or of the reply to a kill.
    pub(super) until: Option<Instant>,
    pub(super) desired: DesiredState,
    /// In backoff: the failure whose cause is not known yet.
    pub(super) diagnosis: Option<PendingDiagnosis>,
    /// In backoff: when it starts again, if its tree is empty by then.
    pub(super) restart_at: Option<Instant>,
    pub(super) restarts: History,
}

/// The state that the user, or the supervisor, wants the engine to reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DesiredState {
    /// The engine serves.
    Serving,
    /// The engine stops and then starts again.
    Restarted,
    /// The engine stops and stays stopped.
    Stopped,
}

impl From<EngineVerb> for DesiredState {
    fn from(verb: EngineVerb) -> Self {
        match verb {
            EngineVerb::Restart => Self::Restarted,
            EngineVerb::Drain => Self::Stopped,
        }
    }
}

/// What is known of an engine's processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ProcessTree {
    /// No process exists.
    Absent,
    /// The spawn was requested, and the leader has not ended.
    Running,
    /// The leader has ended; other processes can still run.
    Leaderless,
    /// The kill was requested.
    Killed,
    /// These processes outlived SIGKILL.
    Left(Vec<LeftoverProcess>),
}

/// A failure whose cause is not known yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct PendingDiagnosis {
    /// When it failed.
    since: Instant,
    /// How its leader ended, if that was the failure.
    exit: Option<Exit>,
    /// Whether the diagnosis was requested.
    is_requested: bool,
}

/// Why an engine failed.
#[derive(Debug)]
pub(super) struct EngineFailure {
    /// One line.
    pub(super) reason: String,
    /// How its leader ended, if that was the failure.
    pub(super) exit: Option<Exit>,
}

impl EngineFailure {
    pub(super) fn without_exit(reason: String) -> Self {
        Self { reason, exit: None }
    }
}

/// The start of an engine.
impl EngineMachine {
    pub(super) fn planned(spec: EngineSpec) -> Self {
        Self {
            spec,
            incarnation: Incarnation::FIRST,
            state: EngineState::Planned,
            pid: None,
            reason: None,
            load: Arc::default(),
            tree: ProcessTree::Absent,
            until: None,
            desired: DesiredState::Serving,
            diagnosis: None,
            restart_at: None,
            restarts: History::default(),
        }
    }

    /// Planned to Starting: spawns the engine, or first waits until the memory of its GPUs is free.
    pub(super) fn start(&mut self, now: Instant, output: &mut Output) {
        let until = now + self.spec.ready_deadline;
        if has_gpus(&self.spec) {
            output.push(Action::Prepare(self.id(), self.incarnation));
        } else {
            self.spawn(output);
        }
        self.enter(EngineState::Starting, Some(until), output);
    }

    /// The memory of its GPUs is free: its time to become ready begins now.
    pub(super) fn prepared(&mut self, now: Instant, output: &mut Output) {
        self.until = Some(now + self.spec.ready_deadline);
        self.spawn(output);
    }

    fn spawn(&mut self, output: &mut Output) {
        self.tree = ProcessTree::Running;
        output.push(Action::Spawn(self.id(), self.incarnation));
    }

    /// Whether it still waits for the memory of its GPUs.
    pub(super) fn waits_for_gpus(&self) -> bool {
        self.state == EngineState::Starting && self.tree == ProcessTree::Absent
    }

    pub(super) fn spawned(&mut self, pid: u32, output: &mut Output) {
        self.pid = Some(pid);
        output.view_changed();
        output.push(Action::Record(self.id(), self.incarnation, pid));
        if self.state == EngineState::Starting {
            output.push(Action::Probe(self.id(), self.incarnation));
        }
    }

    /// Starting to Healthy: `/health` answered 200.
    pub(super) fn healthy(&mut self, output: &mut Output) {
        self.enter(EngineState::Healthy, None, output);
        output.push(Action::StartupFinished(self.id()));
        output.push(Action::Watch(self.id(), self.incarnation));
    }

    /// Healthy to Ready: its hand-offs work.
    pub(super) fn ready(&mut self, now: Instant, output: &mut Output) {
        if self.state == EngineState::Healthy {
            self.restarts.ready(now);
            self.reason = None;
            self.enter(EngineState::Ready, None, output);
        }
    }

    /// Backoff or Stopped to Planned, as the next incarnation. The reason stays until the engine serves again, because the
    /// next start can come at once.
    pub(super) fn plan_next_start(&mut self, output: &mut Output) {
        self.incarnation = Incarnation(self.incarnation.0 + 1);
        self.load = Load::default().into();
        (self.pid, self.restart_at) = (None, None);
        self.desired = DesiredState::Serving;
        self.enter(EngineState::Planned, None, output);
    }

    /// Whether it starts again now: no process is left, and the wait is over or a restart was requested.
    pub(super) fn is_restart_due(&self, now: Instant) -> bool {
        self.tree == ProcessTree::Absent
            && match self.state {
                EngineState::Backoff => self.restart_at.is_some_and(|at| at <= now),
                EngineState::Stopped => self.desired == DesiredState::Restarted,
                _ => false,
            }
    }
}

/// Failures.
impl EngineMachine {
    /// The leader ended. Returns the failure, unless the engine was on its way out.
    pub(super) fn exited(&mut self, exit: Exit) -> Option<EngineFailure> {
        if self.tree == ProcessTree::Running {
            self.tree = ProcessTree::Leaderless;
        }
        let when = match self.state {
            EngineState::Starting => "while starting",
            EngineState::Draining => "while draining",
            EngineState::Healthy | EngineState::Ready => "unasked",
            // The shim sends SIGTERM to the rest of the tree, which has what is left of the leader's time.
            EngineState::Stopping
            | EngineState::Planned
            | EngineState::Stopped
            | EngineState::Backoff
            | EngineState::Failed => return None,
        };
        Some(EngineFailure {
            reason: format!("{exit} {when}; see its log `{}`", self.spec.log_file.display()),
            exit: Some(exit),
        })
    }

    /// Marks the engine failed and kills its tree. Returns false if it was not alive, or was stopping.
    pub(super) fn fail(&mut self, reason: &str, now: Instant, output: &mut Output) -> bool {
        if !self.state.is_alive() || self.state == EngineState::Stopping {
            return false;
        }
        self.load.close();
        self.reason = Some(reason.to_owned());
        self.restart_at = None;
        self.enter(EngineState::Failed, None, output);
        self.kill(now, output);
        true
    }

    /// Failed to Backoff: the engine waits until the cause of its failure is known. `until` stays that of the kill.
    pub(super) fn await_diagnosis(&mut self, exit: Option<Exit>, now: Instant) {
        if self.desired != DesiredState::Stopped {
            self.state = EngineState::Backoff;
            self.diagnosis = Some(PendingDiagnosis {
                since: now,
                exit,
                is_requested: false,
            });
        }
    }

    /// Requests the diagnosis once the tree is empty: then no process writes to the log any more, and the engine could not
    /// start earlier anyway.
    pub(super) fn request_diagnosis(&mut self, now: Instant, output: &mut Output) {
        if self.tree != ProcessTree::Absent {
            return;
        }
        if let Some(pending) = self.diagnosis.as_mut().filter(|pending| !pending.is_requested) {
            pending.is_requested = true;
            self.until = Some(now + DIAGNOSIS_DEADLINE);
            let exit = pending.exit;
            output.push(Action::Diagnose(self.id(), self.incarnation, exit));
        }
    }

    /// The diagnosis is there, or its deadline has passed. Returns when the engine failed; `None` if no diagnosis was pending.
    pub(super) fn diagnosed(&mut self, cause: Option<String>, output: &mut Output) -> Option<Instant> {
        let pending = self.diagnosis.take()?;
        self.until = None;
        output.view_changed();
        if let Some(cause) = cause {
            self.append_to_reason(&format!(": {cause}"));
        }
        Some(pending.since)
    }

    /// Asks the restart policy what follows from a failure at `failed_at`. `random` lies in 0..1.
    pub(super) fn decide_restart(
        &mut self,
        policy: &RestartPolicy,
        retry: Retry,
        random: f64,
        failed_at: Instant,
    ) -> Decision {
        self.restarts.failed(policy, retry, random, failed_at)
    }

    pub(super) fn append_to_reason(&mut self, text: &str) {
        self.reason.get_or_insert_default().push_str(text);
    }

    /// Backoff to Failed: the run ends, so the engine does not start again.
    pub(super) fn cancel_restart(&mut self, output: &mut Output) {
        if self.state == EngineState::Backoff {
            self.state = EngineState::Failed;
            self.forget_restart();
            if self.tree == ProcessTree::Absent {
                // Otherwise it is the deadline of the kill.
                self.until = None;
            }
            output.view_changed();
        }
    }

    /// Processes outlived SIGKILL, and a second incarnation must not run beside them: Backoff or Stopping to Failed. Returns
    /// whether the engine was to start again; `None` if it is in another state.
    pub(super) fn give_up_restart(&mut self, output: &mut Output) -> Option<bool> {
        if !matches!(self.state, EngineState::Backoff | EngineState::Stopping) {
            return None;
        }
        let reason = self.reason.get_or_insert_with(|| "was stopped".to_owned());
        reason.push_str("; some of its processes cannot be ended, so it is not started again");
        self.forget_restart();
        self.enter(EngineState::Failed, None, output);
        Some(self.desired != DesiredState::Stopped)
    }

    fn forget_restart(&mut self) {
        (self.restart_at, self.diagnosis) = (None, None);
    }
}

/// The stop of an engine.
impl EngineMachine {
    /// Drains this engine alone: no new request, and a stop once it is idle or at `until`.
    pub(super) fn drain(&mut self, until: Instant, output: &mut Output) {
        self.enter(EngineState::Draining, Some(until), output);
        output.push(Action::AwaitIdle(Some((self.id(), self.incarnation))));
    }

    /// It is idle, or its drain deadline has passed.
    pub(super) fn drained(&mut self, now: Instant, output: &mut Output) {
        self.load.close();
        self.terminate(self.spec.stop_grace, now, output);
    }

    /// SIGTERM to the leader; SIGKILL to the tree follows after `grace`.
    pub(super) fn terminate(&mut self, grace: Duration, now: Instant, output: &mut Output) {
        if self.tree == ProcessTree::Absent {
            // It still waited for GPU memory.
            self.enter(EngineState::Stopped, None, output);
            return;
        }
        self.enter(EngineState::Stopping, Some(now + grace), output);
        output.push(Action::Terminate(self.id()));
    }

    /// SIGKILL to the tree, if it has processes and was not killed yet.
    pub(super) fn kill(&mut self, now: Instant, output: &mut Output) {
        if matches!(self.tree, ProcessTree::Running | ProcessTree::Leaderless) {
            self.tree = ProcessTree::Killed;
            self.until = Some(now + KILL_REPLY_DEADLINE);
            output.push(Action::Kill(self.id()));
        } else if self.tree == ProcessTree::Killed && self.until.is_none() {
            self.until = Some(now + KILL_REPLY_DEADLINE);
        }
    }

    /// Carries out a request for this engine alone. Whoever asks has looked at the engine, so its restarts no longer count.
    pub(super) fn request(&mut self, verb: EngineVerb, drain: Duration, now: Instant, output: &mut Output) {
        self.desired = verb.into();
        self.restarts = History::default();
        match self.state {
            EngineState::Ready => self.drain(now + drain, output),
            EngineState::Healthy => {
                self.load.close();
                self.terminate(self.spec.stop_grace, now, output);
            }
            EngineState::Starting => {
                self.load.close();
                self.terminate(START_GRACE, now, output);
            }
            EngineState::Backoff if self.tree != ProcessTree::Absent => {
                // It is on its way out already; its `until` is that of the kill.
                self.state = EngineState::Stopping;
                self.forget_restart();
                output.view_changed();
            }
            EngineState::Backoff | EngineState::Failed | EngineState::Stopped => {
                self.forget_restart();
                self.enter(EngineState::Stopped, None, output);
            }
            EngineState::Planned | EngineState::Draining | EngineState::Stopping => {}
        }
    }

    /// The run stops: prefill engines get SIGTERM at once, decode engines wait for their turn, engines that never served get a
    /// short grace.
    pub(super) fn stop_with_fleet(&mut self, now: Instant, output: &mut Output) {
        self.load.close();
        match (self.state, self.spec.role) {
            (EngineState::Planned, _) => self.enter(EngineState::Stopped, None, output),
            (EngineState::Starting, _) => self.terminate(START_GRACE, now, output),
            (EngineState::Healthy | EngineState::Ready | EngineState::Draining, Role::Prefill) => {
                self.terminate(self.spec.stop_grace, now, output);
            }
            (EngineState::Healthy | EngineState::Ready, Role::Decode) => {
                self.enter(EngineState::Draining, None, output);
            }
            (EngineState::Draining, Role::Decode)
            | (EngineState::Stopping | EngineState::Stopped | EngineState::Failed, _) => {}
            (EngineState::Backoff, _) => self.cancel_restart(output),
        }
    }

    /// The run is stopped by force: SIGKILL without grace.
    pub(super) fn force_stop(&mut self, now: Instant, output: &mut Output) {
        self.load.close();
        let waits_for_gpus = self.state.is_alive() && self.tree == ProcessTree::Absent;
        if self.state == EngineState::Planned || waits_for_gpus {
            self.enter(EngineState::Stopped, None, output);
        } else if self.state.is_alive() {
            self.enter(EngineState::Stopping, None, output);
        }
        self.cancel_restart(output);
        self.kill(now, output);
    }

    /// The shim is lost: the sweep takes what is left of the tree.
    pub(super) fn supervision_lost(&mut self, reason: &str, output: &mut Output) {
        self.load.close();
        self.until = None;
        if self.state == EngineState::Planned {
            self.enter(EngineState::Stopped, None, output);
        } else if self.state.is_alive() {
            self.reason = Some(reason.to_owned());
            self.enter(EngineState::Failed, None, output);
        }
        self.cancel_restart(output);
    }

    /// What is known of its processes has changed. A stop is over once no process is left; `can_restart` says whether an
    /// engine that waits for a restart then goes to Backoff.
    pub(super) fn set_tree(&mut self, tree: ProcessTree, can_restart: bool, output: &mut Output) {
        self.tree = tree;
        self.until = None;
        if self.tree == ProcessTree::Absent && self.state == EngineState::Stopping {
            let state = if self.restart_at.is_some() && can_restart {
                EngineState::Backoff
            } else {
                EngineState::Stopped
            };
            self.enter(state, None, output);
        }
    }

    /// Whether its processes are on their way out, and its GPUs' memory with them: an engine that starts there meanwhile
    /// measures too little free memory (vLLM issue 56830).
    pub(super) fn releases_gpus(&self) -> bool {
        let leaves = matches!(
            self.state,
            EngineState::Stopping | EngineState::Backoff | EngineState::Failed | EngineState::Stopped
        );
        leaves && !self.is_gone()
    }

    /// Whether no process is left that could still end.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self.tree, ProcessTree::Absent | ProcessTree::Left(_))
    }
}

/// An engine that outlived an earlier xpyd.
impl EngineMachine {
    /// It runs: it is Healthy, or still Starting.
    pub(super) fn attach_running(&mut self, pid: u32, startup_finished: bool, now: Instant, output: &mut Output) {
        (self.tree, self.pid) = (ProcessTree::Running, Some(pid));
        if startup_finished {
            self.enter(EngineState::Healthy, None, output);
            output.push(Action::Watch(self.id(), self.incarnation));
        } else {
            let until = now + self.spec.ready_deadline;
            self.enter(EngineState::Starting, Some(until), output);
            output.push(Action::Probe(self.id(), self.incarnation));
        }
    }

    /// It was drained on request, and is still stopping.
    pub(super) fn attach_stopping(&mut self, exit: Option<Exit>, now: Instant, output: &mut Output) {
        self.desired = DesiredState::Stopped;
        self.tree = if exit.is_some() {
            ProcessTree::Leaderless
        } else {
            ProcessTree::Running
        };
        let until = now + self.spec.stop_grace;
        self.enter(EngineState::Stopping, Some(until), output);
    }

    /// It was drained on request, and is gone.
    pub(super) fn attach_stopped(&mut self, output: &mut Output) {
        self.desired = DesiredState::Stopped;
        self.enter(EngineState::Stopped, None, output);
    }

    /// It ended while no xpyd ran. Returns the failure, which the fleet handles as any other.
    pub(super) fn attach_ended(&mut self, tree: ProcessTree, exit: Option<Exit>) -> EngineFailure {
        self.tree = tree;
        // Only an engine that is alive can fail.
        self.state = EngineState::Healthy;
        let how = exit.map_or_else(|| "ended".to_owned(), |exit| exit.to_string());
        let reason = format!(
            "{how} while xpyd was away; see its log `{}`",
            self.spec.log_file.display()
        );
        EngineFailure { reason, exit }
    }
}

/// What others read.
impl EngineMachine {
    pub(super) fn id(&self) -> EngineId {
        self.spec.id.clone()
    }

    pub(super) fn is_named(&self, id: &EngineId) -> bool {
        self.spec.id == *id
    }

    pub(super) fn enter(&mut self, state: EngineState, until: Option<Instant>, output: &mut Output) {
        self.state = state;
        self.until = until;
        output.view_changed();
    }

    pub(super) fn view(&self) -> EngineView {
        EngineView {
            id: self.id(),
            role: self.spec.role,
            incarnation: self.incarnation,
            state: self.state,
            endpoint: self.spec.endpoint.clone(),
            pid: self.pid,
            reason: self.reason.clone(),
            restart_at: self.restart_at,
            load: Arc::clone(&self.load),
        }
    }
}
