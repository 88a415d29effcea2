//! The record of one request: everything that its answer's headers, the metrics, the access log and its trace report.
//!
//! Every part of the proxy that works on a request holds the record. When the last of them drops it, the record is
//! complete and is reported. It never holds a body, a prompt or a key.

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
use super::metrics::{ClientOutcome, HandoffOutcome, TimedStage, TrafficMetrics};
use super::traces::{self, Trace};
use crate::Shared;
use crate::error::ErrorCode;
use crate::hash::hash_of;
use crate::upstream::REQUEST_ID;
use xpyd_base::fleet::{EngineId, EngineView, Role};

/// Longer request ids of clients are ignored.
const MAX_ID_BYTES: usize = 128;

/// The stages in `Server-Timing`, with their names there.
const SERVER_TIMING_STAGES: [(TimedStage, &str); 4] = [
    (TimedStage::Queue, "queue"),
    (TimedStage::Prefill, "prefill"),
    (TimedStage::Handoff, "handoff"),
    (TimedStage::DecodeFirstByte, "first-token"),
];

/// The route under which an answer is counted, as its extension.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RouteLabel(pub(crate) &'static str);

/// The record of one request.
#[derive(Debug)]
pub(crate) struct Record {
    traffic: Arc<TrafficMetrics>,
    log: Option<AccessLog>,
    trace: Option<Trace>,
    method: Method,
    arrived: Instant,
    /// The wall-clock time of its arrival.
    at: SystemTime,
    /// The client's own request id.
    client_id: Option<HeaderValue>,
    state: Mutex<RequestState>,
}

/// What the proxy learns of a request on its way.
#[derive(Debug, Default)]
struct RequestState {
    endpoint: Option<&'static str>,
    /// Whether the request is a generation.
    generates: bool,
    status: Option<StatusCode>,
    code: Option<&'static str>,
    /// Whether the answer is a stream, which ends later than its response begins.
    is_stream: bool,
    /// How the stream ended.
    stream_end: Option<ClientOutcome>,
    /// The stages of the last attempt.
    stages: [Option<Duration>; TimedStage::COUNT],
    /// How long the prefill leg waited in the engine, and how long the engine computed.
    prefill_parts: Option<EngineTimes>,
    /// From the request's arrival until its body was read.
    body_read_after: Option<Duration>,
    /// From the request's arrival until the last attempt began. `None` for the first attempt.
    retried_after: Option<Duration>,
    /// The request id that the engines of the last attempt got.
    engine_id: Option<String>,
    handoff: Option<HandoffOutcome>,
    attempts: u32,
    prefill: Option<EngineId>,
    decode: Option<EngineId>,
    tokens: Usage,
    /// A hash of the session's name.
    session: Option<u64>,
    /// The span of the leg that runs now.
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
    /// The record of a client's request. From now on its headers name its span.
    pub(crate) fn of_client(shared: &Shared, method: Method, headers: &mut HeaderMap) -> Self {
        let mut record = Self::new(&shared.metrics.clients, method, headers);
        record.log.clone_from(&shared.settings.parts.access_log);
        let traces = shared.settings.parts.traces.as_ref();
        record.trace = traces.map(|traces| traces.begin(headers, record.at));
        record
    }

    /// The record of one of xpyd's own requests.
    pub(crate) fn of_canary(shared: &Shared) -> Self {
        Self::new(&shared.metrics.canaries, Method::POST, &HeaderMap::new())
    }

