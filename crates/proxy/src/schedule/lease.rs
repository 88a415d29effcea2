//! Leases on engines: a request's place on an engine while a leg runs, and the watch for the engine's end.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::selection::Reservation;
use crate::error::{Cause, ProxyError, RequestStage};
use xpyd_base::fleet::{EngineState, EngineView, FleetView, KeptGuard, LoadGuard};

/// One request's place on one incarnation of an engine. The engine counts as loaded until it is dropped.
#[derive(Debug)]
pub(crate) struct EngineLease {
    pub(crate) engine: Arc<EngineView>,
    view: watch::Receiver<Arc<FleetView>>,
    reservation: Option<Reservation>,
    _guard: LoadGuard,
}

impl EngineLease {
    /// Acquires a place, unless the engine accepts no more requests.
    pub(crate) fn acquire(engine: &Arc<EngineView>, view: &watch::Receiver<Arc<FleetView>>) -> Option<Self> {
        engine.load.try_enter().map(|guard| Self {
            engine: Arc::clone(engine),
            view: view.clone(),
            reservation: None,
            _guard: guard,
        })
    }

    /// Adds the reservation of tokens that belongs to the request.
    pub(crate) fn with_reservation(self, reservation: Reservation) -> Self {
        Self {
            reservation: Some(reservation),
            ..self
        }
    }

    /// The tokens that the request has reserved on the engine.
    pub(crate) fn reservation(&self) -> Option<&Reservation> {
        self.reservation.as_ref()
    }

    /// Returns once this incarnation has ended.
    pub(crate) async fn gone(&self) {
        gone(&self.engine, &self.view).await;
    }

    /// A watch of the same incarnation, without a place on it.
    pub(crate) fn watch(&self) -> EngineWatch {
        EngineWatch {
            engine: Arc::clone(&self.engine),
            view: self.view.clone(),
        }
    }

    /// Marks KV of the request as waiting on this engine, possibly for longer than the lease.
    pub(crate) fn hold_kv(&self) -> PendingKv {
        PendingKv {
            watch: self.watch(),
            _guard: self.engine.load.keep(),
        }
    }

    /// Runs one step of a leg until its deadline, or until the engine has ended.
    pub(crate) async fn run<T>(
        &self,
        stage: RequestStage,
        deadline: Duration,
        step: impl Future<Output = Result<T, Cause>>,
    ) -> Result<T, ProxyError> {
        let outcome = tokio::select! {
            biased;
            outcome = step => outcome,
            () = self.gone() => Err(Cause::Gone),
            () = tokio::time::sleep(deadline) => Err(Cause::Timeout(deadline)),
        };
        outcome.map_err(|cause| self.failed(stage, cause))
    }

    /// The error of a leg on this engine.
    pub(crate) fn failed(&self, stage: RequestStage, cause: Cause) -> ProxyError {
        ProxyError::Leg {
            stage,
            engine: self.engine.id.clone(),
            cause,
        }
    }
}

/// One incarnation of an engine, watched for its end.
#[derive(Debug)]
pub(crate) struct EngineWatch {
    engine: Arc<EngineView>,
    view: watch::Receiver<Arc<FleetView>>,
}

impl EngineWatch {
    /// Returns once the incarnation has ended.
    pub(crate) async fn gone(&self) {
        gone(&self.engine, &self.view).await;
    }

    /// A place on it, unless it accepts no more requests.
    pub(crate) fn lease(&self) -> Option<EngineLease> {
        EngineLease::acquire(&self.engine, &self.view)
    }
}

/// KV that waits on an engine. A drain of the engine waits until this is dropped.
#[derive(Debug)]
pub(crate) struct PendingKv {
    watch: EngineWatch,
    _guard: KeptGuard,
}

impl PendingKv {
    /// Returns once the engine, and so the KV, is gone.
    pub(crate) async fn gone(&self) {
        self.watch.gone().await;
    }

    /// Lets a drain of the engine continue, and keeps watching the engine.
    pub(crate) fn into_watch(self) -> EngineWatch {
        self.watch
    }
}

/// A closed load alone does not end an incarnation: a draining engine finishes its requests.
async fn gone(engine: &EngineView, view: &watch::Receiver<Arc<FleetView>>) {
    engine.load.closed().await;
    let mut view = view.clone();
    loop {
        let lives = view.borrow_and_update().engine(&engine.id).is_some_and(|now| {
            now.incarnation == engine.incarnation
                && matches!(
                    now.state,
                    EngineState::Healthy | EngineState::Ready | EngineState::Draining
                )
        });
        if !lives || view.changed().await.is_err() {
            return;
        }
    }
}
