//! The load generator: the workload, arrivals, metrics and table of `vllm bench serve`, against any OpenAI-compatible
//! server.
//!
//! A run is a pipeline: [`workload`] makes the requests, `load::arrivals` their release times, `load` sends them
//! through `client` and returns one [`Record`] per request, [`stats`] computes the numbers, and `export` writes text,
//! JSON and HTML. Nothing here prints, and nothing knows of fleets: a server is a URL.
//!
//! "vLLM" in this module means the client of vLLM 0.33.

mod client;
mod export;
#[cfg(test)]
mod fixtures;
pub mod latency_breakdown;
mod load;
mod options;
pub mod record;
pub mod report;
mod rng;
pub mod saved;
pub mod search;
pub mod stats;
pub mod sweep;
pub mod tokenizer;
mod warmup;
pub mod workload;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use reqwest::header::HeaderMap;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use self::client::alignment::align;
pub use self::client::engine_counters::{Diffusion, Speculation};
pub use self::client::http::credentials;
pub use self::client::models::{Model, discover, discover_with, version};
pub use self::export::html::{ResultFileError, of_document as page_of_document, of_file as page_of_file};
pub use self::export::python::{render as python_json, repr as python_number};
pub use self::latency_breakdown::{RequestStages, Stage};
pub use self::load::arrivals::{Arrivals, Ramp, RampStrategy};
pub use self::options::{Lora, LoraAssignment, Naming, Options};
pub use self::record::Record;
pub use self::report::{Extras, MissingUsage, Probes, Report};
pub use self::stats::Metric;
pub use self::stats::failures::FailureGroup;
pub use self::stats::goodput::Objective;
pub use self::tokenizer::{Tokenizer, TokenizerError};
pub use self::warmup::NO_TEMPERATURE;
pub use self::workload::{
    BurstGpt, Custom, Dataset, DatasetError, MadeRequests, Message, PrefixRepetition, Prepared, Prompt, Random,
    RangeRatio, Sessions, ShareGpt, Source, Stopped, TimedTrace, Turn, Turns, WorkItem, Workload, WorkloadError,
};

/// Timeout of a TCP connection. A burst can fill a listener's backlog; SYNs are then repeated after 1, 3 and 7 seconds.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// The latest release time in a schedule. A rate beyond it is a typing error.
const LONGEST_SCHEDULE: Duration = Duration::from_hours(30 * 24);

/// The route of the requests, which decides their shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// `/v1/completions`, prompts as token ids.
    Completions,
    /// `/v1/chat/completions`, prompts as text.
    Chat,
}

impl Backend {
    /// The name on vLLM's command line and in its files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Completions => "openai",
            Self::Chat => "openai-chat",
        }
    }

    /// The default path.
    pub fn endpoint(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }
}

/// The settings of a run.
#[derive(Debug, Clone)]
pub struct Spec {
    /// `http://host:port`, without a path.
    pub base_url: String,
    /// The route and shape of the requests.
    pub backend: Backend,
    /// The path of the requests; by default [`Backend::endpoint`].
    pub endpoint: String,
    /// The model's name in the requests.
    pub model: String,
    /// Headers of every request. Mark secret values as sensitive.
    pub headers: HeaderMap,
    /// The requests.
    pub workload: Workload,
    /// Their release times.
    pub arrivals: Arrivals,
    /// Most requests at the server at once. Other requests wait in the client; this wait is recorded separately.
    pub max_concurrency: Option<NonZeroUsize>,
    /// Requests answers of the full length.
    pub ignore_eos: bool,
    /// Additional fields of the request body, such as sampling parameters. They replace fields of the same name.
    pub extra_body: serde_json::Map<String, serde_json::Value>,
    /// Number of copies of the first prompt to send before the clock starts.
    pub warmups: usize,
    /// Timeout of one request, from its first byte sent to its last byte received. vLLM's client has 6 hours.
    pub request_timeout: Duration,
    /// Latencies to report.
    pub metrics: Vec<Metric>,
    /// Percentiles to report, 0 to 100, in this order.
    pub percentiles: Vec<f64>,
    /// Objectives of a good request. Without any, no goodput is reported.
    pub objectives: Vec<Objective>,
    /// Keeps generated texts for the detailed report.
    pub keep_texts: bool,
    /// Optional features.
    pub options: Options,
    /// Names in the result file.
    pub naming: Naming,
}

