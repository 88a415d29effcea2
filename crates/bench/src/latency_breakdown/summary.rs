//! Summarizes the stages of all requests of a run, checks that they add up, and counts how many requests used remote
//! KV.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::engine_metrics::{Counter, EngineCounters, Role, mean_ms};
use super::{RequestStages, Stage};
use crate::record::{Answer, Record};
use crate::stats::Distribution;

/// The share of the time to first token that can stay unexplained before the table is doubtful.
pub const TOLERANCE: f64 = 0.05;
/// Unexplained time in milliseconds that is always acceptable: in a very fast answer the proxy's work is a large share.
const UNREMARKABLE_MS: f64 = 2.0;

/// The latency breakdown of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct BreakdownSummary {
    /// Answered requests with reported stages.
    pub timed_requests: usize,
    /// The stages in order; the last row is the whole time to first token.
    pub rows: Vec<StageRow>,
    /// Statistics by pair of engines, sorted by name.
    pub pairs: Vec<PairSummary>,
    /// The cost of the first request of each pair; `None` if there are no others to compare with.
    pub cold: Option<ColdRequests>,
    /// The unexplained time.
    pub unexplained: Unexplained,
    /// Use of remote KV; `None` if the server does not report hand-offs.
    pub remote: Option<RemoteKv>,
    /// Counters of each engine over the run.
    pub engines: Vec<EngineCounters>,
}

/// One row of the table.
#[derive(Debug, Clone, PartialEq)]
pub struct StageRow {
    /// Its name in JSON.
    pub key: &'static str,
    /// Its name for people.
    pub label: &'static str,
    /// Whether it is a part of the last row that is not a part.
    pub is_part: bool,
    /// Mean over all requests in milliseconds; requests without the stage count as 0.
    pub mean_ms: f64,
    /// P50 and P99 in milliseconds; `None` if only sums over the run are known.
    pub percentiles_ms: Option<(f64, f64)>,
    /// Share of the mean time to first token, 0 to 1.
    pub share: f64,
}

/// Statistics of one pair of engines.
#[derive(Debug, Clone, PartialEq)]
pub struct PairSummary {
    /// `prefiller1 → decoder2`, or a decode engine alone.
    pub name: String,
    /// Number of requests.
    pub requests: usize,
    /// Mean time to first token in milliseconds.
    pub ttft_ms: f64,
    /// Time to first token of the first request.
    pub first_ttft_ms: f64,
    /// Mean of each of its stages, in milliseconds.
    pub stages_ms: Vec<(Stage, f64)>,
}

/// The first request of each pair of engines compared with all others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ColdRequests {
    /// Number of first requests, one per pair.
    pub requests: usize,
    /// Mean time to first token of all requests, in milliseconds.
    pub all_ms: f64,
    /// Mean of the first requests.
    pub cold_ms: f64,
    /// Mean of the others.
    pub warm_ms: f64,
}

/// Unexplained time as a share of the time to first token, 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Unexplained {
    /// Mean share.
    pub mean: f64,
    /// Largest share of a request.
    pub worst: f64,
    /// Its time in milliseconds.
    pub worst_ms: f64,
    /// Its index in the workload.
    pub worst_request: usize,
}

impl Unexplained {
    /// Whether too much is unexplained to trust the table.
    pub fn is_too_much(&self) -> bool {
        self.worst > TOLERANCE && self.worst_ms > UNREMARKABLE_MS
    }
}

/// How many requests decoded with KV from another engine.
#[derive(Debug, Clone, PartialEq)]
pub struct RemoteKv {
    /// Answered requests.
    pub answered: usize,
    /// Answered requests that used remote KV.
    pub used: usize,
    /// Requests whose hand-off seemed to succeed, but whose prompt the decode engine computed again.
    pub recomputed: usize,
    /// Whether engine counters confirm this; otherwise it is the proxy's knowledge when the answers began.
    pub is_counted: bool,
    /// Hand-off outcomes as the proxy names them: `transferred`, `sent`, `bypassed (n)`.
    pub outcomes: BTreeMap<String, usize>,
    /// Prompt tokens that prefill engines had cached, and all they read; `None` without counters.
    pub cached: Option<(f64, f64)>,
}

