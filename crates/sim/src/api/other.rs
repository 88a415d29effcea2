//! The routes `/v1/responses` and `/v1/messages`: generation in OpenAI's newer API and in Anthropic's.
//!
//! Limited to text in and text out, complete or as named events.

use std::sync::Arc;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt as _;
use serde::Deserialize;
use serde_json::{Value, json};

use super::request::{CommonFields, Message, RouteSettings, read, template};
use super::{Api, ApiError, collect, event_stream, now, request_id};
use crate::engine_core::sequence::{Output, SequenceEnd};
use crate::engine_core::tokens::encode;

/// The fields of both routes that shape the prompt and the limit.
#[derive(Deserialize)]
struct PromptFields {
    input: Option<Value>,
    instructions: Option<String>,
    messages: Option<Vec<Message>>,
    system: Option<String>,
    max_output_tokens: Option<usize>,
}

/// A finished generation.
struct Generation {
    id: String,
    text: String,
    finish: Option<&'static str>,
    prompt: usize,
    made: usize,
}

impl PromptFields {
    fn messages(self) -> Result<Vec<Message>, ApiError> {
        let missing = || ApiError::bad_request("input: Field required", Some("input"));
        let system = self
            .instructions
            .or(self.system)
            .map(|text| Message::new("system", &text));
        let rest = match (self.messages, self.input) {
            (Some(messages), _) => messages,
            (None, Some(Value::String(text))) => vec![Message::new("user", &text)],
            (None, Some(list)) => serde_json::from_value(list).map_err(|_| missing())?,
            (None, None) => return Err(missing()),
        };
        Ok(system.into_iter().chain(rest).collect())
    }
}

async fn generate(api: &Api, headers: &HeaderMap, body: &Bytes) -> Result<(CommonFields, Generation), ApiError> {
    let common = CommonFields::read(body)?;
    let asked: PromptFields = read(body)?;
    api.check_model(common.model.as_deref())?;
    let id = request_id(headers, &common);
    let limit = asked.max_output_tokens;
    let prompt: Arc<[u32]> = encode(&template(&asked.messages()?)?).into();
    let mut job = common.check(
        api,
        RouteSettings {
            id: id.clone(),
            prompts: vec![Arc::clone(&prompt)],
            default_max_tokens: limit,
            logprobs: None,
            needs_prompt: false,
            echoes: false,
        },
    )?;
    job.stream = false;
    let output: Output = collect(api.start(&job).await?, 1).await?.remove(0);
    let done = Generation {
        id,
        text: output.text,
        finish: match output.end {
            Some(SequenceEnd::Finished(finish)) => Some(finish.reason),
            _ => None,
        },
        prompt: prompt.len(),
        made: output.tokens.len(),
    };
    Ok((common, done))
}

/// A response of named events.
fn named(events: Vec<(&'static str, Value)>) -> Response {
    let events = events.into_iter().map(|(name, mut data)| {
        data["type"] = json!(name);
        Ok::<_, std::convert::Infallible>(format!("event: {name}\ndata: {data}\n\n"))
    });
    event_stream(Body::from_stream(futures_util::stream::iter(events).boxed()))
}

/// `POST /v1/responses`.
pub(super) async fn responses(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, ApiError> {
    let (common, done) = generate(&api, &headers, &body).await?;
    let item = |text: &str, status: &str| {
        json!({"id": format!("msg_{}", done.id), "type": "message", "role": "assistant", "status": status,
            "content": [{"type": "output_text", "text": text, "annotations": [], "logprobs": null}]})
    };
    let is_cut = done.finish == Some("length");
    let whole = json!({
        "id": format!("resp_{}", done.id),
        "created_at": now(),
        "incomplete_details": is_cut.then(|| json!({"reason": "max_output_tokens"})),
        "model": api.options.served_model_name,
        "object": "response",
        "output": [item(&done.text, "completed")],
        "parallel_tool_calls": true,
        "tool_choice": "auto",
        "tools": [],
        "status": if is_cut { "incomplete" } else { "completed" },
        "usage": {"input_tokens": done.prompt, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": done.made,
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": done.prompt + done.made},
    });
    if common.stream != Some(true) {
        return Ok(Json(whole).into_response());
    }
    let mut begun = whole.clone();
    (begun["status"], begun["output"], begun["usage"]) = (json!("in_progress"), json!([]), Value::Null);
    let place = json!({"item_id": format!("msg_{}", done.id), "output_index": 0, "content_index": 0});
    let with = |key: &str, value: Value| {
        let mut event = place.clone();
        event[key] = value;
        event
    };
    let mut events = vec![
        ("response.created", json!({"response": begun})),
        ("response.output_item.added", with("item", item("", "in_progress"))),
    ];
    let words = done.text.split_inclusive(' ');
    events.extend(words.map(|word| ("response.output_text.delta", with("delta", json!(word)))));
    events.push(("response.output_text.done", with("text", json!(done.text))));
    events.push(("response.output_item.done", with("item", item(&done.text, "completed"))));
    let end = if is_cut {
        "response.incomplete"
    } else {
        "response.completed"
    };
    events.push((end, json!({"response": whole})));
    for (number, (_, event)) in events.iter_mut().enumerate() {
        event["sequence_number"] = json!(number);
    }
    Ok(named(events))
}

/// `POST /v1/messages`.
pub(super) async fn messages(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, ApiError> {
    let (common, done) = generate(&api, &headers, &body).await?;
    let reason = if done.finish == Some("length") {
        "max_tokens"
    } else {
        "end_turn"
    };
    let whole = json!({
        "id": format!("msg_{}", done.id),
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": done.text}],
        "model": api.options.served_model_name,
        "stop_reason": reason,
        "stop_sequence": null,
        "usage": {"input_tokens": done.prompt, "output_tokens": done.made},
    });
    if common.stream != Some(true) {
        return Ok(Json(whole).into_response());
    }
    let mut begun = whole;
    (begun["content"], begun["stop_reason"]) = (json!([]), Value::Null);
    begun["usage"]["output_tokens"] = json!(0);
    let mut events = vec![
        ("message_start", json!({"message": begun})),
        (
            "content_block_start",
            json!({"index": 0, "content_block": {"type": "text", "text": ""}}),
        ),
    ];
    let words = done.text.split_inclusive(' ');
    events.extend(words.map(|word| {
        let delta = json!({"index": 0, "delta": {"type": "text_delta", "text": word}});
        ("content_block_delta", delta)
    }));
    events.push(("content_block_stop", json!({"index": 0})));
    let end = json!({"delta": {"stop_reason": reason, "stop_sequence": null}, "usage": {"output_tokens": done.made}});
    events.push(("message_delta", end));
    events.push(("message_stop", json!({})));
    Ok(named(events))
}

/// `POST /v1/messages/count_tokens`.
pub(super) async fn count_tokens(State(api): State<Arc<Api>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    let common = CommonFields::read(&body)?;
    api.check_model(common.model.as_deref())?;
    let messages = read::<PromptFields>(&body)?.messages()?;
    Ok(Json(json!({"input_tokens": encode(&template(&messages)?).len()})))
}
