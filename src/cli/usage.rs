//! What is said of a command line that cannot be read, or that asks for help.

mod habits;
mod plain;
mod vllm_options;

use std::str::FromStr;

use clap::error::ContextKind;

use crate::report::{ExitStatus, Failure};
use crate::ui::Printer;

/// A switch whose variable may be empty, as a line `CLIENT_BOUND=` of a file with variables leaves it: `None` then.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Switch(pub Option<bool>);

impl FromStr for Switch {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "" => Ok(Self(None)),
            "y" | "yes" | "t" | "true" | "on" | "1" => Ok(Self(Some(true))),
            "n" | "no" | "f" | "false" | "off" | "0" => Ok(Self(Some(false))),
            _ => Err("it is neither `true` nor `false`"),
        }
    }
}

/// Says what is wrong with a command line, or prints the help that it asks for.
pub(super) fn refuse(mut error: clap::Error, printer: Printer) -> Result<ExitStatus, Failure> {
    habits::hide_internals(&mut error);
    if let Some(failure) = habits::unknown_command(&error) {
        return Err(failure);
    }
    // "to pass it as a value, use `-- --flag`": what stands there goes to vLLM.
    error.remove(ContextKind::Suggested);
    vllm_options::point_to_their_place(&mut error);
    plain::show(&error, printer)
}