impl RemoteKv {
    /// Share of prompt tokens that prefill engines had cached, 0 to 1.
    pub fn cached_share(&self) -> f64 {
        self.cached.map_or(0.0, |(cached, all)| cached / all.max(1.0))
    }
}

/// A request with reported stages.
struct TimedRequest<'run> {
    record: &'run Record,
    answer: &'run Answer,
    phases: RequestStages,
}

impl TimedRequest<'_> {
    fn ttft_ms(&self) -> f64 {
        milliseconds(self.answer.first_token)
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    if count > 0.0 { sum / count } else { 0.0 }
}

impl BreakdownSummary {
    /// Summarizes a run; `None` if neither answers nor engines report anything.
    pub fn of(records: &[Record], engines: &[EngineCounters]) -> Option<Self> {
        let timed: Vec<TimedRequest<'_>> = records
            .iter()
            .filter_map(|record| {
                let answer = record.result.as_ref().ok()?;
                let phases = RequestStages::of_answer(answer)?;
                Some(TimedRequest { record, answer, phases })
            })
            .collect();
        let rows = if timed.is_empty() {
            rows_of_engines(records, engines)?
        } else {
            rows(&timed, engines)
        };
        Some(Self {
            timed_requests: timed.len(),
            rows,
            pairs: pairs(&timed),
            cold: cold(&timed),
            unexplained: unexplained(&timed),
            remote: remote(&timed, engines),
            engines: engines.to_vec(),
        })
    }

    /// The object `xpyd.where` of the result file.
    pub fn to_json(&self) -> Value {
        let rows: Vec<Value> = self.rows.iter().map(StageRow::to_json).collect();
        let pairs: Vec<Value> = self.pairs.iter().map(PairSummary::to_json).collect();
        let unexplained = self.unexplained;
        json!({
            "requests": self.timed_requests,
            "stages": rows,
            "pairs": pairs,
            "unexplained": {
                "mean_share": unexplained.mean, "worst_share": unexplained.worst, "worst_ms": unexplained.worst_ms,
                "worst_request": unexplained.worst_request, "is_too_much": unexplained.is_too_much(),
            },
            "cold": self.cold.map(|cold| json!({
                "requests": cold.requests, "mean_ttft_ms": cold.all_ms, "mean_ttft_without_ms": cold.warm_ms,
                "mean_ttft_of_cold_ms": cold.cold_ms,
            })),
            "remote_kv": self.remote.as_ref().map(|remote| json!({
                "answered": remote.answered, "used": remote.used, "recomputed": remote.recomputed,
                "is_counted_by_engines": remote.is_counted, "outcomes": remote.outcomes,
                "cached_prompt_share": remote.cached.map(|_| remote.cached_share()),
            })),
            "engines": self.engines.iter().map(engine_to_json).collect::<Vec<_>>(),
        })
    }
}

impl StageRow {
    fn to_json(&self) -> Value {
        json!({
            "stage": self.key, "is_part": self.is_part, "mean_ms": self.mean_ms, "share": self.share,
            "p50_ms": self.percentiles_ms.map(|(median, _)| median),
            "p99_ms": self.percentiles_ms.map(|(_, most)| most),
        })
    }
}

impl PairSummary {
    fn to_json(&self) -> Value {
        let stages: serde_json::Map<String, Value> = self
            .stages_ms
            .iter()
            .map(|(stage, mean)| (format!("{}_ms", stage.key()), json!(mean)))
            .collect();
        json!({
            "pair": self.name, "requests": self.requests, "mean_ttft_ms": self.ttft_ms,
            "first_ttft_ms": self.first_ttft_ms, "mean_stages": stages,
        })
    }
}

fn engine_to_json(engine: &EngineCounters) -> Value {
    json!({
        "engine": engine.name, "role": engine.role.key(),
        "requests": engine.count(Counter::Queued),
        "mean_queue_ms": engine.mean_ms(Counter::QueueSeconds, Counter::Queued),
        "mean_prefill_ms": engine.mean_ms(Counter::PrefillSeconds, Counter::Prefilled),
        "mean_transfer_ms": engine.mean_ms(Counter::TransferSeconds, Counter::Transfers),
        "transfers": engine.count(Counter::Transfers),
        "failed_transfers": engine.count(Counter::FailedTransfers),
        "transferred_bytes": engine.count(Counter::TransferredBytes),
        "computed_prompt_tokens": engine.count(Counter::ComputedTokens),
        "cached_prompt_tokens": engine.count(Counter::CachedTokens),
        "remote_prompt_tokens": engine.count(Counter::RemoteTokens),
    })
}

