//! Finds orphaned engine processes, whose API server or xpyd has died, and leaked shared memory, which no process uses. They are
//! ended only after the user has seen the list.
//!
//! A live engine's `EngineCore` is a child of its API server, or of a Python program of the user's that uses vLLM; a worker is
//! one of its `EngineCore`. Once its parent is dead, a process is a child of the process that adopts orphans: `init`, or a
//! container's first process. Orphans that a shim adopts are not listed, because the shim ends them itself.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::poll::{PollTimeout, poll};
use nix::unistd::geteuid;
use tokio::time::Instant;

use super::shm::SharedFiles;
use super::tree::{MARK_VARIABLE, Process, ProcessTable, freeze, kill_all, namespace_of};

/// Process titles of vLLM (`utils/system_utils.py`, `set_process_title`, of vLLM 0.32). Without the API server: one that lost its
/// parent is what `nohup vllm serve` leaves, and works.
const TITLES: [&str; 3] = ["VLLM::EngineCore", "VLLM::Worker", "VLLM::DPCoordinator"];

/// Prefixes of the names of shared memory that engines and their libraries create: Python, torch, NCCL, UCX, vLLM, LMCache,
/// OpenMP.
const SHARED_NAMES: [&str; 8] = [
    "psm_",
    "sem.mp-",
    "torch_",
    "nccl-",
    "ucx_shm",
    "vllm",
    "lmcache",
    "__KMP_REGISTERED_LIB_",
];

/// Another process can be about to open a file that is younger than this.
const OLD: Duration = Duration::from_mins(10);

/// Milliseconds between two checks.
const LOOK_AGAIN: u8 = 20;

/// The process id namespace of the machine itself (`PROC_PID_INIT_INO` of Linux).
const FIRST_NAMESPACE: &str = "pid:[4026531836]";

/// An orphaned engine process, with all its descendants.
#[derive(Debug, Clone)]
pub struct Orphan {
    /// Its title, such as `VLLM::EngineCore`.
    pub title: String,
    /// Process id.
    pub pid: u32,
    /// Why it is an orphan, as a clause: "its parent is gone".
    pub why: String,
    /// The number of processes, descendants included.
    pub processes: usize,
    /// Their resident memory, in bytes.
    pub resident_bytes: u64,
    members: Vec<Process>,
}

/// A file of shared memory that no process uses.
#[derive(Debug, Clone)]
pub struct LeakedMemory {
    /// The path.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
    inode: u64,
}

/// Finds the orphans among this user's processes.
pub fn find() -> Vec<Orphan> {
    let table = ProcessTable::read();
    let ours = own_family(&table);
    let candidates: Vec<(Process, String)> = table
        .all()
        .filter(|process| !ours.contains(&process.pid) && !matches!(process.state, 'Z' | 'X') && is_own(process.pid))
        .filter_map(|process| Some((process.clone(), command_line(process.pid)?)))
        .collect();
    let mut found: Vec<Orphan> = Vec::new();
    for (process, command) in &candidates {
        let title = title(command);
        let why = if is_engine_part(title) {
            adopted(&table, process)
        } else {
            marked_by_the_dead(&table, process.pid)
        };
        if let Some(why) = why {
            found.push(orphan(&table, process, title, why));
        }
    }
    // A descendant of another orphan is part of that one.
    let inner: HashSet<i32> = found
        .iter()
        .flat_map(|orphan| orphan.members.iter().skip(1))
        .map(|process| process.pid)
        .collect();
    found.retain(|orphan| !inner.contains(&orphan.members[0].pid));
    found
}

fn orphan(table: &ProcessTable, process: &Process, title: &str, why: String) -> Orphan {
    let mut members = vec![process.clone()];
    members.extend(table.descendants(process.pid).into_iter().cloned());
    Orphan {
        title: title.to_owned(),
        pid: process.pid.unsigned_abs(),
        why,
        processes: members.len(),
        resident_bytes: members.iter().map(Process::resident_bytes).sum(),
        members,
    }
}

/// This process and its ancestors.
fn own_family(table: &ProcessTable) -> HashSet<i32> {
    let own = nix::unistd::getpid().as_raw();
    ancestors(table, own).map(|process| process.pid).chain([own]).collect()
}

/// The ancestors of `pid`, its parent first. Bounded: the table is no snapshot, and ids are reused.
fn ancestors(table: &ProcessTable, pid: i32) -> impl Iterator<Item = &Process> {
    const DEEPEST: usize = 64;
    let parent = move |pid: i32| table.get(pid).and_then(|process| table.get(process.parent));
    std::iter::successors(parent(pid), move |process| parent(process.pid)).take(DEEPEST)
}

