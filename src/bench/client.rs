//! One streamed request: its body, the clock readings, and what the answer's events say.
//!
//! Every read is stamped when it is received, before a byte of it is parsed, so that this client's own work is not in the
//! latencies it reports.

use std::time::Duration;

use bytes::Bytes;
use reqwest::Url;
use reqwest::header::{CONTENT_TYPE, HeaderMap};
use serde::Deserialize;
use serde::ser::{Serialize, SerializeMap as _, Serializer};
use serde_json::{Map, Value, json};
use tokio::time::{Instant, timeout};

use super::engine_counters;
use super::load::Exchange;
use super::record::{Answer, EngineTimes, Told};
use super::sse::{Decoder, EventTooLarge};
use super::workload::Order;
use super::{Backend, BenchError, CONNECT_TIMEOUT, Spec};

/// The most bytes of one event. A token with log-probabilities is a few kilobytes.
const MAX_EVENT_BYTES: usize = 1 << 20;
/// The most bytes that are read of a body which is not a stream.
const MAX_BODY_BYTES: usize = 1 << 20;
/// The most characters of a server's message in a report.
const MAX_MESSAGE_CHARS: usize = 300;

/// Sends the requests of one run.
#[derive(Debug)]
pub(super) struct Client {
    http: reqwest::Client,
    url: Url,
    template: Vec<(String, Field)>,
    timeout: Duration,
    keep_text: bool,
}

