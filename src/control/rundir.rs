//! The runtime folder of a run: its lock, its socket, and the files that say who runs and how the last run ended.
//!
//! The folder is `$XDG_RUNTIME_DIR/xpyd/<name>/`, or `/tmp/xpyd-<uid>/<name>/` where there is no such variable. It holds
//! `lock` (locked for the life of the run, holds the pid), `run.json` ([`RunInfo`]), `engine-key`, `control.sock`, `attach.sock` (where
//! the guardian of a run whose xpyd has gone may keep its engines) and `outcome.json` ([`RunOutcome`] of the last run that
//! ended by itself). A reader never takes the lock, it only asks who has it, so
//! looking at a run cannot disturb the start of another. What a killed run left is removed by the next one to start.

use std::fs::{DirBuilder, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use fs_err::os::unix::fs::OpenOptionsExt;
use fs_err::{File, OpenOptions};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::unistd::getuid;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;

use crate::fleet::{EngineId, Role};
use crate::report::ExitStatus;

/// The name of a run that was not given one.
pub const DEFAULT_NAME: &str = "default";

/// Longest path of a Unix socket in bytes: `sun_path` has 108, one of them for the final NUL (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

const LOCK_FILE: &str = "lock";
const RUN_FILE: &str = "run.json";
const OUTCOME_FILE: &str = "outcome.json";
const SOCKET_FILE: &str = "control.sock";
const ENGINE_KEY_FILE: &str = "engine-key";
/// No longer than that of the control socket, whose path is checked.
const ATTACH_FILE: &str = "attach.sock";

/// Why a runtime folder could not be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// The name cannot be a folder's name.
    #[error("`{0}` is no name for a run: use 1 to 32 letters, digits, `.`, `_` or `-`, the first one no `.`")]
    BadName(String),
    /// A run of this name holds the lock.
    #[error("run `{name}` is already there{}", pid_in_words(*pid))]
    AlreadyRunning {
        /// The run's name.
        name: String,
        /// Its process, where it has been written down yet.
        pid: Option<u32>,
    },
    /// A run of this name holds the lock, and does not answer yet or any more.
    #[error("run `{name}`{} is just starting or ending", pid_in_words(*pid))]
    NotPublished {
        /// The run's name.
        name: String,
        /// Its process, where it has been written down yet.
        pid: Option<u32>,
    },
    /// The folder could be someone else's trap: a link, another owner, or open to others.
    #[error("`{}` is not a folder of this user with mode 0700", path.display())]
    NotPrivate {
        /// The folder.
        path: PathBuf,
    },
    /// The kernel takes no longer path.
    #[error("the control socket's path `{}` has {length} bytes; Unix sockets take at most {MAX_SOCKET_PATH}", path.display())]
    SocketPathTooLong {
        /// The socket's path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// The lock could be neither taken nor asked for.
    #[error("cannot lock `{}`", path.display())]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
    /// A file of the folder holds something else than xpyd writes.
    #[error("cannot read `{}`", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What was wrong with it.
        source: serde_json::Error,
    },
    /// The operating system refused; the message names the path.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl RunDirError {
    /// What the user can do about it, if that does not depend on the command.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotPrivate { path } => Some(format!(
                "`ls -ld {}` shows whose it is; set XDG_RUNTIME_DIR to a folder of your own with mode 0700",
                path.display()
            )),
            _ => None,
        }
    }
}

fn pid_in_words(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}

/// Who runs: the content of `run.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunInfo {
    /// The run's name.
    pub name: String,
    /// Process id of xpyd.
    pub pid: u32,
    /// When that process started, in clock ticks after boot. With the boot it tells a process from a later one that
    /// got the same id.
    pub start_time_ticks: u64,
    /// The boot of the machine, from `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// Version of xpyd.
    pub version: String,
    /// The profile, by name or path.
    pub profile: String,
    /// The name clients use for the model.
    pub model: String,
    /// Where clients send requests: `http://127.0.0.1:9100`.
    pub proxy_url: String,
    /// Where programs ask about the run, and stop it: HTTP over this Unix socket.
    #[serde(default)]
    pub control_socket: PathBuf,
    /// The file with the API key that was made for the run's engines; `None` if they have the user's, or none.
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
    /// Whether its engines outlive xpyd for a while, should it disappear.
    #[serde(default)]
    pub keeps_engines: bool,
}

