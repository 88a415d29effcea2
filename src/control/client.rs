//! The control socket's client. Every request has a deadline.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::api::{
    DownRequest, DownResponse, EngineRequest, EngineResponse, ErrorBody, ScaleRequest, ScaleResponse, Status,
};
use crate::fleet::{EngineId, EngineVerb};
use crate::sockets::shown;

/// Timeout of one request. The server answers from memory, but on a busy host a process can wait seconds for CPU time.
const DEADLINE: Duration = Duration::from_secs(30);

/// Why a request to a run failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The HTTP client could not be built.
    #[error("cannot set up the control client")]
    Setup(#[source] reqwest::Error),
    /// No response: no process listens, the connection broke, or the deadline passed.
    #[error("no answer from the run at `{}`", shown(socket))]
    NoAnswer {
        /// The control socket.
        socket: PathBuf,
        /// The error of the HTTP client.
        source: reqwest::Error,
    },
    /// A response with an error status.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The error message in the response.
        message: String,
    },
}

/// A client of one run.
#[derive(Debug, Clone)]
pub struct ControlClient {
    socket: PathBuf,
    http: reqwest::Client,
}

impl ControlClient {
    /// A client of the run whose control socket is at `socket`. It connects with the first request.
    pub fn new(socket: &Path) -> Result<Self, ClientError> {
        let http = reqwest::Client::builder()
            .unix_socket(socket)
            .timeout(DEADLINE)
            // The run can end at any time; a kept connection would only fail at the next request.
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

    /// Requests the stop of the run. It ends later: [`super::rundir::find`] no longer finds it then.
    pub async fn down(&self, request: DownRequest) -> Result<DownResponse, ClientError> {
        self.ask(self.http.post("http://xpyd/v1/down").json(&request)).await
    }

    /// Requests the restart or drain of one engine. The status shows the progress.
    pub async fn engine(
        &self,
        engine: &EngineId,
        verb: EngineVerb,
        force: bool,
    ) -> Result<EngineResponse, ClientError> {
        let url = format!("http://xpyd/v1/engines/{engine}/{}", verb.name());
        self.ask(self.http.post(url).json(&EngineRequest { force })).await
    }

    /// Requests another number of engines of a role. The status shows the progress.
    pub async fn scale(&self, request: ScaleRequest) -> Result<ScaleResponse, ClientError> {
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
