//! One streamed request: its body, its connection, and the clock at its start.
//!
//! It begins right before a connection is made or, where one is idle, right before the request is written; the JSON of a long
//! prompt has been made by then. What comes is stamped by the kernel, so this client's own work is not in the latencies that
//! it reports.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use reqwest::header::{
    ACCEPT, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap, HeaderName, TRANSFER_ENCODING, USER_AGENT,
};
use reqwest::{Method, StatusCode, Url};
use serde::ser::{Serialize, SerializeMap as _, Serializer};
use serde_json::{Map, Value, json};
use tokio::net::lookup_host;
use tokio::sync::OnceCell;
use tokio::time::{Instant, timeout};

use super::attribution::pages::Page;
use super::engine_counters;
use super::export::python;
use super::load::Exchange;
use super::reader::{AnswerError, Reader, Scanner};
use super::record::{Answer, Told};
use super::workload::Order;
use super::{Backend, BenchError, CONNECT_TIMEOUT, Spec};
use crate::wire::{Framing, Pool, Receipt, Wire};

/// The most bytes that are read of a body which is not a stream.
pub(super) const MAX_BODY_BYTES: usize = 1 << 20;
/// The most characters of a server's message in a report.
const MAX_MESSAGE_CHARS: usize = 300;

/// Most idle connections of one thread. As many as a burst has left: each may be wanted again by the next one.
const MAX_IDLE: usize = 1 << 16;

