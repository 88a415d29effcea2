//! Flags of `xpyd bench`: when it is asked.

use std::num::NonZeroUsize;
use std::time::Duration;

use clap::Args;

/// Flags that say when it is asked.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Load")]
pub struct Load {
    /// Mean requests per second; `inf` sends all at once.
    #[arg(long, value_name = "RATE", default_value_t = 1.0)]
    pub request_rate: f64,
    /// How even the arrivals are: 1 is a Poisson process, more is more even, `inf` is constant.
    #[arg(long, value_name = "SHAPE", default_value_t = 100.0)]
    pub burstiness: f64,
    /// Most requests at the server at once [default: no limit].
    #[arg(long, value_name = "COUNT")]
    pub max_concurrency: Option<NonZeroUsize>,
    /// Copies of the first prompt sent before the clock starts.
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    pub num_warmups: usize,
    /// How long one request may take, as in `90s` or `6h`.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "6h")]
    pub request_timeout: Duration,
}
