//! The supervisor's loop: turns everything that happens into events, and carries out the actions.
//!
//! It decides nothing; `state` does. Work that takes time runs as an owned task that ends in an event, so the loop can always
//! react to Ctrl+C.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::hang_report::HangReport;
use super::hooks::{self, CanaryRound, Diagnose, Hooks};
use super::node::{self, RemoteEngine};
use super::shim::client::{Shim, ShimError, ShimLog};
use super::shim::protocol::{Command, Event as ShimEvent, Spawn};
use super::state::{Action, Event, FleetMachine, Limits};
use super::{
    AttachableRun, EndReason, FleetChanges, Keep, Outcome, Refusal, Request, Settings, Wiring, leftovers, liveness,
    ports, probe, run_folder, spawn_record, startup_watchdog,
};
use crate::fleet::{Endpoint, EngineId, FleetView, Incarnation, Load, SHIM_LOG};
use crate::plan::{self, EngineSpec};
use crate::report::one_line;
use crate::signals::StopSignal;

/// How long engines wait for the next xpyd after `down --keep-engines`, unless the profile has a time.
const KEEP_ON_REQUEST: Duration = Duration::from_mins(15);

/// Starts the fleet, supervises it, and returns once all engines are gone or the leftovers are known.
///
/// Runs on the calling task. If the future is dropped, the shim ends the engines by itself.
pub async fn run<H: Hooks>(settings: Settings, wiring: Wiring<H>) -> Outcome {
    let mut driver = match Driver::start(settings, wiring).await {
        Ok(driver) => driver,
        Err(reason) => {
            return Outcome {
                reason: EndReason::SupervisionLost { reason },
                left: Vec::new(),
                teardown: Duration::ZERO,
            };
        }
    };
    let outcome = driver.drive().await;
    for reply in driver.stop_replies.drain(..) {
        // The receiver can be gone.
        let _ = reply.send(outcome.clone());
    }
    driver.tasks.shutdown().await;
    outcome
}

struct Driver<H> {
    settings: Settings,
    directory: PathBuf,
    signals: mpsc::Receiver<StopSignal>,
    requests: mpsc::Receiver<Request>,
    view: watch::Sender<Arc<FleetView>>,
    hooks: H,
    /// Ends the wait for GPU memory in the last check: the user asked twice to stop.
    force_exit: CancellationToken,
    is_checking: bool,
    /// Finds the cause if the current incarnation of an engine fails.
    diagnoses: BTreeMap<EngineId, Diagnose>,
    shim: Shim,
    shim_open: bool,
    fleet: FleetMachine,
    /// As saved in the run's folder.
    changes: FleetChanges,
    generation: u64,
    tasks: JoinSet<Event>,
    /// Pairs that worked in the latest round of canaries, with the number of the round.
    worked_pairs: (u64, mpsc::Receiver<(EngineId, EngineId)>),
    /// The task that polls each engine: first whether it is up, then whether it makes progress.
    probes: BTreeMap<EngineId, tokio::task::AbortHandle>,
    prober: reqwest::Client,
    stop_replies: Vec<oneshot::Sender<Outcome>>,
    /// Sent once the view shows the effect of the request.
    engine_replies: Vec<(oneshot::Sender<EngineReply>, EngineReply)>,
    /// Why the engines cannot outlive xpyd, if they cannot.
    cannot_keep: Option<String>,
}

type EngineReply = Result<Incarnation, Refusal>;

impl<H: Hooks> Driver<H> {
    async fn start(mut settings: Settings, wiring: Wiring<H>) -> Result<Self, String> {
        let directory = std::env::current_dir().map_err(|error| format!("no working directory: {error}"))?;
        let prober = probe::client().map_err(|error| one_line(&error))?;
        let attach = settings.attach.take();
        let kept = attach.as_ref().map(AttachableRun::engines);
        let shim = match attach {
            Some(run) => Shim::attach(run),
            None => Shim::start(&settings.program, ShimLog::File(&settings.run_dir.join(SHIM_LOG))).await,
        };
        let mut shim = shim.map_err(|error| one_line(&error))?;
        tracing::info!(pid = shim.pid(), attached = kept.is_some(), "shim");
        shim.send(&Command::Keep(settings.keep.clone()))
            .and_then(|()| shim.hold(settings.listener.take()))
            .map_err(|error| one_line(&error))?;
        let generation = wiring.view.borrow().generation;
        let limits = Limits {
            drain: settings.drain_deadline,
            verify: settings.verify_deadline,
            restart: settings.restart.clone(),
        };
        let mut fleet = FleetMachine::new(&settings.engines, limits, Some(rand::make_rng()));
        let changes = FleetChanges::read(&settings.run_dir);
        if let Some(kept) = kept {
            fleet.attach(&kept, &changes.stopped, Instant::now());
        }
        Ok(Self {
            fleet,
            changes,
            settings,
            directory,
            signals: wiring.signals,
            requests: wiring.requests,
            view: wiring.view,
            hooks: wiring.hooks,
            force_exit: CancellationToken::new(),
            is_checking: false,
            diagnoses: BTreeMap::new(),
            shim,
            shim_open: true,
            generation,
            tasks: JoinSet::new(),
            worked_pairs: (0, mpsc::channel(1).1),
            probes: BTreeMap::new(),
            prober,
            stop_replies: Vec::new(),
            engine_replies: Vec::new(),
            cannot_keep: None,
        })
    }

