//! The control socket's server.
//!
//! It knows nothing of what it controls: it answers with the status it is given, and forwards requests.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Json, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::Listener;
use bytes::Bytes;
use nix::unistd::getuid;
use serde::de::DeserializeOwned;
use tokio::net::{UnixListener, UnixStream, unix};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::api::{
    DownRequest, DownResponse, EngineRequest, EngineResponse, ErrorBody, ScaleRequest, ScaleResponse, Status,
};
use crate::fleet::{EngineId, EngineVerb, Incarnation, MAX_ENGINES_PER_ROLE};

/// How long a client can delay the end of the server.
const FAREWELL: Duration = Duration::from_secs(1);

/// Pause after a failed accept, which mostly means that the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The largest body of a request, in bytes.
const MAX_BODY: usize = 64 * 1024;

/// A request to stop the run.
#[derive(Debug)]
pub enum StopRequest {
    /// Stop the run and its engines.
    Stop {
        /// Kill now instead of draining.
        force: bool,
    },
    /// End xpyd and keep the engines.
    Leave {
        /// Gets how long the engines wait for the next xpyd, or why they cannot be kept.
        reply: oneshot::Sender<Result<Duration, String>>,
    },
}

/// A request to restart or drain one engine.
#[derive(Debug)]
pub struct EngineCommand {
    /// An engine of the run.
    pub engine: EngineId,
    /// What is requested.
    pub verb: EngineVerb,
    /// Also if no other engine of its role serves.
    pub force: bool,
    /// Gets the incarnation that follows a restart, or why the request is refused.
    pub reply: oneshot::Sender<Result<Incarnation, String>>,
}

/// A request for another number of engines of a role.
#[derive(Debug)]
pub struct ScaleCommand {
    /// The role and the number.
    pub request: ScaleRequest,
    /// Gets the engines that start and stop, or why the request is refused.
    pub reply: oneshot::Sender<Result<ScaleResponse, String>>,
}

/// The connections from the server to the run.
#[derive(Clone)]
pub struct ServerState {
    /// Builds the run's current status. Called for each request; must not block.
    pub status: Arc<dyn Fn() -> Status + Send + Sync>,
    /// Takes requests to stop. A full channel already holds one, so another is dropped, unless it forces.
    pub stop: mpsc::Sender<StopRequest>,
    /// Takes requests for one engine. A full channel refuses more.
    pub engine: mpsc::Sender<EngineCommand>,
    /// Takes requests to scale. A full channel refuses more.
    pub scale: mpsc::Sender<ScaleCommand>,
}

impl fmt::Debug for ServerState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ServerState").finish_non_exhaustive()
    }
}

/// Serves the control socket until `stop` is cancelled.
pub async fn serve(listener: UnixListener, state: ServerState, stop: CancellationToken) -> io::Result<()> {
    let router = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/down", post(down))
        .route("/v1/engines/{id}/restart", post(restart))
        .route("/v1/engines/{id}/drain", post(drain))
        .route("/v1/scale", post(scale))
        .fallback(|| async {
            refuse(
                StatusCode::NOT_FOUND,
                "no such route; there are /v1/status, /v1/down, /v1/engines/{id}/restart, /v1/engines/{id}/drain and /v1/scale",
            )
        })
        .method_not_allowed_fallback(|| async { refuse(StatusCode::METHOD_NOT_ALLOWED, "method not allowed on this route") })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(state);
    let server = axum::serve(OwnPeers(listener), router).with_graceful_shutdown(stop.clone().cancelled_owned());
    tokio::select! {
        result = server.into_future() => result,
        // A client with half a request must not delay the end of the run.
        () = async { stop.cancelled().await; tokio::time::sleep(FAREWELL).await } => Ok(()),
    }
}

async fn status(State(state): State<ServerState>) -> Json<serde_json::Value> {
    Json((state.status)().to_json())
}

/// Parses a JSON body and ignores its content type: `curl -d` claims a form. An empty one, as of `curl -X POST`, is the default.
fn read<T: DeserializeOwned + Default>(body: &[u8]) -> Result<T, Box<Response>> {
    if body.trim_ascii().is_empty() {
        return Ok(T::default());
    }
    read_whole(body)
}

fn read_whole<T: DeserializeOwned>(body: &[u8]) -> Result<T, Box<Response>> {
    serde_json::from_slice(body).map_err(|error| {
        Box::new(refuse(
            StatusCode::BAD_REQUEST,
            &format!("invalid request body: {error}"),
        ))
    })
}

async fn down(State(state): State<ServerState>, body: Bytes) -> Response {
    let request: DownRequest = match read(&body) {
        Ok(request) => request,
        Err(refusal) => return *refusal,
    };
    if request.keep_engines {
        return leave(&state).await;
    }
    let force = request.force;
    match state.stop.try_send(StopRequest::Stop { force }) {
        // No receiver is left when the run is past its last stage: it ends anyway.
        Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
        Err(mpsc::error::TrySendError::Full(_)) if !force => {}
        Err(mpsc::error::TrySendError::Full(_)) => {
            return refuse(StatusCode::SERVICE_UNAVAILABLE, "too many requests to stop; try again");
        }
    }
    tracing::info!(force, "asked to stop over the control socket");
    stopping(Duration::ZERO)
}

