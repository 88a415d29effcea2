//! The points of a sweep and the result of each. Pure.

use std::fmt;
use std::str::FromStr;

use serde_json::{Value, json};

use crate::record::Record;
use crate::report::Report;
use crate::stats::overload::QueueGrowth;
use crate::stats::{Distribution, Metric};
use crate::workload;

/// The setting that changes between points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// Requests per second in an open loop.
    Rate,
    /// Concurrent requests: each finished request is followed by the next.
    Concurrency,
}

/// The points of a sweep in ascending order.
#[derive(Debug, Clone, PartialEq)]
pub struct Points {
    /// The setting that changes.
    pub axis: Axis,
    /// Its values. Concurrency values are whole numbers.
    pub values: Vec<f64>,
}

/// Invalid points.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PointsError {
    /// Not of the form `rate=…` or `concurrency=…`.
    #[error("a sweep is written `rate=1,2,4` or `concurrency=1,8,64`, or with a range, as in `rate=1..16x2`")]
    Form,
    /// A list entry that is neither a number nor a range.
    #[error("`{0}` is neither a number from 0 up nor a range such as `1..16x2` (times 2) or `2..10+2` (plus 2)")]
    Part(String),
    /// A concurrency that is not a whole number from 1 to 65536.
    #[error("`{0}` is not a number of concurrent requests")]
    Whole(String),
    /// Too many points.
    #[error("a sweep has at most {} points", Points::MOST)]
    TooMany,
}

impl Axis {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Concurrency => "concurrency",
        }
    }
}

impl Points {
    const MOST: usize = 100;
    const MOST_CONCURRENT: f64 = 65_536.0;
}

impl FromStr for Points {
    type Err = PointsError;

    /// Parses `rate=1,2,4..32x2` or `concurrency=1,8..64+8`.
    fn from_str(text: &str) -> Result<Self, PointsError> {
        let (name, list) = text.split_once('=').ok_or(PointsError::Form)?;
        let axis = match name.trim() {
            "rate" => Axis::Rate,
            "concurrency" => Axis::Concurrency,
            _ => return Err(PointsError::Form),
        };
        let mut values = Vec::new();
        for part in list.split(',').map(str::trim) {
            let found = values_of(part).ok_or_else(|| PointsError::Part(part.to_owned()))?;
            let is_count = |value: &f64| value.fract() == 0.0 && (1.0..=Self::MOST_CONCURRENT).contains(value);
            if axis == Axis::Concurrency && !found.iter().all(is_count) {
                return Err(PointsError::Whole(part.to_owned()));
            }
            values.extend(found);
            if values.len() > Self::MOST {
                return Err(PointsError::TooMany);
            }
        }
        // Ascending, because a sweep ends where the server is overloaded.
        values.sort_unstable_by(f64::total_cmp);
        values.dedup();
        Ok(Self { axis, values })
    }
}

impl fmt::Display for Points {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let values: Vec<String> = self.values.iter().map(f64::to_string).collect();
        write!(formatter, "{} {}", self.axis.name(), values.join(", "))
    }
}

/// The values of one list entry: a number, or a range with its step.
fn values_of(part: &str) -> Option<Vec<f64>> {
    let positive = |text: &str| text.trim().parse().ok().filter(|value: &f64| *value > 0.0);
    let Some((first, rest)) = part.split_once("..") else {
        return Some(vec![positive(part)?]);
    };
    let (last, step): (_, Box<dyn Fn(f64) -> f64>) = if let Some((last, factor)) = rest.split_once('x') {
        let factor = positive(factor).filter(|factor| *factor > 1.0)?;
        (last, Box::new(move |value| value * factor))
    } else {
        let (last, summand) = rest.split_once('+')?;
        let summand = positive(summand)?;
        (last, Box::new(move |value| value + summand))
    };
    let (mut value, last) = (positive(first)?, positive(last).filter(|last| last.is_finite())?);
    let mut values = Vec::new();
    // With a tolerance, because steps such as 0.1 are not exact.
    while value <= last * (1.0 + 1e-9) && values.len() <= Points::MOST {
        values.push(value);
        value = step(value);
    }
    (!values.is_empty()).then_some(values)
}

/// The seed of the nth run, so that no run repeats the prompts of another, whose KV the server can still cache. The
/// first run keeps the seed.
pub fn seed(seed: u32, number: u32) -> u32 {
    if number == 0 {
        return seed;
    }
    workload::scramble(seed ^ number.wrapping_mul(0x9e37_79b9))
}

/// Whether the finished requests show an overload. Records can be in any order; requests still in flight are not
/// needed, because they are even slower.
pub fn is_overloaded(records: &[Record]) -> bool {
    let mut requests: Vec<(f64, f64)> = records
        .iter()
        .filter_map(|record| {
            let first_token = record.result.as_ref().ok()?.first_token;
            Some((record.scheduled.as_secs_f64(), first_token.as_secs_f64()))
        })
        .collect();
    requests.sort_unstable_by(|left, right| left.0.total_cmp(&right.0));
    QueueGrowth::of(&requests).is_some_and(QueueGrowth::is_overload)
}

/// Why the client limited the run, if it did.
pub fn why_invalid(report: &Report) -> Option<String> {
    let verdict = report.validity();
    (!verdict.is_valid()).then(|| verdict.reasons.join("; "))
}

