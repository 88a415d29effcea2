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
use tokio::time::{Instant, sleep, sleep_until};

use super::guardian::client::{Guardian, GuardianError, is_still_there};
use super::guardian::protocol::{Command, Event as Report, LeftoverProcess, Spawn};
use super::state::{Action, Event, Fleet, Goal, Limits};
use super::{
    Ending, Leftover, Outcome, Refusal, Request, Settings, Then, Verify, Wiring, liveness, ports, probe, spawn_record,
};
use crate::fleet::{Endpoint, EngineId, FleetView, Incarnation, Load};
use crate::plan::{self, EngineSpec};
use crate::report::one_line;
use crate::signals::StopSignal;

/// How long ports may stay taken after the last process: the kernel closes sockets while it ends a process.
const PORTS_DEADLINE: Duration = Duration::from_secs(5);

/// Brings the fleet up, supervises it, and returns once all of it is gone or what is left is known.
///
/// Runs on the calling task. If it is dropped instead, the guardian takes the engines down by itself.
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
    guardian: Guardian,
    guardian_open: bool,
    fleet: Fleet,
    generation: u64,
    tasks: JoinSet<Event>,
    /// What asks each engine something: whether it is up, then whether it makes progress.
    probes: BTreeMap<EngineId, tokio::task::AbortHandle>,
    prober: reqwest::Client,
    replies: Vec<oneshot::Sender<Outcome>>,
    /// Given once the view shows what was asked for.
    answers: Vec<(oneshot::Sender<Answer>, Answer)>,
}

type Answer = Result<Incarnation, Refusal>;

impl Driver {
    async fn start(settings: Settings, wiring: Wiring) -> Result<Self, String> {
        let directory = std::env::current_dir().map_err(|error| format!("no working directory: {error}"))?;
        let prober = probe::client().map_err(|error| one_line(&error))?;
        let guardian = Guardian::start(&settings.program, &settings.run_dir.join("guardian.log"))
            .await
            .map_err(|error| one_line(&error))?;
        tracing::info!(pid = guardian.pid(), "guardian started");
        let generation = wiring.view.borrow().generation;
        let limits = Limits {
            drain: settings.drain_deadline,
            verify: settings.verify_deadline,
            restart: settings.restart.clone(),
        };
        Ok(Self {
            fleet: Fleet::new(&settings.engines, limits, Some(rand::make_rng())),
            settings,
            directory,
            signals: wiring.signals,
            requests: wiring.requests,
            view: wiring.view,
            verify: wiring.verify,
            guardian,
            guardian_open: true,
            generation,
            tasks: JoinSet::new(),
            probes: BTreeMap::new(),
            prober,
            replies: Vec::new(),
            answers: Vec::new(),
        })
    }

