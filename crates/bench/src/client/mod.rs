//! The HTTP client of the benchmark: sends one streamed request, and everything else that is asked of the server.
//!
//! The clock of a request starts right before its connection is made or, on an idle connection, right before the
//! request is written. The JSON body is ready by then. The kernel timestamps received data, so the client's own work is
//! not part of the latencies.

pub(super) mod alignment;
pub(super) mod engine_counters;
pub(super) mod http;
pub(super) mod models;
mod reader;
mod sse;

use std::future::poll_fn;
use std::io;
use std::time::Duration;

use reqwest::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap};
use reqwest::{Method, StatusCode};
use serde::ser::{Serialize, SerializeMap as _, Serializer};
use serde_json::{Map, Value, json};
use tokio::time::{Instant, timeout};

use self::http::{Address, SentRequest, Server, describe};
use self::reader::{AnswerError, ResponseReader, Scanner, TextPolicy};
use crate::export::python;
use crate::latency_breakdown::engine_metrics::EngineMetrics;
use crate::load::Exchange;
use crate::record::{Answer, ServerTimings};
use crate::workload::WorkItem;
use crate::{Backend, BenchError, Spec};
use xpyd_base::http1::RxTimestamp;

/// Most bytes of an error body that are read.
const MAX_ERROR_BYTES: usize = 1 << 20;
/// Most characters of a server's message in a report.
const MAX_MESSAGE_CHARS: usize = 300;

/// Sends the requests of one run.
#[derive(Debug)]
pub(super) struct Client {
    server: Server,
    /// The request head up to the part that differs between requests.
    head: Vec<u8>,
    template: Vec<(String, Field)>,
    timeout: Duration,
    scanner: Scanner,
}

