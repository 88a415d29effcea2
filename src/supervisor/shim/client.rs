//! xpyd's side of the shim: starts it, exchanges messages without blocking, and sweeps after it if it is killed.
//!
//! It decides nothing: commands come from the driver, and events go to it.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::signal::Signal;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::attach::{AttachableRun, Monitor};
use super::channel::{self, Outbox};
use super::orphans;
use super::protocol::{self, Command, Event, LeftoverProcess, ProtocolError};
use super::shm::SharedFiles;
use super::sweep::sweep;
use super::tree::{Process, ProcessTable};
use crate::private;

/// Variables that the shim, and so the engines, do not inherit. Engines have no use for the keys of clients. The others choose
/// ports and ranks of vLLM, which the plan decides; Kubernetes sets `VLLM_PORT` to a URL for a service named `vllm`, which makes
/// vLLM exit.
const NOT_FOR_ENGINES: [&str; 7] = [
    "XPYD_API_KEY",
    "VLLM_PORT",
    "VLLM_DP_SIZE",
    "VLLM_DP_RANK",
    "VLLM_DP_RANK_LOCAL",
    "VLLM_DP_MASTER_IP",
    "VLLM_DP_MASTER_PORT",
];

/// Time for a fresh shim to send its hello: it only re-executes the program, but on a busy host even that takes long.
pub(super) const HELLO_DEADLINE: Duration = Duration::from_secs(30);

/// How long a sweep lasts before it reports what is left.
const SWEEP_DEADLINE: Duration = Duration::from_secs(5);

/// Why the shim cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// The connection failed.
    #[error("connection to the shim failed")]
    Connection(#[source] std::io::Error),
    /// The program could not be started.
    #[error("cannot start the shim from `{}`", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// The error of the start.
        #[source]
        source: std::io::Error,
    },
    /// The shim ended, or closed the connection.
    #[error("shim is gone")]
    Gone,
    /// The shim sent no hello in time.
    #[error("shim did not answer within {} s", HELLO_DEADLINE.as_secs())]
    Silent,
    /// The shim sent a message that this version does not understand.
    #[error("shim speaks another protocol")]
    Protocol(#[source] ProtocolError),
    /// The shim is of another version.
    #[error("shim speaks protocol {theirs}, xpyd speaks {}", protocol::VERSION)]
    Version {
        /// The shim's version.
        theirs: u32,
    },
}

/// Where the shim writes its own log.
#[derive(Debug, Clone, Copy)]
pub enum ShimLog<'path> {
    /// This file.
    File(&'path Path),
    /// The standard error of this process, where engines without a log file write as well.
    Inherited,
}

/// A running shim. Dropping this closes the connection, and then the shim ends every engine by itself.
#[derive(Debug)]
pub struct Shim {
    monitor: Monitor,
    /// Whether the monitor has ended before the shim. Then this process sweeps in its place.
    is_unmonitored: bool,
    pid: u32,
    link: ShimConnection,
    foreign: SharedFiles,
}

/// The connection to a shim, with its queues in both directions.
#[derive(Debug)]
struct ShimConnection {
    stream: UnixStream,
    incoming: Vec<u8>,
    outgoing: Outbox,
}

impl Shim {
    /// Starts `program shim` and waits for its hello.
    ///
    /// Makes this process a child subreaper, so that it inherits the engines' processes if the shim is killed.
    pub async fn start(program: &Path, log: ShimLog<'_>) -> Result<Self, ShimError> {
        prctl::set_child_subreaper(true).map_err(|errno| ShimError::Connection(errno.into()))?;
        let foreign = SharedFiles::present();
        let (own, theirs) = std::os::unix::net::UnixStream::pair().map_err(ShimError::Connection)?;
        let start = |source| ShimError::Start {
            program: program.to_owned(),
            source,
        };
        let log = match log {
            ShimLog::File(path) => {
                let (log, _) = private::append(path).map_err(start)?.into_parts();
                // The shim holds the lock, so no other run removes the folder as an old one. Some file systems have no locks.
                let _ = log.lock_shared();
                Stdio::from(log)
            }
            ShimLog::Inherited => Stdio::inherit(),
        };
        let mut command = tokio::process::Command::new(program);
        for name in NOT_FOR_ENGINES {
            command.env_remove(name);
        }
        let monitor = command
            .arg("shim")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(start)?;
        let mut shim = Self {
            pid: 0,
            monitor: Monitor::Child(monitor),
            is_unmonitored: false,
            link: ShimConnection::new(own, Vec::new())?,
            foreign,
        };
        match timeout(HELLO_DEADLINE, shim.event()).await {
            Ok(Ok(Event::Hello { version, pid, .. })) if version == protocol::VERSION => {
                shim.pid = pid;
                Ok(shim)
            }
            Ok(Ok(Event::Hello { version, .. })) => Err(ShimError::Version { theirs: version }),
            Ok(Ok(_)) => Err(ShimError::Gone),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(ShimError::Silent),
        }
    }

