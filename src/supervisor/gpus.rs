//! What the supervisor wants to know about the GPUs of engines. It asks no driver itself: the app gives it functions.

use std::fmt;
use std::pin::Pin;

use tokio_util::sync::CancellationToken;

use super::Leftover;
use crate::plan::EngineSpec;

/// An answer that takes a while.
pub type Answer<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Asked with an engine.
pub type BeforeStart = Box<dyn Fn(EngineSpec) -> Answer<Result<(), String>> + Send>;

/// Asked with an engine and the process id of its leader.
pub type Placed = Box<dyn Fn(EngineSpec, u32) -> Answer<Result<(), String>> + Send>;

/// Asked with all engines, and with what is cancelled when nobody wants to wait any longer.
pub type Released = Box<dyn Fn(Vec<EngineSpec>, CancellationToken) -> Answer<Vec<Leftover>> + Send>;

/// The questions. They are asked about engines with GPUs whose UUIDs are known, so a fleet without any asks nothing.
pub struct GpuChecks {
    /// Before an engine starts: waits until the memory of what ran on its GPUs before it, and of its own earlier start, is
    /// back. The error says who holds it, as the end of the sentence "decoder1 …".
    pub before_start: BeforeStart,
    /// Once an engine is up: whether the driver shows the processes below its leader, or in the leader's session, on its
    /// GPUs and on no other. The error is the end of such a sentence as well.
    pub placed: Placed,
    /// After the end of all engines: waits until their memory is back, or nobody wants to wait any longer; what is still
    /// held.
    pub released: Released,
}

impl fmt::Debug for GpuChecks {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("GpuChecks").finish_non_exhaustive()
    }
}

impl GpuChecks {
    /// For fleets whose GPUs nobody watches.
    pub fn none() -> Self {
        Self {
            before_start: Box::new(|_| Box::pin(std::future::ready(Ok(())))),
            placed: Box::new(|_, _| Box::pin(std::future::ready(Ok(())))),
            released: Box::new(|_, _| Box::pin(std::future::ready(Vec::new()))),
        }
    }
}

/// Whether the driver can be asked about the engine.
pub(super) fn has_gpus(engine: &EngineSpec) -> bool {
    !engine.gpu_uuids.is_empty()
}
