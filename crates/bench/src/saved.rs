//! Reads saved results of `vllm bench serve` or `xpyd bench`. Pure: the input is a text.

use serde_json::{Map, Value};

use crate::stats::Metric;
use crate::stats::bootstrap::{Column, Statistic};

/// A saved result.
#[derive(Debug, Clone)]
pub struct SavedResult {
    /// The last result of the text.
    pub document: Map<String, Value>,
    /// Number of results in the text: `--append-result` writes one per line.
    pub results: usize,
    /// Values of single requests; a plain file only has the end-to-end latencies.
    columns: Vec<(Metric, Column)>,
}

/// Why a text is not a saved result.
#[derive(Debug, thiserror::Error)]
pub enum SavedResultError {
    /// Not JSON.
    #[error("the file is not JSON")]
    Json(#[source] serde_json::Error),
    /// The file is empty.
    #[error("the file is empty")]
    Empty,
    /// JSON without the keys of a result.
    #[error("the file is not a saved result: `{0}` is missing")]
    Missing(&'static str),
    /// A result of several runs.
    #[error("the file is the result of `--{0}`, which has more than one run")]
    ManyRuns(String),
    /// A list of a different length.
    #[error("`{field}` has {length} entries for {expected} requests")]
    Length {
        /// Key of the list.
        field: &'static str,
        /// Length of the list.
        length: usize,
        /// Length of the other lists.
        expected: usize,
    },
    /// A list with entries of a wrong type.
    #[error("`{0}` has values of a wrong type")]
    Type(&'static str),
}

/// Latencies that a file has values of.
const KEPT: [Metric; 4] = [Metric::Ttft, Metric::Tpot, Metric::Itl, Metric::E2el];

impl SavedResult {
    /// Reads the last result of a text.
    ///
    /// # Errors
    /// When it is not the result of a single run, or its lists contradict each other.
    pub fn read(text: &str) -> Result<Self, SavedResultError> {
        let mut last = None;
        let mut results = 0;
        for document in serde_json::Deserializer::from_str(text).into_iter::<Value>() {
            last = Some(document.map_err(SavedResultError::Json)?);
            results += 1;
        }
        let Value::Object(document) = last.ok_or(SavedResultError::Empty)? else {
            return Err(SavedResultError::Missing("duration"));
        };
        if let Some(mode) = document.get("xpyd_bench").and_then(Value::as_str) {
            return Err(SavedResultError::ManyRuns(mode.to_owned()));
        }
        for field in ["duration", "completed", "request_throughput"] {
            if !document.get(field).is_some_and(Value::is_number) {
                return Err(SavedResultError::Missing(field));
            }
        }
        let columns = columns(&document)?;
        Ok(Self {
            document,
            results,
            columns,
        })
    }

    /// A top-level number of the result.
    pub fn number(&self, key: &str) -> Option<f64> {
        self.document.get(key).and_then(Value::as_f64)
    }

    /// Values of single requests.
    pub fn column(&self, metric: Metric) -> Option<&Column> {
        let found = self.columns.iter().find(|(present, _)| *present == metric);
        found.map(|(_, column)| column).filter(|column| !column.is_empty())
    }

    /// A statistic in milliseconds: from the file, else from the values of single requests.
    pub fn value(&self, metric: Metric, statistic: Statistic) -> Option<f64> {
        let written = self.number(&format!("{}_{}_ms", name(statistic), metric.key()));
        written.or_else(|| Some(self.column(metric)?.value(statistic)? * 1000.0))
    }

    /// The percentiles of a latency in the file, without the median.
    pub fn percentiles(&self, metric: Metric) -> Vec<f64> {
        let end = format!("_{}_ms", metric.key());
        let keys = self.document.keys();
        keys.filter_map(|key| key.strip_suffix(&end)?.strip_prefix('p')?.parse().ok())
            .collect()
    }
}

/// The name of a statistic in keys.
fn name(statistic: Statistic) -> String {
    match statistic {
        Statistic::Mean => "mean".to_owned(),
        Statistic::Percentile(50.0) => "median".to_owned(),
        Statistic::Percentile(percentile) => format!("p{percentile}"),
    }
}

/// The values of single requests in seconds, as far as the file has them.
fn columns(document: &Map<String, Value>) -> Result<Vec<(Metric, Column)>, SavedResultError> {
    let Some(latencies) = list(document, "latencies", Value::as_f64)? else {
        return Ok(Vec::new());
    };
    let count = latencies.len();
    let errors = list(document, "errors", |value| {
        Some(value.as_str().unwrap_or("-").to_owned())
    })?;
    let first_tokens = list(document, "ttfts", Value::as_f64)?;
    let tokens = list(document, "output_lens", Value::as_u64)?;
    let gaps = list(document, "itls", |value| {
        value.as_array()?.iter().map(Value::as_f64).collect::<Option<Vec<_>>>()
    })?;
    for (field, length) in [
        ("errors", errors.as_ref().map(Vec::len)),
        ("ttfts", first_tokens.as_ref().map(Vec::len)),
        ("output_lens", tokens.as_ref().map(Vec::len)),
        ("itls", gaps.as_ref().map(Vec::len)),
    ] {
        if let Some(length) = length.filter(|length| *length != count) {
            return Err(SavedResultError::Length {
                field,
                length,
                expected: count,
            });
        }
    }
    // A failed request has no latency in a plain file, and an error in a detailed one.
    let answered = |place: usize| match &errors {
        Some(errors) => errors[place].is_empty(),
        None => latencies[place] > 0.0,
    };
    let values = |metric: Metric, place: usize| -> Option<Vec<f64>> {
        let one = match metric {
            Metric::Ttft => first_tokens.as_ref()?[place],
            Metric::Tpot => {
                let later = tokens.as_ref()?[place].saturating_sub(1);
                let decoding = latencies[place] - first_tokens.as_ref()?[place];
                return Some((later > 0).then(|| decoding / later as f64).into_iter().collect());
            }
            Metric::Itl => return Some(gaps.as_ref()?[place].clone()),
            _ => latencies[place],
        };
        Some(vec![one])
    };
    let column = |metric: Metric| {
        let each = (0..count).map(|place| {
            let values = answered(place).then(|| values(metric, place));
            values.flatten().unwrap_or_default()
        });
        (metric, Column::new(each))
    };
    Ok(KEPT.into_iter().map(column).collect())
}

/// A list of the file; `None` if it is missing.
fn list<T>(
    document: &Map<String, Value>,
    field: &'static str,
    entry: impl Fn(&Value) -> Option<T>,
) -> Result<Option<Vec<T>>, SavedResultError> {
    match document.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(entries)) => {
            let read: Option<Vec<T>> = entries.iter().map(entry).collect();
            read.map(Some).ok_or(SavedResultError::Type(field))
        }
        Some(_) => Err(SavedResultError::Type(field)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn detailed() -> Value {
        json!({
            "duration": 2.0, "completed": 2, "failed": 1, "request_throughput": 1.0, "mean_ttft_ms": 150.0,
            "p99.9_ttft_ms": 199.9, "median_ttft_ms": 150.0,
            "latencies": [1.1, 0.0, 0.2], "ttfts": [0.1, 0.0, 0.2], "output_lens": [11, 0, 1],
            "itls": [[0.5, 0.5], [], []], "errors": ["", "HTTP 500", ""],
        })
    }

    #[test]
    fn failed_requests_and_one_token_answers_have_no_values() {
        let saved = SavedResult::read(&detailed().to_string()).unwrap();
        let lengths = KEPT.map(|metric| saved.column(metric).unwrap().len());
        assert_eq!(lengths, [2, 1, 2, 2]);
        let tpot = saved.value(Metric::Tpot, Statistic::Mean).unwrap();
        assert!((tpot - 100.0).abs() < 1e-9, "{tpot}");
        assert_eq!(saved.value(Metric::Ttft, Statistic::Mean), Some(150.0));
        assert_eq!(saved.percentiles(Metric::Ttft), [99.9]);
    }

    #[test]
    fn a_plain_file_only_has_end_to_end_latencies() {
        let mut plain = detailed();
        for key in ["ttfts", "output_lens", "itls", "errors"] {
            plain.as_object_mut().unwrap().remove(key);
        }
        let saved = SavedResult::read(&plain.to_string()).unwrap();
        assert_eq!(saved.column(Metric::E2el).unwrap().len(), 2);
        assert!(saved.column(Metric::Ttft).is_none());
    }

    #[test]
    fn the_last_of_several_results_is_used() {
        let mut second = detailed();
        second["mean_ttft_ms"] = json!(7.0);
        let saved = SavedResult::read(&format!("{}\n{second}\n", detailed())).unwrap();
        assert_eq!((saved.results, saved.number("mean_ttft_ms")), (2, Some(7.0)));
    }

    #[test]
    fn invalid_results_are_rejected_with_the_reason() {
        let refused = |text: &str| SavedResult::read(text).unwrap_err().to_string();
        assert_eq!(refused("x"), "the file is not JSON");
        assert_eq!(refused(" "), "the file is empty");
        assert_eq!(refused("[]"), "the file is not a saved result: `duration` is missing");
        assert_eq!(
            refused("{\"duration\": 1}"),
            "the file is not a saved result: `completed` is missing"
        );
        assert_eq!(
            refused("{\"xpyd_bench\": \"sweep\"}"),
            "the file is the result of `--sweep`, which has more than one run"
        );
        let mut short = detailed();
        short["ttfts"] = json!([1.0]);
        assert_eq!(refused(&short.to_string()), "`ttfts` has 1 entries for 3 requests");
        short["ttfts"] = json!("x");
        assert_eq!(refused(&short.to_string()), "`ttfts` has values of a wrong type");
    }
}
