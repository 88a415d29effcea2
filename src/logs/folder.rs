//! The folder of a run below `logs/`, the link to the newest one, and the removal of old ones.
//!
//! A folder that xpyd created contains the file `.xpyd-run`. xpyd locks this file during the run, and the shim locks its own log,
//! so the folder of a running run is never removed.

use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use fs_err::os::unix::fs::OpenOptionsExt as _;
use fs_err::{File, OpenOptions};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use nix::errno::Errno;

use super::LogsError;
use crate::fleet::SHIM_LOG;
use crate::private;

/// The link to the newest run's folder.
pub const LATEST: &str = "latest";

/// The file that marks a folder as created by xpyd. That xpyd locks it until it ends.
const MARKER: &str = ".xpyd-run";

/// The folder of a running run. Once this is dropped and no shim runs, it can be removed as an old one.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    _in_use: File,
    notes: Vec<String>,
}

impl RunFolder {
    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Missing features of the file system, with their consequences.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }
}

/// Creates `logs_root/<UTC time>-<run name>/`, points `logs_root/latest` at it, and removes the oldest folders that xpyd created,
/// until only `keep` are left, this one included. Folders of running runs are never removed.
pub fn create_run_folder(logs_root: &Path, run_name: &str, keep: usize) -> Result<RunFolder, LogsError> {
    private::create_folders(logs_root)?;
    let path = make_folder(logs_root, run_name)?;
    let marker = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path.join(MARKER))?;
    let mut notes = Vec::new();
    let root = logs_root.display();
    match marker.file().lock() {
        Ok(()) => remove_old(logs_root, keep)?,
        Err(error) if is_lacking(&error) => notes.push(format!(
            "`{root}`: its file system has no locks ({error}), so folders of old runs are kept; `--logs DIR` names another folder"
        )),
        Err(error) => return Err(named(&path.join(MARKER), &error).into()),
    }
    match point_latest_at(logs_root, &path) {
        Err(LogsError::Io(error)) if is_lacking(&error) => notes.push(format!(
            "`{root}`: its file system has no symbolic links, so there is no `{LATEST}`; `xpyd logs --run DIR` shows a run's logs"
        )),
        Err(LogsError::Io(error)) => return Err(named(&logs_root.join(LATEST), &error).into()),
        pointed => pointed?,
    }
    Ok(RunFolder {
        path,
        _in_use: marker,
        notes,
    })
}

/// Whether a visible process has a file of this folder open for writing: xpyd, or the shim of kept engines.
pub fn is_written(folder: &Path) -> bool {
    let processes = fs_err::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    processes
        // Processes of other users and processes that end meanwhile cannot be read.
        .filter_map(|process| std::fs::read_dir(process.path().join("fd")).ok())
        .flatten()
        .filter_map(Result::ok)
        .any(|open| {
            // The owner's bits of the link are those of the descriptor (proc(5)).
            let mode = || {
                open.path()
                    .symlink_metadata()
                    .map_or(0, |link| link.permissions().mode())
            };
            std::fs::read_link(open.path()).is_ok_and(|file| file.starts_with(folder)) && mode() & 0o200 != 0
        })
}

/// Whether the error means that the file system has no locks or no links, as Lustre, NFS, CIFS or FAT.
fn is_lacking(error: &io::Error) -> bool {
    let lacks = [
        Errno::ENOSYS,
        Errno::ENOLCK,
        Errno::EOPNOTSUPP,
        Errno::EPERM,
        Errno::EINVAL,
    ];
    error.kind() == io::ErrorKind::Unsupported
        || error
            .raw_os_error()
            .is_some_and(|code| lacks.contains(&Errno::from_raw(code)))
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("`{}`: {error}", path.display()))
}

fn make_folder(logs_root: &Path, run_name: &str) -> Result<PathBuf, LogsError> {
    // UTC, so that the order of the names is the order of the runs across changes of daylight saving time.
    let time = Timestamp::now()
        .to_zoned(TimeZone::UTC)
        .strftime("%Y%m%d-%H%M%S")
        .to_string();
    let name: String = run_name
        .chars()
        .map(|letter| {
            if letter.is_ascii_alphanumeric() || "._-".contains(letter) {
                letter
            } else {
                '_'
            }
        })
        .take(64)
        .collect();
    for attempt in 0..100 {
        // A dot sorts after the dash, so the order of names holds within a second too.
        let suffix = if attempt == 0 {
            String::new()
        } else {
            format!("-{attempt:02}")
        };
        let path = logs_root.join(format!("{time}{suffix}-{name}"));
        match private::create_folder(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(LogsError::Crowded(logs_root.to_owned()))
}

/// Replaces the link atomically.
fn point_latest_at(logs_root: &Path, folder: &Path) -> Result<(), LogsError> {
    let latest = logs_root.join(LATEST);
    if fs_err::symlink_metadata(&latest).is_ok_and(|found| !found.is_symlink()) {
        return Err(LogsError::LatestIsNotALink(latest));
    }
    let target = folder.file_name().expect("the folder was just made below the root");
    let new = logs_root.join(format!(".{LATEST}.{}", std::process::id()));
    // A leftover of a killed process with the same id.
    drop(fs_err::remove_file(&new));
    // Not of `fs_err`, which hides the error's number.
    symlink(target, &new)?;
    fs_err::rename(&new, &latest)?;
    Ok(())
}

fn remove_old(logs_root: &Path, keep: usize) -> Result<(), LogsError> {
    let mut ours: Vec<PathBuf> = fs_err::read_dir(logs_root)?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| !path.is_symlink() && path.join(MARKER).is_file())
        .collect();
    ours.sort();
    let mut surplus = ours.len().saturating_sub(keep.max(1));
    for folder in ours {
        if surplus == 0 {
            break;
        }
        // Held open until the folder is gone. If two runs remove folders at once, one of them finds fewer.
        let Ok(marker) = OpenOptions::new().write(true).open(folder.join(MARKER)) else {
            continue;
        };
        let shim = File::open(folder.join(SHIM_LOG));
        let has_shim = shim.is_ok_and(|log| log.file().try_lock().is_err());
        if has_shim || marker.file().try_lock().is_err() {
            continue;
        }
        surplus -= 1;
        match fs_err::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, "cannot remove an old run's folder");
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_an_open_file_is_in_use() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().canonicalize().expect("a path");
        let file = private::append(&path.join("xpyd.log")).expect("a file");
        assert!(is_written(&path));
        drop(file);
        let _reader = File::open(path.join("xpyd.log")).expect("a file");
        assert!(!is_written(&path));
    }

    #[test]
    fn missing_features_differ_from_refused_calls() {
        for errno in [Errno::ENOSYS, Errno::ENOLCK, Errno::EOPNOTSUPP, Errno::EPERM] {
            assert!(is_lacking(&errno.into()), "{errno}");
        }
        for errno in [Errno::EACCES, Errno::ENOSPC, Errno::EROFS] {
            assert!(!is_lacking(&errno.into()), "{errno}");
        }
    }
}
