//! What xpyd and its shim say to each other: one JSON object a line, over a Unix socket pair.
//!
//! Knows no process and no socket. Both ends are the same binary, but an upgraded xpyd may meet an older shim, so
//! the shim's first message carries the version.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::fleet::{EngineId, Exit, Incarnation, LogLimits};

/// Grows with every change that an older peer would not understand.
pub const VERSION: u32 = 4;

/// The longest message, in bytes, its newline included. A spawn carries a whole command line and its variables.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// What xpyd asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Start an engine. Answered by [`Event::Spawned`] or [`Event::SpawnFailed`].
    Spawn(Spawn),
    /// The engine's start is over: should xpyd disappear, it gets its grace instead of being killed at once.
    Settled {
        /// Which engine.
        engine: EngineId,
    },
    /// SIGTERM to the leader, at most once per incarnation: a second one can kill vLLM in the middle of its cleanup.
    Terminate {
        /// Which engine.
        engine: EngineId,
    },
    /// SIGKILL to the whole tree, until it is empty.
    Kill {
        /// Which engine.
        engine: EngineId,
    },
    /// What becomes of the engines should xpyd disappear. Until this is said they end with it.
    Keep(Keep),
    /// Hold the socket on which clients connect, so that they wait for the next xpyd instead of being refused. The socket
    /// comes with this message; without one, the socket that is held is closed.
    Listener {
        /// Whether there is one.
        is_given: bool,
    },
    /// Kill whatever is left of anything, and exit.
    Shutdown,
}

/// Engines that outlive xpyd for a while, so that the next one can attach to them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keep {
    /// Where to wait for the next xpyd: the path of a Unix socket, in a folder that is its user's alone.
    pub socket: PathBuf,
    /// How long; zero ends them with xpyd.
    pub wait: Duration,
    /// The run's folder, for whoever attaches.
    pub run_dir: PathBuf,
}

/// How to start an engine.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spawn {
    /// Which engine.
    pub engine: EngineId,
    /// Which start of it; every event about it repeats this.
    pub incarnation: Incarnation,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Variables set on top of the shim's own environment, which is xpyd's.
    pub env: BTreeMap<String, String>,
    /// Working directory.
    pub directory: PathBuf,
    /// File that gets its output, appended.
    pub log: PathBuf,
    /// How much of its output is kept.
    #[serde(default)]
    pub log_limits: LogLimits,
    /// How long it may take to leave after SIGTERM, should xpyd disappear.
    pub stop_grace: Duration,
    /// What xpyd wants to find again when it attaches; the shim does not look into it.
    #[serde(default)]
    pub memo: serde_json::Value,
}

/// Arguments and variables may hold secrets, so they are not shown.
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

/// What the shim reports.
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
        /// What it has kept, for an xpyd that attaches; `None` for the one that started it.
        #[serde(default)]
        kept: Option<Kept>,
    },
    /// Engines would end with xpyd, although it asked for them to be kept.
    CannotKeep {
        /// Why, in one line.
        reason: String,
    },
    /// The engine's leader runs.
    Spawned {
        /// Which engine.
        engine: EngineId,
        /// Which start of it.
        incarnation: Incarnation,
        /// Process id of the leader, which is also its session's id.
        pid: u32,
    },
    /// The engine's program could not be started; nothing of it is there.
    SpawnFailed {
        /// Which engine.
        engine: EngineId,
        /// Which start of it.
        incarnation: Incarnation,
        /// Why, in one line.
        reason: String,
    },
    /// The engine's leader ended. Others of its tree may live on.
    Exited {
        /// Which engine.
        engine: EngineId,
        /// Which start of it.
        incarnation: Incarnation,
        /// How.
        exit: Exit,
    },
    /// No process of the engine is left. The last event of an incarnation.
    TreeEmpty {
        /// Which engine.
        engine: EngineId,
        /// Which start of it.
        incarnation: Incarnation,
    },
    /// These processes were sent SIGKILL a while ago and are still there.
    Leftover {
        /// Which engine; `None` for strays that no engine can be named for.
        engine: Option<EngineId>,
        /// The processes.
        processes: Vec<LeftoverProcess>,
    },
}

/// What is there of a run whose xpyd has gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The run's folder.
    pub run_dir: PathBuf,
    /// Every engine that was ever started.
    pub engines: Vec<KeptEngine>,
    /// Whether the socket on which clients connect comes with this message.
    pub has_listener: bool,
}

/// Memos may hold secrets, so they are not shown.
impl fmt::Debug for KeptEngine {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        (&self.engine, self.incarnation, self.state).fmt(formatter)
    }
}

/// The newest incarnation of an engine, as the shim knows it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptEngine {
    /// Which engine.
    pub engine: EngineId,
    /// Which start of it.
    pub incarnation: Incarnation,
    /// What is there of it.
    pub state: KeptState,
    /// What xpyd gave when it started it.
    pub memo: serde_json::Value,
}

/// What is there of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeptState {
    /// Its leader runs, and nobody has asked it to end.
    Running {
        /// Process id of the leader.
        pid: u32,
        /// Whether its start was over.
        settled: bool,
    },
    /// It is being ended. [`Event::TreeEmpty`] will follow, or [`Event::Leftover`].
    Leaving {
        /// How its leader ended, if it has.
        exit: Option<Exit>,
    },
    /// Nothing of it is there.
    Gone {
        /// How its leader ended.
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
    /// The message is not what this version understands.
    #[error("message is not understood")]
    Malformed(#[source] serde_json::Error),
    /// The message could not be put into JSON: a path that is not UTF-8.
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
    fn a_message_without_an_end_is_refused_instead_of_buffered_for_ever() {
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
            log: "decoder1.log".into(),
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
