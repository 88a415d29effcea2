//! The route `/v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::request::{CommonFields, Job, RouteSettings, UsageEvents, read};
use super::stream::{self, Render};
use super::{Api, ApiError, collect, event_stream, now, out_of_vocabulary, prompt_logprobs, streamed_usage, usage};
use crate::engine_core::sequence::{Output, SequenceEnd, Times, TokenLogprob};
use crate::engine_core::tokens::{VOCABULARY, decode, encode};

/// The fields of completion requests only.
#[derive(Debug, Deserialize)]
struct CompletionOnly {
    prompt: Option<Box<RawValue>>,
    echo: Option<bool>,
    logprobs: Option<u32>,
    suffix: Option<String>,
}

/// The constant parts of an answer.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    id: String,
    model: String,
    created: u64,
    /// The echoed prompts, if requested.
    echo: Vec<String>,
    prompts: Vec<Arc<[u32]>>,
    choices: usize,
    return_token_ids: bool,
    /// Number of alternatives for each token of the answer, and of an echoed prompt.
    logprobs: Option<u32>,
    prompt_logprobs: Option<u32>,
    prompt_only: bool,
    usage_events: UsageEvents,
    tells_cached: bool,
    tells_times: bool,
}

/// Checks a request.
pub(super) fn prepare(api: &Api, common: &CommonFields, body: &[u8], base: &str) -> Result<(Job, Shape), ApiError> {
    let only: CompletionOnly = read(body)?;
    api.check_model(common.model.as_deref())?;
    if only.suffix.is_some() {
        return Err(ApiError::bad_request("suffix is not currently supported", None));
    }
    let raw = only
        .prompt
        .as_deref()
        .ok_or_else(|| ApiError::bad_request("prompt: Field required", Some("prompt")))?;
    let prompts = prompts(raw)?;
    let echo = only.echo.unwrap_or(false);
    let particulars = RouteSettings {
        id: format!("cmpl-{base}"),
        prompts,
        default_max_tokens: Some(16),
        logprobs: only.logprobs,
        needs_prompt: common.prompt_logprobs.is_some() || (echo && only.logprobs.is_some()),
        echoes: echo,
    };
    let job = common.check(api, particulars)?;
    let shape = Shape {
        id: job.id.clone(),
        model: api.options.served_model_name.clone(),
        created: now(),
        echo: if echo {
            job.prompts.iter().map(|prompt| decode(prompt)).collect()
        } else {
            Vec::new()
        },
        prompts: job.prompts.clone(),
        choices: job.choices,
        return_token_ids: job.return_token_ids,
        logprobs: only.logprobs,
        prompt_logprobs: common
            .prompt_logprobs
            .map(|alternatives| u32::try_from(alternatives).unwrap_or(0)),
        prompt_only: job.prompt_only,
        usage_events: job.usage_events,
        tells_cached: api.options.prompt_tokens_details,
        // Several sequences have no common times.
        tells_times: api.options.per_request_metrics && job.prompts.len() * job.choices == 1,
    };
    Ok((job, shape))
}

/// Parses a text, a list of texts, a list of tokens, or a list of those.
fn prompts(raw: &RawValue) -> Result<Vec<Arc<[u32]>>, ApiError> {
    let text = raw.get();
    let inner = text.strip_prefix('[').map(str::trim_start);
    let bytes = text.as_bytes();
    let prompts: Vec<Vec<u32>> = match inner.and_then(|inner| inner.chars().next()) {
        None => vec![encode(&read::<String>(bytes)?)],
        Some('"') => read::<Vec<String>>(bytes)?.iter().map(|text| encode(text)).collect(),
        Some('[') => read(bytes)?,
        Some(_) => vec![read(bytes)?],
    };
    if let Some(token) = prompts.iter().flatten().find(|token| **token >= VOCABULARY) {
        return Err(out_of_vocabulary(*token));
    }
    Ok(prompts.into_iter().map(Arc::from).collect())
}

/// Answers, with or without streaming.
pub(super) async fn answer(api: &Api, job: Job, shape: Shape) -> Result<Response, ApiError> {
    let sequences = job.prompts.len() * job.choices;
    let news = api.start(&job).await?;
    if job.stream {
        let chunks = Chunks::new(shape, sequences);
        return Ok(event_stream(stream::body(chunks, news, sequences)));
    }
    let mut outputs = collect(news, sequences).await?;
    let made = outputs.iter().map(|output| output.tokens.len()).sum();
    let mut params = Value::Null;
    let mut cached = 0;
    let mut times = None;
    // For several prompts vLLM returns the parameters of the first.
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
        "object": "text_completion",
        "created": shape.created,
        "model": shape.model,
        "choices": choices,
        "service_tier": null,
        "system_fingerprint": null,
        "usage": shape.usage(made, cached),
        "kv_transfer_params": params,
        "ec_transfer_params": null,
        "metrics": times.filter(|_| shape.tells_times).map(|times| times.to_json()),
    }))
    .into_response())
}

impl Shape {
    fn prompt_of(&self, index: usize) -> usize {
        index / self.choices
    }

    fn usage(&self, made: usize, cached: usize) -> Value {
        let prompt = self.prompts.iter().map(|prompt| prompt.len()).sum();
        usage(prompt, made, self.tells_cached.then_some(cached))
    }

