//! xpyd as the first process of a container: it starts itself in a child, forwards signals, and reaps orphans.
//!
//! The kernel gives orphans to the first process. It must wait for them, or they stay as zombies. xpyd itself only waits
//! for its own children.

use std::io::{self, IsTerminal as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpid, tcsetpgrp};

/// Runs the whole program in a child if this is the first process. `None` if it is not, or if no child can be started.
pub(super) fn run() -> Option<ExitCode> {
    (getpid() == Pid::from_raw(1)).then(start)?.ok()
}

fn start() -> io::Result<ExitCode> {
    // The kernel drops signals that the first process neither handles nor blocks.
    SigSet::all().thread_set_mask()?;
    let signals = SignalFd::with_flags(&SigSet::all(), SfdFlags::SFD_CLOEXEC)?;
    let child = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        // Ctrl+C goes to the foreground process group, so it arrives once.
        .process_group(0)
        .spawn()?;
    let child = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    if io::stdin().is_terminal() {
        // Without a controlling terminal there is no foreground group.
        let _ = tcsetpgrp(io::stdin(), child);
    }
    loop {
        let signal = match signals.read_signal() {
            Ok(Some(signal)) => i32::try_from(signal.ssi_signo)
                .ok()
                .and_then(|number| Signal::try_from(number).ok()),
            Ok(None) | Err(Errno::EINTR) => None,
            Err(errno) => return Err(errno.into()),
        };
        match signal {
            Some(Signal::SIGCHLD) => {
                if let Some(ended) = reap(child) {
                    return Ok(ended);
                }
            }
            // Signals of a terminal are for the process that reads and writes there.
            Some(Signal::SIGTTIN | Signal::SIGTTOU | Signal::SIGTSTP) | None => {}
            Some(signal) => drop(kill(child, signal)),
        }
    }
}

/// Waits for all children that have ended. Returns the exit code if `child` is among them.
fn reap(child: Pid) -> Option<ExitCode> {
    let mut ended = None;
    loop {
        let (pid, code) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => (pid, code),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as i32),
            Err(Errno::EINTR) => continue,
            Ok(_) | Err(_) => return ended,
        };
        if pid == child {
            ended = Some(u8::try_from(code).unwrap_or(u8::MAX).into());
        }
    }
}
