//! LMCache's reference flow, done right: the prefill engine makes the first token, the decode engine goes on from the
//! prompt plus that token, and the two halves become one coherent answer, byte for byte that of one engine.
//!
//! Only requests that [`super::rules`] lets through come here, so there is one choice, no logprobs and no stop string.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Response, header};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::time::Instant;

use super::answer::verbatim;
use super::body::{Document, Edit, Step, edit_at};
use super::error::{Cause, ProxyError, Stage};
use super::flow::{Attempt, Decoded, Prefilled, Stages, new_id};
use super::guard::{Guarded, GuardedBody};
use super::ledger::{Consume, Entry, one_token_edits};
use super::metrics::Outcome;
use super::rules::{Kind, SpliceRequest, is_token_list};
use super::seats::Seated;
use super::sse::{self, Events};
use super::upstream::{Call, Seat};
use super::usage::PrefillUsage;

/// The prefill engine's answer: the first token and what came with it.
#[derive(Debug, Deserialize)]
struct Answer<'answer> {
    #[serde(borrow)]
    id: &'answer RawValue,
    #[serde(borrow)]
    created: &'answer RawValue,
    #[serde(borrow)]
    model: &'answer RawValue,
    choices: Vec<FirstChoice>,
    #[serde(default)]
    usage: Value,
    #[serde(borrow)]
    system_fingerprint: Option<&'answer RawValue>,
}

#[derive(Debug, Deserialize)]
struct FirstChoice {
    text: Option<String>,
    message: Option<FirstMessage>,
    finish_reason: Option<String>,
    #[serde(default)]
    stop_reason: Value,
}

#[derive(Debug, Deserialize)]
struct FirstMessage {
    content: Option<String>,
    reasoning: Option<Value>,
    tool_calls: Option<Vec<Value>>,
}

impl FirstChoice {
    /// The first token's text, unless a parser of the engine has taken it for something else.
    fn text(self) -> Option<String> {
        match self.message {
            None => self.text,
            Some(message) => {
                let is_plain = message.reasoning.is_none() && message.tool_calls.is_none_or(|calls| calls.is_empty());
                message.content.filter(|_| is_plain)
            }
        }
    }
}

/// What turns the decode engine's answer into the client's.
#[derive(Debug)]
pub(super) struct Rewriter {
    kind: Kind,
    /// JSON texts that all parts of an answer share.
    id: String,
    created: String,
    model: String,
}

/// What the prefill leg gave.
enum First {
    /// The beginning of an answer.
    Half(Box<Half>),
    /// The whole answer.
    Whole(Response<Body>),
    /// A token that no text can be told of yet.
    Unknown,
    /// A refusal, in words that may be about the leg.
    Refused,
}

/// A splice whose first half is done.
struct Half {
    decode: Arc<Seat>,
    id: String,
    /// The prompt's tokens, then the first one of the answer.
    tokens: Vec<u32>,
    /// The first token's text.
    text: String,
    rewriter: Rewriter,
    usage: PrefillUsage,
    handoff_time: Duration,
}