    fn new(traffic: &Arc<TrafficMetrics>, method: Method, headers: &HeaderMap) -> Self {
        let is_short = |id: &&HeaderValue| id.len() <= MAX_ID_BYTES && id.to_str().is_ok();
        Self {
            traffic: Arc::clone(traffic),
            log: None,
            trace: None,
            method,
            arrived: Instant::now(),
            at: SystemTime::now(),
            client_id: headers.get(REQUEST_ID).filter(is_short).cloned(),
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, RequestState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks the request as a generation of this session.
    pub(crate) fn begin_generation(&self, session: Option<&str>) {
        let mut state = self.state();
        state.generates = true;
        state.attempts = 1;
        state.session = session.map(hash_of);
    }

    /// Marks the client's body as read.
    pub(crate) fn body_received(&self) {
        self.state().body_read_after = Some(self.arrived.elapsed());
    }

    /// Records that a leg is sent to an engine under this id. Returns the leg's headers.
    pub(crate) fn leg<'job>(&self, engine: &EngineView, id: &str, headers: &'job HeaderMap) -> Cow<'job, HeaderMap> {
        let mut headers = Cow::Borrowed(headers);
        let mut state = self.state();
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
            state.leg = Some(trace.leg(name, attributes, headers.to_mut()));
        }
        let engine_id = Some(engine.id.clone());
        match engine.role {
            Role::Prefill => state.prefill = engine_id,
            Role::Decode => state.decode = engine_id,
        }
        if state.engine_id.as_deref() != Some(id) {
            state.engine_id = Some(id.to_owned());
        }
        headers
    }

    /// Records the time of a stage.
    pub(crate) fn observe_stage(&self, stage: TimedStage, time: Duration) {
        let mut state = self.state();
        state.stages[stage as usize] = Some(time);
        if let Some(trace) = &self.trace {
            match stage {
                TimedStage::Prefill => state.leg = None,
                TimedStage::Queue | TimedStage::Handoff => trace.part(stage.as_str(), time),
                TimedStage::DecodeFirstByte => {}
            }
        }
        drop(state);
        self.traffic.observe_stage(stage, time);
    }

    /// Records the time to the first event or whole answer.
    pub(crate) fn observe_first_token(&self, time: Duration) {
        self.traffic.observe_first_token(time);
    }

    /// Records how a hand-off of the request ended.
    pub(crate) fn observe_outcome(&self, outcome: HandoffOutcome) {
        self.state().handoff = Some(outcome);
        self.traffic.count_outcome(outcome);
    }

    /// Records that another attempt begins.
    pub(crate) fn retried(&self) {
        let mut state = self.state();
        state.stages = [None; TimedStage::COUNT];
        state.prefill_parts = None;
        state.retried_after = Some(self.arrived.elapsed());
        state.attempts += 1;
        (state.prefill, state.decode) = (None, None);
        state.leg.take().as_mut().map(traces::fail);
        drop(state);
        self.traffic.count_retry();
    }

    /// Reads the prompt's tokens from the prefill engine's answer, and its times if vLLM runs with
    /// `--enable-per-request-metrics`.
    pub(crate) fn prefill_answered(&self, answer: &[u8]) {
        if let Some(times) = last_object(answer, b"\"metrics\":") {
            self.state().prefill_parts = Some(times);
        }
        if let Some(usage) = self.usage_in(answer) {
            self.state().tokens.prompt_tokens = usage.prompt_tokens;
        }
    }

    /// Reads the usage from a whole answer or events of the decode engine.
    pub(crate) fn decode_answered(&self, bytes: &[u8]) {
        if let Some(usage) = self.usage_in(bytes) {
            self.state().tokens = usage;
        }
    }

    /// The last usage that an engine reports, if the access log or a trace needs it.
    fn usage_in(&self, bytes: &[u8]) -> Option<Usage> {
        (self.log.is_some() || self.trace.is_some()).then(|| last_usage(bytes))?
    }

    /// Marks the answer as a stream.
    pub(crate) fn begin_stream(&self) {
        self.state().is_stream = true;
    }

    /// Records the time between two reads of the stream.
    pub(crate) fn observe_token_gap(&self, time: Duration) {
        self.traffic.observe_token_gap(time);
    }

    /// Records how the stream ended.
    pub(crate) fn stream_ended(&self, end: ClientOutcome) {
        self.state().stream_end = Some(end);
    }

    /// Records that the stream was sent to its end, as answered unless another outcome is known.
    pub(crate) fn stream_closed(&self) {
        self.state().stream_end.get_or_insert(ClientOutcome::Answered);
    }

    /// Records the response and adds its request id and timing headers.
    pub(crate) fn answer(&self, mut response: Response<Body>) -> Response<Body> {
        let mut state = self.state();
        state.status = Some(response.status());
        state.code = response.extensions().get().map(|ErrorCode(code)| *code);
        state.endpoint = response.extensions().get().map(|RouteLabel(endpoint)| *endpoint);
        let engine_id = || state.engine_id.as_deref().and_then(|id| HeaderValue::from_str(id).ok());
        if let Some(id) = self.client_id.clone().or_else(engine_id) {
            response.headers_mut().insert(REQUEST_ID, id);
        }
        if let Some(timing) = state.server_timing(self.arrived.elapsed()) {
            response.headers_mut().insert("server-timing", timing);
        }
        response
    }
}