    async fn drive(&mut self) -> Outcome {
        let mut events = VecDeque::from([Event::Begin]);
        loop {
            while let Some(event) = events.pop_front() {
                tracing::debug!(?event, "fleet event");
                if self.is_checking && matches!(event, Event::Interrupt | Event::Force) {
                    self.force_exit.cancel();
                }
                let actions = self.fleet.handle(event, Instant::now());
                self.publish();
                for (reply, answer) in self.engine_replies.drain(..) {
                    let _ = reply.send(answer);
                }
                for action in actions {
                    match action {
                        Action::Finish(outcome) => return outcome,
                        Action::Sweep => {
                            self.shim_open = false;
                            events.push_back(Event::SweepDone(self.shim.sweep().await));
                        }
                        Action::Leave => self.leave_engines().await,
                        Action::Spawn(id, incarnation) => events.extend(self.spawn(&id, incarnation)),
                        action => self.perform(action),
                    }
                }
            }
            events.extend(self.next_event().await);
        }
    }

    /// Waits for the next event; `None` if what happened does not concern the fleet.
    async fn next_event(&mut self) -> Option<Event> {
        let deadline = self.fleet.next_deadline();
        tokio::select! {
            biased;
            Some(signal) = self.signals.recv() => Some(match signal {
                StopSignal::Interrupt => Event::Interrupt,
                StopSignal::Terminate | StopSignal::Hangup => Event::Stop,
            }),
            Some(request) = self.requests.recv() => self.accept_request(request),
            event = self.shim.event(), if self.shim_open => match event {
                Ok(ShimEvent::CannotKeep { reason }) => {
                    tracing::warn!(reason, "engines would end with xpyd");
                    self.cannot_keep = Some(reason);
                    None
                }
                Ok(event) => from_shim(event),
                Err(error) => Some(self.shim_gone(&error).await),
            },
            Some((prefill, decode)) = self.worked_pairs.1.recv() => {
                Some(Event::PairWorked(self.worked_pairs.0, prefill, decode))
            }
            Some(finished) = self.tasks.join_next(), if !self.tasks.is_empty() => match finished {
                Ok(event) => Some(event),
                Err(error) => {
                    // An aborted probe; the panic hook reports a panic.
                    tracing::debug!(%error, "task ended early");
                    None
                }
            },
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => Some(Event::Tick),
        }
    }

    /// Answers a request, and returns its event if it is accepted.
    fn accept_request(&mut self, request: Request) -> Option<Event> {
        match request {
            Request::Stop { force, reply } => {
                self.stop_replies.push(reply);
                Some(if force { Event::Force } else { Event::Stop })
            }
            Request::Leave { reply } => {
                let answer = self
                    .cannot_keep
                    .clone()
                    .map_or_else(|| Ok(self.keep_on_request().wait), Err);
                let is_accepted = answer.is_ok();
                // The receiver can be gone.
                let _ = reply.send(answer);
                is_accepted.then_some(Event::Leave)
            }
            Request::Add { spec, reply } => {
                let answer = self.prepare_to_add(&spec);
                let is_accepted = answer.is_ok();
                tracing::info!(engine = %spec.id, refused = answer.as_ref().err(), "request to add an engine");
                // The receiver can be gone.
                let _ = reply.send(answer);
                is_accepted.then_some(Event::Add(spec))
            }
            Request::Check { prefill, decode } => Some(Event::Suspected(prefill, decode)),
            Request::Engine {
                engine,
                verb,
                force,
                reply,
            } => {
                let answer = self.fleet.check_request(&engine, verb, force);
                let refused = answer.as_ref().err().map(ToString::to_string);
                tracing::info!(%engine, force, refused, "request to {verb} an engine");
                if answer.is_err() {
                    // The receiver can be gone.
                    let _ = reply.send(answer);
                    return None;
                }
                self.engine_replies.push((reply, answer));
                Some(Event::Requested(engine, verb))
            }
        }
    }

