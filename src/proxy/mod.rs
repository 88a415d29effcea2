//! The proxy: the OpenAI API over a fleet of prefill and decode engines.
//!
//! `flow` reads top to bottom and is the place to start. The proxy learns of engines from the fleet's view alone; it
//! does not know who starts them, from which profile, or what arguments they got.

mod access;
mod admission;
mod alive;
mod answer;
mod api;
mod bodies;
mod body;
mod breaker;
mod canary;
mod connections;
mod cors;
mod entrance;
mod error;
mod flow;
mod guard;
mod key;
mod ledger;
mod listen;
#[cfg(test)]
mod matrix;
mod media;
mod merge;
mod metrics;
mod notify;
mod overload;
mod pairs;
mod pass;
mod pick;
mod prefix;
mod record;
mod routes;
mod rules;
mod scrape;
mod seats;
mod splice;
mod sse;
mod strict;
mod tls;
mod trace;
mod upstream;
mod usage;

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connector::Connector;
use crate::fleet::{EngineId, EngineView, FleetView, Role};
use crate::service::Service;

pub use access::AccessLog;
pub use canary::{CanaryError, CanaryPrompts, CanaryReport, Transferred};
pub use key::{ClientKeys, EngineKey, KeyError, LineError};
pub use notify::{Notifications, NotifyError};
pub use tls::{Tls, TlsError, validity};
pub use trace::{Traces, TracesError};

use bodies::Bodies;
use error::ProxyError;
use flow::Deadlines;
use listen::Limits;
use metrics::Metrics;
use pairs::Pairs;
use scrape::{Spaced, Version};
use seats::Seats;
use upstream::Upstream;

/// How a proxy behaves.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How KV moves between the engines.
    pub connector: Connector,
    /// The model that canaries ask for.
    pub served_model_name: String,
    /// Header whose value binds a session to its engines; `None` binds nothing.
    pub session_header: Option<String>,
    /// Notifications to wait for per prefill; `None` means one per tensor-parallel rank.
    pub notifications: Option<u16>,
    /// How long one prefill leg may take, from its first byte out to its whole answer.
    pub prefill_deadline: Duration,
    /// How long the KV may take to arrive after the prefill's answer.
    pub handoff_deadline: Duration,
    /// How long the decode leg may take to its first byte, and then between two reads. An answer that is not streamed
    /// is one read, so this bounds its whole generation.
    pub decode_idle_deadline: Duration,
    /// How long a prefill engine keeps KV for a decode engine; `None` if it is not known, or KV is pushed.
    pub kv_lease: Option<Duration>,
    /// Whether the proxy asks engines whether they are well when it is asked, because nobody watches them.
    pub asks_engines: bool,
    /// Largest body of a client's request, in bytes.
    pub max_body_bytes: usize,
    /// Most requests in the proxy at once; one more is answered 503.
    pub max_in_flight: usize,
    /// What is written down nowhere.
    pub parts: Parts,
    /// How clients are served.
    pub service: Service,
}

/// What a proxy needs and no plan, which is written down, holds: secrets, and what is open.
#[derive(Debug, Clone, Default)]
pub struct Parts {
    /// The keys of which clients must bear one.
    pub client_keys: ClientKeys,
    /// What clients are shown; absent: plain HTTP is spoken.
    pub tls: Option<Tls>,
    /// The key that the engines want.
    pub engine_key: Option<EngineKey>,
    /// Where requests are written down.
    pub access_log: Option<AccessLog>,
    /// Where traces go.
    pub traces: Option<Traces>,
}

/// A proxy. Clones are the same proxy.
#[derive(Debug, Clone)]
pub struct Proxy(Arc<Shared>);

/// What all requests of a proxy share.
struct Shared {
    settings: Settings,
    view: watch::Receiver<Arc<FleetView>>,
    notifications: Option<Notifications>,
    upstream: Upstream,
    metrics: Metrics,
    /// The merged metrics and the engines' version: many clients that ask do not multiply the questions to engines.
    merged: Spaced<Bytes>,
    version: Spaced<Option<Version>>,
    /// The engines that are well, where nobody watches them.
    well: Spaced<Arc<[EngineId]>>,
    /// How long the engines' model is, once one of them has said it.
    asked_length: Spaced<Option<u64>>,
    model_length: OnceLock<u64>,
    admission: Arc<Semaphore>,
    bodies: Arc<Bodies>,
    seats: Seats,
    pairs: Mutex<Pairs>,
    /// The pair (prefill, decode) between which hand-offs fail or crawl.
    suspects: watch::Sender<Option<(EngineId, EngineId)>>,
    prefill_turn: AtomicUsize,
    decode_turn: AtomicUsize,
    /// The clean-ups of hand-offs that ended early; [`Proxy::serve`] waits for them.
    cleanups: TaskTracker,
    /// Places for clean-ups that wait for an overdue notification.
    overdue: Arc<Semaphore>,
    /// The proxy ends.
    closing: CancellationToken,
}

/// Overdue notifications that are waited for at once. Each costs about a kilobyte and its request's body.
const OVERDUE_AT_ONCE: usize = 1024;

