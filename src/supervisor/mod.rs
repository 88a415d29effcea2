//! The supervisor: brings a planned fleet up, keeps watch over it, and takes it down so that nothing is left.
//!
//! [`run`] is the whole of it. `state` decides (pure), `driver` carries out, the [`shim`] owns the processes. It is
//! the only writer of the fleet's view, and knows no route of the proxy and no flag of an engine.

mod cause;
mod driver;
mod gpus;
mod hang;
mod leftovers;
mod liveness;
pub mod ports;
mod probe;
mod restart;
mod run_folder;
mod scaled;
pub mod shim;
pub mod sidecar;
mod spawn_record;
mod standstill;
mod state;

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

pub use self::cause::{Cause, Explain, ExplainIncarnation};
pub use self::driver::run;
pub use self::gpus::{Answer, BeforeStart, GpuChecks, Placed, Released};
pub use self::ports::{PortConflict, Reservations, reserve, reserve_running};
pub use self::scaled::Scaled;
pub use self::shim::attach::KeptRun;
pub use self::shim::protocol::{Keep, KeptState};
use crate::fleet::{EngineId, EngineState, Exit, FleetStage, FleetView, Incarnation, Role};
use crate::plan::{EngineSpec, RestartPolicy, RestartWhen};
use crate::report::ExitStatus;
use crate::signals::StopSignal;

/// What to run.
#[derive(Debug)]
pub struct Settings {
    /// The engines, prefill first.
    pub engines: Vec<EngineSpec>,
    /// Their ports, held until none of their processes is left.
    pub reservations: Reservations,
    /// The run's folder, which exists: logs and `<id>.spawn.json` are written into it.
    pub run_dir: PathBuf,
    /// How long requests in flight may go on after a stop was asked for.
    pub drain_deadline: Duration,
    /// How long the canaries may take altogether.
    pub verify_deadline: Duration,
    /// Which engines that ended are started again.
    pub restart: RestartPolicy,
    /// What becomes of the engines should this process disappear.
    pub keep: Keep,
    /// The run to attach to, instead of starting a shim and engines.
    pub attach: Option<KeptRun>,
    /// The socket on which clients connect, for the shim to hold while there is no xpyd; `None` if there is none.
    pub listener: Option<OwnedFd>,
    /// The run's name, for people.
    pub run_name: String,
    /// The `xpyd` program, which is run again as the shim: `std::env::current_exe()`.
    pub program: PathBuf,
}

/// How the supervisor is connected to the rest of xpyd.
pub struct Wiring {
    /// Signals that ask for a stop.
    pub signals: mpsc::Receiver<StopSignal>,
    /// Requests from the control socket.
    pub requests: mpsc::Receiver<Request>,
    /// Where the fleet's view goes; made with [`initial_view`].
    pub view: watch::Sender<Arc<FleetView>>,
    /// Proves that a hand-off works between the engines of every pair (prefill, decode).
    pub verify: Verify,
    /// Ends the service of clients where the next xpyd continues it.
    pub hand_over: HandOver,
    /// Tells from an engine's log why it failed.
    pub explain: Explain,
    /// Asks the driver of the engines' GPUs.
    pub gpus: GpuChecks,
}

impl fmt::Debug for Wiring {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Wiring").finish_non_exhaustive()
    }
}

/// Sends the canaries of a round, and returns what came of each pair, in the order of its pairs.
pub type Verify = Box<dyn Fn(CanaryRound) -> Pin<Box<dyn Future<Output = Vec<Trial>> + Send>> + Send>;

/// Canaries that are sent together.
#[derive(Debug)]
pub struct CanaryRound {
    /// The pairs of prefill and decode engine that each get one.
    pub pairs: Vec<(EngineId, EngineId)>,
    /// Whether all pairs are tried at the same time, so that an engine that does not answer delays no other one.
    pub at_once: bool,
    /// Gets each pair that worked as soon as it did. It has room for all of them.
    pub worked: mpsc::Sender<(EngineId, EngineId)>,
}

