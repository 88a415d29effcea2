//! Flags of `xpyd bench`: output.

use std::path::PathBuf;

use clap::Args;

use crate::bench::{Metric, Objective};
use crate::report::ExitStatus;

/// The output flags.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Report")]
pub struct Output {
    /// Latencies to report: `ttft`, `tpot`, `itl`, `e2el`, `client_queue_time`, `e2el_including_client_queue`.
    #[arg(
        long, value_name = "NAMES", value_delimiter = ',', value_parser = metric, default_value = "ttft,tpot,itl"
    )]
    pub percentile_metrics: Vec<Metric>,
    /// Percentiles to report.
    #[arg(
        long, value_name = "NUMBERS", value_delimiter = ',', value_parser = percentile, default_value = "99"
    )]
    pub metric_percentiles: Vec<f64>,
    /// Objectives of a good request in milliseconds: `ttft:500 tpot:20 e2el:5000`.
    #[arg(long, value_name = "NAME:MS", num_args = 1..)]
    pub goodput: Vec<Objective>,
    /// Prints the result as JSON instead of the table: vLLM's keys, and xpyd's own under `xpyd`.
    #[arg(long)]
    pub json: bool,
    /// Saves the result as JSON.
    #[arg(long)]
    pub save_result: bool,
    /// Includes the values of every request in the JSON.
    #[arg(long)]
    pub save_detailed: bool,
    /// Appends the result as a line to its file.
    #[arg(long)]
    pub append_result: bool,
    /// Folder of the saved result [default: the current one].
    #[arg(long, value_name = "PATH")]
    pub result_dir: Option<PathBuf>,
    /// File name of the saved result [default: by label, rate, limit, model and time].
    #[arg(long, value_name = "NAME")]
    pub result_filename: Option<String>,
    /// Label of the result, in its file and file name [default: the backend].
    #[arg(long, value_name = "TEXT")]
    pub label: Option<String>,
    /// Additional keys of the saved result.
    #[arg(long, value_name = "KEY=VALUE", num_args = 0.., value_parser = pair)]
    pub metadata: Vec<(String, String)>,
    /// Shows no progress.
    #[arg(long)]
    pub disable_tqdm: bool,
    /// Exits with 0 even if requests failed, as vLLM does; `xpyd bench serve` implies it.
    #[arg(long)]
    pub allow_failures: bool,
    /// Prints vLLM's lines and table even on a terminal, and exits as vLLM does; `xpyd bench serve` implies it.
    #[arg(long)]
    pub as_vllm: bool,
    /// Prints on a terminal what files and pipes get: vLLM's lines and table, the stages of the time to first token,
    /// confidence intervals, and the load of the client itself.
    #[arg(long)]
    pub details: bool,
}

impl Output {
    /// The exit status: a stopped run takes precedence over failed requests.
    pub(in crate::cli::bench) fn exit_status(&self, is_stopped: bool, has_failed: bool) -> ExitStatus {
        if is_stopped {
            ExitStatus::Forced
        } else if has_failed && !self.allow_failures && !self.as_vllm {
            ExitStatus::Failure
        } else {
            ExitStatus::Success
        }
    }

    /// The objectives: of two for the same latency the later one wins, as in vLLM.
    pub(super) fn objectives(&self) -> Vec<Objective> {
        let mut kept: Vec<Objective> = Vec::new();
        for objective in &self.goodput {
            match kept.iter_mut().find(|earlier| earlier.latency == objective.latency) {
                Some(earlier) => *earlier = *objective,
                None => kept.push(*objective),
            }
        }
        kept
    }
}

fn metric(name: &str) -> Result<Metric, String> {
    let found = Metric::ALL.into_iter().find(|metric| metric.key() == name);
    found.ok_or_else(|| format!("it must be one of {}", Metric::ALL.map(Metric::key).join(", ")))
}

fn percentile(text: &str) -> Result<f64, String> {
    let number = text.trim().parse().ok().filter(|number| (0.0..=100.0).contains(number));
    number.ok_or_else(|| "a percentile must be a number from 0 to 100".to_owned())
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("it must have the form `KEY=VALUE`")?;
    Ok((key.trim().to_owned(), value.trim().to_owned()))
}