/// Why a run cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The workload settings are invalid.
    #[error("the workload cannot be made")]
    Workload(#[from] WorkloadError),
    /// Zero, negative or not a number.
    #[error("the request rate must be more than 0, not {0}")]
    RequestRate(f64),
    /// Zero, negative or not a number.
    #[error("the burstiness must be more than 0, not {0}")]
    Burstiness(f64),
    /// A ramp that starts below 1 request per second or falls.
    #[error("a ramp must rise from at least 1 request per second, not from {} to {}", .0.start, .0.end)]
    Ramp(Ramp),
    /// The last request would be sent in more than 30 days.
    #[error("at {rate} requests per second, {count} requests take more than 30 days")]
    TooSlow {
        /// Requests per second; the start rate of a ramp.
        rate: f64,
        /// Number of requests.
        count: usize,
    },
    /// The ready check failed.
    #[error("the server did not answer the first prompt within {} s: {cause}", patience.as_secs())]
    NotReady {
        /// Time limit of the check.
        patience: Duration,
        /// Error of the last attempt.
        cause: String,
    },
    /// The base URL is invalid.
    #[error("`{0}` is not a URL of the form `http://host:port` or `https://host`")]
    BaseUrl(String),
    /// The trusted certificates cannot be loaded.
    #[error("cannot load the trusted certificates")]
    Trust(#[source] std::io::Error),
    /// The worker threads cannot be started.
    #[error("cannot start the worker threads")]
    Threads(#[source] std::io::Error),
    /// The server does not answer.
    #[error("no answer from `{url}`")]
    Unreachable {
        /// The requested URL.
        url: String,
        /// The connection error.
        #[source]
        source: std::io::Error,
    },
    /// The server answers without a valid model list.
    #[error("`{url}` does not list the models of an OpenAI-compatible server: {reason}")]
    NoModelList {
        /// The requested URL.
        url: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// The server does not serve the model.
    #[error("the server does not serve the model `{model}`")]
    UnknownModel {
        /// The requested model.
        model: String,
        /// Models that the server serves.
        served: Vec<String>,
    },
}

/// The phase of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunPhase {
    /// Making the prompts. No request is sent yet; the counts are of prompts.
    Preparing,
    /// Sending copies of the first request, which are not measured.
    WarmingUp,
    /// Sending the requests of the workload.
    Measuring,
}

/// The progress of one phase of a run.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// The phase that the other fields describe.
    pub phase: RunPhase,
    /// Requests of the phase.
    pub total: usize,
    /// Requests that the schedule has released.
    pub released: usize,
    /// Requests that have ended, successful or not.
    pub done: usize,
    /// Requests that have failed.
    pub failed: usize,
    /// Requests at the server.
    pub in_flight: usize,
    /// Time since the start of the phase.
    pub elapsed: Duration,
    /// Requests per second that the schedule asks for. `None` if it has no fixed rate.
    pub asked_rate: Option<f64>,
    /// Mean time to first token so far, in milliseconds.
    pub mean_ttft_ms: Option<f64>,
    /// Mean time per output token after the first so far, in milliseconds.
    pub mean_tpot_ms: Option<f64>,
}

/// Runs the workload and returns the report. `progress` is called often, from this future; it must not block.
///
/// When `stop` is cancelled, requests in flight are dropped, and the report covers the requests that have ended.
///
/// # Errors
/// When the settings are invalid or the server is not ready. Failed requests are not an error: the report counts them.
pub async fn run(spec: &Spec, progress: &dyn Fn(Progress), stop: CancellationToken) -> Result<Report, BenchError> {
    run_with_lines(spec, progress, &|_| {}, stop).await
}

/// As [`run`]; `print_line` gets the lines that vLLM's client prints before its table.
///
/// # Errors
/// Those of [`run`].
pub async fn run_with_lines(
    spec: &Spec,
    progress: &dyn Fn(Progress),
    print_line: &dyn Fn(&str),
    stop: CancellationToken,
) -> Result<Report, BenchError> {
    let observer = RunObserver {
        progress,
        print_line,
        ended: &|_| {},
    };
    run_observed(spec, observer, stop).await
}

/// Callbacks during a run. All are called often, from the future of the run, and must not block.
#[expect(missing_debug_implementations, reason = "functions")]
#[derive(Clone, Copy)]
pub struct RunObserver<'a> {
    /// Receives the progress.
    pub progress: &'a dyn Fn(Progress),
    /// Receives the lines that vLLM's client prints before its table.
    pub print_line: &'a dyn Fn(&str),
    /// Receives the requests that have ended so far, in the order of their ends.
    pub ended: &'a dyn Fn(&[Record]),
}