/// Sends the requests of one run.
#[derive(Debug)]
pub(super) struct Client {
    /// For whatever is no request of the workload.
    http: reqwest::Client,
    host: String,
    port: u16,
    /// Where the server is, once a request has asked. vLLM's client keeps the answer as well.
    addresses: OnceCell<Vec<SocketAddr>>,
    /// The head of every request, up to what differs.
    head: Vec<u8>,
    /// Idle connections, by the runtime that they belong to.
    pool: Pool<tokio::runtime::Id>,
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
    #[error("the stream broke off")]
    Stream(#[source] io::Error),
    #[error(transparent)]
    Answer(#[from] AnswerError),
    #[error("no whole answer within {} s", .0.as_secs_f64())]
    Timeout(Duration),
}

/// A client that reaches servers directly, as nothing between may shape what is measured.
pub(super) fn http(headers: &HeaderMap) -> Result<reqwest::Client, BenchError> {
    reqwest::Client::builder()
        .no_proxy()
        .tcp_nodelay(true)
        .http1_only()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(CONNECT_TIMEOUT)
        .default_headers(headers.clone())
        .user_agent(concat!("xpyd/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(BenchError::Client)
}

/// `base_url` followed by `path`.
pub(super) fn url(base_url: &str, path: &str) -> Result<Url, BenchError> {
    let url = Url::parse(&format!("{}{path}", base_url.trim_end_matches('/')));
    let usable = url.ok().filter(|url| url.scheme() == "http" && url.has_host());
    usable.ok_or_else(|| BenchError::BaseUrl(base_url.to_owned()))
}

/// The beginning of a body: more than `limit` bytes only if there are more in it.
pub(super) async fn bounded_body(mut response: reqwest::Response, limit: usize) -> Result<Vec<u8>, reqwest::Error> {
    let mut body = Vec::new();
    while let Some(bytes) = response.chunk().await? {
        body.extend_from_slice(&bytes);
        if body.len() > limit {
            break;
        }
    }
    Ok(body)
}

impl Client {
    pub(super) fn new(spec: &Spec) -> Result<Self, BenchError> {
        let url = url(&spec.base_url, &spec.endpoint)?;
        let host = url.host_str().unwrap_or_default();
        Ok(Self {
            http: http(&spec.headers)?,
            host: host.trim_matches(['[', ']']).to_owned(),
            port: url.port_or_known_default().unwrap_or(80),
            addresses: OnceCell::new(),
            head: head(&url, &spec.headers),
            pool: Pool::new(MAX_IDLE),
            template: template(spec),
            timeout: spec.request_timeout,
            scanner: Scanner::new(spec.keep_texts || spec.workload.has_turns()),
        })
    }

    /// What the server's `/metrics` says of decoding.
    pub(super) async fn engine_counters(&self, base_url: &str) -> engine_counters::Counters {
        engine_counters::read(&self.http, base_url).await
    }

    /// What the engines behind the server count, each for itself.
    pub(super) async fn engine_page(&self, base_url: &str) -> Option<Page> {
        Page::read(&self.http, base_url).await
    }

    /// Makes the request and reads its whole answer.
    pub(super) async fn exchange(&self, order: &Order, request_id: &str) -> Exchange {
        let template = &self.template;
        let body = python::write(&Body { template, order });
        let mut head = self.head.clone();
        put_headers(&mut head, &order.headers);
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
        let home = tokio::runtime::Handle::current().id();
        let (mut wire, connected, sent) = loop {
            let idle = self.pool.take(&home);
            let is_new = idle.is_none();
            let mut wire = match idle {
                Some(wire) => wire,
                None => self.connect().await.map_err(ExchangeError::Connect)?,
            };
            let connected = if is_new { started.elapsed() } else { Duration::ZERO };
            match wire.send(head, body).await {
                // It closed the very moment that it was taken.
                Err((0, _)) if !is_new => {}
                sent => break (wire, connected, sent),
            }
        };
        // A server that refuses a request may say so without reading it to the end.
        let head = wire.head(&Method::POST).await;
        let head = head.map_err(|error| match sent {
            Ok(()) => ExchangeError::NoAnswer(said(error)),
            Err((_, error)) => ExchangeError::Send(said(error)),
        })?;
        let mut framing = head.framing;
        let status = head.parts.status;
        if !status.is_success() {
            let body = whole(&mut wire, &mut framing).await;
            self.keep(home, wire, framing, head.keeps_alive);
            // Some say in the body what the status says already.
            let message = server_message(&body).filter(|message| status.canonical_reason() != Some(message));
            return Err(ExchangeError::Status { status, message });
        }
        let mut reader = Reader::new(&self.scanner, started);
        while let Some(piece) = poll_fn(|context| wire.poll_body(&mut framing, context)).await {
            let piece = piece.map_err(|error| ExchangeError::Stream(said(error)))?;
            let receipt = wire.receipt().unwrap_or_else(Receipt::now);
            reader.feed(&piece, receipt)?;
        }
        let mut answer = reader.finish().map_err(|error| match error {
            AnswerError::NoToken if !is_stream(&head.parts.headers) => {
                ExchangeError::NoStream(kind(&head.parts.headers))
            }
            error => error.into(),
        })?;
        self.keep(home, wire, framing, head.keeps_alive);
        answer.connected = connected;
        answer.told = Told {
            engine: answer.told.engine,
            ..told(&head.parts.headers)
        };
        Ok(answer)
    }

    async fn connect(&self) -> io::Result<Wire> {
        let connect = async {
            let resolve =
                || async { Ok::<_, io::Error>(lookup_host((self.host.as_str(), self.port)).await?.collect()) };
            let addresses: &Vec<SocketAddr> = self.addresses.get_or_try_init(resolve).await?;
            Wire::connect(addresses.as_slice()).await
        };
        let wire = timeout(CONNECT_TIMEOUT, connect).await;
        Ok(wire.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?.timed())
    }

    /// Keeps a connection for another request, if its answer has been read to the end.
    fn keep(&self, home: tokio::runtime::Id, wire: Wire, framing: Framing, keeps_alive: bool) {
        if keeps_alive && framing == Framing::Ended {
            self.pool.keep(home, wire);
        }
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

/// An error of a connection, in words for those that the system has none for.
fn said(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        io::Error::new(error.kind(), "the server closed the connection")
    } else {
        error
    }
}

/// The beginning of a body which is not a stream. What breaks off is shown as far as it came.
async fn whole(wire: &mut Wire, framing: &mut Framing) -> Vec<u8> {
    let mut body = Vec::new();
    while body.len() <= MAX_BODY_BYTES
        && let Some(Ok(piece)) = poll_fn(|context| wire.poll_body(framing, context)).await
    {
        body.extend_from_slice(&piece);
    }
    body
}

/// The head of every request, without its id, its length and its end.
fn head(url: &Url, headers: &HeaderMap) -> Vec<u8> {
    let mut head = Vec::new();
    let mut line = |parts: &[&[u8]]| {
        for part in parts.iter().chain(&[&b"\r\n"[..]]) {
            head.extend_from_slice(part);
        }
    };
    let query = url.query().map(|query| format!("?{query}")).unwrap_or_default();
    line(&[b"POST ", url.path().as_bytes(), query.as_bytes(), b" HTTP/1.1"]);
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    line(&[
        b"host: ",
        url.host_str().unwrap_or_default().as_bytes(),
        port.as_bytes(),
    ]);
    line(&[b"content-type: application/json"]);
    for (name, value) in [
        (ACCEPT, "*/*"),
        (USER_AGENT, concat!("xpyd/", env!("CARGO_PKG_VERSION"))),
    ] {
        if !headers.contains_key(&name) {
            line(&[name.as_str().as_bytes(), b": ", value.as_bytes()]);
        }
    }
    put_headers(&mut head, headers);
    head
}

/// Adds headers, but those that are this client's own.
fn put_headers(head: &mut Vec<u8>, headers: &HeaderMap) {
    let ours = [HOST, CONTENT_TYPE, CONTENT_LENGTH, TRANSFER_ENCODING, CONNECTION];
    let is_own = |name: &HeaderName| ours.contains(name) || name == "x-request-id";
    for (name, value) in headers.iter().filter(|(name, _)| !is_own(name)) {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            head.extend_from_slice(part);
        }
    }
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

    #[test]
    fn a_base_url_is_joined_with_the_path_or_refused() {
        assert_eq!(
            url("http://h:1/", "/v1/models").unwrap().as_str(),
            "http://h:1/v1/models"
        );
        for refused in ["h:1", "https://h:1", "unix:/run/x", ""] {
            assert!(matches!(url(refused, "/"), Err(BenchError::BaseUrl(_))), "{refused}");
        }
    }
}