    /// The next part of a choice; `begins` is true for its first one.
    fn part(&self, output: &Output, begins: bool, offset: usize) -> ChoiceDelta {
        let prompt = &self.prompts[self.prompt_of(output.index)];
        let mut text = String::new();
        let mut entries: Vec<Option<TokenLogprob>> = Vec::new();
        if begins && let Some(echo) = self.echo.get(self.prompt_of(output.index)) {
            text.clone_from(echo);
            entries = self
                .logprobs
                .map(|alternatives| prompt_logprobs::of(prompt, alternatives))
                .unwrap_or_default();
        }
        if !self.prompt_only {
            text.push_str(&output.text);
            entries.extend(output.logprobs.iter().cloned().map(Some));
        }
        ChoiceDelta {
            logprobs: logprobs(&entries, offset),
            text,
        }
    }

    /// A complete choice.
    fn choice(&self, output: Output) -> Value {
        let prompt = &self.prompts[self.prompt_of(output.index)];
        let part = self.part(&output, true, 0);
        let (reason, stop_reason) = reason(output.end);
        json!({
            "index": output.index,
            "text": part.text,
            "logprobs": part.logprobs,
            "finish_reason": reason,
            "stop_reason": stop_reason,
            "token_ids": self.return_token_ids.then_some(&output.tokens),
            "prompt_logprobs": self.prompt_logprobs.map(|alternatives| prompt_logprobs::to_json(prompt, alternatives)),
            "prompt_token_ids": self.return_token_ids.then_some(prompt),
            "routed_experts": null,
        })
    }
}

/// The part of a choice in one event.
struct ChoiceDelta {
    text: String,
    logprobs: Value,
}

fn reason(end: Option<SequenceEnd>) -> (Option<&'static str>, Value) {
    match end {
        Some(SequenceEnd::Finished(finish)) => (Some(finish.reason), finish.stop_reason),
        _ => (None, Value::Null),
    }
}

fn logprobs(of: &[Option<TokenLogprob>], offset: usize) -> Value {
    if of.is_empty() {
        return Value::Null;
    }
    let mut at = offset;
    let mut offsets = Vec::with_capacity(of.len());
    let mut tokens = Vec::with_capacity(of.len());
    for one in of {
        // The first token of a prompt has no probability.
        let text = one.as_ref().map_or_else(String::new, |one| decode(&[one.token]));
        offsets.push(at);
        at += text.len();
        tokens.push(text);
    }
    let top = |one: &TokenLogprob| -> Value {
        let top = one.top.iter();
        top.map(|(token, logprob)| (decode(&[*token]), json!(logprob)))
            .collect()
    };
    json!({
        "text_offset": offsets,
        "token_logprobs": of.iter().map(|one| one.as_ref().map(|one| one.logprob)).collect::<Vec<_>>(),
        "tokens": tokens,
        "top_logprobs": of.iter().map(|one| one.as_ref().map(top)).collect::<Vec<_>>(),
    })
}

/// The events of a streamed completion.
struct Chunks {
    shape: Shape,
    made: usize,
    cached: usize,
    times: Option<Box<Times>>,
    /// By choice: whether it has started, its tokens, and the length of its text.
    sent: Vec<(bool, usize, usize)>,
}

impl Chunks {
    fn new(shape: Shape, sequences: usize) -> Self {
        Self {
            shape,
            made: 0,
            cached: 0,
            times: None,
            sent: vec![(false, 0, 0); sequences],
        }
    }

    fn event(&self, choices: &Value) -> Value {
        json!({
            "id": self.shape.id,
            "object": "text_completion",
            "created": self.shape.created,
            "model": self.shape.model,
            "choices": choices,
        })
    }
}

impl Render for Chunks {
    fn chunks(&mut self, output: Output) -> Vec<String> {
        self.made += output.tokens.len();
        if let Some(SequenceEnd::Finished(finish)) = &output.end {
            self.cached = finish.cached_tokens;
            self.times.clone_from(&finish.times);
        }
        let index = output.index;
        let (started, made, offset) = self.sent[index];
        let made = made + output.tokens.len();
        let part = self.shape.part(&output, !started, offset);
        self.sent[index] = (true, made, offset + part.text.len());
        let prompt = &self.shape.prompts[self.shape.prompt_of(index)];
        let ids = self.shape.return_token_ids;
        let (reason, stop_reason) = reason(output.end);
        let mut event = self.event(&json!([{
            "index": index,
            "text": part.text,
            "logprobs": part.logprobs,
            "finish_reason": reason,
            "stop_reason": stop_reason,
            "prompt_token_ids": (ids && !started).then_some(prompt),
            "token_ids": ids.then_some(&output.tokens),
        }]));
        event["kv_transfer_params"] = Value::Null;
        if self.shape.usage_events == UsageEvents::Always {
            event["usage"] = streamed_usage(prompt.len(), made, None);
        }
        vec![event.to_string()]
    }

    fn usage(&mut self) -> Option<String> {
        if self.shape.usage_events == UsageEvents::Never {
            return None;
        }
        let prompt = self.shape.prompts.iter().map(|prompt| prompt.len()).sum();
        let mut event = self.event(&json!([]));
        event["usage"] = streamed_usage(prompt, self.made, self.shape.tells_cached.then_some(self.cached));
        if let Some(times) = self.times.as_ref().filter(|_| self.shape.tells_times) {
            event["metrics"] = times.to_json();
        }
        Some(event.to_string())
    }
}
