//! Where the time to the first token of a request went: its stages, in their order, from what the server told of it.
//!
//! xpyd's proxy stamps each stage in the headers of its answer; an engine with `--enable-per-request-metrics` tells how
//! long a request waited in it and how long it computed. Every other server tells nothing, and then there are no stages.
//!
//! Stages are made so that they add up to what the client saw. What no stamp explains is a stage of its own,
//! [`Stage::Unexplained`], so that a table of stages can be trusted or not.

pub(super) mod engine_pages;
pub mod gpus;
mod summary;

use std::time::Duration;

pub use self::engine_pages::{Counter, Engine, Role};
pub use self::gpus::GpuUse;
pub use self::summary::{Cold, Pair, Remote, Row, Summary, TOLERANCE, Unexplained};
use crate::bench::record::{Answer, Record};

/// A part of the time to the first token. The order is that of a request's way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Between client and proxy, both ways: what the client saw beyond what the proxy did, and the request's own upload.
    Wire,
    /// Earlier attempts of the proxy with other engines, all of their stages.
    Retried,
    /// The wait in the proxy for a decode engine that has room.
    ProxyQueue,
    /// The wait in the prefill engine until it was scheduled.
    PrefillQueue,
    /// The prefill engine's work, until its token.
    PrefillCompute,
    /// What is left of the prefill leg: all of it where the engine told nothing, else its HTTP server and tokenizer.
    Prefill,
    /// From the prefill engine's answer until the KV had arrived, where the connector says when. With NIXL the decode
    /// engine fetches KV in its own queue, and this is next to nothing.
    Handoff,
    /// The wait in the decode engine until it was scheduled; with NIXL the transfer is in it.
    DecodeQueue,
    /// The decode engine's first step, until its token.
    FirstStep,
    /// What is left of the decode leg until its first token: all of it where the engine told nothing.
    Decode,
    /// In the proxy between the stages; its own work.
    Unexplained,
}

impl Stage {
    /// All, in their order.
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

    /// Its name in JSON.
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

    /// Its name for people.
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
pub struct Span {
    /// Which.
    pub stage: Stage,
    /// When it began, since the request was sent. Stages follow each other without a gap.
    pub start: Duration,
    /// How long it took.
    pub length: Duration,
}

/// The stages of one answered request, and who worked on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Phases {
    /// The outcome of its hand-off known when the answer began: `transferred`, `sent`, `bypassed`. A stream
    /// says `sent`, because its usage comes last.
    pub outcome: String,
    /// Why a decode engine answered alone.
    pub reason: Option<String>,
    /// The prefill engine; `None` where a decode engine answered alone.
    pub prefill: Option<String>,
    /// The decode engine.
    pub decode: Option<String>,
    /// Which attempt of the proxy this was, from 1.
    pub attempt: u32,
    /// Stages that took place, in their order: from the request's start to its first token.
    pub spans: Vec<Span>,
    /// How much longer the stamps are than what the client saw; zero unless clocks or stamps are wrong.
    pub excess: Duration,
}

impl Phases {
    /// The stages of an answered request; `None` where the server told nothing.
    pub fn of(record: &Record) -> Option<Self> {
        Self::of_answer(record.result.as_ref().ok()?)
    }

    /// [`Phases::of`] an answer.
    pub fn of_answer(answer: &Answer) -> Option<Self> {
        let timing = answer.told.timing.as_deref()?;
        let handoff = answer.told.handoff.as_deref()?;
        let dur = |name: &str| duration_of(timing, name);
        let total = dur("total")?;
        let leg = dur("first-token")?;
        let seen = answer.first_token;
        let (prefill_queue, prefill_compute) = (dur("prefill-queue"), dur("prefill-compute"));
        let (decode_queue, first_step) = answer
            .told
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
                spans.push(Span { stage, start, length });
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

    /// How long a stage took; zero if it did not take place.
    pub fn length(&self, stage: Stage) -> Duration {
        let same = self.spans.iter().filter(|span| span.stage == stage);
        same.map(|span| span.length).sum()
    }

    /// The engines that worked on it, as people write a pair: `prefiller1 → decoder2`, or one alone.
    pub fn pair(&self) -> String {
        let engines: Vec<&str> = [&self.prefill, &self.decode]
            .into_iter()
            .flatten()
            .map(String::as_str)
            .collect();
        engines.join(" → ")
    }
}

/// The `dur` of a metric in a `Server-Timing` header, which gives milliseconds.
fn duration_of(header: &str, name: &str) -> Option<Duration> {
    let metric = header
        .split(',')
        .map(str::trim)
        .find(|metric| metric.strip_prefix(name).is_some_and(|rest| rest.starts_with(';')))?;
    let milliseconds: f64 = parameter_of(metric, "dur")?.parse().ok()?;
    Duration::try_from_secs_f64(milliseconds / 1000.0).ok()
}

/// A parameter of a header's item, without its quotes.
pub(super) fn parameter_of<'header>(item: &'header str, name: &str) -> Option<&'header str> {
    item.split(';').skip(1).find_map(|parameter| {
        let (key, value) = parameter.split_once('=')?;
        (key.trim() == name).then(|| value.trim().trim_matches('"'))
    })
}

#[cfg(test)]
mod tests;
