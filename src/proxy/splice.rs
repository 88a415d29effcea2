//! LMCache's reference flow, done right: the prefill engine makes the first token, the decode engine goes on from the
//! prompt plus that token, and the two halves become one coherent answer.
//!
//! Only requests that [`super::rules`] lets through come here, so there is one choice, no logprobs and no stop string.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Response, header};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::answer::verbatim;
use super::error::{Cause, ProxyError, Stage};
use super::flow::{Attempt, Decoded, Prefilled, Stages, new_id, told};
use super::guard::{Guarded, GuardedBody};
use super::ledger::{Consume, Entry};
use super::metrics::Outcome;
use super::rules::{Kind, SpliceRequest, is_token_list};
use super::seats::Seated;
use super::sse::{self, Events};
use super::upstream::{Call, Seat};

/// Both legs use this route, because only it takes token ids.
const PATH: &str = "/v1/completions";

/// The first token and what came with it.
#[derive(Debug, Deserialize)]
struct Answer {
    id: String,
    created: Value,
    model: Value,
    choices: Vec<FirstChoice>,
    usage: Value,
}

#[derive(Debug, Deserialize)]
struct FirstChoice {
    text: String,
    finish_reason: Option<String>,
    #[serde(default)]
    stop_reason: Value,
}

/// What turns the decode engine's events into the client's.
#[derive(Debug)]
pub(super) struct Rewriter {
    shape: Shape,
}

/// What both halves of an answer share.
#[derive(Debug)]
struct Shape {
    kind: Kind,
    id: String,
    created: Value,
    model: Value,
    include_usage: bool,
    /// The prefill engine's own count of cached tokens, which is the one that the client pays for.
    cached: Value,
}

/// What the prefill leg gave.
enum First {
    /// The beginning of an answer.
    Half(Box<Half>),
    /// The whole answer.
    Whole(Response<Body>),
    /// A token that no text can be told of yet.
    Unknown,
}

/// A splice whose first half is done.
struct Half {
    decode: Arc<Seat>,
    id: String,
    /// The prompt's tokens, then the first one of the answer.
    tokens: Vec<u32>,
    /// The first token's text.
    text: String,
    shape: Shape,
    handoff_time: Duration,
}

/// Answers a request by splicing.
pub(super) async fn run(attempt: &mut Attempt<'_>, request: &SpliceRequest) -> Result<Response<Body>, ProxyError> {
    let (prefill, decode) = match attempt.seats().await? {
        Seated::Pair(prefill, decode) => (prefill, decode),
        Seated::Alone(decode, reason) => return attempt.bypass(decode, reason).await,
    };
    let id = new_id();
    let tokens = match tokenize(attempt, &decode, &id).await? {
        Ok(ids) => ids,
        Err(refusal) => return Ok(told(refusal, Outcome::Refused, None)),
    };
    let mut entry = reserve(attempt, &decode, &id, &tokens);
    let first = Box::pin(first_half(
        attempt,
        request,
        prefill,
        (&decode, &id),
        &mut entry,
        tokens,
    ))
    .await;
    let outcome = match first {
        Ok(First::Half(half)) => Box::pin(half.finish(attempt, request.limit, &mut entry)).await,
        Ok(First::Whole(response)) => Ok(response),
        Ok(First::Unknown) => return attempt.bypass(decode, "first_token").await,
        Err(error) => Err(error),
    };
    if let Err(error) = &outcome {
        entry.failed(error);
    }
    outcome
}

