//! Latency statistics with bootstrap confidence intervals, stalls, and the same without cold requests. Pure.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use crate::latency_breakdown::parameter_of;
use crate::record::{Answer, Record, TokenCount};
use crate::stats::bootstrap::{Column, Statistic};

/// A value with its confidence interval, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The value as vLLM computes it.
    pub value: f64,
    /// 95 % confidence interval. `None` if there are too few requests.
    pub interval: Option<(f64, f64)>,
}

/// A percentile of a latency.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TailPercentile {
    /// The percentile, such as 99.
    pub percentile: f64,
    /// The value, interpolated as in vLLM.
    pub estimate: Estimate,
    /// The number of requests if they are too few for this percentile. It is then close to the maximum and has no
    /// interval.
    pub too_few: Option<usize>,
}

/// The statistics of one latency.
#[derive(Debug, Clone, PartialEq)]
pub struct LatencyRow {
    /// Its name for people.
    pub label: &'static str,
    /// Its key in JSON.
    pub key: &'static str,
    /// Number of values.
    pub count: usize,
    /// Arithmetic mean.
    pub mean: Estimate,
    /// Median.
    pub median: Estimate,
    /// The requested percentiles, in their order.
    pub tails: Vec<TailPercentile>,
}

/// Gaps between chunks of more than twice their median.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Stalls {
    /// Number of gaps of all requests.
    pub gaps: usize,
    /// Number of stalls.
    pub count: usize,
    /// Number of requests with a stall.
    pub requests: usize,
    /// The longest gap, in milliseconds.
    pub longest: f64,
}

/// The latency statistics of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct LatencyStats {
    /// Statistics of all answered requests.
    pub rows: Vec<LatencyRow>,
    /// How the tokens of chunks were counted, at worst.
    pub tokens: TokenCount,
    /// Stalls between chunks.
    pub stalls: Stalls,
    /// Number of cold requests: the first of each pair of engines.
    pub cold: usize,
    /// Statistics without the cold requests; empty if there are none.
    pub without_cold: Vec<LatencyRow>,
}

impl LatencyStats {
    /// Computes the statistics with these percentiles.
    pub fn of(records: &[Record], percentiles: &[f64]) -> Self {
        let answers = |skipped: &HashSet<usize>| -> Vec<&Answer> {
            let kept = records.iter().filter(|record| !skipped.contains(&record.index));
            kept.filter_map(|record| record.result.as_ref().ok()).collect()
        };
        let all = answers(&HashSet::new());
        let cold = cold(records);
        let tokens = all.iter().map(|answer| answer.token_gaps().1).max();
        let tokens = tokens.unwrap_or(TokenCount::OnePerChunk);
        let warm = if cold.is_empty() { Vec::new() } else { answers(&cold) };
        Self {
            rows: rows(&all, percentiles, tokens),
            tokens,
            stalls: stalls(&all),
            cold: cold.len(),
            without_cold: rows(&warm, percentiles, tokens),
        }
    }

    /// The object `xpyd.statistics` of the result file.
    pub(crate) fn to_json(&self) -> Value {
        let Stalls {
            gaps,
            count,
            requests,
            longest,
        } = self.stalls;
        json!({
            "interval": "95 % of draws, in which blocks of neighbouring requests are drawn anew; seeded",
            "tokens_per_chunk": match self.tokens {
                TokenCount::OnePerChunk => "one",
                TokenCount::Reported => "told by the server",
                TokenCount::Spread => "the whole number spread evenly",
            },
            "all": rows_to_json(&self.rows),
            "cold_requests": self.cold,
            "without_cold": rows_to_json(&self.without_cold),
            "stalls": {"gaps": gaps, "stalled": count, "requests": requests, "longest_ms": longest},
        })
    }
}

/// The indices of the cold requests: the first of each pair of engines. They pay for the connection between the two and
/// for one-time work of the engines.
pub fn cold(records: &[Record]) -> HashSet<usize> {
    let mut by_start: Vec<&Record> = records.iter().collect();
    by_start.sort_by_key(|record| record.started);
    let mut pairs = HashSet::new();
    let mut first_of_pair = |record: &&Record| {
        let handoff = record
            .result
            .as_ref()
            .ok()
            .and_then(|answer| answer.timings.handoff.as_deref());
        let pair = handoff.and_then(|header| Some((parameter_of(header, "prefill")?, parameter_of(header, "decode")?)));
        pair.is_some_and(|(prefill, decode)| pairs.insert((prefill.to_owned(), decode.to_owned())))
    };
    by_start.retain(&mut first_of_pair);
    by_start.iter().map(|record| record.index).collect()
}

