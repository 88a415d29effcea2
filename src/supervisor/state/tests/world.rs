//! A fleet, a clock, and a model of its processes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::fleet::{Endpoint, EngineId, EngineState, FleetStage, Incarnation, Load, LogLimits, Role};
use crate::plan::{EngineSpec, PortUse};
use crate::supervisor::Outcome;
use crate::supervisor::guardian::protocol::Exit;
use crate::supervisor::state::{Action, Event, Fleet};

pub(super) const DRAIN: Duration = Duration::from_secs(20);
pub(super) const VERIFY: Duration = Duration::from_secs(40);
pub(super) const FIRST: Incarnation = Incarnation::FIRST;

/// An engine to be: its role follows from its name.
pub(in crate::supervisor) fn engine(name: &str, gpus: &[u32]) -> EngineSpec {
    EngineSpec {
        id: EngineId::named(name),
        role: if name.starts_with("prefiller") {
            Role::Prefill
        } else {
            Role::Decode
        },
        argv: vec!["true".to_owned()],
        env: BTreeMap::new(),
        gpus: gpus.to_vec(),
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
        stop_grace: Duration::from_secs(30),
        log_file: format!("{name}.log").into(),
        log_limits: LogLimits::default(),
    }
}

/// What the guardian and the machine would do: which engines have a leader, which have any process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Processes {
    pub(super) leader: bool,
    pub(super) tree: bool,
    pub(super) announced: bool,
    pub(super) terminated: bool,
    pub(super) killed: bool,
}

/// A fleet, a clock, and a model of its processes that checks every action against the rules that always hold.
pub(super) struct World {
    pub(super) fleet: Fleet,
    pub(super) now: Instant,
    pub(super) processes: BTreeMap<EngineId, Processes>,
    pub(super) verifying: bool,
    pub(super) awaiting_idle: bool,
    pub(super) shutdown: bool,
    pub(super) sweeping: bool,
    pub(super) checking: bool,
    pub(super) ending: bool,
    pub(super) unasked_exits: usize,
    pub(super) outcome: Option<Outcome>,
    pub(super) log: Vec<Action>,
}

impl World {
    pub(super) fn new(engines: &[EngineSpec]) -> Self {
        let mut world = Self {
            fleet: Fleet::new(engines, DRAIN, VERIFY),
            now: Instant::now(),
            processes: engines
                .iter()
                .map(|engine| (engine.id.clone(), Processes::default()))
                .collect(),
            verifying: false,
            awaiting_idle: false,
            shutdown: false,
            sweeping: false,
            checking: false,
            ending: false,
            unasked_exits: 0,
            outcome: None,
            log: Vec::new(),
        };
        world.tell(Event::Begin);
        world
    }

    pub(super) fn two_by_two() -> Self {
        let gpu_each = [("prefiller1", 0), ("prefiller2", 1), ("decoder1", 2), ("decoder2", 3)];
        Self::new(&gpu_each.map(|(name, gpu)| engine(name, &[gpu])))
    }

    pub(super) fn ready() -> Self {
        let mut world = Self::two_by_two();
        world.all_healthy();
        world.tell(Event::Verified(Ok(())));
        assert_eq!(world.stage(), FleetStage::Ready);
        world
    }

    pub(super) fn all_healthy(&mut self) {
        let ids: Vec<EngineId> = self.processes.keys().cloned().collect();
        for id in ids {
            self.announce(&id);
            self.tell(Event::Probed(id, FIRST));
        }
    }

    pub(super) fn announce(&mut self, id: &EngineId) {
        self.processes.get_mut(id).unwrap().announced = true;
        self.tell(Event::Spawned(id.clone(), FIRST, 1));
    }

    pub(super) fn exit(&mut self, name: &str) {
        let id = EngineId::named(name);
        self.processes.get_mut(&id).unwrap().leader = false;
        self.tell(Event::Exited(id, FIRST, Exit::Code(0)));
    }

    pub(super) fn empty(&mut self, name: &str) {
        let id = EngineId::named(name);
        *self.processes.get_mut(&id).unwrap() = Processes {
            announced: true,
            ..Processes::default()
        };
        self.tell(Event::TreeEmpty(id, FIRST));
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
            Action::Spawn(id, _) => {
                assert!(!self.ending, "spawned {id} after a stop began");
                let processes = self.processes.get_mut(id).unwrap();
                assert!(!processes.tree, "two incarnations of {id} at once");
                (processes.leader, processes.tree) = (true, true);
            }
            Action::Terminate(id) => {
                let processes = self.processes.get_mut(id).unwrap();
                assert!(!processes.terminated, "a second SIGTERM to {id}");
                processes.terminated = true;
            }
            Action::Kill(id) => self.processes.get_mut(id).unwrap().killed = true,
            Action::Verify(_) => self.verifying = true,
            Action::AwaitIdle => self.awaiting_idle = true,
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
                    *processes = Processes::default();
                }
                self.sweeping = true;
            }
            Action::Finish(outcome) => self.outcome = Some(outcome.clone()),
            Action::Record(..) | Action::Probe(..) | Action::Settled(_) => {}
        }
    }

    /// Lets time pass until the next deadline.
    pub(super) fn wait(&mut self) {
        if let Some(deadline) = self.fleet.next_deadline() {
            self.now = self.now.max(deadline);
            self.tell(Event::Tick);
        }
    }

    /// Lets every process that was asked to go do so, and everything that was asked for happen.
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
                self.tell(Event::GuardianGone("guardian is gone".to_owned()));
            } else if std::mem::take(&mut self.sweeping) {
                self.tell(Event::Swept(Vec::new()));
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
