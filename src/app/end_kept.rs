//! Ends the engines that an earlier xpyd left running: supervised like the end of any run, without a proxy.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use tokio_util::sync::CancellationToken;

use super::gpu_watch::GpuChecks;
use super::signals;
use crate::control::rundir::RunDir;
use crate::plan::{EngineSpec, RestartPolicy, RestartWhen};
use crate::report::{ExitStatus, Failure};
use crate::supervisor::{
    self, AttachableRun, CanaryResult, CanaryRound, Diagnose, FailureCause, HookFuture, Hooks, Keep, Leftover, Outcome,
};
use crate::ui::{Printer, StopProgress};

/// An engine that has ended must not start again while the others are being stopped.
const NO_RESTART: RestartPolicy = RestartPolicy {
    policy: RestartWhen::Always,
    max_restarts: u32::MAX,
    backoff: Duration::from_hours(1),
    max_backoff: Duration::from_hours(1),
    stable_after: Duration::ZERO,
};

/// The hooks of a run that only ends: no canary, no client, no diagnosis.
struct StopHooks {
    gpus: GpuChecks,
}

impl Hooks for StopHooks {
    fn run_canaries(&self, _: CanaryRound) -> HookFuture<Vec<CanaryResult>> {
        Box::pin(std::future::pending())
    }

    fn hand_over_clients(&self) -> HookFuture<()> {
        Box::pin(std::future::ready(()))
    }

    fn diagnosis_of_start(&self, _: &EngineSpec) -> Diagnose {
        Arc::new(|_| FailureCause::default())
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

/// Stops the engines of `kept`: with their grace period, or at once with `force`.
///
/// # Errors
/// When the specs that the shim keeps cannot be read, or signal handlers cannot be installed.
pub async fn end_kept(
    kept: AttachableRun,
    run_dir: &RunDir,
    name: String,
    force: bool,
    printer: Printer,
) -> Result<Outcome, Failure> {
    let engines = kept
        .specs()
        .map_err(|error| Failure::new(ExitStatus::RunState, error))?;
    let folder = kept.kept.run_dir.clone();
    let settings = supervisor::Settings {
        reservations: supervisor::reserve_running(&engines),
        drain_deadline: Duration::ZERO,
        verify_deadline: Duration::ZERO,
        restart: NO_RESTART,
        keep: Keep {
            socket: run_dir.attach_path(),
            // If this process is killed meanwhile, the shim ends them.
            wait: Duration::ZERO,
            run_dir: folder.clone(),
        },
        attach: Some(kept),
        // From now on clients that wait for the next xpyd are refused.
        listener: None,
        run_dir: folder,
        run_name: name,
        program: std::env::current_exe().map_err(anyhow::Error::from)?,
        engines,
    };
    let (view, mut shown) = watch::channel(Arc::new(supervisor::initial_view(&settings.engines)));
    let (requests, request_receiver) = mpsc::channel(1);
    let (reply, _outcome) = oneshot::channel();
    let stop = supervisor::Request::Stop { force, reply };
    requests
        .try_send(stop)
        .map_err(|_| Failure::message(ExitStatus::Bug, "a new queue is full"))?;
    let (notes, mut told) = mpsc::channel(8);
    let (mut parts, end) = (tokio::task::JoinSet::new(), CancellationToken::new());
    let wiring = supervisor::Wiring {
        signals: signals::forward(&mut parts, &end, false, false)?,
        requests: request_receiver,
        view,
        hooks: StopHooks {
            gpus: GpuChecks::new(&settings.engines, &settings.run_dir, notes),
        },
    };
    let mut progress = StopProgress::new(printer, "press Ctrl+C twice to force");
    let show = async {
        loop {
            tokio::select! {
                changed = shown.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    let view = shown.borrow_and_update().clone();
                    let left = view.engines.iter().filter(|engine| engine.state.is_alive());
                    progress.stopping(&left.map(|engine| engine.id.clone()).collect::<Vec<_>>());
                }
                Some(note) = told.recv() => printer.status(note),
            }
        }
        std::future::pending::<std::convert::Infallible>().await
    };
    let outcome = tokio::select! {
        outcome = supervisor::run(settings, wiring) => outcome,
        never = show => match never {},
    };
    progress.clear();
    end.cancel();
    super::join(parts).await;
    run_dir.remove_engine_key();
    Ok(outcome)
}
