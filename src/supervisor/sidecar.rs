//! A server that one engine needs, such as LMCache's cache server: it starts first, and the engine ends with it.
//!
//! The engine's leader runs this before it becomes the engine, so for the shim both are one tree with one leader, one log and one
//! end. It knows neither what the sidecar serves nor what the engine is.

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

/// Time between two connection attempts to the sidecar's port, and the timeout of one.
const TRY_EVERY: Duration = Duration::from_millis(50);
const TRY: Duration = Duration::from_secs(1);

/// The name of the process that watches a sidecar, as `ps` shows it.
pub(super) const WATCHER_NAME: &str = "xpyd-sidecar";
const NAME: &std::ffi::CStr = c"xpyd-sidecar";

/// An engine and its sidecar.
#[derive(Debug)]
pub struct Sidecar<'words> {
    /// The port on which the sidecar listens; then the engine can start.
    pub address: (&'words str, u16),
    /// How long the sidecar can take until then.
    pub deadline: Duration,
    /// How long the engine can take to exit after the sidecar has ended.
    pub grace: Duration,
    /// The sidecar's program and arguments.
    pub command: &'words [String],
    /// The engine's program and arguments.
    pub engine: &'words [String],
}

/// Why the engine did not start, or ends.
#[derive(Debug, thiserror::Error)]
pub enum SidecarError {
    /// Either command line is empty.
    #[error("the command line of the engine or of its sidecar is empty")]
    Empty,
    /// A program cannot be started.
    #[error("cannot start `{0}`")]
    Start(String, #[source] io::Error),
    /// The sidecar ended before it listened.
    #[error("its sidecar `{command}` ended ({ended}) before it listened on port {port}")]
    Ended {
        /// The sidecar's program and verb.
        command: String,
        /// Its exit code or signal.
        ended: String,
        /// The port it had to listen on.
        port: u16,
    },
    /// The sidecar did not listen in time.
    #[error("its sidecar `{command}` did not listen on port {port} within {}", humantime::format_duration(*.deadline))]
    Deaf {
        /// The sidecar's program and verb.
        command: String,
        /// The port it had to listen on.
        port: u16,
        /// The time it had.
        deadline: Duration,
    },
    /// The sidecar ended, and the engine ends with it.
    #[error("its sidecar `{0}` ended, so the engine ends too")]
    Lost(String),
    /// A system call failed.
    #[error("cannot {0}")]
    System(&'static str, #[source] io::Error),
}

impl Sidecar<'_> {
    /// Starts the sidecar, and becomes the engine once the sidecar listens. Returns only if the engine did not start, and in the
    /// process that watches the sidecar. The caller must have no other thread.
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

    /// The sidecar's name in messages: its program and its verb.
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
        // Only this process reaps it, so its id cannot belong to another process.
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

    /// Forks a process that ends the engine when the sidecar ends, and returns in the leader.
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

    /// Runs the watcher. It ends with its leader at the latest.
    fn end_engine_after(&self, end: &OwnedFd, leader: Pid, report: impl FnOnce(&SidecarError)) {
        // Neither can fail for a signal and a name that are valid.
        let _ = prctl::set_pdeathsig(Signal::SIGKILL);
        let _ = prctl::set_name(NAME);
        // If the leader ended before the first line, no signal ends this process.
        if getppid() != leader {
            return;
        }
        while !has_ended(end, Duration::MAX) {}
        report(&SidecarError::Lost(self.name()));
        // SIGTERM lets requests in flight finish. An engine that hangs because the sidecar is gone gets SIGKILL.
        let _ = kill(leader, Signal::SIGTERM);
        pause(self.grace);
        let _ = kill(leader, Signal::SIGKILL);
    }
}

/// Waits up to this time until the process of the descriptor ends. Returns whether it has.
fn has_ended(end: &OwnedFd, wait: Duration) -> bool {
    let mut watched = [PollFd::new(end.as_fd(), PollFlags::POLLIN)];
    poll(&mut watched, poll_timeout(wait)).is_ok_and(|ended| ended > 0)
}

fn pause(time: Duration) {
    // No signal is sent to this process that would end the wait early.
    let _ = poll(&mut [], poll_timeout(time));
}

fn poll_timeout(time: Duration) -> PollTimeout {
    PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX)
}

/// Whether a process accepts connections on the port.
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

/// The kernel kills the program when this thread ends, which is when the engine ends.
#[expect(unsafe_code, reason = "`pre_exec` is the only way to run code between fork and exec")]
fn end_with_parent(command: &mut Command) {
    let parent = getpid();
    // SAFETY: the closure makes two system calls (prctl, getppid), allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            // If the parent ended before the line above, the kernel does not kill this process.
            if getppid() == parent {
                Ok(())
            } else {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        });
    }
}