    /// Attaches to the shim of a run whose xpyd is gone. From the first command on the shim belongs to this process.
    pub fn attach(run: AttachableRun) -> Result<Self, ShimError> {
        let monitor = Monitor::stranger(run.monitor).map_err(ShimError::Connection)?;
        Ok(Self {
            is_unmonitored: matches!(monitor, Monitor::Gone),
            monitor,
            pid: run.pid,
            link: ShimConnection::new(run.stream, run.incoming)?,
            foreign: SharedFiles::present(),
        })
    }

    /// The shim's process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The process id of the monitor; `None` once it has ended, and if it is no child of this process.
    pub fn monitor_pid(&self) -> Option<u32> {
        match &self.monitor {
            Monitor::Child(child) => child.id(),
            Monitor::Stranger(_) | Monitor::Gone => None,
        }
    }

    /// Queues a command; [`Shim::event`] sends it. Commands are few, so the queue stays small.
    pub fn send(&mut self, command: &Command) -> Result<(), ProtocolError> {
        protocol::encode(command, &mut self.link.outgoing.bytes)
    }

    /// Queues the socket on which clients connect, for the shim to hold; `None` lets it close the one that it holds.
    pub fn hold(&mut self, listener: Option<OwnedFd>) -> Result<(), ProtocolError> {
        let is_given = listener.is_some();
        if let Some(listener) = listener {
            self.link.outgoing.attach(listener);
        }
        self.send(&Command::Listener { is_given })
    }

    /// Sends what is queued and returns the next event. Safe to cancel.
    pub async fn event(&mut self) -> Result<Event, ShimError> {
        loop {
            tokio::select! {
                // The shim's last events come before the end of the monitor, which ends after it.
                biased;
                event = self.link.event() => return event,
                _ = self.monitor.ended(), if !self.is_unmonitored => {
                    self.is_unmonitored = true;
                    tracing::warn!("the shim's monitor was killed; this process ends the engines should the shim be killed");
                }
            }
        }
    }

    /// Sends what is queued.
    pub async fn flush(&mut self) -> Result<(), ShimError> {
        let sent = timeout(SWEEP_DEADLINE, self.link.flush()).await;
        sent.map_err(|_| ShimError::Silent)?.map_err(ShimError::Connection)
    }

    /// Ends a shim that hangs, and everything that shim and engines have left, shared memory included. Returns the processes that did
    /// not end within a few seconds.
    pub async fn sweep(&mut self) -> Vec<LeftoverProcess> {
        let Monitor::Child(_) = &self.monitor else {
            return self.sweep_attached().await;
        };
        self.kill();
        // The monitor does it, because it continues if this process is killed meanwhile.
        if matches!(timeout(SWEEP_DEADLINE, self.monitor.ended()).await, Ok(true)) {
            return Vec::new();
        }
        // It was killed, or could not end a process. This process inherits what it had; it has no other children.
        self.kill_monitor();
        let (shim, foreign) = (self.pid, self.foreign.clone());
        let sweeping = tokio::task::spawn_blocking(move || sweep(shim, &foreign, SWEEP_DEADLINE));
        let left = sweeping.await.expect("a sweep does not panic and is not cancelled");
        self.kill_monitor();
        left.iter().map(Process::leftover).collect()
    }

