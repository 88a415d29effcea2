//! The result of a run: its settings, its records and its numbers, and the forms it can be shown in.

use std::sync::OnceLock;
use std::time::Duration;

use crate::bench::Spec;
use crate::bench::client::engine_counters::{Diffusion, Speculation};
use crate::bench::export;
use crate::bench::latency_breakdown::{Engine, GpuUse, Summary};
use crate::bench::load::Outcome;
use crate::bench::record::{Effort, Record};
use crate::bench::stats::client_saturation::{MachineUse, Verdict};
use crate::bench::stats::failures::{FailureGroup, by_cause};
use crate::bench::stats::latency_stats::Statistics;
use crate::bench::stats::{Distribution, Metric, Metrics, Selection};

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
    /// Made when it is asked for.
    pub(super) statistics: OnceLock<Statistics>,
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
    /// How the machine's cores spent the run, where the caller looked.
    pub machine: Option<MachineUse>,
    /// What the engines behind the server counted; empty where nothing tells.
    pub engines: Vec<Engine>,
    /// Answers of which the server told no number of tokens.
    pub uncounted: Option<Uncounted>,
    /// What was measured, as JSON; null where nobody said. Nothing here finds it out: who runs the benchmark may.
    pub setup: serde_json::Value,
    /// What this machine's GPUs did. Nothing here measures it: who runs the benchmark may.
    pub gpus: Vec<GpuUse>,
}

/// Answers of which the server told no number of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uncounted {
    /// How many.
    pub answers: usize,
    /// Whether a tokenizer has counted them since. Without one, each chunk counts as a token.
    pub by_tokenizer: bool,
}

impl Uncounted {
    /// Counts what the server did not, from the texts, as vLLM's client does. Texts that were kept for that alone go.
    pub(super) fn settle(records: &mut [Record], spec: &Spec) -> Option<Self> {
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

    /// What to know of it.
    pub(super) fn note(self) -> String {
        let Self { answers, by_tokenizer } = self;
        if by_tokenizer {
            format!(
                "the server told no usage of {answers} answers: their tokens were counted by the tokenizer, from the text"
            )
        } else {
            format!(
                "the server told no usage of {answers} answers, and there is no tokenizer: each chunk counts as one token"
            )
        }
    }
}

/// The requests of one token beside the workload.
#[derive(Debug, Clone, Default)]
pub struct Probes {
    /// How many failed.
    pub failed: usize,
    /// The latencies of those that did not, in seconds.
    pub latencies: Vec<f64>,
}

/// The numbers of probes, of which at least one succeeded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProbeNumbers {
    /// How many succeeded.
    pub completed: usize,
    /// How many failed.
    pub failed: usize,
    /// Median latency, in milliseconds.
    pub median_ms: f64,
    /// 99th percentile of the latencies, in milliseconds.
    pub p99_ms: f64,
    /// The longest latency, in milliseconds.
    pub most_ms: f64,
}

impl Probes {
    /// Their numbers, unless none succeeded.
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
    /// As many failures as vLLM shows.
    const SHOWN_FAILURES: usize = 10;

    pub(super) fn new(spec: &Spec, prompt_lengths: Vec<u64>, outcome: Outcome) -> Self {
        Self {
            dropped: outcome.dropped,
            unsent: outcome.unsent,
            effort: outcome.effort,
            ..Self::of_records(spec, prompt_lengths, outcome.records, outcome.duration)
        }
    }

    /// The report on records that are there already, of a run that took so long and ends now.
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
            effort: Effort::default(),
            beside: Beside::default(),
            statistics: OnceLock::new(),
        }
    }

    /// The latencies that the user wants to see, in the order of the table. vLLM's client shows those of tokens only where
    /// it has a tokenizer.
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

    /// When a request was released, since the start; known of those that have ended.
    pub(super) fn released(&self, index: usize) -> Option<Duration> {
        let found = self.records.binary_search_by_key(&index, |record| record.index).ok()?;
        Some(self.records[found].released)
    }

    /// An instant of the run in local time, as Python's `isoformat` writes it; null where nobody knows when it began.
    pub(super) fn local_time(&self, since_start: Duration) -> Option<String> {
        let start = self.beside.started_at.as_ref()?;
        let instant = start.checked_add(since_start).ok()?;
        Some(instant.strftime("%Y-%m-%dT%H:%M:%S.%6f").to_string())
    }

    /// The table of `vllm bench serve` 0.33, byte for byte, without the last line end.
    pub fn table(&self) -> String {
        export::vllm_table::render(self)
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

    /// Intervals of the latencies, stalls, and the same without cold requests. Resampling takes up to a second, so it is done
    /// once, when somebody asks.
    pub fn statistics(&self) -> &Statistics {
        self.statistics
            .get_or_init(|| Statistics::of(&self.records, &self.spec.percentiles))
    }

    /// Whether the client was up to what it measured.
    pub fn verdict(&self) -> Verdict {
        Verdict::on(self)
    }

    /// The result on half a screen, for people.
    pub fn summary(&self) -> String {
        export::xpyd_table::summary(self)
    }

    /// What stands below vLLM's table: [`Report::statistics`] and what the client itself did, for people.
    pub fn remarks(&self) -> String {
        export::xpyd_table::details(self)
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

    /// What vLLM prints before the table when requests failed: the first of them, in the order of the schedule.
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

    /// The failures by cause, the most frequent first, a line each.
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
