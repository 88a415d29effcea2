//! Finds the processes of an engine in `/proc`, and signals them without hitting a reused process id.
//!
//! It knows nothing of commands or sockets.
//!
//! A process belongs to a tree if it descends from the *reaper* (a child subreaper: the shim)
//! **and** one of these holds:
//! - it is in the leader's session, as EngineCore and workers are;
//! - it descends from another member (found by walking parents *before* anything is killed);
//! - it was a member at an earlier check;
//! - the reaper adopted it, and it holds the tree's log pipe or carries the tree's mark in its environment, which is how
//!   a daemon that forked twice is found.
//!
//! If the tree has a cgroup, every process in it belongs to the tree, and the cgroup is killed as a whole before the others. The
//! rules above work everywhere.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};

use super::super::sidecar::WATCHER_NAME;
use super::cgroup::Cgroup;
use super::protocol::LeftoverProcess;
use crate::fleet::{EngineId, Incarnation};

/// The variable that marks every process of a tree. vLLM's `setproctitle` wipes it from EngineCore and workers, so it is the last
/// resort, for daemons that kept nothing else of their tree.
pub(in crate::supervisor) const MARK_VARIABLE: &str = "XPYD_TREE";

/// One process of the process table.
#[derive(Debug, Clone)]
pub(in crate::supervisor) struct Process {
    /// Process id.
    pub(in crate::supervisor) pid: i32,
    /// Its parent's process id.
    pub(in crate::supervisor) parent: i32,
    /// Its session id.
    pub(in crate::supervisor) session: i32,
    /// When it started, in clock ticks since boot. With the pid it identifies a process.
    pub(in crate::supervisor) started: u64,
    /// State letter.
    pub(in crate::supervisor) state: char,
    /// CPU time that it has used, in clock ticks.
    pub(in crate::supervisor) cpu_ticks: u64,
    /// Its resident memory, in pages.
    resident_pages: u64,
    /// Name, 15 characters at most.
    pub(in crate::supervisor) name: String,
}

impl Process {
    /// The process `pid` now; `None` once it is gone.
    pub(super) fn read(pid: i32) -> Option<Self> {
        Self::read_in(Path::new(&format!("/proc/{pid}")))
    }

    /// The process or thread of this folder of `/proc`.
    pub(in crate::supervisor) fn read_in(folder: &Path) -> Option<Self> {
        let stat = fs::read(folder.join("stat")).ok()?;
        Self::parse(&String::from_utf8_lossy(&stat))
    }

    /// Its resident memory, in bytes.
    pub(in crate::supervisor) fn resident_bytes(&self) -> u64 {
        let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
        let page = page.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(4096);
        self.resident_pages * page
    }

    /// Parses `/proc/PID/stat`: the name is in parentheses and can contain any character, parentheses too.
    fn parse(stat: &str) -> Option<Self> {
        let (pid, rest) = stat.split_once(" (")?;
        let (name, rest) = rest.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split(' ').collect();
        Some(Self {
            pid: pid.parse().ok()?,
            name: name.to_owned(),
            state: fields.first()?.chars().next()?,
            parent: fields.get(1)?.parse().ok()?,
            session: fields.get(3)?.parse().ok()?,
            started: fields.get(19)?.parse().ok()?,
            cpu_ticks: fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?,
            resident_pages: fields.get(21)?.parse().ok()?,
        })
    }

    /// Sends `signal`, unless the process is gone and its id was reused.
    pub(super) fn signal(&self, signal: Signal) -> Result<(), Errno> {
        match Self::read(self.pid) {
            Some(now) if now.started == self.started => kill(Pid::from_raw(self.pid), signal),
            Some(_) | None => Err(Errno::ESRCH),
        }
    }

    /// Its description for the report of processes that outlived SIGKILL.
    pub(super) fn leftover(&self) -> LeftoverProcess {
        LeftoverProcess {
            pid: self.pid.unsigned_abs(),
            name: self.name.clone(),
            state: self.state,
        }
    }

    fn holds_pipe(&self, inode: u64) -> bool {
        let wanted = format!("pipe:[{inode}]");
        let Ok(descriptors) = fs::read_dir(format!("/proc/{}/fd", self.pid)) else {
            return false;
        };
        descriptors
            .flatten()
            .any(|entry| fs::read_link(entry.path()).is_ok_and(|target| target.as_os_str() == wanted.as_str()))
    }