/// An engine of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunEngine {
    /// Its name.
    pub id: EngineId,
    /// What it does.
    pub role: Role,
    /// Its log file, relative to the run's logs folder.
    pub log_file: PathBuf,
}

impl RunInfo {
    /// What this process can say of itself. Profile, model, proxy, socket, logs and engines start empty.
    pub fn of_this_process(name: &str) -> io::Result<Self> {
        let pid = std::process::id();
        Ok(Self {
            name: name.to_owned(),
            pid,
            start_time_ticks: start_time_ticks(pid)?,
            boot_id: boot_id()?,
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

    /// Whether the process that wrote this is still there: same id, same start, same boot.
    pub fn is_alive(&self) -> bool {
        boot_id().is_ok_and(|boot_id| boot_id == self.boot_id)
            // A zombie has ended, holds nothing, and only waits for its parent to notice.
            && state_and_start(self.pid)
                .is_ok_and(|(state, ticks)| ticks == self.start_time_ticks && !matches!(state, 'Z' | 'X'))
    }

    /// Whether both describe the same run, not just the same name.
    pub fn is_same_run(&self, other: &Self) -> bool {
        (self.pid, self.start_time_ticks, &self.boot_id) == (other.pid, other.start_time_ticks, &other.boot_id)
    }
}

/// How a run ended, for whoever asked it to: the content of `outcome.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunOutcome {
    /// Process id of the xpyd that ended.
    pub pid: u32,
    /// When that process had started, in clock ticks after boot.
    pub start_time_ticks: u64,
    /// The code it exits with.
    pub exit_code: u8,
    /// What of the run is still there, one line each; empty after a complete teardown.
    pub leftovers: Vec<String>,
}

/// The runtime folder of the run that this process is. Holds its lock; dropping it ends the run for everyone else.
#[derive(Debug)]
pub struct RunDir {
    folder: PathBuf,
    socket_path: PathBuf,
    /// The lock belongs to this open file and goes with it, however the process ends.
    _lock: File,
}

impl RunDir {
    /// Takes the lock of the run `name`, and removes what a killed run of that name left.
    pub fn acquire(name: &str) -> Result<Self, RunDirError> {
        Self::acquire_in(&runtime_root(), name)
    }

    /// [`RunDir::acquire`] below another folder than the user's.
    pub fn acquire_in(root: &Path, name: &str) -> Result<Self, RunDirError> {
        check_name(name)?;
        make_private(root)?;
        let folder = root.join(name);
        let socket_path = folder.join(SOCKET_FILE);
        let length = socket_path.as_os_str().len();
        if length > MAX_SOCKET_PATH {
            return Err(RunDirError::SocketPathTooLong {
                path: socket_path,
                length,
            });
        }
        make_private(&folder)?;
        let lock_path = folder.join(LOCK_FILE);
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)?;
        match fcntl(lock.file(), FcntlArg::F_OFD_SETLK(&whole_file_write_lock())) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => {
                return Err(RunDirError::AlreadyRunning {
                    name: name.to_owned(),
                    pid: read_pid(&lock_path),
                });
            }
            Err(source) => {
                return Err(RunDirError::Lock {
                    path: lock_path,
                    source,
                });
            }
        }
        lock.set_len(0)?;
        writeln!(lock, "{}", std::process::id())?;
        remove_if_there(&folder.join(RUN_FILE))?;
        remove_if_there(&socket_path)?;
        Ok(Self {
            folder,
            socket_path,
            _lock: lock,
        })
    }

    /// Tells other commands that the run is there. From now on [`find`] finds it.
    pub fn publish(&self, info: &RunInfo) -> Result<(), RunDirError> {
        self.write(RUN_FILE, info)
    }

    /// Leaves word of how the run ended, for `xpyd down`. To be called last: what it says is taken as the truth.
    pub fn record_outcome(&self, status: ExitStatus, leftovers: &[String]) -> Result<(), RunDirError> {
        let pid = std::process::id();
        let outcome = RunOutcome {
            pid,
            start_time_ticks: start_time_ticks(pid)?,
            exit_code: status.code(),
            leftovers: leftovers.to_vec(),
        };
        self.write(OUTCOME_FILE, &outcome)
    }

