//! LMCache's reference flow, done right: the prefill engine makes the first token, the decode engine goes on from the
//! prompt plus that token, and the two halves become one coherent answer, byte for byte that of one engine.
//!
//! The prefill leg is the client's own request, so that its answer has the shape of a whole one. The decode leg is a
//! completion, because only that takes token ids in every version of vLLM.
//!
//! Only requests that [`crate::proxy::body::serving_mode`] lets through come here, so there is one choice, no logprobs and no stop string.

mod shape;

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Response, header};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;
use tokio::time::Instant;

use super::answer::{Verdict, judge, verbatim};
use super::attempt::{Attempt, Decoded, Prefilled, Stages, new_id, told};
use super::stream_body::{Guarded, GuardedBody};
use crate::proxy::body::document::{Document, Edit};
use crate::proxy::body::serving_mode::{Kind, SpliceRequest, is_token_list};
use crate::proxy::body::sse::Events;
use crate::proxy::body::usage::PrefillUsage;
use crate::proxy::error::{Cause, ProxyError, Stage};
use crate::proxy::schedule::lease::Seat;
use crate::proxy::schedule::selection::Seated;
use crate::proxy::telemetry::metrics::Outcome;
use crate::proxy::transfer::{Consume, Entry, one_token_edits};
use crate::proxy::upstream::Call;
use shape::{Answer, without_nulls, without_params};

pub(crate) use shape::Rewriter;

/// The decode leg's route.
const PATH: &str = "/v1/completions";

/// Fields of a chat that a splice serves and that are none of a completion.
const CHAT_ONLY: [&str; 10] = [
    "messages",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "tool_choice",
    "parallel_tool_calls",
    "include_reasoning",
    "add_generation_prompt",
    "continue_final_message",
    "return_prompt_text",
];

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
    /// The prefill engine's whole answer.
    answer: Bytes,
    rewriter: Rewriter,
    usage: PrefillUsage,
    handoff_time: Duration,
}

/// Answers a request by splicing.
pub(crate) async fn run(attempt: &mut Attempt<'_>, request: &SpliceRequest) -> Result<Response<Body>, ProxyError> {
    let (prefill, decode) = match attempt.selector.seats().await? {
        Seated::Pair(prefill, decode) => (prefill, decode),
        Seated::Alone(decode, reason) => return attempt.bypass(decode, reason).await,
    };
    let id = new_id();
    let Some(Tokenized { tokens, max_model_len }) = tokenize(attempt, &decode, &id).await? else {
        decode.held().inspect(|held| held.consumed());
        return attempt.bypass(decode, "tokenize_refused").await;
    };
    // A chat without a limit fills the context; a completion without one would not.
    let limit = request
        .limit
        .or(max_model_len.and_then(|most| most.checked_sub(tokens.len() as u64)));
    let Some(limit) = limit.filter(|limit| *limit > 0) else {
        decode.held().inspect(|held| held.consumed());
        return attempt.bypass(decode, "max_tokens").await;
    };
    let mut entry = reserve(attempt, &decode, &id, &tokens);
    let seats = (&decode, id.as_str());
    let first = Box::pin(first_half(attempt, request, prefill, seats, &mut entry, tokens)).await;
    let outcome = match first {
        Ok(First::Half(half)) => Box::pin(half.finish(attempt, limit, &mut entry)).await,
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
    let finish = json!(choice.finish_reason);
    let stop = choice.stop_reason.to_string();
    let is_last = finish == "stop" || request.limit == Some(1);
    let text = choice.text();
    if let Some(text) = text.as_ref().filter(|_| is_last) {
        // The entry's end makes the decode engine take the KV that nobody will decode from.
        drop(attempt.tally(Outcome::Sent));
        let body = if request.stream {
            let usage = request.include_usage.then(|| without_nulls(&first.usage).to_string());
            let ending = (finish.to_string(), stop);
            Some(rewriter.only_events(text, &ending, usage.as_deref(), first.system_fingerprint))
        } else {
            std::str::from_utf8(&answer).ok().map(without_params)
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
        usage: PrefillUsage::of(&answer),
        answer,
        rewriter,
        handoff_time,
    })))
}

