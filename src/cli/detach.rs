//! `xpyd up --detach`: a second process with the same command line runs the fleet in its own session. This process relays
//! its messages until the fleet is ready, and returns the real exit status.
//!
//! The child's stderr is a pipe to the parent until the fleet is ready, and then the run's `xpyd.log`. Its stdout is a
//! pipe for one word: that the fleet is ready.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::{ChildStderr, ChildStdout, Command};

use super::command;
use crate::report::{ExitStatus, Failure};
use crate::signals::StopSignals;
use crate::ui::Printer;

/// The child's message on stdout when the fleet is ready.
const READY: &str = "ready\n";

/// Starts the process that stays, and waits until its fleet is ready or the process has ended. Ctrl+C only ends the
/// waiting, because that process has left the terminal.
pub(super) async fn start(name: &str, printer: Printer) -> Result<ExitStatus, Failure> {
    let mut signals = StopSignals::listen().map_err(anyhow::Error::from)?;
    let program = std::env::current_exe().map_err(anyhow::Error::from)?;
    let mut words: Vec<OsString> = std::env::args_os().skip(1).collect();
    // The words after `--` are for the engines.
    let end = words.iter().position(|word| word == "--").unwrap_or(words.len());
    words.insert(end, "--detached-child".into());
    let mut child = Command::new(program)
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| anyhow::Error::new(error).context("cannot start the background process"))?;
    let pid = child.id().unwrap_or_default();
    let is_ready = tokio::select! {
        is_ready = relay(child.stdout.take(), child.stderr.take(), printer) => is_ready.map_err(anyhow::Error::from)?,
        _ = signals.next() => {
            printer.status(format!(
                "\nthe start continues in the background as process {pid}; `{}` shows it, `{}` stops it",
                command("status", name),
                command("down", name)
            ));
            return Ok(ExitStatus::Forced);
        }
    };
    if is_ready {
        printer.status(format!(
            "\nruns in the background as process {pid}; `{}` stops it",
            command("down", name)
        ));
        return Ok(ExitStatus::Success);
    }
    let ended = child.wait().await.map_err(anyhow::Error::from)?;
    let failed = |text| Err(Failure::message(ExitStatus::Failure, text));
    match ended.signal() {
        Some(signal) => failed(format!(
            "process {pid} was killed by signal {signal} before its fleet was ready"
        )),
        None if ended.success() => failed(format!("run `{name}` was stopped before it was ready")),
        // It has printed the reason; only its exit code is missing.
        None => Ok(status_after(ended)),
    }
}

/// Relays the messages of a process that runs a fleet, until the fleet is ready or the process closes its pipes. Returns
/// whether the fleet is ready.
pub(super) async fn relay(
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    printer: Printer,
) -> io::Result<bool> {
    let (Some(stdout), Some(stderr)) = (stdout, stderr) else {
        return Ok(false);
    };
    let mut lines = BufReader::new(stderr).lines();
    // Invalid UTF-8 ends the relay, not the process.
    while let Ok(Some(line)) = lines.next_line().await {
        // The process has the same options, so its output with `--quiet` are errors.
        printer.error(line);
    }
    let mut word = String::new();
    stdout.take(64).read_to_string(&mut word).await?;
    Ok(word == READY)
}

/// The exit status of another xpyd. A process that a signal ended has failed.
pub(super) fn status_after(ended: std::process::ExitStatus) -> ExitStatus {
    ended.code().and_then(status_of).unwrap_or(ExitStatus::Failure)
}

/// The exit status with this number.
pub(super) fn status_of(code: i32) -> Option<ExitStatus> {
    [
        ExitStatus::Success,
        ExitStatus::Failure,
        ExitStatus::Usage,
        ExitStatus::Preflight,
        ExitStatus::EngineFailed,
        ExitStatus::NotReady,
        ExitStatus::CrashLoop,
        ExitStatus::TeardownIncomplete,
        ExitStatus::RunState,
        ExitStatus::Bug,
        ExitStatus::Forced,
    ]
    .into_iter()
    .find(|status| i32::from(status.code()) == code)
}

/// Starts a new session, so that neither Ctrl+C nor the end of the terminal reaches this process.
pub(super) fn become_session_leader() -> Result<(), Failure> {
    nix::unistd::setsid()
        .map(drop)
        .map_err(|error| anyhow::Error::new(error).context("cannot start a new session").into())
}

/// Makes the kernel send SIGTERM to this process when the parent with this process id ends.
pub(super) fn end_with(parent: i32) -> Result<(), Failure> {
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGTERM)
        .map_err(|error| anyhow::Error::new(error).context("cannot get a signal when the parent process ends"))?;
    // It can have ended before that.
    if nix::unistd::getppid().as_raw() != parent {
        let gone = "the parent process has ended already";
        return Err(Failure::message(ExitStatus::Failure, gone));
    }
    Ok(())
}

/// Tells the parent that the fleet is ready, and closes the pipes to it. Later output on stderr goes to `log`.
pub(super) fn release_parent(log: &Path) {
    let mut stdout = io::stdout();
    // It does not matter if the parent has ended.
    drop(stdout.write_all(READY.as_bytes()).and_then(|()| stdout.flush()));
    let files = fs_err::OpenOptions::new()
        .append(true)
        .open(log)
        .and_then(|log| Ok((log, fs_err::OpenOptions::new().write(true).open("/dev/null")?)));
    match files {
        Ok((log, null)) => {
            if let Err(error) = nix::unistd::dup2_stderr(log).and(nix::unistd::dup2_stdout(null)) {
                tracing::warn!(%error, "cannot close the terminal");
            }
        }
        Err(error) => tracing::warn!(%error, "cannot close the terminal"),
    }
}
