//! The test harness: a fleet, a clock, and a model of its processes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::fleet::Exit;
use crate::fleet::{Endpoint, EngineId, EngineState, FleetStage, Incarnation, Load, LogLimits, Role};
use crate::plan::{EngineSpec, Liveness, PortUse, RestartPolicy, RestartWhen};
use crate::supervisor::shim::protocol::KeptState;
use crate::supervisor::state::{Action, Event, FleetMachine, Limits};
use crate::supervisor::{CanaryResult, FailureCause, Outcome};

pub(super) const DRAIN: Duration = Duration::from_secs(20);
pub(super) const VERIFY: Duration = Duration::from_secs(40);
pub(super) const FIRST: Incarnation = Incarnation::FIRST;

/// Restarts in a row that the policy allows.
pub(super) const MAX_RESTARTS: u32 = 3;

/// The wait before the first restart.
pub(super) const BACKOFF: Duration = Duration::from_secs(1);

pub(super) fn policy(policy: RestartWhen) -> RestartPolicy {
    RestartPolicy {
        policy,
        max_restarts: MAX_RESTARTS,
        backoff: BACKOFF,
        max_backoff: Duration::from_mins(1),
        // Longer than any history.
        stable_after: Duration::from_hours(10_000),
    }
}

/// The spec of an engine; its role follows from its name.
pub(in crate::supervisor) fn engine(name: &str, gpus: &[u32]) -> EngineSpec {
    EngineSpec {
        node: None,
        id: EngineId::named(name),
        role: if name.starts_with("prefiller") {
            Role::Prefill
        } else {
            Role::Decode
        },
        argv: vec!["true".to_owned()],
        env: BTreeMap::new(),
        gpus: gpus.to_vec(),
        gpu_uuids: Vec::new(),
        endpoint: Endpoint {
            host: "127.0.0.1".to_owned(),
            port: 0,
            tensor_parallel: 1,
            receiver: None,
        },
        ports: vec![PortUse {
            port: 0,
            purpose: "http".to_owned(),
        }],
        ready_path: "/health".to_owned(),
        ready_deadline: Duration::from_mins(10),
        start_stall: Duration::from_mins(5),
        stop_grace: Duration::from_secs(30),
        log_file: format!("{name}.log").into(),
        liveness: Liveness {
            path: "/metrics".to_owned(),
            running: "running".to_owned(),
            counters: vec!["done".to_owned()],
            stall: Duration::from_mins(2),
            expired_leases: String::new(),
            late_reads: String::new(),
        },
        file: None,
        log_limits: LogLimits::default(),
    }
}

/// The model of one engine's processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Processes {
    pub(super) leader: bool,
    pub(super) tree: bool,
    pub(super) announced: bool,
    pub(super) terminated: bool,
    pub(super) killed: bool,
    /// Starts so far.
    pub(super) spawns: u32,
}

pub(super) fn exited(engine: EngineId, incarnation: Incarnation) -> Event {
    Event::Exited {
        engine,
        incarnation,
        exit: Exit::Code(0),
    }
}

/// A fleet, a clock, and a model of its processes that checks the invariants on every action.
pub(super) struct World {
    pub(super) fleet: FleetMachine,
    pub(super) now: Instant,
    pub(super) processes: BTreeMap<EngineId, Processes>,
    /// The running round of canaries.
    pub(super) verifying: Option<(u64, Vec<(EngineId, EngineId)>)>,
    /// Pending waits for idle engines.
    pub(super) awaiting_idle: Vec<Option<(EngineId, Incarnation)>>,
    /// Incarnations whose diagnosis runs.
    pub(super) unexplained: BTreeSet<(EngineId, Incarnation)>,
    pub(super) shutdown: bool,
    pub(super) sweeping: bool,
    pub(super) checking: bool,
    pub(super) ending: bool,
    pub(super) unasked_exits: usize,
    /// Restarts and drains that were requested and allowed.
    pub(super) requests: BTreeMap<EngineId, u32>,
    pub(super) outcome: Option<Outcome>,
    pub(super) log: Vec<Action>,
}

