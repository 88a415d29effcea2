//! One incarnation of an engine as the shim sees it: started, watched, ended.
//!
//! Knows no socket: what happened is returned, and `process` passes it on.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
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
use super::tree::{MARK_VARIABLE, Process, Table, Tree};
use crate::fleet::Exit;
use crate::fleet::{EngineId, Incarnation};

/// How long processes can outlive SIGKILL before they are reported, after which the engine is not started again. A process
/// needs CPU time to exit, and the driver of a GPU takes many seconds to free its memory.
const LEFTOVER_AFTER: Duration = Duration::from_secs(30);

/// How often a tree is killed again while it is not empty. Longer once it was reported.
const KILL_AGAIN: Duration = Duration::from_millis(20);
const KILL_AGAIN_REPORTED: Duration = Duration::from_millis(500);

/// The longest grace that an engine gets when xpyd has disappeared: nobody is left to ask for more.
const ORPHAN_GRACE: Duration = Duration::from_secs(10);

/// A running incarnation.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) id: EngineId,
    incarnation: Incarnation,
    leader: Process,
    /// How the leader ended; `None` while it lives.
    exit: Option<Exit>,
    tree: Tree,
    log: Option<Log>,
    shared_files: SharedFiles,
    settled: bool,
    terminated: bool,
    /// What outlived the leader was asked to leave, too.
    rest_is_told: bool,
    stop_grace: Duration,
    ending: Ending,
    memo: serde_json::Value,
}

/// How far the shim has gone in ending the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// Nothing is to be forced.
    None,
    /// It is killed at this time unless it is gone by then.
    KillAt(Instant),
    /// SIGKILL was first sent at `since`; `again` is when to look next.
    Killing {
        since: Instant,
        again: Instant,
        reported: bool,
    },
}

impl Engine {
    /// Starts the engine. The error is a sentence for people.
    pub(super) fn spawn(spawn: Spawn) -> Result<Self, String> {
        let (log, writer) = Log::open(&spawn.log, spawn.log_limits)
            .map_err(|error| format!("cannot write its log `{}`: {error}", spawn.log.display()))?;
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
            .stdout(
                writer
                    .try_clone()
                    .map_err(|error| format!("cannot duplicate its log pipe: {error}"))?,
            )
            .stderr(writer);
        prepare_leader(&mut command, entrance);
        let child = command
            .spawn()
            .inspect_err(|_| {
                if let Some(cgroup) = &cgroup {
                    cgroup.remove();
                }
            })
            .map_err(|error| format!("cannot start `{program}`: {error}"))?;
        // It cannot be reaped before this returns, because only the loop in `process` reaps.
        let leader = i32::try_from(child.id())
            .ok()
            .and_then(Process::read)
            .ok_or("its process is not in /proc")?;
        Ok(Self {
            tree: Tree::new(leader.pid, log.inode(), mark, cgroup),
            id: spawn.engine,
            incarnation: spawn.incarnation,
            leader,
            exit: None,
            log: Some(log),
            shared_files: SharedFiles::default(),
            settled: false,
            terminated: false,
            rest_is_told: false,
            stop_grace: spawn.stop_grace,
            ending: Ending::None,
            memo: spawn.memo,
        })
    }

    /// What tells xpyd that it runs.
    pub(super) fn spawned(&self) -> Event {
        Event::Spawned {
            engine: self.id.clone(),
            incarnation: self.incarnation,
            pid: self.leader.pid.unsigned_abs(),
        }
    }

    /// Its start is over.
    pub(super) fn settle(&mut self) {
        self.settled = true;
    }

