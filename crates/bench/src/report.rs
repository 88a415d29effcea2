//! The result of a run: settings, records, numbers, and the forms in which it is shown.

use std::sync::OnceLock;
use std::time::Duration;

use crate::Spec;
use crate::client::engine_counters::{Diffusion, Speculation};
use crate::export;
use crate::latency_breakdown::{BreakdownSummary, EngineCounters, GpuUse};
use crate::load::LoadResult;
use crate::record::{ClientUsage, Record};
use crate::stats::client_saturation::{ClientValidity, MachineUse};
use crate::stats::failures::{FailureGroup, by_cause};
use crate::stats::latency_stats::LatencyStats;
use crate::stats::{Distribution, Metric, Metrics, Selection};

/// The result of a run.
#[derive(Debug, Clone)]
pub struct Report {
    /// End of the run in local time, as vLLM writes it: `20261122-205142`.
    pub date: String,
    /// The settings.
    pub spec: Spec,
    /// The numbers.
    pub metrics: Metrics,
    /// Finished requests in the order of the schedule.
    pub records: Vec<Record>,
    /// Length of each prompt as sent, in tokens, by index in the workload.
    pub prompt_lengths: Vec<u64>,
    /// Requests that were in flight when the run was stopped.
    pub dropped: usize,
    /// Requests that were never sent.
    pub unsent: usize,
    /// CPU use of the client.
    pub client_usage: ClientUsage,
    /// Data beyond the requests.
    pub extras: Extras,
    /// Computed on first use.
    pub(super) latency_stats: OnceLock<LatencyStats>,
}

/// Data about a run beyond its requests.
#[derive(Debug, Clone, Default)]
pub struct Extras {
    /// Start of the schedule.
    pub started_at: Option<jiff::Zoned>,
    /// Speculative decoding, if the server reports it.
    pub speculation: Option<Speculation>,
    /// Diffusion decoding, if the server reports it.
    pub diffusion: Option<Diffusion>,
    /// The probe requests, if there were any.
    pub probes: Option<Probes>,
    /// CPU use of the machine, if the caller measured it.
    pub machine: Option<MachineUse>,
    /// Counters of the engines behind the server; empty if it reports none.
    pub engines: Vec<EngineCounters>,
    /// Answers for which the server reported no token count.
    pub missing_usage: Option<MissingUsage>,
    /// Description of server and fleet as JSON, from the caller; null if unknown.
    pub setup: serde_json::Value,
    /// GPU use of this machine, from the caller.
    pub gpus: Vec<GpuUse>,
}

/// Answers for which the server reported no token count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MissingUsage {
    /// Number of answers.
    pub answers: usize,
    /// Whether a tokenizer counted them. Without one, each chunk counts as a token.
    pub by_tokenizer: bool,
}

impl MissingUsage {
    /// Counts missing tokens from the texts, as vLLM's client does. Texts that were kept only for this are dropped.
    pub(super) fn fill_in(records: &mut [Record], spec: &Spec) -> Option<Self> {
        let mut answers = 0;
        for answer in records.iter_mut().filter_map(|record| record.result.as_mut().ok()) {
            if !matches!(answer.completion_tokens, None | Some(0)) {
                continue;
            }
            answers += 1;
            let counted = spec
                .options
                .tokenizer
                .as_ref()
                .and_then(|tokenizer| tokenizer.encode(&answer.text).ok());
            let counted = counted.map(|ids| ids.len() as u64);
            answer.completion_tokens = counted.or(answer.completion_tokens);
            if !spec.keep_texts {
                answer.text = String::new();
            }
        }
        (answers > 0).then_some(Self {
            answers,
            by_tokenizer: spec.options.tokenizer.is_some(),
        })
    }

    /// The note for the report.
    pub(super) fn note(self) -> String {
        let Self { answers, by_tokenizer } = self;
        if by_tokenizer {
            format!(
                "the server reported no usage for {answers} answers: the tokenizer counted their tokens from the text"
            )
        } else {
            format!(
                "the server reported no usage for {answers} answers, and there is no tokenizer: each chunk counts as one token"
            )
        }
    }
}

