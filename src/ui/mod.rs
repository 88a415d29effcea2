//! The only module that writes to the terminal: data to stdout, everything else to stderr.

pub mod bench;
pub mod download;
pub mod prefix;
pub mod progress;
pub mod screen;
pub mod table;
pub mod wrap;

use std::fmt::Display;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use anstream::{AutoStream, ColorChoice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use owo_colors::OwoColorize;

use crate::fleet::{EngineState, TimeLeft};
use crate::report::{ExitStatus, Failure};

pub use download::DownloadProgress;
pub use prefix::RolePrefixes;
pub use progress::{FleetProgress, StopProgress};
pub use screen::Screen;
pub use table::Table;

/// Writes to the terminal. Colours are removed if the stream is not a terminal or `NO_COLOR` is set.
#[derive(Debug, Clone, Copy, Default)]
pub struct Printer {
    /// Suppresses all output on stderr except errors.
    pub quiet: bool,
}

impl Printer {
    /// Prints one line of data on stdout, for people or programs. A closed pipe is not an error; a full disk is one.
    pub fn data(self, line: impl Display) -> Result<(), Failure> {
        self.data_part(format_args!("{line}\n"))
    }

    /// Prints many lines of data at once, each with its line end.
    pub fn data_lines(self, text: &str) -> Result<Reader, Failure> {
        // Logs can have gigabytes: text without colours is written in one batch.
        if AutoStream::choice(&io::stdout()) == ColorChoice::Never && text.contains('\x1b') {
            return check_write(anstream::stdout().lock().write_all(text.as_bytes()));
        }
        let mut stdout = io::stdout().lock();
        check_write(stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()))
    }

    /// Whether the reader of stdout has gone. Without this check, a reader that has ended is only noticed at the next
    /// write.
    pub fn data_reader(self) -> Reader {
        let stdout = io::stdout();
        let mut end = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
        let has_ended = poll(&mut end, PollTimeout::ZERO).is_ok_and(|ready| ready > 0);
        if has_ended { Reader::Gone } else { Reader::There }
    }

    /// Prints sentences as data, wrapped on a terminal.
    pub fn prose(self, text: impl Display) -> Result<(), Failure> {
        self.data(wrap::lines(&text.to_string(), self.data_width()))
    }

    /// Columns of the terminal on stdout; `None` if stdout is not a terminal.
    pub fn data_width(self) -> Option<usize> {
        io::stdout()
            .is_terminal()
            .then(|| usize::from(console::Term::stdout().size().1))
    }

    /// Whether stdout shows colours.
    pub fn colours_data(self) -> bool {
        AutoStream::choice(&io::stdout()) != ColorChoice::Never
    }

    /// Prints data without a line end and flushes it: tokens as they arrive.
    pub fn data_part(self, part: impl Display) -> Result<(), Failure> {
        let mut stdout = anstream::stdout();
        check_write(write!(stdout, "{part}").and_then(|()| stdout.flush())).map(drop)
    }

    /// Prints a status line on stderr.
    pub fn status(self, line: impl Display) {
        if !self.quiet {
            write_stderr(&self.wrapped(&line.to_string()));
        }
    }

    /// Prints an error on stderr, even if quiet.
    pub fn error(self, text: impl Display) {
        write_stderr(&self.wrapped(&text.to_string()));
    }

    /// A text for stderr, wrapped on a terminal.
    fn wrapped(self, text: &str) -> String {
        let width = self
            .is_terminal()
            .then(|| usize::from(console::Term::stderr().size().1));
        format!("{}\n", wrap::lines(text, width))
    }

    /// Whether stderr is a terminal.
    pub fn is_terminal(self) -> bool {
        io::stderr().is_terminal()
    }

    /// Whether output on stderr can be redrawn.
    pub fn redraws(self) -> bool {
        !self.quiet && io::stderr().is_terminal() && can_redraw()
    }

    /// Whether stderr shows colours.
    pub fn colour(self) -> bool {
        AutoStream::choice(&io::stderr()) != ColorChoice::Never
    }
}

/// Whether a process still reads stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// A process can still read.
    There,
    /// The reader has gone, which ends an endless command and is not an error.
    Gone,
}

/// The result of a write: a reader that has gone is not an error, everything else is.
fn check_write(written: io::Result<()>) -> Result<Reader, Failure> {
    match written {
        Ok(()) => Ok(Reader::There),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => {
            let error = anyhow::Error::new(error).context("cannot write to the standard output");
            Err(Failure::new(ExitStatus::Failure, error))
        }
    }
}

/// Disables colours for the whole program if the terminal does not support them. By default anstream uses colours on
/// every terminal if `CI` is set. `CLICOLOR_FORCE` still forces them.
pub fn choose_colours() {
    let forced = std::env::var_os("CLICOLOR_FORCE").is_some_and(|value| value != "0");
    if !can_redraw() && !forced {
        ColorChoice::Never.write_global();
    }
}

/// Whether the terminal supports cursor movement; a `dumb` one, as in editors and some CI, does not.
fn can_redraw() -> bool {
    std::env::var_os("TERM").is_some_and(|name| !name.is_empty() && name != "dumb")
}

/// Longest wait for a reader of stderr, in milliseconds.
const WRITE_TIMEOUT_MS: u16 = 200;

/// The number of bytes that a writable pipe accepts at once.
const CHUNK: usize = 4096;

/// Writes to stderr and drops what the reader does not accept in time: a pipe without a reader must not block a fleet.
fn write_stderr(text: &str) {
    let raw = io::stderr();
    let mut stderr = anstream::stderr().lock();
    for chunk in text.as_bytes().chunks(CHUNK) {
        let mut room = [PollFd::new(raw.as_fd(), PollFlags::POLLOUT)];
        let has_room = poll(&mut room, PollTimeout::from(WRITE_TIMEOUT_MS)).is_ok_and(|ready| ready > 0);
        if !has_room || stderr.write_all(chunk).is_err() {
            return;
        }
    }
}

/// A duration for people: `0.4 s`, `12 s`, `2 min 05 s`, `3 h 07 min`.
pub fn time_span(span: Duration) -> String {
    let seconds = span.as_secs();
    match seconds {
        0 if span.subsec_millis() >= 50 => format!("{:.1} s", span.as_secs_f64()),
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// The time left of a start, as a suffix: `, about 40 s left`. Empty if unknown.
pub fn time_left(left: TimeLeft) -> String {
    match left {
        TimeLeft::Unknown => String::new(),
        TimeLeft::About(left) => format!(", about {} left", time_span(left.max(Duration::from_secs(1)))),
        TimeLeft::Longer => ", longer than last time".to_owned(),
    }
}

/// A state in its colour.
pub fn state(state: EngineState) -> String {
    match state {
        EngineState::Ready => state.green().to_string(),
        EngineState::Planned | EngineState::Stopped => state.dimmed().to_string(),
        EngineState::Starting | EngineState::Healthy => state.cyan().to_string(),
        EngineState::Draining | EngineState::Stopping | EngineState::Backoff => state.yellow().to_string(),
        EngineState::Failed => state.red().bold().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_spans_keep_two_units_at_most() {
        let spans =
            [0, 49, 400, 12_900, 125_000, 3_600_000 + 7 * 60_000].map(|ms| time_span(Duration::from_millis(ms)));
        assert_eq!(spans, ["0 s", "0 s", "0.4 s", "12 s", "2 min 05 s", "1 h 07 min"]);
    }
}
