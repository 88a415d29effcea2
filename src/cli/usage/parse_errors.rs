//! Rewrites messages of clap and of Rust's parsers about wrong values in xpyd's own style.

use clap::error::ErrorKind;

use crate::report::{ExitStatus, Failure};
use crate::ui::Printer;

/// Their words, and xpyd's.
const WORDS: [(&str, &str); 11] = [
    ("invalid float literal", "expected a number"),
    (
        "cannot parse float from empty string",
        "expected a number, not an empty value",
    ),
    ("invalid digit found in string", "expected a whole number, at least 0"),
    (
        "cannot parse integer from empty string",
        "expected a whole number, not an empty value",
    ),
    ("number too large to fit in target type", "too large"),
    ("number too small to fit in target type", "too small"),
    ("number would be zero for non-zero type", "must be at least 1"),
    (
        "provided string was not `true` or `false`",
        "expected `true` or `false`",
    ),
    (
        "invalid socket address syntax",
        "expected an address with a port, such as `127.0.0.1:8000`",
    ),
    ("invalid IP address syntax", "expected an IP address"),
    ("tip:", "hint:"),
];

/// Prints what is wrong with the command line, or the requested help.
pub(super) fn show(error: &clap::Error, printer: Printer) -> Result<ExitStatus, Failure> {
    let text = error.render().ansi().to_string();
    if !error.use_stderr() {
        printer.data_part(text)?;
        return Ok(ExitStatus::Success);
    }
    let text = text.trim_end();
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        printer.error(text);
    } else {
        printer.error(in_words(text));
    }
    Ok(ExitStatus::Usage)
}

/// The message in plain words.
fn in_words(text: &str) -> String {
    WORDS
        .iter()
        .fold(text.to_owned(), |text, (theirs, ours)| text.replace(theirs, ours))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rust's messages, so that a new version with other words is noticed.
    #[test]
    fn every_error_of_a_parser_has_plain_words() {
        let errors = [
            "x".parse::<f64>().unwrap_err().to_string(),
            "".parse::<f64>().unwrap_err().to_string(),
            "-1".parse::<u32>().unwrap_err().to_string(),
            "".parse::<u32>().unwrap_err().to_string(),
            "99999".parse::<u16>().unwrap_err().to_string(),
            "-999".parse::<i8>().unwrap_err().to_string(),
            "0".parse::<std::num::NonZeroUsize>().unwrap_err().to_string(),
            "x".parse::<bool>().unwrap_err().to_string(),
            "x".parse::<std::net::SocketAddr>().unwrap_err().to_string(),
            "x".parse::<std::net::IpAddr>().unwrap_err().to_string(),
        ];
        for error in errors {
            assert_ne!(in_words(&error), error);
        }
    }
}