/// The prefill leg, and what its answer leaves to do.
async fn first_half(
    attempt: &Attempt<'_>,
    request: &SpliceRequest,
    prefill: Arc<Seat>,
    (decode, id): (&Arc<Seat>, &str),
    entry: &mut Entry,
    mut tokens: Vec<u32>,
) -> Result<First, ProxyError> {
    let body = prefill_body(attempt, decode, id, &tokens);
    let (prefilled, handoff_time) = attempt.deliver(&prefill, decode, entry, id, PATH, body).await?;
    let answer = match prefilled {
        Prefilled::Answer(answer) => answer,
        Prefilled::Refused(response) => {
            entry.close();
            attempt.job.record.handed(Outcome::Refused);
            return Ok(First::Whole(told(response, Outcome::Refused, None)));
        }
    };
    let nonsense = |what| prefill.failed(Stage::Prefill, Cause::Nonsense(what));
    let first: Answer = serde_json::from_slice(&answer).map_err(|_| nonsense("it is no completion"))?;
    let choice = first.choices.first().ok_or_else(|| nonsense("it has no choice"))?;
    tokens.push(entry.first_token().ok_or_else(|| nonsense("it has no first token"))?);
    let shape = Shape::new(attempt.job.kind, &first, request.include_usage);
    if choice.finish_reason.as_deref() == Some("stop") || request.limit == Some(1) {
        // The entry's end makes the decode engine take the KV that nobody will decode from.
        attempt.job.record.handed(Outcome::Transferred);
        let response = shape.alone(&first, choice, request.stream);
        return Ok(First::Whole(attempt.begin(response, Instant::now())));
    }
    if choice.text.is_empty() || choice.text.contains('\u{fffd}') {
        // A special token, or one byte of a character: its text depends on the tokens after it.
        return Ok(First::Unknown);
    }
    Ok(First::Half(Box::new(Half {
        decode: Arc::clone(decode),
        id: id.to_owned(),
        tokens,
        text: choice.text.clone(),
        shape,
        handoff_time,
    })))
}