/// Answers a request by splicing.
pub(super) async fn run(attempt: &mut Attempt<'_>, request: &SpliceRequest) -> Result<Response<Body>, ProxyError> {
    let (prefill, decode) = match attempt.seats().await? {
        Seated::Pair(prefill, decode) => (prefill, decode),
        Seated::Alone(decode, reason) => return attempt.bypass(decode, reason).await,
    };
    let id = new_id();
    let Some(tokens) = tokenize(attempt, &decode, &id).await? else {
        decode.held().inspect(|held| held.consumed());
        return attempt.bypass(decode, "tokenize_refused").await;
    };
    let mut entry = reserve(attempt, &decode, &id, &tokens);
    let seats = (&decode, id.as_str());
    let first = Box::pin(first_half(attempt, request, prefill, seats, &mut entry, tokens)).await;
    let outcome = match first {
        Ok(First::Half(half)) => Box::pin(half.finish(attempt, request.limit, &mut entry)).await,
        Ok(First::Whole(response)) => Ok(Some(response)),
        Ok(First::Unknown) => return attempt.bypass(decode, "first_token").await,
        Ok(First::Refused) => return attempt.refused(entry, decode).await,
        Err(error) => Err(error),
    };
    match outcome {
        Ok(Some(response)) => Ok(response),
        Ok(None) => {
            // Makes the decode engine take the KV.
            drop(entry);
            attempt.bypass(decode, "decode_refused").await
        }
        Err(error) => {
            entry.failed(&error);
            Err(error)
        }
    }
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
    let kind = attempt.job.kind;
    let body = prefill_body(attempt, decode, id, &tokens);
    let delivered = attempt.deliver(&prefill, decode, entry, id, kind.path(), body).await?;
    let (Prefilled::Answer(answer), handoff_time) = delivered else {
        return Ok(First::Refused);
    };
    let nonsense = |what| prefill.failed(Stage::Prefill, Cause::Nonsense(what));
    let mut first: Answer<'_> = serde_json::from_slice(&answer).map_err(|_| nonsense("it is no completion"))?;
    let choice = first.choices.pop().ok_or_else(|| nonsense("it has no choice"))?;
    tokens.push(entry.first_token().ok_or_else(|| nonsense("it has no first token"))?);
    let rewriter = Rewriter::new(kind, &first);
    let (finish, stop) = (choice.finish_reason.clone(), choice.stop_reason.clone());
    let text = choice.text();
    if let Some(text) = &text
        && (finish.as_deref() == Some("stop") || request.limit == Some(1))
    {
        // The entry's end makes the decode engine take the KV that nobody will decode from.
        drop(attempt.tally(true));
        let body = if request.stream {
            let last = Ending {
                text,
                finish: &finish.into(),
                stop: &stop,
                usage: request.include_usage.then_some(&first.usage),
                fingerprint: first.system_fingerprint,
            };
            Some(rewriter.only_events(&last))
        } else {
            alone(&answer)
        };
        let response = whole_response(body.ok_or_else(|| nonsense("it is no completion"))?, request.stream);
        return Ok(First::Whole(attempt.begin(response, Instant::now())));
    }
    // A special token, or one byte of a character: its text depends on the tokens after it.
    let Some(text) = text.filter(|text| !text.is_empty() && !text.contains('\u{fffd}')) else {
        return Ok(First::Unknown);
    };
    Ok(First::Half(Box::new(Half {
        decode: Arc::clone(decode),
        id: id.to_owned(),
        tokens,
        text,
        rewriter,
        usage: PrefillUsage::of(&answer, true),
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
    let kind = attempt.job.kind;
    let connector = &attempt.shared.settings.connector;
    let params = connector.prefill_params(id, &decode.engine.endpoint);
    let prompt = Prompt::new(kind, tokens, &params);
    let mut edits = one_token_edits(kind);
    edits.extend(prompt.edits());
    attempt.document.edited(&edits)
}

/// A prompt of token ids, as the route of a kind takes it: chat takes it beside the messages (vLLM 0.32).
struct Prompt {
    ids: Option<String>,
    params: Option<String>,
}

impl Prompt {
    fn new(kind: Kind, tokens: &[u32], params: &str) -> Self {
        let ids = list(tokens);
        let (ids, params) = match kind {
            Kind::Completions => (Some(ids), params.to_owned()),
            Kind::Chat => {
                let own = Document::parse_text(params).expect("a connector makes an object");
                (None, own.apply(&[("prompt_token_ids", Some(&ids))]))
            }
        };
        Self {
            ids,
            params: Some(params).filter(|params| params != "{}"),
        }
    }

    fn edits(&self) -> impl Iterator<Item = Edit<'_>> {
        let params = ("kv_transfer_params", self.params.as_deref());
        let prompt = self.ids.as_deref().map(|ids| ("prompt", Some(ids)));
        prompt.into_iter().chain([params])
    }
}

impl Half {
    /// The decode leg: the client's body with the prompt's tokens, the first token, and one token less to generate. No answer
    /// if the engine refuses it, in words about what the client has not written.
    async fn finish(
        self,
        attempt: &Attempt<'_>,
        limit: Option<u64>,
        entry: &mut Entry,
    ) -> Result<Option<Response<Body>>, ProxyError> {
        let kind = attempt.job.kind;
        let params = attempt.shared.settings.connector.decode_params(&self.id);
        let prompt = Prompt::new(kind, &self.tokens, params.as_deref().unwrap_or("{}"));
        let limit = limit.map(|limit| (limit - 1).to_string());
        let mut edits: Vec<Edit<'_>> = prompt.edits().collect();
        let limits: &[&str] = match kind {
            Kind::Completions => &["max_tokens"],
            Kind::Chat => &["max_tokens", "max_completion_tokens"],
        };
        let is_given = |key: &&&str| kind == Kind::Completions || attempt.document.given(key).is_some();
        edits.extend(limits.iter().filter(is_given).map(|key| (*key, limit.as_deref())));
        let body = attempt.document.edited(&edits);
        let sent = Instant::now();
        entry.send();
        let response = match attempt.decode(&self.decode, &self.id, kind.path(), body).await? {
            Decoded::Refused(_) => {
                entry.refused();
                return Ok(None);
            }
            Decoded::Whole(head, body) => {
                let mut tally = attempt.tally(true);
                entry.consumed();
                let corrected = self.usage.correct(&body);
                if corrected.as_ref().is_some_and(|(_, proof)| proof.disproves()) {
                    tally.outcome = Outcome::Recomputed;
                }
                let answer = match &corrected {
                    Some((answer, _)) => Some(answer.as_str()),
                    None => std::str::from_utf8(&body).ok(),
                };
                let whole = answer.and_then(|answer| self.rewriter.whole(&self.text, answer));
                let nonsense = || {
                    self.decode
                        .failed(Stage::Decode, Cause::Nonsense("it is no completion"))
                };
                verbatim(head, whole.ok_or_else(nonsense)?.into())
            }
            Decoded::Stream(head, body) => {
                let begin = self.rewriter.first_events(&self.text);
                let guarded = Guarded {
                    idle: attempt.job.deadlines.decode,
                    events: Some(Events::default()),
                    rewriter: Some(self.rewriter),
                    entry: Some(entry.take()),
                    usage: Some(self.usage),
                    tally: Some(attempt.tally(true)),
                    ..Guarded::new(self.decode, attempt.clock())
                };
                let mut response = verbatim(head, Bytes::new());
                *response.body_mut() = Body::new(GuardedBody::new(begin.into(), body, guarded));
                response
            }
        };
        let mut response = attempt.begin(response, sent);
        if let Some(stages) = response.extensions_mut().get_mut::<Stages>() {
            stages.handoff = self.handoff_time;
        }
        Ok(Some(response))
    }
}

/// The prompt's token ids. `None` if the engine refuses it, in words that are about another route than the client's.
async fn tokenize(attempt: &Attempt<'_>, seat: &Seat, id: &str) -> Result<Option<Vec<u32>>, ProxyError> {
    #[derive(Deserialize)]
    struct Tokens {
        tokens: Vec<u32>,
    }
    let field = attempt.job.kind.prompt_field();
    let prompt = attempt.document.get(field).unwrap_or("null");
    if is_token_list(prompt) {
        return Ok(serde_json::from_str(prompt).ok());
    }
    let model = attempt.document.get("model").unwrap_or("null");
    let body = format!(r#"{{"model":{model},"{field}":{prompt}}}"#);
    let call = Call::post("/tokenize", &attempt.job.headers, id, body.into());
    let step = attempt.shared.upstream.fetch(&seat.engine, call);
    let (head, body) = seat.run(Stage::Tokenize, attempt.job.deadlines.prefill, step).await?;
    if head.status.is_client_error() {
        return Ok(None);
    }
    let tokens: Option<Tokens> = serde_json::from_slice(&body).ok();
    match tokens {
        Some(Tokens { tokens }) if head.status.is_success() => Ok(Some(tokens).filter(|tokens| !tokens.is_empty())),
        _ => Err(seat.failed(Stage::Tokenize, Cause::Nonsense("it has no tokens"))),
    }
}

/// Token ids as JSON.
fn list(ids: &[u32]) -> String {
    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
    format!("[{}]", ids.join(","))
}

/// The prefill engine's whole answer where there is nothing to add, without its side of the hand-off.
fn alone(answer: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(answer).ok()?;
    let params = [Step::Key("kv_transfer_params")];
    let cleared = edit_at(text, &params, |_| Some("null".to_owned()));
    Some(cleared.unwrap_or_else(|| text.to_owned()))
}

fn whole_response(body: String, stream: bool) -> Response<Body> {
    let content_type = if stream {
        "text/event-stream; charset=utf-8"
    } else {
        "application/json"
    };
    let mut response = Response::new(Body::from(body));
    let content_type = header::HeaderValue::from_static(content_type);
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}

/// The end of a stream whose first token is its last.
struct Ending<'ending> {
    text: &'ending str,
    finish: &'ending Value,
    stop: &'ending Value,
    usage: Option<&'ending Value>,
    /// Told with the last event, where the engine has one.
    fingerprint: Option<&'ending RawValue>,
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

impl Rewriter {
    fn new(kind: Kind, first: &Answer<'_>) -> Self {
        Self {
            kind,
            id: first.id.get().to_owned(),
            created: first.created.get().to_owned(),
            model: first.model.get().to_owned(),
        }
    }

    /// One event, in the words of vLLM 0.32: `rest` follows the choices.
    fn event(&self, choices: &str, rest: &str) -> String {
        let Self {
            kind,
            id,
            created,
            model,
        } = self;
        let object = match kind {
            Kind::Completions => "text_completion",
            Kind::Chat => "chat.completion.chunk",
        };
        sse::event(&format!(
            r#"{{"id":{id},"object":"{object}","created":{created},"model":{model},"choices":[{choices}]{rest}}}"#
        ))
    }

    /// The event that opens a chat; completions have none.
    fn role(&self) -> String {
        let choice = r#"{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}"#;
        match self.kind {
            Kind::Completions => String::new(),
            Kind::Chat => self.event(choice, r#","prompt_token_ids":null,"prompt_text":null"#),
        }
    }

    /// What a stream begins with: the first token, after the role if it is a chat.
    fn first_events(&self, text: &str) -> String {
        let text = quoted(text);
        let choice = match self.kind {
            Kind::Completions => format!(
                r#"{{"index":0,"text":{text},"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}}"#
            ),
            Kind::Chat => format!(
                r#"{{"index":0,"delta":{{"content":{text}}},"logprobs":null,"finish_reason":null,"token_ids":null}}"#
            ),
        };
        self.role() + &self.event(&choice, "")
    }

    /// A whole stream of one token.
    fn only_events(&self, last: &Ending<'_>) -> String {
        let (text, finish, stop) = (quoted(last.text), last.finish, last.stop);
        let choice = match self.kind {
            Kind::Completions => format!(
                r#"{{"index":0,"text":{text},"logprobs":null,"finish_reason":{finish},"stop_reason":{stop},"prompt_token_ids":null,"token_ids":null}}"#
            ),
            Kind::Chat => format!(
                r#"{{"index":0,"delta":{{"content":{text}}},"logprobs":null,"finish_reason":{finish},"stop_reason":{stop},"token_ids":null}}"#
            ),
        };
        let fingerprint = last.fingerprint.map_or_else(String::new, |fingerprint| {
            format!(r#","system_fingerprint":{}"#, fingerprint.get())
        });
        let end = match last.usage {
            None => self.event(&choice, &fingerprint),
            Some(usage) => {
                let usage = format!(r#","usage":{}{fingerprint}"#, without_nulls(usage));
                self.event(&choice, "") + &self.event("", &usage)
            }
        };
        self.role() + &end + &sse::event("[DONE]")
    }

    /// The decode engine's usage for the client: it has counted the first token as part of the prompt.
    fn usage(usage: &str) -> Option<String> {
        #[derive(Deserialize)]
        struct Counts {
            prompt_tokens: u64,
            completion_tokens: u64,
        }
        let counts: Counts = serde_json::from_str(usage).ok()?;
        let (prompt, completion) = (counts.prompt_tokens.checked_sub(1)?, counts.completion_tokens + 1);
        let (prompt, completion) = (prompt.to_string(), completion.to_string());
        let edits = [
            ("prompt_tokens", Some(prompt.as_str())),
            ("completion_tokens", Some(completion.as_str())),
        ];
        Some(Document::parse_text(usage).ok()?.apply(&edits))
    }

    /// The whole answer, from the first token's text and the decode engine's whole answer.
    fn whole(&self, first: &str, decoded: &str) -> Option<String> {
        let path: &[Step] = match self.kind {
            Kind::Completions => &[Step::Key("choices"), Step::First, Step::Key("text")],
            Kind::Chat => &[
                Step::Key("choices"),
                Step::First,
                Step::Key("message"),
                Step::Key("content"),
            ],
        };
        let joined = edit_at(decoded, path, |rest| {
            let rest: Option<String> = serde_json::from_str(rest).ok()?;
            Some(quoted(&(first.to_owned() + &rest.unwrap_or_default())))
        })?;
        let counted = edit_at(&joined, &[Step::Key("usage")], Self::usage)?;
        Some(self.signed(&Document::parse_text(&counted).ok()?))
    }

    /// With the id and the time of the first half.
    fn signed(&self, document: &Document<'_>) -> String {
        document.apply(&[("id", Some(&self.id)), ("created", Some(&self.created))])
    }

    /// Whole events of the decode engine as the client shall see them. What is no completion chunk, such as an error or
    /// the end marker, passes unchanged.
    pub(super) fn rewrite(&mut self, events: &Bytes) -> Bytes {
        let mut out = String::with_capacity(events.len());
        for (_, event) in sse::each(events) {
            let rewritten = sse::data(event)
                .next()
                .and_then(|data| self.chunk(std::str::from_utf8(data).ok()?));
            match rewritten {
                Some(chunk) => out.push_str(&chunk),
                None => out.push_str(&String::from_utf8_lossy(event)),
            }
        }
        out.into()
    }

    /// One chunk of the decode engine; nothing of the one that opens a chat, which was sent with the first token.
    fn chunk(&self, data: &str) -> Option<String> {
        #[derive(Deserialize)]
        struct Choice {
            delta: Option<Delta>,
        }
        #[derive(Deserialize)]
        struct Delta {
            role: Option<String>,
        }
        let document = Document::parse_text(data).ok()?;
        let choices: Vec<Choice> = serde_json::from_str(document.get("choices")?).ok()?;
        if choices
            .iter()
            .any(|choice| choice.delta.as_ref().is_some_and(|delta| delta.role.is_some()))
        {
            return Some(String::new());
        }
        let signed = self.signed(&document);
        let counted = edit_at(&signed, &[Step::Key("usage")], Self::usage);
        Some(sse::event(&counted.unwrap_or(signed)))
    }
}

/// As vLLM writes the usage of a stream: what has no value is left out.
fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(members) => {
            let given = members.iter().filter(|(_, value)| !value.is_null());
            given.map(|(key, value)| (key.clone(), without_nulls(value))).collect()
        }
        other => other.clone(),
    }
}
