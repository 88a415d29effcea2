//! Splits a stream of bytes into lines, and converts a line to plain text.
//!
//! A progress bar redraws itself with `\r`, so that ends a line too; each redraw is a line. Lines are bytes until they are shown,
//! because engines can print anything.

use std::borrow::Cow;
use std::mem;

use memchr::memchr2;

/// The longest line in bytes. A longer one is split, so that no line can fill the memory.
pub const MAX_LINE: usize = 64 * 1024;

/// Splits bytes into lines at `\n`, `\r\n` and `\r`. An empty line before a `\r` does not count.
#[derive(Debug, Default)]
pub struct LineSplitter {
    partial: Vec<u8>,
    /// `Some` if the last byte was a `\r`, with whether its line was empty. A following `\n` belongs to it.
    returned: Option<Empty>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Empty(bool);

impl LineSplitter {
    /// Takes the next bytes, and calls `take` with each complete line.
    pub fn feed(&mut self, bytes: &[u8], mut take: impl FnMut(Vec<u8>)) {
        let mut rest = bytes;
        while let Some(end) = memchr2(b'\n', b'\r', rest) {
            self.extend(&rest[..end], &mut take);
            let line = mem::take(&mut self.partial);
            let is_return = rest[end] == b'\r';
            let is_line = match self.returned.take() {
                Some(Empty(empty)) if !is_return => empty,
                _ => !is_return || !line.is_empty(),
            };
            self.returned = is_return.then_some(Empty(line.is_empty()));
            if is_line {
                take(line);
            }
            rest = &rest[end + 1..];
        }
        self.extend(rest, &mut take);
    }

    /// The bytes after the end of the last line, as a line.
    pub fn finish(&mut self) -> Option<Vec<u8>> {
        Some(mem::take(&mut self.partial)).filter(|line| !line.is_empty())
    }

    /// Drops the unfinished line: the next bytes do not continue it.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    fn extend(&mut self, bytes: &[u8], take: &mut impl FnMut(Vec<u8>)) {
        if bytes.is_empty() {
            return;
        }
        self.returned = None;
        self.partial.extend_from_slice(bytes);
        while self.partial.len() > MAX_LINE {
            let rest = self.partial.split_off(piece_end(&self.partial));
            take(mem::replace(&mut self.partial, rest));
        }
    }
}

/// Where to split a line that is too long: not within a character, if it is text.
fn piece_end(line: &[u8]) -> usize {
    let is_continuation = |index: &usize| line[*index] & 0b1100_0000 == 0b1000_0000;
    (MAX_LINE - 3..=MAX_LINE)
        .rev()
        .find(|index| !is_continuation(index))
        .unwrap_or(MAX_LINE)
}

/// A line as plain text: without colours and other terminal control sequences, and with invalid UTF-8 replaced.
pub fn plain(line: &[u8]) -> Cow<'_, str> {
    // The fast path: nearly every line is like this, and a log can have millions.
    if line.iter().all(|byte| matches!(byte, b' '..=b'~' | b'\t')) {
        return String::from_utf8_lossy(line);
    }
    let plain = anstream::adapter::strip_str(&String::from_utf8_lossy(line))
        .to_string()
        .chars()
        .filter(|letter| !letter.is_control() || *letter == '\t')
        .collect();
    Cow::Owned(plain)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(chunks: &[&[u8]]) -> Vec<String> {
        let mut splitter = LineSplitter::default();
        let mut lines = Vec::new();
        for chunk in chunks {
            splitter.feed(chunk, |line| lines.push(String::from_utf8(line).unwrap()));
        }
        lines.extend(splitter.finish().map(|line| String::from_utf8(line).unwrap()));
        lines
    }

    #[test]
    fn each_redraw_of_a_progress_bar_is_a_line() {
        let bar = b"\r  0%\r 50%\r100%\n\nnext\r\nlast";
        assert_eq!(split(&[bar]), ["  0%", " 50%", "100%", "", "next", "last"]);
    }

    #[test]
    fn long_lines_are_split_between_characters() {
        let line = "ä".repeat(MAX_LINE);
        let pieces = split(&[b"x", line.as_bytes(), b"\n"]);
        assert_eq!(pieces.len(), 3);
        assert!(pieces.iter().all(|piece| piece.len() <= MAX_LINE));
        assert_eq!(pieces.concat(), format!("x{line}"));
    }

    #[test]
    fn what_is_shown_cannot_move_the_cursor() {
        assert_eq!(
            plain(b"\x1b[32;20m[LMCache]\x1b[0m a\tb\x07\x1b[2Jc\xff"),
            "[LMCache] a\tbc\u{fffd}"
        );
    }

    proptest! {
        #[test]
        fn where_the_stream_is_cut_makes_no_difference(
            text in "[a\r\n]{0,40}",
            cuts in proptest::collection::vec(0..40_usize, 0..5),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| *cut <= text.len()).collect();
            cuts.sort_unstable();
            let mut chunks = Vec::new();
            let mut start = 0;
            for cut in cuts {
                chunks.push(&text.as_bytes()[start..cut]);
                start = cut;
            }
            chunks.push(&text.as_bytes()[start..]);
            prop_assert_eq!(split(&chunks), split(&[text.as_bytes()]));
        }

        #[test]
        fn no_letter_is_lost_and_none_is_made_up(text in "[abc\r\n]{0,200}") {
            let letters: String = text.chars().filter(|letter| !matches!(letter, '\r' | '\n')).collect();
            prop_assert_eq!(split(&[text.as_bytes()]).concat(), letters);
        }
    }
}
