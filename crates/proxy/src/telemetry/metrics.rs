//! The proxy's own metrics, in a registry that belongs to one proxy.
//!
//! Labels have few values by construction: routes, statuses, stages, outcomes and engine names, never text of a client.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::Settings;
use crate::overload::Overload;
use xpyd_base::fleet::{EngineView, FleetView, OutlivedKv, Role};

/// From a millisecond, which is a hand-off on one machine, to minutes, which is a long answer. Seconds.
const BUCKETS: [f64; 18] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0,
];

/// vLLM 0.32's buckets (`v1/metrics/buckets.py`): to the first token, between tokens, and of whole requests. Seconds.
const FIRST_TOKEN_BUCKETS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const INTER_TOKEN_BUCKETS: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const LATENCY_BUCKETS: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    endpoint: &'static str,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabels {
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageLabels {
    stage: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EngineLabels {
    engine: String,
    role: String,
}

impl EngineLabels {
    fn of(engine: &EngineView) -> Self {
        Self {
            engine: engine.id.to_string(),
            role: engine.role.to_string(),
        }
    }
}

/// How a request's hand-off ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum HandoffOutcome {
    /// The decode engine answered, and its usage shows that the KV arrived.
    Transferred,
    /// The decode engine got the hand-off and answered. Whether it used the KV is not known.
    #[default]
    Sent,
    /// The decode engine's usage shows that it computed most or all of the prompt.
    Recomputed,
    /// A decode engine answered alone, because a hand-off cannot serve the request or is not worth it.
    Bypassed,
    /// A leg failed. A retry has its own outcome.
    Failed,
    /// An engine refused the request.
    Refused,
}

impl HandoffOutcome {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Transferred => "transferred",
            Self::Sent => "sent",
            Self::Recomputed => "recomputed",
            Self::Bypassed => "bypassed",
            Self::Failed => "failed",
            Self::Refused => "refused",
        }
    }
}

/// A timed stage of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TimedStage {
    /// The wait for a decode engine with room, if the request had to wait.
    Queue,
    /// The prefill leg.
    Prefill,
    /// From the prefill engine's answer until the KV has arrived, if the connector reports that.
    Handoff,
    /// From sending the decode leg to its first event or whole answer.
    DecodeFirstByte,
}

impl TimedStage {
    /// The number of variants.
    pub(crate) const COUNT: usize = 4;

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Prefill => "prefill",
            Self::Handoff => "handoff",
            Self::DecodeFirstByte => "decode_first_byte",
        }
    }
}

/// How a request ended for its client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClientOutcome {
    /// With a whole answer.
    Answered,
    /// With an answer of 4xx.
    Refused,
    /// With an answer of 5xx.
    Failed,
    /// With an error event, after part of the answer.
    Broken,
    /// The client left before the end.
    Left,
}

impl ClientOutcome {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Broken => "broken",
            Self::Left => "left",
        }
    }
}

/// The metrics of one source of requests: clients, or xpyd's own canaries.
#[derive(Debug)]
pub(crate) struct TrafficMetrics {
    handoffs: Family<OutcomeLabels, Counter>,
    stages: Family<StageLabels, Histogram>,
    first_token: Histogram,
    between_reads: Histogram,
    ended: Family<OutcomeLabels, Histogram>,
    answered: Histogram,
    retries: Counter,
}

impl TrafficMetrics {
    fn new(registry: &mut Registry) -> Self {
        let traffic = Self {
            handoffs: Family::default(),
            stages: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
            first_token: Histogram::new(FIRST_TOKEN_BUCKETS),
            between_reads: Histogram::new(INTER_TOKEN_BUCKETS),
            ended: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
            answered: Histogram::new(LATENCY_BUCKETS),
            retries: Counter::default(),
        };
        registry.register("handoff", "Hand-offs by how they ended", traffic.handoffs.clone());
        registry.register(
            "stage_seconds",
            "Time a stage of a request took",
            traffic.stages.clone(),
        );
        registry.register(
            "time_to_first_token_seconds",
            "Time from a request's arrival to its first event or whole answer",
            traffic.first_token.clone(),
        );
        registry.register(
            "inter_token_seconds",
            "Time between two reads of a stream that brought tokens",
            traffic.between_reads.clone(),
        );
        registry.register(
            "request_seconds",
            "Time from a generation's arrival to its end, by how it ended for its client",
            traffic.ended.clone(),
        );
        registry.register(
            "retries",
            "Requests that were retried with other engines",
            traffic.retries.clone(),
        );
        traffic
    }

    pub(crate) fn count_outcome(&self, outcome: HandoffOutcome) {
        let outcome = outcome.as_str();
        self.handoffs.get_or_create(&OutcomeLabels { outcome }).inc();
    }

