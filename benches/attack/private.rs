//! A private mount namespace for the storm, in which a disk or /dev/shm can be full without harm to others.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// The argument of the program started in the namespace.
const MARK: &str = "XPYD_ATTACK_PRIVATE";

pub(crate) fn is_entered() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Starts this program again in a private mount namespace. Returns only if that is not allowed; it needs root.
pub(crate) fn enter() {
    let command = |program: &str| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", program]);
        command
    };
    let is_allowed = command("true")
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !is_allowed {
        return;
    }
    let Ok(program) = std::env::current_exe() else { return };
    let mut again = command(&program.to_string_lossy());
    again.args(std::env::args().skip(1)).env(MARK, "1");
    let error = again.exec();
    println!("cannot enter a private mount namespace: {error}");
}

/// Mounts a file system in memory of this many MiB.
pub(crate) fn mount(folder: &Path, mebibytes: u32) -> Result<(), String> {
    let size = format!("size={mebibytes}m");
    let status = Command::new("mount")
        .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
        .arg(folder)
        .status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("mount ended with {status}")),
        Err(error) => Err(error.to_string()),
    }
}