/// Builds the rows of the table.
struct StageTable {
    rows: Vec<StageRow>,
    ttft_ms: f64,
}

impl StageTable {
    fn push(&mut self, key: &'static str, label: &'static str, is_part: bool, values: &Distribution) {
        let percentiles_ms = match values.percentiles[..] {
            [(_, median), (_, most)] => Some((median, most)),
            _ => None,
        };
        self.rows.push(StageRow {
            key,
            label,
            is_part,
            mean_ms: values.mean,
            percentiles_ms,
            share: if self.ttft_ms > 0.0 {
                values.mean / self.ttft_ms
            } else {
                0.0
            },
        });
    }

    /// Adds a part of which only the mean is known.
    fn push_mean(&mut self, key: &'static str, label: &'static str, is_part: bool, mean: f64) {
        let values = Distribution {
            mean,
            ..Distribution::default()
        };
        self.push(key, label, is_part, &values);
    }
}

fn distribution(values: Vec<f64>) -> Distribution {
    Distribution::of_seconds(values, &[50.0, 99.0])
}

/// The rows of the time to first token by stage.
fn rows(timed: &[TimedRequest<'_>], engines: &[EngineCounters]) -> Vec<StageRow> {
    let sum_of = |stages: &[Stage]| {
        let of = |timed: &TimedRequest<'_>| {
            stages
                .iter()
                .map(|stage| timed.phases.length(*stage).as_secs_f64())
                .sum()
        };
        distribution(timed.iter().map(of).collect())
    };
    let has = |stage: Stage| {
        timed
            .iter()
            .any(|timed| timed.phases.spans.iter().any(|span| span.stage == stage))
    };
    let ttft = distribution(
        timed
            .iter()
            .map(|timed| timed.answer.first_token.as_secs_f64())
            .collect(),
    );
    let mut lines = StageTable {
        rows: Vec::new(),
        ttft_ms: ttft.mean,
    };
    for stage in [Stage::Wire, Stage::Retried, Stage::ProxyQueue] {
        if has(stage) {
            lines.push(stage.key(), stage.label(), false, &sum_of(&[stage]));
        }
    }
    let with_prefill = mean(
        timed
            .iter()
            .map(|timed| f64::from(u8::from(timed.phases.prefill.is_some()))),
    );
    for leg in LEGS {
        if !has(leg.rest) {
            continue;
        }
        if leg.rest == Stage::Decode && has(Stage::Handoff) {
            lines.push(
                Stage::Handoff.key(),
                Stage::Handoff.label(),
                false,
                &sum_of(&[Stage::Handoff]),
            );
        }
        let whole = sum_of(&[leg.queue, leg.compute, leg.rest]);
        lines.push(leg.rest.key(), leg.rest.label(), false, &whole);
        let scale = if leg.role == Role::Prefill { with_prefill } else { 1.0 };
        leg.parts(&mut lines, engines, whole.mean, scale, |stage| {
            has(stage).then(|| sum_of(&[stage]))
        });
    }
    lines.push(
        Stage::Unexplained.key(),
        Stage::Unexplained.label(),
        false,
        &sum_of(&[Stage::Unexplained]),
    );
    lines.push("ttft", "time to first token", false, &ttft);
    lines.rows
}

/// A leg of a request and its stages.
struct Leg {
    role: Role,
    queue: Stage,
    compute: Stage,
    /// The rest of the leg; the whole leg if no part is known.
    rest: Stage,
}

const LEGS: [Leg; 2] = [
    Leg {
        role: Role::Prefill,
        queue: Stage::PrefillQueue,
        compute: Stage::PrefillCompute,
        rest: Stage::Prefill,
    },
    Leg {
        role: Role::Decode,
        queue: Stage::DecodeQueue,
        compute: Stage::FirstStep,
        rest: Stage::Decode,
    },
];

