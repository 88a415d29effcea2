//! The record of one request: what is learned of it on its way, for its answer's headers, the metrics, and the access log.
//!
//! Whoever works on a request notes what happens; the record is complete, and told, once the last of them has dropped it.
//! It never holds a body, a prompt or a key.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use memchr::memmem;
use opentelemetry::KeyValue;
use opentelemetry_sdk::trace::Span;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::access_log::AccessLog;
use super::metrics::{Ending, Outcome, Timed, Traffic};
use super::traces::{self, Trace};
use crate::fleet::{EngineId, EngineView, Role};
use crate::proxy::Shared;
use crate::proxy::error::Code;
use crate::proxy::hash::hash_of;
use crate::proxy::upstream::REQUEST_ID;

/// Longer ids of clients are ignored.
const MAX_ID_BYTES: usize = 128;

/// The stages that an answer tells of in `Server-Timing`, with their names there.
const TOLD_STAGES: [(Timed, &str); 4] = [
    (Timed::Queue, "queue"),
    (Timed::Prefill, "prefill"),
    (Timed::Handoff, "handoff"),
    (Timed::DecodeFirstByte, "first-token"),
];

/// The route that an answer is counted under, as its extension.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Endpoint(pub(crate) &'static str);

/// The record of one request.
#[derive(Debug)]
pub(crate) struct Record {
    traffic: Arc<Traffic>,
    log: Option<AccessLog>,
    trace: Option<Trace>,
    method: Method,
    arrived: Instant,
    /// When it arrived, for people.
    at: SystemTime,
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
    /// How much of the prefill leg the request waited in the engine, and how much it was computed.
    prefill_parts: Option<EngineTimes>,
    /// How long the client's body was on its way, since the request arrived.
    read_for: Option<Duration>,
    /// When the last attempt began, since the request arrived; none for the first.
    retried_after: Option<Duration>,
    /// The id that the engines of the last attempt know.
    engine_id: Option<String>,
    handoff: Option<Outcome>,
    attempts: u32,
    prefill: Option<EngineId>,
    decode: Option<EngineId>,
    tokens: Usage,
    /// A hash of the session's name.
    session: Option<u64>,
    /// The span of the leg that runs.
    leg: Option<Span>,
}

/// vLLM's `PerRequestMetrics`, in milliseconds. Its time to the first token begins where the queue ends.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
struct EngineTimes {
    queue_time_ms: Option<f64>,
    time_to_first_token_ms: Option<f64>,
}

/// Tokens of a request, as engines count them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
struct Usage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
}

impl Record {
    /// The record of a request of a client. From now on its headers name its span.
    pub(crate) fn of_client(shared: &Shared, method: Method, headers: &mut HeaderMap) -> Self {
        let mut record = Self::new(&shared.metrics.clients, method, headers);
        record.log.clone_from(&shared.settings.parts.access_log);
        let traces = shared.settings.parts.traces.as_ref();
        record.trace = traces.map(|traces| traces.begin(headers, record.at));
        record
    }

    /// The record of a request of xpyd's own.
    pub(crate) fn of_canary(shared: &Shared) -> Self {
        Self::new(&shared.metrics.canaries, Method::POST, &HeaderMap::new())
    }

    fn new(traffic: &Arc<Traffic>, method: Method, headers: &HeaderMap) -> Self {
        let is_short = |id: &&HeaderValue| id.len() <= MAX_ID_BYTES && id.to_str().is_ok();
        Self {
            traffic: Arc::clone(traffic),
            log: None,
            trace: None,
            method,
            arrived: Instant::now(),
            at: SystemTime::now(),
            client_id: headers.get(REQUEST_ID).filter(is_short).cloned(),
            noted: Mutex::default(),
        }
    }

    fn noted(&self) -> MutexGuard<'_, Noted> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The request is a generation, and belongs to this session.
    pub(crate) fn generates(&self, session: Option<&str>) {
        let mut noted = self.noted();
        noted.generates = true;
        noted.attempts = 1;
        noted.session = session.map(hash_of);
    }

    /// The client's body is there.
    pub(crate) fn has_read(&self) {
        self.noted().read_for = Some(self.arrived.elapsed());
    }

