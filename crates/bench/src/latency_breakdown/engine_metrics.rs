//! The difference of the engines' Prometheus counters over a run.
//!
//! `/metrics?engines` of xpyd's proxy has the metrics of all its engines, with the labels `engine` and `role`. Another
//! server ignores the query and returns its own page. The names are those of vLLM 0.32 (`v1/metrics/loggers.py`,
//! `nixl/stats.py`). A page without any of them is ignored.

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::Method;

use crate::client::http::Server;

/// Timeout of a page. The proxy gives its engines 3 s.
const DEADLINE: Duration = Duration::from_secs(5);

/// Largest page in bytes. One engine has about 200 KiB.
const MAX_PAGE_BYTES: usize = 16 << 20;

/// The role of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Prefill.
    Prefill,
    /// Decode.
    Decode,
    /// Both: a server without disaggregation.
    Alone,
}

impl Role {
    /// Its name in JSON.
    pub fn key(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Alone => "alone",
        }
    }
}

/// The counters of one engine over the run. Times are sums in seconds.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineCounters {
    /// Its name, such as `decoder1`; for another server vLLM's engine number, such as `0`.
    pub name: String,
    /// Its role.
    pub role: Role,
    /// Values by [`Counter`].
    counters: [f64; Counter::COUNT],
}

/// A counter of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counter {
    /// Finished requests with a queue time.
    Queued,
    /// Their queue time in seconds, including KV transfers by NIXL.
    QueueSeconds,
    /// Finished requests with a prefill time.
    Prefilled,
    /// Their time from being scheduled to the first token, in seconds.
    PrefillSeconds,
    /// KV transfers that the engine pulled by NIXL, one per rank.
    Transfers,
    /// Their time in seconds.
    TransferSeconds,
    /// Their bytes.
    TransferredBytes,
    /// Failed NIXL transfers.
    FailedTransfers,
    /// Prompt tokens that the engine computed.
    ComputedTokens,
    /// Prompt tokens from its own prefix cache.
    CachedTokens,
    /// Prompt tokens received through a connector.
    RemoteTokens,
}

impl Counter {
    const COUNT: usize = 11;

    /// The samples of each counter: the metric name, and the required value of the label `source`, if any.
    const SAMPLES: [(Self, &'static str, Option<&'static str>); Self::COUNT] = [
        (Self::Queued, "vllm:request_queue_time_seconds_count", None),
        (Self::QueueSeconds, "vllm:request_queue_time_seconds_sum", None),
        (Self::Prefilled, "vllm:request_prefill_time_seconds_count", None),
        (Self::PrefillSeconds, "vllm:request_prefill_time_seconds_sum", None),
        (Self::Transfers, "vllm:nixl_xfer_time_seconds_count", None),
        (Self::TransferSeconds, "vllm:nixl_xfer_time_seconds_sum", None),
        (Self::TransferredBytes, "vllm:nixl_bytes_transferred_sum", None),
        (Self::FailedTransfers, "vllm:nixl_num_failed_transfers_total", None),
        (Self::ComputedTokens, BY_SOURCE, Some("local_compute")),
        (Self::CachedTokens, BY_SOURCE, Some("local_cache_hit")),
        (Self::RemoteTokens, BY_SOURCE, Some("external_kv_transfer")),
    ];
}

const BY_SOURCE: &str = "vllm:prompt_tokens_by_source_total";

impl EngineCounters {
    /// The value of a counter.
    pub fn count(&self, counter: Counter) -> f64 {
        self.counters[counter as usize]
    }

    /// The mean of a sum over a count, in milliseconds; `None` if the count is 0.
    pub fn mean_ms(&self, sum: Counter, count: Counter) -> Option<f64> {
        mean_ms(std::slice::from_ref(self), sum, count)
    }
}

/// The mean over several engines, in milliseconds.
pub(super) fn mean_ms<'engines>(
    engines: impl IntoIterator<Item = &'engines EngineCounters>,
    sum: Counter,
    count: Counter,
) -> Option<f64> {
    let (sums, counts) = engines.into_iter().fold((0.0, 0.0), |(sums, counts), engine| {
        (sums + engine.count(sum), counts + engine.count(count))
    });
    (counts > 0.0).then(|| sums / counts * 1000.0)
}

/// The counters of all engines at one time.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct EngineMetrics(BTreeMap<(Role, String), [f64; Counter::COUNT]>);

impl EngineMetrics {
    /// Reads the server's page; `None` on any failure or without known counters.
    pub(crate) async fn read(server: &Server) -> Option<Self> {
        let page = server
            .ask(&Method::GET, "/metrics?engines", None, MAX_PAGE_BYTES, DEADLINE)
            .await;
        let page = page
            .ok()
            .filter(|page| page.status.is_success() && page.body.len() <= MAX_PAGE_BYTES)?;
        let page = Self::parse(&String::from_utf8_lossy(&page.body));
        (!page.0.is_empty()).then_some(page)
    }

