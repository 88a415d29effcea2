//! Wraps long lines between words for a terminal width.

use std::borrow::Cow;

use textwrap::{Options, WordSplitter};

/// Narrowest width for wrapping. Below it the terminal can break lines itself.
const LEAST: usize = 24;

/// Longest label that sets the indentation, as `caused by:`.
const LONGEST_LABEL: usize = 12;

/// Wraps each line to `width` columns. Continuation lines are indented like the line itself, or to the text after its
/// label (`hint: …`), so that the next line is recognizable. Words are not broken.
pub fn lines(text: &str, width: Option<usize>) -> Cow<'_, str> {
    let Some(width) = width else {
        return Cow::Borrowed(text);
    };
    if text.lines().all(|line| super::table::width(line) <= width) {
        return Cow::Borrowed(text);
    }
    let broken: Vec<String> = text
        .split('\n')
        .map(|line| {
            let hang = " ".repeat(hang(line).min(width / 2));
            broken(line, width, &hang)
        })
        .collect();
    Cow::Owned(broken.join("\n"))
}

/// Wraps a text that starts at column `indent`. All lines start at that column.
pub fn column(text: &str, indent: usize, width: Option<usize>) -> String {
    let Some(width) = width else {
        return text.to_owned();
    };
    let room = width.saturating_sub(indent);
    let lines = textwrap::wrap(text, options(room.max(LEAST)));
    lines.join(&format!("\n{:indent$}", ""))
}

fn broken(line: &str, width: usize, hang: &str) -> String {
    textwrap::fill(line, options(width.max(LEAST)).subsequent_indent(hang))
}

/// Commands and paths must not be broken.
fn options<'a>(width: usize) -> Options<'a> {
    Options::new(width)
        .break_words(false)
        .word_splitter(WordSplitter::NoHyphenation)
}

/// The indentation of continuation lines: that of the line, or the end of its label.
fn hang(line: &str) -> usize {
    let plain = anstream::adapter::strip_str(line).to_string();
    let indent = plain.len() - plain.trim_start().len();
    let label = plain.find(": ").filter(|end| {
        let name = plain[indent..].get(..end.saturating_sub(indent)).unwrap_or_default();
        name.len() <= LONGEST_LABEL && name.chars().all(|c| c.is_alphabetic() || c == ' ')
    });
    label.map_or(indent, |end| end + 2)
}

#[cfg(test)]
mod tests {
    use owo_colors::OwoColorize as _;

    use super::*;

    #[test]
    fn words_are_not_broken_and_labels_set_the_indentation() {
        let text = "error: port 7100 is taken by process 12\n  caused by: one two three four\nhint: `a/very/long/path/that/fits/no/line` x";
        assert_eq!(
            lines(text, Some(30)),
            "error: port 7100 is taken by\n       process 12\n  caused by: one two three\n             four\n\
             hint:\n      `a/very/long/path/that/fits/no/line`\n      x"
        );
        assert_eq!(lines(text, None), text);
        assert_eq!(lines("short", Some(80)), "short");
    }

    #[test]
    fn colours_take_no_room() {
        let text = format!("{} {}", "one two".red(), "three four five six".green());
        let narrow = lines(&text, Some(24)).into_owned();
        assert_eq!(
            anstream::adapter::strip_str(&narrow).to_string(),
            "one two three four five\nsix"
        );
    }

    #[test]
    fn a_column_keeps_its_indent() {
        assert_eq!(
            column("one two three four five six", 4, Some(28)),
            "one two three four five\n    six"
        );
        assert_eq!(column("one two", 4, None), "one two");
    }
}
