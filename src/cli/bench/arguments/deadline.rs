//! Flags of `xpyd bench`: the time limit.

use std::time::Duration;

use clap::Args;

/// The time limit flags.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Load")]
pub struct Deadline {
    /// Time limit of the whole run, as in `10m`. Then the run stops as with Ctrl+C: finished requests still get their
    /// table, and the exit code is 1 [default: no limit]
    #[arg(long, value_name = "TIME", value_parser = crate::span::parse)]
    pub deadline: Option<Duration>,
}
