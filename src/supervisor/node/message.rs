//! What relay and agent say to each other: one JSON object a line.
//!
//! Both are the same program: the relay starts the agent by its own path.

use std::fmt;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _};

use crate::fleet::{Exit, Incarnation};
use crate::plan::EngineSpec;

/// The longest line, in bytes.
const MAX_LINE_BYTES: usize = 1 << 20;

/// One incarnation of an engine on another node.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteEngine {
    /// The engine.
    pub spec: EngineSpec,
    /// The number of this start.
    pub incarnation: Incarnation,
    /// Its working directory.
    pub directory: PathBuf,
}

/// Omits arguments and variables, which can contain secrets.
impl fmt::Debug for RemoteEngine {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        (&self.spec.id, self.incarnation, &self.spec.node).fmt(formatter)
    }
}

/// From the relay to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ToAgent {
    /// Start this engine. The first message.
    Start(Box<RemoteEngine>),
    /// SIGTERM to its leader.
    Terminate,
    /// A heartbeat.
    Alive,
}

/// From the agent to the relay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ToRelay {
    /// A heartbeat.
    Alive,
    /// The engine cannot be started, for this reason. The last message.
    Failed(String),
    /// The engine's leader ended. Its other processes are being ended.
    Exited(Exit),
}

/// The message as a line.
pub(super) fn line(message: &impl Serialize) -> Vec<u8> {
    // These types hold nothing that JSON cannot express.
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}

/// Reads messages, one a line. Safe to cancel.
#[derive(Debug)]
pub(super) struct Messages<R> {
    reader: R,
    line: Vec<u8>,
}

impl<R: AsyncBufRead + Unpin> Messages<R> {
    pub(super) fn new(reader: R) -> Self {
        let line = Vec::new();
        Self { reader, line }
    }

    /// The next message; `None` at the end, and when the other side sends something else.
    pub(super) async fn next<T: DeserializeOwned>(&mut self) -> Option<T> {
        loop {
            let available = self.reader.fill_buf().await.ok().filter(|bytes| !bytes.is_empty())?;
            let end = memchr::memchr(b'\n', available);
            let taken = end.map_or(available.len(), |end| end + 1);
            self.line.extend_from_slice(&available[..taken]);
            self.reader.consume(taken);
            if end.is_some() {
                let message = serde_json::from_slice(&self.line);
                self.line.clear();
                return message.ok();
            }
            if self.line.len() > MAX_LINE_BYTES {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_end_with_the_first_invalid_one() {
        let mut bytes = line(&ToRelay::Alive);
        bytes.extend(line(&ToRelay::Exited(Exit::Signal(9))));
        bytes.extend(b"srun: nonsense\n");
        bytes.extend(line(&ToRelay::Alive));
        let mut messages = Messages::new(&bytes[..]);
        assert_eq!(messages.next().await, Some(ToRelay::Alive));
        assert_eq!(messages.next().await, Some(ToRelay::Exited(Exit::Signal(9))));
        assert_eq!(messages.next::<ToRelay>().await, None);
        assert_eq!(Messages::new(&b"{\"alive"[..]).next::<ToRelay>().await, None);
    }
}
