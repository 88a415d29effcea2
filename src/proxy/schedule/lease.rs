//! A request's place on an engine: held while a leg runs, and watched for the engine's end.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::selection::Held;
use crate::fleet::{EngineState, EngineView, FleetView, KeptGuard, LoadGuard};
use crate::proxy::error::{Cause, ProxyError, Stage};

/// One request's place on one incarnation of an engine. The engine counts as loaded while it lives.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) engine: Arc<EngineView>,
    view: watch::Receiver<Arc<FleetView>>,
    held: Option<Held>,
    _guard: LoadGuard,
}

impl Seat {
    /// Takes a place, unless the engine lets nobody in any more.
    pub(crate) fn take(engine: &Arc<EngineView>, view: &watch::Receiver<Arc<FleetView>>) -> Option<Self> {
        engine.load.try_enter().map(|guard| Self {
            engine: Arc::clone(engine),
            view: view.clone(),
            held: None,
            _guard: guard,
        })
    }

    /// The seat of a request that weighs something.
    pub(crate) fn holding(self, held: Held) -> Self {
        Self {
            held: Some(held),
            ..self
        }
    }

    /// What its request weighs.
    pub(crate) fn held(&self) -> Option<&Held> {
        self.held.as_ref()
    }

    /// Returns once this incarnation has gone.
    pub(crate) async fn gone(&self) {
        gone(&self.engine, &self.view).await;
    }

    /// The same incarnation, without a place on it.
    pub(crate) fn watch(&self) -> EngineWatch {
        EngineWatch {
            engine: Arc::clone(&self.engine),
            view: self.view.clone(),
        }
    }

    /// Says that KV of the seat's request waits on this engine, for longer than the seat may be taken.
    pub(crate) fn keep(&self) -> Kept {
        Kept {
            watch: self.watch(),
            _guard: self.engine.load.keep(),
        }
    }

    /// Runs one step of a leg until its deadline, or until the engine has gone.
    pub(crate) async fn run<T>(
        &self,
        stage: Stage,
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
    pub(crate) fn failed(&self, stage: Stage, cause: Cause) -> ProxyError {
        ProxyError::Leg {
            stage,
            engine: self.engine.id.clone(),
            cause,
        }
    }
}

/// One incarnation of an engine, which somebody must know the end of.
#[derive(Debug)]
pub(crate) struct EngineWatch {
    engine: Arc<EngineView>,
    view: watch::Receiver<Arc<FleetView>>,
}

impl EngineWatch {
    /// Returns once it has gone.
    pub(crate) async fn gone(&self) {
        gone(&self.engine, &self.view).await;
    }

    /// A place on it, unless it lets nobody in any more.
    pub(crate) fn seat(&self) -> Option<Seat> {
        Seat::take(&self.engine, &self.view)
    }
}

/// KV that waits on an engine. Until it is dropped, a drain of the engine waits as well.
#[derive(Debug)]
pub(crate) struct Kept {
    watch: EngineWatch,
    _guard: KeptGuard,
}

impl Kept {
    /// Returns once the engine, and so the KV, has gone.
    pub(crate) async fn gone(&self) {
        self.watch.gone().await;
    }

    /// Lets a drain of the engine go ahead, and keeps watching the engine.
    pub(crate) fn into_watch(self) -> EngineWatch {
        self.watch
    }
}

/// A closed load alone is not the end of an incarnation: a draining engine finishes what it has.
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