impl Leg {
    /// Adds the parts of the leg: from the requests if they report them, else from engine counters.
    fn parts(
        &self,
        lines: &mut StageTable,
        engines: &[EngineCounters],
        whole: f64,
        scale: f64,
        timed: impl Fn(Stage) -> Option<Distribution>,
    ) {
        let of_role = || engines.iter().filter(|engine| engine.role == self.role);
        let counted = |sum, count| {
            mean_ms(of_role(), sum, count).map(|mean| Distribution {
                mean: mean * scale,
                ..Distribution::default()
            })
        };
        let queue = timed(self.queue).or_else(|| counted(Counter::QueueSeconds, Counter::Queued));
        let compute = timed(self.compute).or_else(|| counted(Counter::PrefillSeconds, Counter::Prefilled));
        let (Some(queue), Some(compute)) = (queue, compute) else {
            return;
        };
        let transfer = mean_ms(of_role(), Counter::TransferSeconds, Counter::Transfers);
        match transfer.filter(|_| self.role == Role::Decode) {
            Some(transfer) => {
                lines.push_mean("kv_transfer", "KV transfer", true, transfer);
                let waits = (queue.mean - transfer).max(0.0);
                lines.push_mean("decode_queue", "orchestration and queue", true, waits);
            }
            None => lines.push(self.queue.key(), self.queue.label(), true, &queue),
        }
        lines.push(self.compute.key(), self.compute.label(), true, &compute);
        let rest = (whole - queue.mean - compute.mean).max(0.0);
        let key = if self.role == Role::Prefill {
            "prefill_http"
        } else {
            "decode_http"
        };
        lines.push_mean(key, "HTTP and tokenizer", true, rest);
    }
}

/// The rows for a server that only has counters.
fn rows_of_engines(records: &[Record], engines: &[EngineCounters]) -> Option<Vec<StageRow>> {
    let queue = mean_ms(engines, Counter::QueueSeconds, Counter::Queued)?;
    let compute = mean_ms(engines, Counter::PrefillSeconds, Counter::Prefilled)?;
    if engines.iter().any(|engine| engine.role != Role::Alone) {
        return None;
    }
    let answered = records.iter().filter_map(|record| record.result.as_ref().ok());
    let ttft = distribution(answered.map(|answer| answer.first_token.as_secs_f64()).collect());
    let mut lines = StageTable {
        rows: Vec::new(),
        ttft_ms: ttft.mean,
    };
    lines.push_mean("queue", "engine queue", false, queue);
    lines.push_mean("prefill_compute", "prefill compute", false, compute);
    lines.push_mean(
        "http",
        "HTTP and tokenizer",
        false,
        (ttft.mean - queue - compute).max(0.0),
    );
    lines.push("ttft", "time to first token", false, &ttft);
    Some(lines.rows)
}

