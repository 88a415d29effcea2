//! The HTTP API: vLLM's routes, and the common steps of every request before the scheduler.

mod chat;
mod completion;
mod other;
mod prompt_logprobs;
mod request;
mod stream;
mod structured;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes};
use axum::extract::{self, DefaultBodyLimit, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

use crate::engine_core::scheduler::{Command, EngineStage};
use crate::engine_core::sequence::{Output, Request, Sampling, SequenceEnd};
use crate::engine_core::tokens::{VOCABULARY, decode, encode};
use crate::kv::blocks::BlockPool;
use crate::kv::params::{self, ConnectorKind, Transfer};
use crate::metrics::Metrics;
use crate::options::Options;
use request::{CommonFields, Job};

/// Largest body of a request, in bytes.
const MAX_BODY: usize = 64 << 20;

/// The state that handlers share.
#[derive(Debug)]
pub(crate) struct Api {
    pub(crate) options: Arc<Options>,
    pub(crate) kind: ConnectorKind,
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) stage: watch::Receiver<EngineStage>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) pool: BlockPool,
}

/// An error in OpenAI's shape.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<&'static str>,
}

impl ApiError {
    fn bad_request(message: impl Into<String>, param: Option<&'static str>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            kind: "BadRequestError",
            message: message.into(),
            param,
        }
    }

    fn not_found(message: impl Into<String>, param: Option<&'static str>) -> Self {
        Self {
            status: StatusCode::NOT_FOUND,
            kind: "NotFoundError",
            message: message.into(),
            param,
        }
    }

    fn internal(message: &str) -> Self {
        Self {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            kind: "InternalServerError",
            message: message.to_owned(),
            param: None,
        }
    }

    /// The error after a failed KV load or an expired drain.
    fn failed() -> Self {
        Self::internal("Internal server error")
    }

    /// The error of a dead core.
    fn dead() -> Self {
        Self::internal("The server had an error while processing your request.")
    }

    fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status.as_u16()}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(self.body())).into_response()
    }
}

/// All routes.
pub(crate) fn router(api: Arc<Api>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/ping", get(health).post(health))
        .route(
            "/version",
            get(async || Json(json!({"version": crate::VLLM_VERSION, "simulated": true}))),
        )
        .route("/load", get(async || Json(json!({"server_load": 0}))))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/responses", post(other::responses))
        .route("/v1/messages", post(other::messages))
        .route("/v1/messages/count_tokens", post(other::count_tokens))
        .fallback(async || (StatusCode::NOT_FOUND, Json(json!({"detail": "Not Found"}))))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&api), authenticate))
        .with_state(api)
}

/// As in vLLM's `authenticate.py`: only paths with these prefixes need a key.
async fn authenticate(State(api): State<Arc<Api>>, request: extract::Request, next: Next) -> Response {
    const GUARDED: [&str; 4] = ["/v1", "/v2", "/inference", "/cohere"];
    let keys = &api.options.api_keys;
    let is_guarded = GUARDED.iter().any(|prefix| request.uri().path().starts_with(prefix));
    let header = request.headers().get(header::AUTHORIZATION);
    let given = header.and_then(|value| value.to_str().ok()?.split_once(' '));
    let is_known = given
        .is_some_and(|(scheme, given)| scheme.eq_ignore_ascii_case("bearer") && keys.iter().any(|key| key == given));
    if keys.is_empty() || !is_guarded || is_known || request.method() == Method::OPTIONS {
        return next.run(request).await;
    }
    (StatusCode::UNAUTHORIZED, Json(json!({"error": "Unauthorized"}))).into_response()
}

async fn health(State(api): State<Arc<Api>>) -> StatusCode {
    if *api.stage.borrow() == EngineStage::Dead {
        StatusCode::SERVICE_UNAVAILABLE
    } else {
        StatusCode::OK
    }
}

async fn metrics(State(api): State<Arc<Api>>) -> Response {
    let page = api
        .metrics
        .render(&api.options.served_model_name, api.pool.usage(), api.pool.total());
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
        page,
    )
        .into_response()
}

async fn models(State(api): State<Arc<Api>>) -> Json<Value> {
    let options = &api.options;
    Json(json!({"object": "list", "data": [{
        "id": options.served_model_name,
        "object": "model",
        "created": now(),
        "owned_by": "vllm",
        "root": options.model,
        "parent": null,
        "max_model_len": options.max_model_len,
        "permission": [],
    }]}))
}

#[derive(Deserialize)]
struct TokenizeBody {
    prompt: Option<String>,
    messages: Option<Vec<request::Message>>,
    #[serde(default)]
    return_token_strs: bool,
}

async fn tokenize(State(api): State<Arc<Api>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    let body: TokenizeBody = request::read(&body)?;
    let tokens = match (&body.prompt, &body.messages) {
        (Some(prompt), _) => encode(prompt),
        (None, Some(messages)) => encode(&request::template(messages)?),
        (None, None) => {
            return Err(ApiError::bad_request(
                "prompt or messages: Field required",
                Some("prompt"),
            ));
        }
    };
    let strings: Option<Vec<String>> = body
        .return_token_strs
        .then(|| tokens.iter().map(|token| decode(&[*token])).collect());
    Ok(Json(json!({
        "count": tokens.len(),
        "max_model_len": api.options.max_model_len,
        "tokens": tokens,
        "token_strs": strings,
    })))
}

#[derive(Deserialize)]
struct DetokenizeBody {
    tokens: Vec<u32>,
}

