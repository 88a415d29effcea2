//! Exit codes of commands, and errors with their causes and hints.

use std::fmt;

/// Exit codes of every `xpyd` command. Public: scripts rely on them, so a number never changes its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum ExitStatus {
    /// Success.
    Success = 0,
    /// The work itself failed: a benchmark with failed requests, a fleet that lost a role.
    Failure = 1,
    /// The command line, a profile or a file given by the user is wrong.
    Usage = 2,
    /// The machine cannot run the plan.
    Preflight = 3,
    /// An engine ended before it was ready.
    EngineFailed = 4,
    /// An engine, or a hand-off between two, was not ready in time.
    NotReady = 5,
    /// An engine kept crashing.
    CrashLoop = 6,
    /// Processes, ports or GPU memory of the run are left after the teardown.
    TeardownIncomplete = 7,
    /// A run of this name already exists, or none does.
    RunState = 8,
    /// A defect of xpyd.
    Bug = 70,
    /// The user forced the stop.
    Forced = 130,
}

impl ExitStatus {
    /// All of them, by number.
    pub const ALL: [Self; 11] = [
        Self::Success,
        Self::Failure,
        Self::Usage,
        Self::Preflight,
        Self::EngineFailed,
        Self::NotReady,
        Self::CrashLoop,
        Self::TeardownIncomplete,
        Self::RunState,
        Self::Bug,
        Self::Forced,
    ];

    /// A few words for `--help`: `preflight`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Success => "ok",
            Self::Failure => "the work failed",
            Self::Usage => "usage",
            Self::Preflight => "preflight",
            Self::EngineFailed => "an engine failed to start",
            Self::NotReady => "not ready in time",
            Self::CrashLoop => "crash loop",
            Self::TeardownIncomplete => "teardown incomplete",
            Self::RunState => "already running or not running",
            Self::Bug => "bug",
            Self::Forced => "forced stop",
        }
    }

    /// When a command ends with it.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Success => {
                "ok; also a run that was stopped on request, and `logs -f` and `status --watch` after Ctrl+C"
            }
            Self::Failure => {
                "the work failed: benchmark requests failed, a role has no engine left, output cannot be written, or a run was stopped \
                 while `up --detach` waited for it"
            }
            Self::Usage => "usage: command line, profile or another file is wrong",
            Self::Preflight => "preflight: this machine cannot run the plan",
            Self::EngineFailed => "an engine failed to start",
            Self::NotReady => "not ready in time, or a hand-off does not work",
            Self::CrashLoop => "crash loop: an engine failed again and again",
            Self::TeardownIncomplete => "teardown incomplete: the message lists what is left",
            Self::RunState => "already running or not running",
            Self::Bug => "bug: a defect of xpyd",
            Self::Forced => {
                "forced stop; Ctrl+C in `xpyd bench`; Ctrl+C while `up --detach` waits (the start continues)"
            }
        }
    }

    /// The number the process exits with.
    pub fn code(self) -> u8 {
        self as u8
    }
}

/// Why a command failed: an exit code, an error with its causes, and what the user can do about it.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub status: ExitStatus,
    /// The error with its causes, outermost first.
    pub error: anyhow::Error,
    /// Commands or changes that fix it, one a line.
    pub hints: Vec<String>,
}

impl Failure {
    /// A failure without hints.
    pub fn new(status: ExitStatus, error: impl Into<anyhow::Error>) -> Self {
        Self {
            status,
            error: error.into(),
            hints: Vec::new(),
        }
    }

    /// A failure with a message and no cause.
    pub fn message(status: ExitStatus, message: impl fmt::Display + fmt::Debug + Send + Sync + 'static) -> Self {
        Self::new(status, anyhow::Error::msg(message))
    }

    /// Adds a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }
}

impl fmt::Display for Failure {
    /// `error: …`, a `caused by: …` line per cause that adds something, then `hint: …` lines.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "error: {}", self.error)?;
        for cause in self.error.chain().skip(1) {
            write!(formatter, "\n  caused by: {cause}")?;
        }
        for hint in &self.hints {
            write!(formatter, "\nhint: {hint}")?;
        }
        Ok(())
    }
}

/// An error without an exit code counts as [`ExitStatus::Failure`].
impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::new(ExitStatus::Failure, error)
    }
}

/// Whether an error, or one of its causes, means that this process or the machine has no file descriptor left. Such a failed
/// connection is not the peer's fault.
pub fn lacks_descriptors(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |error| error.source())
        .filter_map(|error| error.downcast_ref::<std::io::Error>()?.raw_os_error())
        .any(|code| code == nix::libc::EMFILE || code == nix::libc::ENFILE)
}

/// The whole chain of an error in one line: `a: b: c`.
pub fn one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_prints_error_causes_and_hints() {
        let error = anyhow::Error::msg("no such file").context("cannot read `my.toml`");
        let failure = Failure::new(ExitStatus::Usage, error).hint("check the path");
        assert_eq!(
            failure.to_string(),
            "error: cannot read `my.toml`\n  caused by: no such file\nhint: check the path"
        );
    }
}
