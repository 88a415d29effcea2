//! A full-screen view that is redrawn. The terminal is restored at the end.

use std::io::{self, IsTerminal, Write};

use anstream::{AutoStream, ColorChoice};
use console::{Term, truncate_str};

/// Shows the alternate screen and hides the cursor (xterm, "DEC private modes" 1049 and 25).
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

/// Terminals with mode 2026 show the text between these at once; others ignore them.
const BEGIN: &str = "\x1b[?2026h\x1b[H";
const END: &str = "\x1b[J\x1b[?2026l";

/// Ends a line and erases the rest of the old one.
const END_OF_LINE: &str = "\x1b[K";

/// The terminal in full-screen mode. Dropping it restores the previous content.
#[derive(Debug)]
pub struct Screen {
    terminal: Term,
}

impl Screen {
    /// Switches the terminal on stdout to full-screen mode; `None` if stdout is not a terminal or cannot be redrawn.
    pub fn open() -> Option<Self> {
        (io::stdout().is_terminal() && super::can_redraw()).then(|| {
            write(ENTER);
            Self {
                terminal: Term::stdout(),
            }
        })
    }

    /// Current number of columns.
    pub fn width(&self) -> usize {
        usize::from(self.terminal.size().1)
    }

    /// Draws `text`, cut to the current size of the terminal.
    pub fn draw(&self, text: &str) {
        let (height, width) = self.terminal.size();
        let text = if AutoStream::choice(&io::stdout()) == ColorChoice::Never {
            anstream::adapter::strip_str(text).to_string()
        } else {
            text.to_owned()
        };
        write(&picture(&text, usize::from(height), usize::from(width)));
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        write(LEAVE);
    }
}

/// Writes at once, so that the terminal never shows a part. If the terminal is gone, a signal ends the program.
fn write(text: &str) {
    let mut stdout = io::stdout().lock();
    drop(stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()));
}

/// The escape sequences that draw `text` over the old content.
fn picture(text: &str, height: usize, width: usize) -> String {
    let lines = text.lines().take(height).map(|line| truncate_str(line, width, "…"));
    let lines: Vec<_> = lines.map(|line| format!("{line}{END_OF_LINE}")).collect();
    format!("{BEGIN}{}{END}", lines.join("\r\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drawing_fits_the_terminal_and_erases_the_old_one() {
        let drawn = picture("a\n\x1b[32mlonger\x1b[0m\nthird", 2, 4);
        assert_eq!(
            drawn,
            format!("{BEGIN}a{END_OF_LINE}\r\n\x1b[32mlon…\x1b[0m{END_OF_LINE}{END}")
        );
    }
}