    /// A leg is sent to an engine under this id: the headers for it.
    pub(crate) fn leg<'job>(&self, engine: &EngineView, id: &str, headers: &'job HeaderMap) -> Cow<'job, HeaderMap> {
        let mut headers = Cow::Borrowed(headers);
        let mut noted = self.noted();
        if let Some(trace) = &self.trace {
            let name = match engine.role {
                Role::Prefill => "prefill",
                Role::Decode => "decode",
            };
            let attributes = vec![
                KeyValue::new("xpyd.engine", engine.id.to_string()),
                KeyValue::new("gen_ai.request.id", id.to_owned()),
                KeyValue::new("server.address", engine.endpoint.host.clone()),
                KeyValue::new("server.port", i64::from(engine.endpoint.port)),
            ];
            noted.leg = Some(trace.leg(name, attributes, headers.to_mut()));
        }
        let id_of_engine = Some(engine.id.clone());
        match engine.role {
            Role::Prefill => noted.prefill = id_of_engine,
            Role::Decode => noted.decode = id_of_engine,
        }
        if noted.engine_id.as_deref() != Some(id) {
            noted.engine_id = Some(id.to_owned());
        }
        headers
    }

    /// A stage took so long.
    pub(crate) fn took(&self, stage: Timed, time: Duration) {
        let mut noted = self.noted();
        noted.stages[stage as usize] = Some(time);
        if let Some(trace) = &self.trace {
            match stage {
                Timed::Prefill => noted.leg = None,
                Timed::Queue | Timed::Handoff => trace.part(stage.as_str(), time),
                Timed::DecodeFirstByte => {}
            }
        }
        drop(noted);
        self.traffic.took(stage, time);
    }

    /// The answer begins.
    pub(crate) fn first_token_after(&self, time: Duration) {
        self.traffic.first_token_after(time);
    }

    /// A hand-off of the request ended so.
    pub(crate) fn handed(&self, outcome: Outcome) {
        self.noted().handoff = Some(outcome);
        self.traffic.handed(outcome);
    }

    /// The request is tried once more.
    pub(crate) fn retried(&self) {
        let mut noted = self.noted();
        noted.stages = [None; Timed::COUNT];
        noted.prefill_parts = None;
        noted.retried_after = Some(self.arrived.elapsed());
        noted.attempts += 1;
        (noted.prefill, noted.decode) = (None, None);
        noted.leg.take().as_mut().map(traces::fail);
        drop(noted);
        self.traffic.retried();
    }

    /// The prefill engine has answered, and counted the prompt. With `--enable-per-request-metrics` it tells its times, too.
    pub(crate) fn prefilled(&self, answer: &[u8]) {
        if let Some(times) = last_object(answer, b"\"metrics\":") {
            self.noted().prefill_parts = Some(times);
        }
        if let Some(usage) = self.usage_in(answer) {
            self.noted().tokens.prompt_tokens = usage.prompt_tokens;
        }
    }

    /// The decode engine has sent a whole answer, or events.
    pub(crate) fn decoded(&self, bytes: &[u8]) {
        if let Some(usage) = self.usage_in(bytes) {
            self.noted().tokens = usage;
        }
    }

    /// The last usage that an engine tells, where anybody wants to know it.
    fn usage_in(&self, bytes: &[u8]) -> Option<Usage> {
        (self.log.is_some() || self.trace.is_some()).then(|| last_usage(bytes))?
    }

    /// The answer is a stream.
    pub(crate) fn streams(&self) {
        self.noted().streams = true;
    }

    /// Two reads of the stream came one after the other so long.
    pub(crate) fn gap(&self, time: Duration) {
        self.traffic.gap(time);
    }

    /// The stream ended so.
    pub(crate) fn stream_ended(&self, end: Ending) {
        self.noted().stream_end = Some(end);
    }

    /// The stream has come to its end; as a whole answer, unless somebody knows better.
    pub(crate) fn stream_over(&self) {
        self.noted().stream_end.get_or_insert(Ending::Answered);
    }

    /// Notes an answer, and adds to it what the client may know of its request.
    pub(crate) fn answer(&self, mut response: Response<Body>) -> Response<Body> {
        let mut noted = self.noted();
        noted.status = Some(response.status());
        noted.code = response.extensions().get().map(|Code(code)| *code);
        noted.endpoint = response.extensions().get().map(|Endpoint(endpoint)| *endpoint);
        let engine_id = || noted.engine_id.as_deref().and_then(|id| HeaderValue::from_str(id).ok());
        if let Some(id) = self.client_id.clone().or_else(engine_id) {
            response.headers_mut().insert(REQUEST_ID, id);
        }
        if let Some(timing) = noted.server_timing(self.arrived.elapsed()) {
            response.headers_mut().insert("server-timing", timing);
        }
        response
    }
}

