//! Statistics of a run, computed from its records by the rules of vLLM's client. Pure.

pub mod ab_order;
pub(super) mod bootstrap;
pub mod client_saturation;
pub mod compare;
pub(super) mod failures;
pub mod goodput;
pub mod latency_stats;
pub mod overload;

use std::time::Duration;

use crate::record::{Answer, Record};
use crate::stats::goodput::Objective;

/// A latency of the report, in the order of vLLM's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// Time to first token.
    Ttft,
    /// Time per output token after the first; one value per request of at least two tokens.
    Tpot,
    /// Gaps between chunks, over all requests.
    Itl,
    /// End-to-end latency.
    E2el,
    /// Wait in the client for another request to end; only with a concurrency limit.
    ClientQueueTime,
    /// `ClientQueueTime` plus `E2el`; only with a concurrency limit and a finite rate.
    E2elIncludingClientQueue,
}

impl Metric {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 6] = [
        Self::Ttft,
        Self::Tpot,
        Self::Itl,
        Self::E2el,
        Self::ClientQueueTime,
        Self::E2elIncludingClientQueue,
    ];

    /// Its name in vLLM's JSON and in `--percentile-metrics`.
    pub fn key(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Tpot => "tpot",
            Self::Itl => "itl",
            Self::E2el => "e2el",
            Self::ClientQueueTime => "client_queue_time",
            Self::E2elIncludingClientQueue => "e2el_including_client_queue",
        }
    }
}

/// The distribution of a latency, in milliseconds. All 0 if there are no values.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Distribution {
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub median: f64,
    /// Standard deviation of the population.
    pub deviation: f64,
    /// The requested percentiles with their values, in the requested order.
    pub percentiles: Vec<(f64, f64)>,
}

/// The numbers of a run, over successful requests unless stated otherwise.
#[derive(Debug, Clone, PartialEq)]
pub struct Metrics {
    /// Length of the run in seconds, from before the first wait to the end of the last request.
    pub duration: f64,
    /// Requests that succeeded.
    pub completed: usize,
    /// Requests that failed.
    pub failed: usize,
    /// Prompt tokens.
    pub total_input_tokens: u64,
    /// Answer tokens.
    pub total_output_tokens: u64,
    /// Good requests per second. `None` without objectives.
    pub request_goodput: Option<f64>,
    /// Most chunks received within one second, counted from the first start.
    pub peak_output_throughput: f64,
    /// Most requests at the server within one second.
    pub peak_concurrent_requests: u64,
    /// The latencies that the run has, in the order of the table.
    pub latencies: Vec<(Metric, Distribution)>,
}

/// Settings of the computation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Selection<'a> {
    pub(super) percentiles: &'a [f64],
    pub(super) objectives: &'a [Objective],
    /// Whether the run has a concurrency limit, so that requests can wait in the client.
    pub(super) is_limited: bool,
    /// Whether requests arrived at a finite rate.
    pub(super) is_scheduled: bool,
}

impl Metrics {
    /// Computes the numbers. `prompt_lengths` has the length of each prompt as sent.
    pub(super) fn of(records: &[Record], prompt_lengths: &[u64], duration: Duration, selection: Selection<'_>) -> Self {
        let duration = duration.as_secs_f64();
        let answered: Vec<(&Record, &Answer)> = records
            .iter()
            .filter_map(|record| record.result.as_ref().ok().map(|answer| (record, answer)))
            .collect();
        let prompt_tokens = answered
            .iter()
            .map(|(record, answer)| answer.prompt_tokens.unwrap_or(prompt_lengths[record.index]));
        let good = answered
            .iter()
            .filter(|(_, answer)| selection.objectives.iter().all(|objective| objective.is_met(answer)))
            .count();
        let has_objectives = !selection.objectives.is_empty();
        let (peak_output_throughput, peak_concurrent_requests) = peaks(&answered);
        Self {
            duration,
            completed: answered.len(),
            failed: records.len() - answered.len(),
            total_input_tokens: prompt_tokens.sum(),
            total_output_tokens: answered.iter().map(|(_, answer)| answer.output_tokens()).sum(),
            request_goodput: has_objectives.then_some(good as f64 / duration),
            peak_output_throughput,
            peak_concurrent_requests,
            latencies: latencies(&answered, selection),
        }
    }

    /// Requests per second.
    pub fn request_throughput(&self) -> f64 {
        self.completed as f64 / self.duration
    }

    /// Answer tokens per second.
    pub fn output_throughput(&self) -> f64 {
        self.total_output_tokens as f64 / self.duration
    }

    /// Prompt and answer tokens per second.
    pub fn total_throughput(&self) -> f64 {
        (self.total_input_tokens + self.total_output_tokens) as f64 / self.duration
    }

    /// The distribution of one latency, if the run has it.
    pub fn latency(&self, metric: Metric) -> Option<&Distribution> {
        self.latencies
            .iter()
            .find(|(present, _)| *present == metric)
            .map(|(_, distribution)| distribution)
    }
}

