//! A picture that is drawn again and again over the whole terminal, which is given back as it was.

use std::io::{self, IsTerminal, Write};

use anstream::{AutoStream, ColorChoice};
use console::{Term, truncate_str};

/// Shows the alternate screen and hides the cursor (xterm, "DEC private modes" 1049 and 25).
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

/// Between these a terminal that knows mode 2026 shows nothing half drawn; others ignore them.
const BEGIN: &str = "\x1b[?2026h\x1b[H";
const END: &str = "\x1b[J\x1b[?2026l";

/// What follows a line: what an earlier picture had there is erased.
const END_OF_LINE: &str = "\x1b[K";

/// The terminal while it shows a picture; dropping it shows what was there before.
#[derive(Debug)]
pub struct Screen {
    terminal: Term,
}

impl Screen {
    /// Takes the terminal that stdout is; `None` if it is none, or one that cannot be drawn on.
    pub fn open() -> Option<Self> {
        (io::stdout().is_terminal() && super::can_redraw()).then(|| {
            write(ENTER);
            Self {
                terminal: Term::stdout(),
            }
        })
    }

    /// How many columns it has now.
    pub fn width(&self) -> usize {
        usize::from(self.terminal.size().1)
    }

    /// Draws `text`, cut to the size that the terminal has now.
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

/// One write, so that the terminal has no reason to show a half. When the terminal is gone, a signal says so.
fn write(text: &str) {
    let mut stdout = io::stdout().lock();
    drop(stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()));
}

/// What draws `text` over an earlier picture.
fn picture(text: &str, height: usize, width: usize) -> String {
    let lines = text.lines().take(height).map(|line| truncate_str(line, width, "…"));
    let lines: Vec<_> = lines.map(|line| format!("{line}{END_OF_LINE}")).collect();
    format!("{BEGIN}{}{END}", lines.join("\r\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_fits_the_terminal_and_erases_what_was_there() {
        let drawn = picture("a\n\x1b[32mlonger\x1b[0m\nthird", 2, 4);
        assert_eq!(
            drawn,
            format!("{BEGIN}a{END_OF_LINE}\r\n\x1b[32mlon…\x1b[0m{END_OF_LINE}{END}")
        );
    }
}
