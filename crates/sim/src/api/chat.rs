//! The route `/v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::request::{CommonFields, Job, Message, RouteSettings, UsageEvents, read, template};
use super::stream::{self, Render};
use super::{Api, ApiError, collect, event_stream, now, out_of_vocabulary, prompt_logprobs, streamed_usage, usage};
use crate::engine_core::sequence::{Output, SequenceEnd, Times, TokenLogprob};
use crate::engine_core::tokens::{VOCABULARY, decode, encode};

/// The fields of chat requests only.
#[derive(Debug, Deserialize)]
pub(super) struct ChatOnly {
    messages: Vec<Message>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
}

impl ChatOnly {
    /// Parses the fields; a wrong type is a schema error.
    pub(super) fn read(body: &[u8]) -> Result<Self, ApiError> {
        read(body)
    }
}

/// The constant parts of an answer.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    id: String,
    model: String,
    created: u64,
    prompt: Arc<[u32]>,
    logprobs: bool,
    return_token_ids: bool,
    prompt_logprobs: Option<u32>,
    usage_events: UsageEvents,
    tells_cached: bool,
    tells_times: bool,
}

/// Checks a request.
pub(super) fn prepare(api: &Api, common: &CommonFields, only: &ChatOnly, base: &str) -> Result<(Job, Shape), ApiError> {
    api.check_model(common.model.as_deref())?;
    if only.messages.is_empty() {
        return Err(ApiError::bad_request("messages must not be empty", Some("messages")));
    }
    // vLLM needs a configured parser for any choice except `none`.
    let tool_choice = only.tool_choice.as_ref().and_then(Value::as_str);
    if only.tools.as_ref().is_some_and(|tools| !tools.is_empty()) && tool_choice != Some("none") {
        return Err(ApiError::bad_request(
            "\"auto\" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set",
            None,
        ));
    }
    let logprobs = only.logprobs.unwrap_or(false);
    let particulars = RouteSettings {
        id: format!("chatcmpl-{base}"),
        prompts: vec![prompt(common, only)?.into()],
        default_max_tokens: None,
        logprobs: logprobs.then(|| only.top_logprobs.unwrap_or(0)),
        needs_prompt: common.prompt_logprobs.is_some(),
        echoes: false,
    };
    let job = common.check(api, particulars)?;
    let shape = Shape {
        id: job.id.clone(),
        model: api.options.served_model_name.clone(),
        created: now(),
        prompt: Arc::clone(&job.prompts[0]),
        logprobs,
        return_token_ids: job.return_token_ids,
        prompt_logprobs: common
            .prompt_logprobs
            .map(|alternatives| u32::try_from(alternatives).unwrap_or(0)),
        usage_events: job.usage_events,
        tells_cached: api.options.prompt_tokens_details,
        // Several sequences have no common times.
        tells_times: api.options.per_request_metrics && job.prompts.len() * job.choices == 1,
    };
    Ok((job, shape))
}

/// The tokens of the messages; those of the hand-off take precedence.
fn prompt(common: &CommonFields, only: &ChatOnly) -> Result<Vec<u32>, ApiError> {
    let handed = common
        .kv_transfer_params
        .as_ref()
        .and_then(|params| params.get("prompt_token_ids"));
    let Some(handed) = handed else {
        return Ok(encode(&template(&only.messages)?));
    };
    let tokens = Vec::<u32>::deserialize(handed).unwrap_or_default();
    if tokens.is_empty() {
        let message = "kv_transfer_params.prompt_token_ids must be a non-empty list of non-negative integers";
        return Err(ApiError::bad_request(message, Some("kv_transfer_params")));
    }
    match tokens.iter().find(|token| **token >= VOCABULARY) {
        Some(token) => Err(out_of_vocabulary(*token)),
        None => Ok(tokens),
    }
}

/// Answers, with or without streaming.
pub(super) async fn answer(api: &Api, job: Job, shape: Shape) -> Result<Response, ApiError> {
    let sequences = job.choices;
    let news = api.start(&job).await?;
    if job.stream {
        let chunks = Chunks {
            shape,
            made: 0,
            cached: 0,
            times: None,
            sequences,
            generated: vec![0; sequences],
            begun: false,
        };
        return Ok(event_stream(stream::body(chunks, news, sequences)));
    }
    let mut outputs = collect(news, sequences).await?;
    let made = outputs.iter().map(|output| output.tokens.len()).sum();
    let mut params = Value::Null;
    let mut cached = 0;
    let mut times = None;
    for output in outputs.iter_mut().rev() {
        if let Some(SequenceEnd::Finished(finish)) = &mut output.end {
            params = finish.kv_transfer_params.take();
            cached = finish.cached_tokens;
            times = finish.times.take();
        }
    }
    let choices: Vec<Value> = outputs.into_iter().map(|output| shape.choice(output)).collect();
    Ok(Json(json!({
        "id": shape.id,
        "object": "chat.completion",
        "created": shape.created,
        "model": shape.model,
        "choices": choices,
        "service_tier": null,
        "system_fingerprint": null,
        "usage": shape.usage(made, cached),
        "prompt_logprobs": shape
            .prompt_logprobs
            .map(|alternatives| prompt_logprobs::to_json(&shape.prompt, alternatives)),
        "prompt_token_ids": shape.return_token_ids.then_some(&shape.prompt),
        "prompt_text": null,
        "kv_transfer_params": params,
        "ec_transfer_params": null,
        "metrics": times.filter(|_| shape.tells_times).map(|times| times.to_json()),
    }))
    .into_response())
}

