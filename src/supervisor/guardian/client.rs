//! xpyd's end of the guardian: starts it, talks to it without ever blocking, and takes over its duty if it is killed.
//!
//! Decides nothing: commands come from the driver, and events go to it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, getpid};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::time::{Instant, sleep, timeout};

use super::protocol::{self, Command, Event, LeftoverProcess, ProtocolError};
use super::shm::SharedFiles;
use super::tree::{Process, Table, Tree};
use crate::fleet::EngineId;

/// How long a fresh guardian may take to say hello: it is a re-exec and nothing more.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);

/// How long a sweep goes on before it reports what is left.
const SWEEP_DEADLINE: Duration = Duration::from_secs(5);

/// Why there is no guardian.
#[derive(Debug, thiserror::Error)]
pub enum GuardianError {
    /// The connection to it could not be made, or broke.
    #[error("connection to the guardian failed")]
    Connection(#[source] std::io::Error),
    /// Its program could not be started.
    #[error("cannot start the guardian from `{}`", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It ended, or closed the connection.
    #[error("guardian is gone")]
    Gone,
    /// It said nothing for too long.
    #[error("guardian did not answer within {} s", HELLO_DEADLINE.as_secs())]
    Silent,
    /// It said something that this version does not understand.
    #[error("guardian speaks another protocol")]
    Protocol(#[source] ProtocolError),
    /// It is of another version.
    #[error("guardian speaks protocol {theirs}, xpyd speaks {}", protocol::VERSION)]
    Version {
        /// The guardian's version.
        theirs: u32,
    },
}

/// A running guardian. Dropping it closes the connection, upon which the guardian takes every engine down by itself.
#[derive(Debug)]
pub struct Guardian {
    child: Child,
    pid: u32,
    stream: UnixStream,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// How to recognise what must be swept, should the guardian be killed.
    trees: HashMap<EngineId, Tree>,
    foreign: SharedFiles,
}

impl Guardian {
    /// Starts `program guardian` and waits for its hello. What it has to say goes to `log`.
    ///
    /// Makes this process a child subreaper, so that it inherits the engines' processes if the guardian is killed.
    pub async fn start(program: &Path, log: &Path) -> Result<Self, GuardianError> {
        prctl::set_child_subreaper(true).map_err(|errno| GuardianError::Connection(errno.into()))?;
        let foreign = SharedFiles::present();
        let (own, theirs) = std::os::unix::net::UnixStream::pair().map_err(GuardianError::Connection)?;
        own.set_nonblocking(true).map_err(GuardianError::Connection)?;
        let start = |source| GuardianError::Start {
            program: program.to_owned(),
            source,
        };
        let log = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(log)
            .map_err(start)?;
        let child = tokio::process::Command::new(program)
            .arg("guardian")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(start)?;
        let mut guardian = Self {
            pid: child.id().ok_or(GuardianError::Gone)?,
            child,
            stream: UnixStream::from_std(own).map_err(GuardianError::Connection)?,
            incoming: Vec::new(),
            outgoing: Vec::new(),
            trees: HashMap::new(),
            foreign,
        };
        match timeout(HELLO_DEADLINE, guardian.event()).await {
            Ok(Ok(Event::Hello { version })) if version == protocol::VERSION => Ok(guardian),
            Ok(Ok(Event::Hello { version })) => Err(GuardianError::Version { theirs: version }),
            Ok(Ok(_)) => Err(GuardianError::Gone),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(GuardianError::Silent),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Queues a command; [`Guardian::event`] sends it. Commands are few, so the queue is bounded by them.
    pub fn send(&mut self, command: &Command) -> Result<(), ProtocolError> {
        protocol::encode(command, &mut self.outgoing)
    }

    /// Sends what is queued and returns the next event. Safe to cancel.
    pub async fn event(&mut self) -> Result<Event, GuardianError> {
        loop {
            if let Some(event) = protocol::decode(&mut self.incoming).map_err(GuardianError::Protocol)? {
                self.note(&event);
                return Ok(event);
            }
            let interest = if self.outgoing.is_empty() {
                Interest::READABLE
            } else {
                Interest::READABLE | Interest::WRITABLE
            };
            let ready = self.stream.ready(interest).await.map_err(GuardianError::Connection)?;
            // A guardian that is gone cannot be written to, but its last words can still be read.
            if ready.is_writable()
                && let Ok(count) = self.stream.try_write(&self.outgoing)
            {
                self.outgoing.drain(..count);
            }
            if ready.is_readable() {
                let mut buffer = [0; 1 << 12];
                match self.stream.try_read(&mut buffer) {
                    Ok(0) => return Err(GuardianError::Gone),
                    Ok(count) => self.incoming.extend_from_slice(&buffer[..count]),
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(GuardianError::Connection(error)),
                }
            }
        }
    }

    fn note(&mut self, event: &Event) {
        match event {
            Event::Spawned {
                engine,
                incarnation,
                pid,
                pipe,
            } => {
                if let Ok(leader) = i32::try_from(*pid) {
                    let tree = Tree::new(leader, *pipe, Tree::mark(self.pid, engine, *incarnation));
                    self.trees.insert(engine.clone(), tree);
                }
            }
            Event::TreeEmpty { engine, .. } => {
                self.trees.remove(engine);
            }
            Event::Hello { .. } | Event::SpawnFailed { .. } | Event::Exited { .. } | Event::Leftover { .. } => {}
        }
    }

    /// Does what the guardian no longer can: ends it if it still hangs around, kills every tree it had started, and
    /// removes their shared memory. Returns the processes that did not go within a few seconds.
    pub async fn sweep(&mut self) -> Vec<LeftoverProcess> {
        // An error means that it is gone already; once it is gone its children are this process's.
        let _ = self.child.start_kill();
        let _ = timeout(SWEEP_DEADLINE, self.child.wait()).await;
        let own = getpid().as_raw();
        let mut shared_files = SharedFiles::default();
        let deadline = Instant::now() + SWEEP_DEADLINE;
        loop {
            let table = Table::read();
            let members: Vec<Process> = self
                .trees
                .values_mut()
                .flat_map(|tree| tree.members(&table, own))
                .collect();
            if members.is_empty() {
                shared_files.remove_unused();
                return Vec::new();
            }
            if Instant::now() >= deadline {
                return members.iter().map(Process::leftover).collect();
            }
            shared_files.add_used_by(members.iter().map(|process| process.pid), &self.foreign);
            for tree in self.trees.values_mut() {
                tree.freeze_and_kill(own);
            }
            sleep(Duration::from_millis(10)).await;
            for process in &members {
                // Those with another parent are reaped by it, or by a later turn.
                let _ = waitpid(Pid::from_raw(process.pid), Some(WaitPidFlag::WNOHANG));
            }
        }
    }

    /// Waits until the guardian's process has ended after it closed the connection, which takes no time.
    pub async fn ended(&mut self) {
        if timeout(SWEEP_DEADLINE, self.child.wait()).await.is_err() {
            let _ = self.child.start_kill();
        }
    }
}

/// Whether a process that was reported as left over is still there.
pub fn is_still_there(process: &LeftoverProcess) -> bool {
    i32::try_from(process.pid)
        .ok()
        .and_then(Process::read)
        .is_some_and(|now| now.name == process.name)
}
