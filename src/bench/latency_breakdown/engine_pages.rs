//! What engines counted over a run, from their pages of metrics before and after it.
//!
//! `/metrics?engines` of xpyd's proxy has the pages of all its engines, told apart by the labels `engine` and `role`; a
//! server that does not know the query gives its own page. Names are vLLM 0.32's (`v1/metrics/loggers.py`,
//! `nixl/stats.py`); a page that has none of them is worth nothing here, and is no error.

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::Method;

use crate::bench::client::http::Server;

/// How long a page may take. The proxy gives its engines 3 s.
const DEADLINE: Duration = Duration::from_secs(5);

/// The longest page: some 200 KiB an engine.
const MAX_PAGE_BYTES: usize = 16 << 20;

/// What an engine does in its fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Prefill.
    Prefill,
    /// Decode.
    Decode,
    /// Both: a server that is no fleet.
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

/// What one engine counted over the run. Times are sums in seconds.
#[derive(Debug, Clone, PartialEq)]
pub struct Engine {
    /// Its name: `decoder1`; for a server that is no fleet, vLLM's number of the engine: `0`.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// By [`Counter`].
    counters: [f64; Counter::COUNT],
}

/// A number that engines count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counter {
    /// Requests whose waiting was told; they have finished.
    Queued,
    /// Seconds they waited, KV transfers by NIXL included.
    QueueSeconds,
    /// Requests whose time to the first token was told.
    Prefilled,
    /// Seconds from being scheduled to the first token.
    PrefillSeconds,
    /// Transfers of KV that the engine fetched by NIXL; one per rank.
    Transfers,
    /// Seconds these took.
    TransferSeconds,
    /// Bytes these moved.
    TransferredBytes,
    /// NIXL transfers that failed.
    FailedTransfers,
    /// Prompt tokens that the engine computed itself.
    ComputedTokens,
    /// Prompt tokens that its own prefix cache had.
    CachedTokens,
    /// Prompt tokens that came through a connector.
    RemoteTokens,
}

impl Counter {
    const COUNT: usize = 11;

    /// The samples that count it: the name, and the value of the label `source` if only that one counts.
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

impl Engine {
    /// What it counted.
    pub fn count(&self, counter: Counter) -> f64 {
        self.counters[counter as usize]
    }

    /// The mean of a sum over a count, in milliseconds; `None` if there is nothing to count.
    pub fn mean_ms(&self, sum: Counter, count: Counter) -> Option<f64> {
        mean_ms(std::slice::from_ref(self), sum, count)
    }
}

/// The mean over several engines, in milliseconds.
pub(super) fn mean_ms<'engines>(
    engines: impl IntoIterator<Item = &'engines Engine>,
    sum: Counter,
    count: Counter,
) -> Option<f64> {
    let (sums, counts) = engines.into_iter().fold((0.0, 0.0), |(sums, counts), engine| {
        (sums + engine.count(sum), counts + engine.count(count))
    });
    (counts > 0.0).then(|| sums / counts * 1000.0)
}

/// The counters of one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub(in crate::bench) struct Page(BTreeMap<(Role, String), [f64; Counter::COUNT]>);

impl Page {
    /// Reads the server's page; `None` if it has none that counts. Whatever is wrong, the benchmark goes on without it.
    pub(in crate::bench) async fn read(server: &Server) -> Option<Self> {
        let page = server
            .ask(&Method::GET, "/metrics?engines", None, MAX_PAGE_BYTES, DEADLINE)
            .await;
        let page = page
            .ok()
            .filter(|page| page.status.is_success() && page.body.len() <= MAX_PAGE_BYTES)?;
        let page = Self::parse(&String::from_utf8_lossy(&page.body));
        (!page.0.is_empty()).then_some(page)
    }

    /// The samples of a page in Prometheus' text format that count.
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

    /// What was counted since `before`. An engine that started anew since then, or that was not there, is left out: what
    /// it counted for whom is not known.
    pub(in crate::bench) fn since(&self, before: &Self) -> Vec<Engine> {
        let engines = self.0.iter().filter_map(|((role, name), after)| {
            let before = before.0.get(&(*role, name.clone()))?;
            let counters: [f64; Counter::COUNT] = std::array::from_fn(|counter| after[counter] - before[counter]);
            let name = name.clone();
            counters.iter().all(|count| *count >= 0.0).then_some(Engine {
                name,
                role: *role,
                counters,
            })
        });
        engines.collect()
    }
}

/// The value of a label. Values that matter here hold no quotes.
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
impl Engine {
    /// An engine that counted this.
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

    fn page(prefilled: u32) -> Page {
        Page::parse(&format!(
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
    fn an_engine_that_began_to_count_anew_is_left_out() {
        let names: Vec<String> = page(1).since(&page(2)).into_iter().map(|engine| engine.name).collect();
        assert_eq!(names, ["decoder1"]);
        assert_eq!(page(1).since(&Page::default()), []);
    }

    #[test]
    fn a_single_server_is_an_engine_of_its_own() {
        let alone = Page::parse("vllm:request_queue_time_seconds_sum{engine=\"0\",model_name=\"a\"} 1.5\n");
        let engines = alone.since(&alone);
        assert_eq!((engines[0].name.as_str(), engines[0].role), ("0", Role::Alone));
        assert_eq!(Page::parse("<html>\nup 1\n"), Page::default());
    }
}
