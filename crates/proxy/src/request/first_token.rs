//! Serves a generation whose first token comes from the prefill engine, as LMCache's reference proxy does. The decode
//! engine continues from the prompt plus that token, and the two parts become one answer, byte for byte that of one
//! engine.
//!
//! The prefill leg is the client's own request, so its answer has the shape of a whole one. The decode leg is a
//! completion, because only that accepts token ids in every version of vLLM.
//!
//! [`crate::body::serving_mode`] admits only requests with one choice, no logprobs and no stop string.

mod shape;

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Response, header};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;
use tokio::time::Instant;

use super::answer::{AnswerClass, classify, verbatim};
use super::attempt::{Attempt, DecodeAnswer, HandoffTimings, PrefillAnswer, new_id, with_report};
use super::stream_body::{StreamBody, StreamContext};
use crate::body::document::{Document, Edit};
use crate::body::serving_mode::{FirstTokenRequest, GenerationKind, is_token_list};
use crate::body::sse::Events;
use crate::body::usage::PrefillUsage;
use crate::error::{Cause, ProxyError, RequestStage};
use crate::schedule::lease::EngineLease;
use crate::schedule::selection::Selection;
use crate::telemetry::metrics::HandoffOutcome;
use crate::transfer::{ConsumeRequest, Transfer, one_token_edits};
use crate::upstream::Call;
use shape::{FirstAnswer, without_nulls, without_params};

pub(crate) use shape::EventRewriter;

/// The route of the decode leg.
const PATH: &str = "/v1/completions";

/// Fields of a chat request that a completion does not have.
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

/// The result of the prefill leg.
enum FirstLeg {
    /// The first part of an answer.
    Half(Box<FirstHalf>),
    /// The whole answer.
    Whole(Response<Body>),
    /// A token whose text is not known yet.
    Unknown,
    /// The prefill engine refused its leg.
    Refused,
}

/// An answer whose first token is known.
struct FirstHalf {
    decode: Arc<EngineLease>,
    id: String,
    /// The prompt's tokens, then the first token of the answer.
    tokens: Vec<u32>,
    /// The first token's text.
    text: String,
    /// The prefill engine's whole answer.
    answer: Bytes,
    rewriter: EventRewriter,
    usage: PrefillUsage,
    handoff_time: Duration,
}

/// Answers a request with the prefill engine's first token.
pub(crate) async fn run(attempt: &mut Attempt<'_>, request: &FirstTokenRequest) -> Result<Response<Body>, ProxyError> {
    let (prefill, decode) = match attempt.selector.select().await? {
        Selection::Pair(prefill, decode) => (prefill, decode),
        Selection::DecodeOnly(decode, reason) => return attempt.bypass(decode, reason).await,
    };
    let id = new_id();
    let Some(Tokenized { tokens, max_model_len }) = tokenize(attempt, &decode, &id).await? else {
        decode.reservation().inspect(|reservation| reservation.release_buffer());
        return attempt.bypass(decode, "tokenize_refused").await;
    };
    // A chat without a limit fills the context; a completion without a limit does not.
    let limit = request
        .limit
        .or(max_model_len.and_then(|most| most.checked_sub(tokens.len() as u64)));
    let Some(limit) = limit.filter(|limit| *limit > 0) else {
        decode.reservation().inspect(|reservation| reservation.release_buffer());
        return attempt.bypass(decode, "max_tokens").await;
    };
    let mut transfer = reserve(attempt, &decode, &id, &tokens);
    let leases = (&decode, id.as_str());
    let first = Box::pin(first_half(attempt, request, prefill, leases, &mut transfer, tokens)).await;
    let outcome = match first {
        Ok(FirstLeg::Half(half)) => Box::pin(half.finish(attempt, limit, &mut transfer)).await,
        Ok(FirstLeg::Whole(response)) => Ok(Some(response)),
        Ok(FirstLeg::Unknown) => return attempt.bypass(decode, "first_token").await,
        Ok(FirstLeg::Refused) => return attempt.refused(transfer, decode).await,
        Err(error) => Err(error),
    };
    match outcome {
        Ok(Some(response)) => Ok(response),
        Ok(None) => {
            // Dropping the transfer makes the decode engine take the KV.
            drop(transfer);
            attempt.bypass(decode, "decode_refused").await
        }
        Err(error) => {
            transfer.failed(&error);
            Err(error)
        }
    }
}

