//! The proxy itself, and the state that all of its requests share.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::body::read::BodyReader;
use super::error::ProxyError;
use super::request::model_length::ModelList;
use super::schedule::pairs::Pairs;
use super::schedule::selection::Scheduler;
use super::server::engine_status::Version;
use super::server::handlers;
use super::server::listen::{self, Limits};
use super::settings::Settings;
use super::telemetry::metrics::Metrics;
use super::transfer::notify::Notifications;
use super::upstream::{SharedAnswer, Upstream};
use xpyd_base::fleet::{EngineId, EngineView, FleetView, Role};
use xpyd_base::proxy_config::RequestDeadlines;

/// A proxy. Clones are the same proxy.
#[derive(Debug, Clone)]
pub struct Proxy(pub(crate) Arc<Shared>);

/// The state that all requests of a proxy share.
pub(crate) struct Shared {
    pub(crate) settings: Settings,
    pub(crate) view: watch::Receiver<Arc<FleetView>>,
    pub(crate) notifications: Option<Notifications>,
    pub(crate) upstream: Upstream,
    pub(crate) metrics: Metrics,
    /// The merged metrics and the engines' version. Clients share the answers, so that many clients do not multiply
    /// the calls to engines.
    pub(crate) merged: SharedAnswer<Bytes>,
    pub(crate) version: SharedAnswer<Option<Version>>,
    /// The healthy engines, for a proxy without a supervisor.
    pub(crate) healthy: SharedAnswer<Arc<[EngineId]>>,
    /// The engines' models, once an engine has listed them.
    pub(crate) model_list_answer: SharedAnswer<Option<ModelList>>,
    pub(crate) model_list: OnceLock<ModelList>,
    pub(crate) admission: Arc<Semaphore>,
    pub(crate) bodies: Arc<BodyReader>,
    pub(crate) scheduler: Scheduler,
    pub(crate) pairs: Mutex<Pairs>,
    /// The pair (prefill, decode) whose hand-offs fail or are slow.
    pub(crate) suspects: watch::Sender<Option<(EngineId, EngineId)>>,
    pub(crate) prefill_turn: AtomicUsize,
    pub(crate) decode_turn: AtomicUsize,
    /// The clean-ups of hand-offs that ended early. [`Proxy::serve`] waits for them.
    pub(crate) cleanups: TaskTracker,
    /// Limits the clean-ups that wait for an overdue notification.
    pub(crate) overdue: Arc<Semaphore>,
    /// Cancelled when the proxy ends.
    pub(crate) closing: CancellationToken,
}

/// Maximum clean-ups that wait for an overdue notification. Each costs about a kilobyte and its request's body.
const OVERDUE_AT_ONCE: usize = 1024;

impl Proxy {
    /// A proxy over the engines of `view`. LMCache needs `notifications`.
    pub fn new(
        settings: Settings,
        view: watch::Receiver<Arc<FleetView>>,
        notifications: Option<Notifications>,
    ) -> Self {
        let admission = Arc::new(Semaphore::new(
            settings.config.max_in_flight.min(Semaphore::MAX_PERMITS),
        ));
        let metrics = Metrics::new(&settings);
        let bodies = BodyReader::new(settings.config.max_body, settings.config.admission.body_bytes);
        Self(Arc::new(Shared {
            upstream: Upstream::new(metrics.overload.clone()),
            bodies: Arc::new(bodies),
            scheduler: Scheduler::new(&settings.config.admission),
            metrics,
            pairs: Mutex::default(),
            suspects: watch::Sender::default(),
            settings,
            view,
            notifications,
            merged: SharedAnswer::default(),
            version: SharedAnswer::default(),
            healthy: SharedAnswer::default(),
            model_list_answer: SharedAnswer::default(),
            model_list: OnceLock::new(),
            admission,
            prefill_turn: AtomicUsize::new(0),
            decode_turn: AtomicUsize::new(0),
            cleanups: TaskTracker::new(),
            overdue: Arc::new(Semaphore::new(OVERDUE_AT_ONCE)),
            closing: CancellationToken::new(),
        }))
    }