fn pairs(timed: &[TimedRequest<'_>]) -> Vec<PairSummary> {
    let mut by_pair: BTreeMap<String, Vec<&TimedRequest<'_>>> = BTreeMap::new();
    for one in timed {
        by_pair.entry(one.phases.pair()).or_default().push(one);
    }
    let pair = |(name, requests): (String, Vec<&TimedRequest<'_>>)| {
        let stage = |stage: &Stage| {
            let took_place = requests
                .iter()
                .any(|timed| timed.phases.spans.iter().any(|span| span.stage == *stage));
            took_place.then(|| {
                (
                    *stage,
                    mean(requests.iter().map(|timed| milliseconds(timed.phases.length(*stage)))),
                )
            })
        };
        PairSummary {
            requests: requests.len(),
            ttft_ms: mean(requests.iter().map(|timed| timed.ttft_ms())),
            first_ttft_ms: first(&requests).map_or(0.0, TimedRequest::ttft_ms),
            stages_ms: Stage::ALL.iter().filter_map(stage).collect(),
            name,
        }
    };
    by_pair.into_iter().map(pair).collect()
}

/// The request that was sent first.
fn first<'timed, 'run>(requests: &[&'timed TimedRequest<'run>]) -> Option<&'timed TimedRequest<'run>> {
    requests.iter().copied().min_by_key(|timed| timed.record.started)
}

fn cold(timed: &[TimedRequest<'_>]) -> Option<ColdRequests> {
    let mut in_order: Vec<&TimedRequest<'_>> = timed.iter().collect();
    in_order.sort_by_key(|timed| timed.record.started);
    let mut met = std::collections::BTreeSet::new();
    let (cold, warm): (Vec<&TimedRequest<'_>>, Vec<&TimedRequest<'_>>) =
        in_order.into_iter().partition(|timed| met.insert(timed.phases.pair()));
    let mean_of = |some: &[&TimedRequest<'_>]| mean(some.iter().map(|timed| timed.ttft_ms()));
    (!warm.is_empty()).then(|| ColdRequests {
        requests: cold.len(),
        all_ms: mean(timed.iter().map(TimedRequest::ttft_ms)),
        cold_ms: mean_of(&cold),
        warm_ms: mean_of(&warm),
    })
}

fn unexplained(timed: &[TimedRequest<'_>]) -> Unexplained {
    let length_ms =
        |timed: &TimedRequest<'_>| milliseconds(timed.phases.length(Stage::Unexplained) + timed.phases.excess);
    let share = |timed: &TimedRequest<'_>| length_ms(timed) / timed.ttft_ms().max(f64::MIN_POSITIVE);
    let worst = timed.iter().max_by(|left, right| share(left).total_cmp(&share(right)));
    Unexplained {
        mean: mean(timed.iter().map(share)),
        worst: worst.map_or(0.0, share),
        worst_ms: worst.map_or(0.0, length_ms),
        worst_request: worst.map_or(0, |timed| timed.record.index),
    }
}

/// Counts requests that used remote KV.
///
/// The headers of a stream are sent before its decode engine knows whether KV arrived. The engine's counters do know:
/// for a prompt with remote KV it computes one token. Further computed tokens, minus the prompts that it was meant to
/// compute, are prompts whose KV did not arrive. Dividing by the mean length is an estimate if lengths differ.
fn remote(timed: &[TimedRequest<'_>], engines: &[EngineCounters]) -> Option<RemoteKv> {
    if timed.is_empty() {
        return None;
    }
    let mut outcomes: BTreeMap<String, usize> = BTreeMap::new();
    let (mut transferred, mut transferred_tokens, mut own_tokens) = (0_usize, 0.0, 0.0);
    for TimedRequest { answer, phases, .. } in timed {
        let reason = phases
            .reason
            .as_ref()
            .map(|reason| format!(" ({reason})"))
            .unwrap_or_default();
        *outcomes.entry(format!("{}{reason}", phases.outcome)).or_default() += 1;
        let tokens = answer.prompt_tokens.unwrap_or_default() as f64;
        if matches!(phases.outcome.as_str(), "transferred" | "sent") {
            transferred += 1;
            transferred_tokens += tokens;
        } else {
            own_tokens += tokens;
        }
    }
    let sum = |role: Role, counter: Counter| -> f64 {
        engines
            .iter()
            .filter(|engine| engine.role == role)
            .map(|engine| engine.count(counter))
            .sum()
    };
    let all = |role: Role| {
        [Counter::ComputedTokens, Counter::CachedTokens, Counter::RemoteTokens].map(|counter| sum(role, counter))
    };
    let is_counted = all(Role::Decode).iter().sum::<f64>() > 0.0 && transferred_tokens > 0.0;
    let recomputed = if is_counted {
        let again = sum(Role::Decode, Counter::ComputedTokens) - own_tokens - transferred as f64;
        let mean_tokens = transferred_tokens / transferred.max(1) as f64;
        whole((again / mean_tokens).round()).min(transferred)
    } else {
        0
    };
    let [computed, cached, from_cache] = all(Role::Prefill);
    let read = computed + cached + from_cache;
    Some(RemoteKv {
        answered: timed.len(),
        used: transferred - recomputed,
        recomputed,
        is_counted,
        outcomes,
        cached: (read > 0.0).then_some((cached + from_cache, read)),
    })
}

/// A count that was divided and can be below 0.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "it is not below 0, and a small count"
)]
fn whole(count: f64) -> usize {
    count.max(0.0) as usize
}

#[cfg(test)]
mod tests;
