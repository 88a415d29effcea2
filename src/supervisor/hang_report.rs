//! `<engine>.hang.<incarnation>.txt`: the processes, threads, metrics and Python stacks of a hung engine, written before it is
//! killed.
//!
//! Bounded in time and size, because the engine has to end. Without environment and command line, which can contain secrets.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;
use tokio::time::timeout;

use super::shim::tree::{Process, ProcessTable};
use crate::fleet::{EngineId, Incarnation};
use crate::private;

/// Time limit for reading `/proc`.
const LOOK_DEADLINE: Duration = Duration::from_secs(2);

/// Time limit for `py-spy`, for all processes together.
const STACKS_DEADLINE: Duration = Duration::from_secs(3);

/// The most processes in the report, and the most threads of each.
const MOST_PROCESSES: usize = 64;
const MOST_THREADS: usize = 64;

/// The most processes whose Python stacks are read.
const MOST_STACKS: usize = 16;

/// The most bytes of one stack, of the kernel or of Python.
const MOST_STACK_BYTES: u64 = 64 * 1024;

/// The hung engine to report on.
#[derive(Debug)]
pub(super) struct HangReport {
    /// The run's folder.
    pub(super) folder: PathBuf,
    /// The engine.
    pub(super) engine: EngineId,
    /// The incarnation that hangs.
    pub(super) incarnation: Incarnation,
    /// Its leader's process id, if known.
    pub(super) leader: Option<u32>,
}

impl HangReport {
    /// Writes the file. Returns `reason`, with the name of the file if it could be written.
    pub(super) async fn write(self, reason: String, metrics: &str) -> String {
        let name = format!("{}.hang.{}.txt", self.engine, self.incarnation);
        let mut text = format!(
            "{}, start {}, {}\n{reason}\n",
            self.engine,
            self.incarnation,
            jiff::Timestamp::now()
        );
        let (pids, processes) = self.processes().await;
        text.push_str(&processes);
        if !metrics.is_empty() {
            text.push_str("\nits metrics\n");
            text.push_str(metrics);
        }
        text.push_str(&python_stacks(Path::new("py-spy"), &pids).await);
        match private::write(&self.folder.join(&name), text) {
            Ok(()) => format!("{reason}; what it was doing is in `{name}`"),
            Err(error) => {
                tracing::warn!(engine = %self.engine, %error, "the state of a hung engine is not written");
                reason
            }
        }
    }

    /// The ids of its processes, and their description as text.
    async fn processes(&self) -> (Vec<i32>, String) {
        let Some(leader) = self.leader.and_then(|pid| i32::try_from(pid).ok()) else {
            return Default::default();
        };
        // Reading `/proc` can block on a process that waits in the kernel.
        let look = tokio::task::spawn_blocking(move || {
            let processes: Vec<Process> = ProcessTable::read()
                .led_by(leader)
                .into_iter()
                .take(MOST_PROCESSES)
                .collect();
            let text = processes.iter().map(describe).collect::<String>();
            let pids = processes.iter().map(|process| process.pid).collect();
            (pids, format!("\nits processes (CPU time in clock ticks)\n{text}"))
        });
        match timeout(LOOK_DEADLINE, look).await {
            Ok(Ok(found)) => found,
            Ok(Err(_)) | Err(_) => (
                Vec::new(),
                "\nits processes could not be looked at in time\n".to_owned(),
            ),
        }
    }
}

/// The description of one process and its threads.
fn describe(process: &Process) -> String {
    let folder = PathBuf::from(format!("/proc/{}", process.pid));
    let mut text = format!(
        "{} {}: state {}, {} MiB resident, CPU time {}, waits in {}\n",
        process.pid,
        process.name,
        process.state,
        process.resident_bytes() >> 20,
        process.cpu_ticks,
        waits_in(&folder)
    );
    let stack = read_start(&folder.join("stack"));
    for line in stack.lines() {
        let _ = writeln!(text, "    kernel: {line}");
    }
    let Ok(threads) = std::fs::read_dir(folder.join("task")) else {
        return text;
    };
    for thread in threads.flatten().take(MOST_THREADS) {
        let Some(found) = Process::read_in(&thread.path()) else {
            continue;
        };
        let _ = writeln!(
            text,
            "    thread {} {}: state {}, CPU time {}, waits in {}",
            found.pid,
            found.name,
            found.state,
            found.cpu_ticks,
            waits_in(&thread.path())
        );
    }
    text
}