    /// The pipe to poll, while somebody may write to it.
    pub(super) fn log_descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.log.as_ref().map(Log::descriptor)
    }

    /// Moves its output to its file.
    pub(super) fn drain_log(&mut self) {
        if self.log.as_mut().is_some_and(|log| log.drain() == Drained::Closed) {
            self.log = None;
        }
    }

    /// SIGTERM to the leader, the first time.
    pub(super) fn terminate(&mut self, foreign: &SharedFiles) {
        if self.exit.is_none() && !self.terminated {
            self.terminated = true;
            self.look(&Table::read(), foreign);
            // A leader that is gone by now is reaped in this turn of the loop.
            let _ = self.leader.signal(Signal::SIGTERM);
        }
    }

    /// xpyd is gone: an engine that served gets a bounded grace, one that was still starting gets none.
    pub(super) fn orphan(&mut self, foreign: &SharedFiles, now: Instant) {
        if matches!(self.ending, Ending::None) {
            if self.settled {
                self.terminate(foreign);
                self.ending = Ending::KillAt(now + self.stop_grace.min(ORPHAN_GRACE));
            } else {
                self.kill(foreign, now);
            }
        }
    }

    /// xpyd is gone and the next one is waited for: only what was on its way out, or has lost its leader, is ended.
    pub(super) fn keep(&mut self, foreign: &SharedFiles, now: Instant) {
        if self.exit.is_some() {
            self.kill(foreign, now);
        } else if self.terminated {
            self.orphan(foreign, now);
        }
    }

    /// What is there of it, for an xpyd that attaches.
    pub(super) fn kept(&self) -> KeptEngine {
        let state = if self.exit.is_some() || self.terminated || !matches!(self.ending, Ending::None) {
            KeptState::Leaving { exit: self.exit }
        } else {
            KeptState::Running {
                pid: self.leader.pid.unsigned_abs(),
                settled: self.settled,
            }
        };
        KeptEngine {
            engine: self.id.clone(),
            incarnation: self.incarnation,
            state,
            memo: self.memo.clone(),
        }
    }

    /// What is known of it once its tree is empty.
    pub(super) fn gone(&self) -> KeptEngine {
        KeptEngine {
            state: KeptState::Gone { exit: self.exit },
            ..self.kept()
        }
    }

    /// SIGKILL to the whole tree, now and again until it is empty.
    pub(super) fn kill(&mut self, foreign: &SharedFiles, now: Instant) {
        if !matches!(self.ending, Ending::Killing { .. }) {
            self.strike(foreign);
            self.ending = Ending::Killing {
                since: now,
                again: now + KILL_AGAIN,
                reported: false,
            };
        }
    }

    /// SIGKILL to all that is there of the tree now. Returns it.
    ///
    /// Its files in `/dev/shm` go first: should this process be killed in the middle, whoever sweeps after it knows of them
    /// only by processes that still live.
    fn strike(&mut self, foreign: &SharedFiles) -> Vec<Process> {
        let frozen = self.tree.freeze(getpid().as_raw());
        let pids: Vec<i32> = frozen.iter().map(|process| process.pid).collect();
        self.shared_files.add_used_by(pids.iter().copied(), foreign);
        self.shared_files.remove_unused(&pids);
        self.tree.kill(&frozen);
        frozen
    }

    /// When [`Engine::tick`] has something to do.
    pub(super) fn next_tick(&self) -> Option<Instant> {
        match self.ending {
            Ending::None => None,
            Ending::KillAt(at) => Some(at),
            Ending::Killing { again, .. } => Some(again),
        }
    }

    /// Does what is due. Returns processes that outlived SIGKILL, once.
    pub(super) fn tick(&mut self, foreign: &SharedFiles, now: Instant) -> Option<Event> {
        match self.ending {
            Ending::None => None,
            Ending::KillAt(at) => {
                if now >= at {
                    self.kill(foreign, now);
                }
                None
            }
            Ending::Killing { again, .. } if now < again => None,
            Ending::Killing { since, reported, .. } => {
                let left = self.strike(foreign);
                let report = !reported && now >= since + LEFTOVER_AFTER && !left.is_empty();
                let reported = reported || report;
                let again = now + if reported { KILL_AGAIN_REPORTED } else { KILL_AGAIN };
                self.ending = Ending::Killing { since, again, reported };
                report.then(|| Event::Leftover {
                    engine: Some(self.id.clone()),
                    processes: left.iter().map(Process::leftover).collect(),
                })
            }
        }
    }

    /// Takes note of a reaped process; `Some` if it was the leader. Its last output is in the file by then.
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

    /// Learns who is in the tree and what they hold in `/dev/shm`. If leader and tree are gone, cleans up after them, and
    /// the event says so.
    pub(super) fn look(&mut self, table: &Table, foreign: &SharedFiles) -> Option<Event> {
        let members = self.tree.members(table, getpid().as_raw());
        self.shared_files
            .add_used_by(members.iter().map(|process| process.pid), foreign);
        if self.exit.is_none() || !members.is_empty() {
            self.tell_rest(&members);
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

    /// A leader that is only a wrapper ends by its SIGTERM and passes none on, so what it had started gets one of its own.
    fn tell_rest(&mut self, members: &[Process]) {
        if self.exit.is_some() && self.terminated && !self.rest_is_told {
            self.rest_is_told = true;
            for member in members {
                // One that is gone by now needs no telling.
                let _ = member.signal(Signal::SIGTERM);
            }
        }
    }

    /// Whether it is known that only a look can tell that the tree is gone: its leader is.
    pub(super) fn is_leaderless(&self) -> bool {
        self.exit.is_some()
    }

    /// Its processes, for a last report.
    pub(super) fn leftover(&mut self, table: &Table) -> Vec<LeftoverProcess> {
        let members = self.tree.members(table, getpid().as_raw());
        members.iter().map(Process::leftover).collect()
    }
}

/// What the leader does between fork and exec: its cgroup, an own session, death with the shim, and signals as a fresh program
/// expects them (the shim blocks some, and ignored ones would stay ignored).
#[expect(unsafe_code, reason = "`pre_exec` is the only way to run code between fork and exec")]
fn prepare_leader(command: &mut Command, entrance: Option<File>) {
    let shim = getpid();
    // SAFETY: the closure makes system calls only (write, setsid, prctl, getppid, sigprocmask, sigaction), allocates nothing,
    // takes no lock, and the shim has a single thread, so nothing can be left half-done by the fork.
    unsafe {
        command.pre_exec(move || {
            if let Some(entrance) = &entrance {
                // Outside of its cgroup it is found by its session, as where there are none.
                let _ = write(entrance, b"0");
            }
            setsid()?;
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            // Had the shim died before the line above, nobody would kill this process.
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
