//! Engines on other nodes of a Slurm allocation.
//!
//! ```text
//! this node                                             node n2
//! xpyd ── shim ── relay ── srun ═══ slurmd ═══ agent ── shim monitor ── shim ── decoder2
//!                   └── commands ──>                └── events, heartbeats; its output on stderr
//! ```
//!
//! For the shim of this node, the relay is the engine: it ends as the engine ends, passes SIGTERM on, and has the engine's
//! output. So supervision, logs, restarts and attaching are those of a local engine. On the other node, the agent gives the
//! engine a shim of its own, which ends it as it ends local ones.
//!
//! Slurm authenticates, starts and isolates: relay and agent talk through the standard input and output of `srun`, so there is
//! no port, no token and no daemon. The end of a pipe is known at once. A node that vanishes without closing anything is
//! noticed by missing heartbeats, on both sides: then the relay ends as a failed engine, and the agent ends the engine.

mod agent;
mod message;
mod relay;

use std::time::Duration;

pub use self::agent::{AgentError, run as run_agent};
pub use self::message::RemoteEngine;
pub use self::relay::{RelayError, command, run as run_relay};

/// Interval of heartbeats, in both directions.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// How long the other side can be silent before it counts as lost. A loaded node can stop a process for seconds, and a lost
/// engine has to load its model again.
const SILENCE: Duration = Duration::from_secs(10);

/// The variable in which the relay gets its [`RemoteEngine`], as JSON: it contains keys, which a command line would show.
pub const ENGINE_VARIABLE: &str = "XPYD_REMOTE_ENGINE";
