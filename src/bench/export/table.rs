//! The table of `vllm bench serve` 0.32. Its users parse it, so every byte is kept, spaces at line ends included.

use crate::bench::report::Report;
use crate::bench::stats::{Distribution, Metric};

const WIDTH: usize = 50;

/// Lines, as vLLM prints them.
struct Table(Vec<String>);

pub(crate) fn render(report: &Report) -> String {
    let metrics = &report.metrics;
    let spec = &report.spec;
    let mut table = Table(vec![format!("{:=^WIDTH$}", " Serving Benchmark Result ")]);
    table.count("Successful requests:", metrics.completed as u64);
    table.count("Failed requests:", metrics.failed as u64);
    if let Some(limit) = spec.max_concurrency {
        table.count("Maximum request concurrency:", limit.get() as u64);
    }
    if spec.arrivals.request_rate.is_finite() {
        table.number("Request rate configured (RPS):", spec.arrivals.request_rate);
    }
    table.number("Benchmark duration (s):", metrics.duration);
    table.count("Total input tokens:", metrics.total_input_tokens);
    table.count("Total generated tokens:", metrics.total_output_tokens);
    table.number("Request throughput (req/s):", metrics.request_throughput());
    if let Some(goodput) = metrics.request_goodput {
        table.number("Request goodput (req/s):", goodput);
    }
    table.number("Output token throughput (tok/s):", metrics.output_throughput());
    table.number("Peak output token throughput (tok/s):", metrics.peak_output_throughput);
    table.number("Peak concurrent requests:", metrics.peak_concurrent_requests as f64);
    table.number("Total token throughput (tok/s):", metrics.total_throughput());
    for (metric, distribution) in metrics
        .latencies
        .iter()
        .filter(|(metric, _)| spec.metrics.contains(metric))
    {
        table.latency(*metric, distribution);
    }
    table.0.push("=".repeat(WIDTH));
    table.0.join("\n")
}

impl Table {
    fn count(&mut self, label: &str, value: u64) {
        self.0.push(format!("{label:<40} {value:<10}"));
    }

    fn number(&mut self, label: &str, value: f64) {
        self.0.push(format!("{label:<40} {value:<10.2}"));
    }

    fn latency(&mut self, metric: Metric, distribution: &Distribution) {
        let (title, name) = names(metric);
        self.0.push(format!("{title:-^WIDTH$}"));
        self.number(&format!("Mean {name} (ms):"), distribution.mean);
        self.number(&format!("Median {name} (ms):"), distribution.median);
        for (percentile, value) in &distribution.percentiles {
            self.number(&format!("P{percentile} {name} (ms):"), *value);
        }
    }
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
