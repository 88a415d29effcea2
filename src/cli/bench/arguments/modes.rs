//! Flags of `xpyd bench`: more than one run.

use std::path::PathBuf;

use clap::Args;

/// Flags that make more of the bench than one run.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "More than one run")]
pub struct Modes {
    /// Compares two saved results, of `xpyd bench` or `vllm bench serve`, and needs no server.
    ///
    /// With `--save-detailed` in both, every change has an interval and a verdict.
    #[arg(long, num_args = 2, value_names = ["A.json", "B.json"])]
    pub compare: Option<Vec<PathBuf>>,
}