/// A value in a request's body.
#[derive(Debug)]
enum Field {
    /// The model of the run, unless the request has its own.
    Model(Value),
    Prompt,
    Messages,
    OutputLength,
    Fixed(Value),
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
enum ExchangeError {
    #[error("no connection to the server")]
    Connect(#[source] io::Error),
    #[error("the request did not get through")]
    Send(#[source] io::Error),
    #[error("no answer to the request")]
    NoAnswer(#[source] io::Error),
    #[error("HTTP {status}{}", message.as_deref().map(|message| format!(": {message}")).unwrap_or_default())]
    Status {
        status: StatusCode,
        message: Option<String>,
    },
    #[error("the answer is not an event stream, but {0}")]
    NoStream(String),
    #[error("the answer is encoded (`content-encoding: {0}`), which this client does not decode")]
    Encoded(String),
    #[error("the stream broke off")]
    Stream(#[source] io::Error),
    #[error(transparent)]
    Answer(#[from] AnswerError),
    #[error("the answer was not complete within {} s", .0.as_secs_f64())]
    Timeout(Duration),
}

impl Client {
    pub(super) fn new(spec: &Spec) -> Result<Self, BenchError> {
        let server = Server::new(&spec.base_url, &spec.headers, spec.options.is_insecure)?;
        let texts = if spec.keep_texts || spec.workload.has_turns() {
            TextPolicy::Keep
        } else if spec.options.tokenizer.is_some() {
            TextPolicy::Count
        } else {
            TextPolicy::Drop
        };
        Ok(Self {
            head: server.head(&Method::POST, &spec.endpoint)?,
            server,
            template: template(spec),
            timeout: spec.request_timeout,
            scanner: Scanner::new(texts, spec.backend),
        })
    }

    /// The decoding counters of the server's `/metrics`.
    pub(super) async fn engine_counters(&self) -> engine_counters::Counters {
        engine_counters::read(&self.server).await
    }

    /// The counters of each engine behind the server.
    pub(super) async fn engine_metrics(&self) -> Option<EngineMetrics> {
        EngineMetrics::read(&self.server).await
    }

    /// Sends the request and reads its whole answer.
    pub(super) async fn exchange(&self, item: &WorkItem, request_id: &str) -> Exchange {
        let template = &self.template;
        let body = python::write(&Body { template, item });
        let mut head = self.head.clone();
        http::put_headers(&mut head, &item.headers);
        let rest = format!("x-request-id: {request_id}\r\ncontent-length: {}\r\n\r\n", body.len());
        head.extend_from_slice(rest.as_bytes());
        let started = Instant::now();
        let answer = match timeout(self.timeout, self.answer(&head, &body, started)).await {
            Ok(answer) => answer,
            Err(_) => Err(ExchangeError::Timeout(self.timeout)),
        };
        let result = answer.map_err(|error| xpyd_base::report::one_line(&error));
        Exchange { started, result }
    }

    async fn answer(&self, head: &[u8], body: &[u8], started: Instant) -> Result<Answer, ExchangeError> {
        let sent = self.server.send(head, body, Address::Next).await;
        let SentRequest {
            mut connection,
            connected,
            outcome,
        } = sent.map_err(ExchangeError::Connect)?;
        // A server can reject a request without reading all of it.
        let head = connection.head(&Method::POST).await;
        let head = head.map_err(|error| match outcome {
            Ok(()) => ExchangeError::NoAnswer(describe(error)),
            Err((_, error)) => ExchangeError::Send(describe(error)),
        })?;
        let mut framing = head.framing;
        let status = head.parts.status;
        if !status.is_success() {
            // If the body breaks off, the status alone is reported.
            let body = http::whole(&mut connection, &mut framing, MAX_ERROR_BYTES)
                .await
                .unwrap_or_default();
            self.server.keep(connection, framing, head.keeps_alive);
            // Some servers repeat the status text in the body.
            let message = server_message(&body).filter(|message| status.canonical_reason() != Some(message));
            return Err(ExchangeError::Status { status, message });
        }
        if let Some(encoding) = encoding(&head.parts.headers) {
            return Err(ExchangeError::Encoded(encoding));
        }
        let mut reader = ResponseReader::new(&self.scanner, started);
        while let Some(piece) = poll_fn(|context| connection.poll_body(&mut framing, context)).await {
            let piece = piece.map_err(|error| ExchangeError::Stream(describe(error)))?;
            let timestamp = connection.rx_timestamp().unwrap_or_else(RxTimestamp::now);
            reader.feed(&piece, timestamp)?;
        }
        let mut answer = reader.finish().map_err(|error| match error {
            AnswerError::NoToken if !is_stream(&head.parts.headers) => {
                ExchangeError::NoStream(content_type(&head.parts.headers))
            }
            error => error.into(),
        })?;
        self.server.keep(connection, framing, head.keeps_alive);
        answer.connected = connected;
        answer.timings = ServerTimings {
            engine: answer.timings.engine,
            ..server_timings(&head.parts.headers)
        };
        Ok(answer)
    }
}

/// Whether the content type is an event stream. Some streaming servers do not set it.
fn is_stream(headers: &HeaderMap) -> bool {
    content_type(headers).starts_with("text/event-stream")
}

/// The content type of an answer.
fn content_type(headers: &HeaderMap) -> String {
    let content_type = headers
        .get(CONTENT_TYPE)
        .and_then(|content_type| content_type.to_str().ok());
    content_type.unwrap_or("has no content type").to_owned()
}

/// The content encoding, unless it is `identity`. A server encodes only if the user's own headers ask for it.
fn encoding(headers: &HeaderMap) -> Option<String> {
    let encoding = headers.get(CONTENT_ENCODING)?.to_str().ok()?;
    (encoding != "identity").then(|| encoding.to_owned())
}

/// The fields of the body in the order of vLLM's client. The user's own fields replace those of the same name.
fn template(spec: &Spec) -> Vec<(String, Field)> {
    let mut fields = vec![("model", Field::Model(json!(spec.model)))];
    match spec.backend {
        Backend::Completions => fields.extend([
            ("prompt", Field::Prompt),
            ("repetition_penalty", Field::Fixed(json!(1.0))),
            ("max_tokens", Field::OutputLength),
            ("logprobs", Field::Fixed(json!(spec.options.logprobs))),
        ]),
        Backend::Chat => fields.extend([
            ("messages", Field::Messages),
            ("max_completion_tokens", Field::OutputLength),
        ]),
    }
    fields.push(("stream", Field::Fixed(json!(true))));
    fields.push(("stream_options", Field::Fixed(json!({"include_usage": true}))));
    if spec.ignore_eos {
        fields.push(("ignore_eos", Field::Fixed(json!(true))));
    }
    let own: &Map<String, Value> = &spec.extra_body;
    let standard = fields.into_iter().map(|(name, field)| match own.get(name) {
        Some(value) => (name.to_owned(), Field::Fixed(value.clone())),
        None => (name.to_owned(), field),
    });
    let mut template: Vec<(String, Field)> = standard.collect();
    for (name, value) in own {
        if !template.iter().any(|(present, _)| present == name) {
            template.push((name.clone(), Field::Fixed(value.clone())));
        }
    }
    template
}

/// The serialized body of a request.
struct Body<'a> {
    template: &'a [(String, Field)],
    item: &'a WorkItem,
}

impl Serialize for Body<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut body = serializer.serialize_map(Some(self.template.len()))?;
        for (name, field) in self.template {
            match field {
                Field::Model(model) => match &self.item.model {
                    Some(own) => body.serialize_entry(name, own.as_ref())?,
                    None => body.serialize_entry(name, model)?,
                },
                Field::Prompt => body.serialize_entry(name, &self.item.prompt.as_completion())?,
                Field::Messages => body.serialize_entry(name, &self.item.prompt.as_chat())?,
                Field::OutputLength => body.serialize_entry(name, &self.item.output_length)?,
                Field::Fixed(value) => body.serialize_entry(name, value)?,
            }
        }
        body.end()
    }
}

fn server_timings(headers: &HeaderMap) -> ServerTimings {
    let text = |name: &str| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned)
    };
    ServerTimings {
        handoff: text("x-xpyd-handoff"),
        timing: text("server-timing"),
        engine: None,
    }
}

/// The message in an error body, in the shapes of OpenAI, older vLLM and `FastAPI`; else the body itself if it is text.
pub(super) fn server_message(body: &[u8]) -> Option<String> {
    let text = match serde_json::from_slice::<Value>(body) {
        Ok(value) => {
            let places = [
                &value["error"]["message"],
                &value["error"],
                &value["message"],
                &value["detail"],
            ];
            places.into_iter().find_map(Value::as_str)?.to_owned()
        }
        Err(_) => std::str::from_utf8(body).ok()?.to_owned(),
    };
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let cut = line
        .char_indices()
        .nth(MAX_MESSAGE_CHARS)
        .map(|(end, _)| format!("{}…", &line[..end]));
    (!line.is_empty()).then(|| cut.unwrap_or(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_found_in_every_shape_of_error() {
        let message = |body: &str| server_message(body.as_bytes());
        assert_eq!(message(r#"{"error":{"message":"a\n b"}}"#).unwrap(), "a b");
        assert_eq!(message(r#"{"error":"a"}"#).unwrap(), "a");
        assert_eq!(message(r#"{"object":"error","message":"a"}"#).unwrap(), "a");
        assert_eq!(message(r#"{"detail":"a"}"#).unwrap(), "a");
        assert_eq!(message("Internal Server Error").unwrap(), "Internal Server Error");
        assert_eq!(message("{}").or(message("")), None);
        assert_eq!(
            message(&"x".repeat(1000)).unwrap().chars().count(),
            MAX_MESSAGE_CHARS + 1
        );
    }
}
