//! The runtime folder of a run: its lock, its sockets, and `run.json`.
//!
//! The folder is `$XDG_RUNTIME_DIR/xpyd/<name>/`, or `/tmp/xpyd-<uid>/<name>/` without that variable. It holds `lock` (locked as
//! long as the run exists, contains the pid), `run.json` ([`RunInfo`]), `engine-key`, `control.sock` and `attach.sock` (where the
//! shim of a run whose xpyd is gone waits). A log-out removes the folder, and cleaners of `/tmp` remove files, so the run restores
//! them, and also has abstract sockets ([`KernelName`]). A reader never takes the lock, it only queries its holder, so reading
//! cannot disturb the start of another run. The next run removes the files of a killed one.

use std::fmt;
use std::fs::{DirBuilder, Permissions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use fs_err::os::unix::fs::OpenOptionsExt;
use fs_err::{File, OpenOptions};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::unistd::getuid;
use serde::de::DeserializeOwned;
use tokio::net::UnixListener;

use super::find::{listener_at, runtime_root};
use crate::sockets::{self, KernelName, Who};

pub use super::find::{FoundRun, all, fate_at_logout, find, find_in, kept_sockets, stale, stale_in, visible};
pub use super::run::{RunEngine, RunInfo, RunOutcome, has_outcome, outcome, process_age, record_outcome};

/// The default name of a run.
pub const DEFAULT_NAME: &str = "default";

/// Longest path of a Unix socket in bytes: `sun_path` has 108, one of them for the final NUL (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

pub(super) const LOCK_FILE: &str = "lock";
pub(super) const RUN_FILE: &str = "run.json";
pub(super) const SOCKET_FILE: &str = "control.sock";
const ENGINE_KEY_FILE: &str = "engine-key";
/// Not longer than the name of the control socket, whose path is checked.
pub(super) const ATTACH_FILE: &str = "attach.sock";

/// Why a runtime folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// The name is no valid folder name.
    #[error("invalid run name `{0}`: use 1 to 32 letters, digits, `.`, `_` or `-`, and no `.` at the beginning")]
    BadName(String),
    /// A run of this name holds the lock.
    #[error("run `{name}` already exists{}", pid_in_words(*pid))]
    AlreadyRunning {
        /// The run's name.
        name: String,
        /// Its process id, if the lock file has it already.
        pid: Option<u32>,
    },
    /// A run of this name holds the lock, and does not answer.
    #[error("run `{name}`{} is starting or ending", pid_in_words(*pid))]
    NotPublished {
        /// The run's name.
        name: String,
        /// Its process id, if the lock file has it already.
        pid: Option<u32>,
    },
    /// Runs of this name exist in several environments, or of several users.
    #[error("several runs are named `{name}`: pids {}", pids.iter().map(u32::to_string).collect::<Vec<_>>().join(", "))]
    Several {
        /// The name.
        name: String,
        /// Their process ids.
        pids: Vec<u32>,
    },
    /// The folder is not safe: a link, owned by another user, or open to others.
    #[error("`{}` is not a folder of this user with mode 0700", path.display())]
    NotPrivate {
        /// The folder.
        path: PathBuf,
    },
    /// The path exceeds the kernel's limit.
    #[error("the control socket's path `{}` has {length} bytes; Unix sockets take at most {MAX_SOCKET_PATH}", path.display())]
    SocketPathTooLong {
        /// The socket's path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// The lock could neither be taken nor queried.
    #[error("cannot lock `{}`", path.display())]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// The error of the system call.
        source: Errno,
    },
    /// A file of the folder is not what xpyd writes.
    #[error("cannot read `{}`", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The parse error.
        source: serde_json::Error,
    },
    /// The operating system refused; the message names the path.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl RunDirError {
    /// The fix, if it does not depend on the command.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotPrivate { path } => Some(format!(
                "`ls -ld {}` shows its owner; set XDG_RUNTIME_DIR to a folder of your own with mode 0700",
                path.display()
            )),
            Self::Several { .. } => Some(
                "`xpyd ps` shows them; set XDG_RUNTIME_DIR to that of the run you mean, or run the command as its user"
                    .to_owned(),
            ),
            Self::SocketPathTooLong { .. } => Some(
                "set XDG_RUNTIME_DIR to a folder with a shorter path, or give the run a shorter `--name`".to_owned(),
            ),
            Self::Lock { .. } => {
                Some("set XDG_RUNTIME_DIR to a folder of your own, with mode 0700, on a local disk".to_owned())
            }
            _ => None,
        }
    }
}

fn pid_in_words(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}

/// The runtime folder of this process's run. Holds its lock; dropping it ends the run for other commands.
pub struct RunDir {
    root: PathBuf,
    folder: PathBuf,
    socket_path: PathBuf,
    /// The name of its abstract socket; `None` if another process has taken it.
    by_name: Option<OwnedFd>,
    held: Mutex<FolderContents>,
}

/// The content of the folder, for restoring it.
struct FolderContents {
    lock: Lock,
    info: Option<Vec<u8>>,
    engine_key: Option<String>,
}

