//! The monitor: the parent of the shim, which does nothing but wait for its end, and then ends what it left.
//!
//! A shim that is killed takes the leaders with it, but not what they started. Their processes are reparented to the
//! nearest child subreaper above, which is the monitor: it outlives xpyd as well, so nothing is left when both are killed
//! at once. It holds no socket, so that both ends of the shim's are closed by the kernel when their owners die.

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

/// How long the monitor tries to end what the shim left. Signals stay pending beyond that.
pub(super) const MONITOR_DEADLINE: Duration = Duration::from_secs(3);

/// The name of the process, as `ps` shows it.
pub(super) const MONITOR_NAME: &str = "xpyd-monitor";
const NAME: &std::ffi::CStr = c"xpyd-monitor";

/// Which of the two processes this is.
#[derive(Debug)]
pub(super) enum Part {
    /// The child, with the control socket.
    Shim(UnixStream),
    /// The parent, after its work is done, with its exit code.
    Monitor(ExitStatus),
}

/// Makes this process the monitor of a new one, and returns in both: at once in the shim, in the monitor once
/// nothing of the shim is left. The caller must have no other thread.
#[expect(
    unsafe_code,
    reason = "a fork shares all memory, where a second program would take megabytes"
)]
pub(super) fn split(control: UnixStream) -> io::Result<Part> {
    prctl::set_child_subreaper(true)?;
    let foreign = SharedFiles::present();
    let null = std::fs::File::open("/dev/null")?;
    // SAFETY: this process has a single thread, so the child finds no lock held and no data half-changed.
    match unsafe { fork() }? {
        ForkResult::Child => Ok(Part::Shim(control)),
        ForkResult::Parent { child } => {
            drop(control);
            // Neither can fail for a descriptor and a name that are valid, and it must watch whatever happens.
            let _ = nix::unistd::dup2_stdin(null);
            let _ = prctl::set_name(NAME);
            Ok(Part::Monitor(watch(child, &foreign)))
        }
    }
}

/// Waits for the shim's end, and ends what it left. Success means that nothing of it is there, however it ended.
fn watch(shim: Pid, foreign: &SharedFiles) -> ExitStatus {
    let code = loop {
        match waitpid(shim, None) {
            Ok(WaitStatus::Exited(_, code)) => break Some(code),
            Ok(WaitStatus::Signaled(..)) => break None,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => break None,
        }
    };
    // It has tried for long enough, and has said what is left.
    let gave_up = code == Some(i32::from(ExitStatus::TeardownIncomplete.code()));
    if gave_up || !sweep(shim.as_raw().unsigned_abs(), foreign, MONITOR_DEADLINE).is_empty() {
        ExitStatus::TeardownIncomplete
    } else {
        ExitStatus::Success
    }
}