async fn detokenize(body: Bytes) -> Result<Json<Value>, ApiError> {
    let body: DetokenizeBody = request::read(&body)?;
    if let Some(token) = body.tokens.iter().find(|token| **token >= VOCABULARY) {
        return Err(out_of_vocabulary(*token));
    }
    Ok(Json(json!({"prompt": decode(&body.tokens)})))
}

fn out_of_vocabulary(token: u32) -> ApiError {
    ApiError::bad_request(format!("Token id {token} is out of vocabulary"), Some("prompt"))
}

async fn completions(State(api): State<Arc<Api>>, headers: HeaderMap, body: Bytes) -> Result<Response, ApiError> {
    let common = CommonFields::read(&body)?;
    let base = request_id(&headers, &common);
    // From here on a rejection frees the blocks that a prefill engine keeps for the request.
    match completion::prepare(&api, &common, &body, &base) {
        Ok((job, shape)) => completion::answer(&api, job, shape).await,
        Err(error) => Err(api.refuse(&common, error)),
    }
}

async fn chat_completions(State(api): State<Arc<Api>>, headers: HeaderMap, body: Bytes) -> Result<Response, ApiError> {
    let common = CommonFields::read(&body)?;
    let only = chat::ChatOnly::read(&body)?;
    let base = request_id(&headers, &common);
    match chat::prepare(&api, &common, &only, &base) {
        Ok((job, shape)) => chat::answer(&api, job, shape).await,
        Err(error) => Err(api.refuse(&common, error)),
    }
}

/// The base of all ids of a request: the client's, or a new one.
fn request_id(headers: &HeaderMap, common: &CommonFields) -> String {
    headers
        .get("x-request-id")
        .and_then(|value| value.to_str().ok())
        .map(str::to_owned)
        .or_else(|| common.request_id.clone())
        .unwrap_or_else(|| uuid::Uuid::new_v4().simple().to_string())
}

impl Api {
    /// Rejects a request and frees the blocks that its parameters name.
    fn refuse(&self, common: &CommonFields, error: ApiError) -> ApiError {
        if let Transfer::Pull(params) = params::read(self.kind, common.kv_transfer_params.as_ref()) {
            // If the queue is full, the lease expires later.
            drop(self.commands.try_send(Command::Release(params)));
        }
        error
    }

    /// Checks that the model is the served one or absent.
    fn check_model(&self, model: Option<&str>) -> Result<(), ApiError> {
        match model {
            Some(name) if name != self.options.served_model_name && !name.is_empty() => Err(ApiError::not_found(
                format!("The model `{name}` does not exist."),
                Some("model"),
            )),
            _ => Ok(()),
        }
    }

    /// Sends all sequences of a job to the core. Returns the channel of their outputs.
    async fn start(&self, job: &Job) -> Result<mpsc::Receiver<Output>, ApiError> {
        match *self.stage.borrow() {
            EngineStage::Serving => {}
            EngineStage::Dead => return Err(ApiError::dead()),
            EngineStage::Draining | EngineStage::Aborting | EngineStage::DrainOver => {
                return Err(ApiError::internal("cannot schedule new futures after shutdown"));
            }
        }
        let sequences = job.prompts.len() * job.choices;
        let news = if job.stream {
            job.max_tokens.iter().max().copied().unwrap_or(1) + 1
        } else {
            1
        };
        let (output, receiver) = mpsc::channel(sequences * news);
        for (position, prompt) in job.prompts.iter().enumerate() {
            for choice in 0..job.choices {
                let index = position * job.choices + choice;
                let request = Request {
                    id: format!("{}-{index}-{:08x}", job.id, rand::random::<u32>()),
                    index,
                    prompt: Arc::clone(prompt),
                    sampling: Sampling {
                        max_tokens: job.max_tokens[position],
                        salt: Sampling::salt_of(job.temperature, job.seed, choice),
                        ..job.sampling.clone()
                    },
                    stream: job.stream,
                    transfer: job.transfer.clone(),
                    cache_salt: job.cache_salt.clone(),
                    output: output.clone(),
                };
                let added = self.commands.send(Command::Add(request)).await;
                added.map_err(|_| ApiError::dead())?;
            }
        }
        Ok(receiver)
    }
}

/// Waits for all sequences of a request without streaming, sorted by index.
async fn collect(mut news: mpsc::Receiver<Output>, sequences: usize) -> Result<Vec<Output>, ApiError> {
    let mut outputs = Vec::with_capacity(sequences);
    while outputs.len() < sequences {
        let output = news.recv().await.ok_or_else(ApiError::dead)?;
        if matches!(output.end, Some(SequenceEnd::Failed)) {
            return Err(ApiError::failed());
        }
        outputs.push(output);
    }
    outputs.sort_unstable_by_key(|output| output.index);
    Ok(outputs)
}

/// The `usage` object. `cached` is only included if the engine was started with that option.
fn usage(prompt: usize, completion: usize, cached: Option<usize>) -> Value {
    json!({
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": cached.map(|cached_tokens| json!({
            "cached_tokens": cached_tokens, "created_cache_tokens": null, "multimodal_tokens": null,
        })),
        "completion_tokens_details": null,
    })
}

/// The `usage` of a stream, which omits empty fields.
fn streamed_usage(prompt: usize, completion: usize, cached: Option<usize>) -> Value {
    let mut usage = json!({
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
    });
    if let Some(cached_tokens) = cached {
        usage["prompt_tokens_details"] = json!({"cached_tokens": cached_tokens});
    }
    usage
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs())
}

/// An event stream.
fn event_stream(body: Body) -> Response {
    ([(header::CONTENT_TYPE, "text/event-stream; charset=utf-8")], body).into_response()
}
