//! How a run ended, why, and what is left of it.

use std::fmt;
use std::time::Duration;

use super::ports;
use crate::fleet::{EngineId, Exit, Role};
use crate::report::ExitStatus;

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Why the run ended.
    pub reason: EndReason,
    /// What still exists; empty after a complete teardown.
    pub left: Vec<Leftover>,
    /// Time from the first reason to end until the last check.
    pub teardown: Duration,
}

impl Outcome {
    /// The exit code. Leftovers take precedence over every reason.
    pub fn exit_status(&self) -> ExitStatus {
        if !self.left.is_empty() {
            return ExitStatus::TeardownIncomplete;
        }
        match &self.reason {
            EndReason::Stopped | EndReason::EnginesKept => ExitStatus::Success,
            EndReason::EngineFailed { .. } => ExitStatus::EngineFailed,
            EndReason::NotReady { .. } => ExitStatus::NotReady,
            EndReason::CrashLoop { .. } => ExitStatus::CrashLoop,
            EndReason::LostRole { .. } | EndReason::SupervisionLost { .. } => ExitStatus::Failure,
            EndReason::Forced => ExitStatus::Forced,
        }
    }
}

/// Why a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndReason {
    /// A stop was requested.
    Stopped,
    /// A stop was requested that keeps the engines, which wait for the next xpyd.
    EnginesKept,
    /// An engine ended before the fleet was ready.
    EngineFailed {
        /// The engine.
        engine: EngineId,
        /// One line that names its log.
        reason: String,
        /// How its leader ended; `None` if its program never ran.
        exit: Option<Exit>,
    },
    /// An engine, or a hand-off, was not ready in time.
    NotReady {
        /// The engine; `None` if it was a hand-off.
        engine: Option<EngineId>,
        /// One line.
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
        /// Why it failed, in one line.
        reason: String,
    },
    /// The last engine of a role kept failing.
    CrashLoop {
        /// The role.
        role: Role,
        /// Its last engine.
        engine: EngineId,
        /// Why it failed the last time, in one line.
        reason: String,
    },
    /// The shim could not be started, was killed, or does not answer.
    SupervisionLost {
        /// One line.
        reason: String,
    },
    /// A stop without grace was requested.
    Forced,
}

impl fmt::Display for EndReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => formatter.write_str("stopped"),
            Self::EnginesKept => formatter.write_str("left its engines to the next xpyd"),
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

/// Something of a run that still exists after its teardown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leftover {
    /// A process that SIGKILL did not end.
    Process {
        /// The engine it belongs to, if known.
        engine: Option<EngineId>,
        /// Process id.
        pid: u32,
        /// Name, 15 characters at most.
        name: String,
        /// State letter of `/proc/PID/stat`; `D` is waiting in the kernel.
        state: char,
    },
    /// A port of the plan on which a process listens.
    Port {
        /// The engine it was planned for.
        engine: EngineId,
        /// The port.
        port: u16,
        /// What the engine uses it for.
        purpose: String,
        /// The process that listens, if it is known.
        holder: Option<ports::Holder>,
    },
    /// GPU memory that was not freed.
    GpuMemory {
        /// The GPU's number in the plan.
        gpu: u32,
        /// Memory in use beyond that before the run, in bytes.
        bytes: u64,
        /// The processes that hold it, as far as the driver lists them.
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
                    formatter.write_str(", held by no process that the driver lists")
                } else {
                    write!(formatter, ", held by {}", by.join(", "))
                }
            }
        }
    }
}