/// The probe requests.
#[derive(Debug, Clone, Default)]
pub struct Probes {
    /// Number of failed requests.
    pub failed: usize,
    /// Latencies of the successful ones, in seconds.
    pub latencies: Vec<f64>,
}

/// The numbers of the probe requests, if at least one succeeded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProbeNumbers {
    /// Number of successful requests.
    pub completed: usize,
    /// Number of failed requests.
    pub failed: usize,
    /// Median latency, in milliseconds.
    pub median_ms: f64,
    /// 99th percentile of the latencies, in milliseconds.
    pub p99_ms: f64,
    /// The longest latency, in milliseconds.
    pub most_ms: f64,
}

impl Probes {
    /// The numbers; `None` if no probe succeeded.
    pub fn numbers(&self) -> Option<ProbeNumbers> {
        let latencies = Distribution::of_seconds(self.latencies.clone(), &[99.0, 100.0]);
        let [(_, p99_ms), (_, most_ms)] = latencies.percentiles[..] else {
            return None;
        };
        (!self.latencies.is_empty()).then_some(ProbeNumbers {
            completed: self.latencies.len(),
            failed: self.failed,
            median_ms: latencies.median,
            p99_ms,
            most_ms,
        })
    }
}

impl Report {
    /// Failures to show, as in vLLM.
    const SHOWN_FAILURES: usize = 10;

    pub(super) fn new(spec: &Spec, prompt_lengths: Vec<u64>, outcome: LoadResult) -> Self {
        Self {
            dropped: outcome.dropped,
            unsent: outcome.unsent,
            client_usage: outcome.client_usage,
            ..Self::of_records(spec, prompt_lengths, outcome.records, outcome.duration)
        }
    }

    /// A report on given records, of a run of this length that ends now.
    pub fn of_records(spec: &Spec, prompt_lengths: Vec<u64>, records: Vec<Record>, duration: Duration) -> Self {
        let selection = Selection {
            percentiles: &spec.percentiles,
            objectives: &spec.objectives,
            is_limited: spec.max_concurrency.is_some(),
            is_scheduled: spec.arrivals.has_fixed_rate(),
        };
        Self {
            date: jiff::Zoned::now().strftime("%Y%m%d-%H%M%S").to_string(),
            spec: spec.clone(),
            metrics: Metrics::of(&records, &prompt_lengths, duration, selection),
            records,
            prompt_lengths,
            dropped: 0,
            unsent: 0,
            client_usage: ClientUsage::default(),
            extras: Extras::default(),
            latency_stats: OnceLock::new(),
        }
    }

    /// The latencies to show, in the order of the table. Like vLLM's client, it shows token latencies only with a
    /// tokenizer.
    pub fn shown_latencies(&self) -> impl Iterator<Item = (Metric, &Distribution)> {
        let is_of_tokens = |metric: Metric| matches!(metric, Metric::Ttft | Metric::Tpot | Metric::Itl);
        let has_tokenizer = !self.spec.options.is_without_tokenizer;
        let latencies = self
            .metrics
            .latencies
            .iter()
            .map(|(metric, distribution)| (*metric, distribution));
        latencies
            .filter(|(metric, _)| self.spec.metrics.contains(metric))
            .filter(move |(metric, _)| has_tokenizer || !is_of_tokens(*metric))
    }

    /// Release time of a request that has ended, since the start.
    pub(super) fn released(&self, index: usize) -> Option<Duration> {
        let found = self.records.binary_search_by_key(&index, |record| record.index).ok()?;
        Some(self.records[found].released)
    }

    /// A time of the run in local time, as Python's `isoformat` writes it. `None` if the start is unknown.
    pub(super) fn local_time(&self, since_start: Duration) -> Option<String> {
        let start = self.extras.started_at.as_ref()?;
        let instant = start.checked_add(since_start).ok()?;
        Some(instant.strftime("%Y-%m-%dT%H:%M:%S.%6f").to_string())
    }