impl World {
    pub(super) fn new(engines: &[EngineSpec]) -> Self {
        Self::with_policy(engines, RestartWhen::OnFailure)
    }

    /// An attached fleet, whose engines are in their third incarnation.
    pub(super) fn attached(kept: &[(&str, KeptState)]) -> Self {
        Self::attached_with(RestartWhen::OnFailure, kept)
    }

    pub(super) fn attached_with(when: RestartWhen, kept: &[(&str, KeptState)]) -> Self {
        Self::attached_after(when, kept, &[])
    }

    /// As [`World::attached_with`], with engines that were drained on request.
    pub(super) fn attached_after(when: RestartWhen, kept: &[(&str, KeptState)], stopped: &[&str]) -> Self {
        let stopped = stopped.iter().map(|name| EngineId::named(name)).collect();
        let engines: Vec<EngineSpec> = kept.iter().map(|(name, _)| engine(name, &[])).collect();
        let mut world = Self::before_begin(&engines, when);
        let mut states = Vec::new();
        for (name, state) in kept {
            let id = EngineId::named(name);
            let runs = matches!(state, KeptState::Running { .. });
            let processes = Processes {
                leader: runs,
                tree: !matches!(state, KeptState::Gone { .. }),
                announced: true,
                spawns: 3,
                ..Processes::default()
            };
            world.processes.insert(id.clone(), processes);
            states.push((id, Incarnation(3), *state));
        }
        world.fleet.attach(&states, &stopped, world.now);
        world.tell(Event::Begin);
        world
    }

    pub(super) fn with_policy(engines: &[EngineSpec], when: RestartWhen) -> Self {
        let mut world = Self::before_begin(engines, when);
        world.tell(Event::Begin);
        world
    }

    fn before_begin(engines: &[EngineSpec], when: RestartWhen) -> Self {
        let limits = Limits {
            drain: DRAIN,
            verify: VERIFY,
            restart: policy(when),
        };
        Self {
            fleet: FleetMachine::new(engines, limits, None),
            now: Instant::now(),
            processes: engines
                .iter()
                .map(|engine| (engine.id.clone(), Processes::default()))
                .collect(),
            verifying: None,
            awaiting_idle: Vec::new(),
            unexplained: BTreeSet::new(),
            shutdown: false,
            sweeping: false,
            checking: false,
            ending: false,
            unasked_exits: 0,
            requests: BTreeMap::new(),
            outcome: None,
            log: Vec::new(),
        }
    }

    pub(super) fn two_by_two() -> Self {
        Self::new(&Self::four())
    }

    fn four() -> [EngineSpec; 4] {
        let gpu_each = [("prefiller1", 0), ("prefiller2", 1), ("decoder1", 2), ("decoder2", 3)];
        gpu_each.map(|(name, gpu)| engine(name, &[gpu]))
    }

    pub(super) fn ready() -> Self {
        Self::ready_with_policy(RestartWhen::OnFailure)
    }

    pub(super) fn ready_with_policy(when: RestartWhen) -> Self {
        let mut world = Self::with_policy(&Self::four(), when);
        world.all_healthy();
        world.verified(&Ok(()));
        assert_eq!(world.stage(), FleetStage::Ready);
        world
    }

    pub(super) fn all_healthy(&mut self) {
        let ids: Vec<EngineId> = self.processes.keys().cloned().collect();
        for id in ids {
            self.healthy(id.as_str());
        }
    }

    pub(super) fn healthy(&mut self, name: &str) {
        let id = EngineId::named(name);
        self.announce(&id);
        let incarnation = self.incarnation(&id);
        self.tell(Event::Probed(id, incarnation));
    }

    /// Ends the running round of canaries with the same result for every pair.
    pub(super) fn verified(&mut self, result: &Result<(), String>) {
        self.verified_each(|_, _| result.clone());
    }

    /// Ends the running round of canaries with `result` for each pair (prefill, decode).
    pub(super) fn verified_each(&mut self, result: impl Fn(&str, &str) -> Result<(), String>) {
        let (round, pairs) = self.verifying.take().expect("a round is under way");
        let trials = pairs
            .iter()
            .map(|(prefill, decode)| match result(prefill.as_str(), decode.as_str()) {
                Ok(()) => CanaryResult::Worked,
                Err(reason) => CanaryResult::Failed(reason),
            });
        self.tell(Event::Verified(round, trials.collect()));
    }

