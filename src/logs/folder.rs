//! The folder of one run below `logs/`, the link to the newest one, and the limit on how many are kept.
//!
//! A folder that xpyd made holds the file `.xpyd-run`, which the run keeps locked. So old folders can be told from
//! other people's, and from those of runs that still write.

use std::io;
use std::path::{Path, PathBuf};

use fs_err::os::unix::fs::{OpenOptionsExt as _, symlink};
use fs_err::{File, OpenOptions};
use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::LogsError;
use crate::private;

/// The link to the newest run's folder.
pub const LATEST: &str = "latest";

/// Marks a folder that xpyd made, and is locked while its run lives.
const MARKER: &str = ".xpyd-run";

/// The folder of a run that has not ended. It may be removed, as an old one, once this is dropped.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    _in_use: File,
}

impl RunFolder {
    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Makes `logs_root/<UTC time>-<run name>/`, points `logs_root/latest` at it, and removes the oldest folders that xpyd
/// made, until only `keep` are left, this one included. Folders of runs that have not ended are never removed.
pub fn create_run_folder(logs_root: &Path, run_name: &str, keep: usize) -> Result<RunFolder, LogsError> {
    private::create_folders(logs_root)?;
    let path = make_folder(logs_root, run_name)?;
    let marker = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path.join(MARKER))?;
    marker.file().lock()?;
    point_latest_at(logs_root, &path)?;
    remove_old(logs_root, keep)?;
    Ok(RunFolder { path, _in_use: marker })
}

fn make_folder(logs_root: &Path, run_name: &str) -> Result<PathBuf, LogsError> {
    // UTC, so that the order of the names is the order of the runs, also when the clocks change.
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
        // A dot comes after the dash, so the order of names holds within a second too.
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

/// Replaces the link in one step, so that there is always one.
fn point_latest_at(logs_root: &Path, folder: &Path) -> Result<(), LogsError> {
    let latest = logs_root.join(LATEST);
    if fs_err::symlink_metadata(&latest).is_ok_and(|found| !found.is_symlink()) {
        return Err(LogsError::LatestIsNotALink(latest));
    }
    let target = folder.file_name().expect("the folder was just made below the root");
    let new = logs_root.join(format!(".{LATEST}.{}", std::process::id()));
    // A leftover of a killed process that had our id.
    drop(fs_err::remove_file(&new));
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
        // Held open until the folder is gone. Two runs that tidy at once may both come here; one of them finds less.
        let Ok(marker) = OpenOptions::new().write(true).open(folder.join(MARKER)) else {
            continue;
        };
        if marker.file().try_lock().is_err() {
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