/// What came of the canary through one pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trial {
    /// The hand-off works.
    Worked,
    /// It does not. Holds a sentence that names the pair.
    Failed(String),
    /// There was no time left for it.
    Untried,
}

/// Stops accepting clients' connections, and returns once every request on those that were accepted has its answer.
pub type HandOver = Box<dyn Fn() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// What others may ask of a running fleet.
#[derive(Debug)]
pub enum Request {
    /// Stop the run.
    Stop {
        /// Kill at once instead of draining.
        force: bool,
        /// Gets the outcome once the run is over.
        reply: oneshot::Sender<Outcome>,
    },
    /// Drain, and end xpyd without its engines: they wait for the next one.
    Leave {
        /// Gets for how long they will, or why they cannot; at once, the rest is seen in the view.
        reply: oneshot::Sender<Result<Duration, String>>,
    },
    /// Let an engine more join while the others serve.
    Join {
        /// The engine, with a name, ports and GPUs of its own.
        spec: Box<EngineSpec>,
        /// Gets why it cannot be; at once, the rest is seen in the view.
        reply: oneshot::Sender<Result<(), String>>,
    },
    /// Check a pair, because clients' hand-offs between its engines fail or crawl.
    Check {
        /// The prefill engine.
        prefill: EngineId,
        /// The decode engine.
        decode: EngineId,
    },
    /// Drain and stop one engine while the others serve.
    Engine {
        /// Which.
        engine: EngineId,
        /// What then.
        then: Then,
        /// Even if its role then has no engine that serves.
        force: bool,
        /// Gets the incarnation that will follow, or why there will be none; at once, the rest is seen in the view.
        reply: oneshot::Sender<Result<Incarnation, Refusal>>,
    },
}

/// What happens to an engine that was taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// It starts again, and serves once canaries have gone through it.
    Restart,
    /// It stays stopped.
    Stay,
}

impl fmt::Display for Then {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Restart => "restart",
            Self::Stay => "stop",
        })
    }
}

/// Why an engine is not taken out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The run has no engine of this name.
    #[error("no such engine in this run")]
    UnknownEngine,
    /// Single engines are taken out of fleets that serve.
    #[error("the fleet is {0}, not ready")]
    FleetNotReady(FleetStage),
    /// There is nothing to take out, or it leaves already.
    #[error("it is {0}")]
    State(EngineState),
    /// Clients would not be served.
    #[error("no other {0} engine serves, so clients would be refused meanwhile")]
    LastOfRole(Role),
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Why it ended.
    pub ending: Ending,
    /// What is still there; empty after a complete teardown.
    pub left: Vec<Leftover>,
    /// From the first reason to end until the last look.
    pub teardown: Duration,
}

impl Outcome {
    /// The exit code for it: whatever the reason, something that was left behind is the most important news.
    pub fn exit_status(&self) -> ExitStatus {
        if !self.left.is_empty() {
            return ExitStatus::TeardownIncomplete;
        }
        match &self.ending {
            Ending::Stopped | Ending::Kept => ExitStatus::Success,
            Ending::EngineFailed { .. } => ExitStatus::EngineFailed,
            Ending::NotReady { .. } => ExitStatus::NotReady,
            Ending::CrashLoop { .. } => ExitStatus::CrashLoop,
            Ending::LostRole { .. } | Ending::SupervisionLost { .. } => ExitStatus::Failure,
            Ending::Forced => ExitStatus::Forced,
        }
    }
}

