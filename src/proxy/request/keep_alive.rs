//! Keeps the connection of a streamed generation open while it waits, prefills, or makes no token: comments go out, as vLLM's own
//! `--sse-keep-alive-interval` has them.
//!
//! An engine's comments cannot do that for a fleet, because it knows of a request only once the prefill is done. An answer that
//! comes before the first comment is due is passed on as it is; after that the status is 200, so errors are sent as events.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{self, HeaderValue};
use axum::http::{Response, StatusCode};
use bytes::Bytes;
use futures_util::FutureExt as _;
use http_body_util::BodyExt;
use hyper::body::Frame;
use tokio::time::{Instant, Sleep, sleep};

use super::answer::is_stream;
use super::attempt::Job;
use super::flow;
use crate::proxy::Shared;
use crate::proxy::body::document::Document;
use crate::proxy::body::sse;
use crate::proxy::error::ProxyError;
use crate::proxy::telemetry::metrics::Ending;
use crate::proxy::telemetry::record::Record;
use crate::report::one_line;

const COMMENT: &[u8] = b": keep-alive\n\n";

/// Answers a generation, with comments if it is a stream and they are wanted.
pub(crate) async fn answer(shared: &Arc<Shared>, job: Job) -> Result<Response<Body>, ProxyError> {
    let every = shared.settings.service.streams.keep_alive;
    let is_streamed = || Document::parse(&job.body).is_ok_and(|document| document.given("stream") == Some("true"));
    if every.is_zero() || !is_streamed() {
        return flow::answer(shared, job).await;
    }
    let record = Arc::clone(&job.record);
    let mut pending = {
        let shared = Arc::clone(shared);
        async move { flow::answer(&shared, job).await }.boxed()
    };
    tokio::select! {
        biased;
        answer = &mut pending => {
            let answer = answer?;
            Ok(if is_stream(answer.headers()) {
                answer.map(|body| Body::new(Alive::new(Rest::Begun(body), every, record)))
            } else {
                answer
            })
        }
        () = sleep(every) => {
            record.streams();
            let events = told_as_events(Arc::clone(shared), pending, Arc::clone(&record)).boxed();
            let mut response = Response::new(Body::new(Alive::new(Rest::Pending(events), every, record)));
            let kind = HeaderValue::from_static("text/event-stream; charset=utf-8");
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
            Ok(response)
        }
    }
}

/// The answer as events, whatever it is.
async fn told_as_events(
    shared: Arc<Shared>,
    pending: impl Future<Output = Result<Response<Body>, ProxyError>>,
    record: Arc<Record>,
) -> Body {
    match pending.await {
        Ok(answer) if is_stream(answer.headers()) => answer.into_body(),
        Ok(answer) => {
            record.stream_ended(if answer.status() == StatusCode::OK {
                Ending::Answered
            } else {
                Ending::Refused
            });
            let body = answer
                .into_body()
                .collect()
                .await
                .map(http_body_util::Collected::to_bytes);
            // Its lines are no matter to JSON, and would be to an event.
            let text = String::from_utf8_lossy(&body.unwrap_or_default()).replace(['\r', '\n'], " ");
            Body::from(sse::event(&text) + &sse::event("[DONE]"))
        }
        Err(error) => {
            tracing::warn!(
                kind = error.code(),
                error = one_line(&error),
                "request failed after its answer had begun"
            );
            shared.metrics.failed(error.code());
            record.stream_ended(Ending::Broken);
            Body::from(error.to_events())
        }
    }
}

/// What is still to come.
enum Rest {
    Pending(Pin<Box<dyn Future<Output = Body> + Send>>),
    Begun(Body),
}

/// A streamed answer with comments in its pauses.
struct Alive {
    rest: Rest,
    every: Duration,
    pause: Pin<Box<Sleep>>,
    /// Whether the last event has ended: a comment within one would be part of it.
    is_between: bool,
    record: Arc<Record>,
}

impl Alive {
    fn new(rest: Rest, every: Duration, record: Arc<Record>) -> Self {
        // The head goes out with a comment, if it goes out before the answer.
        let first = if matches!(rest, Rest::Pending(_)) {
            Duration::ZERO
        } else {
            every
        };
        Self {
            rest,
            every,
            pause: Box::pin(sleep(first)),
            is_between: true,
            record,
        }
    }
}

impl hyper::body::Body for Alive {
    type Data = Bytes;
    type Error = axum::Error;

    fn is_end_stream(&self) -> bool {
        matches!(&self.rest, Rest::Begun(body) if body.is_end_stream())
    }

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.get_mut();
        let next = loop {
            match &mut this.rest {
                Rest::Pending(body) => match body.as_mut().poll(context) {
                    Poll::Ready(body) => this.rest = Rest::Begun(body),
                    Poll::Pending => break Poll::Pending,
                },
                Rest::Begun(body) => break Pin::new(body).poll_frame(context),
            }
        };
        match next {
            Poll::Ready(next) => {
                this.pause.as_mut().reset(Instant::now() + this.every);
                if let Some(Ok(frame)) = &next {
                    let ends = |data: &Bytes| data.ends_with(b"\n\n") || data.ends_with(b"\n\r\n");
                    this.is_between = frame.data_ref().is_none_or(ends);
                }
                if next.is_none() || this.is_end_stream() {
                    this.record.stream_over();
                }
                Poll::Ready(next)
            }
            Poll::Pending if this.is_between && this.pause.as_mut().poll(context).is_ready() => {
                this.pause.as_mut().reset(Instant::now() + this.every);
                Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(COMMENT)))))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}
