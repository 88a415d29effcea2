//! The end of everything that descends from this process: for whoever inherits what a guardian left behind.
//!
//! Knows no engines: a process that was reparented to a child subreaper of the run belongs to the run.

use std::time::Duration;

use nix::poll::{PollTimeout, poll};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, getpid};
use tokio::time::Instant;

use super::shm::SharedFiles;
use super::tree::{Process, Table, freeze_and_kill};

/// Milliseconds between two looks.
const LOOK_AGAIN: u8 = 5;

/// Kills all descendants of this process, and removes what they use in `/dev/shm` unless it is in `foreign`,
/// until nothing is left or `deadline` has passed. Returns the processes that are left.
///
/// Blocks. Only finds what this process has inherited if it is a child subreaper.
pub(super) fn sweep(foreign: &SharedFiles, deadline: Duration) -> Vec<Process> {
    let own = getpid().as_raw();
    let strays = |table: &Table| -> Vec<Process> { table.descendants(own).into_iter().cloned().collect() };
    let give_up = Instant::now() + deadline;
    let mut shared_files = SharedFiles::default();
    loop {
        let found = strays(&Table::read());
        if found.is_empty() {
            shared_files.remove_unused();
            return found;
        }
        if Instant::now() >= give_up {
            return found;
        }
        shared_files.add_used_by(found.iter().map(|process| process.pid), foreign);
        freeze_and_kill(strays);
        // Not a sleep by name only: there is nothing else to wait for.
        let _ = poll(&mut [], PollTimeout::from(LOOK_AGAIN));
        for process in &found {
            // Those with another parent are reaped by it, or by a later turn.
            let _ = waitpid(Pid::from_raw(process.pid), Some(WaitPidFlag::WNOHANG));
        }
    }
}