    fn carries(&self, mark: &str) -> bool {
        let wanted = format!("{MARK_VARIABLE}={mark}");
        fs::read(format!("/proc/{}/environ", self.pid)).is_ok_and(|environment| {
            environment
                .split(|byte| *byte == 0)
                .any(|entry| entry == wanted.as_bytes())
        })
    }
}

/// The process table at one moment, by process id.
#[derive(Debug)]
pub(in crate::supervisor) struct ProcessTable(BTreeMap<i32, Process>);

impl ProcessTable {
    /// Reads all of `/proc`.
    pub(in crate::supervisor) fn read() -> Self {
        let Ok(entries) = fs::read_dir("/proc") else {
            return Self(BTreeMap::new());
        };
        Self(
            entries
                .flatten()
                .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
                .filter_map(Process::read)
                .map(|process| (process.pid, process))
                .collect(),
        )
    }

    /// All processes.
    pub(super) fn all(&self) -> impl Iterator<Item = &Process> {
        self.0.values()
    }

    /// The process `pid`.
    pub(super) fn get(&self, pid: i32) -> Option<&Process> {
        self.0.get(&pid)
    }

    /// The leader, its session and its descendants: the part of a tree that is visible outside of the shim.
    pub(in crate::supervisor) fn led_by(&self, leader: i32) -> Vec<Process> {
        let descendants: HashSet<i32> = self.descendants(leader).iter().map(|process| process.pid).collect();
        let belongs = |process: &&Process| {
            process.pid == leader || process.session == leader || descendants.contains(&process.pid)
        };
        self.0.values().filter(belongs).cloned().collect()
    }

    /// As [`ProcessTable::led_by`], without the engine's sidecar, its watcher and their descendants, which work while the engine hangs.
    pub(in crate::supervisor) fn engine_led_by(&self, leader: i32) -> Vec<Process> {
        let mut processes = self.led_by(leader);
        let children = || self.0.values().filter(|process| process.parent == leader);
        let Some(watcher) = children().find(|child| child.name == WATCHER_NAME) else {
            return processes;
        };
        // The leader started these two before it became the engine.
        let others = children().filter(|child| child.started <= watcher.started);
        let others: HashSet<i32> = others
            .flat_map(|child| self.descendants(child.pid).into_iter().chain([child]))
            .map(|process| process.pid)
            .collect();
        processes.retain(|process| !others.contains(&process.pid));
        processes
    }

    /// The descendants of `root`, without it.
    pub(super) fn descendants(&self, root: i32) -> Vec<&Process> {
        let mut found = Vec::new();
        let mut generation = HashSet::from([root]);
        while !generation.is_empty() {
            let children: Vec<&Process> = self
                .0
                .values()
                .filter(|process| generation.contains(&process.parent))
                .collect();
            generation = children.iter().map(|process| process.pid).collect();
            found.extend(children);
        }
        found
    }
}

/// The marks by which the processes of one incarnation are found.
#[derive(Debug)]
pub(super) struct Tree {
    /// Process id of the leader, and of its session.
    leader: i32,
    /// Inode of its log pipe, if its output goes to one.
    pipe: Option<u64>,
    /// The value of [`MARK_VARIABLE`] in its environment.
    mark: String,
    /// Its cgroup, if it could get one.
    cgroup: Option<Cgroup>,
    /// Members seen so far and not known to be gone: process id and start time.
    seen: HashSet<(i32, u64)>,
}

impl Tree {
    pub(super) fn new(leader: i32, pipe: Option<u64>, mark: String, cgroup: Option<Cgroup>) -> Self {
        Self {
            leader,
            pipe,
            mark,
            cgroup,
            seen: HashSet::new(),
        }
    }

    fn holds_pipe(&self, process: &Process) -> bool {
        self.pipe.is_some_and(|pipe| process.holds_pipe(pipe))
    }

    /// The name of the cgroup of one incarnation. Begins with [`Tree::cgroups_of`] its shim.
    pub(super) fn cgroup_name(shim: u32, engine: &EngineId, incarnation: Incarnation) -> String {
        format!("{}{engine}.{incarnation}", Self::cgroups_of(shim))
    }