    /// Serves until `stop` is cancelled, then waits for requests in flight and clean-ups. The caller must bound that
    /// wait.
    ///
    /// # Errors
    /// When the listener cannot be used, or a thread cannot start.
    pub async fn serve(self, listener: tokio::net::TcpListener, stop: CancellationToken) -> std::io::Result<()> {
        let router = handlers::router(Arc::clone(&self.0));
        let limits = Limits {
            clients: self.0.settings.config.clients.clone(),
            tls: self.0.settings.parts.tls.clone(),
            stall: self.0.settings.deadlines.decode_idle,
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

    /// How long a request can wait in the queue until it is answered 503.
    pub fn queue_deadline(&self) -> Duration {
        self.0.settings.config.admission.queue_deadline
    }

    /// The engines that do not answer `/health` with success, each asked once.
    pub async fn unhealthy_engines(&self) -> Vec<Arc<EngineView>> {
        let healthy = self.0.healthy_engines().await;
        let view = Arc::clone(&self.0.view.borrow());
        let engines = view.engines.iter().filter(|engine| !healthy.contains(&engine.id));
        engines.cloned().collect()
    }

    /// Requests in the proxy now, including clean-ups of hand-offs.
    pub fn in_flight(&self) -> usize {
        self.0.in_flight()
    }

    /// The pair (prefill, decode) whose hand-offs for clients fail or are slow, whenever there is one.
    pub fn suspects(&self) -> watch::Receiver<Option<(EngineId, EngineId)>> {
        self.0.suspects.subscribe()
    }

    /// The proxy's own metrics in `OpenMetrics`' text format.
    pub fn metrics_text(&self) -> String {
        self.0.metrics_text(true)
    }
}

impl Shared {
    pub(crate) fn admit(&self) -> Result<OwnedSemaphorePermit, ProxyError> {
        Arc::clone(&self.admission)
            .try_acquire_owned()
            .map_err(|_| ProxyError::Busy {
                limit: self.settings.config.max_in_flight,
            })
    }

    pub(crate) fn deadlines(&self) -> RequestDeadlines {
        self.settings.deadlines
    }

    /// Records whether a client's hand-off between these engines was good or bad.
    pub(crate) fn note_handoff(&self, engines: &[Arc<EngineView>], is_bad: bool) {
        let of = |role| engines.iter().find(|engine| engine.role == role);
        let (Some(prefill), Some(decode)) = (of(Role::Prefill), of(Role::Decode)) else {
            return;
        };
        let mut pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        if pairs.note(prefill, decode, is_bad, Instant::now()) {
            tracing::warn!(prefill = %prefill.id, decode = %decode.id, "hand-offs fail or are slow");
            self.suspects
                .send_replace(Some((prefill.id.clone(), decode.id.clone())));
        }
    }

    /// One round-robin counter per role, so that pairs stay together if both roles have as many engines, as in the
    /// reference proxy.
    pub(crate) fn next_turn(&self, role: Role) -> usize {
        let turn = match role {
            Role::Prefill => &self.prefill_turn,
            Role::Decode => &self.decode_turn,
        };
        turn.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn in_flight(&self) -> usize {
        let limit = self.settings.config.max_in_flight.min(Semaphore::MAX_PERMITS);
        limit.saturating_sub(self.admission.available_permits())
    }

    pub(crate) fn metrics_text(&self, as_vllm: bool) -> String {
        let view = Arc::clone(&self.view.borrow());
        self.metrics.set_body_bytes(self.bodies.held());
        self.metrics.text(
            &view,
            self.in_flight(),
            self.scheduler.waiting(),
            self.notifications.as_ref().map(Notifications::errors),
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
