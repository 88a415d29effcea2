//! Keeps the connection of a streamed generation open while it waits, prefills or generates no token: sends comments,
//! as vLLM's own `--sse-keep-alive-interval` does.
//!
//! An engine cannot do that for a fleet, because it knows of a request only after the prefill. If the answer comes
//! before the first comment is due, its status and headers are forwarded as they are. After that the status is 200,
//! so errors become events.

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
use crate::Shared;
use crate::body::document::Document;
use crate::body::sse;
use crate::error::ProxyError;
use crate::telemetry::metrics::ClientOutcome;
use crate::telemetry::record::Record;
use xpyd_base::report::one_line;

const COMMENT: &[u8] = b": keep-alive\n\n";

/// Answers a generation, with comments if it is a stream and keep-alive is on.
pub(crate) async fn answer(shared: &Arc<Shared>, job: Job) -> Result<Response<Body>, ProxyError> {
    let every = shared.settings.config.streams.keep_alive;
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
                answer.map(|body| Body::new(KeepAliveBody::new(AnswerState::Started(body), every, record)))
            } else {
                answer
            })
        }
        () = sleep(every) => {
            record.begin_stream();
            let events = into_events(Arc::clone(shared), pending, Arc::clone(&record)).boxed();
            let mut response = Response::new(Body::new(KeepAliveBody::new(AnswerState::Pending(events), every, record)));
            let kind = HeaderValue::from_static("text/event-stream; charset=utf-8");
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
            Ok(response)
        }
    }
}

/// Turns any answer into events.
async fn into_events(
    shared: Arc<Shared>,
    pending: impl Future<Output = Result<Response<Body>, ProxyError>>,
    record: Arc<Record>,
) -> Body {
    match pending.await {
        Ok(answer) if is_stream(answer.headers()) => answer.into_body(),
        Ok(answer) => {
            record.stream_ended(if answer.status() == StatusCode::OK {
                ClientOutcome::Answered
            } else {
                ClientOutcome::Refused
            });
            let body = answer
                .into_body()
                .collect()
                .await
                .map(http_body_util::Collected::to_bytes);
            // Line ends mean nothing in JSON, but would end the event.
            let text = String::from_utf8_lossy(&body.unwrap_or_default()).replace(['\r', '\n'], " ");
            Body::from(sse::event(&text) + &sse::event("[DONE]"))
        }
        Err(error) => {
            tracing::warn!(
                kind = error.code(),
                error = one_line(&error),
                "request failed after its answer had begun"
            );
            shared.metrics.count_error(error.code());
            record.stream_ended(ClientOutcome::Broken);
            Body::from(error.to_events())
        }
    }
}

/// The part of the answer that is still to come.
enum AnswerState {
    Pending(Pin<Box<dyn Future<Output = Body> + Send>>),
    Started(Body),
}

/// A streamed answer with comments in its pauses.
struct KeepAliveBody {
    rest: AnswerState,
    every: Duration,
    pause: Pin<Box<Sleep>>,
    /// Whether the last event has ended. A comment within an event would become part of it.
    is_between: bool,
    record: Arc<Record>,
}

impl KeepAliveBody {
    fn new(rest: AnswerState, every: Duration, record: Arc<Record>) -> Self {
        // The header goes out with a comment if it precedes the answer.
        let first = if matches!(rest, AnswerState::Pending(_)) {
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

impl hyper::body::Body for KeepAliveBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn is_end_stream(&self) -> bool {
        matches!(&self.rest, AnswerState::Started(body) if body.is_end_stream())
    }

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.get_mut();
        let next = loop {
            match &mut this.rest {
                AnswerState::Pending(body) => match body.as_mut().poll(context) {
                    Poll::Ready(body) => this.rest = AnswerState::Started(body),
                    Poll::Pending => break Poll::Pending,
                },
                AnswerState::Started(body) => break Pin::new(body).poll_frame(context),
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
                    this.record.stream_closed();
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
