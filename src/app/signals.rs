//! Forwards signals that stop a run to the supervisor.

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::report::Failure;
use crate::signals::{StopSignal, StopSignals};

/// Listens for signals. Returns the channel for the supervisor. A detached run has no terminal that could go away: SIGHUP
/// comes from somebody who expects a daemon to reload, as nginx does, and must not stop the fleet.
pub(super) fn forward(
    parts: &mut JoinSet<()>,
    stop: &CancellationToken,
    has_parent: bool,
    detached: bool,
) -> Result<mpsc::Receiver<StopSignal>, Failure> {
    let signals = if has_parent {
        StopSignals::listen_to_parent()
    } else {
        StopSignals::listen()
    };
    let mut signals = signals.map_err(anyhow::Error::from)?;
    let (sender, receiver) = mpsc::channel(8);
    parts.spawn(super::until(stop.clone(), async move {
        loop {
            let signal = signals.next().await;
            if detached && signal == StopSignal::Hangup {
                tracing::info!("SIGHUP changes nothing: a detached run has no terminal, and logs rotate by themselves");
                continue;
            }
            if sender.send(signal).await.is_err() {
                return;
            }
        }
    }));
    Ok(receiver)
}
