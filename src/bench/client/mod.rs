//! One streamed request: its body, its connection, and the clock at its start.
//!
//! It begins right before a connection is made or, where one is idle, right before the request is written; the JSON of a long
//! prompt has been made by then. What comes is stamped by the kernel, so this client's own work is not in the latencies that
//! it reports.

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

use self::http::{Address, Sent, Server, said};
use self::reader::{AnswerError, Reader, Scanner, Texts};
use crate::bench::export::python;
use crate::bench::latency_breakdown::engine_pages::Page;
use crate::bench::load::Exchange;
use crate::bench::record::{Answer, Told};
use crate::bench::workload::Order;
use crate::bench::{Backend, BenchError, Spec};
use crate::wire::RxTimestamp;

/// The most bytes that are read of an error.
const MAX_ERROR_BYTES: usize = 1 << 20;
/// The most characters of a server's message in a report.
const MAX_MESSAGE_CHARS: usize = 300;

/// Sends the requests of one run.
#[derive(Debug)]
pub(super) struct Client {
    server: Server,
    /// The head of every request, up to what differs.
    head: Vec<u8>,
    template: Vec<(String, Field)>,
    timeout: Duration,
    scanner: Scanner,
}

/// A value in a request's body.
#[derive(Debug)]
enum Field {
    /// The run's model, unless a request has its own.
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
    #[error("the answer is no stream, but {0}")]
    NoStream(String),
    #[error("the answer is encoded (`content-encoding: {0}`), and this client reads plain ones only")]
    Encoded(String),
    #[error("the stream broke off")]
    Stream(#[source] io::Error),
    #[error(transparent)]
    Answer(#[from] AnswerError),
    #[error("no whole answer within {} s", .0.as_secs_f64())]
    Timeout(Duration),
}

impl Client {
    pub(super) fn new(spec: &Spec) -> Result<Self, BenchError> {
        let server = Server::new(&spec.base_url, &spec.headers, spec.options.is_insecure)?;
        let texts = if spec.keep_texts || spec.workload.has_turns() {
            Texts::Keep
        } else if spec.options.tokenizer.is_some() {
            Texts::Count
        } else {
            Texts::Drop
        };
        Ok(Self {
            head: server.head(&Method::POST, &spec.endpoint)?,
            server,
            template: template(spec),
            timeout: spec.request_timeout,
            scanner: Scanner::new(texts, spec.backend),
        })
    }

    /// What the server's `/metrics` says of decoding.
    pub(super) async fn engine_counters(&self) -> engine_counters::Counters {
        engine_counters::read(&self.server).await
    }

    /// What the engines behind the server count, each for itself.
    pub(super) async fn engine_page(&self) -> Option<Page> {
        Page::read(&self.server).await
    }

    /// Makes the request and reads its whole answer.
    pub(super) async fn exchange(&self, order: &Order, request_id: &str) -> Exchange {
        let template = &self.template;
        let body = python::write(&Body { template, order });
        let mut head = self.head.clone();
        http::put_headers(&mut head, &order.headers);
        let rest = format!("x-request-id: {request_id}\r\ncontent-length: {}\r\n\r\n", body.len());
        head.extend_from_slice(rest.as_bytes());
        let started = Instant::now();
        let answer = match timeout(self.timeout, self.answer(&head, &body, started)).await {
            Ok(answer) => answer,
            Err(_) => Err(ExchangeError::Timeout(self.timeout)),
        };
        let result = answer.map_err(|error| crate::report::one_line(&error));
        Exchange { started, result }
    }

    async fn answer(&self, head: &[u8], body: &[u8], started: Instant) -> Result<Answer, ExchangeError> {
        let sent = self.server.send(head, body, Address::Next).await;
        let Sent {
            mut wire,
            connected,
            outcome,
        } = sent.map_err(ExchangeError::Connect)?;
        // A server that refuses a request may say so without reading it to the end.
        let head = wire.head(&Method::POST).await;
        let head = head.map_err(|error| match outcome {
            Ok(()) => ExchangeError::NoAnswer(said(error)),
            Err((_, error)) => ExchangeError::Send(said(error)),
        })?;
        let mut framing = head.framing;
        let status = head.parts.status;
        if !status.is_success() {
            // What breaks off is shown by its status alone.
            let body = http::whole(&mut wire, &mut framing, MAX_ERROR_BYTES)
                .await
                .unwrap_or_default();
            self.server.keep(wire, framing, head.keeps_alive);
            // Some say in the body what the status says already.
            let message = server_message(&body).filter(|message| status.canonical_reason() != Some(message));
            return Err(ExchangeError::Status { status, message });
        }
        if let Some(encoding) = encoding(&head.parts.headers) {
            return Err(ExchangeError::Encoded(encoding));
        }
        let mut reader = Reader::new(&self.scanner, started);
        while let Some(piece) = poll_fn(|context| wire.poll_body(&mut framing, context)).await {
            let piece = piece.map_err(|error| ExchangeError::Stream(said(error)))?;
            let timestamp = wire.rx_timestamp().unwrap_or_else(RxTimestamp::now);
            reader.feed(&piece, timestamp)?;
        }
        let mut answer = reader.finish().map_err(|error| match error {
            AnswerError::NoToken if !is_stream(&head.parts.headers) => {
                ExchangeError::NoStream(kind(&head.parts.headers))
            }
            error => error.into(),
        })?;
        self.server.keep(wire, framing, head.keeps_alive);
        answer.connected = connected;
        answer.told = Told {
            engine: answer.told.engine,
            ..told(&head.parts.headers)
        };
        Ok(answer)
    }
}

/// Whether an answer calls itself a stream of events. Not every server that streams says so.
fn is_stream(headers: &HeaderMap) -> bool {
    kind(headers).starts_with("text/event-stream")
}

/// The type of an answer's content.
fn kind(headers: &HeaderMap) -> String {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    kind.unwrap_or("without a type").to_owned()
}

/// How an answer is encoded, if it is. Only a client's own header asks for it.
fn encoding(headers: &HeaderMap) -> Option<String> {
    let encoding = headers.get(CONTENT_ENCODING)?.to_str().ok()?;
    (encoding != "identity").then(|| encoding.to_owned())
}

/// The body's fields in the order of vLLM's client. The user's own fields replace those of the same name.
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

/// A request's body as it is written.
struct Body<'a> {
    template: &'a [(String, Field)],
    order: &'a Order,
}

impl Serialize for Body<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut body = serializer.serialize_map(Some(self.template.len()))?;
        for (name, field) in self.template {
            match field {
                Field::Model(model) => match &self.order.model {
                    Some(own) => body.serialize_entry(name, own.as_ref())?,
                    None => body.serialize_entry(name, model)?,
                },
                Field::Prompt => body.serialize_entry(name, &self.order.prompt.as_completion())?,
                Field::Messages => body.serialize_entry(name, &self.order.prompt.as_chat())?,
                Field::OutputLength => body.serialize_entry(name, &self.order.output_length)?,
                Field::Fixed(value) => body.serialize_entry(name, value)?,
            }
        }
        body.end()
    }
}

fn told(headers: &HeaderMap) -> Told {
    let text = |name: &str| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned)
    };
    Told {
        handoff: text("x-xpyd-handoff"),
        timing: text("server-timing"),
        engine: None,
    }
}

/// The message in an error's body, in the shapes of OpenAI, of older vLLM and of `FastAPI`; else the body itself if it is a
/// short text.
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