/// Reports the finished request to the metrics, the trace and the access log.
impl Drop for Record {
    fn drop(&mut self) {
        let mut state = std::mem::take(&mut *self.state());
        let total = self.arrived.elapsed();
        if state.generates {
            self.traffic.observe_end(state.client_outcome(), total);
        }
        if let Some(trace) = &self.trace {
            let has_failed = matches!(state.client_outcome(), ClientOutcome::Failed | ClientOutcome::Broken);
            state.leg.take().as_mut().filter(|_| has_failed).map(traces::fail);
            let name = format!("{} {}", self.method, state.route());
            trace.end(name, has_failed, self.attributes(&state));
        }
        // The access log omits health checks, which have no route label.
        if let (Some(log), true) = (&self.log, state.endpoint.is_some() || state.generates) {
            match serde_json::to_string(&self.line(&state, total)) {
                Ok(line) => log.write_line(line),
                Err(error) => tracing::error!(%error, "cannot format a line of the access log"),
            }
        }
    }
}

/// A line of the access log. Unknown values are left out.
#[derive(Debug, Serialize)]
struct AccessLine<'record> {
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
    /// The client's own request id.
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<&'record str>,
    /// The request id that the engines got.
    #[serde(skip_serializing_if = "Option::is_none")]
    engine_request_id: Option<&'record str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<String>,
}

impl Record {
    fn line<'record>(&'record self, state: &'record RequestState, total: Duration) -> AccessLine<'record> {
        let stage = |stage: TimedStage| state.stages[stage as usize].map(milliseconds);
        let time = jiff::Timestamp::try_from(self.at).unwrap_or_default();
        AccessLine {
            time: format!("{time:.3}"),
            method: self.method.as_str(),
            route: state.route(),
            status: state.status.map(|status| status.as_u16()),
            outcome: state.client_outcome().as_str(),
            code: state.code,
            prefill: state.prefill.as_ref().map(EngineId::as_str),
            decode: state.decode.as_ref().map(EngineId::as_str),
            handoff: state.handoff.map(HandoffOutcome::as_str),
            attempts: state.generates.then_some(state.attempts),
            queue_ms: stage(TimedStage::Queue),
            prefill_ms: stage(TimedStage::Prefill),
            handoff_ms: stage(TimedStage::Handoff),
            first_token_ms: stage(TimedStage::DecodeFirstByte),
            total_ms: milliseconds(total),
            prompt_tokens: state.tokens.prompt_tokens,
            completion_tokens: state.tokens.completion_tokens,
            request_id: self.client_id.as_ref().and_then(|id| id.to_str().ok()),
            engine_request_id: state.engine_id.as_deref(),
            session: state.session.map(|hash| format!("{hash:016x}")),
        }
    }
}

impl Record {
    /// The attributes of the request's span, with the names of OpenTelemetry's conventions if they exist.
    fn attributes(&self, state: &RequestState) -> Vec<KeyValue> {
        let text = |name: &'static str, value: Option<&str>| Some(KeyValue::new(name, value?.to_owned()));
        let number = |name: &'static str, value: Option<u64>| {
            Some(KeyValue::new(name, i64::try_from(value?).unwrap_or(i64::MAX)))
        };
        let client_id = self.client_id.as_ref().and_then(|id| id.to_str().ok());
        let attributes = [
            text("http.request.method", Some(self.method.as_str())),
            text("http.route", state.endpoint),
            number(
                "http.response.status_code",
                state.status.map(|status| status.as_u16().into()),
            ),
            text("error.type", state.code),
            text("xpyd.outcome", Some(state.client_outcome().as_str())),
            text("xpyd.handoff", state.handoff.map(HandoffOutcome::as_str)),
            number("xpyd.attempts", state.generates.then_some(state.attempts.into())),
            text("xpyd.request_id", client_id),
            number("gen_ai.usage.input_tokens", state.tokens.prompt_tokens),
            number("gen_ai.usage.output_tokens", state.tokens.completion_tokens),
        ];
        attributes.into_iter().flatten().collect()
    }
}

/// Milliseconds, rounded to the microsecond.
fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}

/// The last `usage` of an answer or of events.
fn last_usage(bytes: &[u8]) -> Option<Usage> {
    last_object(bytes, b"\"usage\":")
}

