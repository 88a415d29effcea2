//! The load generator: `vllm bench serve`'s workload, arrivals, measures and table, against any OpenAI-compatible server.
//!
//! A run is a line of pure steps around one loop: [`workload`] says what is asked, [`arrivals`] when, `load` sends it
//! through `client` and gets one [`Record`] per request, [`stats`] makes them into numbers, `export` into text. Nothing
//! here prints, and nothing knows of fleets: a server is a URL.
//!
//! "vLLM" in this module means the client of vLLM 0.33.

mod client;
mod export;
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
#[cfg(test)]
mod vectors;
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
pub use self::client::models::{Model, discover, discover_trusting, version};
pub use self::export::html::{ResultFileError, of_document as page_of_document, of_file as page_of_file};
pub use self::export::python::{render as python_json, repr as python_number};
pub use self::latency_breakdown::{Phases, Stage};
pub use self::load::arrivals::{Arrivals, Ramp, RampStrategy};
pub use self::options::{Lora, LoraAssignment, Naming, Options};
pub use self::record::Record;
pub use self::report::{Beside, Probes, Report, Uncounted};
pub use self::stats::Metric;
pub use self::stats::failures::FailureGroup;
pub use self::stats::goodput::Objective;
pub use self::tokenizer::{Tokenizer, TokenizerError};
pub use self::warmup::NO_TEMPERATURE;
pub use self::workload::{
    BurstGpt, Custom, Dataset, DatasetError, Made, Message, Order, PrefixRepetition, Product, Prompt, Random,
    RangeRatio, Sessions, ShareGpt, Source, Stopped, TimedTrace, Turn, Turns, Workload, WorkloadError,
};

/// How long a TCP connection may take to come about. A burst can fill a listener's backlog; SYNs are then sent again
/// after 1, 3 and 7 seconds.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// The latest release that a schedule may hold. Beyond it a rate is a typing error.
const LONGEST_SCHEDULE: Duration = Duration::from_hours(30 * 24);

/// The route that requests go to, and with it their shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// `/v1/completions`, prompts as token ids.
    Completions,
    /// `/v1/chat/completions`, prompts as text.
    Chat,
}

impl Backend {
    /// Its name on vLLM's command line and in its files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Completions => "openai",
            Self::Chat => "openai-chat",
        }
    }

    /// The path it has unless the user says otherwise.
    pub fn endpoint(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }
}

/// Everything that decides a run.
#[derive(Debug, Clone)]
pub struct Spec {
    /// `http://host:port`, without a path.
    pub base_url: String,
    /// The shape of the requests.
    pub backend: Backend,
    /// The path of the requests; [`Backend::endpoint`] unless the server has another.
    pub endpoint: String,
    /// The model's name in the requests.
    pub model: String,
    /// Sent with every request. Mark secret values as sensitive.
    pub headers: HeaderMap,
    /// What is asked.
    pub workload: Workload,
    /// When it is asked.
    pub arrivals: Arrivals,
    /// Most requests at the server at once. Others wait in the client; the wait is recorded apart.
    pub max_concurrency: Option<NonZeroUsize>,
    /// Asks for answers of the full length.
    pub ignore_eos: bool,
    /// More fields of the request's body, such as sampling parameters; they replace those of the same name.
    pub extra_body: serde_json::Map<String, serde_json::Value>,
    /// Copies of the first prompt sent before the clock starts.
    pub warmups: usize,
    /// How long one request may take from its first byte out to its last byte in. vLLM's client gives 6 hours.
    pub request_timeout: Duration,
    /// The latencies that the report shows.
    pub metrics: Vec<Metric>,
    /// The percentiles that the report shows, 0 to 100, in this order.
    pub percentiles: Vec<f64>,
    /// What a good request keeps to. Empty: no goodput is reported.
    pub objectives: Vec<Objective>,
    /// Keeps the generated texts for the detailed report.
    pub keep_texts: bool,
    /// What else the run does; nothing unless asked.
    pub options: Options,
    /// What the result calls the run.
    pub naming: Naming,
}

