//! The stages of all requests of a run in numbers, whether they add up, and whether KV was handed over at all.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::engine_pages::{Counter, Engine, Role, mean_ms};
use super::{Phases, Stage};
use crate::bench::record::{Answer, Record};
use crate::bench::stats::Distribution;

/// The part of the time to the first token that may stay unexplained before the table is called doubtful, and the time in
/// milliseconds that may always do: of an answer within a few milliseconds, the proxy's own work is a large part.
pub const TOLERANCE: f64 = 0.05;
const UNREMARKABLE_MS: f64 = 2.0;

/// Where the time of a run went.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Requests that were answered and whose stages the server told.
    pub told: usize,
    /// Stages, in their order; the last is the whole time to the first token.
    pub rows: Vec<Row>,
    /// By pair of engines, in the order of their names.
    pub pairs: Vec<Pair>,
    /// What the first request of each pair cost; `None` unless there are others to compare with.
    pub cold: Option<Cold>,
    /// What the stages do not explain.
    pub unexplained: Unexplained,
    /// Whether KV was handed over; `None` where the server says nothing of hand-offs.
    pub remote: Option<Remote>,
    /// What each engine counted over the run.
    pub engines: Vec<Engine>,
}

/// A line of the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Its name in JSON.
    pub key: &'static str,
    /// Its name for people.
    pub label: &'static str,
    /// Whether it is a part of the stage before it that is no part itself.
    pub is_part: bool,
    /// Arithmetic mean over all requests, in milliseconds; 0 for those that had no such stage.
    pub mean_ms: f64,
    /// P50 and P99 in milliseconds; `None` where only engines' sums over the run are known.
    pub percentiles_ms: Option<(f64, f64)>,
    /// Its part of the mean time to the first token, 0 to 1.
    pub share: f64,
}

/// The requests of one pair of engines.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// `prefiller1 → decoder2`, or a decode engine alone.
    pub name: String,
    /// How many.
    pub requests: usize,
    /// Mean time to the first token, in milliseconds.
    pub ttft_ms: f64,
    /// That of its first request.
    pub first_ttft_ms: f64,
    /// The mean of each of its stages that took place, in milliseconds.
    pub stages_ms: Vec<(Stage, f64)>,
}

/// The first request of each pair of engines against all others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cold {
    /// First requests: one per pair.
    pub requests: usize,
    /// Mean time to the first token of all requests, in milliseconds.
    pub all_ms: f64,
    /// That of the first ones.
    pub cold_ms: f64,
    /// That of the others.
    pub warm_ms: f64,
}

/// What no stage explains, as parts of the time to the first token, 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Unexplained {
    /// The mean.
    pub mean: f64,
    /// The worst request's.
    pub worst: f64,
    /// How long that was, in milliseconds.
    pub worst_ms: f64,
    /// Which request that was, by its place in the workload.
    pub worst_request: usize,
}

impl Unexplained {
    /// Whether the table is to be doubted.
    pub fn is_too_much(&self) -> bool {
        self.worst > TOLERANCE && self.worst_ms > UNREMARKABLE_MS
    }
}

/// How many requests decoded from KV that another engine had computed.
#[derive(Debug, Clone, PartialEq)]
pub struct Remote {
    /// Requests that were answered.
    pub answered: usize,
    /// Those of them that used remote KV.
    pub used: usize,
    /// Those whose hand-off seemed to succeed, and whose prompt the decode engine then computed again.
    pub recomputed: usize,
    /// Whether engines' counters bear this out; without them it is what the proxy knew when the answers began.
    pub is_counted: bool,
    /// What became of hand-offs, by the proxy's words: `transferred`, `sent`, `bypassed (n)`.
    pub outcomes: BTreeMap<String, usize>,
    /// Prompt tokens that prefill engines had in a cache, and all they read; `None` without counters.
    pub cached: Option<(f64, f64)>,
}

impl Remote {
    /// The part of the prompts that prefill engines did not compute, 0 to 1.
    pub fn cached_share(&self) -> f64 {
        self.cached.map_or(0.0, |(cached, all)| cached / all.max(1.0))
    }
}

/// One request that was told of.
struct Told<'run> {
    record: &'run Record,
    answer: &'run Answer,
    phases: Phases,
}

