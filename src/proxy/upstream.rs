//! Calls to engines: connections that are kept, the headers that may cross, and an engine's seat that a leg holds while it runs.
//!
//! Knows HTTP; knows nothing of prompts, connectors or retries.

use std::collections::HashSet;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::http::response::Parts;
use axum::http::{HeaderMap, HeaderName, Method, Response};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame};
use hyper::header;
use tokio::sync::watch;

use super::error::{Cause, ProxyError, Stage};
use super::overload::{Limit, Overload};
use super::seats::Held;
use crate::fleet::{Endpoint, EngineId, EngineState, EngineView, FleetView, Incarnation, KeptGuard, LoadGuard};
use crate::report::lacks_descriptors;
use crate::wire::{Framing, Head, Pool, Wire};

/// How long a connection may take. Engines are near: one that does not accept within this is not there.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// Largest answer that is read as a whole. Logprobs of a long answer take tens of megabytes.
const MAX_ANSWER_BYTES: usize = 256 << 20;

/// Headers that belong to one connection (RFC 9110 §7.6.1), that this proxy sets itself, or that ask for an answer in parts or in
/// an encoding, which it could not read.
const NOT_FORWARDED: [HeaderName; 20] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::HOST,
    header::CONTENT_LENGTH,
    header::EXPECT,
    header::ACCEPT_ENCODING,
    HeaderName::from_static("http2-settings"),
    header::RANGE,
    header::IF_RANGE,
    header::IF_MATCH,
    header::IF_NONE_MATCH,
    header::IF_MODIFIED_SINCE,
    header::IF_UNMODIFIED_SINCE,
];

/// The header of a request's id. A client's own is told back to it and logged; engines get another.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Client headers by which vLLM 0.32 is steered. The request id pairs KV with requests, a session decides how long KV is
/// kept, and the format of load metrics makes an engine tell of itself.
const STEERING: [&str; 3] = ["x-request-id", "x-session-id", "endpoint-load-metrics-format"];

/// How those begin that steer it more directly, today by priority and rank, and may come to steer it in other ways.
const STEERING_PREFIXES: [&str; 3] = ["x-vllm-", "x-data-parallel-", "x-kv-"];

fn steers(name: &str) -> bool {
    STEERING.contains(&name) || STEERING_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// Most idle connections that are kept to one engine.
const MAX_IDLE: usize = 256;

/// The connections to all engines. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct Upstream {
    pool: Arc<Pool<Home>>,
    overload: Overload,
}

/// Where a connection belongs: another incarnation is another process, and another runtime would be woken for its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Home {
    engine: EngineId,
    incarnation: Incarnation,
    runtime: tokio::runtime::Id,
}