/// Tells what the request was.
impl Drop for Record {
    fn drop(&mut self) {
        let mut noted = std::mem::take(&mut *self.noted());
        let total = self.arrived.elapsed();
        if noted.generates {
            self.traffic.ended(noted.ending(), total);
        }
        if let Some(trace) = &self.trace {
            let has_failed = matches!(noted.ending(), Ending::Failed | Ending::Broken);
            noted.leg.take().as_mut().filter(|_| has_failed).map(traces::fail);
            let name = format!("{} {}", self.method, noted.route());
            trace.end(name, has_failed, self.attributes(&noted));
        }
        // Who only asks whether xpyd is well is no client.
        if let (Some(log), true) = (&self.log, noted.endpoint.is_some() || noted.generates) {
            match serde_json::to_string(&self.line(&noted, total)) {
                Ok(line) => log.tell(line),
                Err(error) => tracing::error!(%error, "a line of the access log cannot be made"),
            }
        }
    }
}

/// A line of the access log. What is not known is left out.
#[derive(Debug, Serialize)]
struct Line<'record> {
    /// When the request arrived, in UTC.
    time: String,
    method: &'record str,
    route: &'record str,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prefill: Option<&'record str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    decode: Option<&'record str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    handoff: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    attempts: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    queue_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prefill_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    handoff_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_token_ms: Option<f64>,
    total_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_tokens: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    completion_tokens: Option<u64>,
    /// The client's own id of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<&'record str>,
    /// The id that engines know.
    #[serde(skip_serializing_if = "Option::is_none")]
    engine_request_id: Option<&'record str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<String>,
}

impl Record {
    fn line<'record>(&'record self, noted: &'record Noted, total: Duration) -> Line<'record> {
        let stage = |stage: Timed| noted.stages[stage as usize].map(milliseconds);
        let time = jiff::Timestamp::try_from(self.at).unwrap_or_default();
        Line {
            time: format!("{time:.3}"),
            method: self.method.as_str(),
            route: noted.route(),
            status: noted.status.map(|status| status.as_u16()),
            outcome: noted.ending().as_str(),
            code: noted.code,
            prefill: noted.prefill.as_ref().map(EngineId::as_str),
            decode: noted.decode.as_ref().map(EngineId::as_str),
            handoff: noted.handoff.map(Outcome::as_str),
            attempts: noted.generates.then_some(noted.attempts),
            queue_ms: stage(Timed::Queue),
            prefill_ms: stage(Timed::Prefill),
            handoff_ms: stage(Timed::Handoff),
            first_token_ms: stage(Timed::DecodeFirstByte),
            total_ms: milliseconds(total),
            prompt_tokens: noted.tokens.prompt_tokens,
            completion_tokens: noted.tokens.completion_tokens,
            request_id: self.client_id.as_ref().and_then(|id| id.to_str().ok()),
            engine_request_id: noted.engine_id.as_deref(),
            session: noted.session.map(|hash| format!("{hash:016x}")),
        }
    }
}

impl Record {
    /// What the request's span tells, by the names of OpenTelemetry's conventions where they have any.
    fn attributes(&self, noted: &Noted) -> Vec<KeyValue> {
        let text = |name: &'static str, value: Option<&str>| Some(KeyValue::new(name, value?.to_owned()));
        let number = |name: &'static str, value: Option<u64>| {
            Some(KeyValue::new(name, i64::try_from(value?).unwrap_or(i64::MAX)))
        };
        let client_id = self.client_id.as_ref().and_then(|id| id.to_str().ok());
        let attributes = [
            text("http.request.method", Some(self.method.as_str())),
            text("http.route", noted.endpoint),
            number(
                "http.response.status_code",
                noted.status.map(|status| status.as_u16().into()),
            ),
            text("error.type", noted.code),
            text("xpyd.outcome", Some(noted.ending().as_str())),
            text("xpyd.handoff", noted.handoff.map(Outcome::as_str)),
            number("xpyd.attempts", noted.generates.then_some(noted.attempts.into())),
            text("xpyd.request_id", client_id),
            number("gen_ai.usage.input_tokens", noted.tokens.prompt_tokens),
            number("gen_ai.usage.output_tokens", noted.tokens.completion_tokens),
        ];
        attributes.into_iter().flatten().collect()
    }
}

/// Milliseconds, to the microsecond.
fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}

