//! Calls to engines: one HTTP client, the headers that may cross, and an engine's seat that a leg holds while it runs.
//!
//! Knows HTTP; knows nothing of prompts, connectors or retries.

use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::sync::watch;

use super::error::{Cause, ProxyError, Stage};
use super::seats::Held;
use crate::fleet::{EngineState, EngineView, FleetView, KeptGuard, LoadGuard};

/// How long a connection may take. Engines are near: one that does not accept within this is not there.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// How long an idle connection is kept. vLLM's server closes after 5 s; leaving first avoids sending into the close.
const IDLE_CONNECTION: Duration = Duration::from_secs(4);

/// Largest answer that is read as a whole. Logprobs of a long answer take tens of megabytes.
const MAX_ANSWER_BYTES: usize = 256 << 20;

/// Headers that belong to one connection (RFC 9110 §7.6.1), or that this proxy sets itself.
const NOT_FORWARDED: [HeaderName; 11] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::HOST,
    header::CONTENT_LENGTH,
    header::EXPECT,
];

/// Client headers by which vLLM 0.32 is steered. The request id pairs KV with requests, a session decides how long KV is
/// kept, and the format of load metrics makes an engine tell of itself.
const STEERING: [&str; 3] = ["x-request-id", "x-session-id", "endpoint-load-metrics-format"];

/// How those begin that steer it more directly, today by priority and rank, and may come to steer it in other ways.
const STEERING_PREFIXES: [&str; 3] = ["x-vllm-", "x-data-parallel-", "x-kv-"];

fn steers(name: &str) -> bool {
    STEERING.contains(&name) || STEERING_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// The client of all engines.
#[derive(Debug, Clone)]
pub(super) struct Upstream {
    client: Client<HttpConnector, Full<Bytes>>,
}

/// What is sent to an engine.
#[derive(Debug, Clone)]
pub(super) struct Call<'call> {
    pub(super) method: Method,
    /// Path and query.
    pub(super) path: &'call str,
    /// The client's headers that may cross.
    pub(super) headers: &'call HeaderMap,
    /// This request's own id.
    pub(super) request_id: Option<&'call str>,
    pub(super) body: Bytes,
}

impl<'call> Call<'call> {
    /// A POST of JSON.
    pub(super) fn post(path: &'call str, headers: &'call HeaderMap, request_id: &'call str, body: Vec<u8>) -> Self {
        Self {
            method: Method::POST,
            path,
            headers,
            request_id: Some(request_id),
            body: body.into(),
        }
    }
}

impl Upstream {
    pub(super) fn new() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_DEADLINE));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_CONNECTION)
            .build(connector);
        Self { client }
    }

    /// Sends a call and waits for the head of the answer.
    pub(super) async fn send(&self, engine: &EngineView, call: Call<'_>) -> Result<Response<Incoming>, Cause> {
        let mut request = Request::new(Full::new(call.body));
        *request.method_mut() = call.method;
        *request.uri_mut() = format!("http://{}{}", engine.endpoint.authority(), call.path)
            .parse()
            .map_err(|_| Cause::Nonsense("its address is no URL"))?;
        request.headers_mut().clone_from(call.headers);
        if let Some(id) = call.request_id {
            let id = HeaderValue::from_str(id).map_err(|_| Cause::Nonsense("the request id is no header value"))?;
            request.headers_mut().insert("x-request-id", id);
            request
                .headers_mut()
                .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        self.client.request(request).await.map_err(Cause::Unreachable)
    }

    /// Sends a call and reads the whole answer.
    pub(super) async fn fetch(
        &self,
        engine: &EngineView,
        call: Call<'_>,
    ) -> Result<(axum::http::response::Parts, Bytes), Cause> {
        let (head, body) = self.send(engine, call).await?.into_parts();
        Ok((head, whole(body).await?))
    }
}

/// The whole body of an answer.
pub(super) async fn whole(body: Incoming) -> Result<Bytes, Cause> {
    Limited::new(body, MAX_ANSWER_BYTES)
        .collect()
        .await
        .map(http_body_util::Collected::to_bytes)
        .map_err(|error| Cause::Broken(error.to_string()))
}