    /// The table of `vllm bench serve` 0.33, byte for byte, without the last line end.
    pub fn table(&self) -> String {
        export::vllm_table::render(self)
    }

    /// The result file of `vllm bench serve --save-result`, with xpyd's additions under the key `xpyd`. `detailed` adds
    /// the values of single requests.
    pub fn to_json(&self, detailed: bool) -> serde_json::Value {
        export::json::render(self, detailed)
    }

    /// The report as one self-contained HTML page.
    pub fn to_html(&self) -> String {
        export::html::of_report(self)
    }

    /// The JSON as text: one line, as Python writes it, without the line end.
    pub fn to_text(&self, detailed: bool) -> String {
        export::python::render(&self.to_json(detailed))
    }

    /// The default file name.
    pub fn file_name(&self) -> String {
        export::file_name::name(self)
    }

    /// The backend as the user named it.
    pub fn backend(&self) -> &'static str {
        self.spec.naming.backend.unwrap_or(self.spec.backend.name())
    }

    /// The model as the user or the server named it.
    pub fn model_id(&self) -> &str {
        self.spec.naming.model_id.as_ref().unwrap_or(&self.spec.model)
    }

    /// Latency statistics with confidence intervals. The bootstrap takes up to a second, so it runs once, on first use.
    pub fn latency_stats(&self) -> &LatencyStats {
        self.latency_stats
            .get_or_init(|| LatencyStats::of(&self.records, &self.spec.percentiles))
    }

    /// Whether the client limited the measurement.
    pub fn validity(&self) -> ClientValidity {
        ClientValidity::of(self)
    }

    /// A short summary for people.
    pub fn summary(&self) -> String {
        export::xpyd_table::summary(self)
    }

    /// The details below vLLM's table, for people: [`Report::latency_stats`] and the client's own load.
    pub fn remarks(&self) -> String {
        export::xpyd_table::details(self)
    }

    /// The stages of the time to first token, as far as the server reports them.
    pub fn latency_breakdown(&self) -> Option<BreakdownSummary> {
        BreakdownSummary::of(&self.records, &self.extras.engines)
    }

    /// Number of failed requests.
    pub fn failed(&self) -> usize {
        self.metrics.failed
    }

    /// Whether the run was stopped before all requests had ended.
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

    fn mean(&self, metric: Metric) -> f64 {
        self.metrics
            .latency(metric)
            .map_or(0.0, |distribution| distribution.mean)
    }

    /// How late the client sent requests: its own error, not the server's.
    pub fn release_lag(&self) -> Distribution {
        let lags = self.records.iter().map(|record| record.release_lag().as_secs_f64());
        Distribution::of_seconds(lags.collect(), &[50.0, 99.0, 100.0])
    }

    /// Failures by cause, the most frequent first.
    pub fn failures(&self) -> Vec<FailureGroup> {
        let records = self.records.iter().enumerate();
        by_cause(records.filter_map(|(place, record)| Some((place, record.result.as_ref().err()?.as_str()))))
    }

    /// The lines that vLLM prints before the table if requests failed: the first failures in the order of the schedule.
    pub fn failure_lines(&self) -> Vec<String> {
        let causes = self.records.iter().filter_map(|record| record.result.as_ref().err());
        let mut lines: Vec<String> = causes
            .take(Self::SHOWN_FAILURES)
            .enumerate()
            .map(|(index, cause)| format!("Error {index}: {cause}"))
            .collect();
        if !lines.is_empty() {
            let shown = Self::SHOWN_FAILURES;
            lines.insert(
                0,
                format!("Failed requests during benchmark run detected (capping to {shown}):"),
            );
        }
        lines
    }

    /// Failures by cause, the most frequent first, one line each.
    pub fn failure_summary(&self) -> Option<String> {
        let groups = self.failures();
        let lines = groups
            .iter()
            .take(Self::SHOWN_FAILURES)
            .map(|FailureGroup { cause, count, .. }| {
                format!("{count} of {} requests failed: {cause}", self.records.len())
            });
        let lines: Vec<String> = lines.collect();
        (!lines.is_empty()).then(|| lines.join("\n"))
    }
}
