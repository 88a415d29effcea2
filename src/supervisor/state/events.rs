//! Events that can happen to a fleet, and actions that follow from them.

use crate::fleet::{Endpoint, EngineId, EngineVerb, Exit, Incarnation};
use crate::plan::EngineSpec;
use crate::supervisor::hooks::{CanaryResult, FailureCause};
use crate::supervisor::shim::protocol::LeftoverProcess;
use crate::supervisor::{Leftover, Outcome};

/// What happened.
#[derive(Debug, Clone)]
pub(in crate::supervisor) enum Event {
    /// The run begins.
    Begin,
    /// The memory of the engine's GPUs is free, or the error names its holder.
    Prepared(EngineId, Incarnation, Result<(), String>),
    /// The leader runs, with this process id.
    Spawned(EngineId, Incarnation, u32),
    /// The program could not be started, for this reason.
    SpawnFailed(EngineId, Incarnation, String),
    /// This start of the engine receives KV at another address than the one before.
    EndpointChanged(EngineId, Incarnation, Endpoint),
    /// The leader ended.
    Exited {
        engine: EngineId,
        incarnation: Incarnation,
        exit: Exit,
    },
    /// No process of the engine is left.
    TreeEmpty(EngineId, Incarnation),
    /// The log of a failed engine was searched for the cause.
    Diagnosed(EngineId, Incarnation, FailureCause),
    /// Processes outlived SIGKILL; without an engine, unowned ones.
    Leftover(Option<EngineId>, Vec<LeftoverProcess>),
    /// `/health` answered 200.
    Probed(EngineId, Incarnation),
    /// Another process listens on a port of the engine, or the engine runs on other GPUs than planned. Holds the reason.
    PortTaken(EngineId, Incarnation, String),
    /// The canary from this prefill to this decode engine worked; the round (first field) continues.
    PairWorked(u64, EngineId, EngineId),
    /// The results of the canaries of this round, in the order of its pairs.
    Verified(u64, Vec<CanaryResult>),
    /// Clients' hand-offs from this prefill to this decode engine fail or are slow.
    Suspected(EngineId, EngineId),
    /// The engine has work and makes no progress. Holds the evidence.
    Hung(EngineId, Incarnation, String),
    /// The start makes no progress any more. Holds the phase and the time.
    StartupStalled(EngineId, Incarnation, String),
    /// An engine whose ports are reserved is added; `FleetMachine::check_add` allows it.
    Add(Box<EngineSpec>),
    /// A restart or drain of this engine was requested; `FleetMachine::check_request` allows it.
    Requested(EngineId, EngineVerb),
    /// A stop was requested, by a signal or over the control socket. A second one changes nothing.
    Stop,
    /// Ctrl+C: a stop; the next one forces it.
    Interrupt,
    /// A stop without grace.
    Force,
    /// An end of xpyd that leaves the engines to the next one.
    Leave,
    /// No request is in flight: on this engine, or on any.
    Drained(Option<(EngineId, Incarnation)>),
    /// `FleetMachine::next_deadline` has come.
    Tick,
    /// The connection to the shim is closed, whether requested or not.
    ShimGone(String),
    /// The sweep after a lost shim is over; these processes are left.
    SweepDone(Vec<LeftoverProcess>),
    /// The last check is over; these are left.
    Checked(Vec<Leftover>),
}

/// What the driver has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::supervisor) enum Action {
    /// Wait until the memory of the engine's GPUs is free.
    Prepare(EngineId, Incarnation),
    /// Start the engine's process.
    Spawn(EngineId, Incarnation),
    /// Write the spawn record, with the leader's process id.
    Record(EngineId, Incarnation, u32),
    /// Poll `/health` until it answers 200.
    Probe(EngineId, Incarnation),
    /// Search the engine's log for the cause of its failure; holds how its leader ended.
    Diagnose(EngineId, Incarnation, Option<Exit>),
    /// Report to the shim that the engine's start is over.
    StartupFinished(EngineId),
    /// Check that the engine makes progress, until it is asked to stop or killed.
    Watch(EngineId, Incarnation),
    /// Send canaries through these pairs of prefill and decode engine, as this round.
    Verify {
        round: u64,
        pairs: Vec<(EngineId, EngineId)>,
        /// Whether all at the same time.
        at_once: bool,
    },
    /// Wait until no request is in flight: on this engine, or on any.
    AwaitIdle(Option<(EngineId, Incarnation)>),
    /// Stop accepting clients, which then wait for the next xpyd, and serve those that were accepted.
    HandOver,
    /// SIGTERM to the leader.
    Terminate(EngineId),
    /// SIGKILL to the tree.
    Kill(EngineId),
    /// Let the shim end.
    Shutdown,
    /// Kill what a lost shim had started.
    Sweep,
    /// Find processes, ports and GPU memory that are still in use.
    Check,
    /// Let the shim keep the engines for the next xpyd.
    Leave,
    /// The run is over.
    Finish(Outcome),
}

/// What the machines have to report from one event: the actions in their order, and whether readers see a new view.
#[derive(Debug, Default)]
pub(super) struct Output {
    actions: Vec<Action>,
    is_view_changed: bool,
}

impl Output {
    /// Of a new fleet, which no reader has seen.
    pub(super) fn with_first_view() -> Self {
        Self {
            actions: Vec::new(),
            is_view_changed: true,
        }
    }

    pub(super) fn push(&mut self, action: Action) {
        self.actions.push(action);
    }

    pub(super) fn view_changed(&mut self) {
        self.is_view_changed = true;
    }

    pub(super) fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// Whether the view changed since the last call.
    pub(super) fn take_view_changed(&mut self) -> bool {
        std::mem::take(&mut self.is_view_changed)
    }
}
