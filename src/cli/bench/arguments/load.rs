//! Flags of `xpyd bench`: the load.

use std::num::NonZeroUsize;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::bench::{Arrivals, Ramp, RampStrategy};

/// The load flags.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Load")]
pub struct Load {
    /// Sets the flags of a published benchmark, unless they are given.
    #[arg(long, value_enum, value_name = "NAME")]
    pub recipe: Option<Recipe>,
    /// Mean requests per second; `inf` sends all at once.
    #[arg(long, value_name = "RATE", default_value_t = f64::INFINITY)]
    pub request_rate: f64,
    /// Evenness of arrivals: 1 is a Poisson process, higher is more even, `inf` is constant.
    #[arg(long, value_name = "SHAPE", default_value = "1.0")]
    pub burstiness: f64,
    /// Most requests at the server at once [default: no limit].
    #[arg(long, value_name = "COUNT")]
    pub max_concurrency: Option<NonZeroUsize>,
    /// Raises the rate from request to request, instead of --request-rate.
    #[arg(long, value_enum, value_name = "HOW", requires_all = ["ramp_up_start_rps", "ramp_up_end_rps"])]
    pub ramp_up_strategy: Option<RampUp>,
    /// Requests per second at the first request of a ramp.
    #[arg(long, value_name = "RATE", value_parser = clap::value_parser!(u32).range(1..), requires = "ramp_up_strategy")]
    pub ramp_up_start_rps: Option<u32>,
    /// Requests per second at the last request of a ramp.
    #[arg(long, value_name = "RATE", value_parser = clap::value_parser!(u32).range(1..), requires = "ramp_up_strategy")]
    pub ramp_up_end_rps: Option<u32>,
    /// Seconds to wait for the server's first answer; 0 skips the check [default: 0].
    #[arg(long, value_name = "SECONDS", default_value_t = 0, hide_default_value = true)]
    pub ready_check_timeout_sec: u32,
    /// Number of copies of the first prompt to send before the clock starts.
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    pub num_warmups: usize,
    /// One-token probe requests per second in addition to the load, not limited by --max-concurrency; reported
    /// separately.
    #[arg(long, value_name = "RATE", default_value_t = 0.0, value_parser = rate_or_zero)]
    pub probe_request_rate: f64,
    /// Time limit of one request, as in `90s` or `6h`.
    #[arg(long, value_name = "TIME", value_parser = crate::span::parse, default_value = "6h")]
    pub request_timeout: Duration,
}

/// Published benchmarks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Recipe {
    /// LMCache's xPyD example: 30 requests of 7500 input and 200 output tokens, one per second at even intervals
    LmcacheXpyd,
}

/// The shape of the rise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RampUp {
    /// By a constant amount per request
    Linear,
    /// By a constant factor per request
    Exponential,
}

impl Load {
    /// The arrivals of the flags.
    pub(super) fn arrivals(&self) -> Arrivals {
        let strategy = self.ramp_up_strategy.map(|strategy| match strategy {
            RampUp::Linear => RampStrategy::Linear,
            RampUp::Exponential => RampStrategy::Exponential,
        });
        let ends = self.ramp_up_start_rps.zip(self.ramp_up_end_rps);
        let ramp = strategy
            .zip(ends)
            .map(|(strategy, (start, end))| Ramp { strategy, start, end });
        Arrivals {
            request_rate: self.request_rate,
            burstiness: self.burstiness,
            ramp,
        }
    }
}

fn rate_or_zero(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate: &f64| rate.is_finite() && *rate >= 0.0);
    rate.ok_or_else(|| "a rate is a number from 0 up".to_owned())
}