fn reserve(attempt: &Attempt<'_>, decode: &Arc<Seat>, id: &str, tokens: &[u32]) -> Entry {
    let model = attempt.document.get("model").unwrap_or("null");
    // Any token after the prompt will do to take the prompt's KV.
    let prompt = list(&[tokens, &tokens[..1]].concat());
    let params = attempt.shared.settings.connector.decode_params(id);
    let params = params.as_deref().unwrap_or("null");
    let body = format!(r#"{{"model":{model},"prompt":{prompt},"max_tokens":1,"kv_transfer_params":{params}}}"#);
    attempt.reserve(decode, id, Consume::Completion(body.into()))
}

fn prefill_body(attempt: &Attempt<'_>, decode: &Seat, id: &str, tokens: &[u32]) -> Vec<u8> {
    let connector = &attempt.shared.settings.connector;
    attempt.document.edited(&[
        ("messages", None),
        ("max_completion_tokens", None),
        ("stream_options", None),
        ("prompt", Some(&list(tokens))),
        ("max_tokens", Some("1")),
        ("stream", Some("false")),
        (
            "kv_transfer_params",
            Some(&connector.prefill_params(id, &decode.engine.endpoint)),
        ),
    ])
}

impl Half {
    /// The decode leg: the client's body with the prompt's tokens, the first token, and one token less to generate.
    async fn finish(
        self,
        attempt: &Attempt<'_>,
        limit: Option<u64>,
        entry: &mut Entry,
    ) -> Result<Response<Body>, ProxyError> {
        let limit = limit.map_or_else(|| "null".to_owned(), |limit| (limit - 1).to_string());
        let params = attempt.shared.settings.connector.decode_params(&self.id);
        let body = attempt.document.edited(&[
            ("messages", None),
            ("max_completion_tokens", None),
            ("prompt", Some(&list(&self.tokens))),
            ("max_tokens", Some(&limit)),
            ("kv_transfer_params", params.as_deref()),
        ]);
        let sent = Instant::now();
        entry.send();
        let response = match attempt.decode(&self.decode, &self.id, PATH, body).await? {
            Decoded::Refused(response) => {
                entry.refused();
                return Ok(told(response, Outcome::Refused, None));
            }
            Decoded::Whole(head, body) => {
                entry.consumed();
                let whole = self.shape.whole(&self.text, &body);
                let nonsense = || {
                    self.decode
                        .failed(Stage::Decode, Cause::Nonsense("it is no completion"))
                };
                verbatim(head, whole.ok_or_else(nonsense)?)
            }
            Decoded::Stream(head, body) => {
                let begin = self.shape.first_events(&self.text);
                let guarded = Guarded {
                    seat: self.decode,
                    idle: attempt.job.deadlines.decode,
                    events: Some(Events::default()),
                    rewriter: Some(Rewriter { shape: self.shape }),
                    entry: Some(entry.take()),
                    clock: attempt.clock(),
                };
                let mut response = verbatim(head, Bytes::new());
                *response.body_mut() = Body::new(GuardedBody::new(begin, body, guarded));
                response
            }
        };
        let mut response = attempt.begin(response, sent);
        if let Some(stages) = response.extensions_mut().get_mut::<Stages>() {
            stages.handoff = self.handoff_time;
        }
        Ok(response)
    }
}

/// The prompt's token ids, or the engine's refusal.
async fn tokenize(
    attempt: &Attempt<'_>,
    seat: &Seat,
    id: &str,
) -> Result<Result<Vec<u32>, Response<Body>>, ProxyError> {
    #[derive(Deserialize)]
    struct Tokens {
        tokens: Vec<u32>,
    }
    let field = attempt.job.kind.prompt_field();
    let prompt = attempt.document.get(field).unwrap_or("null");
    if is_token_list(prompt) {
        let ids = serde_json::from_str(prompt);
        return ids
            .map(Ok)
            .map_err(|_| seat.failed(Stage::Tokenize, Cause::Nonsense("a token id is out of range")));
    }
    let model = attempt.document.get("model").unwrap_or("null");
    let body = format!(r#"{{"model":{model},"{field}":{prompt}}}"#);
    let call = Call::post("/tokenize", &attempt.job.headers, id, body.into());
    let step = attempt.shared.upstream.fetch(&seat.engine, call);
    let (head, body) = seat.run(Stage::Tokenize, attempt.job.deadlines.prefill, step).await?;
    if head.status.is_client_error() {
        return Ok(Err(verbatim(head, body)));
    }
    let tokens: Option<Tokens> = serde_json::from_slice(&body).ok();
    match tokens {
        Some(Tokens { tokens }) if head.status.is_success() && !tokens.is_empty() => Ok(Ok(tokens)),
        _ => Err(seat.failed(Stage::Tokenize, Cause::Nonsense("it has no tokens"))),
    }
}

/// Token ids as JSON.
fn list(ids: &[u32]) -> String {
    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
    format!("[{}]", ids.join(","))
}

impl Shape {
    fn new(kind: Kind, first: &Answer, include_usage: bool) -> Self {
        Self {
            kind,
            id: match kind {
                Kind::Completions => first.id.clone(),
                Kind::Chat => first.id.replacen("cmpl-", "chatcmpl-", 1),
            },
            created: first.created.clone(),
            model: first.model.clone(),
            include_usage,
            cached: first.usage["prompt_tokens_details"].clone(),
        }
    }

    /// One event with a piece of text.
    fn chunk(&self, delta: &Value, finish_reason: &Value, stop_reason: &Value) -> String {
        let (object, piece) = match self.kind {
            Kind::Completions => ("text_completion", "text"),
            Kind::Chat => ("chat.completion.chunk", "delta"),
        };
        let choice = json!({"index": 0, piece: delta, "logprobs": null, "finish_reason": finish_reason, "stop_reason": stop_reason});
        self.envelope(object, &json!([choice]), None)
    }

    fn envelope(&self, object: &str, choices: &Value, usage: Option<Value>) -> String {
        let mut event =
            json!({"id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices});
        if self.include_usage || usage.is_some() {
            event["usage"] = usage.unwrap_or_default();
        }
        sse::event(&event.to_string())
    }

    fn text(&self, text: &str) -> Value {
        match self.kind {
            Kind::Completions => json!(text),
            Kind::Chat => json!({"content": text}),
        }
    }

    /// What a stream begins with: the first token, after the role if it is a chat.
    fn first_events(&self, text: &str) -> Bytes {
        let first = self.chunk(&self.text(text), &Value::Null, &Value::Null);
        (self.role() + &first).into()
    }

    /// The event that opens a chat; completions have none.
    fn role(&self) -> String {
        match self.kind {
            Kind::Completions => String::new(),
            Kind::Chat => self.chunk(&json!({"role": "assistant", "content": ""}), &Value::Null, &Value::Null),
        }
    }

    /// The client's usage. The decode engine has counted the first token as part of the prompt.
    fn usage(&self, decoded: &Value) -> Value {
        let mut usage = decoded.clone();
        if let Some(tokens) = decoded["prompt_tokens"].as_u64() {
            usage["prompt_tokens"] = json!(tokens.saturating_sub(1));
        }
        if let Some(tokens) = decoded["completion_tokens"].as_u64() {
            usage["completion_tokens"] = json!(tokens + 1);
        }
        if usage.is_object() {
            usage["prompt_tokens_details"] = self.cached.clone();
        }
        usage
    }

    /// An answer of one choice.
    fn answer(&self, text: &str, finish_reason: &Value, stop_reason: &Value, usage: &Value) -> Value {
        let (object, piece, content) = match self.kind {
            Kind::Completions => ("text_completion", "text", json!(text)),
            Kind::Chat => (
                "chat.completion",
                "message",
                json!({"role": "assistant", "content": text, "refusal": null, "tool_calls": []}),
            ),
        };
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "choices": [{"index": 0, piece: content, "logprobs": null, "finish_reason": finish_reason, "stop_reason": stop_reason}],
            "usage": usage,
        })
    }

    /// The whole answer, from the first token's text and the decode engine's whole answer.
    fn whole(&self, first: &str, decoded: &[u8]) -> Option<Bytes> {
        let decoded: Value = serde_json::from_slice(decoded).ok()?;
        let choice = decoded["choices"].get(0)?;
        let text = format!("{first}{}", choice["text"].as_str()?);
        let usage = self.usage(&decoded["usage"]);
        let answer = self.answer(&text, &choice["finish_reason"], &choice["stop_reason"], &usage);
        Some(answer.to_string().into())
    }

    /// The whole answer where the first token is also the last.
    fn alone(&self, first: &Answer, choice: &FirstChoice, stream: bool) -> Response<Body> {
        let (finish, stop) = (json!(choice.finish_reason), &choice.stop_reason);
        let (content_type, body) = if stream {
            let mut events = String::new();
            events.push_str(&self.role());
            events.push_str(&self.chunk(&self.text(&choice.text), &finish, stop));
            if self.include_usage {
                events.push_str(&self.envelope(self.stream_object(), &json!([]), Some(first.usage.clone())));
            }
            events.push_str(&sse::event("[DONE]"));
            ("text/event-stream; charset=utf-8", events)
        } else {
            let answer = self.answer(&choice.text, &finish, stop, &first.usage);
            ("application/json", answer.to_string())
        };
        let mut response = Response::new(Body::from(body));
        let content_type = header::HeaderValue::from_static(content_type);
        response.headers_mut().insert(header::CONTENT_TYPE, content_type);
        response
    }

    fn stream_object(&self) -> &'static str {
        match self.kind {
            Kind::Completions => "text_completion",
            Kind::Chat => "chat.completion.chunk",
        }
    }
}

impl Rewriter {
    /// Whole events of the decode engine as the client shall see them. What is no completion chunk, such as an error or
    /// the end marker, passes unchanged.
    pub(super) fn rewrite(&mut self, events: &[u8]) -> Bytes {
        let mut out = String::with_capacity(events.len());
        for data in sse::data(events) {
            match serde_json::from_slice::<Value>(data) {
                Ok(chunk) if chunk["choices"].is_array() => out.push_str(&self.rewrite_chunk(&chunk)),
                _ => out.push_str(&sse::event(&String::from_utf8_lossy(data))),
            }
        }
        out.into()
    }

    fn rewrite_chunk(&self, chunk: &Value) -> String {
        let shape = &self.shape;
        match chunk["choices"].get(0) {
            Some(choice) => {
                let text = choice["text"].as_str().unwrap_or_default();
                shape.chunk(&shape.text(text), &choice["finish_reason"], &choice["stop_reason"])
            }
            None => shape.envelope(shape.stream_object(), &json!([]), Some(shape.usage(&chunk["usage"]))),
        }
    }
}
