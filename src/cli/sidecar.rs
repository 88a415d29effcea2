//! `xpyd sidecar`: the first program of an engine's leader, if the engine needs a server of its own.

use std::time::Duration;

use crate::report::{ExitStatus, Failure};
use crate::supervisor::sidecar::Sidecar;
use crate::ui::Printer;

/// Arguments of `xpyd sidecar`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Host on which the sidecar listens
    #[arg(long)]
    host: String,
    /// Port on which the sidecar listens
    #[arg(long)]
    port: u16,
    /// Time limit for the sidecar until it listens
    #[arg(long, value_parser = crate::span::parse)]
    deadline: Duration,
    /// Time from SIGTERM to SIGKILL of the engine after its sidecar has ended
    #[arg(long, value_parser = crate::span::parse)]
    grace: Duration,
    /// The sidecar's command line, `--`, the engine's command line
    #[arg(last = true, required = true)]
    commands: Vec<String>,
}

/// Replaces this process by the engine. It only returns if that fails.
pub(super) fn run(arguments: &Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    let mut commands = arguments.commands.splitn(2, |word| word == "--");
    let sidecar = Sidecar {
        address: (&arguments.host, arguments.port),
        deadline: arguments.deadline,
        grace: arguments.grace,
        command: commands.next().unwrap_or_default(),
        engine: commands.next().unwrap_or_default(),
    };
    let error = sidecar.lead(|error| printer.error(format_args!("error: {error}")));
    Err(Failure::new(ExitStatus::Failure, error))
}
