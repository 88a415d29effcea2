//! What an engine's answer means: good, refused for the client's own fault, or failed; and how it is passed on.
//!
//! A status of 200 says little: vLLM ends a generation that it aborts, or whose KV was lost, with a finish reason.

use axum::body::Body;
use axum::http::response::Parts;
use axum::http::{Response, StatusCode, header};
use bytes::Bytes;
use http_body_util::BodyExt;
use serde::Deserialize;

use super::error::Cause;
use super::sse::{self, Events};
use super::upstream::{AnswerBody, forwardable};

/// What an engine's whole answer is.
pub(super) enum Verdict {
    Good,
    Refused,
}

/// Judges a whole answer: good, refused for the client's own fault, or failed.
pub(super) fn judge(head: &Parts, body: &[u8]) -> Result<Verdict, Cause> {
    if head.status.is_server_error() {
        return Err(Cause::Status {
            status: head.status,
            message: message_of(body),
        });
    }
    if !head.status.is_success() {
        return Ok(Verdict::Refused);
    }
    failed_finish(body).map_or(Ok(Verdict::Good), |reason| Err(Cause::Finish(reason)))
}

/// Judges the first event of a stream: `None` if it is good, an answer if the client is at fault.
pub(super) fn judge_event(events: &[u8]) -> Result<Option<Response<Body>>, Cause> {
    #[derive(Deserialize)]
    struct Event {
        error: Option<EngineError>,
    }
    let Some(data) = sse::data(events).next() else {
        return Ok(None);
    };
    if let Some(reason) = failed_finish(data) {
        return Err(Cause::Finish(reason));
    }
    let Ok(Event { error: Some(error) }) = serde_json::from_slice(data) else {
        return Ok(None);
    };
    let status = error
        .code
        .as_u64()
        .and_then(|code| u16::try_from(code).ok())
        .and_then(|code| StatusCode::from_u16(code).ok())
        .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    if !status.is_client_error() {
        return Err(Cause::Status {
            status,
            message: error.message,
        });
    }
    let mut response = Response::new(Body::from(Bytes::copy_from_slice(data)));
    *response.status_mut() = status;
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    Ok(Some(response))
}

/// What whole events of a stream say of its generation.
pub(super) enum Seen {
    Good,
    /// The engine ends the stream with an error event.
    Told,
    /// The event that begins here ends a generation that failed as if it had succeeded.
    Failed(usize, Cause),
}

/// Looks whether a generation fails within `events`. Text cannot hold these words in quotes without escapes, so that most
/// events need not be parsed.
pub(super) fn look(events: &[u8]) -> Seen {
    #[derive(Deserialize)]
    struct Event {
        #[serde(default)]
        error: Option<serde::de::IgnoredAny>,
    }
    let has = |word: &[u8]| memchr::memmem::find(events, word).is_some();
    if !has(b"\"abort\"") && !has(b"\"error\"") {
        return Seen::Good;
    }
    let mut seen = Seen::Good;
    for (at, event) in sse::each(events) {
        for data in sse::data(event) {
            if let Some(reason) = failed_finish(data) {
                return Seen::Failed(at, Cause::Finish(reason));
            }
            if matches!(serde_json::from_slice(data), Ok(Event { error: Some(_) })) {
                seen = Seen::Told;
            }
        }
    }
    seen
}

#[derive(Deserialize)]
struct EngineError {
    #[serde(default)]
    message: String,
    #[serde(default)]
    code: serde_json::Value,
}

/// The beginning of an engine's error message.
fn message_of(body: &[u8]) -> String {
    const CHARACTERS: usize = 500;
    #[derive(Deserialize)]
    struct Wrapped {
        error: EngineError,
    }
    let message = serde_json::from_slice::<Wrapped>(body).map_or_else(
        |_| String::from_utf8_lossy(&body[..body.len().min(4 * CHARACTERS)]).into_owned(),
        |wrapped| wrapped.error.message,
    );
    message.chars().take(CHARACTERS).collect()
}

/// The finish reason of a generation that failed although its status says 200: vLLM ends so what it aborts while it
/// shuts down, and what lost its KV.
fn failed_finish(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Answer {
        choices: Vec<Choice>,
    }
    #[derive(Deserialize)]
    struct Choice {
        finish_reason: Option<String>,
    }
    let answer: Answer = serde_json::from_slice(body).ok()?;
    answer
        .choices
        .into_iter()
        .filter_map(|choice| choice.finish_reason)
        .find(|reason| matches!(reason.as_str(), "abort" | "error"))
}

/// An engine's whole answer, for the client.
pub(super) fn verbatim(head: Parts, body: Bytes) -> Response<Body> {
    let headers = forwardable(&head.headers);
    let mut response = Response::from_parts(head, Body::from(body));
    *response.headers_mut() = headers;
    response
}

pub(super) fn is_event_stream(head: &Parts) -> bool {
    head.headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.trim_start().starts_with("text/event-stream"))
}

/// Reads a stream until it has given a whole event.
pub(super) async fn first_events(body: &mut AnswerBody, events: &mut Events) -> Result<Bytes, Cause> {
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Cause::Broken(crate::report::one_line(&error)))?;
        if let Ok(bytes) = frame.into_data() {
            let whole = events.push(bytes);
            if !whole.is_empty() {
                return Ok(whole);
            }
        }
    }
    Err(Cause::Truncated)
}