    /// Reserves the new engine's ports.
    fn prepare_to_add(&mut self, spec: &EngineSpec) -> Result<(), String> {
        self.fleet.check_add().map_err(|refusal| refusal.to_string())?;
        let reserved = ports::reserve(std::slice::from_ref(spec)).map_err(|conflict| one_line(&conflict))?;
        self.settings.reservations.add(reserved);
        self.settings.engines.push(spec.clone());
        let add = |changes: &mut FleetChanges| changes.added.extend([spec.id.clone()]);
        self.changes.change(&self.settings.run_dir, add);
        Ok(())
    }

    /// How the shim keeps the engines after a request to leave them.
    fn keep_on_request(&self) -> Keep {
        let mut keep = self.settings.keep.clone();
        if keep.wait.is_zero() {
            keep.wait = KEEP_ON_REQUEST;
        }
        keep
    }

    async fn leave_engines(&mut self) {
        self.command(&Command::Keep(self.keep_on_request()));
        if let Err(error) = self.shim.flush().await {
            tracing::error!(error = one_line(&error), "cannot ask the shim to keep the engines");
        }
    }

    async fn shim_gone(&mut self, error: &ShimError) -> Event {
        self.shim_open = false;
        self.shim.ended().await;
        Event::ShimGone(one_line(error))
    }

    fn perform(&mut self, action: Action) {
        tracing::debug!(?action, "fleet action");
        match action {
            Action::Prepare(id, incarnation) => self.prepare(id, incarnation),
            Action::Record(id, incarnation, pid) => self.record(&id, incarnation, pid),
            Action::Probe(id, incarnation) => self.probe(id, incarnation),
            Action::Watch(id, incarnation) => self.watch(id, incarnation),
            Action::Diagnose(id, incarnation, exit) => {
                let diagnose = self.diagnoses.get(&id).cloned();
                self.tasks
                    .spawn(async move { Event::Diagnosed(id, incarnation, hooks::diagnose(diagnose, exit).await) });
            }
            Action::StartupFinished(engine) => {
                tracing::info!(%engine, "engine is up");
                self.command(&Command::StartupFinished { engine });
            }
            Action::Verify { round, pairs, at_once } => {
                let (sender, receiver) = mpsc::channel(pairs.len().max(1));
                self.worked_pairs = (round, receiver);
                let results = self.hooks.run_canaries(CanaryRound {
                    pairs,
                    at_once,
                    worked: sender,
                });
                self.tasks.spawn(async move { Event::Verified(round, results.await) });
            }
            Action::AwaitIdle(of) => {
                let loads = self.fleet.loads(of.as_ref().map(|(id, _)| id));
                self.tasks.spawn(async move {
                    idle(&loads).await;
                    Event::Drained(of)
                });
            }
            Action::HandOver => {
                let handed_over = self.hooks.hand_over_clients();
                self.tasks.spawn(async move {
                    handed_over.await;
                    Event::Drained(None)
                });
            }
            Action::Terminate(engine) => {
                self.stop_probe(&engine);
                self.command(&Command::Terminate { engine });
            }
            Action::Kill(engine) => {
                self.stop_probe(&engine);
                self.command(&Command::Kill { engine });
            }
            Action::Shutdown => self.command(&Command::Shutdown),
            Action::Check => {
                let (processes, engines) = (self.fleet.leftovers(), self.settings.engines.clone());
                let on_gpus: Vec<EngineSpec> = engines
                    .iter()
                    .filter(|engine| hooks::has_gpus(engine))
                    .cloned()
                    .collect();
                let memory =
                    (!on_gpus.is_empty()).then(|| self.hooks.await_gpu_release(on_gpus, self.force_exit.clone()));
                self.is_checking = true;
                self.tasks.spawn(async move {
                    let mut left = leftovers::find(&processes, &engines).await;
                    if let Some(memory) = memory {
                        left.extend(memory.await);
                    }
                    Event::Checked(left)
                });
            }
            // The loop itself handles these: they end it, must be awaited, or lead to events at once.
            Action::Spawn(..) | Action::Sweep | Action::Leave | Action::Finish(_) => {}
        }
    }

