//! Runs a command with a deadline.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// The exit code and output of a command.
#[derive(Debug)]
pub(crate) struct CommandResult {
    /// `None` after a signal or the deadline.
    pub(crate) code: Option<i32>,
    pub(crate) output: String,
    pub(crate) errors: String,
}

impl CommandResult {
    /// The error lines at the end, on one line.
    pub(crate) fn last_words(&self) -> String {
        let lines: Vec<&str> = self.errors.lines().filter(|line| !line.trim().is_empty()).collect();
        let tail = lines[lines.len().saturating_sub(6)..].join(" | ");
        match self.code {
            Some(code) => format!("exit code {code}: {tail}"),
            None => format!("no end: {tail}"),
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "faults run on a thread of their own, which may block"
)]
pub(crate) fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// Runs until the end or the deadline. Output goes to files, because a detached child would keep a pipe open.
pub(crate) fn run(mut command: Command, folder: &Path, deadline: Duration) -> CommandResult {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let (output, errors) = (
        folder.join(format!("{number}.output")),
        folder.join(format!("{number}.errors")),
    );
    let code = start(&mut command, &output, &errors, deadline);
    let read = |path: &Path| {
        let text = fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let _ = fs::remove_file(path);
        text.unwrap_or_default()
    };
    match code {
        Ok(code) => CommandResult {
            code,
            output: read(&output),
            errors: read(&errors),
        },
        Err(error) => CommandResult {
            code: None,
            output: String::new(),
            errors: error.to_string(),
        },
    }
}

fn start(command: &mut Command, output: &Path, errors: &Path, deadline: Duration) -> std::io::Result<Option<i32>> {
    command.stdin(Stdio::null());
    command.stdout(fs::File::create(output)?);
    command.stderr(fs::File::create(errors)?);
    let mut child = command.spawn()?;
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.code());
        }
        if begun.elapsed() > deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        pause(Duration::from_millis(10));
    }
}
