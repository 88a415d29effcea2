//! Process trees of a bench: their resource use, and their end in every case.

use std::fs;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::time::Instant;

/// Time limit until a process serves.
const START: Duration = Duration::from_secs(30);

/// A process tree that also ends when this program is killed.
pub(crate) struct Tree {
    root: Child,
    /// Reads its input, which ends with this program, and then kills the tree's process group.
    reaper: Child,
}

impl Tree {
    pub(crate) fn start(mut command: Command, log: &Path) -> std::io::Result<Self> {
        let log = fs::File::create(log)?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0);
        let root = command.spawn()?;
        let reaper = Command::new("sh")
            .args(["-c", "read line; kill -9 -$0", &root.id().to_string()])
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        Ok(Self { root, reaper })
    }

    /// The process that was started.
    pub(crate) fn root(&self) -> u32 {
        self.root.id()
    }

    /// The processes of the tree: the child and all its descendants.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let mut parents = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            if let Some(parent) = stat(pid).and_then(|fields| fields.get(1)?.parse::<u32>().ok()) {
                parents.push((pid, parent));
            }
        }
        let mut tree = vec![self.root()];
        let mut next = 0;
        while let Some(parent) = tree.get(next).copied() {
            tree.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
            next += 1;
        }
        tree
    }

    /// User and system time of the tree so far. Linux scales both to the time that it ran exactly, in ticks of 10 ms.
    pub(crate) fn cpu(&self) -> Duration {
        let ticks = |pid: u32| {
            let fields = stat(pid).unwrap_or_default();
            let tick = |index: usize| {
                fields
                    .get(index)
                    .and_then(|field| field.parse::<u64>().ok())
                    .unwrap_or(0)
            };
            // Fields 14 to 17 of proc(5), counted from the third: its own time, and that of children it waited for.
            (11..15).map(tick).sum::<u64>()
        };
        Duration::from_millis(self.processes().into_iter().map(ticks).sum::<u64>() * 10)
    }

    /// Resident memory of the tree, in KiB.
    pub(crate) fn rss(&self) -> u64 {
        let resident = |pid: u32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
            line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok())
                .unwrap_or(0)
        };
        self.processes().into_iter().map(resident).sum()
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // Before the group is gone and its number can be reused.
        drop(self.reaper.kill());
        drop(self.reaper.wait());
        for pid in self.processes().into_iter().rev() {
            let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        drop(self.root.wait());
    }
}

/// Whether the process exists and is not a zombie.
pub(crate) fn is_running(pid: u32) -> bool {
    stat(pid).is_some_and(|fields| fields.first().is_some_and(|state| state != "Z"))
}

/// The fields of `/proc/PID/stat` after the name, which can have spaces.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = text.rsplit_once(')')?;
    Some(fields.split_whitespace().map(str::to_owned).collect())
}

/// A port that is free now.
pub(crate) fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Waits until a port takes connections.
pub(crate) async fn serves(port: u16) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < START {
        if tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    false
}

/// A program of `$XPYD_BENCH_VENV/bin`, of PATH, or of where Debian puts servers.
pub(crate) fn found(name: &str) -> Result<Command, String> {
    let venv = std::env::var_os("XPYD_BENCH_VENV").map(|venv| PathBuf::from(venv).join("bin"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = venv
        .into_iter()
        .chain(std::env::split_paths(&path))
        .chain([PathBuf::from("/usr/sbin")]);
    let mut candidates = folders.map(|folder| folder.join(name));
    candidates
        .find(|file| file.is_file())
        .map(Command::new)
        .ok_or_else(|| "not installed".to_owned())
}