    /// Writes the API key of the run's engines for its user alone, and returns where. It stays while the engines do.
    pub fn write_engine_key(&self, key: &str) -> Result<PathBuf, RunDirError> {
        let path = self.folder.join(ENGINE_KEY_FILE);
        self.replace(ENGINE_KEY_FILE, format!("{key}\n").as_bytes())?;
        Ok(path)
    }

    /// Removes the key of engines that are gone.
    pub fn remove_engine_key(&self) {
        if let Err(error) = remove_if_there(&self.folder.join(ENGINE_KEY_FILE)) {
            tracing::warn!(%error, "cannot remove the key of the engines");
        }
    }

    /// Where a guardian that keeps engines waits for the next run of this name.
    pub fn attach_path(&self) -> PathBuf {
        self.folder.join(ATTACH_FILE)
    }

    /// Where the control socket is, or will be.
    pub fn socket_path(&self) -> &Path {
        &self.socket_path
    }

    /// Opens the control socket. Must be called within a tokio runtime.
    pub fn listen(&self) -> io::Result<UnixListener> {
        let listener = UnixListener::bind(&self.socket_path)?;
        fs_err::set_permissions(&self.socket_path, Permissions::from_mode(0o600))?;
        Ok(listener)
    }

    fn write(&self, file_name: &str, content: &impl Serialize) -> Result<(), RunDirError> {
        let text = serde_json::to_vec_pretty(content).map_err(|source| RunDirError::Unreadable {
            path: self.folder.join(file_name),
            source,
        })?;
        Ok(self.replace(file_name, &text)?)
    }

    /// Replaces a file as a whole, so that no reader sees half of it.
    fn replace(&self, file_name: &str, content: &[u8]) -> io::Result<()> {
        let half_written = self.folder.join(format!("{file_name}.new"));
        remove_if_there(&half_written)?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&half_written)?;
        file.write_all(content)?;
        fs_err::rename(&half_written, self.folder.join(file_name))
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // Before the lock goes: once it is free, these files may be the next run's.
        for path in [&self.folder.join(RUN_FILE), &self.socket_path] {
            if let Err(error) = remove_if_there(path) {
                tracing::warn!(%error, "cannot tidy the runtime folder");
            }
        }
    }
}

/// The run of this name, or `None` if none is there.
pub fn find(name: &str) -> Result<Option<RunInfo>, RunDirError> {
    find_in(&runtime_root(), name)
}

/// [`find`] below another folder than the user's.
pub fn find_in(root: &Path, name: &str) -> Result<Option<RunInfo>, RunDirError> {
    check_name(name)?;
    let folder = root.join(name);
    let lock_path = folder.join(LOCK_FILE);
    if !is_locked(&lock_path)? {
        return Ok(None);
    }
    // The folder is there, so it must be ours before anything in it is believed.
    check_private(root)?;
    check_private(&folder)?;
    let info: Option<RunInfo> = read_json(&folder.join(RUN_FILE))?;
    match info.filter(RunInfo::is_alive) {
        Some(info) => Ok(Some(info)),
        // The run may have ended between the two looks.
        None if !is_locked(&lock_path)? => Ok(None),
        None => Err(RunDirError::NotPublished {
            name: name.to_owned(),
            pid: read_pid(&lock_path),
        }),
    }
}

/// Names of runs that were killed: their files are there, and nobody holds their lock. The next run of that name removes what
/// they left.
pub fn stale() -> Vec<String> {
    stale_in(&runtime_root())
}

/// [`stale`] below another folder than the user's.
pub fn stale_in(root: &Path) -> Vec<String> {
    names(root, |folder| {
        let has_files = [RUN_FILE, SOCKET_FILE].iter().any(|file| folder.join(file).exists());
        has_files && is_locked(&folder.join(LOCK_FILE)).is_ok_and(|locked| !locked)
    })
}

/// Names of this user's runs that are there: starting, up or ending.
pub fn locked() -> Vec<String> {
    names(&runtime_root(), |folder| {
        is_locked(&folder.join(LOCK_FILE)).unwrap_or_default()
    })
}

/// Names of the runs below `root` whose folder is as wanted, in order.
fn names(root: &Path, is_wanted: impl Fn(&Path) -> bool) -> Vec<String> {
    if check_private(root).is_err() {
        return Vec::new();
    }
    let entries = fs_err::read_dir(root).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names
        .filter(|name| check_name(name).is_ok() && is_wanted(&root.join(name)))
        .collect();
    names.sort();
    names
}