/// Why a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// Somebody asked for it.
    Stopped,
    /// Somebody asked for it, and the engines wait for the next xpyd.
    Kept,
    /// An engine ended before the fleet was ready.
    EngineFailed {
        /// Which.
        engine: EngineId,
        /// Why, in one line that names its log.
        reason: String,
        /// How its leader ended; `None` if its program never ran.
        exit: Option<Exit>,
    },
    /// An engine, or a hand-off, was not ready in time.
    NotReady {
        /// Which engine; `None` if it was a hand-off.
        engine: Option<EngineId>,
        /// Why, in one line.
        reason: String,
        /// The time it had.
        after: Duration,
    },
    /// The last engine of a role failed while clients were served.
    LostRole {
        /// The role.
        role: Role,
        /// Its last engine.
        engine: EngineId,
        /// Why that one failed, in one line.
        reason: String,
    },
    /// The last engine of a role kept failing.
    CrashLoop {
        /// The role.
        role: Role,
        /// Its last engine.
        engine: EngineId,
        /// Why that one failed the last time, in one line.
        reason: String,
    },
    /// The shim could not be started, was killed, or does not answer.
    SupervisionLost {
        /// What happened, in one line.
        reason: String,
    },
    /// Somebody asked for an end without grace.
    Forced,
}

impl fmt::Display for Ending {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => formatter.write_str("stopped"),
            Self::Kept => formatter.write_str("left its engines to the next xpyd"),
            Self::EngineFailed { engine, reason, .. } => write!(formatter, "{engine} {reason}"),
            Self::NotReady {
                engine: Some(engine),
                reason,
                ..
            } => write!(formatter, "{engine} {reason}"),
            Self::NotReady {
                engine: None, reason, ..
            } => formatter.write_str(reason),
            Self::LostRole { role, engine, reason } | Self::CrashLoop { role, engine, reason } => {
                write!(formatter, "no {role} engine is left: {engine} {reason}")
            }
            Self::SupervisionLost { reason } => write!(formatter, "supervision was lost: {reason}"),
            Self::Forced => formatter.write_str("stopped by force"),
        }
    }
}

/// Something of a run that is still there after its teardown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leftover {
    /// A process that SIGKILL did not end.
    Process {
        /// Whose, if known.
        engine: Option<EngineId>,
        /// Process id.
        pid: u32,
        /// Name, 15 characters at most.
        name: String,
        /// State letter of `/proc/PID/stat`; `D` is waiting in the kernel.
        state: char,
    },
    /// A port of the plan that somebody listens on.
    Port {
        /// Whose it was.
        engine: EngineId,
        /// The port.
        port: u16,
        /// What it was for.
        purpose: String,
        /// Who listens, if it can be seen.
        holder: Option<ports::Holder>,
    },
    /// Memory of a GPU that was not given back.
    GpuMemory {
        /// The GPU's number in the plan.
        gpu: u32,
        /// More in use than before the run, in bytes.
        bytes: u64,
        /// Who has it, as far as the driver tells.
        by: Vec<String>,
    },
}

impl fmt::Display for Leftover {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process {
                engine,
                pid,
                name,
                state,
            } => {
                write!(formatter, "process {pid} (`{name}`, state {state})")?;
                engine
                    .as_ref()
                    .map_or(Ok(()), |engine| write!(formatter, " of {engine}"))
            }
            Self::Port {
                engine,
                port,
                purpose,
                holder,
            } => {
                write!(formatter, "port {port} ({purpose} of {engine})")?;
                holder
                    .as_ref()
                    .map_or(Ok(()), |holder| write!(formatter, ", held by {holder}"))
            }
            Self::GpuMemory { gpu, bytes, by } => {
                write!(formatter, "{} MiB of GPU {gpu}", bytes >> 20)?;
                if by.is_empty() {
                    formatter.write_str(", held by nobody that the driver lists")
                } else {
                    write!(formatter, ", held by {}", by.join(", "))
                }
            }
        }
    }
}

/// The view before anything has happened, for making the `watch` channel.
pub fn initial_view(engines: &[EngineSpec]) -> FleetView {
    let never = RestartPolicy {
        policy: RestartWhen::Never,
        max_restarts: 0,
        backoff: Duration::ZERO,
        max_backoff: Duration::ZERO,
        stable_after: Duration::ZERO,
    };
    let limits = state::Limits {
        drain: Duration::ZERO,
        verify: Duration::ZERO,
        restart: never,
    };
    state::Fleet::new(engines, limits, None).view(0)
}
