//! A server that one engine cannot do without, as LMCache's cache server: it starts first, and the engine ends with it.
//!
//! The engine's leader runs this before it becomes the engine, so to the shim sidecar and engine are one tree
//! with one leader, one log and one end. Knows neither what the sidecar serves nor what the engine is.

use std::io;
use std::net::{TcpStream, ToSocketAddrs as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{ForkResult, Pid, fork, getpid, getppid};
use rustix::process::{PidfdFlags, pidfd_open};
use tokio::time::Instant;

/// How often the sidecar's port is tried, and how long one try may take.
const TRY_EVERY: Duration = Duration::from_millis(50);
const TRY: Duration = Duration::from_secs(1);

/// The name of the process that watches a sidecar, as `ps` shows it.
pub(super) const WATCHER_NAME: &str = "xpyd-sidecar";
const NAME: &std::ffi::CStr = c"xpyd-sidecar";

/// An engine and its sidecar.
#[derive(Debug)]
pub struct Sidecar<'words> {
    /// Where the sidecar listens once the engine may start.
    pub address: (&'words str, u16),
    /// How long it may take until then.
    pub deadline: Duration,
    /// How long the engine may take to leave once the sidecar has ended.
    pub grace: Duration,
    /// The sidecar's program and arguments.
    pub command: &'words [String],
    /// The engine's.
    pub engine: &'words [String],
}

/// Why there is no engine.
#[derive(Debug, thiserror::Error)]
pub enum SidecarError {
    /// Either command line is empty.
    #[error("the command line of the engine or of its sidecar is empty")]
    Empty,
    /// A program cannot be started.
    #[error("cannot start `{0}`")]
    Start(String, #[source] io::Error),
    /// It ended before it listened.
    #[error("its sidecar `{command}` ended ({ended}) before it listened on port {port}")]
    Ended {
        /// The sidecar.
        command: String,
        /// How it ended.
        ended: String,
        /// Where it should have listened.
        port: u16,
    },
    /// It does not listen in time.
    #[error("its sidecar `{command}` did not listen on port {port} within {}", humantime::format_duration(*.deadline))]
    Deaf {
        /// The sidecar.
        command: String,
        /// Where it should have listened.
        port: u16,
        /// For how long it was waited for.
        deadline: Duration,
    },
    /// It ended, and the engine ends with it.
    #[error("its sidecar `{0}` ended, so the engine ends too")]
    Lost(String),
    /// The system refused something.
    #[error("cannot {0}")]
    System(&'static str, #[source] io::Error),
}

impl Sidecar<'_> {
    /// Starts the sidecar, and becomes the engine once it listens. Returns only when there is no engine, and in
    /// the process that watches the sidecar. The caller must have no other thread.
    pub fn lead(&self, report: impl FnOnce(&SidecarError)) -> SidecarError {
        let Some((engine, arguments)) = self.engine.split_first() else {
            return SidecarError::Empty;
        };
        let ready = self.start().and_then(|(mut sidecar, end)| {
            self.wait_until_listening(&mut sidecar, &end)?;
            self.watch(&end, report)
        });
        if let Err(error) = ready {
            return error;
        }
        SidecarError::Start(engine.clone(), Command::new(engine).args(arguments).exec())
    }

    /// What people call the sidecar: its program and its verb.
    fn name(&self) -> String {
        self.command.iter().take(2).cloned().collect::<Vec<_>>().join(" ")
    }

    /// The sidecar, and a descriptor that becomes readable when it ends.
    fn start(&self) -> Result<(Child, OwnedFd), SidecarError> {
        let (program, arguments) = self.command.split_first().ok_or(SidecarError::Empty)?;
        let mut command = Command::new(program);
        command.args(arguments);
        end_with_parent(&mut command);
        let sidecar = command
            .spawn()
            .map_err(|error| SidecarError::Start(program.clone(), error))?;
        // Nobody reaps it meanwhile, so its id cannot be another's.
        let end = i32::try_from(sidecar.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            .ok_or(io::Error::from(io::ErrorKind::NotFound))
            .and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
        let end = end.map_err(|error| SidecarError::System("watch the sidecar", error))?;
        Ok((sidecar, end))
    }

    fn wait_until_listening(&self, sidecar: &mut Child, end: &OwnedFd) -> Result<(), SidecarError> {
        let (host, port) = self.address;
        let began = Instant::now();
        while began.elapsed() < self.deadline {
            if has_ended(end, TRY_EVERY) {
                let ended = sidecar.wait();
                let ended = ended.map_err(|error| SidecarError::System("wait for the sidecar", error))?;
                return Err(SidecarError::Ended {
                    command: self.name(),
                    ended: ending(ended),
                    port,
                });
            }
            if listens(host, port) {
                return Ok(());
            }
        }
        Err(SidecarError::Deaf {
            command: self.name(),
            port,
            deadline: self.deadline,
        })
    }

    /// Leaves a process behind that ends the engine when the sidecar ends, and returns in the leader.
    #[expect(
        unsafe_code,
        reason = "a fork shares all memory, where a second program would take megabytes"
    )]
    fn watch(&self, end: &OwnedFd, report: impl FnOnce(&SidecarError)) -> Result<(), SidecarError> {
        let leader = getpid();
        // SAFETY: this process has a single thread, so the child finds no lock held and no data half-changed.
        let forked = unsafe { fork() };
        match forked.map_err(|error| SidecarError::System("fork the sidecar's watcher", error.into()))? {
            ForkResult::Parent { .. } => Ok(()),
            ForkResult::Child => {
                self.end_engine_after(end, leader, report);
                Err(SidecarError::Lost(self.name()))
            }
        }
    }

    /// The whole life of the watcher. It ends with its leader at the latest.
    fn end_engine_after(&self, end: &OwnedFd, leader: Pid, report: impl FnOnce(&SidecarError)) {
        // Neither can fail for a signal and a name that are valid.
        let _ = prctl::set_pdeathsig(Signal::SIGKILL);
        let _ = prctl::set_name(NAME);
        // Had the leader ended before the first line, nobody would end this process.
        if getppid() != leader {
            return;
        }
        while !has_ended(end, Duration::MAX) {}
        report(&SidecarError::Lost(self.name()));
        // The first signal lets answers in flight end. One that hangs because the sidecar is gone gets the second.
        let _ = kill(leader, Signal::SIGTERM);
        pause(self.grace);
        let _ = kill(leader, Signal::SIGKILL);
    }
}

/// Waits for the end that the descriptor stands for, for so long at most; whether it has come.
fn has_ended(end: &OwnedFd, wait: Duration) -> bool {
    let mut watched = [PollFd::new(end.as_fd(), PollFlags::POLLIN)];
    poll(&mut watched, poll_timeout(wait)).is_ok_and(|ended| ended > 0)
}

fn pause(time: Duration) {
    // Nobody sends this process a signal that would end it early.
    let _ = poll(&mut [], poll_timeout(time));
}

fn poll_timeout(time: Duration) -> PollTimeout {
    PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX)
}

/// Whether somebody takes connections there.
fn listens(host: &str, port: u16) -> bool {
    let addresses = (host, port).to_socket_addrs().into_iter().flatten();
    addresses
        .into_iter()
        .any(|address| TcpStream::connect_timeout(&address, TRY).is_ok())
}

/// `exit code 1`, `signal 9`.
fn ending(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or_default()),
    }
}

/// The program will be killed as soon as this thread ends, which is when the engine does.
#[expect(unsafe_code, reason = "`pre_exec` is the only way to run code between fork and exec")]
fn end_with_parent(command: &mut Command) {
    let parent = getpid();
    // SAFETY: the closure makes two system calls (prctl, getppid), allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            // Had the parent ended before the line above, nobody would kill this process.
            if getppid() == parent {
                Ok(())
            } else {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        });
    }
}
