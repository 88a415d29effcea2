//! Calls to engines: pooled connections, requests and answers. `headers` holds the headers of every call.
//!
//! This module knows HTTP, but no prompts, connectors or retries.

mod headers;
mod shared_answer;

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::http::response::Parts;
use axum::http::{HeaderMap, Method, Response};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame};

use crate::error::{Cause, Unreachable};
use crate::overload::{Limit, Overload};
use xpyd_base::fleet::{Endpoint, EngineId, EngineView, Incarnation};
use xpyd_base::http1::{Connection, Framing, Head, Pool};
use xpyd_base::report::lacks_descriptors;

pub(crate) use headers::{REQUEST_ID, forwardable};
pub(crate) use shared_answer::SharedAnswer;

/// Deadline of a connection attempt. Engines are near: one that does not accept within this is not there.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// Maximum size of an answer that is read as a whole. Log-probabilities of a long answer take tens of megabytes.
const MAX_ANSWER_BYTES: usize = 256 << 20;

/// Maximum idle connections to one engine.
const MAX_IDLE: usize = 256;

/// The connections to all engines. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Upstream {
    pool: Arc<Pool<PoolKey>>,
    overload: Overload,
}

/// The key of a pooled connection: another incarnation is another process, and bytes would wake another runtime.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct PoolKey {
    engine: EngineId,
    incarnation: Incarnation,
    runtime: tokio::runtime::Id,
}

/// A request to an engine.
#[derive(Debug, Clone)]
pub(crate) struct Call<'call> {
    pub(crate) method: Method,
    /// Path and query.
    pub(crate) path: &'call str,
    /// The headers to send, already filtered.
    pub(crate) headers: &'call HeaderMap,
    /// This request's own id.
    pub(crate) request_id: Option<&'call str>,
    pub(crate) body: Bytes,
}

impl<'call> Call<'call> {
    /// A GET without a body or an id.
    pub(crate) fn get(path: &'call str, headers: &'call HeaderMap) -> Self {
        Self {
            method: Method::GET,
            path,
            headers,
            request_id: None,
            body: Bytes::new(),
        }
    }

    /// A POST of JSON.
    pub(crate) fn post(path: &'call str, headers: &'call HeaderMap, request_id: &'call str, body: Vec<u8>) -> Self {
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
    pub(crate) fn new(overload: Overload) -> Self {
        Self {
            pool: Arc::new(Pool::new(MAX_IDLE)),
            overload,
        }
    }

    /// Closes all idle connections, so that others can use their descriptors. Returns whether there was one.
    pub(crate) fn close_all_idle(&self) -> bool {
        self.pool.clear()
    }

    /// Opens a connection. If no descriptor is free for it, idle connections give theirs back.
    async fn connect(&self, endpoint: &Endpoint) -> Result<Connection, Cause> {
        loop {
            let address = (endpoint.host.as_str(), endpoint.port);
            let connection = tokio::time::timeout(CONNECT_DEADLINE, Connection::connect(address)).await;
            return match connection.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok(connection) => Ok(connection),
                Err(error) if lacks_descriptors(&error) => {
                    if self.close_all_idle() {
                        continue;
                    }
                    self.overload.reached(Limit::ConnectDescriptors);
                    Err(Cause::Descriptors(error))
                }
                Err(error) => Err(Cause::Unreachable(Unreachable::Connect(error))),
            };
        }
    }

    /// Sends a call and waits for the header of the answer.
    pub(crate) async fn send(&self, engine: &EngineView, call: Call<'_>) -> Result<Response<AnswerBody>, Cause> {
        let head = call.head(&engine.endpoint.authority());
        let key = PoolKey {
            engine: engine.id.clone(),
            incarnation: engine.incarnation,
            runtime: tokio::runtime::Handle::current().id(),
        };
        let no_answer = |error| Cause::Unreachable(Unreachable::NoAnswer(error));
        let mut connection = loop {
            let idle = self.pool.take(&key);
            let is_new = idle.is_none();
            let mut connection = match idle {
                Some(connection) => connection,
                None => self.connect(&engine.endpoint).await?,
            };
            match connection.send(&head, &call.body).await {
                Ok(()) => break connection,
                // The engine closed the idle connection just as it was taken.
                Err((0, _)) if !is_new => {}
                // An engine that refuses a request can answer before it has read all of it.
                Err((_, error)) => match connection.head(&call.method).await {
                    Ok(head) => return Ok(self.answer(head, connection, None)),
                    Err(_) => return Err(no_answer(error)),
                },
            }
        };
        let head = connection.head(&call.method).await.map_err(no_answer)?;
        Ok(self.answer(head, connection, Some(key)))
    }

    /// Sends a call and reads the whole answer.
    pub(crate) async fn fetch(&self, engine: &EngineView, call: Call<'_>) -> Result<(Parts, Bytes), Cause> {
        let (head, body) = self.send(engine, call).await?.into_parts();
        Ok((head, read_whole(body).await?))
    }

    fn answer(&self, head: Head, connection: Connection, key: Option<PoolKey>) -> Response<AnswerBody> {
        let key = key.filter(|_| head.keeps_alive);
        let mut body = AnswerBody {
            connection: Some(connection),
            framing: head.framing,
            key: key.map(|key| (self.clone(), key)),
        };
        body.release_if_complete();
        Response::from_parts(head.parts, body)
    }

    /// Closes connections that have been idle for too long, for as long as it runs.
    pub(crate) async fn close_idle(&self) {
        self.pool.close_idle().await;
    }
}

/// The body of an engine's answer. At its end the connection goes back to the pool; dropped before, it is closed. The
/// end is known from the answer's length, without reading further.
#[derive(Debug)]
pub(crate) struct AnswerBody {
    connection: Option<Connection>,
    framing: Framing,
    key: Option<(Upstream, PoolKey)>,
}

impl AnswerBody {
    /// Returns the connection to the pool, if all of the answer has been read.
    fn release_if_complete(&mut self) {
        if self
            .connection
            .as_mut()
            .is_some_and(|connection| connection.has_ended(&mut self.framing))
            && let Some(connection) = self.connection.take()
            && let Some((upstream, key)) = self.key.take()
        {
            upstream.pool.keep(key, connection);
        }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = io::Error;

    fn is_end_stream(&self) -> bool {
        self.connection.is_none()
    }

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let this = &mut *self;
        let Some(connection) = &mut this.connection else {
            return Poll::Ready(None);
        };
        let piece = ready!(connection.poll_body(&mut this.framing, context));
        this.release_if_complete();
        if !matches!(piece, Some(Ok(_))) {
            this.connection = None;
        }
        Poll::Ready(piece.map(|piece| piece.map(Frame::data)))
    }
}

/// Reads the whole body of an answer.
pub(crate) async fn read_whole(mut body: AnswerBody) -> Result<Bytes, Cause> {
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
            return Err(Cause::InvalidAnswer("larger than 256 MiB"));
        }
    }
    Ok(if all.is_empty() { first } else { all.freeze() })
}