impl Shape {
    fn usage(&self, made: usize, cached: usize) -> Value {
        usage(self.prompt.len(), made, self.tells_cached.then_some(cached))
    }

    fn choice(&self, output: Output) -> Value {
        let logprobs = self.logprobs_of(&output.logprobs);
        let (reason, stop_reason) = reason(output.end);
        json!({
            "index": output.index,
            "message": {
                "role": "assistant",
                "content": output.text,
                "refusal": null,
                "annotations": null,
                "audio": null,
                "function_call": null,
                "reasoning": null,
            },
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": stop_reason,
            "token_ids": self.return_token_ids.then_some(output.tokens),
            "routed_experts": null,
        })
    }

    fn logprobs_of(&self, of: &[TokenLogprob]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let content: Vec<Value> = of
            .iter()
            .map(|one| {
                let mut value = token_logprob(one.token, one.logprob);
                value["top_logprobs"] = one
                    .top
                    .iter()
                    .map(|(token, logprob)| token_logprob(*token, *logprob))
                    .collect();
                value
            })
            .collect();
        json!({"content": content})
    }
}

fn token_logprob(token: u32, logprob: f64) -> Value {
    let text = decode(&[token]);
    json!({"token": text, "logprob": logprob, "bytes": text.as_bytes()})
}

fn reason(end: Option<SequenceEnd>) -> (Option<&'static str>, Value) {
    match end {
        Some(SequenceEnd::Finished(finish)) => (Some(finish.reason), finish.stop_reason),
        _ => (None, Value::Null),
    }
}

/// The events of a streamed chat.
struct Chunks {
    shape: Shape,
    made: usize,
    cached: usize,
    times: Option<Box<Times>>,
    sequences: usize,
    /// Generated tokens by choice.
    generated: Vec<usize>,
    /// Whether the role chunks were sent.
    begun: bool,
}

impl Chunks {
    fn event(&self, choices: &Value) -> Value {
        json!({
            "id": self.shape.id,
            "object": "chat.completion.chunk",
            "created": self.shape.created,
            "model": self.shape.model,
            "choices": choices,
        })
    }

    /// Adds the usage so far, if every event has it.
    fn count(&self, event: &mut Value, made: usize) {
        if self.shape.usage_events == UsageEvents::Always {
            event["usage"] = streamed_usage(self.shape.prompt.len(), made, None);
        }
    }

    fn roles(&self) -> Vec<String> {
        (0..self.sequences)
            .map(|index| {
                let mut event = self.event(&json!([{
                    "index": index,
                    "delta": {"role": "assistant", "content": ""},
                    "logprobs": null,
                    "finish_reason": null,
                }]));
                event["prompt_token_ids"] = json!(self.shape.return_token_ids.then_some(&self.shape.prompt));
                event["prompt_text"] = Value::Null;
                self.count(&mut event, 0);
                event.to_string()
            })
            .collect()
    }
}

impl Render for Chunks {
    fn chunks(&mut self, output: Output) -> Vec<String> {
        let mut events = if self.begun { Vec::new() } else { self.roles() };
        self.begun = true;
        self.made += output.tokens.len();
        if let Some(SequenceEnd::Finished(finish)) = &output.end {
            self.cached = finish.cached_tokens;
            self.times.clone_from(&finish.times);
        }
        let index = output.index;
        self.generated[index] += output.tokens.len();
        let mut choice = json!({
            "index": index,
            "delta": {"content": output.text},
            "logprobs": self.shape.logprobs_of(&output.logprobs),
        });
        let (reason, stop_reason) = reason(output.end);
        choice["finish_reason"] = json!(reason);
        if reason.is_some() {
            choice["stop_reason"] = stop_reason;
        }
        choice["token_ids"] = json!(self.shape.return_token_ids.then_some(output.tokens));
        let mut event = self.event(&json!([choice]));
        event["kv_transfer_params"] = Value::Null;
        self.count(&mut event, self.generated[index]);
        events.push(event.to_string());
        events
    }

    fn usage(&mut self) -> Option<String> {
        if self.shape.usage_events == UsageEvents::Never {
            return None;
        }
        let mut event = self.event(&json!([]));
        let cached = self.shape.tells_cached.then_some(self.cached);
        event["usage"] = streamed_usage(self.shape.prompt.len(), self.made, cached);
        if let Some(times) = self.times.as_ref().filter(|_| self.shape.tells_times) {
            event["metrics"] = times.to_json();
        }
        Some(event.to_string())
    }
}
