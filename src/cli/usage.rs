//! Errors about the command line, and help.

mod other_tools;
mod parse_errors;
mod vllm_options;

use std::str::FromStr;

use clap::error::ContextKind;

use crate::report::{ExitStatus, Failure};
use crate::ui::Printer;

/// A boolean flag whose environment variable can be empty, as in a line `CLIENT_BOUND=` of an environment file: `None`
/// then.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Switch(pub Option<bool>);

impl FromStr for Switch {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "" => Ok(Self(None)),
            "y" | "yes" | "t" | "true" | "on" | "1" => Ok(Self(Some(true))),
            "n" | "no" | "f" | "false" | "off" | "0" => Ok(Self(Some(false))),
            _ => Err("expected `true` or `false`"),
        }
    }
}

/// Prints what is wrong with a command line, or the requested help.
pub(super) fn refuse(mut error: clap::Error, printer: Printer) -> Result<ExitStatus, Failure> {
    other_tools::hide_internals(&mut error);
    if let Some(failure) = other_tools::unknown_command(&error) {
        return Err(failure);
    }
    // "to pass it as a value, use `-- --flag`": the words after `--` go to vLLM.
    error.remove(ContextKind::Suggested);
    vllm_options::point_to_their_place(&mut error);
    parse_errors::show(&error, printer)
}