    /// [`Shim::sweep`] after an attach: shim and monitor are no descendants of this process, so it inherits nothing of theirs.
    /// The one that still runs sweeps. Without a monitor, processes are found by the shim's mark.
    async fn sweep_attached(&mut self) -> Vec<LeftoverProcess> {
        let engines: Vec<Process> = ProcessTable::read()
            .descendants(i32::try_from(self.pid).unwrap_or_default())
            .into_iter()
            .cloned()
            .collect();
        // Queued commands no longer matter, and half a message would corrupt the next one.
        self.link.outgoing.clear();
        if self.send(&Command::Shutdown).is_ok() {
            let end = async { while self.link.event().await.is_ok() {} };
            // A shim that hangs is killed, and then its monitor sweeps.
            if timeout(SWEEP_DEADLINE, end).await.is_err()
                && let Some(shim) = i32::try_from(self.pid).ok().and_then(Process::read)
            {
                let _ = shim.signal(Signal::SIGKILL);
            }
        }
        self.ended().await;
        if self.is_unmonitored {
            let shim = self.pid;
            let reaping = tokio::task::spawn_blocking(move || {
                orphans::reap(&orphans::left_by(shim), SWEEP_DEADLINE);
            });
            reaping.await.expect("a reaping does not panic and is not cancelled");
        }
        let left = engines.iter().filter(|process| is_still_there(&process.leftover()));
        left.map(Process::leftover).collect()
    }

    /// SIGKILL to the shim, while its id cannot belong to another process: until its parent has reaped it.
    fn kill(&self) {
        let Ok(pid) = i32::try_from(self.pid) else { return };
        // Without its monitor the shim is a child of this process, the next subreaper above.
        let parent = self.monitor_pid().unwrap_or_else(std::process::id);
        if let Some(shim) = Process::read(pid).filter(|process| process.parent.unsigned_abs() == parent) {
            // It can have ended meanwhile.
            let _ = shim.signal(Signal::SIGKILL);
        }
    }

    /// Ends a monitor that this process has started, or reaps it.
    fn kill_monitor(&mut self) {
        if let Monitor::Child(child) = &mut self.monitor {
            let _ = child.start_kill();
            let _ = child.try_wait();
        }
    }

    /// Waits until the monitor has ended. It ends as soon as the shim and everything that the shim left have ended.
    pub async fn ended(&mut self) {
        if timeout(SWEEP_DEADLINE, self.monitor.ended()).await.is_err() {
            self.kill_monitor();
        }
    }
}

impl ShimConnection {
    fn new(stream: std::os::unix::net::UnixStream, incoming: Vec<u8>) -> Result<Self, ShimError> {
        stream.set_nonblocking(true).map_err(ShimError::Connection)?;
        Ok(Self {
            stream: UnixStream::from_std(stream).map_err(ShimError::Connection)?,
            incoming,
            outgoing: Outbox::default(),
        })
    }

    /// Sends what is queued and returns the next event. Safe to cancel.
    async fn event(&mut self) -> Result<Event, ShimError> {
        loop {
            if let Some(event) = protocol::decode(&mut self.incoming).map_err(ShimError::Protocol)? {
                return Ok(event);
            }
            let interest = if self.outgoing.is_empty() {
                Interest::READABLE
            } else {
                Interest::READABLE | Interest::WRITABLE
            };
            let ready = self.stream.ready(interest).await.map_err(ShimError::Connection)?;
            // After the shim's end writing fails, but its last events can still be read.
            if ready.is_writable() && !self.outgoing.is_empty() {
                let _ = self.send();
            }
            if ready.is_readable() {
                let mut buffer = [0; 1 << 12];
                let receive = || channel::receive(&self.stream, &mut buffer, &mut None);
                match self.stream.try_io(Interest::READABLE, receive) {
                    Ok(0) => return Err(ShimError::Gone),
                    Ok(count) => self.incoming.extend_from_slice(&buffer[..count]),
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(ShimError::Connection(error)),
                }
            }
        }
    }

    fn send(&mut self) -> std::io::Result<()> {
        let (stream, outgoing) = (&self.stream, &mut self.outgoing);
        stream.try_io(Interest::WRITABLE, || outgoing.send(stream))
    }

    async fn flush(&mut self) -> std::io::Result<()> {
        while !self.outgoing.is_empty() {
            self.stream.writable().await?;
            match self.send() {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Whether a process that was reported as left over still exists.
pub fn is_still_there(process: &LeftoverProcess) -> bool {
    i32::try_from(process.pid)
        .ok()
        .and_then(Process::read)
        .is_some_and(|now| now.name == process.name)
}