fn latencies(answered: &[(&Record, &Answer)], selection: Selection<'_>) -> Vec<(Metric, Distribution)> {
    let values = |metric: Metric| -> Vec<f64> {
        let each = answered.iter();
        match metric {
            Metric::Ttft => each.map(|(_, answer)| answer.first_token.as_secs_f64()).collect(),
            Metric::Tpot => each.filter_map(|(_, answer)| answer.time_per_output_token()).collect(),
            Metric::Itl => each
                .flat_map(|(_, answer)| &answer.gaps)
                .map(Duration::as_secs_f64)
                .collect(),
            Metric::E2el => each.map(|(_, answer)| answer.latency.as_secs_f64()).collect(),
            Metric::ClientQueueTime => each.map(|(record, _)| record.queue_time().as_secs_f64()).collect(),
            Metric::E2elIncludingClientQueue => each
                .map(|(record, answer)| answer.latency.as_secs_f64() + record.queue_time().as_secs_f64())
                .collect(),
        }
    };
    let is_present = |metric: &Metric| match metric {
        Metric::Ttft | Metric::Tpot | Metric::Itl | Metric::E2el => true,
        Metric::ClientQueueTime => selection.is_limited,
        Metric::E2elIncludingClientQueue => selection.is_limited && selection.is_scheduled,
    };
    let present = Metric::ALL.into_iter().filter(is_present);
    present
        .map(|metric| (metric, Distribution::of_seconds(values(metric), selection.percentiles)))
        .collect()
}

/// vLLM's two peaks, over seconds counted from the first start: chunks received, and requests active in the second.
///
/// Both are too high: a chunk can hold several tokens or none, and requests that follow each other within a second
/// count as concurrent. They equal vLLM's numbers.
fn peaks(answered: &[(&Record, &Answer)]) -> (f64, u64) {
    let Some(first_start) = answered.iter().map(|(record, _)| record.started).min() else {
        return (0.0, 0);
    };
    let mut chunks = Vec::new();
    let mut requests = Vec::new();
    let add = |counts: &mut Vec<u64>, second: usize| {
        if counts.len() <= second {
            counts.resize(second + 1, 0);
        }
        counts[second] += 1;
    };
    let second =
        |instant: Duration| usize::try_from(instant.saturating_sub(first_start).as_secs()).unwrap_or(usize::MAX);
    for (record, answer) in answered {
        let mut instant = record.started + answer.first_token;
        add(&mut chunks, second(instant));
        for &gap in &answer.gaps {
            instant += gap;
            add(&mut chunks, second(instant));
        }
        for touched in second(record.started)..=second(record.started + answer.latency) {
            add(&mut requests, touched);
        }
    }
    let peak = |counts: Vec<u64>| counts.into_iter().max().unwrap_or(0);
    (peak(chunks) as f64, peak(requests))
}

impl Distribution {
    /// The distribution of values in seconds.
    pub(super) fn of_seconds(mut values: Vec<f64>, percentiles: &[f64]) -> Self {
        if values.is_empty() {
            let percentiles = percentiles.iter().map(|&percentile| (percentile, 0.0)).collect();
            return Self {
                percentiles,
                ..Self::default()
            };
        }
        let count = values.len() as f64;
        let mean = sum(&values) / count;
        let squares: Vec<f64> = values.iter().map(|value| (value - mean) * (value - mean)).collect();
        let variance = sum(&squares) / count;
        values.sort_unstable_by(f64::total_cmp);
        let at = |percentile| percentile_of_sorted(&values, percentile);
        Self {
            mean: mean * 1000.0,
            median: median_of_sorted(&values) * 1000.0,
            deviation: variance.sqrt() * 1000.0,
            percentiles: percentiles
                .iter()
                .map(|&percentile| (percentile, at(percentile) * 1000.0))
                .collect(),
        }
    }
}

/// numpy's pairwise sum, bit for bit: eight lanes, and halves for long lists.
fn sum(values: &[f64]) -> f64 {
    const LANES: usize = 8;
    const BLOCK: usize = 128;
    let count = values.len();
    if count < LANES {
        return values.iter().fold(0.0, |sum, value| sum + value);
    }
    if count > BLOCK {
        let half = count / 2 - count / 2 % LANES;
        return sum(&values[..half]) + sum(&values[half..]);
    }
    let (rows, rest) = values.as_chunks::<LANES>();
    let mut lanes = rows[0];
    for row in &rows[1..] {
        for (lane, value) in lanes.iter_mut().zip(row) {
            *lane += value;
        }
    }
    let pairs: [f64; 4] = std::array::from_fn(|pair| lanes[2 * pair] + lanes[2 * pair + 1]);
    let joined = (pairs[0] + pairs[1]) + (pairs[2] + pairs[3]);
    rest.iter().fold(joined, |sum, value| sum + value)
}

/// numpy's median. `sorted` is not empty.
fn median_of_sorted(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    }
}

/// numpy's default percentile: linear between the two nearest ranks, from the nearer one. `sorted` is not empty.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rank lies between 0 and the number of values"
)]
pub(super) fn percentile_of_sorted(sorted: &[f64], percentile: f64) -> f64 {
    let last = sorted.len() - 1;
    let rank = (percentile / 100.0).clamp(0.0, 1.0) * last as f64;
    let below = rank.floor() as usize;
    let (lower, upper) = (sorted[below], sorted[(below + 1).min(last)]);
    let (distance, place) = (upper - lower, rank - rank.floor());
    if place >= 0.5 {
        upper - distance * (1.0 - place)
    } else {
        lower + distance * place
    }
}

#[cfg(test)]
mod tests;