    async fn drive(&mut self) -> Outcome {
        let mut events = VecDeque::from([Event::Begin]);
        loop {
            while let Some(event) = events.pop_front() {
                tracing::debug!(?event, "fleet event");
                let actions = self.fleet.handle(event, Instant::now());
                self.publish();
                for (reply, answer) in self.answers.drain(..) {
                    let _ = reply.send(answer);
                }
                for action in actions {
                    match action {
                        Action::Finish(outcome) => return outcome,
                        Action::Sweep => {
                            self.guardian_open = false;
                            events.push_back(Event::Swept(self.guardian.sweep().await));
                        }
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
            report = self.guardian.event(), if self.guardian_open => match report {
                Ok(report) => from_report(report),
                Err(error) => Some(self.guardian_gone(&error).await),
            },
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
                tracing::info!(%engine, ?then, force, ?answer, "asked to take an engine out");
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

    async fn guardian_gone(&mut self, error: &GuardianError) -> Event {
        self.guardian_open = false;
        self.guardian.ended().await;
        Event::GuardianGone(one_line(error))
    }

    fn perform(&mut self, action: Action) {
        tracing::debug!(?action, "fleet action");
        match action {
            Action::Record(id, incarnation, pid) => self.record(&id, incarnation, pid),
            Action::Probe(id, incarnation) => {
                if let Some(spec) = self.spec(&id).cloned() {
                    let prober = self.prober.clone();
                    let leader = self.leader(&id);
                    let handle = self.tasks.spawn({
                        let id = id.clone();
                        async move {
                            probe::until_up(prober, spec.clone()).await;
                            // What answers need not be the engine.
                            match leader.and_then(|leader| ports::usurped(&spec, leader)) {
                                None => Event::Probed(id, incarnation),
                                Some(reason) => Event::Usurped(id, incarnation, reason),
                            }
                        }
                    });
                    self.probes.insert(id, handle);
                }
            }
            Action::Watch(id, incarnation) => {
                if let Some(spec) = self.spec(&id).cloned() {
                    let prober = self.prober.clone();
                    let handle = self.tasks.spawn({
                        let id = id.clone();
                        async move {
                            let reason = liveness::until_hung(prober, spec).await;
                            Event::Hung(id, incarnation, reason)
                        }
                    });
                    self.probes.insert(id, handle);
                }
            }
            Action::Settled(engine) => self.command(&Command::Settled { engine }),
            Action::Verify(round, pairs) => {
                let verification = (self.verify)(pairs);
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
                self.tasks
                    .spawn(async move { Event::Checked(what_is_left(&processes, &engines).await) });
            }
            // These are the loop's own: they end it, have to be waited for, or lead to events at once.
            Action::Spawn(..) | Action::Sweep | Action::Finish(_) => {}
        }
    }

    fn spawn(&mut self, id: &EngineId, incarnation: Incarnation) -> Vec<Event> {
        let mut events = Vec::new();
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
        let spawn = Spawn {
            engine: id.clone(),
            incarnation,
            argv: spec.argv.clone(),
            env: spec.env.clone(),
            directory: self.directory.clone(),
            log: self.settings.run_dir.join(&spec.log_file),
            log_limits: spec.log_limits,
            stop_grace: spec.stop_grace,
        };
        if let Err(error) = self.guardian.send(&Command::Spawn(spawn)) {
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
        let (renewed, file) = plan::respawn(spec, &fresh);
        if let Some(file) = file {
            fs_err::write(self.settings.run_dir.join(file.path), file.content)?;
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

    fn command(&mut self, command: &Command) {
        // These hold an engine's name and nothing else, so they can always be written.
        if let Err(error) = self.guardian.send(command) {
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
        }
    }
}

fn from_report(report: Report) -> Option<Event> {
    Some(match report {
        Report::Hello { .. } => return None,
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
            retryable: true,
        },
        Report::TreeEmpty { engine, incarnation } => Event::TreeEmpty(engine, incarnation),
        Report::Leftover { engine, processes } => Event::Leftover(engine, processes),
    })
}

/// Returns once nothing is in flight on any of them at the same time.
async fn idle(loads: &[Arc<Load>]) {
    while loads.iter().any(|load| load.in_flight() > 0) {
        for load in loads {
            load.idle().await;
        }
    }
}

/// The processes that are still there, and the ports that somebody still listens on after a bounded wait.
async fn what_is_left(processes: &[(Option<EngineId>, LeftoverProcess)], engines: &[EngineSpec]) -> Vec<Leftover> {
    let deadline = Instant::now() + PORTS_DEADLINE;
    loop {
        let still_there = processes
            .iter()
            .filter(|(_, process)| is_still_there(process))
            .map(|(engine, process)| Leftover::Process {
                engine: engine.clone(),
                pid: process.pid,
                name: process.name.clone(),
                state: process.state,
            });
        let held = engines.iter().flat_map(|engine| {
            let held = |used: &&plan::PortUse| !ports::is_free(&engine.endpoint.host, used.port);
            engine.ports.iter().filter(held).map(|used| Leftover::Port {
                engine: engine.id.clone(),
                port: used.port,
                purpose: used.purpose.clone(),
                holder: ports::holder(used.port),
            })
        });
        let left: Vec<Leftover> = still_there.chain(held).collect();
        if left.is_empty() || Instant::now() >= deadline {
            return left;
        }
        sleep(Duration::from_millis(20)).await;
    }
}
