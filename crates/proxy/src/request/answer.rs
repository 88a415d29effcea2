//! Classifies an engine's answer: good, refused because of the client's request, or failed.
//!
//! Status 200 alone proves little: if vLLM aborts a generation or loses its KV, only the finish reason says so.

use axum::body::Body;
use axum::http::response::Parts;
use axum::http::{HeaderMap, Response, StatusCode, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use jiff::Timestamp;
use jiff::fmt::rfc2822;
use serde::Deserialize;

use crate::body::read::encoding;
use crate::body::sse::{self, Events};
use crate::error::Cause;
use crate::upstream::{AnswerBody, forwardable};

/// The class of an engine's whole answer that has not failed.
pub(crate) enum AnswerClass {
    Good,
    Refused,
}

/// Classifies a whole answer, or returns why it failed.
pub(crate) fn classify(head: &Parts, body: &[u8]) -> Result<AnswerClass, Cause> {
    if is_busy(head.status) || head.status.is_server_error() {
        return Err(failed_with(head.status, message_of(body), retry_after(&head.headers)));
    }
    if !head.status.is_success() {
        return Ok(AnswerClass::Refused);
    }
    check_encoding(head)?;
    failed_finish(body).map_or(Ok(AnswerClass::Good), |reason| Err(Cause::Finish(reason)))
}

/// Whether a status means that a healthy engine has no capacity.
fn is_busy(status: StatusCode) -> bool {
    matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
}

fn failed_with(status: StatusCode, message: String, retry_after: Option<u64>) -> Cause {
    if is_busy(status) {
        Cause::Busy {
            status,
            message,
            retry_after,
        }
    } else {
        Cause::Status { status, message }
    }
}

/// The seconds of a `Retry-After` header, which can also be a date. At most a day.
fn retry_after(headers: &HeaderMap) -> Option<u64> {
    const MOST: u64 = 24 * 3600;
    let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let seconds = value.parse().ok().or_else(|| {
        let date = rfc2822::parse(value).ok()?.timestamp();
        // A date in the past leaves 0 seconds.
        Some(u64::try_from(date.as_second() - Timestamp::now().as_second()).unwrap_or(0))
    })?;
    Some(seconds.clamp(1, MOST))
}

/// Fails if the answer's body has a content encoding.
pub(crate) fn check_encoding(head: &Parts) -> Result<(), Cause> {
    match encoding(&head.headers) {
        Some(encoding) => Err(Cause::Encoded(encoding)),
        None => Ok(()),
    }
}

/// Classifies the first event of a stream: `None` if it is good, a response if the client's request is at fault.
pub(crate) fn classify_first_event(events: &[u8]) -> Result<Option<Response<Body>>, Cause> {
    #[derive(Deserialize)]
    struct Event {
        error: Option<EngineError>,
    }
    let Some(data) = sse::given(events).next() else {
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
    if is_busy(status) || !status.is_client_error() {
        return Err(failed_with(status, error.message, None));
    }
    let mut response = Response::new(Body::from(Bytes::copy_from_slice(data)));
    *response.status_mut() = status;
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    Ok(Some(response))
}

/// What whole events of a stream say about its generation.
pub(crate) enum EventScan {
    Good,
    /// The engine reports an error with an error event.
    ErrorEvent,
    /// The event at this position ends a failed generation as if it had succeeded.
    Failed(usize, Cause),
}

/// Checks whether a generation fails within `events`. Generated text cannot contain these quoted words without
/// escapes, so most events need no parsing.
pub(crate) fn scan_events(events: &[u8]) -> EventScan {
    #[derive(Deserialize)]
    struct Event {
        #[serde(default)]
        error: Option<serde::de::IgnoredAny>,
    }
    let has = |word: &[u8]| memchr::memmem::find(events, word).is_some();
    if !has(b"\"abort\"") && !has(b"\"error\"") {
        return EventScan::Good;
    }
    let mut seen = EventScan::Good;
    for (at, event) in sse::each(events) {
        for data in sse::data(event) {
            if let Some(reason) = failed_finish(data) {
                return EventScan::Failed(at, Cause::Finish(reason));
            }
            if matches!(serde_json::from_slice(data), Ok(Event { error: Some(_) })) {
                seen = EventScan::ErrorEvent;
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

/// The finish reason of a generation that failed with status 200: vLLM ends generations so that it aborts during
/// shutdown, or whose KV was lost.
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

/// An engine's whole answer as the client's response.
pub(crate) fn verbatim(head: Parts, body: Bytes) -> Response<Body> {
    let headers = forwardable(&head.headers);
    let mut response = Response::from_parts(head, Body::from(body));
    *response.headers_mut() = headers;
    response
}

pub(crate) fn is_event_stream(head: &Parts) -> bool {
    is_stream(&head.headers)
}

/// Whether these are the headers of an event stream.
pub(crate) fn is_stream(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.trim_start().starts_with("text/event-stream"))
}

/// Maximum bytes of comments that are kept for a client until its answer begins.
const MAX_COMMENT_BYTES: usize = 64 << 10;

/// Reads a stream up to its first whole event with data. An engine sends comments before that while a request waits
/// in it.
pub(crate) async fn first_events(body: &mut AnswerBody, events: &mut Events) -> Result<Bytes, Cause> {
    let mut comments = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Cause::Broken(xpyd_base::report::one_line(&error)))?;
        let Ok(bytes) = frame.into_data() else { continue };
        let whole = events.push(bytes);
        if sse::given(&whole).next().is_none() {
            if comments.len() + whole.len() <= MAX_COMMENT_BYTES {
                comments.extend_from_slice(&whole);
            }
        } else if comments.is_empty() {
            return Ok(whole);
        } else {
            comments.extend_from_slice(&whole);
            return Ok(comments.freeze());
        }
    }
    Err(Cause::Truncated)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn headers(name: header::HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, value.parse().expect("a value"))])
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let of = |value: &str| retry_after(&headers(header::RETRY_AFTER, value));
        assert_eq!((of("7"), of(" 120 "), of("0")), (Some(7), Some(120), Some(1)));
        assert_eq!(
            (of("99999999999"), of("soon"), of("-1"), of("")),
            (Some(86_400), None, None, None)
        );
        let soon = Timestamp::now() + Duration::from_mins(1);
        let soon = rfc2822::DateTimePrinter::new()
            .timestamp_to_rfc9110_string(&soon)
            .expect("a date");
        assert!((50..=60).contains(&of(&soon).expect("a wait")), "{soon}");
        assert_eq!(of("Sun, 06 Nov 1994 08:49:37 GMT"), Some(1), "it is over");
        assert_eq!(retry_after(&HeaderMap::new()), None);
    }
}
