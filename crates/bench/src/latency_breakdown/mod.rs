//! Latency breakdown: the stages of a request's time to first token, from timings that the server reports.
//!
//! xpyd's proxy reports each stage in response headers; an engine with `--enable-per-request-metrics` reports the queue
//! time and the compute time of a request. Other servers report nothing, so there are no stages.
//!
//! The stages add up to the time that the client saw. Time that no timing explains is a stage of its own,
//! [`Stage::Unexplained`], so that readers see how far they can trust the table.

pub(super) mod engine_metrics;
pub mod gpus;
mod summary;

use std::time::Duration;

pub use self::engine_metrics::{Counter, EngineCounters, Role};
pub use self::gpus::GpuUse;
pub use self::summary::{BreakdownSummary, ColdRequests, PairSummary, RemoteKv, StageRow, TOLERANCE, Unexplained};
use crate::record::{Answer, Record};

/// A stage of the time to first token, in the order of processing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Between client and proxy, both ways: the client's time beyond the proxy's, and the upload of the request.
    Wire,
    /// Earlier attempts of the proxy with other engines, with all their stages.
    Retried,
    /// Wait in the proxy for a decode engine with free capacity.
    ProxyQueue,
    /// Wait in the prefill engine until the request is scheduled.
    PrefillQueue,
    /// Computation in the prefill engine, until its token.
    PrefillCompute,
    /// The rest of the prefill leg: its HTTP server and tokenizer, or the whole leg if the engine reports nothing.
    Prefill,
    /// From the prefill engine's answer to the arrival of the KV, if the connector reports it. With NIXL the decode
    /// engine pulls KV in its own queue, so this is nearly zero.
    Handoff,
    /// Wait in the decode engine until the request is scheduled; with NIXL it includes the transfer.
    DecodeQueue,
    /// The decode engine's first step, until its token.
    FirstStep,
    /// The rest of the decode leg until its first token: the whole leg if the engine reports nothing.
    Decode,
    /// Time in the proxy between the stages.
    Unexplained,
}

impl Stage {
    /// All stages in order.
    pub const ALL: [Self; 11] = [
        Self::Wire,
        Self::Retried,
        Self::ProxyQueue,
        Self::PrefillQueue,
        Self::PrefillCompute,
        Self::Prefill,
        Self::Handoff,
        Self::DecodeQueue,
        Self::FirstStep,
        Self::Decode,
        Self::Unexplained,
    ];

    /// The name in JSON.
    pub fn key(self) -> &'static str {
        match self {
            Self::Wire => "wire",
            Self::Retried => "retried",
            Self::ProxyQueue => "proxy_queue",
            Self::PrefillQueue => "prefill_queue",
            Self::PrefillCompute => "prefill_compute",
            Self::Prefill => "prefill",
            Self::Handoff => "handoff",
            Self::DecodeQueue => "decode_queue",
            Self::FirstStep => "first_step",
            Self::Decode => "decode",
            Self::Unexplained => "unexplained",
        }
    }

    /// The name for people.
    pub fn label(self) -> &'static str {
        match self {
            Self::Wire => "network, both ways",
            Self::Retried => "attempts that failed",
            Self::ProxyQueue => "proxy queue",
            Self::PrefillQueue => "prefill queue",
            Self::PrefillCompute => "prefill compute",
            Self::Prefill => "prefill",
            Self::Handoff => "hand-off",
            Self::DecodeQueue => "decode queue",
            Self::FirstStep => "first step",
            Self::Decode => "decode, first token",
            Self::Unexplained => "unexplained",
        }
    }
}

/// One stage of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StageSpan {
    /// The stage.
    pub stage: Stage,
    /// Start since the request was sent. Stages follow each other without a gap.
    pub start: Duration,
    /// Length.
    pub length: Duration,
}

/// The stages of one answered request, and its engines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestStages {
    /// The outcome of the hand-off when the answer began: `transferred`, `sent` or `bypassed`. A stream reports `sent`,
    /// because its usage comes last.
    pub outcome: String,
    /// Why the decode engine answered without prefill.
    pub reason: Option<String>,
    /// The prefill engine; `None` if a decode engine answered alone.
    pub prefill: Option<String>,
    /// The decode engine.
    pub decode: Option<String>,
    /// The proxy's attempt, from 1.
    pub attempt: u32,
    /// The stages of this request in order, from sending to the first token.
    pub spans: Vec<StageSpan>,
    /// By how much the reported timings exceed the client's time; zero unless clocks or timings are wrong.
    pub excess: Duration,
}