/// As [`run`], with all callbacks.
///
/// # Errors
/// Those of [`run`].
pub async fn run_observed(
    spec: &Spec,
    observer: RunObserver<'_>,
    stop: CancellationToken,
) -> Result<Report, BenchError> {
    let RunObserver {
        progress,
        print_line,
        ended,
    } = observer;
    let items = spec.workload.items()?;
    let releases = spec.releases(&items)?;
    let workers = load::Workers::start().map_err(BenchError::Threads)?;
    let prefix = spec.options.request_id_prefix.clone().unwrap_or_else(random_prefix);
    let sender = RequestSender {
        client: Arc::new(client::Client::new(spec)?),
        items,
        prefix: prefix.into(),
    };
    sender.prepare(spec, &workers, progress, print_line, &stop).await?;

    print_line("Starting main benchmark run...");
    warmup::announce(spec, print_line);
    let client = &sender.client;
    let (before, metrics_before) = tokio::join!(client.engine_counters(), client.engine_metrics());
    let started_at = jiff::Zoned::now();
    let over = CancellationToken::new();
    let mut probing = sender.probe(spec.options.probe_rate, &over, &stop);
    let conversations = Arc::new(load::conversation::Conversations::new(&sender.items));
    let successors = load::conversation::successors(&sender.items);
    let own = sender.clone().with_adapters(spec);
    let measure = move |index: usize| {
        let (own, conversations) = (own.clone(), conversations.clone());
        async move { own.measure(index, &conversations).await }
    };
    let asked_rate = spec.arrivals.has_fixed_rate().then_some(spec.arrivals.request_rate);
    let observe = |totals: &load::RunningTotals, records: &[Record]| {
        progress(totals.progress(RunPhase::Measuring, asked_rate));
        ended(records);
    };
    let limit = spec.max_concurrency;
    let mut measured = load::run_chained(&workers, &releases, limit, successors, measure, observe, &stop).await;
    over.cancel();
    let mut probes = None;
    if let Some(probed) = probing.join_next().await {
        probes = Some(probed.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())));
    }
    let duration = measured.duration.as_secs_f64();
    // A server without such a page is not asked again.
    let metrics_after = async {
        match metrics_before {
            Some(first) => Some((first, client.engine_metrics().await?)),
            None => None,
        }
    };
    let (after, metrics_pages) = tokio::join!(client.engine_counters(), metrics_after);
    let missing_usage = MissingUsage::fill_in(&mut measured.records, spec);
    let prompt_lengths = sender.items.iter().map(|item| item.prompt.token_count()).collect();
    let mut report = Report::new(spec, prompt_lengths, measured);
    report.extras = Extras {
        started_at: Some(started_at),
        speculation: after.speculation_since(&before),
        diffusion: after.diffusion_since(&before, duration),
        probes,
        missing_usage,
        ..Extras::default()
    };
    if let Some((first, last)) = metrics_pages {
        report.extras.engines = last.since(&first);
    }
    Ok(report)
}

/// The state that every request of a run needs.
#[derive(Debug, Clone)]
struct RequestSender {
    client: Arc<client::Client>,
    items: Arc<[WorkItem]>,
    /// The prefix of request ids.
    prefix: Arc<str>,
}

impl RequestSender {
    /// Sends one request of the workload, with the earlier messages of its session.
    async fn measure(self, index: usize, conversations: &load::conversation::Conversations) -> load::Exchange {
        let request_id = format!("{}{index}", self.prefix);
        let item = &self.items[index];
        match conversations.next(item) {
            None => self.client.exchange(item, &request_id).await,
            Some(Ok(item)) => {
                let exchange = self.client.exchange(&item, &request_id).await;
                conversations.answered(&item, &exchange.result);
                exchange
            }
            Some(Err(reason)) => load::Exchange {
                started: Instant::now(),
                result: Err(reason),
            },
        }
    }

    /// Sends one request without session messages.
    async fn send(self, index: usize, name: String) -> load::Exchange {
        let request_id = format!("{}{name}", self.prefix);
        self.client.exchange(&self.items[index], &request_id).await
    }

