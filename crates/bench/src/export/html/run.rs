//! A run as the report needs it, read from the result file of xpyd or `vllm bench serve`.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};

use super::number::finite;
use crate::latency_breakdown::{RequestStages, Stage};
use crate::record::{Answer, Record};
use crate::report::Report;

/// Most requests of a file.
const MAX_REQUESTS: usize = 1_000_000;

/// Why a file cannot be reported.
#[derive(Debug, thiserror::Error)]
pub enum ResultFileError {
    /// Not JSON, or values of another type than vLLM's.
    #[error("the file is not a result of `xpyd bench` or `vllm bench serve`")]
    Malformed(#[from] serde_json::Error),
    /// An empty file.
    #[error("the file is empty")]
    Empty,
    /// JSON without the keys of a result.
    #[error("the file is not a result of `xpyd bench` or `vllm bench serve`: it has no `{0}`")]
    Missing(&'static str),
    /// Too many requests.
    #[error("the file has {0} requests; the limit is 1000000")]
    TooMany(usize),
}

/// The result of a run with the keys of its file. Times are in seconds unless the name says otherwise.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Run {
    pub(super) date: String,
    pub(super) backend: String,
    pub(super) model_id: String,
    pub(super) num_prompts: usize,
    /// A number, or `"inf"`.
    pub(super) request_rate: Value,
    pub(super) burstiness: Option<f64>,
    pub(super) max_concurrency: Option<u64>,
    pub(super) duration: f64,
    pub(super) completed: usize,
    pub(super) failed: usize,
    pub(super) total_input_tokens: u64,
    pub(super) total_output_tokens: u64,
    pub(super) request_throughput: f64,
    pub(super) request_goodput: Option<f64>,
    pub(super) output_throughput: Option<f64>,
    pub(super) total_token_throughput: Option<f64>,
    pub(super) max_output_tokens_per_s: Option<f64>,
    pub(super) max_concurrent_requests: Option<f64>,
    input_lens: Vec<Option<u64>>,
    output_lens: Vec<Option<u64>>,
    ttfts: Vec<f64>,
    itls: Vec<Vec<f64>>,
    latencies: Vec<f64>,
    start_times: Vec<f64>,
    queue_times: Vec<f64>,
    errors: Vec<String>,
    /// The texts are not needed, and they are most of a file.
    generated_texts: IgnoredAny,
    server_queue_times: IgnoredAny,
    server_ttfts: IgnoredAny,
    /// xpyd's additions.
    pub(super) xpyd: Value,
    /// Latencies by name, metadata, and unknown keys.
    #[serde(flatten)]
    pub(super) more: Map<String, Value>,
    #[serde(skip)]
    pub(super) requests: Vec<Request>,
}

/// One request.
#[derive(Debug, Clone)]
pub(super) struct Request {
    /// Index in the workload, from 0.
    pub(super) index: usize,
    /// Send time since the first release.
    pub(super) started: f64,
    /// Time waited in the client before.
    pub(super) queued: f64,
    pub(super) input_tokens: Option<u64>,
    pub(super) output_tokens: u64,
    /// Its stages and engines, if the server reported them.
    pub(super) reported: Option<ReportedStages>,
    /// The times of its answer, or its error.
    pub(super) result: Result<Timing, String>,
}

/// The stages and engines of a request.
#[derive(Debug, Clone)]
pub(super) struct ReportedStages {
    /// The engines: `prefiller1 → decoder2`.
    pub(super) pair: String,
    /// The length of each of [`Stage::ALL`] in seconds.
    pub(super) stages: [f64; Stage::ALL.len()],
}

/// The times of an answer, since the request was sent.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Timing {
    pub(super) first_token: f64,
    pub(super) gaps: Vec<f64>,
    pub(super) latency: f64,
}

impl Run {
    /// Reads a result file. The last of several results is used.
    pub(super) fn read(text: &str) -> Result<Self, ResultFileError> {
        let last = text.lines().rfind(|line| !line.trim().is_empty());
        // One line per result, or one result over many lines.
        let mut run: Self = match last.map(serde_json::from_str) {
            None => return Err(ResultFileError::Empty),
            Some(Ok(run)) => run,
            Some(Err(_)) => serde_json::from_str(text)?,
        };
        if run.duration <= 0.0 {
            return Err(ResultFileError::Missing("duration"));
        }
        let count = run.latencies.len();
        if count > MAX_REQUESTS {
            return Err(ResultFileError::TooMany(count));
        }
        run.requests = run.listed();
        Ok(run)
    }

    /// The run as its file would have it.
    pub(super) fn of(report: &Report) -> Self {
        // Without its lists: they are the largest part and already available.
        let totals = report.to_json(false);
        let mut run: Self = serde_json::from_value(totals).expect("the result file has the result file's keys");
        let first = report.records.iter().map(|record| record.released).min();
        let since_first = |instant: std::time::Duration| instant.saturating_sub(first.unwrap_or_default());
        let requests = report.records.iter().map(|record| Request {
            index: record.index,
            started: since_first(record.started).as_secs_f64(),
            queued: record.queue_time().as_secs_f64(),
            input_tokens: match &record.result {
                Ok(Answer {
                    prompt_tokens: Some(counted),
                    ..
                }) => Some(*counted),
                _ => report.prompt_lengths.get(record.index).copied(),
            },
            output_tokens: record.result.as_ref().map_or(0, Answer::output_tokens),
            reported: RequestStages::of(record).map(ReportedStages::from),
            result: match &record.result {
                Ok(answer) => Ok(Timing {
                    first_token: answer.first_token.as_secs_f64(),
                    gaps: answer.gaps.iter().map(std::time::Duration::as_secs_f64).collect(),
                    latency: answer.latency.as_secs_f64(),
                }),
                Err(cause) => Err(cause.clone()),
            },
        });
        run.requests = requests.collect();
        run
    }