    /// Parses the known samples of a page in Prometheus text format.
    fn parse(text: &str) -> Self {
        let mut page = Self::default();
        for line in text.lines().filter(|line| line.starts_with("vllm:")) {
            let Some((series, value)) = line.rsplit_once(' ') else {
                continue;
            };
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            let counted = Counter::SAMPLES.iter().find(|(_, sample, wanted)| {
                *sample == name && wanted.is_none_or(|source| label(labels, "source") == Some(source))
            });
            if let (Some((counter, ..)), Ok(value)) = (counted, value.parse::<f64>()) {
                let role = match label(labels, "role") {
                    Some("prefill") => Role::Prefill,
                    Some("decode") => Role::Decode,
                    _ => Role::Alone,
                };
                let engine = label(labels, "engine").unwrap_or_default().to_owned();
                page.0.entry((role, engine)).or_insert([0.0; Counter::COUNT])[*counter as usize] += value;
            }
        }
        page
    }

    /// The difference to `before`. An engine that restarted or is new is left out, because its counts do not match the
    /// run.
    pub(crate) fn since(&self, before: &Self) -> Vec<EngineCounters> {
        let engines = self.0.iter().filter_map(|((role, name), after)| {
            let before = before.0.get(&(*role, name.clone()))?;
            let counters: [f64; Counter::COUNT] = std::array::from_fn(|counter| after[counter] - before[counter]);
            let name = name.clone();
            counters.iter().all(|count| *count >= 0.0).then_some(EngineCounters {
                name,
                role: *role,
                counters,
            })
        });
        engines.collect()
    }
}

/// The value of a label. The values needed here have no quotes.
fn label<'labels>(labels: &'labels str, key: &str) -> Option<&'labels str> {
    let mut rest = labels.trim_end_matches('}');
    while let Some((name, value)) = rest.split_once("=\"") {
        let (value, after) = value.split_once('"')?;
        if name.trim_start_matches(',').trim() == key {
            return Some(value);
        }
        rest = after;
    }
    None
}

#[cfg(test)]
impl EngineCounters {
    /// An engine with these counts.
    pub(super) fn counted(name: &str, role: Role, counts: &[(Counter, f64)]) -> Self {
        let mut counters = [0.0; Counter::COUNT];
        for (counter, count) in counts {
            counters[*counter as usize] = *count;
        }
        Self {
            name: name.to_owned(),
            role,
            counters,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(prefilled: u32) -> EngineMetrics {
        EngineMetrics::parse(&format!(
            "# TYPE vllm:request_prefill_time_seconds histogram\n\
             vllm:request_prefill_time_seconds_bucket{{engine=\"prefiller1\",role=\"prefill\",le=\"0.3\"}} 7\n\
             vllm:request_prefill_time_seconds_count{{engine=\"prefiller1\",role=\"prefill\",exported_engine=\"0\"}} {prefilled}\n\
             vllm:request_prefill_time_seconds_count{{engine=\"prefiller1\",role=\"prefill\",exported_engine=\"1\"}} 1\n\
             vllm:request_prefill_time_seconds_sum{{engine=\"prefiller1\",role=\"prefill\"}} {prefilled}.5\n\
             vllm:prompt_tokens_by_source_total{{engine=\"decoder1\",role=\"decode\",source=\"local_compute\"}} 3.0\n\
             vllm:prompt_tokens_by_source_total{{engine=\"decoder1\",role=\"decode\",source=\"external_kv_transfer\"}} 30.0\n\
             xpyd_requests_total 9\nvllm:nonsense\n"
        ))
    }

    #[test]
    fn ranks_add_up_and_only_what_changed_counts() {
        let engines = page(6).since(&page(2));
        assert_eq!(engines.len(), 2);
        let prefill = &engines[0];
        assert_eq!((prefill.name.as_str(), prefill.role), ("prefiller1", Role::Prefill));
        assert_eq!(
            prefill.mean_ms(Counter::PrefillSeconds, Counter::Prefilled),
            Some(1000.0)
        );
        assert_eq!(prefill.mean_ms(Counter::QueueSeconds, Counter::Queued), None);
        let counted = page(6).0[&(Role::Decode, "decoder1".to_owned())][Counter::RemoteTokens as usize];
        assert!((counted - 30.0).abs() < 1e-9);
    }

    #[test]
    fn a_restarted_engine_is_left_out() {
        let names: Vec<String> = page(1).since(&page(2)).into_iter().map(|engine| engine.name).collect();
        assert_eq!(names, ["decoder1"]);
        assert_eq!(page(1).since(&EngineMetrics::default()), []);
    }

    #[test]
    fn a_single_server_is_one_engine() {
        let alone = EngineMetrics::parse("vllm:request_queue_time_seconds_sum{engine=\"0\",model_name=\"a\"} 1.5\n");
        let engines = alone.since(&alone);
        assert_eq!((engines[0].name.as_str(), engines[0].role), ("0", Role::Alone));
        assert_eq!(EngineMetrics::parse("<html>\nup 1\n"), EngineMetrics::default());
    }
}