/// How the run that `info` tells of has ended; `None` while it runs, and if it could not say any more.
pub fn outcome(info: &RunInfo) -> Result<Option<RunOutcome>, RunDirError> {
    outcome_in(&runtime_root(), info)
}

/// [`outcome`] below another folder than the user's.
pub fn outcome_in(root: &Path, info: &RunInfo) -> Result<Option<RunOutcome>, RunDirError> {
    let outcome: Option<RunOutcome> = read_json(&root.join(&info.name).join(OUTCOME_FILE))?;
    Ok(outcome.filter(|outcome| (outcome.pid, outcome.start_time_ticks) == (info.pid, info.start_time_ticks)))
}

/// The control socket of the run `name`, whether or not it is there.
pub fn socket_path(name: &str) -> PathBuf {
    runtime_root().join(name).join(SOCKET_FILE)
}

/// [`RunDir::attach_path`] of the run `name`, whether or not anybody waits there.
pub fn attach_path(name: &str) -> Result<PathBuf, RunDirError> {
    check_name(name)?;
    Ok(runtime_root().join(name).join(ATTACH_FILE))
}

/// The folder with all runtime folders of this user.
fn runtime_root() -> PathBuf {
    let uid = getuid();
    // Under `sudo` and `su` the variable often names another user's folder, or one that is not there.
    std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute() && fs_err::metadata(path).is_ok_and(|folder| folder.uid() == uid.as_raw()))
        .map_or_else(|| PathBuf::from(format!("/tmp/xpyd-{uid}")), |path| path.join("xpyd"))
}

/// When the process `pid` started, in clock ticks after boot.
pub fn start_time_ticks(pid: u32) -> io::Result<u64> {
    state_and_start(pid).map(|(_, ticks)| ticks)
}

/// State letter and start time of a process: fields 3 and 22 of `/proc/<pid>/stat` (proc(5)).
fn state_and_start(pid: u32) -> io::Result<(char, u64)> {
    let stat = fs_err::read_to_string(format!("/proc/{pid}/stat"))?;
    // Field 2 is the program's name in parentheses, which may itself hold spaces and parentheses.
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

/// The boot of this machine.
pub fn boot_id() -> io::Result<String> {
    Ok(fs_err::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

fn check_name(name: &str) -> Result<(), RunDirError> {
    let fits = (1..=32).contains(&name.len())
        && !name.starts_with('.')
        && name
            .chars()
            .all(|letter| letter.is_ascii_alphanumeric() || "._-".contains(letter));
    if fits {
        Ok(())
    } else {
        Err(RunDirError::BadName(name.to_owned()))
    }
}

fn make_private(path: &Path) -> Result<(), RunDirError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => {
            return Err(io::Error::new(error.kind(), format!("cannot make `{}`: {error}", path.display())).into());
        }
    }
    check_private(path)
}

fn check_private(path: &Path) -> Result<(), RunDirError> {
    let folder = fs_err::symlink_metadata(path)?;
    if folder.is_dir() && folder.uid() == getuid().as_raw() && folder.mode() & 0o777 == 0o700 {
        Ok(())
    } else {
        Err(RunDirError::NotPrivate { path: path.to_owned() })
    }
}

/// A lock on an open file description: it is not shared with a child, survives no exec, and can be asked for without
/// being taken (fcntl(2), "Open file description locks").
fn whole_file_write_lock() -> libc::flock {
    let as_short = |value: i32| i16::try_from(value).expect("the kernel's constants fit their own field");
    libc::flock {
        l_type: as_short(libc::F_WRLCK),
        l_whence: as_short(libc::SEEK_SET),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

fn is_locked(lock_path: &Path) -> Result<bool, RunDirError> {
    let file = match File::open(lock_path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    let mut lock = whole_file_write_lock();
    fcntl(file.file(), FcntlArg::F_OFD_GETLK(&mut lock)).map_err(|source| RunDirError::Lock {
        path: lock_path.to_owned(),
        source,
    })?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

fn read_pid(lock_path: &Path) -> Option<u32> {
    fs_err::read_to_string(lock_path).ok()?.trim().parse().ok()
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, RunDirError> {
    match fs_err::read(path) {
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|source| RunDirError::Unreadable {
                path: path.to_owned(),
                source,
            }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs_err::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