/// The lock of a run. It belongs to these open files, and is released with them, however the process ends.
struct Lock {
    file: File,
    /// The folder is locked as well, because systemd-tmpfiles skips the content of a locked folder.
    _folder: Option<File>,
}

impl fmt::Debug for RunDir {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("RunDir")
            .field("folder", &self.folder)
            .finish_non_exhaustive()
    }
}

impl RunDir {
    /// Takes the lock of the run `name`, and removes the files of a killed run of that name.
    pub fn acquire(name: &str) -> Result<Self, RunDirError> {
        // Once this run is up, no command would find a run of the same name in another environment.
        let pid = match find(name) {
            Ok(Some(there)) => Some(Some(there.pid)),
            Err(RunDirError::NotPublished { pid, .. }) => Some(pid),
            Err(RunDirError::Several { pids, .. }) => Some(pids.first().copied()),
            Ok(None) | Err(_) => None,
        };
        if let Some(pid) = pid {
            let name = name.to_owned();
            return Err(RunDirError::AlreadyRunning { name, pid });
        }
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
        let (lock, has_locks) = lock_in(&folder, name)?;
        let kernel_name = KernelName::of(Who::Xpyd, root, name);
        let by_name = kernel_name.take();
        // The lock file can have been removed, but not the abstract socket.
        for socket in [&socket_path, &kernel_name.socket()] {
            if let Some(pid) = listener_at(socket) {
                return Err(RunDirError::AlreadyRunning {
                    name: name.to_owned(),
                    pid: Some(pid),
                });
            }
        }
        if let (Err(error), false) = (&by_name, has_locks) {
            return Err(RunDirError::Lock {
                path: folder.join(LOCK_FILE),
                source: error.raw_os_error().map_or(Errno::ENOLCK, Errno::from_raw),
            });
        }
        remove_if_there(&folder.join(RUN_FILE))?;
        remove_if_there(&socket_path)?;
        Ok(Self {
            root: root.to_owned(),
            socket_path,
            by_name: by_name.ok(),
            held: Mutex::new(FolderContents {
                lock,
                info: None,
                engine_key: None,
            }),
            folder,
        })
    }

    fn held(&self) -> MutexGuard<'_, FolderContents> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes `run.json`. From now on [`find`] finds the run.
    pub fn publish(&self, info: &RunInfo) -> Result<(), RunDirError> {
        let text = serde_json::to_vec_pretty(info).map_err(|source| RunDirError::Unreadable {
            path: self.folder.join(RUN_FILE),
            source,
        })?;
        self.replace(RUN_FILE, &text)?;
        self.held().info = Some(text);
        Ok(())
    }

    /// Writes the API key of the run's engines, readable by its user only, and returns the path. It stays as long as the engines.
    pub fn write_engine_key(&self, key: &str) -> Result<PathBuf, RunDirError> {
        let path = self.folder.join(ENGINE_KEY_FILE);
        self.replace(ENGINE_KEY_FILE, format!("{key}\n").as_bytes())?;
        self.held().engine_key = Some(key.to_owned());
        Ok(path)
    }

    /// Removes the key, once the engines are gone.
    pub fn remove_engine_key(&self) {
        self.held().engine_key = None;
        if let Err(error) = remove_if_there(&self.folder.join(ENGINE_KEY_FILE)) {
            tracing::warn!(%error, "cannot remove the key of the engines");
        }
    }

    /// The path of `attach.sock`, where a shim waits for the next run of this name.
    pub fn attach_path(&self) -> PathBuf {
        self.folder.join(ATTACH_FILE)
    }

    /// The path of the control socket.
    pub fn socket_path(&self) -> &Path {
        &self.socket_path
    }

    /// Opens the control socket. Must be called within a tokio runtime.
    pub fn listen(&self) -> io::Result<UnixListener> {
        let listener = UnixListener::bind(&self.socket_path)?;
        fs_err::set_permissions(&self.socket_path, Permissions::from_mode(0o600))?;
        Ok(listener)
    }

    /// Opens the abstract control socket. Must be called within a tokio runtime.
    pub fn listen_by_name(&self) -> io::Result<Option<UnixListener>> {
        let listener = self.by_name.as_ref().map(sockets::listen_to).transpose()?;
        listener.map(UnixListener::from_std).transpose()
    }

    /// Restores removed files. Returns the control socket if it had to be opened again.
    pub fn restore(&self) -> Result<Option<UnixListener>, RunDirError> {
        let mut held = self.held();
        let is_there = |file: &str| fs_err::symlink_metadata(self.folder.join(file)).is_ok();
        let has_key = held.engine_key.is_none() || is_there(ENGINE_KEY_FILE);
        if self.is_in_place(&held.lock) && is_there(RUN_FILE) && is_there(SOCKET_FILE) && has_key {
            return Ok(None);
        }
        make_private(&self.root)?;
        make_private(&self.folder)?;
        if !self.is_in_place(&held.lock) {
            let name = self.folder.file_name().unwrap_or_default().to_string_lossy();
            (held.lock, _) = lock_in(&self.folder, &name)?;
        }
        if let Some(info) = held.info.as_ref().filter(|_| !is_there(RUN_FILE)) {
            self.replace(RUN_FILE, info)?;
        }
        if let Some(key) = held.engine_key.as_ref().filter(|_| !is_there(ENGINE_KEY_FILE)) {
            self.replace(ENGINE_KEY_FILE, format!("{key}\n").as_bytes())?;
        }
        tracing::info!(folder = %self.folder.display(), "restored the runtime folder");
        Ok(if is_there(SOCKET_FILE) {
            None
        } else {
            Some(self.listen()?)
        })
    }

