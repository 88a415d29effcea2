//! The counters of a simulated engine, exposed under vLLM 0.32's names.

use std::sync::atomic::{AtomicU64, Ordering};

use super::blocks::BLOCK_TOKENS;

/// A number that only the engine writes and `/metrics` reads.
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

/// Upper bounds of the buckets of `nixl_bytes_transferred`, in bytes: 4 KiB to 4 GiB in powers of four, as vLLM's grow.
const BYTE_BUCKETS: [u64; 11] = [
    1 << 12,
    1 << 14,
    1 << 16,
    1 << 18,
    1 << 20,
    1 << 22,
    1 << 24,
    1 << 26,
    1 << 28,
    1 << 30,
    1 << 32,
];

/// All counters. Names without comment are vLLM's.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) running: Number,
    pub(crate) waiting: Number,
    /// Waiting for remote KV, part of `waiting`.
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
    /// Pages of LMCache's receive buffer in use, over all ranks. LMCache tells of it in no metric.
    pub(crate) buffered_pages: Number,
    /// By [`FINISH_REASONS`].
    finished: [Number; FINISH_REASONS.len()],
    transferred: [Number; BYTE_BUCKETS.len()],
    transfers: Number,
    transferred_bytes: Number,
}

const FINISH_REASONS: [&str; 5] = ["stop", "length", "abort", "error", "repetition"];

impl Metrics {
    /// Counts a request that ended.
    pub(crate) fn finished(&self, reason: &str) {
        if let Some(at) = FINISH_REASONS.iter().position(|known| *known == reason) {
            self.finished[at].add(1);
        }
    }

    /// Counts a transfer of KV by NIXL.
    pub(crate) fn transferred(&self, bytes: u64) {
        self.transfers.add(1);
        self.transferred_bytes.0.fetch_add(bytes, Ordering::Relaxed);
        for (bound, bucket) in BYTE_BUCKETS.iter().zip(&self.transferred) {
            if bytes <= *bound {
                bucket.add(1);
            }
        }
    }

    /// The page in Prometheus' text format. `usage` is the part of the KV cache in use, 0 to 1, and `blocks`
    /// its size.
    pub(crate) fn render(&self, model: &str, usage: f64, blocks: usize) -> String {
        let mut page = Page {
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
        self.render_transfers(&mut page);
        page.text
    }

    fn render_transfers(&self, page: &mut Page) {
        page.head("nixl_bytes_transferred", "histogram");
        for (bound, bucket) in BYTE_BUCKETS.iter().zip(&self.transferred) {
            page.sample(
                "nixl_bytes_transferred_bucket",
                &format!("le=\"{bound}.0\""),
                bucket.get() as f64,
            );
        }
        let count = self.transfers.get() as f64;
        page.sample("nixl_bytes_transferred_bucket", "le=\"+Inf\"", count);
        page.sample("nixl_bytes_transferred_count", "", count);
        page.sample("nixl_bytes_transferred_sum", "", self.transferred_bytes.get() as f64);
    }
}

struct Page {
    text: String,
    labels: String,
}

impl Page {
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
        metrics.transferred(5000);
        let page = metrics.render("llama", 0.25, 100);
        for line in [
            "vllm:prompt_tokens_total{engine=\"0\",model_name=\"llama\"} 7.0",
            "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"llama\"} 0.25",
            "vllm:cache_config_info{engine=\"0\",model_name=\"llama\",block_size=\"16\",num_gpu_blocks=\"100\"} 1.0",
            "vllm:request_success_total{engine=\"0\",model_name=\"llama\",finished_reason=\"length\"} 1.0",
            "vllm:nixl_bytes_transferred_bucket{engine=\"0\",model_name=\"llama\",le=\"4096.0\"} 0.0",
            "vllm:nixl_bytes_transferred_bucket{engine=\"0\",model_name=\"llama\",le=\"16384.0\"} 1.0",
            "vllm:nixl_bytes_transferred_sum{engine=\"0\",model_name=\"llama\"} 5000.0",
        ] {
            assert!(page.contains(line), "{line} in {page}");
        }
    }
}
