//! `xpyd completions SHELL`.

use clap::{Command, CommandFactory, Parser};

use crate::report::{ExitStatus, Failure};
use crate::ui::Printer;

/// Arguments of `xpyd completions`.
#[derive(Debug, Parser)]
pub(super) struct Arguments {
    /// The shell; write the output to the file where it looks for completions
    shell: clap_complete::Shell,
}

/// The command line without the commands that only xpyd itself uses.
fn shown() -> Command {
    let whole = super::Cli::command();
    let verbs = whole.get_subcommands().filter(|verb| !verb.is_hide_set()).cloned();
    let arguments = whole.get_arguments().cloned();
    Command::new("xpyd").args(arguments).subcommands(verbs)
}

pub(super) fn run(arguments: &Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut shown(), "xpyd", &mut script);
    printer.data_part(String::from_utf8_lossy(&script))?;
    Ok(ExitStatus::Success)
}
