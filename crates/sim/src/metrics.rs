//! The metrics of a simulated engine under vLLM 0.32's names.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::kv::blocks::BLOCK_TOKENS;

/// A number that the engine writes and `/metrics` reads.
#[derive(Debug, Default)]
pub(crate) struct Number(AtomicU64);

impl Number {
    pub(crate) fn add(&self, count: usize) {
        self.0.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub(crate) fn subtract(&self, count: usize) {
        self.0.fetch_sub(count as u64, Ordering::Relaxed);
    }

    pub(crate) fn set(&self, count: usize) {
        self.0.store(count as u64, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Buckets of `nixl_bytes_transferred` in bytes: 4 KiB to 4 GiB in powers of four, as in vLLM.
const BYTE_BUCKETS: &[f64] = &[
    4096.0,
    16384.0,
    65536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
    268_435_456.0,
    1_073_741_824.0,
    4_294_967_296.0,
];

/// vLLM 0.32's buckets of request times (`v1/metrics/buckets.py`) and transfer times (`nixl/stats.py`), in seconds.
const REQUEST_BUCKETS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
const TRANSFER_BUCKETS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0];

/// A histogram that the engine writes and `/metrics` reads.
#[derive(Debug)]
pub(crate) struct Histogram {
    bounds: &'static [f64],
    buckets: Vec<Number>,
    count: Number,
    /// The bits of a float.
    sum: AtomicU64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            buckets: bounds.iter().map(|_| Number::default()).collect(),
            count: Number::default(),
            sum: AtomicU64::new(0.0_f64.to_bits()),
        }
    }

    pub(crate) fn observe(&self, value: f64) {
        let sum = f64::from_bits(self.sum.load(Ordering::Relaxed)) + value;
        self.sum.store(sum.to_bits(), Ordering::Relaxed);
        self.count.add(1);
        for (bound, bucket) in self.bounds.iter().zip(&self.buckets) {
            if value <= *bound {
                bucket.add(1);
            }
        }
    }
}

/// All counters. Names without comment are vLLM's.
#[derive(Debug)]
pub(crate) struct Metrics {
    pub(crate) running: Number,
    pub(crate) waiting: Number,
    /// Requests that wait for remote KV, included in `waiting`.
    pub(crate) deferred: Number,
    pub(crate) prompt_tokens: Number,
    pub(crate) generation_tokens: Number,
    /// Prompt tokens looked up in the connector.
    pub(crate) external_queries: Number,
    /// Prompt tokens loaded through the connector.
    pub(crate) external_hits: Number,
    pub(crate) computed_tokens: Number,
    pub(crate) failed_transfers: Number,
    pub(crate) expired_requests: Number,
    pub(crate) late_notifications: Number,
    /// Pages of LMCache's receive buffer in use, over all ranks. LMCache exposes no such metric.
    pub(crate) buffered_pages: Number,
    /// By [`FINISH_REASONS`].
    finished: [Number; FINISH_REASONS.len()],
    /// Queue time of finished requests in seconds, including KV transfers.
    queue_time: Histogram,
    /// Seconds from scheduling to the first token.
    prefill_time: Histogram,
    transferred_bytes: Histogram,
    transfer_time: Histogram,
}

const FINISH_REASONS: [&str; 5] = ["stop", "length", "abort", "error", "repetition"];

impl Default for Metrics {
    fn default() -> Self {
        let number = Number::default;
        Self {
            running: number(),
            waiting: number(),
            deferred: number(),
            prompt_tokens: number(),
            generation_tokens: number(),
            external_queries: number(),
            external_hits: number(),
            computed_tokens: number(),
            failed_transfers: number(),
            expired_requests: number(),
            late_notifications: number(),
            buffered_pages: number(),
            finished: Default::default(),
            queue_time: Histogram::new(REQUEST_BUCKETS),
            prefill_time: Histogram::new(REQUEST_BUCKETS),
            transferred_bytes: Histogram::new(BYTE_BUCKETS),
            transfer_time: Histogram::new(TRANSFER_BUCKETS),
        }
    }
}

impl Metrics {
    /// Counts a finished request.
    pub(crate) fn finished(&self, reason: &str) {
        if let Some(at) = FINISH_REASONS.iter().position(|known| *known == reason) {
            self.finished[at].add(1);
        }
    }

    /// Records the times of a successful request.
    pub(crate) fn observe_request(&self, queue: Duration, prefill: Duration) {
        self.queue_time.observe(queue.as_secs_f64());
        self.prefill_time.observe(prefill.as_secs_f64());
    }

    /// Records a KV transfer by NIXL.
    pub(crate) fn transferred(&self, bytes: u64, time: Duration) {
        self.transferred_bytes.observe(bytes as f64);
        self.transfer_time.observe(time.as_secs_f64());
    }