    /// One pair of the running round has worked; the others are not done.
    pub(super) fn worked(&mut self, prefill: &str, decode: &str) {
        let (round, _) = self.verifying.as_ref().expect("a round is under way");
        let (round, pair) = (*round, [prefill, decode].map(EngineId::named));
        let [prefill, decode] = pair;
        self.tell(Event::PairWorked(round, prefill, decode));
    }

    /// Ends rounds of canaries until none is running. Hand-offs of `wedged` fail.
    pub(super) fn verified_with_wedged(&mut self, wedged: &str) {
        while self.verifying.is_some() {
            self.verified_each(|prefill, decode| {
                if prefill == wedged || decode == wedged {
                    Err(format!("no KV moved from {prefill} to {decode}"))
                } else {
                    Ok(())
                }
            });
        }
    }

    /// The engine becomes idle and ends as requested.
    pub(super) fn drain_and_end(&mut self, name: &str) {
        let id = EngineId::named(name);
        let of = Some((id.clone(), self.incarnation(&id)));
        self.awaiting_idle.retain(|waited| *waited != of);
        self.tell(Event::Drained(of));
        self.exit(name);
        self.empty(name);
    }

    pub(super) fn announce(&mut self, id: &EngineId) {
        self.processes.get_mut(id).unwrap().announced = true;
        self.tell(Event::Spawned(id.clone(), self.incarnation(id), 1));
    }

    pub(super) fn incarnation(&self, id: &EngineId) -> Incarnation {
        self.fleet.view(0).engine(id).unwrap().incarnation
    }

    /// The engine's leader and tree end without a request, and its log shows no cause.
    pub(super) fn crash(&mut self, name: &str) {
        self.crash_of(name, FailureCause::default());
    }

    pub(super) fn crash_of(&mut self, name: &str, cause: FailureCause) {
        self.exit(name);
        self.empty(name);
        self.explained(name, cause);
    }

    /// The diagnosis of the engine's failure ends with this cause.
    pub(super) fn explained(&mut self, name: &str, cause: FailureCause) {
        let id = EngineId::named(name);
        let incarnation = self.incarnation(&id);
        if self.unexplained.remove(&(id.clone(), incarnation)) {
            self.tell(Event::Diagnosed(id, incarnation, cause));
        }
    }

    pub(super) fn exit(&mut self, name: &str) {
        let id = EngineId::named(name);
        self.processes.get_mut(&id).unwrap().leader = false;
        let incarnation = self.incarnation(&id);
        self.tell(exited(id, incarnation));
    }

    pub(super) fn empty(&mut self, name: &str) {
        let id = EngineId::named(name);
        let processes = self.processes.get_mut(&id).unwrap();
        *processes = Processes {
            announced: true,
            spawns: processes.spawns,
            ..Processes::default()
        };
        let incarnation = self.incarnation(&id);
        self.tell(Event::TreeEmpty(id, incarnation));
    }

    pub(super) fn tell(&mut self, event: Event) -> Vec<Action> {
        let actions = self.fleet.handle(event, self.now);
        for action in &actions {
            self.carry_out(action);
        }
        self.log.extend(actions.clone());
        self.ending |= !matches!(
            self.stage(),
            FleetStage::Starting | FleetStage::Verifying | FleetStage::Ready
        );
        actions
    }

