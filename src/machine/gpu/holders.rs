//! Who computes on a GPU: NVML tells process ids, `/proc` tells whose they are.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

/// A process that NVML lists on a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GpuProcess {
    /// Its id as NVML says it. In a container that is the host's id.
    pub pid: u32,
    /// Memory of the GPU that it holds, in bytes; NVML does not tell it everywhere.
    pub bytes: Option<u64>,
    /// The process as it is called here; `None` if it cannot be seen from here.
    pub local: Option<LocalProcess>,
}

/// A process that this one can see.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LocalProcess {
    /// Its id here.
    pub pid: u32,
    /// Whose it is: a name, or a number without one.
    pub user: String,
    /// What it calls itself, shortened.
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
            // In a container it may be any process of the host; elsewhere only one whose memory is still being freed.
            None => write!(
                formatter,
                "pid {} ({size}, not seen here: ended, or the host's)",
                self.pid
            ),
        }
    }
}

/// Characters of a command line that are told.
const COMMAND_CHARACTERS: usize = 60;

/// Looks processes up. Reads `/proc` as a whole only if a process is missing, and then once.
#[derive(Debug, Default)]
pub(super) struct Lookup {
    /// The ids here of processes by those in outer namespaces, once they were needed.
    inner: Option<BTreeMap<u32, u32>>,
}

impl Lookup {
    /// What is known of the process that NVML calls `pid`.
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

/// Where the host's `/proc` is mounted, a process has its ids of all namespaces in one line, the outermost first.
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

/// What stands behind `name` in a `/proc/PID/status`.
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
    fn a_process_that_cannot_be_seen_is_said_so() {
        // Beyond the largest id that Linux can give.
        let pid = 4_194_305;
        assert_eq!(Lookup::default().process(pid), None);
        let process = GpuProcess {
            pid,
            bytes: Some(5 << 30),
            local: None,
        };
        assert_eq!(
            process.to_string(),
            "pid 4194305 (5120 MiB, not seen here: ended, or the host's)"
        );
    }

    #[test]
    fn ids_of_all_namespaces_are_read() {
        let status = "Name:\tpython\nUid:\t1000\t1000\t1000\t1000\nNSpid:\t81234\t17\n";
        assert_eq!(outer_ids(status), [81_234, 17]);
        assert_eq!(outer_ids("Name:\tx\n"), [0u32; 0]);
    }
}