    pub(crate) fn observe_stage(&self, stage: TimedStage, time: Duration) {
        let stage = stage.as_str();
        self.stages
            .get_or_create(&StageLabels { stage })
            .observe(time.as_secs_f64());
    }

    pub(crate) fn observe_first_token(&self, time: Duration) {
        self.first_token.observe(time.as_secs_f64());
    }

    pub(crate) fn observe_token_gap(&self, time: Duration) {
        self.between_reads.observe(time.as_secs_f64());
    }

    pub(crate) fn observe_end(&self, ending: ClientOutcome, time: Duration) {
        let outcome = ending.as_str();
        self.ended
            .get_or_create(&OutcomeLabels { outcome })
            .observe(time.as_secs_f64());
        if ending == ClientOutcome::Answered {
            self.answered.observe(time.as_secs_f64());
        }
    }

    pub(crate) fn count_retry(&self) {
        self.retries.inc();
    }
}

/// LMCache notifications that helped no request, since the proxy started.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NotificationErrors {
    /// Those that came after their request had ended.
    pub(crate) late: u64,
    /// Messages that were not a notification.
    pub(crate) malformed: u64,
}

/// All metrics of a proxy.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    /// What a single vLLM would report in the fleet's place, under its names.
    as_vllm: Registry,
    pub(crate) clients: Arc<TrafficMetrics>,
    pub(crate) canaries: Arc<TrafficMetrics>,
    pub(crate) overload: Overload,
    requests: Family<RequestLabels, Counter>,
    errors: Family<CodeLabels, Counter>,
    body_bytes: Gauge,
    cleanups: Family<OutcomeLabels, Counter>,
    leases_over: Counter,
    expired_leases: Family<EngineLabels, Gauge>,
    late_reads: Family<EngineLabels, Gauge>,
    in_flight: Gauge,
    queued: Gauge,
    running: Gauge,
    engine_in_flight: Family<EngineLabels, Gauge>,
    unread: Family<EngineLabels, Counter>,
    handoffs_open: Gauge,
    late_notifications: Gauge,
    malformed_notifications: Gauge,
}

impl Metrics {
    pub(crate) fn new(settings: &Settings) -> Self {
        let mut registry = Registry::with_prefix("xpyd");
        let clients = Arc::new(TrafficMetrics::new(&mut registry));
        let canaries = Arc::new(TrafficMetrics::new(registry.sub_registry_with_prefix("canary")));
        let mut metrics = Self {
            as_vllm: Registry::default(),
            clients,
            canaries,
            overload: Overload::default(),
            requests: Family::default(),
            errors: Family::default(),
            body_bytes: Gauge::default(),
            cleanups: Family::default(),
            leases_over: Counter::default(),
            expired_leases: Family::default(),
            late_reads: Family::default(),
            in_flight: Gauge::default(),
            queued: Gauge::default(),
            running: Gauge::default(),
            engine_in_flight: Family::default(),
            unread: Family::default(),
            handoffs_open: Gauge::default(),
            late_notifications: Gauge::default(),
            malformed_notifications: Gauge::default(),
            registry,
        };
        metrics.register_own();
        metrics.register_as_vllm(&settings.served_model_name);
        if let Some(log) = &settings.parts.access_log {
            let help = "Access log lines that were dropped because the queue was full";
            metrics.registry.register("access_log_dropped", help, log.dropped());
        }
        metrics
    }

