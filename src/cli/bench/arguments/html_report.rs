//! Flags of `xpyd bench`: the HTML report.

use std::path::PathBuf;

use clap::Args;

/// The flags of the HTML report.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Report")]
pub struct HtmlReport {
    /// Writes the report as one self-contained HTML file: every request over time, latencies, throughput, failures.
    #[arg(long, value_name = "FILE.html")]
    pub report: Option<PathBuf>,
    /// Reports a saved result without a run: a file of `--save-result --save-detailed`, of xpyd or `vllm bench serve`.
    #[arg(long, value_name = "RESULT.json", requires = "report")]
    pub from: Option<PathBuf>,
}
