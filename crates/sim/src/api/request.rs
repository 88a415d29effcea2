//! Request bodies: the common fields of completions and chats, and vLLM's checks.

use std::sync::Arc;

use axum::http::StatusCode;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::structured::{StructuredOutputs, texts};
use super::{Api, ApiError};
use crate::engine_core::sequence::Sampling;
use crate::engine_core::tokens::encode;
use crate::kv::params::{self, Transfer};

/// The common fields of completions and chats.
#[derive(Debug, Deserialize)]
pub(super) struct CommonFields {
    pub(super) model: Option<String>,
    pub(super) max_tokens: Option<i64>,
    pub(super) max_completion_tokens: Option<i64>,
    min_tokens: Option<i64>,
    pub(super) stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    n: Option<i64>,
    use_beam_search: Option<bool>,
    structured_outputs: Option<StructuredOutputs>,
    response_format: Option<Value>,
    temperature: Option<f64>,
    seed: Option<i64>,
    stop: Option<Box<RawValue>>,
    stop_token_ids: Option<Vec<u32>>,
    include_stop_str_in_output: Option<bool>,
    ignore_eos: Option<bool>,
    pub(super) return_token_ids: Option<bool>,
    pub(super) prompt_logprobs: Option<i64>,
    pub(super) kv_transfer_params: Option<Map<String, Value>>,
    pub(super) request_id: Option<String>,
    cache_salt: Option<String>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

/// When a stream reports its usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum UsageEvents {
    Never,
    /// In a separate event before the end.
    AtEnd,
    /// In a separate event and in every chunk.
    Always,
}

/// One message of a chat.
#[derive(Debug, Deserialize)]
pub(super) struct Message {
    role: String,
    content: Option<Box<RawValue>>,
}

impl Message {
    /// A text message.
    pub(super) fn new(role: &str, text: &str) -> Self {
        Self {
            role: role.to_owned(),
            content: serde_json::value::to_raw_value(text).ok(),
        }
    }
}

/// One part of the content of a message.
#[derive(Debug, Deserialize)]
struct ContentPart {
    text: Option<String>,
}

/// A valid request: the data for the core and for the answer.
#[derive(Debug)]
pub(super) struct Job {
    /// `cmpl-<base>` or `chatcmpl-<base>`.
    pub(super) id: String,
    pub(super) prompts: Vec<Arc<[u32]>>,
    /// Prompts.
    pub(super) max_tokens: Vec<usize>,
    /// Answers per prompt.
    pub(super) choices: usize,
    pub(super) sampling: Sampling,
    pub(super) temperature: f64,
    pub(super) seed: Option<i64>,
    pub(super) stream: bool,
    pub(super) usage_events: UsageEvents,
    /// Whether only the prompt was requested. One token is still generated, as in vLLM.
    pub(super) prompt_only: bool,
    pub(super) return_token_ids: bool,
    pub(super) transfer: Transfer,
    pub(super) cache_salt: Option<String>,
}

/// The settings that differ between the two routes.
pub(super) struct RouteSettings {
    pub(super) id: String,
    pub(super) prompts: Vec<Arc<[u32]>>,
    /// `max_tokens` when the client gave none; `None` fills the context.
    pub(super) default_max_tokens: Option<usize>,
    pub(super) logprobs: Option<u32>,
    /// Whether prompt probabilities are requested: then the prompt is computed, never pulled.
    pub(super) needs_prompt: bool,
    /// Whether zero tokens are allowed, because the prompt is echoed.
    pub(super) echoes: bool,
}

/// Parses a body. The error names the invalid field.
pub(super) fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| ApiError {
        status: StatusCode::BAD_REQUEST,
        kind: "Bad Request",
        message: error.to_string(),
        param: None,
    })
}

impl CommonFields {
    /// Parses the common fields and makes the checks of vLLM's schema.
    pub(super) fn read(body: &[u8]) -> Result<Self, ApiError> {
        let common: Self = read(body)?;
        if common.stream_options.is_some() && common.stream != Some(true) {
            return Err(ApiError::bad_request(
                "Stream options can only be defined when `stream=True`.",
                Some("stream_options"),
            ));
        }
        Ok(common)
    }

