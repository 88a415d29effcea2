//! Formats an event of `tracing` as one line of text. PURE but for the clock.
//!
//! Values are cut and escaped: text from a client or an engine can be long, and can contain terminal control characters or
//! newlines.

use std::fmt::{self, Debug, Write as _};

use tracing::field::{Field, Visit};
use tracing::{Event, Metadata};

/// The most bytes of one value, and of all values of a line.
const VALUE_BYTES: usize = 1 << 10;
const LINE_BYTES: usize = 4 << 10;

/// The field that distinguishes kinds of lines from the same call site.
const KIND: &str = "kind";

/// An event's values.
#[derive(Debug, Default)]
pub(super) struct Values {
    message: String,
    fields: String,
    /// The value of [`KIND`].
    pub(super) kind: String,
}

impl Values {
    pub(super) fn of(event: &Event<'_>) -> Self {
        let mut values = Self::default();
        event.record(&mut values);
        values
    }

    /// The line, with its newline.
    pub(super) fn line(&self, metadata: &Metadata<'_>) -> String {
        let (message, fields) = (&self.message, &self.fields);
        line(metadata, &format!("{message}{fields}"))
    }
}

/// A line with this text and no values.
pub(super) fn line(metadata: &Metadata<'_>, text: &str) -> String {
    let (level, target) = (metadata.level(), metadata.target());
    format!("{:.6} {level:>5} {target}: {text}\n", jiff::Timestamp::now())
}

impl Visit for Values {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == KIND {
            self.kind = excerpt(&value);
        }
        self.record_debug(field, &value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            self.message = excerpt(value);
        } else if self.fields.len() < LINE_BYTES {
            // Writing to a string cannot fail.
            let _ = write!(self.fields, " {field}={}", excerpt(value));
        }
    }
}

/// The beginning of a value, on one line and without control characters.
fn excerpt(value: &dyn Debug) -> String {
    let mut excerpt = Excerpt(String::new());
    if write!(excerpt, "{value:?}").is_err() {
        excerpt.0.push('…');
    }
    excerpt.0
}

/// Accepts text until it is full, so a long value costs no more than its excerpt.
struct Excerpt(String);

impl fmt::Write for Excerpt {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for letter in text.chars() {
            if self.0.len() >= VALUE_BYTES {
                return Err(fmt::Error);
            }
            match letter {
                '"' | '\'' | '\\' => self.0.push(letter),
                _ => self.0.extend(letter.escape_debug()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A value that is written as it is, as `%value` is.
    struct Shown(&'static str);

    impl Debug for Shown {
        fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str(self.0)
        }
    }

    #[test]
    fn a_value_cannot_end_its_line_or_move_the_cursor() {
        assert_eq!(
            excerpt(&Shown("a \"path\"\n2026-01-01T00:00:00Z ERROR \u{1b}[2J\r\u{202e}é")),
            "a \"path\"\\n2026-01-01T00:00:00Z ERROR \\u{1b}[2J\\r\\u{202e}é"
        );
        assert_eq!(excerpt(&"it's"), "\"it's\"");
    }

    #[test]
    fn a_long_value_is_cut() {
        let text = excerpt(&"x".repeat(60_000));
        assert!(text.len() < VALUE_BYTES + 8 && text.ends_with("xx…"), "{text}");
    }
}