impl Told<'_> {
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

impl Summary {
    /// Sums a run up; `None` where neither the answers nor any engine told anything.
    pub fn of(records: &[Record], engines: &[Engine]) -> Option<Self> {
        let told: Vec<Told<'_>> = records
            .iter()
            .filter_map(|record| {
                let answer = record.result.as_ref().ok()?;
                let phases = Phases::of_answer(answer)?;
                Some(Told { record, answer, phases })
            })
            .collect();
        let rows = if told.is_empty() {
            rows_of_engines(records, engines)?
        } else {
            rows(&told, engines)
        };
        Some(Self {
            told: told.len(),
            rows,
            pairs: pairs(&told),
            cold: cold(&told),
            unexplained: unexplained(&told),
            remote: remote(&told, engines),
            engines: engines.to_vec(),
        })
    }

    /// What the result file holds of it.
    pub fn to_json(&self) -> Value {
        let rows: Vec<Value> = self.rows.iter().map(Row::to_json).collect();
        let pairs: Vec<Value> = self.pairs.iter().map(Pair::to_json).collect();
        let unexplained = self.unexplained;
        json!({
            "requests": self.told,
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

impl Row {
    fn to_json(&self) -> Value {
        json!({
            "stage": self.key, "is_part": self.is_part, "mean_ms": self.mean_ms, "share": self.share,
            "p50_ms": self.percentiles_ms.map(|(median, _)| median),
            "p99_ms": self.percentiles_ms.map(|(_, most)| most),
        })
    }
}

impl Pair {
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

fn engine_to_json(engine: &Engine) -> Value {
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

/// Makes the lines of the table.
struct Lines {
    rows: Vec<Row>,
    ttft_ms: f64,
}

impl Lines {
    fn push(&mut self, key: &'static str, label: &'static str, is_part: bool, values: &Distribution) {
        let percentiles_ms = match values.percentiles[..] {
            [(_, median), (_, most)] => Some((median, most)),
            _ => None,
        };
        self.rows.push(Row {
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

    /// A part of which only a mean is known.
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

/// The time to the first token by stage.
fn rows(told: &[Told<'_>], engines: &[Engine]) -> Vec<Row> {
    let sum_of = |stages: &[Stage]| {
        let of = |told: &Told<'_>| {
            stages
                .iter()
                .map(|stage| told.phases.length(*stage).as_secs_f64())
                .sum()
        };
        distribution(told.iter().map(of).collect())
    };
    let has = |stage: Stage| {
        told.iter()
            .any(|told| told.phases.spans.iter().any(|span| span.stage == stage))
    };
    let ttft = distribution(told.iter().map(|told| told.answer.first_token.as_secs_f64()).collect());
    let mut lines = Lines {
        rows: Vec::new(),
        ttft_ms: ttft.mean,
    };
    for stage in [Stage::Wire, Stage::Retried, Stage::ProxyQueue] {
        if has(stage) {
            lines.push(stage.key(), stage.label(), false, &sum_of(&[stage]));
        }
    }
    let with_prefill = mean(
        told.iter()
            .map(|told| f64::from(u8::from(told.phases.prefill.is_some()))),
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

/// A leg of a request, and its parts.
struct Leg {
    role: Role,
    queue: Stage,
    compute: Stage,
    /// The whole leg, where no part is known.
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
    /// The parts of the leg: from the requests themselves where they tell, else from what its engines counted.
    fn parts(
        &self,
        lines: &mut Lines,
        engines: &[Engine],
        whole: f64,
        scale: f64,
        told: impl Fn(Stage) -> Option<Distribution>,
    ) {
        let of_role = || engines.iter().filter(|engine| engine.role == self.role);
        let counted = |sum, count| {
            mean_ms(of_role(), sum, count).map(|mean| Distribution {
                mean: mean * scale,
                ..Distribution::default()
            })
        };
        let queue = told(self.queue).or_else(|| counted(Counter::QueueSeconds, Counter::Queued));
        let compute = told(self.compute).or_else(|| counted(Counter::PrefillSeconds, Counter::Prefilled));
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

/// The same of a server that tells nothing of single requests, from its counters alone.
fn rows_of_engines(records: &[Record], engines: &[Engine]) -> Option<Vec<Row>> {
    let queue = mean_ms(engines, Counter::QueueSeconds, Counter::Queued)?;
    let compute = mean_ms(engines, Counter::PrefillSeconds, Counter::Prefilled)?;
    if engines.iter().any(|engine| engine.role != Role::Alone) {
        return None;
    }
    let answered = records.iter().filter_map(|record| record.result.as_ref().ok());
    let ttft = distribution(answered.map(|answer| answer.first_token.as_secs_f64()).collect());
    let mut lines = Lines {
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

fn pairs(told: &[Told<'_>]) -> Vec<Pair> {
    let mut by_pair: BTreeMap<String, Vec<&Told<'_>>> = BTreeMap::new();
    for one in told {
        by_pair.entry(one.phases.pair()).or_default().push(one);
    }
    let pair = |(name, requests): (String, Vec<&Told<'_>>)| {
        let stage = |stage: &Stage| {
            let took_place = requests
                .iter()
                .any(|told| told.phases.spans.iter().any(|span| span.stage == *stage));
            took_place.then(|| {
                (
                    *stage,
                    mean(requests.iter().map(|told| milliseconds(told.phases.length(*stage)))),
                )
            })
        };
        Pair {
            requests: requests.len(),
            ttft_ms: mean(requests.iter().map(|told| told.ttft_ms())),
            first_ttft_ms: first(&requests).map_or(0.0, Told::ttft_ms),
            stages_ms: Stage::ALL.iter().filter_map(stage).collect(),
            name,
        }
    };
    by_pair.into_iter().map(pair).collect()
}

/// The request that was sent first.
fn first<'told, 'run>(requests: &[&'told Told<'run>]) -> Option<&'told Told<'run>> {
    requests.iter().copied().min_by_key(|told| told.record.started)
}

fn cold(told: &[Told<'_>]) -> Option<Cold> {
    let mut in_order: Vec<&Told<'_>> = told.iter().collect();
    in_order.sort_by_key(|told| told.record.started);
    let mut met = std::collections::BTreeSet::new();
    let (cold, warm): (Vec<&Told<'_>>, Vec<&Told<'_>>) =
        in_order.into_iter().partition(|told| met.insert(told.phases.pair()));
    let mean_of = |some: &[&Told<'_>]| mean(some.iter().map(|told| told.ttft_ms()));
    (!warm.is_empty()).then(|| Cold {
        requests: cold.len(),
        all_ms: mean(told.iter().map(Told::ttft_ms)),
        cold_ms: mean_of(&cold),
        warm_ms: mean_of(&warm),
    })
}

fn unexplained(told: &[Told<'_>]) -> Unexplained {
    let length_ms = |told: &Told<'_>| milliseconds(told.phases.length(Stage::Unexplained) + told.phases.excess);
    let share = |told: &Told<'_>| length_ms(told) / told.ttft_ms().max(f64::MIN_POSITIVE);
    let worst = told.iter().max_by(|left, right| share(left).total_cmp(&share(right)));
    Unexplained {
        mean: mean(told.iter().map(share)),
        worst: worst.map_or(0.0, share),
        worst_ms: worst.map_or(0.0, length_ms),
        worst_request: worst.map_or(0, |told| told.record.index),
    }
}

/// How many requests decoded from KV that came from elsewhere.
///
/// A stream's headers leave before its decode engine has said whether KV came, so they know too little. The engine's
/// counters do know: of a prompt whose KV came, it computes one token; what it computed beyond that and beyond the prompts
/// it was to compute are prompts that were to come. Where lengths differ, dividing by their mean makes this an estimate.
fn remote(told: &[Told<'_>], engines: &[Engine]) -> Option<Remote> {
    if told.is_empty() {
        return None;
    }
    let mut outcomes: BTreeMap<String, usize> = BTreeMap::new();
    let (mut transferred, mut transferred_tokens, mut own_tokens) = (0_usize, 0.0, 0.0);
    for Told { answer, phases, .. } in told {
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
    Some(Remote {
        answered: told.len(),
        used: transferred - recomputed,
        recomputed,
        is_counted,
        outcomes,
        cached: (read > 0.0).then_some((cached + from_cache, read)),
    })
}

/// A count that was divided, and may be below 0.
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
