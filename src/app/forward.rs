//! Forwards requests from the control socket and the proxy to the supervisor.

use tokio::sync::{mpsc, oneshot, watch};

use crate::control::server;
use crate::fleet::EngineId;
use crate::supervisor;

/// Forwards requests to stop from the control socket to the supervisor.
pub(super) async fn stops(mut stops: mpsc::Receiver<server::StopRequest>, requests: mpsc::Sender<supervisor::Request>) {
    while let Some(asked) = stops.recv().await {
        let request = match asked {
            server::StopRequest::Stop { force } => supervisor::Request::Stop {
                force,
                reply: oneshot::channel().0,
            },
            server::StopRequest::Leave { reply } => supervisor::Request::Leave { reply },
        };
        if requests.send(request).await.is_err() {
            return;
        }
    }
}

/// Forwards restarts and drains from the control socket to the supervisor.
pub(super) async fn engine_commands(
    mut commands: mpsc::Receiver<server::EngineCommand>,
    requests: mpsc::Sender<supervisor::Request>,
) {
    while let Some(command) = commands.recv().await {
        let server::EngineCommand {
            engine, verb, force, ..
        } = command;
        let (reply, answer) = oneshot::channel();
        let request = supervisor::Request::Engine {
            engine: engine.clone(),
            verb,
            force,
            reply,
        };
        if requests.send(request).await.is_err() {
            return;
        }
        if let Ok(answer) = answer.await {
            let answer = answer.map_err(|refusal| format!("cannot {verb} {engine}: {refusal}"));
            // The receiver can be gone.
            let _ = command.reply.send(answer);
        }
    }
}

/// Requests checks of pairs between which clients' hand-offs fail or are slow.
pub(super) async fn suspects(
    mut suspects: watch::Receiver<Option<(EngineId, EngineId)>>,
    requests: mpsc::Sender<supervisor::Request>,
) {
    while suspects.changed().await.is_ok() {
        let pair = suspects.borrow_and_update().clone();
        if let Some((prefill, decode)) = pair
            && requests
                .send(supervisor::Request::Check { prefill, decode })
                .await
                .is_err()
        {
            return;
        }
    }
}
