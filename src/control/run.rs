//! `run.json` and `outcome.json`: the process and files of a run, and how it ended.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{SysconfVar, sysconf};
use serde::{Deserialize, Serialize};

use super::rundir::{RunDirError, read_json};
use crate::fleet::{EngineId, Role};
use crate::private;
use crate::report::ExitStatus;

/// The file in the run's log folder that says how the run ended.
const OUTCOME_FILE: &str = "outcome.json";

/// The content of `run.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunInfo {
    /// The run's name.
    pub name: String,
    /// Process id of xpyd.
    pub pid: u32,
    /// When that process started, in clock ticks after boot. With the boot id it distinguishes the process from a later one with the
    /// same id.
    pub start_time_ticks: u64,
    /// The boot of the machine, from `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// Version of xpyd.
    pub version: String,
    /// The profile, by name or path.
    pub profile: String,
    /// The name clients use for the model.
    pub model: String,
    /// The base URL for clients, such as `http://127.0.0.1:9100`.
    pub proxy_url: String,
    /// The Unix socket of the control API. Begins with a NUL if it is abstract.
    #[serde(default)]
    pub control_socket: PathBuf,
    /// The file with the API key that xpyd made for the run's engines; `None` if they have the user's key, or none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine_key_file: Option<PathBuf>,
    /// The folder with the run's logs, absolute.
    pub logs_dir: PathBuf,
    /// Prefill engines first, each role in number order.
    pub engines: Vec<RunEngine>,
    /// When the run began, RFC 3339.
    pub started_at: String,
    /// Whether it runs without a terminal.
    pub detached: bool,
    /// Whether its engines outlive xpyd for a while if it disappears.
    #[serde(default)]
    pub keeps_engines: bool,
}

/// An engine of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunEngine {
    /// Its name.
    pub id: EngineId,
    /// Its role.
    pub role: Role,
    /// Its log file, relative to the run's logs folder.
    pub log_file: PathBuf,
}

impl RunInfo {
    /// Describes this process. Profile, model, proxy, socket, logs and engines stay empty.
    pub fn of_this_process(name: &str) -> io::Result<Self> {
        let pid = std::process::id();
        Ok(Self {
            name: name.to_owned(),
            pid,
            start_time_ticks: start_time_ticks(pid)?,
            boot_id: boot_id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            profile: String::new(),
            model: String::new(),
            proxy_url: String::new(),
            control_socket: PathBuf::new(),
            engine_key_file: None,
            logs_dir: PathBuf::new(),
            engines: Vec::new(),
            started_at: jiff::Timestamp::now().to_string(),
            detached: false,
            keeps_engines: false,
        })
    }

    /// Whether the process that wrote this still runs: same id, same start, same boot.
    pub fn is_alive(&self) -> bool {
        // A zombie has ended and holds nothing.
        self.state().is_some_and(|state| !matches!(state, 'Z' | 'X'))
    }

    /// Whether that process is stopped by Ctrl+Z or SIGSTOP.
    pub fn is_suspended(&self) -> bool {
        self.state() == Some('T')
    }

    /// Whether that process belongs to this user.
    pub fn is_of_user(&self, user: u32) -> bool {
        let process = fs_err::metadata(format!("/proc/{}", self.pid));
        process.is_ok_and(|process| std::os::unix::fs::MetadataExt::uid(&process) == user)
    }

    /// The state letter of that process, if it still exists.
    fn state(&self) -> Option<char> {
        let (state, ticks) = state_and_start(self.pid).ok()?;
        (ticks == self.start_time_ticks && boot_id() == self.boot_id).then_some(state)
    }

    /// Whether both describe the same run, not just the same name.
    pub fn is_same_run(&self, other: &Self) -> bool {
        (self.pid, self.start_time_ticks, &self.boot_id) == (other.pid, other.start_time_ticks, &other.boot_id)
    }
}

/// How a run ended, for the command that stopped it: the content of `outcome.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunOutcome {
    /// Process id of the xpyd that ended.
    pub pid: u32,
    /// When that process started, in clock ticks after boot.
    pub start_time_ticks: u64,
    /// Its exit code.
    pub exit_code: u8,
    /// The leftovers of the run, one line each; empty after a complete teardown.
    pub leftovers: Vec<String>,
}

/// Writes `outcome.json` into the run's log folder, for `xpyd down`. Must be the last step of a run, because readers trust it.
pub fn record_outcome(logs_dir: &Path, status: ExitStatus, leftovers: &[String]) -> io::Result<()> {
    let pid = std::process::id();
    let outcome = RunOutcome {
        pid,
        start_time_ticks: start_time_ticks(pid)?,
        exit_code: status.code(),
        leftovers: leftovers.to_vec(),
    };
    private::create_folders(logs_dir)?;
    private::write(&logs_dir.join(OUTCOME_FILE), serde_json::to_vec_pretty(&outcome)?)
}

/// Whether an xpyd that wrote to this folder has recorded its end. Another one can have attached since.
pub fn has_outcome(logs_dir: &Path) -> bool {
    logs_dir.join(OUTCOME_FILE).exists()
}

/// How the run of `info` ended; `None` while it runs, or if it was killed.
pub fn outcome(info: &RunInfo) -> Result<Option<RunOutcome>, RunDirError> {
    let outcome: Option<RunOutcome> = match read_json(&info.logs_dir.join(OUTCOME_FILE)) {
        // On a full disk the file can be incomplete.
        Err(RunDirError::Unreadable { .. }) => None,
        read => read?,
    };
    Ok(outcome.filter(|outcome| (outcome.pid, outcome.start_time_ticks) == (info.pid, info.start_time_ticks)))
}

/// How long the process `pid` has been running. `None` if it is gone, or `/proc` is not the usual one.
pub fn process_age(pid: u32) -> Option<Duration> {
    let started = start_time_ticks(pid).ok()?;
    let per_second = sysconf(SysconfVar::CLK_TCK).ok()??;
    let uptime = fs_err::read_to_string("/proc/uptime").ok()?;
    let now: f64 = uptime.split_ascii_whitespace().next()?.parse().ok()?;
    let started = started / u64::try_from(per_second).ok()?.max(1);
    Duration::try_from_secs_f64(now)
        .ok()?
        .checked_sub(Duration::from_secs(started))
}

/// When the process `pid` started, in clock ticks after boot.
fn start_time_ticks(pid: u32) -> io::Result<u64> {
    state_and_start(pid).map(|(_, ticks)| ticks)
}

/// State letter and start time of a process: fields 3 and 22 of `/proc/<pid>/stat` (proc(5)).
fn state_and_start(pid: u32) -> io::Result<(char, u64)> {
    let stat = fs_err::read_to_string(format!("/proc/{pid}/stat"))?;
    // Field 2 is the program's name in parentheses, which can itself contain spaces and parentheses.
    let fields = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.trim_start())
        .unwrap_or_default();
    let ticks = fields
        .split_ascii_whitespace()
        .nth(19)
        .and_then(|field| field.parse().ok());
    fields.chars().next().zip(ticks).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("`/proc/{pid}/stat` has no state or no start time"),
        )
    })
}

/// The id of this boot of the machine, or its time if a sandbox hides the id.
fn boot_id() -> String {
    let id = fs_err::read_to_string("/proc/sys/kernel/random/boot_id");
    let id = id.map(|id| id.trim().to_owned()).ok().filter(|id| !id.is_empty());
    id.unwrap_or_else(|| {
        let statistics = fs_err::read_to_string("/proc/stat").unwrap_or_default();
        let time = statistics.lines().find(|line| line.starts_with("btime "));
        time.unwrap_or("unknown").to_owned()
    })
}