/// Why there is no run.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The settings make no requests.
    #[error("the workload cannot be made")]
    Workload(#[from] WorkloadError),
    /// Zero, negative or not a number.
    #[error("the request rate must be more than 0, not {0}")]
    RequestRate(f64),
    /// Zero, negative or not a number.
    #[error("the burstiness must be more than 0, not {0}")]
    Burstiness(f64),
    /// A ramp that begins below 1 request per second or falls.
    #[error("a ramp rises from at least 1 request per second, not from {} to {}", .0.start, .0.end)]
    Ramp(Ramp),
    /// The last request would go out in the far future.
    #[error("at {rate} requests per second, {count} requests take more than 30 days")]
    TooSlow {
        /// Requests per second, at first if they rise.
        rate: f64,
        /// How many.
        count: usize,
    },
    /// The ready check was in vain.
    #[error("the server did not answer the first prompt within {} s: {cause}", patience.as_secs())]
    NotReady {
        /// How long it had.
        patience: Duration,
        /// What came of the last try.
        cause: String,
    },
    /// The base URL is not one that requests can be sent to.
    #[error("`{0}` is not a URL of the form `http://host:port` or `https://host`")]
    BaseUrl(String),
    /// No certificate of a server can be checked.
    #[error("cannot tell which servers to trust")]
    Trust(#[source] std::io::Error),
    /// The threads that send could not be started.
    #[error("cannot start the threads that send")]
    Threads(#[source] std::io::Error),
    /// No answer from the server.
    #[error("no answer from `{url}`")]
    Unreachable {
        /// What was asked.
        url: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The server answers, but not with its models.
    #[error("`{url}` does not list the models of an OpenAI-compatible server: {reason}")]
    NoModelList {
        /// What was asked.
        url: String,
        /// What came instead.
        reason: String,
    },
    /// The server does not serve the model.
    #[error("the server does not serve the model `{model}`")]
    UnknownModel {
        /// The model asked for.
        model: String,
        /// Those it serves.
        served: Vec<String>,
    },
}

/// What a run is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Copies of the first request, which are not measured.
    WarmingUp,
    /// The requests of the workload.
    Measuring,
}

/// How far a run is.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// What it is doing. The other fields are about this phase alone.
    pub phase: Phase,
    /// Requests of the phase.
    pub total: usize,
    /// Those that the schedule has let go so far.
    pub released: usize,
    /// Those that have ended, well or not.
    pub done: usize,
    /// Those that have failed.
    pub failed: usize,
    /// Those that are at the server.
    pub in_flight: usize,
    /// Since the start of the phase.
    pub elapsed: Duration,
    /// Mean time to first token so far, in milliseconds.
    pub mean_ttft_ms: Option<f64>,
    /// Mean time per output token after the first so far, in milliseconds.
    pub mean_tpot_ms: Option<f64>,
}

/// Runs the workload and reports on it. `progress` is called often, from this future; it must not block.
///
/// When `stop` is cancelled, requests in flight are dropped and the report is about those that have ended.
///
/// # Errors
/// When the settings make no run. Requests that fail are no error: the report counts them.
pub async fn run(spec: &Spec, progress: &dyn Fn(Progress), stop: CancellationToken) -> Result<Report, BenchError> {
    run_aloud(spec, progress, &|_| {}, stop).await
}

/// As [`run`]; `say` gets the lines that vLLM's client prints before its table.
///
/// # Errors
/// Those of [`run`].
pub async fn run_aloud(
    spec: &Spec,
    progress: &dyn Fn(Progress),
    say: &dyn Fn(&str),
    stop: CancellationToken,
) -> Result<Report, BenchError> {
    let listener = Listener {
        progress,
        say,
        ended: &|_| {},
    };
    run_watched(spec, listener, stop).await
}

/// Who is told while a run goes on. All are called often, from the future of the run, and must not block.
#[expect(missing_debug_implementations, reason = "functions")]
#[derive(Clone, Copy)]
pub struct Listener<'a> {
    /// Gets how far the run is.
    pub progress: &'a dyn Fn(Progress),
    /// Gets the lines that vLLM's client prints before its table.
    pub say: &'a dyn Fn(&str),
    /// Gets the requests that have ended so far, in the order of their ends.
    pub ended: &'a dyn Fn(&[Record]),
}

/// As [`run`], for whoever wants to know each request as it ends.
///
/// # Errors
/// Those of [`run`].
pub async fn run_watched(spec: &Spec, listener: Listener<'_>, stop: CancellationToken) -> Result<Report, BenchError> {
    let Listener { progress, say, ended } = listener;
    let orders = spec.workload.orders()?;
    let releases = spec.releases(&orders)?;
    let lanes = load::Lanes::start().map_err(BenchError::Threads)?;
    let prefix = spec.options.request_id_prefix.clone().unwrap_or_else(random_prefix);
    let sender = Sender {
        client: Arc::new(client::Client::new(spec)?),
        orders,
        prefix: prefix.into(),
    };
    sender.prepare(spec, &lanes, progress, say, &stop).await?;

    say("Starting main benchmark run...");
    warmup::announce(spec, say);
    let client = &sender.client;
    let (before, first_page) = tokio::join!(client.engine_counters(), client.engine_page());
    let started_at = jiff::Zoned::now();
    let over = CancellationToken::new();
    let mut probing = sender.probe(spec.options.probe_rate, &over, &stop);
    let conversations = Arc::new(load::conversation::Conversations::new(&sender.orders));
    let successors = load::conversation::successors(&sender.orders);
    let own = sender.clone().with_adapters(spec);
    let measure = move |index: usize| {
        let (own, conversations) = (own.clone(), conversations.clone());
        async move { own.measure(index, &conversations).await }
    };
    let observe = |tally: &load::Tally, records: &[Record]| {
        progress(tally.progress(Phase::Measuring));
        ended(records);
    };
    let limit = spec.max_concurrency;
    let mut measured = load::drive_chained(&lanes, &releases, limit, successors, measure, observe, &stop).await;
    over.cancel();
    let mut probes = None;
    if let Some(probed) = probing.join_next().await {
        probes = Some(probed.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())));
    }
    let duration = measured.duration.as_secs_f64();
    // A server that had no such page is not asked for another one.
    let last_page = async {
        match first_page {
            Some(first) => Some((first, client.engine_page().await?)),
            None => None,
        }
    };
    let (after, pages) = tokio::join!(client.engine_counters(), last_page);
    let uncounted = Uncounted::settle(&mut measured.records, spec);
    let prompt_lengths = sender.orders.iter().map(|order| order.prompt.token_count()).collect();
    let mut report = Report::new(spec, prompt_lengths, measured);
    report.beside = Beside {
        started_at: Some(started_at),
        speculation: after.speculation_since(&before),
        diffusion: after.diffusion_since(&before, duration),
        probes,
        uncounted,
        ..Beside::default()
    };
    if let Some((first, last)) = pages {
        report.beside.engines = last.since(&first);
    }
    Ok(report)
}

