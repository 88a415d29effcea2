//! The result of a run: its settings, its records and its numbers, and the forms it can be shown in.

use super::Spec;
use super::attribution::{Engine, GpuUse, Summary};
use super::engine_counters::{Diffusion, Speculation};
use super::export;
use super::failures::{FailureGroup, by_cause};
use super::load::Outcome;
use super::record::{Effort, Record};
use super::stats::{Distribution, Metric, Metrics, Selection};

/// The result of a run.
#[derive(Debug, Clone)]
pub struct Report {
    /// When it ended, in local time, as vLLM writes it: `20261122-205142`.
    pub date: String,
    /// What it was.
    pub spec: Spec,
    /// Its numbers.
    pub metrics: Metrics,
    /// Requests that have ended, in the order of the schedule.
    pub records: Vec<Record>,
    /// Length of each prompt as it was sent, in tokens, by its place in the workload.
    pub prompt_lengths: Vec<u64>,
    /// Requests that were released and then dropped by the stop.
    pub dropped: usize,
    /// Requests that the stop came before.
    pub unsent: usize,
    /// What the run cost the client.
    pub effort: Effort,
    /// What was seen beside the requests.
    pub beside: Beside,
}

/// What was seen beside the requests of the workload.
#[derive(Debug, Clone, Default)]
pub struct Beside {
    /// When the schedule began.
    pub started_at: Option<jiff::Zoned>,
    /// Speculative decoding, where the server tells of it.
    pub speculation: Option<Speculation>,
    /// Diffusion decoding, where the server tells of it.
    pub diffusion: Option<Diffusion>,
    /// The probes, if there were any.
    pub probes: Option<Probes>,
    /// What the engines behind the server counted; empty where nothing tells.
    pub engines: Vec<Engine>,
    /// What this machine's GPUs did. Nothing here measures it: who runs the benchmark may.
    pub gpus: Vec<GpuUse>,
}

/// The requests of one token beside the workload.
#[derive(Debug, Clone, Default)]
pub struct Probes {
    /// How many failed.
    pub failed: usize,
    /// The latencies of those that did not, in seconds.
    pub latencies: Vec<f64>,
}

impl Report {
    /// As many causes as vLLM shows failures.
    const SHOWN_CAUSES: usize = 10;

    pub(super) fn new(spec: &Spec, prompt_lengths: Vec<u64>, outcome: Outcome) -> Self {
        let selection = Selection {
            percentiles: &spec.percentiles,
            objectives: &spec.objectives,
            is_limited: spec.max_concurrency.is_some(),
            is_scheduled: spec.arrivals.request_rate.is_finite(),
        };
        Self {
            date: jiff::Zoned::now().strftime("%Y%m%d-%H%M%S").to_string(),
            spec: spec.clone(),
            metrics: Metrics::of(&outcome.records, &prompt_lengths, outcome.duration, selection),
            records: outcome.records,
            prompt_lengths,
            dropped: outcome.dropped,
            unsent: outcome.unsent,
            effort: outcome.effort,
            beside: Beside::default(),
        }
    }

    /// The table of `vllm bench serve` 0.32, byte for byte, without the last line end.
    pub fn table(&self) -> String {
        export::table::render(self)
    }

    /// The file of `vllm bench serve --save-result`, with what is xpyd's own under the key `xpyd`. `detailed` adds the
    /// values of single requests.
    pub fn to_json(&self, detailed: bool) -> serde_json::Value {
        export::json::render(self, detailed)
    }

    /// The report as one page of HTML that needs nothing else.
    pub fn to_html(&self) -> String {
        export::html::of_report(self)
    }

    /// The same as text: one line, as Python writes it, without the line end.
    pub fn to_text(&self, detailed: bool) -> String {
        export::python::render(&self.to_json(detailed))
    }

    /// The name of its file, unless the user has another.
    pub fn file_name(&self) -> String {
        export::file::name(self)
    }

    /// The backend as the user named it.
    pub fn backend(&self) -> &'static str {
        self.spec.naming.backend.unwrap_or(self.spec.backend.name())
    }

    /// The model as the user or the server named it.
    pub fn model_id(&self) -> &str {
        self.spec.naming.model_id.as_ref().unwrap_or(&self.spec.model)
    }

    /// Where the time to the first token went, as far as the server tells.
    pub fn attribution(&self) -> Option<Summary> {
        Summary::of(&self.records, &self.beside.engines)
    }

    /// How many requests failed.
    pub fn failed(&self) -> usize {
        self.metrics.failed
    }

    /// Whether it was stopped before every request had ended.
    pub fn is_partial(&self) -> bool {
        self.dropped + self.unsent > 0
    }

    /// Mean time to first token, in milliseconds.
    pub fn mean_ttft_ms(&self) -> f64 {
        self.mean(Metric::Ttft)
    }

    /// Mean time per output token after the first, in milliseconds.
    pub fn mean_tpot_ms(&self) -> f64 {
        self.mean(Metric::Tpot)
    }

    /// Mean gap between chunks, in milliseconds.
    pub fn mean_itl_ms(&self) -> f64 {
        self.mean(Metric::Itl)
    }

    fn mean(&self, metric: Metric) -> f64 {
        self.metrics
            .latency(metric)
            .map_or(0.0, |distribution| distribution.mean)
    }

    /// How much later than scheduled the client released the requests: its own error, which no server is to blame for.
    pub fn release_lag(&self) -> Distribution {
        let lags = self.records.iter().map(|record| record.release_lag().as_secs_f64());
        Distribution::of_seconds(lags.collect(), &[50.0, 99.0, 100.0])
    }

    /// The failures by cause, the most frequent first.
    pub fn failures(&self) -> Vec<FailureGroup> {
        let records = self.records.iter().enumerate();
        by_cause(records.filter_map(|(place, record)| Some((place, record.result.as_ref().err()?.as_str()))))
    }

    /// What vLLM says before the table when requests failed, with one line per cause instead of one per request.
    pub fn failure_summary(&self) -> Option<String> {
        let groups = self.failures();
        if groups.is_empty() {
            return None;
        }
        let mut lines = vec![format!(
            "Failed requests during benchmark run detected (capping to {}):",
            Self::SHOWN_CAUSES
        )];
        let shown = groups.iter().take(Self::SHOWN_CAUSES).enumerate();
        lines.extend(shown.map(|(index, FailureGroup { cause, count, .. })| {
            format!("Error {index}: {cause} ({count} of {} requests)", self.records.len())
        }));
        Some(lines.join("\n"))
    }
}