    /// Polls a starting engine until it is up, or until its start makes no progress.
    fn probe(&mut self, id: EngineId, incarnation: Incarnation) {
        let Some(spec) = self.spec(&id).cloned() else { return };
        let (prober, report) = (self.prober.clone(), self.hang_report(&id, incarnation));
        let log = self.settings.run_dir.join(&spec.log_file);
        let diagnose = self.diagnoses.get(&id).cloned();
        let leader = self.leader(&id);
        let placed = leader
            .filter(|_| hooks::has_gpus(&spec))
            .map(|leader| self.hooks.check_gpu_placement(spec.clone(), leader));
        let handle = self.tasks.spawn({
            let id = id.clone();
            async move {
                let (log_file, stall) = (spec.log_file.clone(), spec.start_stall);
                tokio::select! {
                    // Another process can have taken the port and answer.
                    () = probe::until_up(prober, spec.clone()) => {
                        let port_taken = leader.and_then(|leader| ports::taken_by_other(&spec, leader));
                        match (port_taken, placed) {
                            (Some(reason), _) => Event::PortTaken(id, incarnation, reason),
                            (None, Some(placed)) => match placed.await {
                                Ok(()) => Event::Probed(id, incarnation),
                                Err(reason) => Event::PortTaken(id, incarnation, reason),
                            },
                            (None, None) => Event::Probed(id, incarnation),
                        }
                    }
                    stalled_for = startup_watchdog::until_stalled(log, report.leader, stall) => {
                        let phase = hooks::diagnose(diagnose, None).await.phase;
                        let reason = startup_watchdog::reason(stalled_for, phase, &log_file);
                        Event::StartupStalled(id, incarnation, report.write(reason, "").await)
                    }
                }
            }
        });
        self.probes.insert(id, handle);
    }

    /// Checks that an engine that is up makes progress.
    fn watch(&mut self, id: EngineId, incarnation: Incarnation) {
        let loads = self.fleet.loads(Some(&id));
        let (Some(spec), [load]) = (self.spec(&id).cloned(), &loads[..]) else {
            return;
        };
        let load = Arc::clone(load);
        let (prober, report) = (self.prober.clone(), self.hang_report(&id, incarnation));
        let handle = self.tasks.spawn({
            let id = id.clone();
            async move {
                let hang = liveness::until_hung(&prober, &spec, &load).await;
                Event::Hung(id, incarnation, report.write(hang.reason, &hang.metrics).await)
            }
        });
        self.probes.insert(id, handle);
    }

    /// Waits until the memory of the engine's GPUs is free.
    fn prepare(&mut self, id: EngineId, incarnation: Incarnation) {
        // If it never starts, the log of an earlier incarnation does not show why.
        self.diagnoses.remove(&id);
        let Some(spec) = self.spec(&id).cloned() else { return };
        let free = self.hooks.await_gpu_memory(spec);
        self.tasks
            .spawn(async move { Event::Prepared(id, incarnation, free.await) });
    }

    fn spawn(&mut self, id: &EngineId, incarnation: Incarnation) -> Vec<Event> {
        let mut events = Vec::new();
        if let Err(error) = run_folder::restore(&self.settings.run_dir, &self.settings.engines) {
            let reason = format!("cannot restore the files that it reads: {error}");
            return vec![Event::SpawnFailed(id.clone(), incarnation, reason)];
        }
        if incarnation > Incarnation::FIRST {
            match self.renew(id) {
                Ok(Some(endpoint)) => events.push(Event::EndpointChanged(id.clone(), incarnation, endpoint)),
                Ok(None) => {}
                Err(error) => {
                    let reason = format!("cannot get ports for another start: {error}");
                    return vec![Event::SpawnFailed(id.clone(), incarnation, reason)];
                }
            }
        }
        let Some(spec) = self.spec(id) else { return events };
        let diagnose = self.hooks.diagnosis_of_start(spec);
        let (argv, env) = match &spec.node {
            None => (spec.argv.clone(), spec.env.clone()),
            Some(node) => {
                let engine = RemoteEngine {
                    spec: spec.clone(),
                    incarnation,
                    directory: self.directory.clone(),
                };
                node::command(&self.settings.program, node, &engine)
            }
        };
        let spawn = Spawn {
            engine: id.clone(),
            incarnation,
            argv,
            env,
            directory: self.directory.clone(),
            log: Some(self.settings.run_dir.join(&spec.log_file)),
            log_limits: spec.log_limits,
            stop_grace: spec.stop_grace,
            memo: serde_json::to_value(spec).unwrap_or_default(),
        };
        self.diagnoses.insert(id.clone(), diagnose);
        if let Err(error) = self.shim.send(&Command::Spawn(spawn)) {
            events.push(Event::SpawnFailed(id.clone(), incarnation, one_line(&error)));
        }
        events
    }

