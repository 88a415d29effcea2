//! The language of the state machine: what may happen to a fleet, and what may have to be done about it.

use super::super::shim::protocol::LeftoverProcess;
use super::super::{Cause, Leftover, Outcome, Trial};
use crate::fleet::{Endpoint, EngineId, Exit, Incarnation};
use crate::plan::EngineSpec;

/// What happened.
#[derive(Debug, Clone)]
pub(in crate::supervisor) enum Event {
    /// The run begins.
    Begin,
    /// What the engine's GPUs had to give back is back, or who holds it.
    Prepared(EngineId, Incarnation, Result<(), String>),
    /// The leader runs.
    Spawned(EngineId, Incarnation, u32),
    /// The program could not be started.
    SpawnFailed(EngineId, Incarnation, String),
    /// This start of the engine receives KV elsewhere than the one before.
    Moved(EngineId, Incarnation, Endpoint),
    /// The leader ended.
    Exited {
        engine: EngineId,
        incarnation: Incarnation,
        exit: Exit,
    },
    /// No process of the engine is left.
    TreeEmpty(EngineId, Incarnation),
    /// What the log of an engine that failed says.
    Explained(EngineId, Incarnation, Cause),
    /// Processes outlived SIGKILL; without an engine, strays.
    Leftover(Option<EngineId>, Vec<LeftoverProcess>),
    /// `/health` answered 200.
    Probed(EngineId, Incarnation),
    /// Somebody else listens on a port of the engine. Holds who and where.
    Usurped(EngineId, Incarnation, String),
    /// The canary through this prefill and this decode engine worked; the round (first) goes on.
    Worked(u64, EngineId, EngineId),
    /// What came of the canaries of this round, in the order of its pairs.
    Verified(u64, Vec<Trial>),
    /// Clients' hand-offs from this prefill to this decode engine fail or crawl.
    Suspected(EngineId, EngineId),
    /// The engine does nothing, though it has something to do. Holds why that is known.
    Hung(EngineId, Incarnation, String),
    /// The start does nothing any more. Holds where it stands still, and for how long.
    StoodStill(EngineId, Incarnation, String),
    /// An engine more, whose ports are reserved, joins a fleet that `Fleet::may_grow`.
    Join(Box<EngineSpec>),
    /// A restart of this engine was asked for, and `Fleet::may_leave`.
    Restart(EngineId),
    /// An end of this engine was asked for, and `Fleet::may_leave`.
    TakeOut(EngineId),
    /// A stop was asked for, by a signal or over the control socket. Asking again changes nothing.
    Stop,
    /// Ctrl+C: a stop, and the next one forces it.
    Interrupt,
    /// A stop without any grace.
    Force,
    /// An end of xpyd was asked for that leaves the engines to the next one.
    Leave,
    /// Nothing is in flight any more: on this engine, or at all.
    Drained(Option<(EngineId, Incarnation)>),
    /// `Fleet::next_deadline` has come.
    Tick,
    /// The connection to the shim is closed, asked for or not.
    ShimGone(String),
    /// The sweep after a lost shim is over; these processes are left.
    Swept(Vec<LeftoverProcess>),
    /// The last look is over; these are left.
    Checked(Vec<Leftover>),
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::supervisor) enum Action {
    /// Wait until the memory of the engine's GPUs is free for it.
    Prepare(EngineId, Incarnation),
    /// Start the engine's process.
    Spawn(EngineId, Incarnation),
    /// Write down how the engine was started, with its process id.
    Record(EngineId, Incarnation, u32),
    /// Ask `/health` until it answers 200.
    Probe(EngineId, Incarnation),
    /// Look for the cause of its failure in its log; holds how its leader ended.
    Explain(EngineId, Incarnation, Option<Exit>),
    /// Tell the shim that the engine's start is over.
    Settled(EngineId),
    /// See that the engine makes progress, until it is asked to stop or killed.
    Watch(EngineId, Incarnation),
    /// Send canaries through these pairs of prefill and decode engine, as this round.
    Verify {
        round: u64,
        pairs: Vec<(EngineId, EngineId)>,
        /// Whether all at the same time.
        at_once: bool,
    },
    /// Wait until nothing is in flight: on this engine, or at all.
    AwaitIdle(Option<(EngineId, Incarnation)>),
    /// Stop accepting clients, who then wait for the next xpyd, and serve those that were accepted.
    HandOver,
    /// SIGTERM to the leader.
    Terminate(EngineId),
    /// SIGKILL to the tree.
    Kill(EngineId),
    /// Let the shim end.
    Shutdown,
    /// Kill what the lost shim had started.
    Sweep,
    /// See which processes and ports are still there.
    Check,
    /// Tell the shim to keep the engines for the next xpyd.
    Leave,
    /// The run is over.
    Finish(Outcome),
}