    /// The page in Prometheus text format. `usage` is the used share of the KV cache, 0 to 1, and `blocks` its size.
    pub(crate) fn render(&self, model: &str, usage: f64, blocks: usize) -> String {
        let mut page = MetricsPage {
            text: String::with_capacity(4096),
            labels: format!("engine=\"0\",model_name=\"{model}\""),
        };
        page.family("num_requests_running", "gauge", &[("", self.running.get() as f64)]);
        page.family("num_requests_waiting", "gauge", &[("", self.waiting.get() as f64)]);
        let capacity = self.waiting.get().saturating_sub(self.deferred.get());
        page.family(
            "num_requests_waiting_by_reason",
            "gauge",
            &[
                ("reason=\"capacity\"", capacity as f64),
                ("reason=\"deferred\"", self.deferred.get() as f64),
            ],
        );
        page.family("kv_cache_usage_perc", "gauge", &[("", usage)]);
        let size = format!("block_size=\"{BLOCK_TOKENS}\",num_gpu_blocks=\"{blocks}\"");
        page.family("cache_config_info", "gauge", &[(&size, 1.0)]);
        page.counter("external_prefix_cache_queries_total", &self.external_queries);
        page.counter("external_prefix_cache_hits_total", &self.external_hits);
        page.counter("prompt_tokens_total", &self.prompt_tokens);
        page.family(
            "prompt_tokens_by_source_total",
            "counter",
            &[
                ("source=\"local_compute\"", self.computed_tokens.get() as f64),
                ("source=\"local_cache_hit\"", 0.0),
                ("source=\"external_kv_transfer\"", self.external_hits.get() as f64),
            ],
        );
        page.counter("generation_tokens_total", &self.generation_tokens);
        let reasons: Vec<(String, f64)> = FINISH_REASONS
            .iter()
            .zip(&self.finished)
            .map(|(reason, count)| (format!("finished_reason=\"{reason}\""), count.get() as f64))
            .collect();
        let reasons: Vec<(&str, f64)> = reasons.iter().map(|(label, count)| (label.as_str(), *count)).collect();
        page.family("request_success_total", "counter", &reasons);
        page.counter("nixl_num_failed_transfers_total", &self.failed_transfers);
        page.counter("nixl_num_kv_expired_reqs_total", &self.expired_requests);
        page.counter("nixl_num_notifications_after_expiry_total", &self.late_notifications);
        let buffered = self.buffered_pages.get() as f64;
        page.family("sim_lmcache_buffered_pages", "gauge", &[("", buffered)]);
        page.histogram("request_queue_time_seconds", &self.queue_time);
        page.histogram("request_prefill_time_seconds", &self.prefill_time);
        page.histogram("nixl_xfer_time_seconds", &self.transfer_time);
        page.histogram("nixl_bytes_transferred", &self.transferred_bytes);
        page.text
    }
}

struct MetricsPage {
    text: String,
    labels: String,
}

impl MetricsPage {
    fn head(&mut self, name: &str, kind: &str) {
        self.text.push_str("# TYPE vllm:");
        self.text.push_str(name);
        self.text.push(' ');
        self.text.push_str(kind);
        self.text.push('\n');
    }

    fn sample(&mut self, name: &str, label: &str, value: f64) {
        let separator = if label.is_empty() { "" } else { "," };
        // As Python prints floats: `3.0`.
        let sample = format!("vllm:{name}{{{}{separator}{label}}} {value:?}\n", self.labels);
        self.text.push_str(&sample);
    }

    fn family(&mut self, name: &str, kind: &str, samples: &[(&str, f64)]) {
        self.head(name, kind);
        for (label, value) in samples {
            self.sample(name, label, *value);
        }
    }

    fn histogram(&mut self, name: &str, histogram: &Histogram) {
        self.head(name, "histogram");
        let bucket_name = format!("{name}_bucket");
        let count = histogram.count.get() as f64;
        for (bound, bucket) in histogram.bounds.iter().zip(&histogram.buckets) {
            self.sample(&bucket_name, &format!("le=\"{bound:?}\""), bucket.get() as f64);
        }
        self.sample(&bucket_name, "le=\"+Inf\"", count);
        self.sample(&format!("{name}_count"), "", count);
        let sum = f64::from_bits(histogram.sum.load(Ordering::Relaxed));
        self.sample(&format!("{name}_sum"), "", sum);
    }

    fn counter(&mut self, name: &str, value: &Number) {
        self.family(name, "counter", &[("", value.get() as f64)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_carries_vllms_names_and_labels() {
        let metrics = Metrics::default();
        metrics.prompt_tokens.add(7);
        metrics.finished("length");
        metrics.transferred(5000, Duration::from_millis(20));
        metrics.observe_request(Duration::from_millis(250), Duration::from_secs(2));
        let page = metrics.render("llama", 0.25, 100);
        for line in [
            "vllm:prompt_tokens_total{engine=\"0\",model_name=\"llama\"} 7.0",
            "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"llama\"} 0.25",
            "vllm:cache_config_info{engine=\"0\",model_name=\"llama\",block_size=\"16\",num_gpu_blocks=\"100\"} 1.0",
            "vllm:request_success_total{engine=\"0\",model_name=\"llama\",finished_reason=\"length\"} 1.0",
            "vllm:nixl_bytes_transferred_bucket{engine=\"0\",model_name=\"llama\",le=\"4096.0\"} 0.0",
            "vllm:nixl_bytes_transferred_bucket{engine=\"0\",model_name=\"llama\",le=\"16384.0\"} 1.0",
            "vllm:nixl_bytes_transferred_sum{engine=\"0\",model_name=\"llama\"} 5000.0",
            "vllm:nixl_xfer_time_seconds_sum{engine=\"0\",model_name=\"llama\"} 0.02",
            "vllm:request_queue_time_seconds_bucket{engine=\"0\",model_name=\"llama\",le=\"0.3\"} 1.0",
            "vllm:request_prefill_time_seconds_count{engine=\"0\",model_name=\"llama\"} 1.0",
            "vllm:request_prefill_time_seconds_sum{engine=\"0\",model_name=\"llama\"} 2.0",
        ] {
            assert!(page.contains(line), "{line} in {page}");
        }
    }
}
