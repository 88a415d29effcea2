//! What ends a benchmark before its time: Ctrl+C, a signal, or the deadline that the user gave it.
//!
//! The first one asks the run to stop, so that what has ended still gets its table. The second one leaves at once, whatever
//! the program is doing: it comes on a thread of its own, because the main one may be busy making prompts.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::report::{ExitStatus, Failure};
use crate::signals::StopSignals;
use crate::ui::Printer;

/// How long the run may take to stop before the user is told what else can be done.
const PATIENCE: Duration = Duration::from_millis(500);

/// Why a run was stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CancelCause {
    /// Ctrl+C, or another signal.
    Signal,
    /// `--deadline`.
    Deadline,
}

/// Watches for whatever stops the run, as long as it lives.
#[derive(Debug)]
pub(super) struct CancelWatch {
    /// Cancelled when the run should stop.
    pub(super) stop: CancellationToken,
    cause: Arc<OnceLock<CancelCause>>,
    /// Ends the watch when dropped.
    _watch: JoinSet<()>,
}

impl CancelWatch {
    /// Begins to watch. Only where it `may_leave`, the second signal ends the process.
    pub(super) fn watch(deadline: Option<Duration>, may_leave: bool, printer: Printer) -> Result<Self, Failure> {
        let signals = StopSignals::listen().map_err(|error| Failure::new(ExitStatus::Failure, error))?;
        let stop = CancellationToken::new();
        let cause = Arc::new(OnceLock::new());
        let mut watch = JoinSet::new();
        let (token, first_cause) = (stop.clone(), Arc::clone(&cause));
        watch.spawn(async move {
            let signals = cancel_at_first(signals, deadline, &token, &first_cause).await;
            if may_leave {
                leave_at_the_next(signals, printer).await;
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

/// Waits for the first reason to stop, and asks for it.
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
    debug_assert!(is_first, "nobody else sets it");
    stop.cancel();
    signals
}

async fn leave_at_the_next(mut signals: StopSignals, printer: Printer) {
    // Most often the run has ended, and this watch with it, before that is worth a word.
    let patience = tokio::time::timeout(PATIENCE, signals.next());
    if patience.await.is_err() {
        printer.status("stopping: press Ctrl+C again to leave at once");
        signals.next().await;
    }
    printer.error("left at once, without a result");
    leave();
}

#[expect(
    clippy::exit,
    clippy::disallowed_methods,
    reason = "the user has asked twice, the main thread may be busy for long, and there is nothing to put in order"
)]
fn leave() -> ! {
    std::process::exit(ExitStatus::Forced.code().into())
}
