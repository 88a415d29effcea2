//! The proxy's own metrics, in a registry that belongs to one proxy.
//!
//! Labels have few values by construction: routes, statuses, stages, outcomes and engine names, never what a client sent.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::notify::Notifications;
use crate::fleet::FleetView;

/// From a millisecond, which is a hand-off on one machine, to minutes, which is a long answer. Seconds.
const BUCKETS: [f64; 18] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0,
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    endpoint: &'static str,
    status: u16,
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

/// How a request's hand-off ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The decode engine took the KV and answered, as far as is known.
    #[default]
    Transferred,
    /// The decode engine's usage shows that it computed the prompt itself.
    Recomputed,
    /// A decode engine answered alone, because no hand-off can do what the request asks for, or none is worth it.
    Bypassed,
    /// A leg failed. A retry counts on its own.
    Failed,
    /// The decode engine refused the request.
    Refused,
}

impl Outcome {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Transferred => "transferred",
            Self::Recomputed => "recomputed",
            Self::Bypassed => "bypassed",
            Self::Failed => "failed",
            Self::Refused => "refused",
        }
    }
}

/// A timed part of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Timed {
    /// The wait for a decode engine that has room, where there was one.
    Queue,
    /// The prefill leg.
    Prefill,
    /// From the prefill's answer until the KV has arrived, where the connector says when.
    Handoff,
    /// From sending the decode leg to its first event or whole answer.
    DecodeFirstByte,
    /// The whole request.
    Total,
}

impl Timed {
    fn as_str(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Prefill => "prefill",
            Self::Handoff => "handoff",
            Self::DecodeFirstByte => "decode_first_byte",
            Self::Total => "total",
        }
    }
}

/// All metrics of a proxy.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    handoffs: Family<OutcomeLabels, Counter>,
    cleanups: Family<OutcomeLabels, Counter>,
    stages: Family<StageLabels, Histogram>,
    first_token: Histogram,
    retries: Counter,
    in_flight: Gauge,
    queued: Gauge,
    engine_in_flight: Family<EngineLabels, Gauge>,
    handoffs_open: Gauge,
    late_notifications: Gauge,
    malformed_notifications: Gauge,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let mut registry = Registry::with_prefix("xpyd");
        let metrics = Self {
            requests: Family::default(),
            handoffs: Family::default(),
            cleanups: Family::default(),
            stages: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
            first_token: Histogram::new(BUCKETS),
            retries: Counter::default(),
            in_flight: Gauge::default(),
            queued: Gauge::default(),
            engine_in_flight: Family::default(),
            handoffs_open: Gauge::default(),
            late_notifications: Gauge::default(),
            malformed_notifications: Gauge::default(),
            registry: Registry::default(),
        };
        registry.register(
            "requests",
            "Requests answered, by route and status",
            metrics.requests.clone(),
        );
        registry.register("handoff", "Hand-offs by how they ended", metrics.handoffs.clone());
        registry.register(
            "handoff_cleanups",
            "Hand-offs that ended early, by whether their KV could be freed",
            metrics.cleanups.clone(),
        );
        registry.register(
            "stage_seconds",
            "Time a stage of a request took",
            metrics.stages.clone(),
        );
        registry.register(
            "time_to_first_token_seconds",
            "Time from a request's arrival to its first event or whole answer",
            metrics.first_token.clone(),
        );
        registry.register(
            "retries",
            "Requests that were given a second pair of engines",
            metrics.retries.clone(),
        );
        registry.register("requests_in_flight", "Requests in the proxy", metrics.in_flight.clone());
        registry.register(
            "requests_queued",
            "Requests that wait for a decode engine with room",
            metrics.queued.clone(),
        );
        registry.register(
            "engine_requests_in_flight",
            "Requests in flight on an engine",
            metrics.engine_in_flight.clone(),
        );
        registry.register(
            "handoffs_open",
            "Hand-offs begun and neither consumed nor released",
            metrics.handoffs_open.clone(),
        );
        registry.register(
            "late_notifications",
            "LMCache notifications that nobody waited for",
            metrics.late_notifications.clone(),
        );
        registry.register(
            "malformed_notifications",
            "Messages on the notification socket that were no notification",
            metrics.malformed_notifications.clone(),
        );
        Self { registry, ..metrics }
    }

    pub(super) fn answered(&self, endpoint: &'static str, status: u16) {
        self.requests.get_or_create(&RequestLabels { endpoint, status }).inc();
    }

    pub(super) fn handed(&self, outcome: Outcome) {
        let outcome = outcome.as_str();
        self.handoffs.get_or_create(&OutcomeLabels { outcome }).inc();
    }

    /// The KV of a hand-off that ended early was freed, or could not be.
    pub(super) fn cleaned_up(&self, freed: bool) {
        let outcome = if freed { "freed" } else { "stranded" };
        self.cleanups.get_or_create(&OutcomeLabels { outcome }).inc();
    }

    pub(super) fn took(&self, stage: Timed, time: Duration) {
        let stage = stage.as_str();
        self.stages
            .get_or_create(&StageLabels { stage })
            .observe(time.as_secs_f64());
    }

    pub(super) fn first_token_after(&self, time: Duration) {
        self.first_token.observe(time.as_secs_f64());
    }

    pub(super) fn retried(&self) {
        self.retries.inc();
    }

    /// One hand-off more is open (`1`) or one less (`-1`).
    pub(super) fn open_handoffs(&self, change: i64) {
        self.handoffs_open.inc_by(change);
    }

    /// The metrics in Prometheus' text format, with what is only known at this moment.
    pub(super) fn text(
        &self,
        view: &FleetView,
        in_flight: usize,
        queued: usize,
        notifications: Option<&Notifications>,
    ) -> String {
        self.in_flight.set(to_gauge(in_flight));
        self.queued.set(to_gauge(queued));
        // Engines come and go with the view.
        self.engine_in_flight.clear();
        for engine in &view.engines {
            let labels = EngineLabels {
                engine: engine.id.to_string(),
                role: engine.role.to_string(),
            };
            self.engine_in_flight
                .get_or_create(&labels)
                .set(to_gauge(engine.load.in_flight()));
        }
        if let Some(notifications) = notifications {
            self.late_notifications
                .set(i64::try_from(notifications.late()).unwrap_or(i64::MAX));
            self.malformed_notifications
                .set(i64::try_from(notifications.malformed()).unwrap_or(i64::MAX));
        }
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).expect("writing to a string cannot fail");
        text
    }
}

fn to_gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
