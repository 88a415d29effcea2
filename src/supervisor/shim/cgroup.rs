//! A cgroup for each engine, where this process is allowed to create one: no process can leave it, and one write kills it.
//!
//! It handles files only and knows no engines. Controllers are never enabled, so the rule that inner cgroups have no processes
//! does not apply. If cgroups are read-only or of version 1, or the kernel is older than 5.14, there are none, and `tree` finds
//! the processes.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use nix::poll::{PollTimeout, poll};

/// The folder of one cgroup.
#[derive(Debug)]
pub(super) struct Cgroup(PathBuf);

impl Cgroup {
    /// Creates a child of this process's cgroup; `None` if that fails.
    pub(super) fn create(name: &str) -> Option<Self> {
        Self::create_in(&own()?, name)
    }

    fn create_in(parent: &Path, name: &str) -> Option<Self> {
        // The root of the hierarchy has no such file, but its children do.
        let folder = parent.join(name);
        fs::create_dir(&folder).ok()?;
        let cgroup = Self(folder);
        if cgroup.0.join("cgroup.kill").exists() && cgroup.entrance().is_ok() {
            return Some(cgroup);
        }
        cgroup.remove();
        None
    }

    /// The cgroups beside this process's own whose names begin with this.
    pub(super) fn named(beginning: &str) -> Vec<Self> {
        own().map_or_else(Vec::new, |parent| Self::named_in(&parent, beginning))
    }

    fn named_in(parent: &Path, beginning: &str) -> Vec<Self> {
        let entries = fs::read_dir(parent).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(beginning))
            .map(|entry| Self(entry.path()))
            .collect()
    }

    /// The file to which a process writes `0` to enter.
    pub(super) fn entrance(&self) -> io::Result<File> {
        OpenOptions::new().write(true).open(self.0.join("cgroup.procs"))
    }

    /// The processes in it, without those in child cgroups.
    pub(super) fn members(&self) -> Vec<i32> {
        let list = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        list.lines().filter_map(|pid| pid.parse().ok()).collect()
    }

    /// SIGKILL to all its processes at once; none can fork in between.
    pub(super) fn kill(&self) {
        // This fails only if the cgroup is gone, and its processes with it.
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
    }

    /// Removes it. The kernel removes a process from it some moments after its parent has reaped it.
    pub(super) fn remove(&self) {
        const ATTEMPTS: usize = 50;
        for _ in 0..ATTEMPTS {
            match fs::remove_dir(&self.0) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    let _ = poll(&mut [], PollTimeout::from(1_u8));
                }
                Ok(()) | Err(_) => return,
            }
        }
    }
}

/// The folder of this process's cgroup, if it can create children there that one write kills.
pub(super) fn delegated() -> Option<PathBuf> {
    let folder = own()?;
    let may_write = nix::unistd::access(&folder, nix::unistd::AccessFlags::W_OK).is_ok();
    // The root of the hierarchy has no such file, but its children do.
    let has_kill = folder.join("cgroup.kill").exists() || !folder.join("cgroup.events").exists();
    (may_write && has_kill).then_some(folder)
}

/// The folder of this process's own cgroup.
fn own() -> Option<PathBuf> {
    let read = |path| fs::read_to_string(path).ok();
    own_in(&read("/proc/self/cgroup")?, &read("/proc/self/mountinfo")?)
}

/// Version 2 is line `0::PATH`; the mount shows the part of the hierarchy below its root.
fn own_in(membership: &str, mounts: &str) -> Option<PathBuf> {
    let path = Path::new(membership.lines().find_map(|line| line.strip_prefix("0::"))?);
    mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let fields: Vec<&str> = mount.split(' ').collect();
        let (root, folder) = (fields.get(3)?, fields.get(4)?);
        let below = path.strip_prefix(root).ok().filter(|_| kind.starts_with("cgroup2 "))?;
        Some(Path::new(folder).join(below))
    })
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn own_cgroup_is_found_in_pure_hybrid_and_nested_hierarchies() {
        let hybrid = "31 1 0:20 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let folder = own_in("4:memory:/x\n0::/\n", hybrid).unwrap();
        assert_eq!(folder, Path::new("/sys/fs/cgroup/unified"));
        let pure = "35 24 0:30 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        let folder = own_in("0::/user.slice/session-1.scope\n", pure).unwrap();
        assert_eq!(folder, Path::new("/sys/fs/cgroup/user.slice/session-1.scope"));
        let bound = "35 24 0:30 /docker/7 /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n";
        assert_eq!(
            own_in("0::/docker/7/a\n", bound).unwrap(),
            Path::new("/sys/fs/cgroup/a")
        );
        assert_eq!(own_in("0::/elsewhere\n", bound), None);
        assert_eq!(own_in("4:memory:/x\n", hybrid), None);
    }

    #[test]
    fn a_folder_that_is_no_cgroup_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        assert!(Cgroup::create_in(parent.path(), "xpyd-1").is_none());
        assert!(Cgroup::create_in(&parent.path().join("missing"), "xpyd-1").is_none());
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn cgroups_are_found_by_prefix_and_killed_by_one_write() {
        let parent = tempfile::tempdir().unwrap();
        for name in ["xpyd-1.decoder1.1", "xpyd-12.decoder1.1"] {
            fs::create_dir(parent.path().join(name)).unwrap();
        }
        let [cgroup] = &Cgroup::named_in(parent.path(), "xpyd-1.")[..] else {
            panic!("one is ours")
        };
        fs::write(cgroup.0.join("cgroup.procs"), "17\n4711\n").unwrap();
        assert_eq!(cgroup.members(), [17, 4711]);
        cgroup.kill();
        assert_eq!(fs::read_to_string(cgroup.0.join("cgroup.kill")).unwrap(), "1");
    }

    #[test]
    fn a_real_cgroup_holds_kills_and_goes() {
        // Only where this user may make one.
        let Some(cgroup) = Cgroup::create(&format!("xpyd-test-{}", std::process::id())) else {
            return;
        };
        let mut child = Command::new("sleep").arg("1000").stdout(Stdio::null()).spawn().unwrap();
        fs::write(cgroup.0.join("cgroup.procs"), child.id().to_string()).unwrap();
        assert_eq!(cgroup.members(), [i32::try_from(child.id()).unwrap()]);
        cgroup.kill();
        assert!(!child.wait().unwrap().success());
        cgroup.remove();
        assert!(!cgroup.0.exists());
    }
}
