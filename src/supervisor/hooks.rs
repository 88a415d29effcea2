//! What the supervisor asks of the rest of xpyd. It knows no proxy, reads no log and asks no GPU driver itself.

use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Leftover;
use crate::fleet::{EngineId, Exit, Retry};
use crate::plan::EngineSpec;

/// The result of a hook that takes time. It borrows nothing, because it runs as a task beside the supervisor's loop.
pub type HookFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Searches the log of one incarnation for the cause of its failure. Blocks. Takes how the leader ended; `None` if it still runs.
pub type Diagnose = Arc<dyn Fn(Option<Exit>) -> FailureCause + Send + Sync>;

/// Implemented by the app; tests of the supervisor use one of their own. The GPU hooks are called only for engines on GPUs with
/// known UUIDs, and by default find nothing wrong.
pub trait Hooks: Send {
    /// Sends the canaries of a round. Returns the result of each pair, in the order of its pairs.
    fn run_canaries(&self, round: CanaryRound) -> HookFuture<Vec<CanaryResult>>;

    /// Stops accepting clients' connections. Completes once every request on the accepted ones has its response.
    fn hand_over_clients(&self) -> HookFuture<()>;

    /// Called before each start of an engine, because each incarnation appends to the log of the last one. The result later
    /// diagnoses this incarnation.
    fn diagnosis_of_start(&self, engine: &EngineSpec) -> Diagnose;

    /// Waits, before an engine starts, until the memory of earlier processes on its GPUs is free. The error names the holder, and
    /// continues a sentence that begins with the engine's name.
    fn await_gpu_memory(&self, engine: EngineSpec) -> HookFuture<Result<(), String>> {
        let _ = engine;
        Box::pin(std::future::ready(Ok(())))
    }

    /// Checks, once an engine is up, that the driver shows the processes of its leader's tree or session on its GPUs and on no
    /// other. The error continues a sentence as well.
    fn check_gpu_placement(&self, engine: EngineSpec, leader: u32) -> HookFuture<Result<(), String>> {
        let _ = (engine, leader);
        Box::pin(std::future::ready(Ok(())))
    }

    /// Waits, after the end of all engines, until their GPU memory is free or `force_exit` is cancelled. Returns what is still held.
    fn await_gpu_release(&self, engines: Vec<EngineSpec>, force_exit: CancellationToken) -> HookFuture<Vec<Leftover>> {
        let _ = (engines, force_exit);
        Box::pin(std::future::ready(Vec::new()))
    }
}

/// Canaries that are sent together.
#[derive(Debug)]
pub struct CanaryRound {
    /// The pairs of prefill and decode engine that each get one.
    pub pairs: Vec<(EngineId, EngineId)>,
    /// Whether all pairs are tried at the same time, so that an engine that does not answer delays no other one.
    pub at_once: bool,
    /// Gets each pair as soon as its canary worked. Has room for all pairs.
    pub worked: mpsc::Sender<(EngineId, EngineId)>,
}

/// The result of the canary through one pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CanaryResult {
    /// The hand-off works.
    Worked,
    /// The hand-off fails. Holds a sentence that names the pair.
    Failed(String),
    /// The time of the round was over before.
    Untried,
}

/// The cause of a failure, as far as the log of the incarnation shows it. The default is an unknown cause.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FailureCause {
    /// Whether another start can help.
    pub retry: Retry,
    /// The known failure and the first real error, in one line; `None` if the log does not show it.
    pub found: Option<String>,
    /// The last phase that the start reached, as people read it; `None` if the log does not show it.
    pub phase: Option<&'static str>,
}

/// Runs a diagnosis on a thread where it can block. Without one the cause is unknown.
pub(super) async fn diagnose(diagnose: Option<Diagnose>, exit: Option<Exit>) -> FailureCause {
    match diagnose {
        Some(diagnose) => tokio::task::spawn_blocking(move || diagnose(exit))
            .await
            .unwrap_or_default(),
        None => FailureCause::default(),
    }
}

/// Whether the GPU hooks apply to the engine.
pub(super) fn has_gpus(engine: &EngineSpec) -> bool {
    engine.node.is_none() && !engine.gpu_uuids.is_empty()
}
