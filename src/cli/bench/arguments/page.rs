//! Flags of `xpyd bench`: the report as a page.

use std::path::PathBuf;

use clap::Args;

/// Flags of the report as a page.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Report")]
pub struct Page {
    /// Writes the report as one HTML file that opens without a network: every request over time, latencies, throughput,
    /// failures.
    #[arg(long, value_name = "FILE.html")]
    pub report: Option<PathBuf>,
    /// Makes the report of a saved result and runs nothing: a file of `--save-result --save-detailed`, of xpyd or of
    /// `vllm bench serve`.
    #[arg(long, value_name = "RESULT.json", requires = "report")]
    pub from: Option<PathBuf>,
}
