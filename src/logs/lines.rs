//! Cutting a stream of bytes into lines, and making a line fit to be shown.
//!
//! A progress bar redraws itself with `\r`, so that ends a line too; what it overwrites is a line of its own. Lines are
//! bytes until they are shown, because engines print whatever they want.

use std::borrow::Cow;
use std::mem;

use memchr::memchr2;

/// The longest line in bytes. A longer one arrives in pieces, so that no line can fill the memory.
pub const MAX_LINE: usize = 64 * 1024;

/// Cuts bytes into lines at `\n`, `\r\n` and `\r`. What a `\r` leaves empty is no line.
#[derive(Debug, Default)]
pub struct LineSplitter {
    partial: Vec<u8>,
    /// The last byte was a `\r`, and whether it ended nothing. A `\n` now belongs to it.
    returned: Option<Empty>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Empty(bool);

impl LineSplitter {
    /// Takes the next bytes and gives each line that they complete to `take`.
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

    /// What came after the last line's end, as a line of its own.
    pub fn finish(&mut self) -> Option<Vec<u8>> {
        Some(mem::take(&mut self.partial)).filter(|line| !line.is_empty())
    }

    /// Forgets the unfinished line: the bytes that come next do not continue it.
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

/// Where to cut a line that is too long: not within a character, if it is text at all.
fn piece_end(line: &[u8]) -> usize {
    let is_continuation = |index: &usize| line[*index] & 0b1100_0000 == 0b1000_0000;
    (MAX_LINE - 3..=MAX_LINE)
        .rev()
        .find(|index| !is_continuation(index))
        .unwrap_or(MAX_LINE)
}

/// A line as plain text: colours and everything else that would move a terminal's cursor are gone, and what is no
/// UTF-8 is replaced.
pub fn plain(line: &[u8]) -> Cow<'_, str> {
    // Nearly every line is like this, and a log may have millions.
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
    fn a_progress_bar_is_a_line_per_redraw_and_blank_lines_stay() {
        let bar = b"\r  0%\r 50%\r100%\n\nnext\r\nlast";
        assert_eq!(split(&[bar]), ["  0%", " 50%", "100%", "", "next", "last"]);
    }

    #[test]
    fn a_long_line_arrives_in_pieces_that_cut_no_character() {
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
