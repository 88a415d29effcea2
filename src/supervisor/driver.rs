//! The supervisor's loop: everything that can happen to the fleet becomes an event, every action is carried out here.
//!
//! Decides nothing; `state` does. What takes time runs as an owned task that ends in an event, so the loop itself waits
//! for one thing at a time and stays able to answer a Ctrl+C.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::hang::Scene;
use super::shim::client::{Shim, ShimError};
use super::shim::protocol::{Command, Event as Report, Spawn};
use super::state::{Action, Event, Fleet, Goal, Limits};
use super::{
    CanaryRound, Ending, Explain, ExplainIncarnation, GpuChecks, HandOver, Keep, KeptRun, Outcome, Refusal, Request,
    Scaled, Settings, Then, Verify, Wiring, cause, gpus, leftovers, liveness, ports, probe, run_folder, spawn_record,
    standstill,
};
use crate::fleet::{Endpoint, EngineId, FleetView, Incarnation, Load, SHIM_LOG};
use crate::plan::{self, EngineSpec};
use crate::report::one_line;
use crate::signals::StopSignal;

/// How long engines wait for the next xpyd where the run itself would not have kept them.
const KEEP_ON_REQUEST: Duration = Duration::from_mins(15);

/// Brings the fleet up, supervises it, and returns once all of it is gone or what is left is known.
///
/// Runs on the calling task. If it is dropped instead, the shim takes the engines down by itself.
pub async fn run(settings: Settings, wiring: Wiring) -> Outcome {
    let mut driver = match Driver::start(settings, wiring).await {
        Ok(driver) => driver,
        Err(reason) => {
            return Outcome {
                ending: Ending::SupervisionLost { reason },
                left: Vec::new(),
                teardown: Duration::ZERO,
            };
        }
    };
    let outcome = driver.drive().await;
    for reply in driver.replies.drain(..) {
        // Whoever asked may have gone.
        let _ = reply.send(outcome.clone());
    }
    driver.tasks.shutdown().await;
    outcome
}

struct Driver {
    settings: Settings,
    directory: PathBuf,
    signals: mpsc::Receiver<StopSignal>,
    requests: mpsc::Receiver<Request>,
    view: watch::Sender<Arc<FleetView>>,
    verify: Verify,
    hand_over: HandOver,
    explain: Explain,
    gpus: GpuChecks,
    /// Cancelled when nobody wants to wait for the last look.
    hurry: CancellationToken,
    is_checking: bool,
    /// What tells why the present incarnation of each engine failed.
    explainers: BTreeMap<EngineId, ExplainIncarnation>,
    shim: Shim,
    shim_open: bool,
    fleet: Fleet,
    /// As it stands in the run's folder.
    scaled: Scaled,
    generation: u64,
    tasks: JoinSet<Event>,
    /// The pairs that worked in the last round of canaries.
    worked: (u64, mpsc::Receiver<(EngineId, EngineId)>),
    /// What asks each engine something: whether it is up, then whether it makes progress.
    probes: BTreeMap<EngineId, tokio::task::AbortHandle>,
    prober: reqwest::Client,
    replies: Vec<oneshot::Sender<Outcome>>,
    /// Given once the view shows what was asked for.
    answers: Vec<(oneshot::Sender<Answer>, Answer)>,
    /// Why the engines cannot outlive xpyd, if they cannot.
    cannot_keep: Option<String>,
}

type Answer = Result<Incarnation, Refusal>;