/// Why an engine could not be asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unreachable {
    /// Nothing was sent.
    #[error("no connection")]
    Connect(#[source] io::Error),
    /// The request was sent, at least in part.
    #[error("no answer")]
    NoAnswer(#[source] io::Error),
}

impl Unreachable {
    /// Whether the engine never saw the request.
    pub(super) fn is_connect(&self) -> bool {
        matches!(self, Self::Connect(_))
    }
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

    /// The head of the request.
    fn head(&self, authority: &str) -> Vec<u8> {
        let mut head = Vec::with_capacity(512);
        let mut put = |parts: &[&[u8]]| parts.iter().for_each(|part| head.extend_from_slice(part));
        put(&[
            self.method.as_str().as_bytes(),
            b" ",
            self.path.as_bytes(),
            b" HTTP/1.1\r\nhost: ",
        ]);
        // Without this header any encoding is welcome (RFC 9110 §12.5.3).
        put(&[authority.as_bytes(), b"\r\naccept-encoding: identity\r\n"]);
        let replaced = |name| self.request_id.is_some() && (name == header::CONTENT_TYPE || name == REQUEST_ID);
        for (name, value) in self.headers.iter().filter(|(name, _)| !replaced(*name)) {
            put(&[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
        }
        if let Some(id) = self.request_id {
            put(&[
                b"content-type: application/json\r\nx-request-id: ",
                id.as_bytes(),
                b"\r\n",
            ]);
        }
        if self.method == Method::POST || !self.body.is_empty() {
            put(&[b"content-length: ", self.body.len().to_string().as_bytes(), b"\r\n"]);
        }
        put(&[b"\r\n"]);
        head
    }
}

impl Upstream {
    pub(super) fn new(overload: Overload) -> Self {
        Self {
            pool: Arc::new(Pool::new(MAX_IDLE)),
            overload,
        }
    }

    /// Closes all idle connections, so that others can have their descriptors. Whether there was one.
    pub(super) fn give_back(&self) -> bool {
        self.pool.clear()
    }

    /// A new connection. Where no descriptor is free for it, idle connections give theirs back.
    async fn connect(&self, endpoint: &Endpoint) -> Result<Wire, Cause> {
        loop {
            let address = (endpoint.host.as_str(), endpoint.port);
            let wire = tokio::time::timeout(CONNECT_DEADLINE, Wire::connect(address)).await;
            return match wire.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok(wire) => Ok(wire),
                Err(error) if lacks_descriptors(&error) => {
                    if self.give_back() {
                        continue;
                    }
                    self.overload.reached(Limit::ConnectDescriptors);
                    Err(Cause::Descriptors(error))
                }
                Err(error) => Err(Cause::Unreachable(Unreachable::Connect(error))),
            };
        }
    }

    /// Sends a call and waits for the head of the answer.
    pub(super) async fn send(&self, engine: &EngineView, call: Call<'_>) -> Result<Response<AnswerBody>, Cause> {
        let head = call.head(&engine.endpoint.authority());
        let home = Home {
            engine: engine.id.clone(),
            incarnation: engine.incarnation,
            runtime: tokio::runtime::Handle::current().id(),
        };
        let no_answer = |error| Cause::Unreachable(Unreachable::NoAnswer(error));
        let mut wire = loop {
            let idle = self.pool.take(&home);
            let is_new = idle.is_none();
            let mut wire = match idle {
                Some(wire) => wire,
                None => self.connect(&engine.endpoint).await?,
            };
            match wire.send(&head, &call.body).await {
                Ok(()) => break wire,
                // It closed the very moment that it was taken.
                Err((0, _)) if !is_new => {}
                // An engine that refuses a request may say so without reading it to the end.
                Err((_, error)) => match wire.head(&call.method).await {
                    Ok(head) => return Ok(self.answer(head, wire, None)),
                    Err(_) => return Err(no_answer(error)),
                },
            }
        };
        let head = wire.head(&call.method).await.map_err(no_answer)?;
        Ok(self.answer(head, wire, Some(home)))
    }

    /// Sends a call and reads the whole answer.
    pub(super) async fn fetch(&self, engine: &EngineView, call: Call<'_>) -> Result<(Parts, Bytes), Cause> {
        let (head, body) = self.send(engine, call).await?.into_parts();
        Ok((head, whole(body).await?))
    }

    fn answer(&self, head: Head, wire: Wire, home: Option<Home>) -> Response<AnswerBody> {
        let home = home.filter(|_| head.keeps_alive);
        let mut body = AnswerBody {
            wire: Some(wire),
            framing: head.framing,
            home: home.map(|home| (self.clone(), home)),
        };
        body.end_if_over();
        Response::from_parts(head.parts, body)
    }

    /// Closes connections that have been idle for too long, for as long as it runs.
    pub(super) async fn close_idle(&self) {
        self.pool.close_idle().await;
    }
}

/// The body of an engine's answer. At its end the connection is kept for another call; dropped before, it is closed. Nobody need
/// read beyond the last piece for that: a server does not, where it has told how long the answer is.
#[derive(Debug)]
pub(super) struct AnswerBody {
    wire: Option<Wire>,
    framing: Framing,
    home: Option<(Upstream, Home)>,
}

impl AnswerBody {
    /// Gives the connection back, if all of the answer has been read.
    fn end_if_over(&mut self) {
        if self.wire.as_mut().is_some_and(|wire| wire.has_ended(&mut self.framing))
            && let Some(wire) = self.wire.take()
            && let Some((upstream, home)) = self.home.take()
        {
            upstream.pool.keep(home, wire);
        }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = io::Error;

    fn is_end_stream(&self) -> bool {
        self.wire.is_none()
    }

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let this = &mut *self;
        let Some(wire) = &mut this.wire else {
            return Poll::Ready(None);
        };
        let piece = ready!(wire.poll_body(&mut this.framing, context));
        this.end_if_over();
        if !matches!(piece, Some(Ok(_))) {
            this.wire = None;
        }
        Poll::Ready(piece.map(|piece| piece.map(Frame::data)))
    }
}

/// The whole body of an answer.
pub(super) async fn whole(mut body: AnswerBody) -> Result<Bytes, Cause> {
    let broken = |error: io::Error| Cause::Broken(error.to_string());
    let mut first = Bytes::new();
    let mut all = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(piece) = frame.map_err(broken)?.into_data() else {
            continue;
        };
        if first.is_empty() && all.is_empty() {
            first = piece;
            continue;
        }
        all.extend_from_slice(&std::mem::take(&mut first));
        all.extend_from_slice(&piece);
        if all.len() > MAX_ANSWER_BYTES {
            return Err(Cause::Nonsense("it is too large"));
        }
    }
    Ok(if all.is_empty() { first } else { all.freeze() })
}

/// The headers that may cross from one connection to another.
pub(super) fn forwardable(headers: &HeaderMap) -> HeaderMap {
    let named: HashSet<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    headers
        .iter()
        .filter(|(name, _)| !NOT_FORWARDED.contains(name) && !steers(name.as_str()) && !named.contains(*name))
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

    /// Lets a drain of the engine go ahead, and keeps watching the engine.
    pub(super) fn into_watch(self) -> EngineWatch {
        self.watch
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
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn neither_connection_headers_nor_steering_ones_cross() {
        let pairs = [
            ("connection", "close, x-secret-hop"),
            ("x-secret-hop", "1"),
            ("keep-alive", "5"),
            ("proxy-connection", "keep-alive"),
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
            ("accept-encoding", "gzip"),
            ("te", "trailers"),
            ("trailer", "x"),
            ("upgrade", "h2c"),
            ("http2-settings", "x"),
            ("expect", "100-continue"),
            ("range", "bytes=0-1"),
            ("if-range", "x"),
            ("if-match", "x"),
            ("if-none-match", "x"),
            ("if-modified-since", "x"),
            ("if-unmodified-since", "x"),
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
