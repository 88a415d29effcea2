//! One incarnation of an engine in the shim: starts it, reads its output, ends its tree.
//!
//! It knows no socket: it returns events, and `process` sends them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::unistd::{getpid, getppid, setsid, write};
use tokio::time::Instant;

use super::cgroup::Cgroup;
use super::log::{Drained, Log};
use super::protocol::{Event, KeptEngine, KeptState, LeftoverProcess, Spawn};
use super::shm::SharedFiles;
use super::tree::{MARK_VARIABLE, Process, ProcessTable, Tree};
use crate::fleet::Exit;
use crate::fleet::{EngineId, Incarnation};

/// How long processes can outlive SIGKILL before they are reported, after which the engine is not started again. A process
/// needs CPU time to exit, and the driver of a GPU takes many seconds to free its memory.
const LEFTOVER_AFTER: Duration = Duration::from_secs(30);

/// Time between two kills of a tree that is not empty. Longer once it was reported.
const KILL_AGAIN: Duration = Duration::from_millis(20);
const KILL_AGAIN_REPORTED: Duration = Duration::from_millis(500);

/// The longest grace of an engine after xpyd has disappeared.
const ORPHAN_GRACE: Duration = Duration::from_secs(10);

/// A running incarnation.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) id: EngineId,
    incarnation: Incarnation,
    leader: Process,
    /// How the leader ended; `None` while it runs.
    exit: Option<Exit>,
    tree: Tree,
    log: Option<Log>,
    shared_files: SharedFiles,
    startup_finished: bool,
    terminated: bool,
    /// Whether the processes that outlived the leader got SIGTERM as well.
    rest_is_told: bool,
    stop_grace: Duration,
    termination: Termination,
    memo: serde_json::Value,
}

/// The engine's log, if it has one, and its standard output and error.
fn output(spawn: &Spawn) -> Result<(Option<Log>, [OwnedFd; 2]), String> {
    let no_copy = |error| format!("cannot duplicate its output: {error}");
    let (log, writer) = match &spawn.log {
        Some(path) => {
            let opened = Log::open(path, spawn.log_limits);
            let (log, writer) =
                opened.map_err(|error| format!("cannot write its log `{}`: {error}", path.display()))?;
            (Some(log), writer)
        }
        None => (None, io::stderr().as_fd().try_clone_to_owned().map_err(no_copy)?),
    };
    let copy = writer.try_clone().map_err(no_copy)?;
    Ok((log, [writer, copy]))
}

/// How far the end of the tree has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Termination {
    /// No SIGKILL is due.
    None,
    /// The tree gets SIGKILL at this time, unless it is gone by then.
    KillAt(Instant),
    /// SIGKILL was first sent at `since`; `again` is when to check next.
    Killing {
        since: Instant,
        again: Instant,
        reported: bool,
    },
}

