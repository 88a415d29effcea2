//! `xpyd completions SHELL`.

use clap::{CommandFactory, Parser};

use crate::report::ExitStatus;
use crate::ui::Printer;

/// Arguments of `xpyd completions`.
#[derive(Debug, Parser)]
pub(super) struct Arguments {
    /// The shell: put the output where it looks for completions.
    shell: clap_complete::Shell,
}

pub(super) fn run(arguments: &Arguments, printer: Printer) -> ExitStatus {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut super::Cli::command(), "xpyd", &mut script);
    printer.data_part(String::from_utf8_lossy(&script));
    ExitStatus::Success
}
