//! Calls to engines: connections that are kept, the headers that may cross, and an engine's seat that a leg holds while it runs.
//!
//! Knows HTTP; knows nothing of prompts, connectors or retries.

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

use crate::fleet::{Endpoint, EngineId, EngineView, Incarnation};
use crate::proxy::error::{Cause, Unreachable};
use crate::proxy::overload::{Limit, Overload};
use crate::report::lacks_descriptors;
use crate::wire::{Framing, Head, Pool, Wire};

pub(crate) use headers::{REQUEST_ID, forwardable};
pub(crate) use shared_answer::SharedAnswer;

/// How long a connection may take. Engines are near: one that does not accept within this is not there.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// Largest answer that is read as a whole. Logprobs of a long answer take tens of megabytes.
const MAX_ANSWER_BYTES: usize = 256 << 20;

/// Most idle connections that are kept to one engine.
const MAX_IDLE: usize = 256;

/// The connections to all engines. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Upstream {
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

/// What is sent to an engine.
#[derive(Debug, Clone)]
pub(crate) struct Call<'call> {
    pub(crate) method: Method,
    /// Path and query.
    pub(crate) path: &'call str,
    /// The client's headers that may cross.
    pub(crate) headers: &'call HeaderMap,
    /// This request's own id.
    pub(crate) request_id: Option<&'call str>,
    pub(crate) body: Bytes,
}

impl<'call> Call<'call> {
    /// A GET.
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

    /// Closes all idle connections, so that others can have their descriptors. Whether there was one.
    pub(crate) fn give_back(&self) -> bool {
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
    pub(crate) async fn send(&self, engine: &EngineView, call: Call<'_>) -> Result<Response<AnswerBody>, Cause> {
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
    pub(crate) async fn fetch(&self, engine: &EngineView, call: Call<'_>) -> Result<(Parts, Bytes), Cause> {
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
    pub(crate) async fn close_idle(&self) {
        self.pool.close_idle().await;
    }
}

/// The body of an engine's answer. At its end the connection is kept for another call; dropped before, it is closed. Nobody need
/// read beyond the last piece for that: a server does not, where it has told how long the answer is.
#[derive(Debug)]
pub(crate) struct AnswerBody {
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
pub(crate) async fn whole(mut body: AnswerBody) -> Result<Bytes, Cause> {
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
