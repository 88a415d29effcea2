//! Ends all descendants of this process: for the process that inherits what a shim left.
//!
//! It knows no engines: a process that was reparented to a child subreaper of the run belongs to the run.

use std::time::Duration;

use nix::poll::{PollTimeout, poll};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, getpid};
use tokio::time::Instant;

use super::cgroup::Cgroup;
use super::shm::SharedFiles;
use super::tree::{Process, Tree, freeze, kill_all};

/// Milliseconds between two checks.
const LOOK_AGAIN: u8 = 5;

/// Removes the files in `/dev/shm` that only descendants of this process use (without those in `foreign`), and kills the
/// descendants, until none is left or `deadline` has passed. Then removes the cgroups of `shim`. Returns the processes that are left.
///
/// Files go first: if this process is killed meanwhile, the next sweep finds them through the processes that still run. Blocks.
/// Finds inherited processes only if this process is a child subreaper.
pub(super) fn sweep(shim: u32, foreign: &SharedFiles, deadline: Duration) -> Vec<Process> {
    let own = getpid().as_raw();
    let give_up = Instant::now() + deadline;
    loop {
        let found = freeze(|table| table.descendants(own).into_iter().cloned().collect());
        if found.is_empty() {
            for cgroup in Cgroup::named(&Tree::cgroups_of(shim)) {
                cgroup.kill();
                cgroup.remove();
            }
        }
        if found.is_empty() || Instant::now() >= give_up {
            return found;
        }
        let pids: Vec<i32> = found.iter().map(|process| process.pid).collect();
        let mut shared_files = SharedFiles::default();
        shared_files.add_used_by(pids.iter().copied(), foreign);
        shared_files.remove_unused(&pids);
        kill_all(&found);
        // There is nothing else to wait for.
        let _ = poll(&mut [], PollTimeout::from(LOOK_AGAIN));
        for pid in pids {
            // Processes with another parent are reaped by it, or in a later turn.
            let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
        }
    }
}