fn is_own(pid: i32) -> bool {
    let own = geteuid();
    own.is_root() || std::fs::metadata(format!("/proc/{pid}")).is_ok_and(|folder| folder.uid() == own.as_raw())
}

/// The command line, with NUL between words; `None` for kernel threads and for processes that are gone.
fn command_line(pid: i32) -> Option<String> {
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    (!words.is_empty()).then(|| String::from_utf8_lossy(&words).into_owned())
}

/// The title of a process: the first word of its command line, without its folder.
fn title(command: &str) -> &str {
    let first = command.split('\0').next().unwrap_or_default().trim();
    if first.starts_with("VLLM::") {
        return first;
    }
    first.rsplit('/').next().unwrap_or_default()
}

fn is_engine_part(title: &str) -> bool {
    TITLES.iter().any(|part| title.starts_with(part))
}

/// Why an engine's process counts as an orphan; `None` if its parent is alive.
fn adopted(table: &ProcessTable, process: &Process) -> Option<String> {
    let Some(parent) = table.get(process.parent) else {
        return Some("its parent is gone".to_owned());
    };
    let command = command_line(parent.pid).unwrap_or_default();
    if could_have_started_it(&command) {
        return None;
    }
    Some(format!(
        "its API server is gone, and {} (pid {}) has adopted it",
        parent.name, parent.pid
    ))
}

/// Whether a process with this command line can have started an engine's process: Python, vLLM, xpyd, or another engine process.
fn could_have_started_it(command: &str) -> bool {
    let title = title(command);
    let is_maker = ["python", "pypy", "vllm", "VLLM::", "xpyd", "ray", "pt_main_thread"]
        .iter()
        .any(|name| title.starts_with(name));
    // `init` of a container can be a shell that runs one of them and waits.
    is_maker
        || command
            .split('\0')
            .skip(1)
            .any(|word| word.ends_with("/vllm") || word.ends_with("/xpyd"))
}

/// The processes that a dead shim with this id has left: all that carry its mark.
pub(super) fn left_by(shim: u32) -> Vec<Orphan> {
    let table = ProcessTable::read();
    let ours = own_family(&table);
    let is_meant = |process: &&Process| {
        let marked = mark(process.pid).is_some_and(|(of, _)| u32::try_from(of) == Ok(shim));
        marked && !ours.contains(&process.pid) && is_own(process.pid)
    };
    let why = || "its shim is dead".to_owned();
    let left = table.all().filter(is_meant);
    left.map(|process| orphan(&table, process, &process.name, why()))
        .collect()
}

/// The shim that started a process, with engine and incarnation: `1234.decoder1.2`. `None` in another container, where the number is
/// the id of another process.
fn mark(pid: i32) -> Option<(i32, String)> {
    if namespace_of(&pid.to_string())? != namespace_of("self")? {
        return None;
    }
    let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    let wanted = format!("{MARK_VARIABLE}=");
    let mark = environment
        .split(|byte| *byte == 0)
        .find_map(|entry| entry.strip_prefix(wanted.as_bytes()))?;
    let mark = String::from_utf8_lossy(mark).into_owned();
    let (shim, rest) = mark.split_once('.')?;
    Some((shim.parse().ok()?, rest.to_owned()))
}

/// Why a process counts as left by a run of xpyd; `None` if it does not, or its shim is alive.
fn marked_by_the_dead(table: &ProcessTable, pid: i32) -> Option<String> {
    let (shim, rest) = mark(pid)?;
    let lives = table.get(shim).is_some_and(|process| {
        let command = command_line(process.pid).unwrap_or_default();
        title(&command).starts_with("xpyd")
    });
    // A monitor or an xpyd above it will end it.
    let is_tended = ancestors(table, pid).any(|above| {
        let command = command_line(above.pid).unwrap_or_default();
        title(&command).starts_with("xpyd")
    });
    let engine = rest.split('.').next().unwrap_or_default();
    (!lives && !is_tended).then(|| format!("it belongs to {engine} of a run whose xpyd and shim (pid {shim}) are dead"))
}

