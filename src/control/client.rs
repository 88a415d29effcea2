//! The control socket's client: asks a running xpyd, with a deadline.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::api::{DownAnswer, DownRequest, EngineAnswer, EngineRequest, ErrorBody, ScaleAnswer, ScaleRequest, Status};
use super::server::EngineVerb;
use crate::fleet::EngineId;
use crate::sockets::shown;

/// Longest wait for one answer. The server answers from memory, but on a busy host a process can wait seconds for its turn.
const DEADLINE: Duration = Duration::from_secs(30);

/// Why a run did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The client could not be made.
    #[error("cannot set up the control client")]
    Setup(#[source] reqwest::Error),
    /// No answer: nobody listens, the connection broke, or the deadline passed.
    #[error("no answer from the run at `{}`", shown(socket))]
    NoAnswer {
        /// The control socket.
        socket: PathBuf,
        /// What happened.
        source: reqwest::Error,
    },
    /// An answer, but not the one that was asked for.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// What it said.
        message: String,
    },
}

/// Asks one run.
#[derive(Debug, Clone)]
pub struct ControlClient {
    socket: PathBuf,
    http: reqwest::Client,
}

impl ControlClient {
    /// A client of the run whose control socket is at `socket`. Connects only when it asks.
    pub fn new(socket: &Path) -> Result<Self, ClientError> {
        let http = reqwest::Client::builder()
            .unix_socket(socket)
            .timeout(DEADLINE)
            // The run may end at any time; a kept connection would only fail one question later.
            .pool_max_idle_per_host(0)
            .build()
            .map_err(ClientError::Setup)?;
        Ok(Self {
            socket: socket.to_owned(),
            http,
        })
    }

    /// The run's status.
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.ask(self.http.get("http://xpyd/v1/status")).await
    }

    /// Asks the run to stop. It does, later: [`super::rundir::find`] tells when it is gone.
    pub async fn down(&self, request: DownRequest) -> Result<DownAnswer, ClientError> {
        self.ask(self.http.post("http://xpyd/v1/down").json(&request)).await
    }

    /// Asks the run to drain and stop one engine, and to start it again if the verb says so. The status shows how it goes.
    pub async fn engine(&self, engine: &EngineId, verb: EngineVerb, force: bool) -> Result<EngineAnswer, ClientError> {
        let url = format!("http://xpyd/v1/engines/{engine}/{}", verb.name());
        self.ask(self.http.post(url).json(&EngineRequest { force })).await
    }

    /// Asks the run for another number of engines of a role. The status shows how it goes.
    pub async fn scale(&self, request: ScaleRequest) -> Result<ScaleAnswer, ClientError> {
        self.ask(self.http.post("http://xpyd/v1/scale").json(&request)).await
    }

    async fn ask<T: DeserializeOwned>(&self, request: reqwest::RequestBuilder) -> Result<T, ClientError> {
        let no_answer = |source| ClientError::NoAnswer {
            socket: self.socket.clone(),
            source,
        };
        let response = request.send().await.map_err(no_answer)?;
        let status = response.status();
        if status.is_success() {
            return response.json().await.map_err(no_answer);
        }
        let body = response.bytes().await.map_err(no_answer)?;
        let message = serde_json::from_slice(&body).map_or_else(
            |_| String::from_utf8_lossy(&body).into_owned(),
            |ErrorBody { error }| error,
        );
        Err(ClientError::Refused {
            status: status.as_u16(),
            message,
        })
    }
}
