//! Finding a guardian that keeps the engines of a run whose xpyd has gone, and its witness, which is nobody's child here.
//!
//! Looking changes nothing: as long as no command was sent, the guardian goes on waiting as if nobody had come.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::unistd::geteuid;
use rustix::process::{PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::process::Child;

use super::channel;
use super::client::{GuardianError, HELLO_DEADLINE};
use super::protocol::{self, Event, Kept, KeptState, ProtocolError};
use super::tree::Process;
use super::witness::WITNESS_NAME;
use crate::fleet::{EngineId, Incarnation};
use crate::plan::EngineSpec;
use crate::sockets::connect_to_user;
use crate::supervisor::Scaled;

/// A run that waits for its next xpyd. Dropping it leaves it waiting.
#[derive(Debug)]
pub struct KeptRun {
    /// What is there of it.
    pub kept: Kept,
    /// The socket on which clients connect, if its guardian holds one.
    pub listener: Option<OwnedFd>,
    pub(super) pid: u32,
    pub(super) witness: u32,
    pub(super) stream: UnixStream,
    pub(super) incoming: Vec<u8>,
}

impl KeptRun {
    /// Every engine that was ever started, with its newest incarnation.
    pub fn engines(&self) -> Vec<(EngineId, Incarnation, KeptState)> {
        let engines = self.kept.engines.iter();
        engines
            .map(|kept| (kept.engine.clone(), kept.incarnation, kept.state))
            .collect()
    }

    /// How the fleet differs from the plan of its start.
    pub fn scaled(&self) -> Scaled {
        Scaled::read(&self.kept.run_dir)
    }

    /// What each of them was started with, in the same order.
    pub fn specs(&self) -> Result<Vec<EngineSpec>, GuardianError> {
        let memos = self.kept.engines.iter();
        memos
            .map(|kept| serde_json::from_value(kept.memo.clone()))
            .collect::<Result<_, _>>()
            .map_err(|error| GuardianError::Protocol(ProtocolError::Malformed(error)))
    }

    /// The process that listens at `socket`, also if it does not answer.
    pub fn guardian_pid(socket: &Path) -> Option<u32> {
        let answered = connect_to_user(socket, geteuid().as_raw()).ok().flatten();
        answered.map(|(_, pid)| pid)
    }

    /// The run whose guardian waits at `socket`; `None` if nobody does. Blocks until the guardian has answered.
    pub fn find(socket: &Path) -> Result<Option<Self>, GuardianError> {
        let stream = match connect_to_user(socket, geteuid().as_raw()) {
            Ok(Some((stream, _))) => stream,
            Ok(None) => return Ok(None),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(error) => return Err(GuardianError::Connection(error)),
        };
        stream
            .set_read_timeout(Some(HELLO_DEADLINE))
            .map_err(GuardianError::Connection)?;
        let (mut incoming, mut listener, mut buffer) = (Vec::new(), None, [0; 1 << 14]);
        loop {
            if let Some(event) = protocol::decode(&mut incoming).map_err(GuardianError::Protocol)? {
                return match event {
                    Event::Hello {
                        version,
                        pid,
                        witness,
                        kept: Some(kept),
                    } if version == protocol::VERSION => Ok(Some(Self {
                        listener: listener.filter(|_| kept.has_listener),
                        kept,
                        pid,
                        witness,
                        stream,
                        incoming,
                    })),
                    Event::Hello { version, .. } => Err(GuardianError::Version { theirs: version }),
                    _ => Err(GuardianError::Gone),
                };
            }
            match channel::receive(&stream, &mut buffer, &mut listener) {
                // It ended just now, with all that it had.
                Ok(0) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Ok(count) => incoming.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Err(GuardianError::Silent);
                }
                Err(error) => return Err(GuardianError::Connection(error)),
            }
        }
    }
}

/// The guardian's parent.
#[derive(Debug)]
pub(super) enum Witness {
    /// Of a guardian that this process has started.
    Child(Child),
    /// Of a guardian that this process has attached to: only its end can be seen.
    Stranger(AsyncFd<OwnedFd>),
    /// It had ended before this process attached.
    Gone,
}

impl Witness {
    /// The witness with this process id, as long as its guardian says that it is its parent.
    #[expect(
        unsafe_code,
        reason = "tokio has no safe way to wait for a descriptor that it does not know"
    )]
    pub(super) fn stranger(pid: u32) -> io::Result<Self> {
        // A guardian that lost its witness is the child of whoever adopts processes, which is no witness.
        let pid = Process::read(i32::try_from(pid).unwrap_or_default()).filter(|parent| parent.name == WITNESS_NAME);
        let Some(pid) = pid.and_then(|parent| rustix::process::Pid::from_raw(parent.pid)) else {
            return Ok(Self::Gone);
        };
        let descriptor = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(descriptor) => descriptor,
            Err(rustix::io::Errno::SRCH) => return Ok(Self::Gone),
            Err(error) => return Err(error.into()),
        };
        // SAFETY: an `OwnedFd` is open, and the same descriptor, for as long as it is owned, which is until this is dropped.
        let descriptor = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?;
        Ok(Self::Stranger(descriptor))
    }

    /// Returns once it has ended; true if it said that nothing is left, which only its parent gets to know.
    pub(super) async fn ended(&mut self) -> bool {
        match self {
            Self::Child(child) => child.wait().await.is_ok_and(|status| status.success()),
            Self::Stranger(descriptor) => {
                // A descriptor that cannot be waited for any more is as good as one of a process that has ended.
                let _ = descriptor.readable().await;
                false
            }
            Self::Gone => false,
        }
    }
}
