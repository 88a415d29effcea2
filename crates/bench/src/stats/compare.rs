//! Compares two saved results measure by measure, with confidence intervals. Pure.

use serde_json::{Value, json};

use crate::saved::SavedResult;
use crate::stats::Metric;
use crate::stats::bootstrap::{Column, Interval, Statistic, ratio_interval};

/// The change of one measure between two runs.
#[derive(Debug, Clone, PartialEq)]
pub struct MetricChange {
    /// The name of the measure with its unit: `Mean TTFT (ms)`.
    pub label: String,
    /// Its key in vLLM's JSON.
    pub key: String,
    /// Value of the first run.
    pub before: f64,
    /// Value of the second run.
    pub after: f64,
    /// Relative change from the first to the second value. `None` if the first is 0.
    pub change: Option<f64>,
    /// 95 % confidence interval of the change.
    pub interval: Option<(f64, f64)>,
    /// The smallest change that runs of this size detect with a probability of 80 %.
    pub detectable: Option<f64>,
    /// Whether the change is significant.
    pub verdict: ChangeVerdict,
}

/// Whether a change is significant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeVerdict {
    /// A significantly lower latency.
    Faster,
    /// A significantly higher latency.
    Slower,
    /// No significant change.
    NoDifference,
    /// Too few requests for an interval.
    TooFew,
    /// The file has no values of single requests, so there is no interval.
    NotKnown,
}

impl ChangeVerdict {
    /// The text for people and JSON.
    pub fn words(self) -> &'static str {
        match self {
            Self::Faster => "faster",
            Self::Slower => "slower",
            Self::NoDifference => "no difference seen",
            Self::TooFew => "too few requests to tell",
            Self::NotKnown => "",
        }
    }
}

/// Fewest requests for an interval.
const FEWEST: usize = 10;

/// A change of this many standard errors is detected with 80 % power at a 5 % level: 1.96 + 0.84.
const DETECTED_ERRORS: f64 = 2.8;

/// Smaller changes are rounding errors.
const ROUNDING: f64 = 1e-6;

/// Settings that must be equal in both runs.
const SETTINGS: [&str; 8] = [
    "backend",
    "model_id",
    "num_prompts",
    "request_rate",
    "burstiness",
    "max_concurrency",
    "ramp_up_strategy",
    "ramp_up_end_rps",
];

/// Compares two saved results, measure by measure.
pub fn saved_results(before: &SavedResult, after: &SavedResult) -> Vec<MetricChange> {
    let mut rows = Vec::new();
    for metric in [Metric::Ttft, Metric::Tpot, Metric::Itl, Metric::E2el] {
        for statistic in statistics(before, after, metric) {
            let values = before.value(metric, statistic).zip(after.value(metric, statistic));
            let columns = before.column(metric).zip(after.column(metric));
            rows.extend(values.map(|values| latency(metric, statistic, values, columns, false)));
        }
    }
    for (key, label) in [
        ("request_throughput", "Request throughput (req/s)"),
        ("request_goodput", "Request goodput (req/s)"),
        ("output_throughput", "Output throughput (tok/s)"),
        ("total_token_throughput", "Total throughput (tok/s)"),
    ] {
        if let (Some(before), Some(after)) = (before.number(key), after.number(key)) {
            rows.push(MetricChange {
                label: label.to_owned(),
                key: key.to_owned(),
                before,
                after,
                change: change(before, after),
                interval: None,
                detectable: None,
                verdict: ChangeVerdict::NotKnown,
            });
        }
    }
    rows
}

/// The mean, the median and every percentile that either file has.
fn statistics(before: &SavedResult, after: &SavedResult, metric: Metric) -> Vec<Statistic> {
    let mut percentiles = before.percentiles(metric);
    percentiles.extend(after.percentiles(metric));
    if percentiles.is_empty() {
        percentiles.push(99.0);
    }
    percentiles.push(50.0);
    percentiles.sort_unstable_by(f64::total_cmp);
    percentiles.dedup();
    let mut all = vec![Statistic::Mean];
    all.extend(percentiles.into_iter().map(Statistic::Percentile));
    all
}

