//! Requests that other parts of xpyd send to the supervisor of a running fleet.

use std::time::Duration;

use tokio::sync::oneshot;

use super::Outcome;
use crate::fleet::{EngineId, EngineState, EngineVerb, FleetStage, Incarnation, Role};
use crate::plan::EngineSpec;

/// A request to the supervisor. Each reply but that to a stop comes at once; what follows is seen in the view.
#[derive(Debug)]
pub enum Request {
    /// Stop the run.
    Stop {
        /// Kill at once instead of draining.
        force: bool,
        /// Gets the outcome once the run is over.
        reply: oneshot::Sender<Outcome>,
    },
    /// Drain, and end xpyd without its engines, which wait for the next xpyd.
    Leave {
        /// Gets how long they will wait, or why they cannot.
        reply: oneshot::Sender<Result<Duration, String>>,
    },
    /// Add an engine while the others serve.
    Add {
        /// The engine, with a name, ports and GPUs of its own.
        spec: Box<EngineSpec>,
        /// Gets the reason if the engine is refused.
        reply: oneshot::Sender<Result<(), String>>,
    },
    /// Check a pair, because clients' hand-offs between its engines fail or are slow.
    Check {
        /// The prefill engine.
        prefill: EngineId,
        /// The decode engine.
        decode: EngineId,
    },
    /// Restart or drain one engine while the others serve.
    Engine {
        /// The engine.
        engine: EngineId,
        /// What is requested.
        verb: EngineVerb,
        /// Also if no other engine of its role serves.
        force: bool,
        /// Gets the incarnation that follows a restart, or why the request is refused.
        reply: oneshot::Sender<Result<Incarnation, Refusal>>,
    },
}

/// Why a request for one engine is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The run has no engine of this name.
    #[error("no such engine in this run")]
    UnknownEngine,
    /// Only a fleet that serves can restart, drain or add single engines.
    #[error("the fleet is {0}, not ready")]
    FleetNotReady(FleetStage),
    /// In this state the request makes no sense.
    #[error("it is {0}")]
    State(EngineState),
    /// No other engine of its role serves.
    #[error("no other {0} engine serves, so clients would be refused meanwhile")]
    LastOfRole(Role),
}