impl Proxy {
    /// A proxy over the engines of `view`. LMCache needs `notifications`.
    pub fn new(
        settings: Settings,
        view: watch::Receiver<Arc<FleetView>>,
        notifications: Option<Notifications>,
    ) -> Self {
        let admission = Arc::new(Semaphore::new(settings.max_in_flight.min(Semaphore::MAX_PERMITS)));
        let metrics = Metrics::new(&settings);
        let bodies = Bodies::new(settings.max_body_bytes, settings.service.admission.body_bytes);
        Self(Arc::new(Shared {
            upstream: Upstream::new(metrics.overload.clone()),
            bodies: Arc::new(bodies),
            seats: Seats::new(&settings.service.admission),
            metrics,
            pairs: Mutex::default(),
            suspects: watch::Sender::default(),
            settings,
            view,
            notifications,
            merged: Spaced::default(),
            version: Spaced::default(),
            well: Spaced::default(),
            asked_length: Spaced::default(),
            model_length: OnceLock::new(),
            admission,
            prefill_turn: AtomicUsize::new(0),
            decode_turn: AtomicUsize::new(0),
            cleanups: TaskTracker::new(),
            overdue: Arc::new(Semaphore::new(OVERDUE_AT_ONCE)),
            closing: CancellationToken::new(),
        }))
    }

    /// Serves until `stop` is cancelled, then lets what is in flight end, clean-ups included. How long that may take is
    /// the caller's to bound.
    ///
    /// # Errors
    /// When the listener cannot be used, or no thread can be started.
    pub async fn serve(self, listener: tokio::net::TcpListener, stop: CancellationToken) -> std::io::Result<()> {
        let router = routes::router(Arc::clone(&self.0));
        let limits = Limits {
            clients: self.0.settings.service.clients.clone(),
            tls: self.0.settings.parts.tls.clone(),
            stall: self.0.settings.decode_idle_deadline,
            upstream: self.0.upstream.clone(),
            overload: self.0.metrics.overload.clone(),
        };
        let served = async {
            let threads = listen::serve(listener, router, limits, stop).await?;
            self.0.closing.cancel();
            self.0.cleanups.close();
            self.0.cleanups.wait().await;
            drop(threads);
            Ok(())
        };
        tokio::select! {
            served = served => served,
            () = self.0.upstream.close_idle() => Ok(()),
        }
    }

    /// How long a request may wait until it is answered 503.
    pub fn queue_deadline(&self) -> Duration {
        self.0.settings.service.admission.queue_deadline
    }

    /// Requests in the proxy now, clean-ups of hand-offs included.
    pub fn in_flight(&self) -> usize {
        self.0.in_flight()
    }

    /// The pair (prefill, decode) between which clients' hand-offs fail or crawl, whenever there is one.
    pub fn suspects(&self) -> watch::Receiver<Option<(EngineId, EngineId)>> {
        self.0.suspects.subscribe()
    }

    /// The proxy's own metrics in `OpenMetrics`' text format.
    pub fn metrics_text(&self) -> String {
        self.0.metrics_text(true)
    }
}

impl Shared {
    fn admit(&self) -> Result<OwnedSemaphorePermit, ProxyError> {
        Arc::clone(&self.admission)
            .try_acquire_owned()
            .map_err(|_| ProxyError::Busy {
                limit: self.settings.max_in_flight,
            })
    }

    fn deadlines(&self) -> Deadlines {
        Deadlines {
            prefill: self.settings.prefill_deadline,
            handoff: self.settings.handoff_deadline,
            decode: self.settings.decode_idle_deadline,
        }
    }

    /// A client's hand-off between these engines was good or bad.
    fn note_handoff(&self, engines: &[Arc<EngineView>], is_bad: bool) {
        let of = |role| engines.iter().find(|engine| engine.role == role);
        let (Some(prefill), Some(decode)) = (of(Role::Prefill), of(Role::Decode)) else {
            return;
        };
        let mut pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        if pairs.note(prefill, decode, is_bad, Instant::now()) {
            tracing::warn!(prefill = %prefill.id, decode = %decode.id, "hand-offs fail or crawl");
            self.suspects
                .send_replace(Some((prefill.id.clone(), decode.id.clone())));
        }
    }

    /// One counter per role, so that with equal numbers of engines the pairs stay together, as in the reference proxy.
    fn next_turn(&self, role: Role) -> usize {
        let turn = match role {
            Role::Prefill => &self.prefill_turn,
            Role::Decode => &self.decode_turn,
        };
        turn.fetch_add(1, Ordering::Relaxed)
    }

    fn in_flight(&self) -> usize {
        let limit = self.settings.max_in_flight.min(Semaphore::MAX_PERMITS);
        limit.saturating_sub(self.admission.available_permits())
    }

    fn metrics_text(&self, as_vllm: bool) -> String {
        let view = Arc::clone(&self.view.borrow());
        self.metrics.holds_bodies(self.bodies.held());
        self.metrics.text(
            &view,
            self.in_flight(),
            self.seats.waiting(),
            self.notifications.as_ref(),
            as_vllm,
        )
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Proxy")
            .field("settings", &self.settings)
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}
