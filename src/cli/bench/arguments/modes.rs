//! Flags of `xpyd bench`: modes with several runs, and a fleet for them.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::bench::sweep::Points;
use crate::connector::ConnectorChoice;
use crate::engine::EngineKind;

/// The flags of modes with several runs.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "More than one run")]
pub struct Modes {
    /// One run per rate or concurrency: `rate=1,2,4`, `concurrency=1,8,64`, with ranges `rate=1..16x2`, `rate=2..10+2`.
    ///
    /// Each has --num-prompts requests with new prompts. The sweep ends when the server is overloaded.
    #[arg(long, value_name = "POINTS", conflicts_with_all = ["find_max", "against", "compare"])]
    pub sweep: Option<Points>,
    /// Searches for the highest rate at which enough requests meet the objectives of --goodput.
    ///
    /// It starts at --request-rate, else at half of the rate of a burst. Every probe has new prompts, and ends as soon
    /// as the result is clear.
    #[arg(long, conflicts_with_all = ["against", "compare"])]
    pub find_max: bool,
    /// The share of requests that must meet all objectives of `--goodput`; 0.99 lets one in a hundred miss.
    #[arg(long, value_name = "SHARE", value_parser = share, default_value = "0.99", requires = "find_max")]
    pub attainment: f64,
    /// Largest relative difference between the passing and the failing rate at the end.
    #[arg(long, value_name = "SHARE", value_parser = share, default_value = "0.05", requires = "find_max")]
    pub tolerance: f64,
    /// Shortest time of a probe that passes: a growing queue takes time to show.
    #[arg(
        long, value_name = "TIME", value_parser = crate::span::parse, default_value = "10s", requires = "find_max"
    )]
    pub min_probe: Duration,
    /// Time limit of the search.
    #[arg(
        long, value_name = "TIME", value_parser = crate::span::parse, default_value = "30m", requires = "find_max"
    )]
    pub max_time: Duration,
    /// Compares the server with this one: both get the same requests in alternating blocks, which cancels drift over
    /// time.
    #[arg(long, value_name = "URL", conflicts_with = "compare")]
    pub against: Option<String>,
    /// Compares two saved results of `xpyd bench` or `vllm bench serve`, without a server.
    ///
    /// With `--save-detailed` in both, every change has a confidence interval and a verdict.
    #[arg(long, num_args = 2, value_names = ["A.json", "B.json"])]
    pub compare: Option<Vec<PathBuf>>,
}

/// The flags of a fleet for the benchmark.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Fleet")]
pub struct Fleet {
    /// Starts the fleet of this profile, measures it and stops it: the name of a shipped profile, or a file.
    #[arg(
        long, value_name = "NAME|FILE", num_args = 0..=1, default_missing_value = "",
        conflicts_with_all = ["base_url", "host", "port", "compare"]
    )]
    pub profile: Option<String>,
    /// Changes one key of the profile; can be repeated.
    #[arg(long, value_name = "KEY=VALUE", requires = "profile", conflicts_with_all = ["base_url", "host", "port"])]
    pub set: Vec<String>,
    /// The engine: vLLM, or the built-in simulated engine.
    #[arg(long, value_enum, requires = "profile", conflicts_with_all = ["base_url", "host", "port"])]
    pub(in crate::cli) engine: Option<EngineKind>,
    /// Timing of simulated engines.
    #[arg(long, value_name = "NAME", requires = "profile", conflicts_with_all = ["base_url", "host", "port"])]
    pub preset: Option<String>,
    /// How KV moves from prefill to decode.
    #[arg(long, value_enum, requires = "profile", conflicts_with_all = ["base_url", "host", "port"])]
    pub(in crate::cli) connector: Option<ConnectorChoice>,
    /// Folder that holds one folder per run of the fleet.
    #[arg(long, default_value = "logs", value_name = "DIR", requires = "profile")]
    pub logs: PathBuf,
    /// Additional arguments of `vllm serve` for all engines.
    #[arg(last = true, requires = "profile", value_name = "VLLM ARGUMENTS")]
    pub vllm: Vec<String>,
}

impl Modes {
    /// The flag of the mode with several runs, if there is one.
    pub(in crate::cli::bench) fn flag(&self) -> Option<&'static str> {
        if self.sweep.is_some() {
            Some("--sweep")
        } else if self.find_max {
            Some("--find-max")
        } else if self.against.is_some() {
            Some("--against")
        } else {
            None
        }
    }
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share: &f64| *share > 0.0 && *share < 1.0);
    share.ok_or_else(|| "it must be a number between 0 and 1, such as 0.99".to_owned())
}
