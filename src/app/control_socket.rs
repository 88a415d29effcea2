//! The control socket. xpyd serves it at its path and under its kernel name, and creates the path again if it was removed.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::control::rundir::RunDir;
use crate::control::server::{self, ServerState};
use crate::report::one_line;

/// Time between two checks of the runtime folder.
const LOOK: Duration = Duration::from_secs(5);

pub(super) async fn serve(listener: UnixListener, state: ServerState, stop: CancellationToken) {
    if let Err(error) = server::serve(listener, state, stop).await {
        tracing::error!(%error, "the control socket stopped serving");
    }
}

/// Serves the socket under its kernel name, and restores the runtime folder with the socket in it if it was removed.
pub(super) async fn keep_findable(run_dir: Arc<RunDir>, state: ServerState, stop: CancellationToken) {
    let mut serving = JoinSet::new();
    let mut serve_also = |listener: Option<UnixListener>| {
        if let Some(listener) = listener {
            serving.spawn(serve(listener, state.clone(), stop.clone()));
        }
    };
    match run_dir.listen_by_name() {
        Ok(listener) => serve_also(listener),
        Err(error) => tracing::warn!(%error, "cannot open the abstract control socket"),
    }
    while stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_some() {
        match run_dir.restore() {
            Ok(listener) => serve_also(listener),
            // Without the user's log-in the parent folder does not exist.
            Err(error) => tracing::debug!(error = one_line(&error), "the runtime folder is gone"),
        }
    }
    while serving.join_next().await.is_some() {}
}
