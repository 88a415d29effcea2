//! The only place that writes to the terminal: data to stdout, everything else to stderr.

pub mod table;

use std::io::Write;

/// Writes to the terminal. Colours are dropped where the stream is not a terminal or `NO_COLOR` is set.
#[derive(Debug, Clone, Copy, Default)]
pub struct Printer {
    /// Suppresses everything on stderr but errors.
    pub quiet: bool,
}

impl Printer {
    /// Data, for people or programs: one line on stdout. A closed pipe is not an error.
    pub fn data(self, line: impl std::fmt::Display) {
        drop(writeln!(anstream::stdout(), "{line}"));
    }

    /// Data without a line end, flushed at once: tokens as they arrive.
    pub fn data_part(self, part: impl std::fmt::Display) {
        let mut stdout = anstream::stdout();
        drop(write!(stdout, "{part}").and_then(|()| stdout.flush()));
    }

    /// What xpyd is doing: one line on stderr.
    pub fn status(self, line: impl std::fmt::Display) {
        if !self.quiet {
            drop(writeln!(anstream::stderr(), "{line}"));
        }
    }

    /// What went wrong: always on stderr.
    pub fn error(self, text: impl std::fmt::Display) {
        drop(writeln!(anstream::stderr(), "{text}"));
    }
}