    /// Whether the lock's path still is the locked file.
    fn is_in_place(&self, lock: &Lock) -> bool {
        is_same_file(&lock.file, &self.folder.join(LOCK_FILE))
    }

    /// Replaces a file atomically.
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
        // If the lock file belongs to another run, the other files do as well.
        if !self.is_in_place(&self.held().lock) {
            return;
        }
        // Before the lock is released: afterwards these files can be the next run's.
        for path in [&self.folder.join(RUN_FILE), &self.socket_path] {
            if let Err(error) = remove_if_there(path) {
                tracing::warn!(%error, "cannot remove the runtime folder");
            }
        }
        // Nothing stays of a run that keeps no engines.
        let keeps = [ATTACH_FILE, ENGINE_KEY_FILE]
            .iter()
            .any(|file| self.folder.join(file).exists());
        if !keeps && remove_if_there(&self.folder.join(LOCK_FILE)).is_ok() {
            // A folder with other files stays.
            let _ = fs_err::remove_dir(&self.folder);
        }
    }
}

/// Opens and locks the lock file. The flag is false if the file system has no locks.
fn lock_in(folder: &Path, name: &str) -> Result<(Lock, bool), RunDirError> {
    let path = folder.join(LOCK_FILE);
    loop {
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)?;
        let has_locks = match fcntl(lock.file(), FcntlArg::F_OFD_SETLK(&whole_file_write_lock())) {
            Ok(_) => true,
            Err(Errno::EAGAIN | Errno::EACCES) => {
                return Err(RunDirError::AlreadyRunning {
                    name: name.to_owned(),
                    pid: read_pid(&path),
                });
            }
            Err(errno) if lacks_locks(errno) => false,
            Err(source) => return Err(RunDirError::Lock { path, source }),
        };
        // A run that ends removes its lock file before it releases the lock.
        if !is_same_file(&lock, &path) {
            continue;
        }
        lock.set_len(0)?;
        writeln!(lock, "{}", std::process::id())?;
        let lock = Lock {
            file: lock,
            _folder: lock_folder(folder),
        };
        return Ok((lock, has_locks));
    }
}

/// Whether the error means that the file system has no locks.
fn lacks_locks(errno: Errno) -> bool {
    matches!(errno, Errno::ENOLCK | Errno::ENOSYS | Errno::EOPNOTSUPP)
}

/// Locks a folder against cleaners that respect locks, if the file system supports it.
fn lock_folder(folder: &Path) -> Option<File> {
    let folder = File::open(folder).ok()?;
    folder.file().try_lock_shared().ok()?;
    Some(folder)
}

fn is_same_file(open: &File, path: &Path) -> bool {
    let (open, named) = (open.metadata(), fs_err::symlink_metadata(path));
    open.is_ok_and(|open| named.is_ok_and(|named| (open.dev(), open.ino()) == (named.dev(), named.ino())))
}

pub(super) fn check_name(name: &str) -> Result<(), RunDirError> {
    let fits = (1..=32).contains(&name.len())
        && !name.starts_with(['.', '-'])
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
        // The umask can have removed permissions that its user needs.
        Ok(()) => fs_err::set_permissions(path, Permissions::from_mode(0o700))?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => {
            return Err(io::Error::new(error.kind(), format!("cannot create `{}`: {error}", path.display())).into());
        }
    }
    check_private(path)
}

pub(super) fn check_private(path: &Path) -> Result<(), RunDirError> {
    let folder = fs_err::symlink_metadata(path)?;
    if folder.is_dir() && folder.uid() == getuid().as_raw() && folder.mode() & 0o777 == 0o700 {
        Ok(())
    } else {
        Err(RunDirError::NotPrivate { path: path.to_owned() })
    }
}

/// A lock on an open file description: it is not shared with a child, does not survive exec, and can be queried without being
/// taken (fcntl(2), "Open file description locks").
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

pub(super) fn is_locked(lock_path: &Path) -> Result<bool, RunDirError> {
    let file = match File::open(lock_path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    let mut lock = whole_file_write_lock();
    match fcntl(file.file(), FcntlArg::F_OFD_GETLK(&mut lock)) {
        Ok(_) => Ok(i32::from(lock.l_type) != libc::F_UNLCK),
        // Then only the abstract socket shows that the run exists.
        Err(errno) if lacks_locks(errno) => Ok(false),
        Err(source) => Err(RunDirError::Lock {
            path: lock_path.to_owned(),
            source,
        }),
    }
}

pub(super) fn read_pid(lock_path: &Path) -> Option<u32> {
    fs_err::read_to_string(lock_path).ok()?.trim().parse().ok()
}

pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, RunDirError> {
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
