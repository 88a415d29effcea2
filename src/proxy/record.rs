//! The record of one request: what is learned of it on its way, for its answer's headers, the metrics, and the access log.
//!
//! Whoever works on a request notes what happens; the record is complete, and told, once the last of them has dropped it.
//! It never holds a body, a prompt or a key.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode};
use tokio::time::Instant;

use super::error::Code;
use super::metrics::{Ending, Outcome, Timed, Traffic};
use super::routes::Endpoint;
use super::upstream::Seat;

/// The header of a request's id. A client's own is told back to it and logged; engines get another.
const REQUEST_ID: &str = "x-request-id";

/// Longer ids of clients are ignored.
const MAX_ID_BYTES: usize = 128;

/// The stages that an answer tells of in `Server-Timing`, with their names there.
const TOLD_STAGES: [(Timed, &str); 4] = [
    (Timed::Queue, "queue"),
    (Timed::Prefill, "prefill"),
    (Timed::Handoff, "handoff"),
    (Timed::DecodeFirstByte, "first-token"),
];

/// The record of one request.
#[derive(Debug)]
pub(super) struct Record {
    traffic: Arc<Traffic>,
    arrived: Instant,
    /// The client's own id of the request.
    client_id: Option<HeaderValue>,
    noted: Mutex<Noted>,
}

/// What is learned on the way.
#[derive(Debug, Default)]
struct Noted {
    endpoint: Option<&'static str>,
    /// Whether the request is a generation.
    generates: bool,
    status: Option<StatusCode>,
    code: Option<&'static str>,
    /// Whether the answer is a stream, which ends later than it is answered.
    streams: bool,
    /// How the stream ended.
    stream_end: Option<Ending>,
    /// Of the last attempt.
    stages: [Option<Duration>; Timed::COUNT],
    /// The id that the engines of the last attempt know.
    engine_id: Option<String>,
    handoff: Option<Outcome>,
}

impl Record {
    /// The record of a client's request with these headers.
    pub(super) fn new(traffic: Arc<Traffic>, headers: &HeaderMap) -> Self {
        let is_short = |id: &&HeaderValue| id.len() <= MAX_ID_BYTES && id.to_str().is_ok();
        Self {
            traffic,
            arrived: Instant::now(),
            client_id: headers.get(REQUEST_ID).filter(is_short).cloned(),
            noted: Mutex::default(),
        }
    }

    fn noted(&self) -> MutexGuard<'_, Noted> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The request is a generation.
    pub(super) fn generates(&self) {
        self.noted().generates = true;
    }

    /// A leg is sent to an engine under this id.
    pub(super) fn asked(&self, _seat: &Seat, id: &str) {
        let mut noted = self.noted();
        if noted.engine_id.as_deref() != Some(id) {
            noted.engine_id = Some(id.to_owned());
        }
    }

    /// A stage took so long.
    pub(super) fn took(&self, stage: Timed, time: Duration) {
        self.noted().stages[stage as usize] = Some(time);
        self.traffic.took(stage, time);
    }

    /// The answer begins.
    pub(super) fn first_token_after(&self, time: Duration) {
        self.traffic.first_token_after(time);
    }

    /// A hand-off of the request ended so.
    pub(super) fn handed(&self, outcome: Outcome) {
        self.noted().handoff = Some(outcome);
        self.traffic.handed(outcome);
    }

    /// The request is tried once more.
    pub(super) fn retried(&self) {
        self.noted().stages = [None; Timed::COUNT];
        self.traffic.retried();
    }

    /// The answer is a stream.
    pub(super) fn streams(&self) {
        self.noted().streams = true;
    }

    /// Two reads of the stream came one after the other so long.
    pub(super) fn gap(&self, time: Duration) {
        self.traffic.gap(time);
    }

    /// The stream ended so.
    pub(super) fn stream_ended(&self, end: Ending) {
        self.noted().stream_end = Some(end);
    }

    /// Notes an answer, and adds to it what the client may know of its request.
    pub(super) fn answer(&self, mut response: Response<Body>) -> Response<Body> {
        let mut noted = self.noted();
        noted.status = Some(response.status());
        noted.code = response.extensions().get().map(|Code(code)| *code);
        noted.endpoint = response.extensions().get().map(|Endpoint(endpoint)| *endpoint);
        let engine_id = || noted.engine_id.as_deref().and_then(|id| HeaderValue::from_str(id).ok());
        if let Some(id) = self.client_id.clone().or_else(engine_id) {
            response.headers_mut().insert(REQUEST_ID, id);
        }
        if let Some(timing) = server_timing(&noted.stages) {
            response.headers_mut().insert("server-timing", timing);
        }
        response
    }
}

/// Tells what the request was.
impl Drop for Record {
    fn drop(&mut self) {
        let noted = std::mem::take(&mut *self.noted());
        if noted.generates {
            self.traffic.ended(noted.ending(), self.arrived.elapsed());
        }
    }
}

impl Noted {
    fn ending(&self) -> Ending {
        match self.status {
            None => Ending::Left,
            Some(_) if self.streams => self.stream_end.unwrap_or(Ending::Left),
            Some(status) if status.is_success() => Ending::Answered,
            Some(status) if status.is_server_error() => Ending::Failed,
            Some(_) => Ending::Refused,
        }
    }
}

/// The stages in the syntax of W3C's Server Timing, in milliseconds; `None` before any.
fn server_timing(stages: &[Option<Duration>; Timed::COUNT]) -> Option<HeaderValue> {
    let known: Vec<String> = TOLD_STAGES
        .iter()
        .filter_map(|(stage, name)| {
            let time = stages[*stage as usize]?;
            Some(format!("{name};dur={:.3}", time.as_secs_f64() * 1000.0))
        })
        .collect();
    (!known.is_empty()).then(|| HeaderValue::from_str(&known.join(", ")).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_timing_names_the_stages_in_their_order() {
        let mut stages = [None; Timed::COUNT];
        assert_eq!(server_timing(&stages), None);
        stages[Timed::DecodeFirstByte as usize] = Some(Duration::from_micros(1500));
        stages[Timed::Prefill as usize] = Some(Duration::from_millis(12));
        assert_eq!(
            server_timing(&stages).expect("a header"),
            "prefill;dur=12.000, first-token;dur=1.500"
        );
    }

    #[test]
    fn an_ending_follows_from_the_status_and_from_how_the_stream_ended() {
        let ending = |status: Option<u16>, stream: Option<Option<Ending>>| {
            let noted = Noted {
                status: status.map(|status| StatusCode::from_u16(status).expect("a status")),
                streams: stream.is_some(),
                stream_end: stream.flatten(),
                ..Noted::default()
            };
            noted.ending()
        };
        assert_eq!(ending(None, None), Ending::Left);
        assert_eq!(ending(Some(200), None), Ending::Answered);
        assert_eq!(ending(Some(404), None), Ending::Refused);
        assert_eq!(ending(Some(502), None), Ending::Failed);
        assert_eq!(ending(Some(200), Some(None)), Ending::Left);
        assert_eq!(ending(Some(200), Some(Some(Ending::Broken))), Ending::Broken);
        assert_eq!(ending(Some(200), Some(Some(Ending::Answered))), Ending::Answered);
    }
}