    fn register_own(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "requests",
            "Requests answered, by route and status",
            self.requests.clone(),
        );
        registry.register(
            "limit_reached",
            "Times that a limit of the proxy itself was reached",
            self.overload.counters(),
        );
        registry.register(
            "client_connections",
            "Connections of clients that are open",
            self.overload.connections(),
        );
        registry.register(
            "errors",
            "Requests answered with an error of the proxy, by its code",
            self.errors.clone(),
        );
        registry.register("body_bytes", "Bytes of all request bodies", self.body_bytes.clone());
        registry.register(
            "handoff_cleanups",
            "Hand-offs that ended early, by whether their KV could be freed",
            self.cleanups.clone(),
        );
        registry.register(
            "kv_leases_outlived",
            "Answers that were not forwarded, because they began after the lease on their KV",
            self.leases_over.clone(),
        );
        registry.register(
            "engine_kv_leases_expired",
            "Leases on KV that ended before a decode engine had read it, as this start of the engine counts them",
            self.expired_leases.clone(),
        );
        registry.register(
            "engine_kv_late_reads",
            "Reads of KV after its lease, as this start of the engine counts them",
            self.late_reads.clone(),
        );
        registry.register("requests_in_flight", "Requests in the proxy", self.in_flight.clone());
        registry.register(
            "requests_queued",
            "Requests that wait for a decode engine with room",
            self.queued.clone(),
        );
        registry.register(
            "engine_requests_in_flight",
            "Requests in flight on an engine",
            self.engine_in_flight.clone(),
        );
        registry.register(
            "engine_metrics_unread",
            "Times that an engine's metrics did not arrive for the merged page",
            self.unread.clone(),
        );
        registry.register(
            "handoffs_open",
            "Hand-offs whose KV is neither consumed nor released yet",
            self.handoffs_open.clone(),
        );
        registry.register(
            "late_notifications",
            "LMCache notifications that came after their request had ended",
            self.late_notifications.clone(),
        );
        registry.register(
            "malformed_notifications",
            "Messages on the notification socket that were not a notification",
            self.malformed_notifications.clone(),
        );
    }

    /// Names and buckets are those of vLLM 0.32, so that its dashboards show the fleet as one engine.
    fn register_as_vllm(&mut self, model: &str) {
        let model = (Cow::Borrowed("model_name"), Cow::Owned(model.to_owned()));
        let registry = self.as_vllm.sub_registry_with_label(model);
        registry.register(
            "vllm:time_to_first_token_seconds",
            "Histogram of time to first token in seconds",
            self.clients.first_token.clone(),
        );
        registry.register(
            "vllm:inter_token_latency_seconds",
            "Histogram of inter-token latency in seconds",
            self.clients.between_reads.clone(),
        );
        registry.register(
            "vllm:e2e_request_latency_seconds",
            "Histogram of e2e request latency in seconds",
            self.clients.answered.clone(),
        );
        registry.register(
            "vllm:num_requests_running",
            "Number of requests that engines work on",
            self.running.clone(),
        );
        registry.register(
            "vllm:num_requests_waiting",
            "Number of requests waiting to be processed",
            self.queued.clone(),
        );
    }

    pub(crate) fn count_answer(&self, endpoint: &'static str, status: u16) {
        self.requests.get_or_create(&RequestLabels { endpoint, status }).inc();
    }

    /// Counts a request that the proxy answered with an error.
    pub(crate) fn count_error(&self, code: &'static str) {
        self.errors.get_or_create(&CodeLabels { code }).inc();
    }

    /// Sets the bytes of all request bodies.
    pub(crate) fn set_body_bytes(&self, bytes: usize) {
        self.body_bytes.set(to_gauge(bytes));
    }

    /// Counts a hand-off that ended early, and whether its KV was freed.
    pub(crate) fn count_cleanup(&self, freed: bool) {
        let outcome = if freed { "freed" } else { "stranded" };
        self.cleanups.get_or_create(&OutcomeLabels { outcome }).inc();
    }

    /// Counts an answer that began after the lease on its KV.
    pub(crate) fn count_outlived_lease(&self) {
        self.leases_over.inc();
    }

    /// Counts an engine whose metrics did not arrive.
    pub(crate) fn count_unread_page(&self, engine: &EngineView) {
        self.unread.get_or_create(&EngineLabels::of(engine)).inc();
    }

    /// Changes the number of open hand-offs, by `1` or `-1`.
    pub(crate) fn add_open_handoffs(&self, change: i64) {
        self.handoffs_open.inc_by(change);
    }

    /// The metrics in `OpenMetrics`' text format, with the values of this moment. If the engines' pages are merged
    /// in, the fleet must not use vLLM's names as well.
    pub(crate) fn text(
        &self,
        view: &FleetView,
        in_flight: usize,
        queued: usize,
        notifications: Option<NotificationErrors>,
        as_vllm: bool,
    ) -> String {
        self.in_flight.set(to_gauge(in_flight));
        self.queued.set(to_gauge(queued));
        self.running.set(to_gauge(in_flight.saturating_sub(queued)));
        // The view decides which engines exist.
        for family in [&self.engine_in_flight, &self.expired_leases, &self.late_reads] {
            family.clear();
        }
        for engine in &view.engines {
            let labels = EngineLabels::of(engine);
            let set = |family: &Family<_, Gauge>, value| family.get_or_create(&labels).set(value);
            set(&self.engine_in_flight, to_gauge(engine.load.in_flight()));
            if engine.role == Role::Prefill {
                let OutlivedKv { expired, late } = engine.load.outlived_kv();
                set(&self.expired_leases, i64::try_from(expired).unwrap_or(i64::MAX));
                set(&self.late_reads, i64::try_from(late).unwrap_or(i64::MAX));
            }
        }
        if let Some(NotificationErrors { late, malformed }) = notifications {
            self.late_notifications.set(i64::try_from(late).unwrap_or(i64::MAX));
            self.malformed_notifications
                .set(i64::try_from(malformed).unwrap_or(i64::MAX));
        }
        let mut text = String::new();
        [Some(&self.registry), as_vllm.then_some(&self.as_vllm)]
            .into_iter()
            .flatten()
            .try_for_each(|registry| encode_registry(&mut text, registry))
            .and_then(|()| encode_eof(&mut text))
            .expect("writing to a string cannot fail");
        text
    }
}

fn to_gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