    /// The requests of a detailed file; none of a plain one.
    fn listed(&mut self) -> Vec<Request> {
        let count = self.start_times.len().min(self.ttfts.len()).min(self.latencies.len());
        let queued = |index: usize| finite(self.queue_times.get(index).copied().unwrap_or(0.0));
        let first = (0..count).map(|index| finite(self.start_times[index]) - queued(index));
        let first = first.fold(f64::INFINITY, f64::min);
        let mut gaps = std::mem::take(&mut self.itls);
        gaps.resize(count, Vec::new());
        let requests = gaps.into_iter().enumerate().map(|(index, gaps)| {
            let error = self.errors.get(index).filter(|error| !error.is_empty());
            let timing = Timing {
                first_token: finite(self.ttfts[index]),
                gaps: gaps.into_iter().map(finite).collect(),
                latency: finite(self.latencies[index]),
            };
            Request {
                index,
                started: finite(self.start_times[index]) - first,
                queued: queued(index),
                input_tokens: self.input_lens.get(index).copied().flatten(),
                output_tokens: self.output_lens.get(index).copied().flatten().unwrap_or(0),
                reported: self
                    .xpyd
                    .get("request_stages")
                    .and_then(|entries| ReportedStages::read(entries.get(index)?)),
                // vLLM's client keeps the latencies of failed requests at 0, and some errors empty.
                result: match error {
                    Some(error) => Err(shortened(error)),
                    None if timing.latency == 0.0 => Err("no reason was recorded".to_owned()),
                    None => Ok(timing),
                },
            }
        });
        requests.collect()
    }

    /// The answers with their requests.
    pub(super) fn answered(&self) -> impl Iterator<Item = (&Request, &Timing)> {
        let requests = self.requests.iter();
        requests.filter_map(|request| request.result.as_ref().ok().map(|timing| (request, timing)))
    }

    /// A latency by its key.
    pub(super) fn latency(&self, key: &str) -> Option<f64> {
        self.more.get(key).and_then(Value::as_f64)
    }

    /// The objective of `ttft`, `tpot` or `e2el` in seconds.
    pub(super) fn objective(&self, name: &str) -> Option<f64> {
        let milliseconds = self.xpyd.get("objectives")?.get(name)?.as_f64()?;
        Some(milliseconds / 1000.0)
    }

    /// The requested rate; `None` if all were sent at once or it is unknown.
    pub(super) fn rate(&self) -> Option<f64> {
        self.request_rate.as_f64().filter(|rate| rate.is_finite())
    }
}

/// One entry per record: null, or its engines and the lengths of its stages in milliseconds. Null if no record has
/// stages.
pub(super) fn stages_to_json(records: &[Record]) -> Value {
    let entry = |record: &Record| {
        let reported = ReportedStages::from(RequestStages::of(record)?);
        let lengths = Stage::ALL
            .into_iter()
            .zip(reported.stages)
            .filter(|(_, length)| *length > 0.0);
        let stages: Map<String, Value> = lengths
            .map(|(stage, length)| (stage.key().to_owned(), json!((length * 1e6).round() / 1e3)))
            .collect();
        Some(json!({"pair": reported.pair, "ms": stages}))
    };
    let entries: Vec<Option<Value>> = records.iter().map(entry).collect();
    if entries.iter().all(Option::is_none) {
        Value::Null
    } else {
        json!(entries)
    }
}

impl ReportedStages {
    /// Reads an entry of [`stages_to_json`].
    fn read(entry: &Value) -> Option<Self> {
        let stages = entry.get("ms")?;
        Some(Self {
            pair: entry.get("pair")?.as_str()?.to_owned(),
            stages: Stage::ALL.map(|stage| {
                let milliseconds = stages.get(stage.key()).and_then(Value::as_f64);
                finite(milliseconds.unwrap_or(0.0) / 1000.0).max(0.0)
            }),
        })
    }
}

impl From<RequestStages> for ReportedStages {
    fn from(phases: RequestStages) -> Self {
        Self {
            pair: phases.pair(),
            stages: Stage::ALL.map(|stage| phases.length(stage).as_secs_f64()),
        }
    }
}

impl Timing {
    /// Time of its last token since the request was sent.
    pub(super) fn end(&self) -> f64 {
        self.latency.max(self.first_token)
    }
}

impl Request {
    /// Time to first token; 0 if there was none.
    pub(super) fn first_token(&self) -> f64 {
        self.result.as_ref().map_or(0.0, |timing| timing.first_token)
    }

    /// Seconds per output token after the first.
    pub(super) fn time_per_output_token(&self) -> Option<f64> {
        let timing = self.result.as_ref().ok()?;
        let later = self.output_tokens.checked_sub(1).filter(|later| *later > 0)?;
        Some((timing.latency - timing.first_token) / later as f64)
    }
}

/// The last line of a Python traceback, which vLLM's client records, or the only line.
fn shortened(error: &str) -> String {
    const MOST: usize = 300;
    let line = error.lines().rfind(|line| !line.trim().is_empty()).unwrap_or(error);
    let mut text: String = line.trim().chars().take(MOST).collect();
    if line.trim().chars().count() > MOST {
        text.push('…');
    }
    text
}