async fn leave(state: &ServerState) -> Response {
    let (reply, answer) = oneshot::channel();
    if state.stop.try_send(StopRequest::Leave { reply }).is_err() {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "too many requests at once; try again");
    }
    match answer.await {
        Ok(Ok(keep)) => stopping(keep),
        Ok(Err(reason)) => refuse(StatusCode::CONFLICT, &format!("the engines cannot be kept: {reason}")),
        Err(_) => refuse(StatusCode::SERVICE_UNAVAILABLE, "the run is ending"),
    }
}

fn stopping(keep: Duration) -> Response {
    let answer = DownResponse {
        stopping: true,
        keep_seconds: keep.as_secs(),
    };
    (StatusCode::ACCEPTED, Json(answer)).into_response()
}

async fn restart(State(state): State<ServerState>, Path(id): Path<String>, body: Bytes) -> Response {
    engine_command(&state, &id, EngineVerb::Restart, &body).await
}

async fn drain(State(state): State<ServerState>, Path(id): Path<String>, body: Bytes) -> Response {
    engine_command(&state, &id, EngineVerb::Drain, &body).await
}

async fn engine_command(state: &ServerState, id: &str, verb: EngineVerb, body: &[u8]) -> Response {
    let EngineRequest { force } = match read(body) {
        Ok(request) => request,
        Err(refusal) => return *refusal,
    };
    let engine = EngineId::named(id);
    if (state.status)().engines.iter().all(|known| known.id != engine) {
        return refuse(StatusCode::NOT_FOUND, &format!("no engine `{engine}` in this run"));
    }
    let (reply, answer) = oneshot::channel();
    let request = EngineCommand {
        engine,
        verb,
        force,
        reply,
    };
    if state.engine.try_send(request).is_err() {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "too many requests at once; try again");
    }
    match answer.await {
        Ok(Ok(incarnation)) => {
            let incarnation = incarnation.0;
            (StatusCode::ACCEPTED, Json(EngineResponse { incarnation })).into_response()
        }
        Ok(Err(reason)) => refuse(StatusCode::CONFLICT, &reason),
        Err(_) => refuse(StatusCode::SERVICE_UNAVAILABLE, "the run is ending"),
    }
}

async fn scale(State(state): State<ServerState>, body: Bytes) -> Response {
    let request: ScaleRequest = match read_whole(&body) {
        Ok(request) => request,
        Err(refusal) => return *refusal,
    };
    if request.count == 0 {
        return refuse(StatusCode::BAD_REQUEST, "a role needs at least 1 engine");
    }
    if request.count > MAX_ENGINES_PER_ROLE {
        let error = format!("a role can have at most {MAX_ENGINES_PER_ROLE} engines");
        return refuse(StatusCode::BAD_REQUEST, &error);
    }
    let (reply, answer) = oneshot::channel();
    if state.scale.try_send(ScaleCommand { request, reply }).is_err() {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "too many requests at once; try again");
    }
    match answer.await {
        Ok(Ok(answer)) => (StatusCode::ACCEPTED, Json(answer)).into_response(),
        Ok(Err(reason)) => refuse(StatusCode::CONFLICT, &reason),
        Err(_) => refuse(StatusCode::SERVICE_UNAVAILABLE, "the run is ending"),
    }
}

fn refuse(status: StatusCode, error: &str) -> Response {
    (
        status,
        Json(ErrorBody {
            error: error.to_owned(),
        }),
    )
        .into_response()
}

/// Accepts connections of this user's and root's processes only. The folder's mode enforces the same, but can be changed.
struct OwnPeers(UnixListener);

impl Listener for OwnPeers {
    type Io = UnixStream;
    type Addr = unix::SocketAddr;

    async fn accept(&mut self) -> (UnixStream, unix::SocketAddr) {
        loop {
            match self.0.accept().await {
                Ok((stream, address)) => match stream.peer_cred() {
                    Ok(peer) if may_control(peer.uid(), getuid().as_raw()) => return (stream, address),
                    Ok(peer) => tracing::warn!(uid = peer.uid(), "refused another user on the control socket"),
                    Err(error) => tracing::warn!(%error, "refused an unknown peer on the control socket"),
                },
                Err(error) => {
                    tracing::warn!(%error, "cannot accept on the control socket");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<unix::SocketAddr> {
        self.0.local_addr()
    }
}

fn may_control(peer: u32, own: u32) -> bool {
    peer == own || peer == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_user_and_root_may_control_a_run() {
        assert!(may_control(1000, 1000));
        assert!(may_control(0, 1000));
        assert!(!may_control(1001, 1000));
        assert!(!may_control(1000, 0));
    }
}
