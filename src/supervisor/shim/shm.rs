//! Files in `/dev/shm` that an engine leaves behind when it is killed: found while its processes live, removed after.
//!
//! A leaked segment makes every later start of vLLM fail (vLLM issues 51579 and 54002). It knows only process ids.
//! A file is identified by its inode: glibc creates a semaphore under another name first, and `/proc` shows that one.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const FOLDER: &str = "/dev/shm";

/// Files by path, with the inode that distinguishes a file from a later one of the same name.
#[derive(Debug, Clone, Default)]
pub(super) struct SharedFiles(BTreeMap<PathBuf, u64>);

impl SharedFiles {
    /// All files that exist now.
    pub(super) fn present() -> Self {
        let Ok(entries) = std::fs::read_dir(FOLDER) else {
            return Self::default();
        };
        Self(
            entries
                .flatten()
                .filter_map(|entry| {
                    let metadata = entry.metadata().ok().filter(std::fs::Metadata::is_file)?;
                    Some((entry.path(), metadata.ino()))
                })
                .collect(),
        )
    }

    /// The files at these paths.
    pub(super) fn of(files: impl IntoIterator<Item = (PathBuf, u64)>) -> Self {
        Self(files.into_iter().collect())
    }

    /// Removes all others than those whose path `keeps`.
    pub(super) fn retain(&mut self, keeps: impl Fn(&Path) -> bool) {
        self.0.retain(|path, _| keeps(path));
    }

    /// Adds the files that a process of `pids` has open or mapped, without those in `foreign`.
    ///
    /// Reading the maps of a large process costs milliseconds, so nothing is read when no new file exists.
    pub(super) fn add_used_by(&mut self, pids: impl Iterator<Item = i32>, foreign: &Self) {
        let mut unexplained = Self::present();
        unexplained
            .0
            .retain(|path, inode| foreign.0.get(path) != Some(inode) && self.0.get(path) != Some(inode));
        if unexplained.0.is_empty() {
            return;
        }
        for pid in pids {
            let used = used_by(pid);
            self.0
                .extend(unexplained.0.extract_if(.., |_, inode| used.contains(inode)));
        }
    }

    /// Removes every file that was not replaced, belongs to this user, and that no process but the `dying` uses.
    pub(super) fn remove_unused(&self, dying: &[i32]) {
        for (path, _) in self.unused_but_by(dying) {
            // It can be gone already.
            let _ = std::fs::remove_file(path);
        }
    }

    /// Every file that was not replaced, belongs to this user, and that no process uses.
    pub(super) fn unused(&self) -> Vec<(PathBuf, u64)> {
        self.unused_but_by(&[])
    }

    fn unused_but_by(&self, dying: &[i32]) -> Vec<(PathBuf, u64)> {
        let own = nix::unistd::geteuid().as_raw();
        let mut unused: Vec<(PathBuf, u64)> = self
            .0
            .iter()
            .filter(|(path, inode)| {
                std::fs::symlink_metadata(path).is_ok_and(|now| now.ino() == **inode && now.uid() == own)
            })
            .map(|(path, inode)| (path.clone(), *inode))
            .collect();
        if unused.is_empty() {
            return unused;
        }
        let Ok(entries) = std::fs::read_dir("/proc") else {
            return Vec::new();
        };
        for pid in entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| !dying.contains(pid))
        {
            let used = used_by(pid);
            unused.retain(|(_, inode)| !used.contains(inode));
        }
        unused
    }
}

/// Inodes of files in the folder that process `pid` has mapped or open. Empty for a process that is gone or that this user is not
/// allowed to read.
fn used_by(pid: i32) -> BTreeSet<u64> {
    let maps = std::fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
    let mapped = String::from_utf8_lossy(&maps)
        .lines()
        .filter(|line| line.contains(FOLDER))
        // Range, permissions, offset, device, inode, path.
        .filter_map(|line| line.split_ascii_whitespace().nth(4)?.parse().ok())
        .collect::<Vec<u64>>();
    let opened = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|target| target.starts_with(FOLDER)))
        .filter_map(|entry| Some(std::fs::metadata(entry.path()).ok()?.ino()));
    mapped.into_iter().chain(opened).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own_pid() -> i32 {
        i32::try_from(std::process::id()).unwrap()
    }

    #[test]
    fn only_unused_shared_files_are_removed() {
        let file = tempfile::Builder::new()
            .prefix("xpyd-test-")
            .tempfile_in(FOLDER)
            .unwrap();
        let mut files = SharedFiles::default();
        files.add_used_by([own_pid()].into_iter(), &SharedFiles::default());
        files.remove_unused(&[]);
        assert!(file.path().exists(), "this process has it open");
        let (handle, path) = file.keep().unwrap();
        drop(handle);
        files.remove_unused(&[]);
        assert!(!path.exists());
    }

    #[test]
    fn a_renamed_shared_file_is_recognized() {
        let file = tempfile::Builder::new()
            .prefix("xpyd-test-")
            .tempfile_in(FOLDER)
            .unwrap();
        let (handle, first) = file.keep().unwrap();
        let last = first.with_extension("last");
        std::fs::hard_link(&first, &last).unwrap();
        std::fs::remove_file(&first).unwrap();
        let mut files = SharedFiles::default();
        files.add_used_by([own_pid()].into_iter(), &SharedFiles::default());
        files.remove_unused(&[]);
        assert!(last.exists(), "this process has it open");
        drop(handle);
        files.remove_unused(&[]);
        assert!(!last.exists());
    }

    #[test]
    fn a_file_that_was_there_before_is_never_taken() {
        let file = tempfile::Builder::new()
            .prefix("xpyd-test-")
            .tempfile_in(FOLDER)
            .unwrap();
        let mut files = SharedFiles::default();
        files.add_used_by([own_pid()].into_iter(), &SharedFiles::present());
        assert!(!files.0.contains_key(file.path()));
    }

    #[test]
    fn a_new_file_of_the_same_name_is_left_alone() {
        let file = tempfile::Builder::new()
            .prefix("xpyd-test-")
            .tempfile_in(FOLDER)
            .unwrap();
        let mut files = SharedFiles::default();
        files.add_used_by([own_pid()].into_iter(), &SharedFiles::default());
        let (handle, path) = file.keep().unwrap();
        // The old file stays linked under another name, so that its inode number cannot be given to the new one.
        let aside = path.with_extension("aside");
        std::fs::rename(&path, &aside).unwrap();
        drop(handle);
        std::fs::write(&path, "somebody else's").unwrap();
        files.remove_unused(&[]);
        assert!(path.exists());
        std::fs::remove_file(&path).unwrap();
        std::fs::remove_file(&aside).unwrap();
    }
}
