//! The flags of `xpyd bench`: named and meant as those of `vllm bench serve`, with LMCache's xPyD recipe as defaults.

mod data;
mod load;
mod modes;
mod output;
mod sampling;
mod target;

use clap::Args;
use reqwest::header::HeaderMap;

pub(super) use self::data::Data;
pub(super) use self::load::Load;
pub(super) use self::modes::Modes;
pub(super) use self::output::Output;
pub(super) use self::sampling::Sampling;
pub(super) use self::target::{BackendName, Header, Target};
use crate::bench::{Arrivals, Backend, Spec};
use crate::report::{ExitStatus, Failure};

/// Benchmarks a server: the running fleet, or any other that speaks OpenAI's API.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    /// Which server is asked, and how.
    #[command(flatten)]
    pub target: Target,
    /// What is asked.
    #[command(flatten)]
    pub data: Data,
    /// When it is asked.
    #[command(flatten)]
    pub load: Load,
    /// What is asked of the sampler.
    #[command(flatten)]
    pub sampling: Sampling,
    /// What is told of the run.
    #[command(flatten)]
    pub output: Output,
    /// More than one run.
    #[command(flatten)]
    pub modes: Modes,
}

impl Arguments {
    /// The run that they ask for. Its model is empty if they leave that to the server.
    pub(super) fn spec(&self, base_url: String, headers: HeaderMap) -> Result<Spec, Failure> {
        let backend = match self.target.backend {
            BackendName::Openai => Backend::Completions,
            BackendName::OpenaiChat => Backend::Chat,
        };
        let endpoint = self.target.endpoint.as_deref().unwrap_or(backend.endpoint());
        if !endpoint.starts_with('/') {
            return Err(Failure::message(
                ExitStatus::Usage,
                "`--endpoint` is a path and starts with `/`",
            ));
        }
        Ok(Spec {
            base_url,
            backend,
            endpoint: endpoint.to_owned(),
            model: self.target.model.clone().unwrap_or_default(),
            headers,
            workload: self.data.workload(),
            arrivals: Arrivals {
                request_rate: self.load.request_rate,
                burstiness: self.load.burstiness,
            },
            max_concurrency: self.load.max_concurrency,
            ignore_eos: self.sampling.ignore_eos,
            extra_body: self.sampling.fields(),
            warmups: self.load.num_warmups,
            request_timeout: self.load.request_timeout,
            metrics: self.output.percentile_metrics.clone(),
            percentiles: self.output.metric_percentiles.clone(),
            objectives: self.output.goodput.clone(),
            keep_texts: self.output.save_detailed,
        })
    }

    /// What is about to run, in one line.
    pub(super) fn headline(&self, spec: &Spec) -> String {
        format!(
            "{} requests of {} tokens in and {} out to `{}` at {}{}: {} req/s, burstiness {}, seed {}",
            self.data.num_prompts,
            self.data.random_prefix_len + self.data.random_input_len,
            self.data.random_output_len,
            spec.model,
            spec.base_url,
            spec.endpoint,
            self.load.request_rate,
            self.load.burstiness,
            spec.workload.seed(),
        )
    }
}

#[cfg(test)]
mod tests;
