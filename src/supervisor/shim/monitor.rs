//! The monitor: the parent of the shim. It waits for the shim's end, and then ends what the shim left.
//!
//! When the shim is killed, the kernel kills the leaders, but not what they started. Those processes are reparented to the nearest
//! child subreaper above, the monitor. It outlives xpyd as well, so nothing is left when both are killed at once. It holds no
//! socket, so the kernel closes both ends of the shim's socket when their owners die.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use super::shm::SharedFiles;
use super::sweep::sweep;
use crate::report::ExitStatus;

/// How long the monitor tries to end what the shim left. After that signals stay pending.
pub(super) const MONITOR_DEADLINE: Duration = Duration::from_secs(3);

/// The process name that `ps` shows.
pub(super) const MONITOR_NAME: &str = "xpyd-monitor";
const NAME: &std::ffi::CStr = c"xpyd-monitor";

/// Which of the two processes this is.
#[derive(Debug)]
pub(super) enum ForkSide {
    /// The child, with the socket to xpyd.
    Shim(UnixStream),
    /// The parent, after its work is done, with its exit code.
    Monitor(ExitStatus),
}

/// Forks the shim; this process becomes its monitor. Returns in both: at once in the shim, in the monitor once nothing of the shim
/// is left. The caller must have no other thread.
#[expect(
    unsafe_code,
    reason = "a fork shares all memory, where a second program would take megabytes"
)]
pub(super) fn fork_shim(control: UnixStream) -> io::Result<ForkSide> {
    prctl::set_child_subreaper(true)?;
    let foreign = SharedFiles::present();
    let null = std::fs::File::open("/dev/null")?;
    // SAFETY: this process has a single thread, so the child finds no lock held and no data half-changed.
    match unsafe { fork() }? {
        ForkResult::Child => Ok(ForkSide::Shim(control)),
        ForkResult::Parent { child } => {
            drop(control);
            // Neither can fail for a valid descriptor and name, and the monitor must wait in any case.
            let _ = nix::unistd::dup2_stdin(null);
            let _ = prctl::set_name(NAME);
            Ok(ForkSide::Monitor(watch(child, &foreign)))
        }
    }
}

/// Waits for the shim's end, and ends what it left. Success means that nothing is left, however the shim ended.
fn watch(shim: Pid, foreign: &SharedFiles) -> ExitStatus {
    let code = loop {
        match waitpid(shim, None) {
            Ok(WaitStatus::Exited(_, code)) => break Some(code),
            Ok(WaitStatus::Signaled(..)) => break None,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => break None,
        }
    };
    // The shim has tried long enough, and has reported what is left.
    let gave_up = code == Some(i32::from(ExitStatus::TeardownIncomplete.code()));
    if gave_up || !sweep(shim.as_raw().unsigned_abs(), foreign, MONITOR_DEADLINE).is_empty() {
        ExitStatus::TeardownIncomplete
    } else {
        ExitStatus::Success
    }
}
