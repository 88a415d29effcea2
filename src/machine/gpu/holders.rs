//! The processes on a GPU: NVML reports process ids, and `/proc` whose they are.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// A process that NVML lists on a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuProcess {
    /// Its id as NVML reports it. In a container, this is the host's id.
    pub pid: u32,
    /// GPU memory that it uses, in bytes; NVML does not report it on every system.
    pub bytes: Option<u64>,
    /// The same process in this pid namespace; `None` if it is not visible here.
    pub local: Option<LocalProcess>,
}

/// A visible process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalProcess {
    /// Its id in this namespace.
    pub pid: u32,
    /// The name of its user, or the user id if there is no name.
    pub user: String,
    /// Its command line, shortened.
    pub command: String,
}

/// `pid 4242 (bob, VLLM::EngineCore, 70000 MiB)`.
impl fmt::Display for GpuProcess {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = self
            .bytes
            .map_or_else(|| "unknown size".to_owned(), |bytes| format!("{} MiB", bytes >> 20));
        match &self.local {
            Some(local) => write!(
                formatter,
                "pid {} ({}, {}, {size})",
                local.pid, local.user, local.command
            ),
            // In a container it can be any process of the host. Elsewhere it is a dead process whose memory is still being
            // freed.
            None => write!(
                formatter,
                "pid {} ({size}, not visible here: it has ended, or is in another container or on the host)",
                self.pid
            ),
        }
    }
}

/// Number of characters of a command line to show.
const COMMAND_CHARACTERS: usize = 60;

/// Looks up processes. It reads the whole of `/proc` only if a process is missing, and only once.
#[derive(Debug, Default)]
pub(super) struct Lookup {
    /// Ids in this namespace, by ids in outer namespaces; read when needed.
    inner: Option<BTreeMap<u32, u32>>,
}

impl Lookup {
    /// The visible process that NVML calls `pid`.
    pub(super) fn process(&mut self, pid: u32) -> Option<LocalProcess> {
        if let Some(process) = describe(pid) {
            return Some(process);
        }
        let inner = self.inner.get_or_insert_with(inner_ids);
        inner.get(&pid).copied().and_then(describe)
    }
}

fn describe(pid: u32) -> Option<LocalProcess> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let user = field(&status, "Uid:").and_then(|ids| ids.split_whitespace().next()?.parse::<u32>().ok());
    let known = user.and_then(|user| nix::unistd::User::from_uid(user.into()).ok().flatten());
    let user = known.map_or_else(
        || user.map_or_else(|| "?".to_owned(), |user| format!("user {user}")),
        |user| user.name,
    );
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&line).replace('\0', " ");
    let command = match line.trim() {
        "" => field(&status, "Name:").unwrap_or_default(),
        line => line,
    };
    Some(LocalProcess {
        pid,
        user,
        command: command.chars().take(COMMAND_CHARACTERS).collect(),
    })
}

/// If the host's `/proc` is mounted, a process has its ids of all namespaces in one line, the outermost first.
fn inner_ids() -> BTreeMap<u32, u32> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|process| process.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| Some((pid, std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?)))
        .flat_map(|(pid, status)| outer_ids(&status).into_iter().map(move |outer| (outer, pid)))
        .collect()
}

/// The ids of a process in all namespaces, from its `/proc/PID/status`.
fn outer_ids(status: &str) -> Vec<u32> {
    let ids = field(status, "NSpid:").unwrap_or_default().split_whitespace();
    ids.filter_map(|id| id.parse().ok()).collect()
}

/// The value after `name` in a `/proc/PID/status`.
fn field<'status>(status: &'status str, name: &str) -> Option<&'status str> {
    status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_a_user_and_a_command() {
        let own = Lookup::default().process(std::process::id()).expect("this process");
        assert_eq!(own.pid, std::process::id());
        assert!(!own.user.is_empty() && own.command.contains("xpyd"), "{own:?}");
    }

    #[test]
    fn an_invisible_process_is_reported() {
        // Above the largest id that Linux assigns.
        let pid = 4_194_305;
        assert_eq!(Lookup::default().process(pid), None);
        let process = GpuProcess {
            pid,
            bytes: Some(5 << 30),
            local: None,
        };
        assert_eq!(
            process.to_string(),
            "pid 4194305 (5120 MiB, not visible here: it has ended, or is in another container or on the host)"
        );
    }

    #[test]
    fn ids_of_all_namespaces_are_read() {
        let status = "Name:\tpython\nUid:\t1000\t1000\t1000\t1000\nNSpid:\t81234\t17\n";
        assert_eq!(outer_ids(status), [81_234, 17]);
        assert_eq!(outer_ids("Name:\tx\n"), [0u32; 0]);
    }
}
