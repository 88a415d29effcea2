//! xpyd's end of the shim: starts it, talks to it without ever blocking, and sweeps after it if it is killed.
//!
//! Decides nothing: commands come from the driver, and events go to it.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::signal::Signal;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::attach::{KeptRun, Monitor};
use super::channel::{self, Outbox};
use super::orphans;
use super::protocol::{self, Command, Event, LeftoverProcess, ProtocolError};
use super::shm::SharedFiles;
use super::sweep::sweep;
use super::tree::{Process, Table};
use crate::private;

/// Variables that engines do not inherit, because they inherit the shim's. The keys of clients are no business of theirs. What
/// else is named here says on which ports and ranks vLLM runs, which is the plan's to decide; Kubernetes sets `VLLM_PORT` to a URL
/// where a service is called `vllm`, and vLLM ends of it.
const NOT_FOR_ENGINES: [&str; 7] = [
    "XPYD_API_KEY",
    "VLLM_PORT",
    "VLLM_DP_SIZE",
    "VLLM_DP_RANK",
    "VLLM_DP_RANK_LOCAL",
    "VLLM_DP_MASTER_IP",
    "VLLM_DP_MASTER_PORT",
];

/// How long a fresh shim can take to say hello: it is a re-exec and nothing more, but on a busy host even that takes long.
pub(super) const HELLO_DEADLINE: Duration = Duration::from_secs(30);

/// How long a sweep goes on before it reports what is left.
const SWEEP_DEADLINE: Duration = Duration::from_secs(5);

/// Why there is no shim.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// The connection to it could not be made, or broke.
    #[error("connection to the shim failed")]
    Connection(#[source] std::io::Error),
    /// Its program could not be started.
    #[error("cannot start the shim from `{}`", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It ended, or closed the connection.
    #[error("shim is gone")]
    Gone,
    /// It said nothing for too long.
    #[error("shim did not answer within {} s", HELLO_DEADLINE.as_secs())]
    Silent,
    /// It said something that this version does not understand.
    #[error("shim speaks another protocol")]
    Protocol(#[source] ProtocolError),
    /// It is of another version.
    #[error("shim speaks protocol {theirs}, xpyd speaks {}", protocol::VERSION)]
    Version {
        /// The shim's version.
        theirs: u32,
    },
}

/// A running shim. Dropping it closes the connection, upon which the shim takes every engine down by itself.
#[derive(Debug)]
pub struct Shim {
    monitor: Monitor,
    /// The monitor has ended before the shim. This process sweeps in its place.
    is_unmonitored: bool,
    pid: u32,
    link: Link,
    foreign: SharedFiles,
}

/// The connection to a shim, with what is on its way in either direction.
#[derive(Debug)]
struct Link {
    stream: UnixStream,
    incoming: Vec<u8>,
    outgoing: Outbox,
}

impl Shim {
    /// Starts `program shim` and waits for its hello. What it has to say goes to `log`.
    ///
    /// Makes this process a child subreaper, so that it inherits the engines' processes if the shim is killed.
    pub async fn start(program: &Path, log: &Path) -> Result<Self, ShimError> {
        prctl::set_child_subreaper(true).map_err(|errno| ShimError::Connection(errno.into()))?;
        let foreign = SharedFiles::present();
        let (own, theirs) = std::os::unix::net::UnixStream::pair().map_err(ShimError::Connection)?;
        let start = |source| ShimError::Start {
            program: program.to_owned(),
            source,
        };
        let (log, _) = private::append(log).map_err(start)?.into_parts();
        // For as long as it is the shim's: no other run takes the folder for an old one. Some file systems have no locks.
        let _ = log.lock_shared();
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
            link: Link::new(own, Vec::new())?,
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

    /// Attaches to the shim of a run whose xpyd has gone. From its first command on it is this process's.
    pub fn attach(run: KeptRun) -> Result<Self, ShimError> {
        let monitor = Monitor::stranger(run.monitor).map_err(ShimError::Connection)?;
        Ok(Self {
            is_unmonitored: matches!(monitor, Monitor::Gone),
            monitor,
            pid: run.pid,
            link: Link::new(run.stream, run.incoming)?,
            foreign: SharedFiles::present(),
        })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The process id of its monitor, which is its parent; `None` once that has ended, and where it is no child of this
    /// process.
    pub fn monitor_pid(&self) -> Option<u32> {
        match &self.monitor {
            Monitor::Child(child) => child.id(),
            Monitor::Stranger(_) | Monitor::Gone => None,
        }
    }

    /// Queues a command; [`Shim::event`] sends it. Commands are few, so the queue is bounded by them.
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
                // What the shim said last comes before the end of its monitor, which ends after it.
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

    /// Ends a shim that hangs, and whatever shim and engines have left, shared memory too. Returns the processes
    /// that did not go within a few seconds.
    pub async fn sweep(&mut self) -> Vec<LeftoverProcess> {
        let Monitor::Child(_) = &self.monitor else {
            return self.sweep_attached().await;
        };
        self.kill();
        // The monitor does it, because it goes on with it should this process be killed in the middle.
        if matches!(timeout(SWEEP_DEADLINE, self.monitor.ended()).await, Ok(true)) {
            return Vec::new();
        }
        // It was killed, or there is something that it could not end. This process inherits what it had; it has no other children.
        self.kill_monitor();
        let (shim, foreign) = (self.pid, self.foreign.clone());
        let sweeping = tokio::task::spawn_blocking(move || sweep(shim, &foreign, SWEEP_DEADLINE));
        let left = sweeping.await.expect("a sweep does not panic and is not cancelled");
        self.kill_monitor();
        left.iter().map(Process::leftover).collect()
    }

    /// [`Shim::sweep`] where shim and monitor are no descendants of this process, so that it inherits nothing of
    /// theirs: whichever of the two is left has to do it. Without a monitor, what the shim left is found by its mark.
    async fn sweep_attached(&mut self) -> Vec<LeftoverProcess> {
        let engines: Vec<Process> = Table::read()
            .descendants(i32::try_from(self.pid).unwrap_or_default())
            .into_iter()
            .cloned()
            .collect();
        // What was on its way to the shim no longer matters, and half a message would spoil the next one.
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

    /// SIGKILL to the shim, as long as its id is known to be its own: until its parent has reaped it.
    fn kill(&self) {
        let Ok(pid) = i32::try_from(self.pid) else { return };
        // Without its monitor it is a child of this process, the next subreaper above.
        let parent = self.monitor_pid().unwrap_or_else(std::process::id);
        if let Some(shim) = Process::read(pid).filter(|process| process.parent.unsigned_abs() == parent) {
            // One that ended meanwhile is as good.
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

    /// Waits until the monitor has ended, which it does as soon as the shim and all that it left have.
    pub async fn ended(&mut self) {
        if timeout(SWEEP_DEADLINE, self.monitor.ended()).await.is_err() {
            self.kill_monitor();
        }
    }
}

impl Link {
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
            // A shim that is gone cannot be written to, but its last words can still be read.
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

/// Whether a process that was reported as left over is still there.
pub fn is_still_there(process: &LeftoverProcess) -> bool {
    i32::try_from(process.pid)
        .ok()
        .and_then(Process::read)
        .is_some_and(|now| now.name == process.name)
}