/// The last `usage` of an answer or of events.
fn last_usage(bytes: &[u8]) -> Option<Usage> {
    last_object(bytes, b"\"usage\":")
}

/// The last value of this key in an answer or in events. A key cannot be written like this within a JSON string.
fn last_object<T: DeserializeOwned>(bytes: &[u8], key: &[u8]) -> Option<T> {
    let place = memmem::rfind(bytes, key)?;
    let value = &bytes[place + key.len()..];
    let mut values = serde_json::Deserializer::from_slice(value).into_iter::<Option<T>>();
    values.next()?.ok()?
}

impl Noted {
    /// A client that left before its answer began knows of no route.
    fn route(&self) -> &'static str {
        self.endpoint.unwrap_or("unknown")
    }

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

impl Noted {
    /// The stages in the syntax of W3C's Server Timing, in milliseconds, and the `total` since the request's arrival; `None`
    /// before any. Who did not wait is told so. Stages are those of the last attempt; what those before it took is
    /// `retried`. A part of a stage has its name as a prefix.
    fn server_timing(&self, total: Duration) -> Option<HeaderValue> {
        self.stages.iter().flatten().next()?;
        let mut known: Vec<(&str, f64)> = Vec::new();
        let read = self.read_for.unwrap_or_default();
        known.extend(self.read_for.map(|time| ("read", milliseconds(time))));
        known.extend(
            self.retried_after
                .map(|time| ("retried", milliseconds(time.saturating_sub(read)))),
        );
        for (stage, name) in TOLD_STAGES {
            let unless_told = (stage == Timed::Queue).then_some(Duration::ZERO);
            let time = self.stages[stage as usize].or(unless_told);
            known.extend(time.map(|time| (name, milliseconds(time))));
            if let Some(parts) = self.prefill_parts.filter(|_| stage == Timed::Prefill) {
                known.extend(parts.queue_time_ms.map(|time| ("prefill-queue", time)));
                known.extend(parts.time_to_first_token_ms.map(|time| ("prefill-compute", time)));
            }
        }
        known.push(("total", milliseconds(total)));
        let metrics: Vec<String> = known
            .iter()
            .map(|(name, time)| format!("{name};dur={time:.3}"))
            .collect();
        HeaderValue::from_str(&metrics.join(", ")).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_timing_names_the_stages_in_their_order() {
        let mut noted = Noted::default();
        let total = Duration::from_millis(20);
        assert_eq!(noted.server_timing(total), None);
        noted.stages[Timed::DecodeFirstByte as usize] = Some(Duration::from_micros(1500));
        noted.stages[Timed::Prefill as usize] = Some(Duration::from_millis(12));
        assert_eq!(
            noted.server_timing(total).expect("a header"),
            "queue;dur=0.000, prefill;dur=12.000, first-token;dur=1.500, total;dur=20.000"
        );
        noted.retried_after = Some(Duration::from_millis(3));
        noted.prefill_parts = last_object(
            br#"{"usage":{},"metrics":{"time_to_first_token_ms":7.5,"queue_time_ms":4.25,"mean_itl_ms":null}}"#,
            b"\"metrics\":",
        );
        assert_eq!(
            noted.server_timing(total).expect("a header"),
            "retried;dur=3.000, queue;dur=0.000, prefill;dur=12.000, prefill-queue;dur=4.250, prefill-compute;dur=7.500, \
             first-token;dur=1.500, total;dur=20.000"
        );
    }

    #[test]
    fn the_last_usage_is_found_whatever_the_text_says() {
        let usage = |prompt, completion| {
            Some(Usage {
                prompt_tokens: Some(prompt),
                completion_tokens: Some(completion),
            })
        };
        let events = br#"data: {"choices":[{"text":"\"usage\":{\"prompt_tokens\":9}"}],"usage":null}

data: {"choices":[],"usage":{"prompt_tokens":3,"total_tokens":5,"completion_tokens":2}}

data: [DONE]
"#;
        assert_eq!(last_usage(events), usage(3, 2));
        assert_eq!(
            last_usage(br#"{"usage": {"prompt_tokens":3,"completion_tokens":2}, "x":1}"#),
            usage(3, 2)
        );
        for none in [
            &br#"{"choices":[{"text":"\"usage\":{}"}],"usage":null}"#[..],
            b"",
            b"\"usage\":",
            b"\"usage\":7",
        ] {
            assert_eq!(last_usage(none), None);
        }
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