/// A value in a request's body.
#[derive(Debug)]
enum Field {
    Prompt,
    Messages,
    OutputLength,
    Fixed(Value),
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
enum ExchangeError {
    #[error("the request did not get through")]
    Send(#[source] reqwest::Error),
    #[error("HTTP {status}{}", message.as_deref().map(|message| format!(": {message}")).unwrap_or_default())]
    Status {
        status: reqwest::StatusCode,
        message: Option<String>,
    },
    #[error("the stream broke off")]
    Stream(#[source] reqwest::Error),
    #[error("the server failed during the stream: {0}")]
    Server(String),
    #[error("the stream holds what is no completion chunk")]
    Malformed(#[source] serde_json::Error),
    #[error("the stream holds what is no completion chunk")]
    TooLarge(#[from] EventTooLarge),
    #[error("the stream ended without a token")]
    NoToken,
    #[error("the stream ended early, without `[DONE]`")]
    Unfinished,
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

/// The beginning of a body.
pub(super) async fn bounded_body(mut response: reqwest::Response) -> Result<Vec<u8>, reqwest::Error> {
    let mut body = Vec::new();
    while let Some(bytes) = response.chunk().await? {
        body.extend_from_slice(&bytes);
        if body.len() > MAX_BODY_BYTES {
            break;
        }
    }
    Ok(body)
}

impl Client {
    pub(super) fn new(spec: &Spec) -> Result<Self, BenchError> {
        Ok(Self {
            http: http(&spec.headers)?,
            url: url(&spec.base_url, &spec.endpoint)?,
            template: template(spec),
            timeout: spec.request_timeout,
            keep_text: spec.keep_texts,
        })
    }

    /// What the server's `/metrics` says of decoding.
    pub(super) async fn engine_counters(&self, base_url: &str) -> engine_counters::Counters {
        engine_counters::read(&self.http, base_url).await
    }

    /// Makes the request and reads its whole answer.
    pub(super) async fn exchange(&self, order: &Order, request_id: &str) -> Exchange {
        let template = &self.template;
        let body = serde_json::to_vec(&Body { template, order }).expect("prompts and JSON values are JSON");
        let request = self
            .http
            .post(self.url.clone())
            .header(CONTENT_TYPE, "application/json")
            .header("x-request-id", request_id)
            .headers(order.headers.clone())
            .body(Bytes::from(body));
        let started = Instant::now();
        let answer = match timeout(self.timeout, self.read(request, started)).await {
            Ok(answer) => answer,
            Err(_) => Err(ExchangeError::Timeout(self.timeout)),
        };
        let result = answer.map_err(|error| crate::report::one_line(&error));
        Exchange { started, result }
    }

    async fn read(&self, request: reqwest::RequestBuilder, started: Instant) -> Result<Answer, ExchangeError> {
        let mut response = request
            .send()
            .await
            .map_err(|error| ExchangeError::Send(error.without_url()))?;
        let status = response.status();
        if !status.is_success() {
            let body = bounded_body(response).await.unwrap_or_default();
            return Err(ExchangeError::Status {
                status,
                message: server_message(&body),
            });
        }
        let mut reader = Reader {
            keep_text: self.keep_text,
            ..Reader::default()
        };
        reader.answer.told = told(response.headers());
        let mut decoder = Decoder::new(MAX_EVENT_BYTES);
        while let Some(bytes) = response
            .chunk()
            .await
            .map_err(|error| ExchangeError::Stream(error.without_url()))?
        {
            let received = started.elapsed();
            let mut outcome = Ok(());
            decoder.feed(&bytes, |event| {
                if outcome.is_ok() {
                    outcome = reader.take(event, received);
                }
            })?;
            outcome?;
        }
        let received = started.elapsed();
        let mut outcome = Ok(());
        decoder.finish(|event| outcome = reader.take(event, received))?;
        outcome?;
        reader.finish()
    }
}

/// The body's fields in the order of vLLM's client. The user's own fields replace those of the same name.
fn template(spec: &Spec) -> Vec<(String, Field)> {
    let mut fields = vec![("model", Field::Fixed(json!(spec.model)))];
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
                Field::Prompt => body.serialize_entry(name, &self.order.prompt.as_completion())?,
                Field::Messages => body.serialize_entry(name, &self.order.prompt.as_chat())?,
                Field::OutputLength => body.serialize_entry(name, &self.order.output_length)?,
                Field::Fixed(value) => body.serialize_entry(name, value)?,
            }
        }
        body.end()
    }
}

/// Follows the events of one answer.
#[derive(Debug, Default)]
struct Reader {
    answer: Answer,
    has_token: bool,
    is_done: bool,
    keep_text: bool,
}

/// The parts of a completion chunk that count, of both routes.
#[derive(Debug, Deserialize)]
struct Chunk {
    choices: Option<Vec<Choice>>,
    usage: Option<Usage>,
    metrics: Option<EngineMetrics>,
    error: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
}

#[derive(Debug, Deserialize)]
struct Delta {
    content: Option<String>,
}

/// vLLM's `PerRequestMetrics`, in milliseconds. Its time to the first token begins where the queue ends.
#[derive(Debug, Deserialize)]
struct EngineMetrics {
    queue_time_ms: Option<f64>,
    time_to_first_token_ms: Option<f64>,
}

impl EngineMetrics {
    fn times(&self) -> Option<EngineTimes> {
        let duration = |milliseconds: Option<f64>| Duration::try_from_secs_f64(milliseconds? / 1000.0).ok();
        Some(EngineTimes {
            queue: duration(self.queue_time_ms)?,
            first_token: duration(self.time_to_first_token_ms)?,
        })
    }
}

#[derive(Debug, Deserialize)]
struct Usage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
}

impl Reader {
    /// Takes one event. A chunk with a choice counts as a token even when its text is empty, as in vLLM: a special token
    /// has none, and so has the chunk of a chat that names the role.
    fn take(&mut self, event: &[u8], received: Duration) -> Result<(), ExchangeError> {
        if event == b"[DONE]" {
            self.is_done = true;
            return Ok(());
        }
        let chunk: Chunk = serde_json::from_slice(event).map_err(ExchangeError::Malformed)?;
        if chunk.error.is_some_and(|error| !error.is_null()) {
            let message = server_message(event).unwrap_or_else(|| "no message".to_owned());
            return Err(ExchangeError::Server(message));
        }
        if let Some(choice) = chunk.choices.into_iter().flatten().next() {
            if self.has_token {
                self.answer.gaps.push(received.saturating_sub(self.answer.latency));
            } else {
                self.answer.first_token = received;
                self.has_token = true;
            }
            self.answer.latency = received;
            let text = choice.text.or(choice.delta.and_then(|delta| delta.content));
            if let Some(text) = text.filter(|_| self.keep_text) {
                self.answer.text.push_str(&text);
            }
        }
        if let Some(metrics) = chunk.metrics {
            self.answer.told.engine = metrics.times();
        }
        if let Some(usage) = chunk.usage {
            self.answer.prompt_tokens = usage.prompt_tokens;
            self.answer.completion_tokens = usage.completion_tokens;
        }
        Ok(())
    }