impl RequestStages {
    /// The stages of an answered request; `None` if the server reported none.
    pub fn of(record: &Record) -> Option<Self> {
        Self::of_answer(record.result.as_ref().ok()?)
    }

    /// As [`RequestStages::of`], from an answer.
    pub fn of_answer(answer: &Answer) -> Option<Self> {
        let timing = answer.timings.timing.as_deref()?;
        let handoff = answer.timings.handoff.as_deref()?;
        let dur = |name: &str| duration_of(timing, name);
        let total = dur("total")?;
        let leg = dur("first-token")?;
        let seen = answer.first_token;
        let (prefill_queue, prefill_compute) = (dur("prefill-queue"), dur("prefill-compute"));
        let (decode_queue, first_step) = answer
            .timings
            .engine
            .map_or((None, None), |engine| (Some(engine.queue), Some(engine.first_token)));
        let rest = |leg: Option<Duration>, parts: [Option<Duration>; 2]| {
            leg.map(|leg| leg.saturating_sub(parts.into_iter().flatten().sum()))
        };
        let prefill = dur("prefill");
        let read = dur("read").unwrap_or_default();
        let stages = [dur("retried"), dur("queue"), prefill, dur("handoff"), Some(leg)];
        let stamped = read + stages.into_iter().flatten().sum::<Duration>();
        let lengths = [
            (Stage::Wire, Some(seen.saturating_sub(total) + read)),
            (Stage::Retried, dur("retried")),
            (Stage::ProxyQueue, dur("queue")),
            (Stage::PrefillQueue, prefill_queue),
            (Stage::PrefillCompute, prefill_compute),
            (Stage::Prefill, rest(prefill, [prefill_queue, prefill_compute])),
            (Stage::Handoff, dur("handoff")),
            (Stage::DecodeQueue, decode_queue),
            (Stage::FirstStep, first_step),
            (Stage::Decode, rest(Some(leg), [decode_queue, first_step])),
            (Stage::Unexplained, Some(total.saturating_sub(stamped))),
        ];
        let mut start = Duration::ZERO;
        let mut spans = Vec::new();
        for (stage, length) in lengths {
            if let Some(length) = length {
                spans.push(StageSpan { stage, start, length });
                start += length;
            }
        }
        let engine = |role: &str| parameter_of(handoff, role).map(str::to_owned);
        Some(Self {
            outcome: handoff.split(';').next().unwrap_or_default().to_owned(),
            reason: engine("reason"),
            prefill: engine("prefill"),
            decode: engine("decode"),
            attempt: parameter_of(handoff, "attempt")
                .and_then(|attempt| attempt.parse().ok())
                .unwrap_or(1),
            spans,
            excess: start.saturating_sub(seen),
        })
    }

    /// The length of a stage; zero if it is missing.
    pub fn length(&self, stage: Stage) -> Duration {
        let same = self.spans.iter().filter(|span| span.stage == stage);
        same.map(|span| span.length).sum()
    }

    /// The engines as a pair: `prefiller1 → decoder2`, or one alone.
    pub fn pair(&self) -> String {
        let engines: Vec<&str> = [&self.prefill, &self.decode]
            .into_iter()
            .flatten()
            .map(String::as_str)
            .collect();
        engines.join(" → ")
    }
}

/// The `dur` of a metric in a `Server-Timing` header, in milliseconds.
fn duration_of(header: &str, name: &str) -> Option<Duration> {
    let metric = header
        .split(',')
        .map(str::trim)
        .find(|metric| metric.strip_prefix(name).is_some_and(|rest| rest.starts_with(';')))?;
    let milliseconds: f64 = parameter_of(metric, "dur")?.parse().ok()?;
    Duration::try_from_secs_f64(milliseconds / 1000.0).ok()
}

/// A parameter of a header item, without quotes.
pub(super) fn parameter_of<'header>(item: &'header str, name: &str) -> Option<&'header str> {
    item.split(';').skip(1).find_map(|parameter| {
        let (key, value) = parameter.split_once('=')?;
        (key.trim() == name).then(|| value.trim().trim_matches('"'))
    })
}

#[cfg(test)]
mod tests;
