//! The protocol between xpyd and its shim: one JSON object a line, over a Unix socket pair.
//!
//! It knows no process and no socket. Both ends are the same binary, but an upgraded xpyd can meet an older shim, so the shim's
//! first message carries the version.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::fleet::{EngineId, Exit, Incarnation, LogLimits};

/// The protocol version. It grows with every change that an older peer would not understand.
pub const VERSION: u32 = 4;

/// The longest message, in bytes, its newline included. A spawn carries a whole command line and its variables.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// A message from xpyd to the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Start an engine. Answered by [`Event::Spawned`] or [`Event::SpawnFailed`].
    Spawn(Spawn),
    /// The engine's start is over: if xpyd disappears, the engine gets its grace period instead of SIGKILL at once.
    #[serde(rename = "settled")]
    StartupFinished {
        /// The engine.
        engine: EngineId,
    },
    /// SIGTERM to the leader, at most once per incarnation: a second one can kill vLLM in the middle of its cleanup.
    Terminate {
        /// The engine.
        engine: EngineId,
    },
    /// SIGKILL to the whole tree, until it is empty.
    Kill {
        /// The engine.
        engine: EngineId,
    },
    /// Whether and how long to keep the engines if xpyd disappears. Without this command they end with it.
    Keep(Keep),
    /// Hold the socket on which clients connect, so that they wait for the next xpyd instead of being refused. The socket comes with
    /// this message; without one, the shim closes the socket it holds.
    Listener {
        /// Whether a socket comes with the message.
        is_given: bool,
    },
    /// Kill all processes that are left, and exit.
    Shutdown,
}

/// How long engines outlive xpyd, so that the next one can attach to them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keep {
    /// The path of the Unix socket for the next xpyd, in a folder that only its user can enter.
    pub socket: PathBuf,
    /// How long the engines wait; zero ends them with xpyd.
    pub wait: Duration,
    /// The run's folder, for an xpyd that attaches.
    pub run_dir: PathBuf,
}

/// How to start an engine.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spawn {
    /// The engine.
    pub engine: EngineId,
    /// The incarnation to start; every event about it repeats this.
    pub incarnation: Incarnation,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Variables set on top of the shim's own environment, which is xpyd's.
    pub env: BTreeMap<String, String>,
    /// Working directory.
    pub directory: PathBuf,
    /// File that gets its output, appended; `None`: it has the shim's standard error.
    pub log: Option<PathBuf>,
    /// How much of its output is kept.
    #[serde(default)]
    pub log_limits: LogLimits,
    /// How long the engine can take to exit after SIGTERM, if xpyd disappears.
    pub stop_grace: Duration,
    /// Data for an xpyd that attaches; the shim does not read it.
    #[serde(default)]
    pub memo: serde_json::Value,
}

/// Omits arguments and variables, which can contain secrets.
impl fmt::Debug for Spawn {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Spawn")
            .field("engine", &self.engine)
            .field("incarnation", &self.incarnation)
            .field("log", &self.log)
            .finish_non_exhaustive()
    }
}

/// A message from the shim to xpyd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The first message.
    Hello {
        /// The shim's [`VERSION`].
        version: u32,
        /// Its process id; the process that xpyd started is its monitor.
        pid: u32,
        /// The monitor's process id.
        monitor: u32,
        /// The engines it has kept, for an xpyd that attaches; `None` for the xpyd that started it.
        #[serde(default)]
        kept: Option<Kept>,
    },
    /// The shim cannot keep the engines: they would end with xpyd.
    CannotKeep {
        /// One line.
        reason: String,
    },
    /// The engine's leader runs.
    Spawned {
        /// The engine.
        engine: EngineId,
        /// The incarnation.
        incarnation: Incarnation,
        /// Process id of the leader, which is also its session's id.
        pid: u32,
    },
    /// The engine's program could not be started; it has no process.
    SpawnFailed {
        /// The engine.
        engine: EngineId,
        /// The incarnation.
        incarnation: Incarnation,
        /// One line.
        reason: String,
    },
    /// The engine's leader ended. Other processes of its tree can still run.
    Exited {
        /// The engine.
        engine: EngineId,
        /// The incarnation.
        incarnation: Incarnation,
        /// The exit code or signal.
        exit: Exit,
    },
    /// No process of the engine is left. The last event of an incarnation.
    TreeEmpty {
        /// The engine.
        engine: EngineId,
        /// The incarnation.
        incarnation: Incarnation,
    },
    /// These processes got SIGKILL a while ago and still exist.
    Leftover {
        /// The engine; `None` for processes that belong to no known engine.
        engine: Option<EngineId>,
        /// The processes.
        processes: Vec<LeftoverProcess>,
    },
}

/// The engines of a run whose xpyd is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The run's folder.
    pub run_dir: PathBuf,
    /// Every engine that was ever started.
    pub engines: Vec<KeptEngine>,
    /// Whether the socket on which clients connect comes with this message.
    pub has_listener: bool,
}

