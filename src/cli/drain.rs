//! `xpyd drain`: drains engines and stops them, while the others serve.

use std::time::Duration;

use super::engine_change::{EngineArguments, change_engines};
use crate::fleet::EngineVerb;
use crate::report::{ExitStatus, Failure};
use crate::ui::Printer;

/// Arguments of `xpyd drain`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    engines: EngineArguments,
    /// How long to wait for each engine; it continues to stop after that
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = crate::span::parse)]
    timeout: Duration,
}

/// Drains engines; `xpyd restart` brings them back.
pub(super) async fn run(arguments: Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    change_engines(&arguments.engines, EngineVerb::Drain, arguments.timeout, printer).await
}
