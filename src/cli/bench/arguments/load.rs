//! Flags of `xpyd bench`: when it is asked.

use std::num::NonZeroUsize;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::bench::{Arrivals, Ramp, RampStrategy};

/// Flags that say when it is asked.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Load")]
pub struct Load {
    /// A published benchmark: its flags, where they are not given.
    #[arg(long, value_enum, value_name = "NAME")]
    pub recipe: Option<Recipe>,
    /// Mean requests per second; `inf` sends all at once.
    #[arg(long, value_name = "RATE", default_value_t = f64::INFINITY)]
    pub request_rate: f64,
    /// How even the arrivals are: 1 is a Poisson process, more is more even, `inf` is constant.
    #[arg(long, value_name = "SHAPE", default_value = "1.0")]
    pub burstiness: f64,
    /// Most requests at the server at once [default: no limit].
    #[arg(long, value_name = "COUNT")]
    pub max_concurrency: Option<NonZeroUsize>,
    /// Lets the rate rise from request to request, in place of --request-rate.
    #[arg(long, value_enum, value_name = "HOW", requires_all = ["ramp_up_start_rps", "ramp_up_end_rps"])]
    pub ramp_up_strategy: Option<RampUp>,
    /// Requests per second at the first request of a ramp.
    #[arg(long, value_name = "RATE", value_parser = clap::value_parser!(u32).range(1..), requires = "ramp_up_strategy")]
    pub ramp_up_start_rps: Option<u32>,
    /// Requests per second at the last request of a ramp.
    #[arg(long, value_name = "RATE", value_parser = clap::value_parser!(u32).range(1..), requires = "ramp_up_strategy")]
    pub ramp_up_end_rps: Option<u32>,
    /// Seconds that the server may take until it answers the first prompt; 0 does not ask [default: 0].
    #[arg(long, value_name = "SECONDS", default_value_t = 0, hide_default_value = true)]
    pub ready_check_timeout_sec: u32,
    /// Copies of the first prompt sent before the clock starts.
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    pub num_warmups: usize,
    /// Requests of one token per second beside the others, past --max-concurrency; they are reported apart.
    #[arg(long, value_name = "RATE", default_value_t = 0.0, value_parser = rate_or_zero)]
    pub probe_request_rate: f64,
    /// How long one request may take, as in `90s` or `6h`.
    #[arg(long, value_name = "TIME", value_parser = crate::span::parse, default_value = "6h")]
    pub request_timeout: Duration,
}

/// Published benchmarks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Recipe {
    /// LMCache's xPyD example: 30 requests of 7500 tokens in and 200 out, one a second, evenly
    LmcacheXpyd,
}

/// How the rate rises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RampUp {
    /// By the same amount from request to request
    Linear,
    /// By the same factor from request to request
    Exponential,
}

impl Load {
    /// The arrivals that they ask for.
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
