//! The hooks that the supervisor of a run calls: canaries through the proxy, diagnosis from logs, GPU checks with NVML.

use tokio_util::sync::CancellationToken;

use super::canaries::Canaries;
use super::client_socket::ClientService;
use super::diagnosis::LogDiagnosis;
use super::gpu_watch::GpuChecks;
use crate::plan::EngineSpec;
use crate::supervisor::{CanaryResult, CanaryRound, Diagnose, HookFuture, Hooks, Leftover};

/// The hooks of a run with a proxy.
pub(super) struct RunHooks {
    pub(super) canaries: Canaries,
    pub(super) clients: ClientService,
    pub(super) diagnosis: LogDiagnosis,
    pub(super) gpus: GpuChecks,
}

impl Hooks for RunHooks {
    fn run_canaries(&self, round: CanaryRound) -> HookFuture<Vec<CanaryResult>> {
        self.canaries.run(round)
    }

    fn hand_over_clients(&self) -> HookFuture<()> {
        self.clients.hand_over()
    }

    fn diagnosis_of_start(&self, engine: &EngineSpec) -> Diagnose {
        self.diagnosis.of_start(engine)
    }

    fn await_gpu_memory(&self, engine: EngineSpec) -> HookFuture<Result<(), String>> {
        self.gpus.await_memory(engine)
    }

    fn check_gpu_placement(&self, engine: EngineSpec, leader: u32) -> HookFuture<Result<(), String>> {
        self.gpus.check_placement(engine, leader)
    }

    fn await_gpu_release(&self, engines: Vec<EngineSpec>, force_exit: CancellationToken) -> HookFuture<Vec<Leftover>> {
        self.gpus.await_release(engines, force_exit)
    }
}