    /// Makes the checks that depend on the engine's limits.
    pub(super) fn check(&self, api: &Api, of: RouteSettings) -> Result<Job, ApiError> {
        let limit = api.options.max_model_len as usize;
        let given = self.max_completion_tokens.or(self.max_tokens);
        let prompt_only = of.echoes && given == Some(0);
        let given = if prompt_only { Some(1) } else { given };
        if let Some(wrong) = given.filter(|given| *given < 1) {
            let message = format!("max_tokens must be at least 1, got {wrong}.");
            return Err(ApiError::bad_request(message, Some("max_tokens")));
        }
        let given = given.and_then(|given| usize::try_from(given).ok());
        let mut max_tokens = Vec::with_capacity(of.prompts.len());
        for prompt in &of.prompts {
            max_tokens.push(room(limit, prompt.len(), given, of.default_max_tokens)?);
        }
        let least = max_tokens.iter().copied().min().unwrap_or(0);
        let min_tokens = usize::try_from(self.min_tokens.unwrap_or(0)).unwrap_or(0);
        if min_tokens > least {
            let message = format!("min_tokens must be less than or equal to max_tokens={least}, got {min_tokens}.");
            return Err(ApiError::bad_request(message, Some("min_tokens")));
        }
        let temperature = self.temperature.unwrap_or(1.0);
        let choices = usize::try_from(self.n.unwrap_or(1)).unwrap_or(0);
        if choices == 0 {
            return Err(ApiError::bad_request("n must be at least 1.", Some("n")));
        }
        let beams = self.use_beam_search.unwrap_or(false);
        if beams && self.stream == Some(true) {
            let message = "Streaming is not currently supported with beam search";
            return Err(ApiError::bad_request(message, None));
        }
        if choices > 1 && temperature == 0.0 && !beams {
            let message = format!("n must be 1 when using greedy sampling, got {choices}.");
            return Err(ApiError::bad_request(message, Some("n")));
        }
        let params = self.kv_transfer_params.as_ref();
        let mut transfer = params::read(api.kind, params);
        if of.needs_prompt && matches!(transfer, Transfer::Pull(_)) {
            transfer = Transfer::None;
        }
        Ok(Job {
            id: of.id,
            prompts: of.prompts,
            max_tokens,
            choices,
            sampling: Sampling {
                max_tokens: 0,
                min_tokens,
                ignore_eos: self.ignore_eos.unwrap_or(false),
                stop: self.stop_strings()?,
                stop_token_ids: self.stop_token_ids.clone().unwrap_or_default(),
                include_stop: self.include_stop_str_in_output.unwrap_or(false),
                salt: 0,
                logprobs: of.logprobs,
                allowed: texts(self.structured_outputs.as_ref(), self.response_format.as_ref())?
                    .map(|texts| texts.iter().map(|text| encode(text)).collect()),
            },
            // Beams differ at any temperature, and always in the same way.
            temperature: if beams { 1.0 } else { temperature },
            seed: if beams { None } else { self.seed },
            stream: self.stream.unwrap_or(false),
            usage_events: self.usage_events(),
            prompt_only,
            return_token_ids: self.return_token_ids.unwrap_or(false),
            transfer,
            cache_salt: self.cache_salt.clone(),
        })
    }

    fn usage_events(&self) -> UsageEvents {
        let options = self.stream_options.as_ref();
        match options.map(|options| (options.include_usage, options.continuous_usage_stats)) {
            Some((Some(true), Some(true))) => UsageEvents::Always,
            Some((Some(true), _)) => UsageEvents::AtEnd,
            _ => UsageEvents::Never,
        }
    }

    /// Parses `stop`: a text or a list of texts.
    fn stop_strings(&self) -> Result<Vec<String>, ApiError> {
        let Some(raw) = &self.stop else {
            return Ok(Vec::new());
        };
        let mut stop = if raw.get().starts_with('[') {
            read::<Vec<String>>(raw.get().as_bytes())?
        } else {
            vec![read::<String>(raw.get().as_bytes())?]
        };
        stop.retain(|text| !text.is_empty());
        Ok(stop)
    }
}

/// The allowed number of output tokens for a prompt.
fn room(limit: usize, prompt: usize, given: Option<usize>, default: Option<usize>) -> Result<usize, ApiError> {
    if prompt == 0 {
        return Err(ApiError::bad_request(
            "The decoder prompt cannot be empty",
            Some("prompt"),
        ));
    }
    let left = limit.saturating_sub(prompt);
    let wanted = given.unwrap_or(1);
    if wanted > left {
        let message = format!(
            "This model's maximum context length is {limit} tokens. However, you requested {wanted} output tokens and \
             your prompt contains {prompt} input tokens, for a total of {} tokens. Please reduce the length of the \
             input prompt or the number of requested output tokens.",
            prompt + wanted
        );
        return Err(ApiError::bad_request(message, Some("input_tokens")));
    }
    Ok(given.unwrap_or_else(|| default.unwrap_or(left).min(left)))
}

/// Renders a chat as text.
pub(super) fn template(messages: &[Message]) -> Result<String, ApiError> {
    let mut text = String::new();
    for message in messages {
        text.push_str("<|");
        text.push_str(&message.role);
        text.push_str("|>\n");
        match &message.content {
            None => {}
            Some(raw) if raw.get().starts_with('"') => text.push_str(&read::<String>(raw.get().as_bytes())?),
            Some(raw) => {
                for part in read::<Vec<ContentPart>>(raw.get().as_bytes())? {
                    text.push_str(part.text.as_deref().unwrap_or_default());
                }
            }
        }
        text.push('\n');
    }
    text.push_str("<|assistant|>\n");
    Ok(text)
}