/// The last value of this key in an answer or in events. Within a JSON string, the quotes of the key would be
/// escaped.
fn last_object<T: DeserializeOwned>(bytes: &[u8], key: &[u8]) -> Option<T> {
    let place = memmem::rfind(bytes, key)?;
    let value = &bytes[place + key.len()..];
    let mut values = serde_json::Deserializer::from_slice(value).into_iter::<Option<T>>();
    values.next()?.ok()?
}

impl RequestState {
    /// The route is unknown if the client left before its answer began.
    fn route(&self) -> &'static str {
        self.endpoint.unwrap_or("unknown")
    }

    fn client_outcome(&self) -> ClientOutcome {
        match self.status {
            None => ClientOutcome::Left,
            Some(_) if self.is_stream => self.stream_end.unwrap_or(ClientOutcome::Left),
            Some(status) if status.is_success() => ClientOutcome::Answered,
            Some(status) if status.is_server_error() => ClientOutcome::Failed,
            Some(_) => ClientOutcome::Refused,
        }
    }
}

impl RequestState {
    /// The stages in the syntax of W3C's Server Timing, in milliseconds, and the `total` since the request's arrival.
    /// `None` before any stage. A request that did not wait has a queue time of 0. Stages belong to the last attempt;
    /// earlier attempts are `retried`. A part of a stage has the stage's name as a prefix.
    fn server_timing(&self, total: Duration) -> Option<HeaderValue> {
        self.stages.iter().flatten().next()?;
        let mut known: Vec<(&str, f64)> = Vec::new();
        let read = self.body_read_after.unwrap_or_default();
        known.extend(self.body_read_after.map(|time| ("read", milliseconds(time))));
        known.extend(
            self.retried_after
                .map(|time| ("retried", milliseconds(time.saturating_sub(read)))),
        );
        for (stage, name) in SERVER_TIMING_STAGES {
            let default = (stage == TimedStage::Queue).then_some(Duration::ZERO);
            let time = self.stages[stage as usize].or(default);
            known.extend(time.map(|time| (name, milliseconds(time))));
            if let Some(parts) = self.prefill_parts.filter(|_| stage == TimedStage::Prefill) {
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
        let mut state = RequestState::default();
        let total = Duration::from_millis(20);
        assert_eq!(state.server_timing(total), None);
        state.stages[TimedStage::DecodeFirstByte as usize] = Some(Duration::from_micros(1500));
        state.stages[TimedStage::Prefill as usize] = Some(Duration::from_millis(12));
        assert_eq!(
            state.server_timing(total).expect("a header"),
            "queue;dur=0.000, prefill;dur=12.000, first-token;dur=1.500, total;dur=20.000"
        );
        state.retried_after = Some(Duration::from_millis(3));
        state.prefill_parts = last_object(
            br#"{"usage":{},"metrics":{"time_to_first_token_ms":7.5,"queue_time_ms":4.25,"mean_itl_ms":null}}"#,
            b"\"metrics\":",
        );
        assert_eq!(
            state.server_timing(total).expect("a header"),
            "retried;dur=3.000, queue;dur=0.000, prefill;dur=12.000, prefill-queue;dur=4.250, prefill-compute;dur=7.500, \
             first-token;dur=1.500, total;dur=20.000"
        );
    }

    #[test]
    fn the_last_usage_is_found() {
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
    fn the_outcome_follows_from_status_and_stream_end() {
        let client_outcome = |status: Option<u16>, stream: Option<Option<ClientOutcome>>| {
            let state = RequestState {
                status: status.map(|status| StatusCode::from_u16(status).expect("a status")),
                is_stream: stream.is_some(),
                stream_end: stream.flatten(),
                ..RequestState::default()
            };
            state.client_outcome()
        };
        assert_eq!(client_outcome(None, None), ClientOutcome::Left);
        assert_eq!(client_outcome(Some(200), None), ClientOutcome::Answered);
        assert_eq!(client_outcome(Some(404), None), ClientOutcome::Refused);
        assert_eq!(client_outcome(Some(502), None), ClientOutcome::Failed);
        assert_eq!(client_outcome(Some(200), Some(None)), ClientOutcome::Left);
        assert_eq!(
            client_outcome(Some(200), Some(Some(ClientOutcome::Broken))),
            ClientOutcome::Broken
        );
        assert_eq!(
            client_outcome(Some(200), Some(Some(ClientOutcome::Answered))),
            ClientOutcome::Answered
        );
    }
}
