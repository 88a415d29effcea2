//! A server whose answers each test scripts, and a small run against it.
#![expect(clippy::unwrap_used, reason = "a failed helper must fail its test")]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::{StreamExt as _, stream};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use xpyd::bench::{self, Arrivals, Backend, Metric, Random, RangeRatio, Spec, Workload};

/// How the server handles one completion request.
#[derive(Debug, Clone, Copy)]
pub(super) enum Behaviour {
    /// Streams as many tokens as requested, two per chunk.
    Answer,
    /// Answers 500.
    Fail,
    /// Streams one token, then an error event.
    FailInStream,
    /// Streams one token, then ends.
    EndEarly,
    /// Streams one token, then breaks the connection.
    Break,
    /// Streams one token, then hangs.
    Hang,
}

type Script = Arc<dyn Fn(usize) -> Behaviour + Send + Sync>;

pub(super) struct Server {
    pub(super) address: SocketAddr,
    pub(super) seen: Arc<Mutex<Vec<(String, HeaderMap, Value)>>>,
    /// Ends the server when dropped.
    _task: JoinSet<()>,
}

#[derive(Clone)]
struct ServerState {
    script: Script,
    seen: Arc<Mutex<Vec<(String, HeaderMap, Value)>>>,
}

impl Server {
    /// Starts a server of the model `tiny`. `script` maps the number of a request, from 0, to a behaviour.
    pub(super) async fn start(script: impl Fn(usize) -> Behaviour + Send + Sync + 'static) -> Self {
        let seen = Arc::default();
        let fake = ServerState {
            script: Arc::new(script),
            seen: Arc::clone(&seen),
        };
        let app = Router::new()
            .route(
                "/v1/models",
                get(async || axum::Json(json!({"data": [{"id": "tiny", "root": "/models/tiny"}]}))),
            )
            .route("/v1/completions", post(complete))
            .route("/v1/chat/completions", post(complete))
            .with_state(fake);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut task = JoinSet::new();
        task.spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self {
            address,
            seen,
            _task: task,
        }
    }

    pub(super) fn spec(&self) -> Spec {
        spec(&format!("http://{}", self.address))
    }
}

/// Eight small concurrent requests to the model `tiny`.
pub(super) fn spec(base_url: &str) -> Spec {
    Spec {
        base_url: base_url.to_owned(),
        backend: Backend::Completions,
        endpoint: Backend::Completions.endpoint().to_owned(),
        model: "tiny".to_owned(),
        headers: HeaderMap::new(),
        workload: Workload::Random(Random {
            input_length: 16,
            output_length: 6,
            range_ratio: RangeRatio::default(),
            prefix_length: 0,
            vocabulary_size: 1000,
            prompt_count: 8,
            seed: 3,
        }),
        arrivals: Arrivals {
            request_rate: f64::INFINITY,
            burstiness: 1.0,
            ramp: None,
        },
        max_concurrency: None,
        ignore_eos: true,
        extra_body: serde_json::Map::new(),
        warmups: 0,
        request_timeout: Duration::from_mins(1),
        metrics: Metric::ALL.to_vec(),
        percentiles: vec![99.0],
        objectives: Vec::new(),
        keep_texts: true,
        options: bench::Options::default(),
        naming: bench::Naming::default(),
    }
}

async fn complete(State(fake): State<ServerState>, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    let body: Value = serde_json::from_slice(&body).unwrap();
    let is_chat = uri.path().contains("chat");
    let asked = if is_chat {
        &body["max_completion_tokens"]
    } else {
        &body["max_tokens"]
    }
    .as_u64()
    .unwrap();
    let index = {
        let mut seen = fake.seen.lock().unwrap();
        seen.push((uri.path().to_owned(), headers, body));
        seen.len() - 1
    };
    let token = |text: &str| {
        let choice = if is_chat {
            json!({"delta": {"content": text}})
        } else {
            json!({"text": text})
        };
        format!("data: {}\n\n", json!({"choices": [choice]}))
    };
    let one = stream::iter([Ok::<_, std::io::Error>(token(" x"))]);
    let body = match (fake.script)(index) {
        Behaviour::Fail => {
            let error = axum::Json(json!({"error": {"message": "out of luck"}}));
            return (StatusCode::INTERNAL_SERVER_ERROR, error).into_response();
        }
        Behaviour::Answer => {
            let usage = json!({"choices": [], "usage": {"prompt_tokens": 17, "completion_tokens": asked}});
            let mut events: Vec<String> = (0..asked.div_ceil(2)).map(|_| token(" x y")).collect();
            events.push(format!("data: {usage}\n\ndata: [DONE]\n\n"));
            Body::from_stream(stream::iter(events.into_iter().map(Ok::<_, std::io::Error>)))
        }
        Behaviour::FailInStream => {
            let error = "data: {\"error\":{\"message\":\"decoder1 died\"}}\n\ndata: [DONE]\n\n".to_owned();
            Body::from_stream(one.chain(stream::iter([Ok(error)])))
        }
        Behaviour::EndEarly => Body::from_stream(one),
        Behaviour::Break => Body::from_stream(one.chain(stream::once(async {
            // A pending body is flushed, so the client receives the token before the connection breaks.
            tokio::task::yield_now().await;
            Err(std::io::Error::other("cut"))
        }))),
        Behaviour::Hang => Body::from_stream(one.chain(stream::pending())),
    };
    ([("content-type", "text/event-stream")], body).into_response()
}