impl Driver {
    async fn start(mut settings: Settings, wiring: Wiring) -> Result<Self, String> {
        let directory = std::env::current_dir().map_err(|error| format!("no working directory: {error}"))?;
        let prober = probe::client().map_err(|error| one_line(&error))?;
        let attach = settings.attach.take();
        let kept = attach.as_ref().map(KeptRun::engines);
        let shim = match attach {
            Some(run) => Shim::attach(run),
            None => Shim::start(&settings.program, &settings.run_dir.join(SHIM_LOG)).await,
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
        let mut fleet = Fleet::new(&settings.engines, limits, Some(rand::make_rng()));
        let scaled = Scaled::read(&settings.run_dir);
        if let Some(kept) = kept {
            fleet.attach(&kept, &scaled.stopped, Instant::now());
        }
        Ok(Self {
            fleet,
            scaled,
            settings,
            directory,
            signals: wiring.signals,
            requests: wiring.requests,
            view: wiring.view,
            verify: wiring.verify,
            hand_over: wiring.hand_over,
            explain: wiring.explain,
            gpus: wiring.gpus,
            hurry: CancellationToken::new(),
            is_checking: false,
            explainers: BTreeMap::new(),
            shim,
            shim_open: true,
            generation,
            tasks: JoinSet::new(),
            worked: (0, mpsc::channel(1).1),
            probes: BTreeMap::new(),
            prober,
            replies: Vec::new(),
            answers: Vec::new(),
            cannot_keep: None,
        })
    }

    async fn drive(&mut self) -> Outcome {
        let mut events = VecDeque::from([Event::Begin]);
        loop {
            while let Some(event) = events.pop_front() {
                tracing::debug!(?event, "fleet event");
                if self.is_checking && matches!(event, Event::Interrupt | Event::Force) {
                    self.hurry.cancel();
                }
                let actions = self.fleet.handle(event, Instant::now());
                self.publish();
                for (reply, answer) in self.answers.drain(..) {
                    let _ = reply.send(answer);
                }
                for action in actions {
                    match action {
                        Action::Finish(outcome) => return outcome,
                        Action::Sweep => {
                            self.shim_open = false;
                            events.push_back(Event::Swept(self.shim.sweep().await));
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

    /// Waits for the next thing to happen; `None` if it concerns nobody.
    async fn next_event(&mut self) -> Option<Event> {
        let deadline = self.fleet.next_deadline();
        tokio::select! {
            biased;
            Some(signal) = self.signals.recv() => Some(match signal {
                StopSignal::Interrupt => Event::Interrupt,
                StopSignal::Terminate | StopSignal::Hangup => Event::Stop,
            }),
            Some(request) = self.requests.recv() => self.asked(request),
            report = self.shim.event(), if self.shim_open => match report {
                Ok(Report::CannotKeep { reason }) => {
                    tracing::warn!(reason, "engines would end with xpyd");
                    self.cannot_keep = Some(reason);
                    None
                }
                Ok(report) => from_report(report),
                Err(error) => Some(self.shim_gone(&error).await),
            },
            Some((prefill, decode)) = self.worked.1.recv() => Some(Event::Worked(self.worked.0, prefill, decode)),
            Some(finished) = self.tasks.join_next(), if !self.tasks.is_empty() => match finished {
                Ok(event) => Some(event),
                Err(error) => {
                    // A probe that was no longer wanted; a panic is reported by its own hook.
                    tracing::debug!(%error, "task ended early");
                    None
                }
            },
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => Some(Event::Tick),
        }
    }

    /// What somebody asked for, if it may be.
    fn asked(&mut self, request: Request) -> Option<Event> {
        match request {
            Request::Stop { force, reply } => {
                self.replies.push(reply);
                Some(if force { Event::Force } else { Event::Stop })
            }
            Request::Leave { reply } => {
                let answer = self
                    .cannot_keep
                    .clone()
                    .map_or_else(|| Ok(self.keep_on_request().wait), Err);
                let may = answer.is_ok();
                // Whoever asked may have gone.
                let _ = reply.send(answer);
                may.then_some(Event::Leave)
            }
            Request::Join { spec, reply } => {
                let answer = self.prepare_to_join(&spec);
                let may = answer.is_ok();
                tracing::info!(engine = %spec.id, refused = answer.as_ref().err(), "asked to let an engine join");
                // Whoever asked may have gone.
                let _ = reply.send(answer);
                may.then_some(Event::Join(spec))
            }
            Request::Check { prefill, decode } => Some(Event::Suspected(prefill, decode)),
            Request::Engine {
                engine,
                then,
                force,
                reply,
            } => {
                let goal = match then {
                    Then::Restart => Goal::StartAgain,
                    Then::Stay => Goal::Stop,
                };
                let answer = self.fleet.may_leave(&engine, goal, force);
                let refused = answer.as_ref().err().map(ToString::to_string);
                tracing::info!(%engine, force, refused, "asked to {then} an engine");
                if answer.is_err() {
                    // Whoever asked may have gone.
                    let _ = reply.send(answer);
                    return None;
                }
                self.answers.push((reply, answer));
                Some(match then {
                    Then::Restart => Event::Restart(engine),
                    Then::Stay => Event::TakeOut(engine),
                })
            }
        }
    }

    /// Takes the new engine's ports.
    fn prepare_to_join(&mut self, spec: &EngineSpec) -> Result<(), String> {
        self.fleet.may_grow().map_err(|refusal| refusal.to_string())?;
        let reserved = ports::reserve(std::slice::from_ref(spec)).map_err(|conflict| one_line(&conflict))?;
        self.settings.reservations.add(reserved);
        self.settings.engines.push(spec.clone());
        let joins = |scaled: &mut Scaled| scaled.joined.extend([spec.id.clone()]);
        self.scaled.change(&self.settings.run_dir, joins);
        Ok(())
    }

    /// How engines are kept that are left on request.
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
            tracing::error!(error = one_line(&error), "the shim was not told to keep the engines");
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
            Action::Explain(id, incarnation, exit) => {
                let explainer = self.explainers.get(&id).cloned();
                self.tasks
                    .spawn(async move { Event::Explained(id, incarnation, cause::ask(explainer, exit).await) });
            }
            Action::Settled(engine) => self.command(&Command::Settled { engine }),
            Action::Verify { round, pairs, at_once } => {
                let (sender, receiver) = mpsc::channel(pairs.len().max(1));
                self.worked = (round, receiver);
                let verification = (self.verify)(CanaryRound {
                    pairs,
                    at_once,
                    worked: sender,
                });
                self.tasks
                    .spawn(async move { Event::Verified(round, verification.await) });
            }
            Action::AwaitIdle(of) => {
                let loads = self.fleet.loads(of.as_ref().map(|(id, _)| id));
                self.tasks.spawn(async move {
                    idle(&loads).await;
                    Event::Drained(of)
                });
            }
            Action::HandOver => {
                let handed_over = (self.hand_over)();
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
                    .filter(|engine| gpus::has_gpus(engine))
                    .cloned()
                    .collect();
                let memory = (!on_gpus.is_empty()).then(|| (self.gpus.released)(on_gpus, self.hurry.clone()));
                self.is_checking = true;
                self.tasks.spawn(async move {
                    let mut left = leftovers::find(&processes, &engines).await;
                    if let Some(memory) = memory {
                        left.extend(memory.await);
                    }
                    Event::Checked(left)
                });
            }
            // These are the loop's own: they end it, have to be waited for, or lead to events at once.
            Action::Spawn(..) | Action::Sweep | Action::Leave | Action::Finish(_) => {}
        }
    }

    /// Asks a starting engine until it is up, and looks whether its start goes on.
    fn probe(&mut self, id: EngineId, incarnation: Incarnation) {
        let Some(spec) = self.spec(&id).cloned() else { return };
        let (prober, scene) = (self.prober.clone(), self.scene(&id, incarnation));
        let log = self.settings.run_dir.join(&spec.log_file);
        let explainer = self.explainers.get(&id).cloned();
        let leader = self.leader(&id);
        let placed = leader
            .filter(|_| gpus::has_gpus(&spec))
            .map(|leader| (self.gpus.placed)(spec.clone(), leader));
        let handle = self.tasks.spawn({
            let id = id.clone();
            async move {
                let (log_file, stall) = (spec.log_file.clone(), spec.start_stall);
                tokio::select! {
                    // What answers need not be the engine.
                    () = probe::until_up(prober, spec.clone()) => {
                        let usurped = leader.and_then(|leader| ports::usurped(&spec, leader));
                        match (usurped, placed) {
                            (Some(reason), _) => Event::Usurped(id, incarnation, reason),
                            (None, Some(placed)) => match placed.await {
                                Ok(()) => Event::Probed(id, incarnation),
                                Err(reason) => Event::Usurped(id, incarnation, reason),
                            },
                            (None, None) => Event::Probed(id, incarnation),
                        }
                    }
                    still = standstill::until_still(log, scene.leader, stall) => {
                        let phase = cause::ask(explainer, None).await.phase;
                        let reason = standstill::reason(still, phase, &log_file);
                        Event::StoodStill(id, incarnation, scene.record(reason, "").await)
                    }
                }
            }
        });
        self.probes.insert(id, handle);
    }

    /// Watches that an engine that is up gets things done.
    fn watch(&mut self, id: EngineId, incarnation: Incarnation) {
        let loads = self.fleet.loads(Some(&id));
        let (Some(spec), [load]) = (self.spec(&id).cloned(), &loads[..]) else {
            return;
        };
        let load = Arc::clone(load);
        let (prober, scene) = (self.prober.clone(), self.scene(&id, incarnation));
        let handle = self.tasks.spawn({
            let id = id.clone();
            async move {
                let hang = liveness::until_hung(&prober, &spec, &load).await;
                Event::Hung(id, incarnation, scene.record(hang.reason, &hang.metrics).await)
            }
        });
        self.probes.insert(id, handle);
    }

    /// Waits until the GPUs of an engine are free for it.
    fn prepare(&mut self, id: EngineId, incarnation: Incarnation) {
        // Should it never start, the log of an earlier incarnation tells nothing about that.
        self.explainers.remove(&id);
        let Some(spec) = self.spec(&id).cloned() else { return };
        let free = (self.gpus.before_start)(spec);
        self.tasks
            .spawn(async move { Event::Prepared(id, incarnation, free.await) });
    }

    fn spawn(&mut self, id: &EngineId, incarnation: Incarnation) -> Vec<Event> {
        let mut events = Vec::new();
        if let Err(error) = run_folder::restore(&self.settings.run_dir, &self.settings.engines) {
            let reason = format!("cannot get the files that it reads: {error}");
            return vec![Event::SpawnFailed(id.clone(), incarnation, reason)];
        }
        if incarnation > Incarnation::FIRST {
            match self.renew(id) {
                Ok(Some(endpoint)) => events.push(Event::Moved(id.clone(), incarnation, endpoint)),
                Ok(None) => {}
                Err(error) => {
                    let reason = format!("cannot be prepared for another start: {error}");
                    return vec![Event::SpawnFailed(id.clone(), incarnation, reason)];
                }
            }
        }
        let Some(spec) = self.spec(id) else { return events };
        let explainer = (self.explain)(spec);
        let spawn = Spawn {
            engine: id.clone(),
            incarnation,
            argv: spec.argv.clone(),
            env: spec.env.clone(),
            directory: self.directory.clone(),
            log: self.settings.run_dir.join(&spec.log_file),
            log_limits: spec.log_limits,
            stop_grace: spec.stop_grace,
            memo: serde_json::to_value(spec).unwrap_or_default(),
        };
        self.explainers.insert(id.clone(), explainer);
        if let Err(error) = self.shim.send(&Command::Spawn(spawn)) {
            events.push(Event::SpawnFailed(id.clone(), incarnation, one_line(&error)));
        }
        events
    }

    /// Gives an engine that starts again what no earlier start of it had. Returns its new endpoint, if that differs.
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

    /// What to look at if this start of the engine hangs.
    fn scene(&self, id: &EngineId, incarnation: Incarnation) -> Scene {
        Scene {
            folder: self.settings.run_dir.clone(),
            engine: id.clone(),
            incarnation,
            leader: self.view.borrow().engine(id).and_then(|engine| engine.pid),
        }
    }

    fn command(&mut self, command: &Command) {
        // These hold an engine's name and nothing else, so they can always be written.
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
            self.scaled
                .change(&self.settings.run_dir, |scaled| scaled.stopped = stopped);
        }
    }
}

fn from_report(report: Report) -> Option<Event> {
    Some(match report {
        Report::Hello { .. } | Report::CannotKeep { .. } => return None,
        Report::Spawned {
            engine,
            incarnation,
            pid,
            ..
        } => Event::Spawned(engine, incarnation, pid),
        Report::SpawnFailed {
            engine,
            incarnation,
            reason,
        } => Event::SpawnFailed(engine, incarnation, reason),
        Report::Exited {
            engine,
            incarnation,
            exit,
        } => Event::Exited {
            engine,
            incarnation,
            exit,
        },
        Report::TreeEmpty { engine, incarnation } => Event::TreeEmpty(engine, incarnation),
        Report::Leftover { engine, processes } => Event::Leftover(engine, processes),
    })
}

/// Returns once nothing is in flight on any of them at the same time.
async fn idle(loads: &[Arc<Load>]) {
    while loads.iter().any(|load| !load.is_idle()) {
        for load in loads {
            load.idle().await;
        }
    }
}
