//! Finding a shim that keeps the engines of a run whose xpyd has gone, and its monitor, which is nobody's child here.
//!
//! Looking changes nothing: as long as no command was sent, the shim goes on waiting as if nobody had come.

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
use super::client::{HELLO_DEADLINE, ShimError};
use super::monitor::MONITOR_NAME;
use super::protocol::{self, Event, Kept, KeptState, ProtocolError};
use super::tree::Process;
use crate::fleet::{EngineId, Incarnation};
use crate::plan::EngineSpec;
use crate::sockets::connect_to_user;
use crate::supervisor::Scaled;

/// A run that waits for its next xpyd. Dropping it leaves it waiting.
#[derive(Debug)]
pub struct KeptRun {
    /// What is there of it.
    pub kept: Kept,
    /// The socket on which clients connect, if its shim holds one.
    pub listener: Option<OwnedFd>,
    pub(super) pid: u32,
    pub(super) monitor: u32,
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
    pub fn specs(&self) -> Result<Vec<EngineSpec>, ShimError> {
        let memos = self.kept.engines.iter();
        memos
            .map(|kept| serde_json::from_value(kept.memo.clone()))
            .collect::<Result<_, _>>()
            .map_err(|error| ShimError::Protocol(ProtocolError::Malformed(error)))
    }

    /// The process that listens at `socket`, also if it does not answer.
    pub fn shim_pid(socket: &Path) -> Option<u32> {
        let answered = connect_to_user(socket, geteuid().as_raw()).ok().flatten();
        answered.map(|(_, pid)| pid)
    }

    /// The run whose shim waits at `socket`; `None` if nobody does. Blocks until the shim has answered.
    pub fn find(socket: &Path) -> Result<Option<Self>, ShimError> {
        let stream = match connect_to_user(socket, geteuid().as_raw()) {
            Ok(Some((stream, _))) => stream,
            Ok(None) => return Ok(None),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(error) => return Err(ShimError::Connection(error)),
        };
        stream
            .set_read_timeout(Some(HELLO_DEADLINE))
            .map_err(ShimError::Connection)?;
        let (mut incoming, mut listener, mut buffer) = (Vec::new(), None, [0; 1 << 14]);
        loop {
            if let Some(event) = protocol::decode(&mut incoming).map_err(ShimError::Protocol)? {
                return match event {
                    Event::Hello {
                        version,
                        pid,
                        monitor,
                        kept: Some(kept),
                    } if version == protocol::VERSION => Ok(Some(Self {
                        listener: listener.filter(|_| kept.has_listener),
                        kept,
                        pid,
                        monitor,
                        stream,
                        incoming,
                    })),
                    Event::Hello { version, .. } => Err(ShimError::Version { theirs: version }),
                    _ => Err(ShimError::Gone),
                };
            }
            match channel::receive(&stream, &mut buffer, &mut listener) {
                // It ended just now, with all that it had.
                Ok(0) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Ok(count) => incoming.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Err(ShimError::Silent);
                }
                Err(error) => return Err(ShimError::Connection(error)),
            }
        }
    }
}

/// The shim's parent.
#[derive(Debug)]
pub(super) enum Monitor {
    /// Of a shim that this process has started.
    Child(Child),
    /// Of a shim that this process has attached to: only its end can be seen.
    Stranger(AsyncFd<OwnedFd>),
    /// It had ended before this process attached.
    Gone,
}

impl Monitor {
    /// The monitor with this process id, as long as its shim says that it is its parent.
    #[expect(
        unsafe_code,
        reason = "tokio has no safe way to wait for a descriptor that it does not know"
    )]
    pub(super) fn stranger(pid: u32) -> io::Result<Self> {
        // A shim that lost its monitor is the child of whoever adopts processes, which is no monitor.
        let pid = Process::read(i32::try_from(pid).unwrap_or_default()).filter(|parent| parent.name == MONITOR_NAME);
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