/// The change of a latency. `values` are in milliseconds. With `paired`, the columns have the same requests.
pub fn latency(
    metric: Metric,
    statistic: Statistic,
    values: (f64, f64),
    columns: Option<(&Column, &Column)>,
    paired: bool,
) -> MetricChange {
    let (before, after) = values;
    // A zero value has no ratio.
    let comparable = columns.filter(|_| values.0 > 0.0 && values.1 > 0.0);
    let interval = comparable.map(|(before, after)| {
        if is_enough(before, statistic) && is_enough(after, statistic) {
            ratio_interval(before, after, statistic, paired).ok_or(ChangeVerdict::TooFew)
        } else {
            Err(ChangeVerdict::TooFew)
        }
    });
    let verdict = match interval {
        None => ChangeVerdict::NotKnown,
        Some(Err(verdict)) => verdict,
        Some(Ok(Interval { high, .. })) if high < 1.0 - ROUNDING => ChangeVerdict::Faster,
        Some(Ok(Interval { low, .. })) if low > 1.0 + ROUNDING => ChangeVerdict::Slower,
        Some(Ok(_)) => ChangeVerdict::NoDifference,
    };
    let interval = interval.and_then(Result::ok);
    let key = metric.key();
    let (name, prefix) = match statistic {
        Statistic::Mean => ("Mean".to_owned(), "mean".to_owned()),
        Statistic::Percentile(50.0) => ("Median".to_owned(), "median".to_owned()),
        Statistic::Percentile(percentile) => (format!("P{percentile}"), format!("p{percentile}")),
    };
    MetricChange {
        label: format!("{name} {} (ms)", key.to_uppercase()),
        key: format!("{prefix}_{key}_ms"),
        before,
        after,
        change: change(before, after),
        interval: interval.map(|interval| (interval.low - 1.0, interval.high - 1.0)),
        detectable: interval.map(|interval| (DETECTED_ERRORS * interval.error).exp_m1()),
        verdict,
    }
}

fn change(before: f64, after: f64) -> Option<f64> {
    (before > 0.0).then(|| after / before - 1.0)
}

/// Whether there are enough values: a percentile needs one value beyond it.
fn is_enough(column: &Column, statistic: Statistic) -> bool {
    let beyond = match statistic {
        Statistic::Mean => f64::INFINITY,
        Statistic::Percentile(percentile) => column.len() as f64 * (percentile / 100.0).min(1.0 - percentile / 100.0),
    };
    column.valued() >= FEWEST && beyond >= 0.999
}

/// Differences in settings and other reasons against the comparison, one sentence each.
pub fn caveats(before: &SavedResult, after: &SavedResult) -> Vec<String> {
    let mut caveats = Vec::new();
    for key in SETTINGS {
        let [left, right] = [before, after].map(|saved| saved.document.get(key).unwrap_or(&Value::Null));
        if !is_same(left, right) {
            caveats.push(format!("`{key}` is {left} in the first and {right} in the second"));
        }
    }
    let lengths =
        |saved: &SavedResult, key| Some(saved.number(key)? / saved.number("completed").filter(|&count| count > 0.0)?);
    for (key, what) in [("total_input_tokens", "prompts"), ("total_output_tokens", "answers")] {
        if let (Some(left), Some(right)) = (lengths(before, key), lengths(after, key))
            && (left / right - 1.0).abs() > 0.01
        {
            caveats.push(format!(
                "{what} have {left:.0} tokens in the first and {right:.0} in the second"
            ));
        }
    }
    for (saved, which) in [(before, "first"), (after, "second")] {
        match saved.number("failed") {
            Some(failed) if failed > 0.0 => caveats.push(format!("{failed} requests of the {which} failed")),
            _ => {}
        }
        if saved.results > 1 {
            caveats.push(format!(
                "the {which} file has {} results: the last one is used",
                saved.results
            ));
        }
        if saved
            .document
            .get("xpyd")
            .is_some_and(|own| own["valid"] == json!(false))
        {
            caveats.push(format!("the {which} run is marked as not valid"));
        }
    }
    caveats
}

fn is_same(left: &Value, right: &Value) -> bool {
    match (left.as_f64(), right.as_f64()) {
        (Some(left), Some(right)) => left.total_cmp(&right).is_eq(),
        _ => left == right,
    }
}

