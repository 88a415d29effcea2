//! The flags of `xpyd bench`, with the names, meanings and defaults of `vllm bench serve`.

mod data;
mod deadline;
mod html_report;
mod load;
mod modes;
mod output;
mod sampling;
mod target;

use std::time::Duration;

use clap::Args;

pub(super) use self::data::{Data, DatasetName};
pub(super) use self::deadline::Deadline;
pub(super) use self::html_report::HtmlReport;
pub(super) use self::load::Load;
pub(super) use self::modes::{Fleet, Modes};
pub(super) use self::output::Output;
pub(super) use self::sampling::Sampling;
pub(super) use self::target::{BackendName, Header, Target};
use super::Server;
use crate::bench::{Backend, Lora, LoraAssignment, Naming, Options, Spec};
use crate::report::{ExitStatus, Failure};

/// Benchmarks a server: the running fleet, or any other with an OpenAI-compatible API.
#[derive(Debug, Clone, Args)]
#[command(args_override_self = true, allow_negative_numbers = true)]
pub struct Arguments {
    /// The server and the form of requests.
    #[command(flatten)]
    pub target: Target,
    /// The workload.
    #[command(flatten)]
    pub data: Data,
    /// The load.
    #[command(flatten)]
    pub load: Load,
    /// Sampling parameters.
    #[command(flatten)]
    pub sampling: Sampling,
    /// Output of the run.
    #[command(flatten)]
    pub output: Output,
    /// The time limit of the run.
    #[command(flatten)]
    pub deadline: Deadline,
    /// The HTML report.
    #[command(flatten)]
    pub html_report: HtmlReport,
    /// Modes with several runs.
    #[command(flatten)]
    pub modes: Modes,
    /// The fleet to start for the benchmark.
    #[command(flatten)]
    pub fleet: Fleet,
}

impl Arguments {
    /// The settings of the run. The model is empty if the server decides.
    pub(super) fn spec(&self, server: Server) -> Result<Spec, Failure> {
        let backend = match self.target.backend {
            BackendName::Openai | BackendName::Vllm => Backend::Completions,
            BackendName::OpenaiChat => Backend::Chat,
        };
        let endpoint = self.target.endpoint.as_deref().unwrap_or(backend.endpoint());
        if !endpoint.starts_with('/') {
            return Err(Failure::message(
                ExitStatus::Usage,
                "`--endpoint` must be a path that starts with `/`",
            ));
        }
        let arrivals = self.load.arrivals();
        if arrivals.ramp.is_some() && arrivals.request_rate.is_finite() {
            let problem = "`--request-rate` and `--ramp-up-strategy` exclude each other";
            return Err(Failure::message(ExitStatus::Usage, problem));
        }
        let model = self.target.served_model_name.as_ref().or(self.target.model.as_ref());
        Ok(Spec {
            base_url: server.base_url,
            backend,
            endpoint: endpoint.to_owned(),
            model: model.cloned().unwrap_or_default(),
            headers: server.headers,
            workload: self.data.workload(self.target.backend)?,
            arrivals,
            max_concurrency: self.load.max_concurrency,
            ignore_eos: self.sampling.ignore_eos.unwrap_or(self.data.ignores_eos()),
            extra_body: self.sampling.fields(),
            warmups: self.load.num_warmups,
            request_timeout: self.load.request_timeout,
            metrics: self.output.percentile_metrics.clone(),
            percentiles: self.output.metric_percentiles.clone(),
            objectives: self.output.objectives(),
            keep_texts: self.output.save_detailed,
            options: self.options(),
            naming: Naming {
                backend: Some(self.target.backend.name()),
                model_id: self.target.model.clone(),
                label: self.output.label.clone(),
                metadata: self.output.metadata.clone(),
                ..Naming::default()
            },
        })
    }

    fn options(&self) -> Options {
        let lora = (!self.target.lora_modules.is_empty()).then(|| Lora {
            modules: self.target.lora_modules.clone(),
            assignment: match self.target.lora_assignment {
                target::LoraAssignment::Random => LoraAssignment::Random,
                target::LoraAssignment::RoundRobin => LoraAssignment::RoundRobin,
            },
        });
        Options {
            lora,
            logprobs: self.sampling.logprobs,
            ready_check: Duration::from_secs(self.load.ready_check_timeout_sec.into()),
            probe_rate: self.load.probe_request_rate,
            request_id_prefix: self.target.request_id_prefix.clone(),
            is_insecure: self.target.insecure,
            ..Options::default()
        }
    }

    /// The run in one line.
    pub(super) fn headline(&self, spec: &Spec) -> String {
        let random = matches!(self.data.dataset_name, DatasetName::Random);
        let what = if random {
            format!(
                "{} requests of {} tokens in and {} out",
                self.data.num_prompts,
                self.data.random_prefix_len + self.data.input_length(),
                self.data.output_length(),
            )
        } else {
            let count = spec.workload.count().unwrap_or_default();
            format!("{count} requests of `{}`", self.data.dataset_name.name())
        };
        let when = if spec.workload.is_self_timed() {
            "at the times of the trace".to_owned()
        } else {
            format!("{} req/s, burstiness {}", self.load.request_rate, self.load.burstiness)
        };
        format!(
            "{what} to `{}` at {}{}: {when}, seed {}",
            spec.model,
            spec.base_url,
            spec.endpoint,
            spec.workload.seed(),
        )
    }
}

#[cfg(test)]
pub(super) mod tests;
