//! Flags of `xpyd bench`: more than one run, and a fleet for them.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::bench::sweep::Points;
use crate::cli::request::{ConnectorFlag, EngineFlag};

/// Flags that make more of the bench than one run.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "More than one run")]
pub struct Modes {
    /// One run per rate or concurrency: `rate=1,2,4`, `concurrency=1,8,64`, with ranges `rate=1..16x2`, `rate=2..10+2`.
    ///
    /// Each has --num-prompts requests with prompts of its own. It ends where the server falls behind more and more.
    #[arg(long, value_name = "POINTS", conflicts_with_all = ["find_max", "against", "compare"])]
    pub sweep: Option<Points>,
    /// Searches the highest rate at which enough requests meet the objectives of --goodput.
    ///
    /// It begins at --request-rate, else at half of what the server does with a burst. Every probe has prompts of its own, and ends as soon as it is decided.
    #[arg(long, conflicts_with_all = ["against", "compare"])]
    pub find_max: bool,
    /// The share of requests that must meet all objectives: 0.99 is as much as to say "at the 99th percentile".
    #[arg(long, value_name = "SHARE", value_parser = share, default_value = "0.99", requires = "find_max")]
    pub attainment: f64,
    /// How far apart the rate that meets the objectives and the one that does not may be in the end.
    #[arg(long, value_name = "SHARE", value_parser = share, default_value = "0.05", requires = "find_max")]
    pub tolerance: f64,
    /// How long a probe runs at least before its rate can pass: a queue that grows takes time to be seen.
    #[arg(
        long, value_name = "TIME", value_parser = crate::span::parse, default_value = "10s", requires = "find_max"
    )]
    pub min_probe: Duration,
    /// How long the search may take.
    #[arg(
        long, value_name = "TIME", value_parser = crate::span::parse, default_value = "30m", requires = "find_max"
    )]
    pub max_time: Duration,
    /// Compares the server with this one: both get the same requests, in turn, so that what changes with time cancels.
    #[arg(long, value_name = "URL", conflicts_with = "compare")]
    pub against: Option<String>,
    /// Compares two saved results, of `xpyd bench` or `vllm bench serve`, and needs no server.
    ///
    /// With `--save-detailed` in both, every change has an interval and a verdict.
    #[arg(long, num_args = 2, value_names = ["A.json", "B.json"])]
    pub compare: Option<Vec<PathBuf>>,
}

/// Flags that bring up a fleet for the bench.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Fleet")]
pub struct Fleet {
    /// Brings up the fleet of this profile, measures it, and takes it down: a shipped profile's name or a file.
    #[arg(
        long, value_name = "NAME|FILE", num_args = 0..=1, default_missing_value = "",
        conflicts_with_all = ["base_url", "host", "port", "compare"]
    )]
    pub profile: Option<String>,
    /// Changes one key of the profile; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", requires = "profile", conflicts_with_all = ["base_url", "host", "port"])]
    pub set: Vec<String>,
    /// What serves the model: real vLLM, or the built-in simulated engine.
    #[arg(long, value_enum, requires = "profile", conflicts_with_all = ["base_url", "host", "port"])]
    pub(in crate::cli) engine: Option<EngineFlag>,
    /// Timing of simulated engines.
    #[arg(long, value_name = "NAME", requires = "profile", conflicts_with_all = ["base_url", "host", "port"])]
    pub preset: Option<String>,
    /// How KV moves from prefill to decode.
    #[arg(long, value_enum, requires = "profile", conflicts_with_all = ["base_url", "host", "port"])]
    pub(in crate::cli) connector: Option<ConnectorFlag>,
    /// Folder that holds one folder per run of the fleet.
    #[arg(long, default_value = "logs", value_name = "DIR", requires = "profile")]
    pub logs: PathBuf,
    /// More arguments for `vllm serve`, of all engines of the fleet.
    #[arg(last = true, requires = "profile", value_name = "VLLM ARGUMENTS")]
    pub vllm: Vec<String>,
}

impl Modes {
    /// The flag of the mode that makes several runs of one server, if there is one.
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
    share.ok_or_else(|| "it is a number between 0 and 1, such as 0.99".to_owned())
}