    /// The common prefix of the names of a shim's cgroups. Containers can share a folder of cgroups, and their process ids repeat, so the
    /// process id namespace is part of the name.
    pub(super) fn cgroups_of(shim: u32) -> String {
        let namespace = namespace_of("self").unwrap_or_default();
        format!("xpyd-{shim}-{namespace}.")
    }

    /// The mark of one incarnation under the shim with this process id.
    pub(super) fn mark(shim: u32, engine: &EngineId, incarnation: Incarnation) -> String {
        format!("{shim}.{engine}.{incarnation}")
    }

    /// The current members, zombies included: a process that was not reaped yet can still have threads.
    pub(super) fn members(&mut self, table: &ProcessTable, reaper: i32) -> Vec<Process> {
        let candidates = table.descendants(reaper);
        let inside = self.cgroup.as_ref().map_or_else(Vec::new, Cgroup::members);
        let mut members: HashSet<i32> = HashSet::new();
        // Candidates come parents first, so one pass follows every chain.
        for process in &candidates {
            let belongs = process.session == self.leader
                || inside.contains(&process.pid)
                || members.contains(&process.parent)
                || self.seen.contains(&(process.pid, process.started))
                || process.parent == reaper && (self.holds_pipe(process) || process.carries(&self.mark));
            if belongs {
                members.insert(process.pid);
            }
        }
        let members: Vec<Process> = candidates
            .into_iter()
            .filter(|process| members.contains(&process.pid))
            .cloned()
            .collect();
        self.seen = members.iter().map(|process| (process.pid, process.started)).collect();
        members
    }

    /// Removes the cgroup, once the tree is empty.
    pub(super) fn remove(&self) {
        if let Some(cgroup) = &self.cgroup {
            cgroup.remove();
        }
    }

    /// Stops all members with SIGSTOP, so that none can fork. Returns them.
    pub(super) fn freeze(&mut self, reaper: i32) -> Vec<Process> {
        freeze(|table| self.members(table, reaper))
    }

    /// Kills the frozen members, and everything else in the cgroup.
    pub(super) fn kill(&self, frozen: &[Process]) {
        if let Some(cgroup) = &self.cgroup {
            cgroup.kill();
        }
        kill_all(frozen);
    }
}

/// The process id namespace of a process, as the kernel numbers it: ids of different namespaces cannot be compared.
pub(super) fn namespace_of(process: &str) -> Option<u64> {
    let namespace = fs::metadata(format!("/proc/{process}/ns/pid")).ok()?;
    Some(namespace.ino())
}

/// Stops every process that `select` finds, so that none can fork, until it finds no new one. Returns them.
///
/// Bounded: the next call finds processes that this one missed.
pub(super) fn freeze(mut select: impl FnMut(&ProcessTable) -> Vec<Process>) -> Vec<Process> {
    const MOST_LOOKS: usize = 20;
    let mut frozen = HashSet::new();
    let mut found = Vec::new();
    for _ in 0..MOST_LOOKS {
        found = select(&ProcessTable::read());
        let mut found_new = false;
        for process in &found {
            if frozen.insert((process.pid, process.started)) {
                found_new = true;
                // The process can be gone already; one that this user is not allowed to signal is reported as a leftover.
                let _ = process.signal(Signal::SIGSTOP);
            }
        }
        if !found_new {
            break;
        }
    }
    found
}

