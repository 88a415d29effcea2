//! `xpyd restart`: restarts engines one after the other, while the others serve.

use std::time::Duration;

use super::engine_change::{EngineArguments, change_engines};
use crate::fleet::EngineVerb;
use crate::report::{ExitStatus, Failure};
use crate::ui::Printer;

/// Arguments of `xpyd restart`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    engines: EngineArguments,
    /// How long to wait for each engine; it continues after that
    #[arg(long, value_name = "DURATION", default_value = "35m", value_parser = crate::span::parse)]
    timeout: Duration,
}

/// Restarts engines, each only after the one before serves again.
pub(super) async fn run(arguments: Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    change_engines(&arguments.engines, EngineVerb::Restart, arguments.timeout, printer).await
}
