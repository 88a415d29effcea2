//! The only place that writes to the terminal: data to stdout, everything else to stderr.

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

/// Writes to the terminal. Colours are dropped where the stream is not a terminal or `NO_COLOR` is set.
#[derive(Debug, Clone, Copy, Default)]
pub struct Printer {
    /// Suppresses everything on stderr but errors.
    pub quiet: bool,
}

impl Printer {
    /// Data, for people or programs: one line on stdout. A closed pipe is not an error; a full disk is one.
    pub fn data(self, line: impl Display) -> Result<(), Failure> {
        self.data_part(format_args!("{line}\n"))
    }

    /// Many lines of data at once, each with its end.
    pub fn data_lines(self, text: &str) -> Result<Reader, Failure> {
        // Logs have gigabytes: a text without colours is written as it is, a whole batch at once.
        if AutoStream::choice(&io::stdout()) == ColorChoice::Never && text.contains('\x1b') {
            return received(anstream::stdout().lock().write_all(text.as_bytes()));
        }
        let mut stdout = io::stdout().lock();
        received(stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()))
    }

    /// Whether the reader of stdout has gone: one that reads a first line and ends is not noticed before the next one is
    /// written.
    pub fn data_reader(self) -> Reader {
        let stdout = io::stdout();
        let mut end = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
        let has_ended = poll(&mut end, PollTimeout::ZERO).is_ok_and(|ready| ready > 0);
        if has_ended { Reader::Gone } else { Reader::There }
    }

    /// Data in sentences: as [`Self::data`], broken between words where a terminal shows it.
    pub fn prose(self, text: impl Display) -> Result<(), Failure> {
        self.data(wrap::lines(&text.to_string(), self.data_width()))
    }

    /// Columns of the terminal that stdout is; `None` if it is none.
    pub fn data_width(self) -> Option<usize> {
        io::stdout()
            .is_terminal()
            .then(|| usize::from(console::Term::stdout().size().1))
    }

    /// Whether stdout shows colours.
    pub fn colours_data(self) -> bool {
        AutoStream::choice(&io::stdout()) != ColorChoice::Never
    }

    /// Data without a line end, flushed at once: tokens as they arrive.
    pub fn data_part(self, part: impl Display) -> Result<(), Failure> {
        let mut stdout = anstream::stdout();
        received(write!(stdout, "{part}").and_then(|()| stdout.flush())).map(drop)
    }

    /// What xpyd is doing: one line on stderr.
    pub fn status(self, line: impl Display) {
        if !self.quiet {
            write_stderr(&self.told(&line.to_string()));
        }
    }

    /// What went wrong: always on stderr.
    pub fn error(self, text: impl Display) {
        write_stderr(&self.told(&text.to_string()));
    }

    /// A text for stderr, broken between words where a terminal shows it.
    fn told(self, text: &str) -> String {
        let width = self
            .is_terminal()
            .then(|| usize::from(console::Term::stderr().size().1));
        format!("{}\n", wrap::lines(text, width))
    }

    /// Whether stderr is a terminal.
    pub fn is_terminal(self) -> bool {
        io::stderr().is_terminal()
    }

    /// Whether what is on stderr may be redrawn: it is a terminal that can do that.
    pub fn redraws(self) -> bool {
        !self.quiet && io::stderr().is_terminal() && can_redraw()
    }

    /// Whether stderr shows colours.
    pub fn colour(self) -> bool {
        AutoStream::choice(&io::stderr()) != ColorChoice::Never
    }
}

/// Whether anyone still reads what is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// Somebody may.
    There,
    /// Nobody does, which ends an endless command, and is no failure.
    Gone,
}

/// What became of data: its reader may have seen enough, and whatever else hinders a write is a failure.
fn received(written: io::Result<()>) -> Result<Reader, Failure> {
    match written {
        Ok(()) => Ok(Reader::There),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => {
            let error = anyhow::Error::new(error).context("cannot write to the standard output");
            Err(Failure::new(ExitStatus::Failure, error))
        }
    }
}

/// Decides once, for the whole program, that a terminal which would print escapes gets no colours. By itself, anstream takes every terminal
/// for a coloured one where `CI` is set. `CLICOLOR_FORCE` still forces them.
pub fn choose_colours() {
    let forced = std::env::var_os("CLICOLOR_FORCE").is_some_and(|value| value != "0");
    if !can_redraw() && !forced {
        ColorChoice::Never.write_global();
    }
}

/// Whether the terminal moves its cursor: a `dumb` one, as editors and some CI have it, only prints.
fn can_redraw() -> bool {
    std::env::var_os("TERM").is_some_and(|name| !name.is_empty() && name != "dumb")
}

/// How long a reader of stderr may take to make room, in milliseconds.
const PATIENCE: u16 = 200;

/// As many bytes as a pipe takes at once if it takes any.
const PIECE: usize = 4096;

/// Writes to stderr what its reader takes in time, and drops the rest: whoever started xpyd with a pipe that nobody
/// reads must not stop a fleet, nor its end.
fn write_stderr(text: &str) {
    let raw = io::stderr();
    let mut stderr = anstream::stderr().lock();
    for piece in text.as_bytes().chunks(PIECE) {
        let mut room = [PollFd::new(raw.as_fd(), PollFlags::POLLOUT)];
        let has_room = poll(&mut room, PollTimeout::from(PATIENCE)).is_ok_and(|ready| ready > 0);
        if !has_room || stderr.write_all(piece).is_err() {
            return;
        }
    }
}

/// A time span for people: `0.4 s`, `12 s`, `2 min 05 s`, `3 h 07 min`.
pub fn time_span(span: Duration) -> String {
    let seconds = span.as_secs();
    match seconds {
        0 if span.subsec_millis() >= 50 => format!("{:.1} s", span.as_secs_f64()),
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// What a start still takes, to stand behind how far it is: `, about 40 s left`. Empty where that is unknown.
pub fn time_left(left: TimeLeft) -> String {
    match left {
        TimeLeft::Unknown => String::new(),
        TimeLeft::About(left) => format!(", about {} left", time_span(left.max(Duration::from_secs(1)))),
        TimeLeft::Longer => ", longer than last time".to_owned(),
    }
}

/// A state in the colour that says whether to worry.
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
