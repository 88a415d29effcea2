//! `/v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::request::{Common, Job, Particulars, read};
use super::stream::{self, Render};
use super::{Api, ApiError, collect, event_stream, now, out_of_vocabulary, usage};
use crate::sim::sequence::{End, Output, TokenLogprob};
use crate::sim::tokens::{VOCABULARY, decode, encode};

/// The fields that only completions have.
#[derive(Debug, Deserialize)]
struct CompletionOnly {
    prompt: Option<Box<RawValue>>,
    echo: Option<bool>,
    logprobs: Option<u32>,
}

/// What an answer repeats in each of its parts.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    id: String,
    model: String,
    created: u64,
    /// By prompt, where the client asked for its echo.
    echo: Vec<String>,
    prompts: Vec<Arc<[u32]>>,
    choices: usize,
    return_token_ids: bool,
    include_usage: bool,
    tells_cached: bool,
}

/// Checks a request.
pub(super) fn prepare(api: &Api, common: &Common, body: &[u8], base: &str) -> Result<(Job, Shape), ApiError> {
    let only: CompletionOnly = read(body)?;
    api.check_model(common.model.as_deref())?;
    let raw = only
        .prompt
        .as_deref()
        .ok_or_else(|| ApiError::bad_request("prompt: Field required", Some("prompt")))?;
    let prompts = prompts(raw)?;
    let echo = only.echo.unwrap_or(false);
    let particulars = Particulars {
        id: format!("cmpl-{base}"),
        prompts,
        default_max_tokens: Some(16),
        logprobs: only.logprobs,
        needs_prompt: common.prompt_logprobs.is_some() || (echo && only.logprobs.is_some()),
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
        include_usage: job.include_usage,
        tells_cached: api.options.prompt_tokens_details,
    };
    Ok((job, shape))
}

/// A text, a list of texts, a list of tokens, or a list of those.
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

/// Answers, in one piece or as a stream.
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
    // For several prompts vLLM returns the parameters of the first.
    for output in outputs.iter_mut().rev() {
        if let Some(End::Finished(finish)) = &mut output.end {
            params = finish.kv_transfer_params.take();
            cached = finish.cached_tokens;
        }
    }
    let choices: Vec<Value> = outputs
        .into_iter()
        .map(|output| shape.choice(output, 0, true))
        .collect();
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

    /// One choice. `offset` is the length of its text before; `whole` says whether it is all of it.
    fn choice(&self, output: Output, offset: usize, whole: bool) -> Value {
        let prompt = self.prompt_of(output.index);
        let mut text = String::new();
        if offset == 0
            && let Some(echo) = self.echo.get(prompt)
        {
            text.clone_from(echo);
        }
        let logprobs = logprobs(&output.logprobs, offset + text.len());
        text.push_str(&output.text);
        let (reason, stop_reason) = match output.end {
            Some(End::Finished(finish)) => (Some(finish.reason), finish.stop_reason),
            _ => (None, Value::Null),
        };
        let mut choice = json!({
            "index": output.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": stop_reason,
            "token_ids": self.return_token_ids.then_some(&output.tokens),
            "prompt_token_ids": (self.return_token_ids && offset == 0).then(|| &self.prompts[prompt]),
        });
        if whole {
            choice["prompt_logprobs"] = Value::Null;
        }
        choice
    }
}

fn logprobs(of: &[TokenLogprob], offset: usize) -> Value {
    if of.is_empty() {
        return Value::Null;
    }
    let mut at = offset;
    let mut offsets = Vec::with_capacity(of.len());
    let mut tokens = Vec::with_capacity(of.len());
    for one in of {
        let text = decode(&[one.token]);
        offsets.push(at);
        at += text.len();
        tokens.push(text);
    }
    let top: Vec<Value> = of
        .iter()
        .map(|one| {
            one.top
                .iter()
                .map(|(token, logprob)| (decode(&[*token]), json!(logprob)))
                .collect()
        })
        .collect();
    json!({
        "text_offset": offsets,
        "token_logprobs": of.iter().map(|one| one.logprob).collect::<Vec<f64>>(),
        "tokens": tokens,
        "top_logprobs": top,
    })
}

/// The events of a streamed completion.
struct Chunks {
    shape: Shape,
    made: usize,
    cached: usize,
    /// Length of the text told, by choice.
    offsets: Vec<usize>,
}

impl Chunks {
    fn new(shape: Shape, sequences: usize) -> Self {
        Self {
            shape,
            made: 0,
            cached: 0,
            offsets: vec![0; sequences],
        }
    }

    fn event(&self, choices: &Value, usage: &Value) -> String {
        json!({
            "id": self.shape.id,
            "object": "text_completion",
            "created": self.shape.created,
            "model": self.shape.model,
            "choices": choices,
            "usage": usage,
        })
        .to_string()
    }
}

impl Render for Chunks {
    fn chunks(&mut self, output: Output) -> Vec<String> {
        self.made += output.tokens.len();
        if let Some(End::Finished(finish)) = &output.end {
            self.cached = finish.cached_tokens;
        }
        // A token whose text is still held back has no event of its own, as with vLLM.
        if output.text.is_empty() && output.end.is_none() && output.logprobs.is_empty() {
            return Vec::new();
        }
        let index = output.index;
        let offset = self.offsets[index];
        let choice = self.shape.choice(output, offset, false);
        self.offsets[index] += choice["text"].as_str().map_or(0, str::len);
        vec![self.event(&json!([choice]), &Value::Null)]
    }

    fn usage(&mut self) -> Option<String> {
        let usage = self.shape.usage(self.made, self.cached);
        self.shape.include_usage.then(|| self.event(&json!([]), &usage))
    }
}