fn reserve(attempt: &Attempt<'_>, decode: &Arc<Seat>, id: &str, tokens: &[u32]) -> Entry {
    let model = attempt.document.get("model").unwrap_or("null");
    // Any token after the prompt will do to take the prompt's KV.
    let prompt = list(&[tokens, &tokens[..1]].concat());
    let body = format!(r#"{{"model":{model},"prompt":{prompt},"max_tokens":1}}"#);
    let body = attempt.shared.bodies.hold(body.into_bytes());
    attempt.reserve(decode, id, Consume::Completion(body))
}

fn prefill_body(attempt: &Attempt<'_>, decode: &Seat, id: &str, tokens: &[u32]) -> Vec<u8> {
    let kind = attempt.job.kind;
    let ids = list(tokens);
    let mut params = attempt
        .shared
        .settings
        .connector
        .prefill_params(id, &decode.engine.endpoint);
    let mut edits = one_token_edits(kind);
    match kind {
        Kind::Completions => edits.push(("prompt", Some(&ids))),
        Kind::Chat => {
            // So that it need not count them again; versions that do not know the key make the same of the messages.
            let own = Document::parse_text(&params).expect("a connector makes an object");
            params = own.apply(&[("prompt_token_ids", Some(&ids))]);
        }
    }
    edits.push(("kv_transfer_params", Some(&params)));
    attempt.document.edited(&edits)
}

/// The client's body with the prompt's tokens, the first token, and one token less to generate.
fn decode_body(attempt: &Attempt<'_>, params: Option<&str>, tokens: &[u32], limit: u64) -> Vec<u8> {
    let (prompt, limit) = (list(tokens), (limit - 1).to_string());
    let mut edits: Vec<Edit<'_>> = vec![
        ("prompt", Some(&prompt)),
        ("max_tokens", Some(&limit)),
        ("kv_transfer_params", params),
    ];
    if attempt.job.kind == Kind::Chat {
        edits.extend(CHAT_ONLY.map(|key| (key, None)));
    }
    attempt.document.edited(&edits)
}

impl Half {
    /// The decode leg. No answer if the engine refuses it, in words about what the client has not written.
    async fn finish(
        self,
        attempt: &Attempt<'_>,
        limit: u64,
        entry: &mut Entry,
    ) -> Result<Option<Response<Body>>, ProxyError> {
        let sent = Instant::now();
        let body = decode_body(attempt, entry.send(), &self.tokens, limit);
        let response = match attempt.decode(&self.decode, &self.id, PATH, body).await? {
            Decoded::Refused(_) => {
                entry.refused();
                return Ok(None);
            }
            Decoded::Whole(head, body) => {
                let proof = PrefillUsage::proof_of(&body);
                entry.answered().prove(proof);
                let outcome = attempt.settled(&self.decode, proof)?;
                let _tally = attempt.tally(outcome);
                let nonsense = || {
                    self.decode
                        .failed(Stage::Decode, Cause::Nonsense("it is no completion"))
                };
                let whole = self
                    .rewriter
                    .whole(&self.answer, &self.text, &body)
                    .ok_or_else(nonsense)?;
                attempt.job.record.decoded(whole.as_bytes());
                told(verbatim(head, whole.into()), outcome, None)
            }
            Decoded::Stream(head, body) => {
                let begin = self.rewriter.first_events(&self.text);
                let guarded = Guarded {
                    events: Some(Events::default()),
                    rewriter: Some(self.rewriter),
                    entry: Some(entry.take()),
                    usage: Some(self.usage),
                    tally: Some(attempt.tally(Outcome::Sent)),
                    ..Guarded::new(self.decode, attempt.job.deadlines.decode, attempt.clock())
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

/// A prompt's token ids, and how many tokens it may have with its answer.
#[derive(Deserialize)]
struct Tokenized {
    tokens: Vec<u32>,
    max_model_len: Option<u64>,
}

/// The prompt's token ids. `None` if the engine refuses it, in words that are about another route than the client's.
async fn tokenize(attempt: &Attempt<'_>, seat: &Seat, id: &str) -> Result<Option<Tokenized>, ProxyError> {
    let field = attempt.job.kind.prompt_field();
    let prompt = attempt.document.get(field).unwrap_or("null");
    if is_token_list(prompt) {
        let tokens = serde_json::from_str(prompt).ok();
        return Ok(tokens.map(|tokens| Tokenized {
            tokens,
            max_model_len: None,
        }));
    }
    let model = attempt.document.get("model").unwrap_or("null");
    let body = format!(r#"{{"model":{model},"{field}":{prompt}}}"#);
    let call = Call::post("/tokenize", &attempt.job.headers, id, body.into());
    let step = attempt.shared.upstream.fetch(&seat.engine, call);
    let (head, body) = seat.run(Stage::Tokenize, attempt.job.deadlines.prefill, step).await?;
    match judge(&head, &body).map_err(|cause| seat.failed(Stage::Tokenize, cause))? {
        Verdict::Refused => Ok(None),
        Verdict::Good => match serde_json::from_slice::<Tokenized>(&body) {
            Ok(told) => Ok(Some(told).filter(|told| !told.tokens.is_empty())),
            Err(_) => Err(seat.failed(Stage::Tokenize, Cause::Nonsense("it has no tokens"))),
        },
    }
}

/// Token ids as JSON.
fn list(ids: &[u32]) -> String {
    serde_json::to_string(ids).expect("numbers are JSON")
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
