//! `xpyd up --detach`: a second process of the same command line runs the fleet, in its own session; this one relays
//! what it says until the fleet is ready, and returns the real outcome.
//!
//! The child's stderr is a pipe to the parent until the fleet is ready, and the run's `xpyd.log` afterwards. Its stdout
//! is a pipe that carries one word: that the fleet is ready.

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

/// What the child writes to its stdout once the fleet is ready.
const READY: &str = "ready\n";

/// Starts the process that stays, and waits until its fleet is ready or it has ended. Ctrl+C ends the wait only, because that
/// process has left the terminal.
pub(super) async fn start(name: &str, printer: Printer) -> Result<ExitStatus, Failure> {
    let mut signals = StopSignals::listen().map_err(anyhow::Error::from)?;
    let program = std::env::current_exe().map_err(anyhow::Error::from)?;
    let mut words: Vec<OsString> = std::env::args_os().skip(1).collect();
    // What follows `--` is for the engines.
    let end = words.iter().position(|word| word == "--").unwrap_or(words.len());
    words.insert(end, "--detached-child".into());
    let mut child = Command::new(program)
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| anyhow::Error::new(error).context("cannot start the process that stays"))?;
    let pid = child.id().unwrap_or_default();
    let is_ready = tokio::select! {
        is_ready = relay(child.stdout.take(), child.stderr.take(), printer) => is_ready.map_err(anyhow::Error::from)?,
        _ = signals.next() => {
            printer.status(format!(
                "\nthe start goes on in the background as process {pid}; `{}` shows it, `{}` ends it",
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
        // It said why; only its code is still missing.
        None => Ok(status_after(ended)),
    }
}

/// Relays what a process that runs a fleet says, until the fleet is ready or the process lets go of its pipes; true if it is
/// ready.
pub(super) async fn relay(
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    printer: Printer,
) -> io::Result<bool> {
    let (Some(stdout), Some(stderr)) = (stdout, stderr) else {
        return Ok(false);
    };
    let mut lines = BufReader::new(stderr).lines();
    // What is no text ends the relay, not the process.
    while let Ok(Some(line)) = lines.next_line().await {
        // The process has the same options, so what it prints with `--quiet` are errors.
        printer.error(line);
    }
    let mut word = String::new();
    stdout.take(64).read_to_string(&mut word).await?;
    Ok(word == READY)
}

/// How another xpyd ended; one that a signal ended has failed.
pub(super) fn status_after(ended: std::process::ExitStatus) -> ExitStatus {
    ended.code().and_then(status_of).unwrap_or(ExitStatus::Failure)
}

/// The exit status of this number.
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

/// Leaves the terminal's session, so that neither its Ctrl+C nor its end reaches this process.
pub(super) fn become_session_leader() -> Result<(), Failure> {
    nix::unistd::setsid()
        .map(drop)
        .map_err(|error| anyhow::Error::new(error).context("cannot leave the terminal").into())
}

/// Makes the kernel send SIGTERM to this process when its parent has ended, which must be the process of this id.
pub(super) fn end_with(parent: i32) -> Result<(), Failure> {
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGTERM)
        .map_err(|error| anyhow::Error::new(error).context("cannot follow the process that started this one"))?;
    // It may have ended before the kernel was asked.
    if nix::unistd::getppid().as_raw() != parent {
        let gone = "the process that this one should end with has ended already";
        return Err(Failure::message(ExitStatus::Failure, gone));
    }
    Ok(())
}

/// Tells the parent that the fleet is ready, and lets go of its pipes. What is written to stderr from now on is in `log`.
pub(super) fn release_parent(log: &Path) {
    let mut stdout = io::stdout();
    // A parent that is gone does not matter any more.
    drop(stdout.write_all(READY.as_bytes()).and_then(|()| stdout.flush()));
    let files = fs_err::OpenOptions::new()
        .append(true)
        .open(log)
        .and_then(|log| Ok((log, fs_err::OpenOptions::new().write(true).open("/dev/null")?)));
    match files {
        Ok((log, null)) => {
            if let Err(error) = nix::unistd::dup2_stderr(log).and(nix::unistd::dup2_stdout(null)) {
                tracing::warn!(%error, "cannot let go of the terminal");
            }
        }
        Err(error) => tracing::warn!(%error, "cannot let go of the terminal"),
    }
}