    fn finish(self) -> Result<Answer, ExchangeError> {
        if !self.has_token {
            Err(ExchangeError::NoToken)
        } else if !self.is_done {
            Err(ExchangeError::Unfinished)
        } else {
            Ok(self.answer)
        }
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
fn server_message(body: &[u8]) -> Option<String> {
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
    (!line.is_empty()).then(|| line.chars().take(MAX_MESSAGE_CHARS).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(events: &[(&str, u64)]) -> Result<Answer, String> {
        let mut reader = Reader {
            keep_text: true,
            ..Reader::default()
        };
        let outcome = events
            .iter()
            .try_for_each(|(event, milliseconds)| reader.take(event.as_bytes(), Duration::from_millis(*milliseconds)));
        outcome
            .and_then(|()| reader.finish())
            .map_err(|error| crate::report::one_line(&error))
    }

    #[test]
    fn latencies_end_at_the_last_chunk_with_a_choice() {
        let answer = read(&[
            (r#"{"choices":[{"text":"a"}]}"#, 100),
            (r#"{"choices":[{"text":""}],"usage":null}"#, 110),
            (r#"{"choices":[{"text":"b","finish_reason":"length"}]}"#, 125),
            (
                r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5}}"#,
                500,
            ),
            ("[DONE]", 600),
        ]);
        let milliseconds = Duration::from_millis;
        let expected = Answer {
            first_token: milliseconds(100),
            gaps: vec![milliseconds(10), milliseconds(15)],
            latency: milliseconds(125),
            prompt_tokens: Some(7),
            completion_tokens: Some(5),
            text: "ab".to_owned(),
            told: Told::default(),
        };
        assert_eq!(answer, Ok(expected));
    }

    #[test]
    fn the_role_chunk_of_a_chat_is_its_first_token_as_in_vllm() {
        let answer = read(&[
            (r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#, 9),
            (r#"{"choices":[{"delta":{"content":"hi"}}]}"#, 20),
            ("[DONE]", 20),
        ]);
        let answer = answer.unwrap();
        assert_eq!(
            (answer.first_token.as_millis(), answer.gaps.len(), answer.text.as_str()),
            (9, 1, "hi")
        );
    }

    #[test]
    fn a_stream_that_does_not_hold_a_whole_answer_fails_with_the_reason() {
        let token = (r#"{"choices":[{"text":"a"}]}"#, 1);
        assert_eq!(read(&[("[DONE]", 1)]).unwrap_err(), "the stream ended without a token");
        assert_eq!(read(&[token]).unwrap_err(), "the stream ended early, without `[DONE]`");
        let error = (r#"{"error":{"message":"decoder1 died","code":502}}"#, 2);
        assert_eq!(
            read(&[token, error]).unwrap_err(),
            "the server failed during the stream: decoder1 died"
        );
        assert!(
            read(&[("{", 1)])
                .unwrap_err()
                .starts_with("the stream holds what is no completion chunk: ")
        );
    }

    #[test]
    fn messages_are_found_in_every_shape_of_error() {
        let message = |body: &str| server_message(body.as_bytes());
        assert_eq!(message(r#"{"error":{"message":"a\n b"}}"#).unwrap(), "a b");
        assert_eq!(message(r#"{"error":"a"}"#).unwrap(), "a");
        assert_eq!(message(r#"{"object":"error","message":"a"}"#).unwrap(), "a");
        assert_eq!(message(r#"{"detail":"a"}"#).unwrap(), "a");
        assert_eq!(message("Internal Server Error").unwrap(), "Internal Server Error");
        assert_eq!(message("{}").or(message("")), None);
        assert_eq!(message(&"x".repeat(1000)).unwrap().len(), MAX_MESSAGE_CHARS);
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