/// SIGKILL to all of them, frozen or not.
pub(super) fn kill_all(processes: &[Process]) {
    for process in processes {
        let _ = process.signal(Signal::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, parent: i32, session: i32) -> (i32, Process) {
        let process = Process {
            pid,
            parent,
            session,
            started: u64::from(pid.unsigned_abs()) * 10,
            state: 'S',
            cpu_ticks: 0,
            resident_pages: 0,
            name: "sh".into(),
        };
        (pid, process)
    }

    fn members(tree: &mut Tree, processes: &[(i32, i32, i32)]) -> Vec<i32> {
        let table = ProcessTable(
            processes
                .iter()
                .map(|&(pid, parent, session)| process(pid, parent, session))
                .collect(),
        );
        tree.members(&table, 900).iter().map(|process| process.pid).collect()
    }

    /// Process ids above the kernel's limit, so that no real process is looked at.
    const LEADER: i32 = 0x4000_0000;

    #[test]
    fn a_name_with_spaces_and_parentheses_is_parsed() {
        let stat = "42 (a) (b c)) S 7 8 9 0 -1 0 0 0 0 0 1 2 3 4 20 0 1 0 12345 0 0";
        let parsed = Process::parse(stat).unwrap();
        assert_eq!((parsed.pid, parsed.name.as_str(), parsed.state), (42, "a) (b c)", 'S'));
        assert_eq!((parsed.parent, parsed.session, parsed.started), (7, 9, 12345));
        assert_eq!(parsed.cpu_ticks, 3);
    }

    #[test]
    fn this_process_finds_itself_in_the_table() {
        let own = i32::try_from(std::process::id()).unwrap();
        let table = ProcessTable::read();
        assert_eq!(table.0[&own].started, Process::read(own).unwrap().started);
    }

    #[test]
    fn members_are_the_session_and_its_descendants() {
        let mut tree = Tree::new(LEADER, Some(0), String::new(), None);
        let (child, escaped, grandchild, other) = (LEADER + 1, LEADER + 2, LEADER + 3, LEADER + 4);
        let found = members(
            &mut tree,
            &[
                (LEADER, 900, LEADER),
                (child, LEADER, LEADER),
                (escaped, child, escaped),
                (grandchild, escaped, escaped),
                (other, 900, other),
            ],
        );
        assert_eq!(found, [LEADER, child, escaped, grandchild]);
    }

    #[test]
    fn led_by_finds_the_session_and_its_descendants() {
        let table = [(1, 0, 1), (5, 1, 5), (6, 5, 5), (7, 6, 7), (8, 1, 5), (9, 1, 9)];
        let table = ProcessTable(table.map(|(pid, parent, session)| process(pid, parent, session)).into());
        let led: Vec<i32> = table.led_by(5).iter().map(|process| process.pid).collect();
        assert_eq!(led, [5, 6, 7, 8]);
    }

    #[test]
    fn a_sidecar_does_not_count_as_the_engine() {
        let processes = [(5, 1, 5), (6, 5, 5), (7, 5, 5), (8, 5, 5), (9, 6, 5), (10, 8, 5)];
        let mut table = ProcessTable(
            processes
                .map(|(pid, parent, session)| process(pid, parent, session))
                .into(),
        );
        let engine =
            |table: &ProcessTable| -> Vec<i32> { table.engine_led_by(5).iter().map(|process| process.pid).collect() };
        assert_eq!(engine(&table), [5, 6, 7, 8, 9, 10], "there is none");
        table.0.get_mut(&7).unwrap().name = WATCHER_NAME.into();
        assert_eq!(engine(&table), [5, 8, 10]);
    }

    #[test]
    fn an_orphan_of_the_session_stays_a_member() {
        let mut tree = Tree::new(LEADER, Some(0), String::new(), None);
        assert_eq!(members(&mut tree, &[(LEADER + 1, 900, LEADER)]), [LEADER + 1]);
    }

    #[test]
    fn a_known_member_stays_one_without_its_parents() {
        let mut tree = Tree::new(LEADER, Some(0), String::new(), None);
        let escaped = LEADER + 1;
        members(&mut tree, &[(LEADER, 900, LEADER), (escaped, LEADER, escaped)]);
        assert_eq!(members(&mut tree, &[(escaped, 900, escaped)]), [escaped]);
    }

    #[test]
    fn a_session_outside_the_reaper_is_no_member() {
        let mut tree = Tree::new(LEADER, Some(0), String::new(), None);
        assert!(members(&mut tree, &[(LEADER, 1, LEADER)]).is_empty());
    }

    #[test]
    fn a_signal_never_hits_a_reused_process_id() {
        let own = i32::try_from(std::process::id()).unwrap();
        let mut stale = Process::read(own).unwrap();
        stale.started -= 1;
        assert_eq!(stale.signal(Signal::SIGKILL), Err(Errno::ESRCH));
    }
}