impl Engine {
    /// Starts the engine. The error is a sentence for the user.
    pub(super) fn spawn(spawn: Spawn) -> Result<Self, String> {
        let (log, [output, errors]) = output(&spawn)?;
        let mark = Tree::mark(std::process::id(), &spawn.engine, spawn.incarnation);
        let cgroup = Cgroup::create(&Tree::cgroup_name(std::process::id(), &spawn.engine, spawn.incarnation));
        let entrance = cgroup.as_ref().and_then(|cgroup| cgroup.entrance().ok());
        let (program, arguments) = spawn.argv.split_first().ok_or("its command line is empty")?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .envs(&spawn.env)
            .env(MARK_VARIABLE, &mark)
            .current_dir(&spawn.directory)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors);
        prepare_leader(&mut command, entrance);
        let child = command
            .spawn()
            .inspect_err(|_| {
                if let Some(cgroup) = &cgroup {
                    cgroup.remove();
                }
            })
            .map_err(|error| format!("cannot start `{program}`: {error}"))?;
        // The process cannot be reaped before this returns, because only the loop in `process` reaps.
        let leader = i32::try_from(child.id())
            .ok()
            .and_then(Process::read)
            .ok_or("its process is not in /proc")?;
        Ok(Self {
            tree: Tree::new(leader.pid, log.as_ref().map(Log::inode), mark, cgroup),
            id: spawn.engine,
            incarnation: spawn.incarnation,
            leader,
            exit: None,
            log,
            shared_files: SharedFiles::default(),
            startup_finished: false,
            terminated: false,
            rest_is_told: false,
            stop_grace: spawn.stop_grace,
            termination: Termination::None,
            memo: spawn.memo,
        })
    }

    /// The event that reports its start.
    pub(super) fn spawned(&self) -> Event {
        Event::Spawned {
            engine: self.id.clone(),
            incarnation: self.incarnation,
            pid: self.leader.pid.unsigned_abs(),
        }
    }

    /// Records that its start is over.
    pub(super) fn finish_startup(&mut self) {
        self.startup_finished = true;
    }

    /// The log pipe to poll, while a process can write to it.
    pub(super) fn log_descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.log.as_ref().map(Log::descriptor)
    }

    /// Moves its output to its log file.
    pub(super) fn drain_log(&mut self) {
        if self.log.as_mut().is_some_and(|log| log.drain() == Drained::Closed) {
            self.log = None;
        }
    }

    /// SIGTERM to the leader, once.
    pub(super) fn terminate(&mut self, foreign: &SharedFiles) {
        if self.exit.is_none() && !self.terminated {
            self.terminated = true;
            self.update_tree(&ProcessTable::read(), foreign);
            // A leader that has ended is reaped in this turn of the loop.
            let _ = self.leader.signal(Signal::SIGTERM);
        }
    }

    /// xpyd is gone: an engine that served gets a bounded grace, one that was still starting gets none.
    pub(super) fn end_orphaned(&mut self, foreign: &SharedFiles, now: Instant) {
        if matches!(self.termination, Termination::None) {
            if self.startup_finished {
                self.terminate(foreign);
                self.termination = Termination::KillAt(now + self.stop_grace.min(ORPHAN_GRACE));
            } else {
                self.kill(foreign, now);
            }
        }
    }

    /// xpyd is gone and the shim waits for the next one: only an engine that was stopping, or has lost its leader, is ended.
    pub(super) fn keep(&mut self, foreign: &SharedFiles, now: Instant) {
        if self.exit.is_some() {
            self.kill(foreign, now);
        } else if self.terminated {
            self.end_orphaned(foreign, now);
        }
    }

    /// Its state, for an xpyd that attaches.
    pub(super) fn kept(&self) -> KeptEngine {
        let state = if self.exit.is_some() || self.terminated || !matches!(self.termination, Termination::None) {
            KeptState::Leaving { exit: self.exit }
        } else {
            KeptState::Running {
                pid: self.leader.pid.unsigned_abs(),
                startup_finished: self.startup_finished,
            }
        };
        KeptEngine {
            engine: self.id.clone(),
            incarnation: self.incarnation,
            state,
            memo: self.memo.clone(),
        }
    }

    /// Its state once its tree is empty.
    pub(super) fn gone(&self) -> KeptEngine {
        KeptEngine {
            state: KeptState::Gone { exit: self.exit },
            ..self.kept()
        }
    }

    /// SIGKILL to the whole tree, repeated until it is empty.
    pub(super) fn kill(&mut self, foreign: &SharedFiles, now: Instant) {
        if !matches!(self.termination, Termination::Killing { .. }) {
            self.kill_members(foreign);
            self.termination = Termination::Killing {
                since: now,
                again: now + KILL_AGAIN,
                reported: false,
            };
        }
    }

    /// SIGKILL to all current processes of the tree. Returns them.
    ///
    /// Removes its files in `/dev/shm` first: if this process is killed meanwhile, the next sweep finds them only through processes
    /// that still run.
    fn kill_members(&mut self, foreign: &SharedFiles) -> Vec<Process> {
        let frozen = self.tree.freeze(getpid().as_raw());
        let pids: Vec<i32> = frozen.iter().map(|process| process.pid).collect();
        self.shared_files.add_used_by(pids.iter().copied(), foreign);
        self.shared_files.remove_unused(&pids);
        self.tree.kill(&frozen);
        frozen
    }

    /// When [`Engine::tick`] is due.
    pub(super) fn next_tick(&self) -> Option<Instant> {
        match self.termination {
            Termination::None => None,
            Termination::KillAt(at) => Some(at),
            Termination::Killing { again, .. } => Some(again),
        }
    }

    /// Sends due signals. Returns processes that outlived SIGKILL, once.
    pub(super) fn tick(&mut self, foreign: &SharedFiles, now: Instant) -> Option<Event> {
        match self.termination {
            Termination::None => None,
            Termination::KillAt(at) => {
                if now >= at {
                    self.kill(foreign, now);
                }
                None
            }
            Termination::Killing { again, .. } if now < again => None,
            Termination::Killing { since, reported, .. } => {
                let left = self.kill_members(foreign);
                let report = !reported && now >= since + LEFTOVER_AFTER && !left.is_empty();
                let reported = reported || report;
                let again = now + if reported { KILL_AGAIN_REPORTED } else { KILL_AGAIN };
                self.termination = Termination::Killing { since, again, reported };
                report.then(|| Event::Leftover {
                    engine: Some(self.id.clone()),
                    processes: left.iter().map(Process::leftover).collect(),
                })
            }
        }
    }

    /// Handles a reaped process. Returns the event if it was the leader; then its last output is in the log file.
    pub(super) fn reaped(&mut self, pid: i32, exit: Exit) -> Option<Event> {
        if self.exit.is_some() || pid != self.leader.pid {
            return None;
        }
        self.exit = Some(exit);
        self.drain_log();
        Some(Event::Exited {
            engine: self.id.clone(),
            incarnation: self.incarnation,
            exit,
        })
    }

    /// Reads which processes are in the tree and what they hold in `/dev/shm`. If all are gone, cleans up after them and returns the
    /// event.
    pub(super) fn update_tree(&mut self, table: &ProcessTable, foreign: &SharedFiles) -> Option<Event> {
        let members = self.tree.members(table, getpid().as_raw());
        self.shared_files
            .add_used_by(members.iter().map(|process| process.pid), foreign);
        if self.exit.is_none() || !members.is_empty() {
            self.terminate_rest(&members);
            return None;
        }
        self.drain_log();
        self.shared_files.remove_unused(&[]);
        self.tree.remove();
        Some(Event::TreeEmpty {
            engine: self.id.clone(),
            incarnation: self.incarnation,
        })
    }

    /// A leader that is only a wrapper ends by SIGTERM without passing it on, so the rest of the tree gets a SIGTERM as well.
    fn terminate_rest(&mut self, members: &[Process]) {
        if self.exit.is_some() && self.terminated && !self.rest_is_told {
            self.rest_is_told = true;
            for member in members {
                // The process can be gone already.
                let _ = member.signal(Signal::SIGTERM);
            }
        }
    }

    /// Whether the leader is gone, so that only a check of `/proc` can show the end of the tree.
    pub(super) fn is_leaderless(&self) -> bool {
        self.exit.is_some()
    }

    /// Its processes, for the last report.
    pub(super) fn leftover(&mut self, table: &ProcessTable) -> Vec<LeftoverProcess> {
        let members = self.tree.members(table, getpid().as_raw());
        members.iter().map(Process::leftover).collect()
    }
}

/// Prepares the leader between fork and exec: its cgroup, its session, death with the shim, and default signal handling (the shim
/// blocks some signals, and ignored ones would stay ignored).
#[expect(unsafe_code, reason = "`pre_exec` is the only way to run code between fork and exec")]
fn prepare_leader(command: &mut Command, entrance: Option<File>) {
    let shim = getpid();
    // SAFETY: the closure makes system calls only (write, setsid, prctl, getppid, sigprocmask, sigaction), allocates nothing,
    // takes no lock, and the shim has a single thread, so nothing can be left half-done by the fork.
    unsafe {
        command.pre_exec(move || {
            if let Some(entrance) = &entrance {
                // Without its cgroup the tree is found by its session.
                let _ = write(entrance, b"0");
            }
            setsid()?;
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            // If the shim died before the line above, the kernel does not kill this process.
            if getppid() != shim {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            for reset in [
                Signal::SIGPIPE,
                Signal::SIGINT,
                Signal::SIGQUIT,
                Signal::SIGTERM,
                Signal::SIGHUP,
                Signal::SIGCHLD,
            ] {
                signal(reset, SigHandler::SigDfl)?;
            }
            SigSet::empty().thread_set_mask()?;
            Ok(())
        });
    }
}
