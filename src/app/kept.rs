//! The end of engines that an earlier xpyd left: supervised like the end of any run, without a proxy.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use super::signals;
use crate::control::rundir::RunDir;
use crate::plan::{RestartPolicy, RestartWhen};
use crate::report::{ExitStatus, Failure};
use crate::supervisor::{self, Keep, KeptRun, Outcome};
use crate::ui::{Printer, StopProgress};

/// An engine that has ended must not start again only because the others are still to be stopped.
const NO_RESTART: RestartPolicy = RestartPolicy {
    policy: RestartWhen::Always,
    max_restarts: u32::MAX,
    backoff: Duration::from_hours(1),
    max_backoff: Duration::from_hours(1),
    stable_after: Duration::ZERO,
};

/// Takes the engines of `kept` down, with their grace unless `force`.
///
/// # Errors
/// When the shim's memory of them cannot be read, or signals cannot be listened to.
pub async fn end_kept(
    kept: KeptRun,
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
            // Should this process be killed in the middle, they go on ending.
            wait: Duration::ZERO,
            run_dir: folder.clone(),
        },
        attach: Some(kept),
        // Clients that wait for the next xpyd are refused from now on.
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
    let (mut parts, end) = (tokio::task::JoinSet::new(), tokio_util::sync::CancellationToken::new());
    let wiring = supervisor::Wiring {
        signals: signals::forward(&mut parts, &end, false)?,
        requests: request_receiver,
        view,
        explain: Box::new(|_| Arc::new(|_| supervisor::Cause::default())),
        gpus: super::gpus::checks(&settings.engines, &settings.run_dir, notes),
        verify: Box::new(|_| Box::pin(std::future::pending())),
        hand_over: Box::new(|| Box::pin(std::future::ready(()))),
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
