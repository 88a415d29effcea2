//! The table of `vllm bench serve` 0.33. Scripts parse it, so it is equal byte for byte, including spaces at line ends.

use super::python::repr;
use crate::client::engine_counters::{Diffusion, Speculation};
use crate::report::{ProbeNumbers, Probes, Report};
use crate::stats::{Distribution, Metric};

const WIDTH: usize = 50;

/// The lines of the table.
struct VllmTable(Vec<String>);

pub(crate) fn render(report: &Report) -> String {
    let metrics = &report.metrics;
    let spec = &report.spec;
    let has_tokenizer = !spec.options.is_without_tokenizer;
    let mut table = VllmTable(vec![format!("{:=^WIDTH$}", " Serving Benchmark Result ")]);
    table.count("Successful requests:", metrics.completed);
    table.count("Failed requests:", metrics.failed);
    if let Some(limit) = spec.max_concurrency {
        table.count("Maximum request concurrency:", limit);
    }
    if spec.arrivals.has_fixed_rate() {
        table.number("Request rate configured (RPS):", spec.arrivals.request_rate);
    }
    table.number("Benchmark duration (s):", metrics.duration);
    table.count("Total input tokens:", metrics.total_input_tokens);
    if has_tokenizer {
        table.count("Total generated tokens:", metrics.total_output_tokens);
    }
    table.number("Request throughput (req/s):", metrics.request_throughput());
    if let Some(goodput) = metrics.request_goodput {
        table.number("Request goodput (req/s):", goodput);
    }
    if has_tokenizer {
        table.number("Output token throughput (tok/s):", metrics.output_throughput());
        table.number("Peak output token throughput (tok/s):", metrics.peak_output_throughput);
    }
    table.number("Peak concurrent requests:", metrics.peak_concurrent_requests as f64);
    if has_tokenizer {
        table.number("Total token throughput (tok/s):", metrics.total_throughput());
    }
    if let Some(probes) = report.extras.probes.as_ref().and_then(Probes::numbers) {
        table.probes(probes);
    }
    for (metric, distribution) in report.shown_latencies() {
        table.latency(metric, distribution);
    }
    match (&report.extras.diffusion, &report.extras.speculation) {
        (Some(diffusion), _) => table.diffusion(diffusion),
        (None, Some(speculation)) => table.speculation(speculation),
        (None, None) => {}
    }
    table.0.push("=".repeat(WIDTH));
    table.0.join("\n")
}

impl VllmTable {
    fn heading(&mut self, title: &str) {
        self.0.push(format!("{title:-^WIDTH$}"));
    }

    fn count(&mut self, label: &str, value: impl std::fmt::Display) {
        self.0.push(format!("{label:<40} {value:<10}"));
    }

    fn number(&mut self, label: &str, value: f64) {
        self.0.push(format!("{label:<40} {value:<10.2}"));
    }

    fn latency(&mut self, metric: Metric, distribution: &Distribution) {
        let (title, name) = names(metric);
        self.heading(title);
        self.number(&format!("Mean {name} (ms):"), distribution.mean);
        self.number(&format!("Median {name} (ms):"), distribution.median);
        for (percentile, value) in &distribution.percentiles {
            self.number(&format!("P{} {name} (ms):", percentile_word(*percentile)), *value);
        }
    }

    fn probes(&mut self, probes: ProbeNumbers) {
        self.heading("Probe Requests");
        self.count("Probe requests completed:", probes.completed);
        self.count("Probe requests failed:", probes.failed);
        self.number("Median probe E2EL (ms):", probes.median_ms);
        self.number("P99 probe E2EL (ms):", probes.p99_ms);
        self.number("Max probe E2EL (ms):", probes.most_ms);
    }

    fn speculation(&mut self, speculation: &Speculation) {
        self.heading("Speculative Decoding");
        self.number("Acceptance rate (%):", speculation.acceptance_rate);
        self.number("Acceptance length:", speculation.acceptance_length);
        self.count("Drafts:", speculation.drafts);
        self.count("Draft tokens:", speculation.draft_tokens);
        self.count("Accepted tokens:", speculation.accepted_tokens);
        if !speculation.acceptance_by_position.is_empty() {
            self.0.push("Per-position acceptance (%):".to_owned());
        }
        for (position, rate) in speculation.acceptance_by_position.iter().enumerate() {
            self.number(&format!("  Position {position}:"), rate * 100.0);
        }
    }

    fn diffusion(&mut self, diffusion: &Diffusion) {
        self.heading("Diffusion Decoding");
        self.number("Committed throughput (tok/s):", diffusion.committed_throughput);
        self.number("Denoising steps per canvas:", diffusion.steps_per_canvas);
        self.number("Committed per denoising step:", diffusion.committed_per_step);
        self.count("Committed tokens:", diffusion.committed_tokens);
        self.count("Denoising steps:", diffusion.denoising_steps.trunc());
        self.count("Canvas positions evaluated:", diffusion.canvas_positions);
    }
}

/// A percentile in a name: `99` or `99.9`.
pub(super) fn percentile_word(percentile: f64) -> String {
    let word = repr(percentile);
    word.strip_suffix(".0").map_or_else(|| word.clone(), str::to_owned)
}

/// The heading of a metric's section and its name in the rows.
fn names(metric: Metric) -> (&'static str, &'static str) {
    match metric {
        Metric::Ttft => ("Time to First Token", "TTFT"),
        Metric::Tpot => ("Time per Output Token (excl. 1st token)", "TPOT"),
        Metric::Itl => ("Inter-token Latency", "ITL"),
        Metric::E2el => ("End-to-end Latency", "E2EL"),
        Metric::ClientQueueTime => ("Client-side Queueing", "Client Queue Time"),
        Metric::E2elIncludingClientQueue => ("Queue-inclusive End-to-end Latency", "E2EL incl. Client Queue"),
    }
}