/// The headers that may cross from one connection to another.
pub(super) fn forwardable(headers: &HeaderMap) -> HeaderMap {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    headers
        .iter()
        .filter(|(name, _)| !NOT_FORWARDED.contains(name) && !steers(name.as_str()) && !named.contains(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

/// One request's place on one incarnation of an engine. The engine counts as loaded while it lives.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) engine: Arc<EngineView>,
    view: watch::Receiver<Arc<FleetView>>,
    held: Option<Held>,
    _guard: LoadGuard,
}

impl Seat {
    /// Takes a place, unless the engine lets nobody in any more.
    pub(super) fn take(engine: &Arc<EngineView>, view: &watch::Receiver<Arc<FleetView>>) -> Option<Self> {
        engine.load.try_enter().map(|guard| Self {
            engine: Arc::clone(engine),
            view: view.clone(),
            held: None,
            _guard: guard,
        })
    }

    /// The seat of a request that weighs something.
    pub(super) fn holding(self, held: Held) -> Self {
        Self {
            held: Some(held),
            ..self
        }
    }

    /// What its request weighs.
    pub(super) fn held(&self) -> Option<&Held> {
        self.held.as_ref()
    }

    /// Returns once this incarnation has gone.
    pub(super) async fn gone(&self) {
        gone(&self.engine, &self.view).await;
    }

    /// The same incarnation, without a place on it.
    pub(super) fn watch(&self) -> EngineWatch {
        EngineWatch {
            engine: Arc::clone(&self.engine),
            view: self.view.clone(),
        }
    }

    /// Says that KV of the seat's request waits on this engine, for longer than the seat may be taken.
    pub(super) fn keep(&self) -> Kept {
        Kept {
            watch: self.watch(),
            _guard: self.engine.load.keep(),
        }
    }

    /// Runs one step of a leg until its deadline, or until the engine has gone.
    pub(super) async fn run<T>(
        &self,
        stage: Stage,
        deadline: Duration,
        step: impl Future<Output = Result<T, Cause>>,
    ) -> Result<T, ProxyError> {
        let outcome = tokio::select! {
            biased;
            outcome = step => outcome,
            () = self.gone() => Err(Cause::Gone),
            () = tokio::time::sleep(deadline) => Err(Cause::Timeout(deadline)),
        };
        outcome.map_err(|cause| self.failed(stage, cause))
    }

    /// The error of a leg on this engine.
    pub(super) fn failed(&self, stage: Stage, cause: Cause) -> ProxyError {
        ProxyError::Leg {
            stage,
            engine: self.engine.id.clone(),
            cause,
        }
    }
}

/// One incarnation of an engine, which somebody must know the end of.
#[derive(Debug)]
pub(super) struct EngineWatch {
    engine: Arc<EngineView>,
    view: watch::Receiver<Arc<FleetView>>,
}

impl EngineWatch {
    /// Returns once it has gone.
    pub(super) async fn gone(&self) {
        gone(&self.engine, &self.view).await;
    }

    /// A place on it, unless it lets nobody in any more.
    pub(super) fn seat(&self) -> Option<Seat> {
        Seat::take(&self.engine, &self.view)
    }
}

/// KV that waits on an engine. Until it is dropped, a drain of the engine waits as well.
#[derive(Debug)]
pub(super) struct Kept {
    watch: EngineWatch,
    _guard: KeptGuard,
}

impl Kept {
    /// Returns once the engine, and so the KV, has gone.
    pub(super) async fn gone(&self) {
        self.watch.gone().await;
    }
}

/// A closed load alone is not the end of an incarnation: a draining engine finishes what it has.
async fn gone(engine: &EngineView, view: &watch::Receiver<Arc<FleetView>>) {
    engine.load.closed().await;
    let mut view = view.clone();
    loop {
        let lives = view.borrow_and_update().engine(&engine.id).is_some_and(|now| {
            now.incarnation == engine.incarnation
                && matches!(
                    now.state,
                    EngineState::Healthy | EngineState::Ready | EngineState::Draining
                )
        });
        if !lives || view.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_connection_headers_nor_steering_ones_cross() {
        let pairs = [
            ("connection", "close, x-secret-hop"),
            ("x-secret-hop", "1"),
            ("keep-alive", "5"),
            ("transfer-encoding", "chunked"),
            ("content-length", "9"),
            ("host", "me"),
            ("x-request-id", "mine"),
            ("x-data-parallel-rank", "3"),
            ("X-Data-Parallel-Rank-Of-Tomorrow", "3"),
            ("X-Vllm-Priority", "-9"),
            ("x-session-id", "s"),
            ("x-kv-engine", "e"),
            ("endpoint-load-metrics-format", "JSON"),
            ("session-id", "s"),
            ("authorization", "Bearer x"),
            ("traceparent", "00-1"),
        ];
        let headers: HeaderMap = pairs
            .iter()
            .map(|(name, value)| {
                (
                    name.parse::<HeaderName>().unwrap(),
                    value.parse::<HeaderValue>().unwrap(),
                )
            })
            .collect();
        let kept = forwardable(&headers);
        let mut names: Vec<_> = kept.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["authorization", "session-id", "traceparent"]);
    }
}
