//! Finds the shim of a run whose xpyd is gone, and its monitor. Neither is a child of this process.
//!
//! Finding changes nothing: until it gets a command, the shim keeps waiting for the next xpyd.

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
use crate::supervisor::FleetChanges;

/// A run whose engines wait for the next xpyd. Dropping this value changes nothing for them.
#[derive(Debug)]
pub struct AttachableRun {
    /// What the shim reports of its engines.
    pub kept: Kept,
    /// The socket on which clients connect, if the shim holds one.
    pub listener: Option<OwnedFd>,
    pub(super) pid: u32,
    pub(super) monitor: u32,
    pub(super) stream: UnixStream,
    pub(super) incoming: Vec<u8>,
}

impl AttachableRun {
    /// Every engine that was ever started, with its newest incarnation.
    pub fn engines(&self) -> Vec<(EngineId, Incarnation, KeptState)> {
        let engines = self.kept.engines.iter();
        engines
            .map(|kept| (kept.engine.clone(), kept.incarnation, kept.state))
            .collect()
    }

    /// How the fleet differs from the plan of its start.
    pub fn fleet_changes(&self) -> FleetChanges {
        FleetChanges::read(&self.kept.run_dir)
    }

    /// The spec with which each engine was started, in the same order.
    pub fn specs(&self) -> Result<Vec<EngineSpec>, ShimError> {
        let memos = self.kept.engines.iter();
        memos
            .map(|kept| serde_json::from_value(kept.memo.clone()))
            .collect::<Result<_, _>>()
            .map_err(|error| ShimError::Protocol(ProtocolError::Malformed(error)))
    }

    /// The process id of the listener at `socket`, also if it does not answer.
    pub fn shim_pid(socket: &Path) -> Option<u32> {
        let answered = connect_to_user(socket, geteuid().as_raw()).ok().flatten();
        answered.map(|(_, pid)| pid)
    }

    /// The run whose shim waits at `socket`; `None` if no shim does. Blocks until the shim has answered.
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
                // The shim ended just now, and its engines with it.
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
    /// The monitor of a shim that this process has started.
    Child(Child),
    /// The monitor of a shim that this process has attached to: only its end can be observed.
    Stranger(AsyncFd<OwnedFd>),
    /// The monitor had ended before this process attached.
    Gone,
}

impl Monitor {
    /// The monitor with this process id, which the shim reports as its parent.
    #[expect(
        unsafe_code,
        reason = "tokio has no safe way to wait for a descriptor that it does not know"
    )]
    pub(super) fn stranger(pid: u32) -> io::Result<Self> {
        // A shim that lost its monitor was reparented to a process that is no monitor.
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

    /// Completes once it has ended. True if it reported that nothing is left, which only its parent can read.
    pub(super) async fn ended(&mut self) -> bool {
        match self {
            Self::Child(child) => child.wait().await.is_ok_and(|status| status.success()),
            Self::Stranger(descriptor) => {
                // A descriptor that cannot be waited for counts as one of an ended process.
                let _ = descriptor.readable().await;
                false
            }
            Self::Gone => false,
        }
    }
}