    /// Runs the ready check and the warm-up requests.
    async fn prepare(
        &self,
        spec: &Spec,
        workers: &load::Workers,
        progress: &dyn Fn(Progress),
        print_line: &dyn Fn(&str),
        stop: &CancellationToken,
    ) -> Result<(), BenchError> {
        let ask = || async { self.clone().send(0, "ready".to_owned()).await.result.map(drop) };
        warmup::ready_check(spec.options.ready_check, ask, print_line, stop).await?;
        if spec.warmups == 0 {
            return Ok(());
        }
        print_line(&format!("Warming up with {} requests...", spec.warmups));
        let own = self.clone();
        let warm_up = move |index: usize| own.clone().send(0, format!("warmup-{index}"));
        let at_once = vec![Duration::ZERO; spec.warmups];
        let observe = |totals: &load::RunningTotals, _: &[Record]| progress(totals.progress(RunPhase::WarmingUp, None));
        let warmed = load::run_schedule(workers, &at_once, spec.max_concurrency, warm_up, observe, stop).await;
        for cause in warmed.records.iter().filter_map(|record| record.result.as_ref().err()) {
            tracing::warn!(cause, "a warm-up request failed");
        }
        print_line("Warmup run completed.");
        Ok(())
    }

    /// Starts the probe requests if `rate` is above 0.
    fn probe(&self, rate: f64, over: &CancellationToken, stop: &CancellationToken) -> JoinSet<Probes> {
        let mut probing = JoinSet::new();
        if rate > 0.0 {
            let own = Self {
                items: [WorkItem::new(Prompt::text("Hi", 1), 1)].into(),
                ..self.clone()
            };
            let (over, stop) = (over.clone(), stop.clone());
            probing.spawn(async move {
                let ask = || async { own.clone().send(0, "probe".to_owned()).await.result };
                load::probe::run(rate, ask, &over, &stop).await
            });
        }
        probing
    }

    /// Assigns the LoRA adapters to the requests.
    fn with_adapters(self, spec: &Spec) -> Self {
        let Some(lora) = &spec.options.lora else {
            return self;
        };
        let models = lora.assigned(self.items.len(), spec.workload.seed());
        let items = self.items.iter().cloned().zip(models).map(|(item, model)| WorkItem {
            model: Some(model),
            ..item
        });
        Self {
            items: items.collect(),
            ..self
        }
    }
}

/// A random request id prefix in vLLM's form, so that server logs look the same.
fn random_prefix() -> String {
    let run_id = uuid::Uuid::new_v4().simple().to_string();
    format!("bench-{}-", &run_id[..8])
}

impl Spec {
    /// Checks the settings before any server is contacted.
    ///
    /// # Errors
    /// Those of [`run`].
    pub fn check(&self) -> Result<(), BenchError> {
        client::http::url(&self.base_url, &self.endpoint)?;
        self.schedule(self.workload.count()?)?;
        Ok(())
    }

    /// The release time of each request since the start: from the dataset, else from the arrivals.
    fn releases(&self, items: &[WorkItem]) -> Result<Vec<Duration>, BenchError> {
        if let Some(own) = items.iter().map(|item| item.release).collect() {
            return Ok(own);
        }
        self.schedule(items.len())
    }

    /// The release times of `count` requests by the arrival process.
    fn schedule(&self, count: usize) -> Result<Vec<Duration>, BenchError> {
        let Arrivals {
            request_rate,
            burstiness,
            ramp,
        } = self.arrivals;
        if request_rate.is_nan() || request_rate <= 0.0 {
            return Err(BenchError::RequestRate(request_rate));
        }
        if burstiness.is_nan() || burstiness <= 0.0 {
            return Err(BenchError::Burstiness(burstiness));
        }
        if let Some(ramp) = ramp.filter(|ramp| ramp.start == 0 || ramp.end < ramp.start) {
            return Err(BenchError::Ramp(ramp));
        }
        let schedule = self.arrivals.schedule_from(count, self.workload.generator());
        let releases = schedule.into_iter().map(Duration::try_from_secs_f64);
        match releases.collect::<Result<Vec<_>, _>>() {
            Ok(releases) if releases.iter().all(|&release| release <= LONGEST_SCHEDULE) => Ok(releases),
            _ => Err(BenchError::TooSlow {
                rate: ramp.map_or(request_rate, |ramp| ramp.start.into()),
                count,
            }),
        }
    }
}