/// The rate of answers, if there are enough of them.
fn served(records: &[Record]) -> Option<f64> {
    const LEAST: usize = 5;
    let end = |record: &Record| Some((record.started + record.result.as_ref().ok()?.latency).as_secs_f64());
    let ends: Vec<f64> = records.iter().filter_map(end).collect();
    let first = ends.iter().copied().reduce(f64::min)?;
    let last = ends.iter().copied().reduce(f64::max)?;
    (ends.len() >= LEAST && last > first).then(|| (ends.len() - 1) as f64 / (last - first))
}

/// The result of one point.
#[derive(Debug, Clone, PartialEq)]
pub struct SweepPoint {
    /// Requested rate or concurrency.
    pub asked: f64,
    /// Requests per second sent, until the last one.
    pub sent: f64,
    /// Requests per second answered, from the first to the last answer. The length of the last answers does not matter.
    pub served: f64,
    /// Failed requests.
    pub failed: usize,
    /// Time to first token, in milliseconds.
    pub ttft: Distribution,
    /// Time per output token, in milliseconds.
    pub tpot: Distribution,
    /// Answer tokens per second.
    pub output_throughput: f64,
    /// Good requests per second. `None` without objectives.
    pub goodput: Option<f64>,
    /// Whether the server was overloaded.
    pub is_overloaded: bool,
    /// Whether the run ended before all its requests.
    pub is_partial: bool,
    /// Why the run is invalid, if it is.
    pub invalid: Option<String>,
}

impl SweepPoint {
    /// The result of a point from its report.
    pub fn of(asked: f64, axis: Axis, report: &Report) -> Self {
        let latency = |metric| report.metrics.latency(metric).cloned().unwrap_or_default();
        let last = report
            .records
            .iter()
            .map(|record| record.started)
            .max()
            .unwrap_or_default();
        let released = report.records.len() + report.dropped;
        // The send times of dropped requests are unknown, but they were sent until the end.
        let sending = if report.dropped > 0 {
            report.metrics.duration
        } else {
            last.as_secs_f64()
        };
        Self {
            asked,
            sent: released as f64 / sending.max(f64::MIN_POSITIVE),
            served: served(&report.records).unwrap_or_else(|| report.metrics.request_throughput()),
            failed: report.failed(),
            ttft: latency(Metric::Ttft),
            tpot: latency(Metric::Tpot),
            output_throughput: report.metrics.output_throughput(),
            goodput: report.metrics.request_goodput,
            is_overloaded: axis == Axis::Rate && is_overloaded(&report.records),
            is_partial: report.is_partial(),
            invalid: why_invalid(report),
        }
    }

    /// The point as JSON.
    pub fn to_json(&self) -> Value {
        json!({
            "asked": if self.asked.is_finite() { json!(self.asked) } else { json!("inf") },
            "sent": self.sent,
            "served": self.served,
            "failed": self.failed,
            "overloaded": self.is_overloaded,
            "partial": self.is_partial,
            "valid": self.invalid.is_none(),
            "why_invalid": self.invalid,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn values(text: &str) -> Vec<f64> {
        text.parse::<Points>().unwrap().values
    }

    #[test]
    fn lists_and_ranges_name_points() {
        assert_eq!(values("rate=1,2.5, 4"), [1.0, 2.5, 4.0]);
        assert_eq!(values("rate=1..16x2"), [1.0, 2.0, 4.0, 8.0, 16.0]);
        assert_eq!(values("rate=1..15x2"), [1.0, 2.0, 4.0, 8.0]);
        assert_eq!(values("concurrency=2..10+4,1"), [1.0, 2.0, 6.0, 10.0]);
        assert_eq!(values("rate=0.1..0.5+0.1").len(), 5);
        assert_eq!(values("rate=8,1,8,inf"), [1.0, 8.0, f64::INFINITY]);
    }

    #[test]
    fn invalid_points_are_rejected() {
        let refused = |text: &str| text.parse::<Points>().unwrap_err();
        for text in ["1,2", "qps=1", ""] {
            assert_eq!(refused(text), PointsError::Form, "{text}");
        }
        for part in [
            "", "-1", "0", "NaN", "1..", "1..4", "1..4x1", "1..4x0", "4..1x2", "1..inf+1", "1..4+x", "x",
        ] {
            assert_eq!(refused(&format!("rate={part}")), PointsError::Part(part.to_owned()));
        }
        for part in ["1.5", "1..4x1.5", "inf", "100000"] {
            assert_eq!(
                refused(&format!("concurrency={part}")),
                PointsError::Whole(part.to_owned())
            );
        }
        assert_eq!(refused("rate=1..1000+1"), PointsError::TooMany);
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_rejected(text in "(rate|concurrency)=[0-9.x+,]{0,20}") {
            if let Ok(points) = text.parse::<Points>() {
                prop_assert!(points.values.is_sorted() && !points.values.is_empty());
                prop_assert!(points.values.iter().all(|value| *value > 0.0));
            }
        }

        #[test]
        fn the_runs_of_a_sweep_have_different_seeds(first: u32) {
            let mut seeds: Vec<u32> = (0..100).map(|number| seed(first, number)).collect();
            prop_assert_eq!(seeds[0], first);
            seeds.sort_unstable();
            seeds.dedup();
            prop_assert!(seeds.len() >= 99);
        }
    }
}
