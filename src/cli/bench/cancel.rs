//! Cancellation of a benchmark: Ctrl+C, another signal, or the deadline.
//!
//! The first event asks the run to stop, and the finished requests still get their table. The second signal exits at
//! once; a separate thread handles it, because the main one can be busy with prompts.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::report::{ExitStatus, Failure};
use crate::signals::StopSignals;
use crate::ui::Printer;

/// Time for the run to stop before a message names the second Ctrl+C.
const PATIENCE: Duration = Duration::from_millis(500);

/// Why a run was stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CancelCause {
    /// Ctrl+C, or another signal.
    Signal,
    /// `--deadline`.
    Deadline,
}

/// Watches for the events that stop the run.
#[derive(Debug)]
pub(super) struct CancelWatch {
    /// Cancelled when the run must stop.
    pub(super) stop: CancellationToken,
    cause: Arc<OnceLock<CancelCause>>,
    /// Ends the watch when dropped.
    _watch: JoinSet<()>,
}

impl CancelWatch {
    /// Starts to watch. With `may_leave`, the second signal ends the process.
    pub(super) fn watch(deadline: Option<Duration>, may_leave: bool, printer: Printer) -> Result<Self, Failure> {
        let signals = StopSignals::listen().map_err(|error| Failure::new(ExitStatus::Failure, error))?;
        let stop = CancellationToken::new();
        let cause = Arc::new(OnceLock::new());
        let mut watch = JoinSet::new();
        let (token, first_cause) = (stop.clone(), Arc::clone(&cause));
        watch.spawn(async move {
            let signals = cancel_at_first(signals, deadline, &token, &first_cause).await;
            if may_leave {
                exit_at_next_signal(signals, printer).await;
            }
        });
        Ok(Self {
            stop,
            cause,
            _watch: watch,
        })
    }

    /// Why the run was stopped, if it was.
    pub(super) fn cause(&self) -> Option<CancelCause> {
        self.cause.get().copied()
    }
}

/// Waits for the first reason to stop, and cancels the run.
async fn cancel_at_first(
    mut signals: StopSignals,
    deadline: Option<Duration>,
    stop: &CancellationToken,
    cause: &OnceLock<CancelCause>,
) -> StopSignals {
    let deadline_passed = async {
        match deadline {
            Some(deadline) => tokio::time::sleep(deadline).await,
            None => std::future::pending().await,
        }
    };
    let first = tokio::select! {
        _ = signals.next() => CancelCause::Signal,
        () = deadline_passed => CancelCause::Deadline,
    };
    let is_first = cause.set(first).is_ok();
    debug_assert!(is_first, "only this task sets it");
    stop.cancel();
    signals
}

async fn exit_at_next_signal(mut signals: StopSignals, printer: Printer) {
    // Usually the run, and this task with it, ends before the message.
    let patience = tokio::time::timeout(PATIENCE, signals.next());
    if patience.await.is_err() {
        printer.status("stopping: press Ctrl+C again to exit at once");
        signals.next().await;
    }
    printer.error("exited without a result");
    exit();
}

#[expect(
    clippy::exit,
    clippy::disallowed_methods,
    reason = "the user asked twice, the main thread can be busy for long, and there is no state to clean up"
)]
fn exit() -> ! {
    std::process::exit(ExitStatus::Forced.code().into())
}