/// The changes as a JSON object by key.
pub fn to_json(rows: &[MetricChange]) -> Value {
    let entry = |row: &MetricChange| {
        let value = json!({
            "label": row.label,
            "a": row.before,
            "b": row.after,
            "change": row.change,
            "interval": row.interval.map(|(low, high)| [low, high]),
            "detectable": row.detectable,
            "verdict": Some(row.verdict.words()).filter(|words| !words.is_empty()),
        });
        (row.key.clone(), value)
    };
    Value::Object(rows.iter().map(entry).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A detailed result of `count` requests with a time to first token of `base` to 1.2 × `base`.
    fn result(base: f64, count: usize) -> Value {
        let spread = |place: usize| base * (1.0 + (place * 37 % 20) as f64 / 100.0);
        let first_tokens: Vec<f64> = (0..count).map(spread).collect();
        let latencies: Vec<f64> = first_tokens.iter().map(|first| first + 0.1).collect();
        json!({
            "backend": "openai", "model_id": "m", "num_prompts": count, "request_rate": "inf",
            "duration": 2.0, "completed": count, "failed": 0, "request_throughput": 1.0, "request_goodput": null,
            "total_input_tokens": 100 * count, "total_output_tokens": 11 * count,
            "ttfts": first_tokens, "latencies": latencies, "output_lens": vec![11; count],
            "itls": vec![vec![0.01; 10]; count], "errors": vec![""; count],
        })
    }

    fn rows(before: &Value, after: &Value) -> Vec<MetricChange> {
        let read = |value: &Value| SavedResult::read(&value.to_string()).unwrap();
        saved_results(&read(before), &read(after))
    }

    fn row<'a>(rows: &'a [MetricChange], key: &str) -> &'a MetricChange {
        rows.iter().find(|row| row.key == key).unwrap()
    }

    #[test]
    fn significant_changes_are_named() {
        let rows = rows(&result(0.2, 200), &result(0.1, 200));
        let ttft = row(&rows, "mean_ttft_ms");
        assert_eq!(ttft.verdict, ChangeVerdict::Faster);
        let (low, high) = ttft.interval.unwrap();
        assert!(low < -0.49 && high > -0.51 && low < high, "{ttft:?}");
        assert_eq!(row(&rows, "p99_ttft_ms").verdict, ChangeVerdict::Faster);
        assert_eq!(row(&rows, "median_tpot_ms").verdict, ChangeVerdict::NoDifference);
        assert_eq!(row(&rows, "request_throughput").change, Some(0.0));
    }

    #[test]
    fn thirty_requests_have_no_p99_interval() {
        let rows = rows(&result(0.1, 30), &result(0.2, 30));
        assert_eq!(row(&rows, "mean_ttft_ms").verdict, ChangeVerdict::Slower);
        let p99 = row(&rows, "p99_ttft_ms");
        assert_eq!((p99.verdict, p99.interval), (ChangeVerdict::TooFew, None));
        // There are enough gaps.
        assert_eq!(row(&rows, "p99_itl_ms").verdict, ChangeVerdict::NoDifference);
    }

    #[test]
    fn plain_files_have_no_verdict() {
        let plain =
            |mean: f64| json!({"duration": 1.0, "completed": 30, "request_throughput": 1.0, "mean_ttft_ms": mean});
        let rows = rows(&plain(100.0), &plain(150.0));
        let row = row(&rows, "mean_ttft_ms");
        assert_eq!((row.change, row.verdict), (Some(0.5), ChangeVerdict::NotKnown));
        assert_eq!(rows.len(), 2);
    }

    #[test]
    fn different_settings_are_caveats() {
        let mut after = result(0.1, 40);
        after["request_rate"] = json!(2.0);
        after["total_input_tokens"] = json!(8000);
        after["failed"] = json!(3);
        after["xpyd"] = json!({"valid": false});
        let read = |value: &Value| SavedResult::read(&value.to_string()).unwrap();
        assert_eq!(
            caveats(&read(&result(0.1, 40)), &read(&after)),
            [
                "`request_rate` is \"inf\" in the first and 2.0 in the second",
                "prompts have 100 tokens in the first and 200 in the second",
                "3 requests of the second failed",
                "the second run is marked as not valid",
            ]
        );
        assert_eq!(caveats(&read(&after), &read(&after)).len(), 4);
    }
}