    fn carry_out(&mut self, action: &Action) {
        assert!(self.outcome.is_none(), "{action:?} after the end");
        match action {
            Action::Spawn(id, incarnation) => {
                assert!(!self.ending, "spawned {id} after a stop began");
                let processes = self.processes.get_mut(id).unwrap();
                assert!(!processes.tree, "two incarnations of {id} at once");
                assert_eq!(incarnation.0, processes.spawns + 1, "incarnations of {id} are counted");
                *processes = Processes {
                    leader: true,
                    tree: true,
                    spawns: incarnation.0,
                    ..Processes::default()
                };
            }
            Action::Terminate(id) => {
                let processes = self.processes.get_mut(id).unwrap();
                assert!(!processes.terminated, "a second SIGTERM to {id}");
                processes.terminated = true;
            }
            Action::Kill(id) => self.processes.get_mut(id).unwrap().killed = true,
            Action::Verify { round, pairs, .. } => {
                assert!(!pairs.is_empty(), "canaries through nobody");
                self.verifying = Some((*round, pairs.clone()));
            }
            Action::AwaitIdle(of) => self.awaiting_idle.push(of.clone()),
            Action::HandOver => self.awaiting_idle.push(None),
            Action::Diagnose(id, incarnation, _) => {
                assert!(!self.processes[id].tree, "{id} still writes its log");
                assert!(
                    self.unexplained.insert((id.clone(), *incarnation)),
                    "the log of {id} is asked twice"
                );
            }
            Action::Shutdown => {
                assert!(
                    self.processes.values().all(|process| !process.tree),
                    "shut down too early"
                );
                self.shutdown = true;
            }
            Action::Check => self.checking = true,
            Action::Sweep => {
                for processes in self.processes.values_mut() {
                    let spawns = processes.spawns;
                    *processes = Processes {
                        spawns,
                        ..Processes::default()
                    };
                }
                self.sweeping = true;
            }
            Action::Finish(outcome) => self.outcome = Some(outcome.clone()),
            Action::Prepare(id, incarnation) => {
                assert!(!self.processes[id].tree, "{id} {incarnation} waits for its own memory");
            }
            Action::Leave | Action::Record(..) | Action::Probe(..) | Action::Watch(..) | Action::StartupFinished(_) => {
            }
        }
    }

    /// Lets time pass until the next deadline.
    pub(super) fn wait(&mut self) {
        if let Some(deadline) = self.fleet.next_deadline() {
            self.now = self.now.max(deadline);
            self.tell(Event::Tick);
        }
    }

    /// Ends every process that got a signal, and completes every requested action.
    pub(super) fn play_out(&mut self) -> Outcome {
        for _ in 0..100 {
            if let Some(outcome) = &self.outcome {
                return outcome.clone();
            }
            let going: Vec<EngineId> = self
                .processes
                .iter()
                .filter(|(_, processes)| processes.tree && (processes.killed || processes.terminated))
                .map(|(id, _)| id.clone())
                .collect();
            for id in &going {
                if self.processes[id].leader {
                    self.exit(id.as_str());
                }
                self.empty(id.as_str());
            }
            if std::mem::take(&mut self.shutdown) {
                self.tell(Event::ShimGone("shim is gone".to_owned()));
            } else if std::mem::take(&mut self.sweeping) {
                self.tell(Event::SweepDone(Vec::new()));
            } else if std::mem::take(&mut self.checking) {
                self.tell(Event::Checked(Vec::new()));
            } else if going.is_empty() {
                self.wait();
            }
        }
        panic!("the run does not end: {:?}", self.log);
    }

    pub(super) fn stage(&self) -> FleetStage {
        self.fleet.view(0).stage
    }

    /// Why the engine failed.
    pub(super) fn reason(&self, name: &str) -> String {
        let view = self.fleet.view(0);
        view.engine(&EngineId::named(name))
            .unwrap()
            .reason
            .clone()
            .unwrap_or_default()
    }

    pub(super) fn state(&self, name: &str) -> EngineState {
        self.fleet.view(0).engine(&EngineId::named(name)).unwrap().state
    }

    pub(super) fn load(&self, name: &str) -> Arc<Load> {
        Arc::clone(&self.fleet.view(0).engine(&EngineId::named(name)).unwrap().load)
    }

    pub(super) fn did(&self, action: &Action) -> bool {
        self.log.contains(action)
    }

    pub(super) fn spawned(&self) -> Vec<&str> {
        let mut names = Vec::new();
        for action in &self.log {
            if let Action::Spawn(id, _) = action {
                names.push(id.as_str());
            }
        }
        names
    }
}