/// The kernel function in which a process or thread waits; `-` if it does not wait, or this user is not allowed to read it.
fn waits_in(folder: &Path) -> String {
    let name = read_start(&folder.join("wchan"));
    match name.trim() {
        "" | "0" => "-".to_owned(),
        name => name.to_owned(),
    }
}

/// The beginning of a file; empty if it cannot be read.
fn read_start(path: &Path) -> String {
    use std::io::Read as _;
    let mut text = Vec::new();
    if let Ok(file) = std::fs::File::open(path) {
        // What was read before an error is as good.
        let _ = file.take(MOST_STACK_BYTES).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// What `py-spy` sees of these processes; empty if it is not installed, or sees nothing.
async fn python_stacks(program: &Path, pids: &[i32]) -> String {
    let dumps = pids.iter().take(MOST_STACKS).map(|pid| async move {
        let dump = timeout(STACKS_DEADLINE, python_stack(program, *pid)).await;
        dump.ok().flatten().map(|text| (*pid, text))
    });
    let mut text = String::new();
    for (pid, stack) in join_all(dumps).await.into_iter().flatten() {
        let _ = write!(text, "\npy-spy dump of {pid}\n{stack}");
    }
    text
}

async fn python_stack(program: &Path, pid: i32) -> Option<String> {
    let mut child = Command::new(program)
        .args(["dump", "--pid", &pid.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .ok()?;
    let mut bytes = Vec::new();
    let output = child.stdout.take()?;
    output.take(MOST_STACK_BYTES).read_to_end(&mut bytes).await.ok()?;
    let text = String::from_utf8_lossy(&bytes);
    // Its first line is the command line, which can contain keys.
    let mut kept = String::new();
    for line in text.lines().filter(|line| !line.starts_with("Process ")) {
        let _ = writeln!(kept, "{line}");
    }
    (!kept.is_empty()).then_some(kept)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// A stand-in for `py-spy`.
    fn script(folder: &Path, text: &str) -> PathBuf {
        let path = folder.join("py-spy");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test]
    async fn python_stacks_are_kept_without_the_command_line() {
        let folder = tempfile::tempdir().unwrap();
        let spy = script(
            folder.path(),
            "echo \"Process $3: vllm serve --api-key swordfish\"; echo 'Thread 7 (idle): \"MainThread\"'",
        );
        let text = python_stacks(&spy, &[7, 8]).await;
        assert!(!text.contains("swordfish"), "{text}");
        assert_eq!(text.matches("MainThread").count(), 2, "{text}");
        assert!(text.contains("py-spy dump of 8"), "{text}");
    }

    #[tokio::test]
    async fn without_a_spy_there_are_no_python_stacks() {
        assert_eq!(python_stacks(Path::new("/no/such/spy"), &[1]).await, "");
    }

    #[tokio::test(start_paused = true)]
    async fn a_hung_py_spy_is_ended_at_its_deadline() {
        let folder = tempfile::tempdir().unwrap();
        let spy = script(folder.path(), "exec sleep 600");
        let began = tokio::time::Instant::now();
        assert_eq!(python_stacks(&spy, &[1, 2]).await, "");
        assert_eq!(began.elapsed().as_secs(), STACKS_DEADLINE.as_secs());
    }

    #[tokio::test]
    async fn the_report_lists_processes_and_threads() {
        let folder = tempfile::tempdir().unwrap();
        let report = HangReport {
            folder: folder.path().to_owned(),
            engine: EngineId::named("decoder1"),
            incarnation: Incarnation(3),
            leader: Some(std::process::id()),
        };
        let reason = report.write("hung".to_owned(), "running 1\n").await;
        assert_eq!(reason, "hung; what it was doing is in `decoder1.hang.3.txt`");
        let text = std::fs::read_to_string(folder.path().join("decoder1.hang.3.txt")).unwrap();
        let own = format!("\n{} ", std::process::id());
        for expected in [own.as_str(), "MiB resident", "    thread ", "running 1"] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
    }

    #[tokio::test]
    async fn an_unwritable_report_keeps_the_reason() {
        let report = HangReport {
            folder: "/no/such/folder".into(),
            engine: EngineId::named("decoder1"),
            incarnation: Incarnation::FIRST,
            leader: None,
        };
        assert_eq!(report.write("hung".to_owned(), "").await, "hung");
    }
}
