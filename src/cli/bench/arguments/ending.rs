//! Flags of `xpyd bench`: when it ends before its time.

use std::time::Duration;

use clap::Args;

/// Flags that say when the run ends before its time.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Load")]
pub struct Ending {
    /// How long the whole run may take, as in `10m`; then it stops as with Ctrl+C: what has ended gets its table, and the
    /// exit code is 1 [default: no limit]
    #[arg(long, value_name = "TIME", value_parser = crate::span::parse)]
    pub deadline: Option<Duration>,
}