/// Omits the memo, which can contain secrets.
impl fmt::Debug for KeptEngine {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        (&self.engine, self.incarnation, self.state).fmt(formatter)
    }
}

/// The newest incarnation of an engine, as the shim knows it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptEngine {
    /// The engine.
    pub engine: EngineId,
    /// The incarnation.
    pub incarnation: Incarnation,
    /// Its state.
    pub state: KeptState,
    /// The memo of its spawn command.
    pub memo: serde_json::Value,
}

/// The state of a kept engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeptState {
    /// Its leader runs, and no stop was requested.
    Running {
        /// Process id of the leader.
        pid: u32,
        /// Whether its start was over.
        #[serde(rename = "settled")]
        startup_finished: bool,
    },
    /// It is stopping. [`Event::TreeEmpty`] will follow, or [`Event::Leftover`].
    Leaving {
        /// How its leader ended, if it has.
        exit: Option<Exit>,
    },
    /// It has no process.
    Gone {
        /// How its leader ended, if known.
        exit: Option<Exit>,
    },
}

/// A process that outlived SIGKILL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftoverProcess {
    /// Its process id.
    pub pid: u32,
    /// Its name, as the kernel has it (15 characters at most).
    pub name: String,
    /// Its state letter: `D` waits in the kernel where no signal reaches it.
    pub state: char,
}

/// Why a message could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// This version does not understand the message.
    #[error("message is not understood")]
    Malformed(#[source] serde_json::Error),
    /// The message cannot be encoded as JSON: a path that is not UTF-8.
    #[error("message cannot be encoded")]
    Unencodable(#[source] serde_json::Error),
    /// The message is too long.
    #[error("message is longer than {MAX_MESSAGE_BYTES} bytes")]
    TooLong,
}

/// Appends `message` and its newline to `outgoing`.
pub(super) fn encode(message: &impl Serialize, outgoing: &mut Vec<u8>) -> Result<(), ProtocolError> {
    let line = serde_json::to_vec(message).map_err(ProtocolError::Unencodable)?;
    if line.len() >= MAX_MESSAGE_BYTES {
        return Err(ProtocolError::TooLong);
    }
    outgoing.extend_from_slice(&line);
    outgoing.push(b'\n');
    Ok(())
}

/// Takes the first whole message out of `incoming`; `None` if there is none yet.
pub(super) fn decode<T: DeserializeOwned>(incoming: &mut Vec<u8>) -> Result<Option<T>, ProtocolError> {
    let Some(end) = incoming.iter().position(|byte| *byte == b'\n') else {
        return if incoming.len() >= MAX_MESSAGE_BYTES {
            Err(ProtocolError::TooLong)
        } else {
            Ok(None)
        };
    };
    let line: Vec<u8> = incoming.drain(..=end).collect();
    serde_json::from_slice(&line)
        .map(Some)
        .map_err(ProtocolError::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_arbitrary_fragmentation() {
        let sent = vec![
            Event::Hello {
                version: VERSION,
                pid: 6,
                monitor: 5,
                kept: None,
            },
            Event::Exited {
                engine: EngineId::named("decoder1"),
                incarnation: Incarnation::FIRST,
                exit: Exit::Signal(9),
            },
            Event::Leftover {
                engine: None,
                processes: vec![LeftoverProcess {
                    pid: 7,
                    name: "a\nb".into(),
                    state: 'D',
                }],
            },
        ];
        let mut wire = Vec::new();
        for event in &sent {
            encode(event, &mut wire).unwrap();
        }
        for size in 1..wire.len() {
            let (mut incoming, mut received) = (Vec::new(), Vec::<Event>::new());
            for fragment in wire.chunks(size) {
                incoming.extend_from_slice(fragment);
                while let Some(event) = decode(&mut incoming).unwrap() {
                    received.push(event);
                }
            }
            assert_eq!(received, sent, "fragments of {size} bytes");
        }
    }

    #[test]
    fn an_endless_message_is_rejected() {
        let mut incoming = vec![b'x'; MAX_MESSAGE_BYTES];
        assert!(matches!(decode::<Event>(&mut incoming), Err(ProtocolError::TooLong)));
    }

    #[test]
    fn a_spawn_never_shows_its_variables() {
        let spawn = Spawn {
            engine: EngineId::named("decoder1"),
            incarnation: Incarnation::FIRST,
            argv: vec!["vllm".into(), "--api-key".into(), "swordfish".into()],
            env: BTreeMap::from([("HF_TOKEN".into(), "hf_swordfish".into())]),
            directory: "/".into(),
            log: Some("decoder1.log".into()),
            log_limits: LogLimits::default(),
            stop_grace: Duration::ZERO,
            memo: serde_json::json!({"api_key": "swordfish"}),
        };
        assert!(!format!("{:?}", Command::Spawn(spawn)).contains("swordfish"));
    }

    #[test]
    fn exits_read_as_sentences() {
        assert_eq!(Exit::Code(0).to_string(), "exited with code 0");
        assert_eq!(Exit::Signal(9).to_string(), "was killed by SIGKILL");
    }
}