/// Ends the orphans with all their descendants, and removes the shared memory that only they used. Blocks for at most
/// `deadline`. Returns the processes that are still there: id and name.
pub fn reap(orphans: &[Orphan], deadline: Duration) -> Vec<(u32, String)> {
    let give_up = Instant::now() + deadline;
    // A pid and a start time identify one process.
    let mut known: HashSet<(i32, u64)> = orphans
        .iter()
        .flat_map(|orphan| &orphan.members)
        .map(|process| (process.pid, process.started))
        .collect();
    loop {
        let members = freeze(|table| living(table, &mut known));
        if members.is_empty() || Instant::now() >= give_up {
            return members
                .iter()
                .map(|process| (process.pid.unsigned_abs(), process.name.clone()))
                .collect();
        }
        let pids: Vec<i32> = members.iter().map(|process| process.pid).collect();
        let mut shared_files = SharedFiles::default();
        shared_files.add_used_by(pids.iter().copied(), &SharedFiles::default());
        shared_files.remove_unused(&pids);
        kill_all(&members);
        // There is nothing else to wait for.
        let _ = poll(&mut [], PollTimeout::from(LOOK_AGAIN));
    }
}

/// The processes of `known` that still run, and their new descendants, without zombies.
fn living(table: &ProcessTable, known: &mut HashSet<(i32, u64)>) -> Vec<Process> {
    let roots: Vec<Process> = table
        .all()
        .filter(|process| known.contains(&(process.pid, process.started)))
        .cloned()
        .collect();
    let mut seen = HashSet::new();
    let mut members = Vec::new();
    for root in &roots {
        for process in [root].into_iter().chain(table.descendants(root.pid)) {
            if seen.insert(process.pid) && !matches!(process.state, 'Z' | 'X') {
                known.insert((process.pid, process.started));
                members.push(process.clone());
            }
        }
    }
    members
}

/// Shared memory of this user that an engine can have created and no process uses. Empty in a container: other processes that use
/// the same folder can be invisible there.
pub fn leaked_memory() -> Vec<LeakedMemory> {
    let namespace = std::fs::read_link("/proc/self/ns/pid");
    if !namespace.is_ok_and(|name| name == Path::new(FIRST_NAMESPACE)) {
        return Vec::new();
    }
    let mut files = SharedFiles::present();
    files.retain(|path| {
        path.file_name()
            .is_some_and(|name| is_an_engines(&name.to_string_lossy()))
            && is_old(path)
    });
    files
        .unused()
        .into_iter()
        .map(|(path, inode)| LeakedMemory {
            bytes: std::fs::symlink_metadata(&path).map_or(0, |file| file.len()),
            path,
            inode,
        })
        .collect()
}

fn is_an_engines(name: &str) -> bool {
    SHARED_NAMES.iter().any(|beginning| name.starts_with(beginning))
}

fn is_old(path: &Path) -> bool {
    let changed = std::fs::symlink_metadata(path).and_then(|file| file.modified());
    changed.is_ok_and(|changed| SystemTime::now().duration_since(changed).is_ok_and(|age| age > OLD))
}

impl LeakedMemory {
    /// Removes the file, unless it was replaced or a process has opened it.
    pub fn remove(&self) {
        SharedFiles::of([(self.path.clone(), self.inode)]).remove_unused(&[]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_title_is_the_first_word_without_its_folder() {
        assert_eq!(title("VLLM::Worker_TP0\0"), "VLLM::Worker_TP0");
        assert_eq!(
            title("/opt/venv/bin/python3.12\0/opt/venv/bin/vllm\0serve"),
            "python3.12"
        );
        assert_eq!(title(""), "");
    }

    #[test]
    fn an_engine_process_without_its_starter_is_an_orphan() {
        for maker in [
            "/opt/venv/bin/python\0/opt/venv/bin/vllm\0serve\0x",
            "python3\0my_script.py",
            "VLLM::EngineCore",
            "VLLM::APIServer_0",
            "/usr/bin/xpyd\0shim",
            "bash\0-c\0/opt/venv/bin/vllm",
        ] {
            assert!(could_have_started_it(maker), "{maker}");
        }
        for adopter in [
            "/sbin/init",
            "/usr/lib/systemd/systemd\0--user",
            "tini\0--\0bash",
            "bash",
            "",
            "sshd: me",
        ] {
            assert!(!could_have_started_it(adopter), "{adopter}");
        }
    }

    #[test]
    fn only_known_prefixes_are_engine_memory() {
        for name in [
            "psm_1a2b3c4d",
            "torch_4711_12",
            "nccl-AbCdEf",
            "__KMP_REGISTERED_LIB_4711_0",
        ] {
            assert!(is_an_engines(name), "{name}");
        }
        for name in ["PostgreSQL.1234", "pulse-shm-1", "my_psm_1", "sem.other"] {
            assert!(!is_an_engines(name), "{name}");
        }
    }
}