    /// Gives an engine that starts again fresh ports where it needs them. Returns its new endpoint, if that changed.
    fn renew(&mut self, id: &EngineId) -> std::io::Result<Option<Endpoint>> {
        let Some(index) = self.settings.engines.iter().position(|engine| engine.id == *id) else {
            return Ok(None);
        };
        let spec = &mut self.settings.engines[index];
        let count = plan::fresh_ports_needed(spec);
        if count == 0 {
            return Ok(None);
        }
        let fresh = self.settings.reservations.take_free(&spec.endpoint.host, count)?;
        let renewed = plan::respawn(spec, &fresh);
        if let Some(file) = &renewed.file {
            run_folder::write(&self.settings.run_dir, file)?;
        }
        *spec = renewed;
        Ok(Some(spec.endpoint.clone()))
    }

    fn record(&mut self, id: &EngineId, incarnation: Incarnation, pid: u32) {
        tracing::info!(engine = %id, %incarnation, pid, "engine spawned");
        if let Some(spec) = self.spec(id)
            && let Err(error) =
                spawn_record::write(&self.settings.run_dir, &self.settings.run_name, spec, incarnation, pid)
        {
            tracing::warn!(engine = %id, %error, "spawn record not written");
        }
    }

    /// Describes this incarnation of the engine, for the case that it hangs.
    fn hang_report(&self, id: &EngineId, incarnation: Incarnation) -> HangReport {
        HangReport {
            folder: self.settings.run_dir.clone(),
            engine: id.clone(),
            incarnation,
            leader: self.view.borrow().engine(id).and_then(|engine| engine.pid),
        }
    }

    fn command(&mut self, command: &Command) {
        // These hold nothing but an engine's name, so they can always be encoded.
        if let Err(error) = self.shim.send(command) {
            tracing::error!(error = one_line(&error), "command not sent");
        }
    }

    fn stop_probe(&mut self, engine: &EngineId) {
        if let Some(probe) = self.probes.remove(engine) {
            probe.abort();
        }
    }

    /// The process id of the engine's leader, while there is one.
    fn leader(&self, id: &EngineId) -> Option<u32> {
        self.view.borrow().engines.iter().find(|engine| engine.id == *id)?.pid
    }

    fn spec(&self, id: &EngineId) -> Option<&EngineSpec> {
        self.settings.engines.iter().find(|engine| engine.id == *id)
    }

    fn publish(&mut self) {
        if let Some(view) = self.fleet.changed_view(self.generation + 1) {
            self.generation += 1;
            self.view.send_replace(Arc::new(view));
            let stopped = self.fleet.stopped_on_request();
            self.changes
                .change(&self.settings.run_dir, |changes| changes.stopped = stopped);
        }
    }
}

fn from_shim(event: ShimEvent) -> Option<Event> {
    Some(match event {
        ShimEvent::Hello { .. } | ShimEvent::CannotKeep { .. } => return None,
        ShimEvent::Spawned {
            engine,
            incarnation,
            pid,
            ..
        } => Event::Spawned(engine, incarnation, pid),
        ShimEvent::SpawnFailed {
            engine,
            incarnation,
            reason,
        } => Event::SpawnFailed(engine, incarnation, reason),
        ShimEvent::Exited {
            engine,
            incarnation,
            exit,
        } => Event::Exited {
            engine,
            incarnation,
            exit,
        },
        ShimEvent::TreeEmpty { engine, incarnation } => Event::TreeEmpty(engine, incarnation),
        ShimEvent::Leftover { engine, processes } => Event::Leftover(engine, processes),
    })
}

/// Returns once none of the loads has a request in flight, all at the same time.
async fn idle(loads: &[Arc<Load>]) {
    while loads.iter().any(|load| !load.is_idle()) {
        for load in loads {
            load.idle().await;
        }
    }
}