/// What every request of a run needs.
#[derive(Debug, Clone)]
struct Sender {
    client: Arc<client::Client>,
    orders: Arc<[Order]>,
    /// What request ids begin with.
    prefix: Arc<str>,
}

impl Sender {
    /// Sends one request of the workload, with what its session has said before.
    async fn measure(self, index: usize, conversations: &load::conversation::Conversations) -> load::Exchange {
        let request_id = format!("{}{index}", self.prefix);
        let order = &self.orders[index];
        match conversations.next(order) {
            None => self.client.exchange(order, &request_id).await,
            Some(Ok(order)) => {
                let exchange = self.client.exchange(&order, &request_id).await;
                conversations.answered(&order, &exchange.result);
                exchange
            }
            Some(Err(reason)) => load::Exchange {
                started: Instant::now(),
                result: Err(reason),
            },
        }
    }

    /// Sends one request as it stands.
    async fn send(self, index: usize, name: String) -> load::Exchange {
        let request_id = format!("{}{name}", self.prefix);
        self.client.exchange(&self.orders[index], &request_id).await
    }

    /// The ready check and the warm-ups.
    async fn prepare(
        &self,
        spec: &Spec,
        lanes: &load::Lanes,
        progress: &dyn Fn(Progress),
        say: &dyn Fn(&str),
        stop: &CancellationToken,
    ) -> Result<(), BenchError> {
        let ask = || async { self.clone().send(0, "ready".to_owned()).await.result.map(drop) };
        warmup::ready_check(spec.options.ready_check, ask, say, stop).await?;
        if spec.warmups == 0 {
            return Ok(());
        }
        say(&format!("Warming up with {} requests...", spec.warmups));
        let own = self.clone();
        let warm_up = move |index: usize| own.clone().send(0, format!("warmup-{index}"));
        let at_once = vec![Duration::ZERO; spec.warmups];
        let observe = |tally: &load::Tally, _: &[Record]| progress(tally.progress(Phase::WarmingUp));
        let warmed = load::drive(lanes, &at_once, spec.max_concurrency, warm_up, observe, stop).await;
        for cause in warmed.records.iter().filter_map(|record| record.result.as_ref().err()) {
            tracing::warn!(cause, "a warm-up request failed");
        }
        say("Warmup run completed.");
        Ok(())
    }

    /// Begins to probe, if that is wanted.
    fn probe(&self, rate: f64, over: &CancellationToken, stop: &CancellationToken) -> JoinSet<Probes> {
        let mut probing = JoinSet::new();
        if rate > 0.0 {
            let own = Self {
                orders: [Order::new(Prompt::text("Hi", 1), 1)].into(),
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

    /// With the adapter that each request asks for.
    fn with_adapters(self, spec: &Spec) -> Self {
        let Some(lora) = &spec.options.lora else {
            return self;
        };
        let models = lora.assigned(self.orders.len(), spec.workload.seed());
        let orders = self.orders.iter().cloned().zip(models).map(|(order, model)| Order {
            model: Some(model),
            ..order
        });
        Self {
            orders: orders.collect(),
            ..self
        }
    }
}

/// vLLM's form of request ids, so that logs of servers read the same.
fn random_prefix() -> String {
    let run_id = uuid::Uuid::new_v4().simple().to_string();
    format!("bench-{}-", &run_id[..8])
}

impl Spec {
    /// Whether these settings make a run, before any server is asked.
    ///
    /// # Errors
    /// Those of [`run`].
    pub fn check(&self) -> Result<(), BenchError> {
        client::http::url(&self.base_url, &self.endpoint)?;
        self.schedule(self.workload.count()?)?;
        Ok(())
    }

    /// When each request is released, since the start: as the dataset says, else as the arrivals do.
    fn releases(&self, orders: &[Order]) -> Result<Vec<Duration>, BenchError> {
        if let Some(own) = orders.iter().map(|order| order.release).collect() {
            return Ok(own);
        }
        self.schedule(orders.len())
    }

    /// When the arrivals release each of `count` requests.
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