fn rows(answers: &[&Answer], percentiles: &[f64], tokens: TokenCount) -> Vec<LatencyRow> {
    if answers.is_empty() {
        return Vec::new();
    }
    let column = |values: fn(&Answer) -> Vec<f64>| {
        let values = answers.iter().map(|answer| values(answer));
        Column::new(values.map(|values| values.into_iter().map(|seconds| seconds * 1e3).collect()))
    };
    let row = |label, key, values| LatencyRow::of(label, key, &column(values), percentiles);
    let chunk_gaps = |answer: &Answer| answer.gaps.iter().map(std::time::Duration::as_secs_f64).collect();
    let label = if tokens == TokenCount::OnePerChunk {
        "ITL"
    } else {
        "ITL per chunk"
    };
    let mut rows = vec![
        row("TTFT", "ttft", |answer| vec![answer.first_token.as_secs_f64()]),
        row("TPOT", "tpot", |answer| {
            answer.time_per_output_token().into_iter().collect()
        }),
        row(label, "itl_chunk_gap", chunk_gaps),
        row("E2EL", "e2el", |answer| vec![answer.latency.as_secs_f64()]),
    ];
    if tokens != TokenCount::OnePerChunk {
        rows.insert(3, row("ITL per token", "itl_per_token", |answer| answer.token_gaps().0));
    }
    rows.retain(|row| row.count > 0);
    rows
}

impl LatencyRow {
    fn of(label: &'static str, key: &'static str, column: &Column, percentiles: &[f64]) -> Self {
        let estimate = |statistic| Estimate {
            value: column.value(statistic).unwrap_or_default(),
            interval: column.interval(statistic),
        };
        let tail = |&percentile: &f64| {
            // P99 needs a hundred values, so that one is beyond it. Gaps of one answer are alike, so requests count.
            let needed = 100.0 / (100.0 - percentile).max(f64::EPSILON);
            let too_few = ((column.valued() as f64) < needed).then(|| column.valued());
            let at = Statistic::Percentile(percentile);
            let estimate = Estimate {
                value: column.value(at).unwrap_or_default(),
                interval: if too_few.is_none() { column.interval(at) } else { None },
            };
            TailPercentile {
                percentile,
                estimate,
                too_few,
            }
        };
        Self {
            label,
            key,
            count: column.len(),
            mean: estimate(Statistic::Mean),
            median: estimate(Statistic::Percentile(50.0)),
            tails: percentiles.iter().map(tail).collect(),
        }
    }
}

fn stalls(answers: &[&Answer]) -> Stalls {
    let mut all: Vec<f64> = answers
        .iter()
        .flat_map(|answer| answer.gaps.iter().map(|gap| gap.as_secs_f64() * 1e3))
        .collect();
    all.sort_unstable_by(f64::total_cmp);
    let Some(median) = all.get(all.len() / 2).copied() else {
        return Stalls::default();
    };
    let is_stall = |gap: f64| gap > 2.0 * median;
    let has_stall = |answer: &&&Answer| answer.gaps.iter().any(|gap| is_stall(gap.as_secs_f64() * 1e3));
    Stalls {
        gaps: all.len(),
        count: all.iter().filter(|gap| is_stall(**gap)).count(),
        requests: answers.iter().filter(has_stall).count(),
        longest: all.last().copied().unwrap_or_default(),
    }
}

fn rows_to_json(rows: &[LatencyRow]) -> Value {
    let estimate = |estimate: Estimate| {
        let interval = estimate.interval.map(|(low, high)| json!([low, high]));
        json!({"value": estimate.value, "interval": interval})
    };
    let row = |row: &LatencyRow| {
        let mut entry = Map::new();
        entry.insert("values".to_owned(), json!(row.count));
        entry.insert("mean".to_owned(), estimate(row.mean));
        entry.insert("median".to_owned(), estimate(row.median));
        for tail in &row.tails {
            let mut value = estimate(tail.estimate);
            if let Some(of) = tail.too_few {
                value["of_requests"] = json!(of);
            }
            entry.insert(format!("p{}", tail.percentile), value);
        }
        (format!("{}_ms", row.key), Value::Object(entry))
    };
    Value::Object(rows.iter().map(row).collect())
}

#[cfg(test)]
mod tests;