/// Runs the prefill leg and decides what is left to do.
async fn first_half(
    attempt: &Attempt<'_>,
    request: &FirstTokenRequest,
    prefill: Arc<EngineLease>,
    (decode, id): (&Arc<EngineLease>, &str),
    transfer: &mut Transfer,
    mut tokens: Vec<u32>,
) -> Result<FirstLeg, ProxyError> {
    let kind = attempt.job.kind;
    let body = prefill_body(attempt, decode, id, &tokens);
    let delivered = attempt
        .deliver(&prefill, decode, transfer, id, kind.path(), body)
        .await?;
    let (PrefillAnswer::Good(answer), handoff_time) = delivered else {
        return Ok(FirstLeg::Refused);
    };
    let invalid = |what| prefill.failed(RequestStage::Prefill, Cause::InvalidAnswer(what));
    let mut first: FirstAnswer<'_> = serde_json::from_slice(&answer).map_err(|_| invalid("not a completion"))?;
    let choice = first.choices.pop().ok_or_else(|| invalid("no choice"))?;
    tokens.push(transfer.first_token().ok_or_else(|| invalid("no first token"))?);
    let rewriter = EventRewriter::new(kind, &first);
    let finish = json!(choice.finish_reason);
    let stop = choice.stop_reason.to_string();
    let is_last = finish == "stop" || request.limit == Some(1);
    let text = choice.text();
    if let Some(text) = text.as_ref().filter(|_| is_last) {
        // Dropping the transfer makes the decode engine take the KV, because no decode leg follows.
        drop(attempt.outcome_on_drop(HandoffOutcome::Sent));
        let body = if request.stream {
            let usage = request.include_usage.then(|| without_nulls(&first.usage).to_string());
            let ending = (finish.to_string(), stop);
            Some(rewriter.only_events(text, &ending, usage.as_deref(), first.system_fingerprint))
        } else {
            std::str::from_utf8(&answer).ok().map(without_params)
        };
        let response = whole_response(body.ok_or_else(|| invalid("not a completion"))?, request.stream);
        return Ok(FirstLeg::Whole(attempt.begin_answer(response, Instant::now())));
    }
    // The text of a special token, or of one byte of a character, depends on the tokens after it.
    let Some(text) = text.filter(|text| !text.is_empty() && !text.contains('\u{fffd}')) else {
        return Ok(FirstLeg::Unknown);
    };
    Ok(FirstLeg::Half(Box::new(FirstHalf {
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

fn reserve(attempt: &Attempt<'_>, decode: &Arc<EngineLease>, id: &str, tokens: &[u32]) -> Transfer {
    let model = attempt.document.get("model").unwrap_or("null");
    // Any token after the prompt makes the engine take the prompt's KV.
    let prompt = list(&[tokens, &tokens[..1]].concat());
    let body = format!(r#"{{"model":{model},"prompt":{prompt},"max_tokens":1}}"#);
    let body = attempt.shared.bodies.hold(body.into_bytes());
    attempt.reserve(decode, id, ConsumeRequest::Completion(body))
}

fn prefill_body(attempt: &Attempt<'_>, decode: &EngineLease, id: &str, tokens: &[u32]) -> Vec<u8> {
    let kind = attempt.job.kind;
    let ids = list(tokens);
    let mut params = attempt
        .shared
        .settings
        .connector
        .prefill_params(id, &decode.engine.endpoint);
    let mut edits = one_token_edits(kind);
    match kind {
        GenerationKind::Completions => edits.push(("prompt", Some(&ids))),
        GenerationKind::Chat => {
            // Saves the engine from tokenizing again. Versions that do not know the key tokenize the messages.
            let own = Document::parse_text(&params).expect("a connector makes an object");
            params = own.apply(&[("prompt_token_ids", Some(&ids))]);
        }
    }
    edits.push(("kv_transfer_params", Some(&params)));
    attempt.document.edited(&edits)
}

/// The client's body with the prompt's tokens, the first token, and one token fewer to generate.
fn decode_body(attempt: &Attempt<'_>, params: Option<&str>, tokens: &[u32], limit: u64) -> Vec<u8> {
    let (prompt, limit) = (list(tokens), (limit - 1).to_string());
    let mut edits: Vec<Edit<'_>> = vec![
        ("prompt", Some(&prompt)),
        ("max_tokens", Some(&limit)),
        ("kv_transfer_params", params),
    ];
    if attempt.job.kind == GenerationKind::Chat {
        edits.extend(CHAT_ONLY.map(|key| (key, None)));
    }
    attempt.document.edited(&edits)
}

impl FirstHalf {
    /// Runs the decode leg. `None` if the engine refuses it, because the refusal is about text that the client did
    /// not write.
    async fn finish(
        self,
        attempt: &Attempt<'_>,
        limit: u64,
        transfer: &mut Transfer,
    ) -> Result<Option<Response<Body>>, ProxyError> {
        let sent = Instant::now();
        let body = decode_body(attempt, transfer.begin_decode(), &self.tokens, limit);
        let response = match attempt.decode(&self.decode, &self.id, PATH, body).await? {
            DecodeAnswer::Refused(_) => {
                transfer.refused();
                return Ok(None);
            }
            DecodeAnswer::Whole(head, body) => {
                let proof = PrefillUsage::proof_of(&body);
                transfer.answered().prove(proof);
                let outcome = attempt.handoff_outcome(&self.decode, proof)?;
                let _on_drop = attempt.outcome_on_drop(outcome);
                let invalid = || {
                    self.decode
                        .failed(RequestStage::Decode, Cause::InvalidAnswer("not a completion"))
                };
                let whole = self
                    .rewriter
                    .whole(&self.answer, &self.text, &body)
                    .ok_or_else(invalid)?;
                attempt.job.record.decode_answered(whole.as_bytes());
                with_report(verbatim(head, whole.into()), outcome, None)
            }
            DecodeAnswer::Stream(head, body) => {
                let begin = self.rewriter.first_events(&self.text);
                let stream = StreamContext {
                    events: Some(Events::default()),
                    rewriter: Some(self.rewriter),
                    transfer: Some(transfer.take()),
                    usage: Some(self.usage),
                    on_drop: Some(attempt.outcome_on_drop(HandoffOutcome::Sent)),
                    ..StreamContext::new(self.decode, attempt.job.deadlines.decode_idle, attempt.token_timer())
                };
                let mut response = verbatim(head, Bytes::new());
                *response.body_mut() = Body::new(StreamBody::new(begin.into(), body, stream));
                response
            }
        };
        let mut response = attempt.begin_answer(response, sent);
        if let Some(stages) = response.extensions_mut().get_mut::<HandoffTimings>() {
            stages.handoff = self.handoff_time;
        }
        Ok(Some(response))
    }
}

/// A prompt's token ids, and the context length.
#[derive(Deserialize)]
struct Tokenized {
    tokens: Vec<u32>,
    max_model_len: Option<u64>,
}

/// Tokenizes the prompt. `None` if the engine refuses, because the refusal is about another route than the client's.
async fn tokenize(attempt: &Attempt<'_>, lease: &EngineLease, id: &str) -> Result<Option<Tokenized>, ProxyError> {
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
    let step = attempt.shared.upstream.fetch(&lease.engine, call);
    let (head, body) = lease
        .run(RequestStage::Tokenize, attempt.job.deadlines.prefill, step)
        .await?;
    match classify(&head, &body).map_err(|cause| lease.failed(RequestStage::Tokenize, cause))? {
        AnswerClass::Refused => Ok(None),
        AnswerClass::Good => match serde_json::from_slice::<Tokenized>(&body) {
            Ok(tokenized) => Ok(Some(tokenized).filter(|tokenized| !tokenized.tokens.is_empty())),
            Err(_) => Err(lease.failed(RequestStage::Tokenize, Cause::InvalidAnswer("no tokens"))),
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
