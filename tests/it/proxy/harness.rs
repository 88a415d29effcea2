//! Scripted engines, and a proxy over them in the test process.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, Response, StatusCode};
use bytes::Bytes;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use xpyd::connector::{Connector, FirstToken, LmCache, Nixl};
use xpyd::fleet::{
    Endpoint, EngineId, EngineState, EngineView, FleetStage, FleetView, Incarnation, Load, Receiver, Role,
};
use xpyd::proxy::{Notifications, Parts, Proxy, Settings};
use xpyd::proxy_config::{ProxyConfig, RequestDeadlines};

pub(crate) use crate::support::DEADLINE;

/// A request that a scripted engine received.
#[derive(Debug, Clone)]
pub(crate) struct SeenRequest {
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) raw: String,
}

impl SeenRequest {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.raw).unwrap_or(Value::Null)
    }

    pub(crate) fn id(&self) -> &str {
        self.headers["x-request-id"].to_str().unwrap()
    }
}

type ResponseFuture = Pin<Box<dyn Future<Output = Response<Body>> + Send>>;

/// An HTTP server in place of an engine. The test scripts its responses, and it records its requests.
pub(crate) struct ScriptedEngine {
    pub(crate) port: u16,
    seen: watch::Receiver<Vec<SeenRequest>>,
    _server: JoinSet<()>,
}

impl ScriptedEngine {
    /// An engine that answers every request with this response, once `go` is cancelled.
    pub(crate) async fn held_until(
        go: &CancellationToken,
        answer: impl Fn() -> Response<Body> + Send + Sync + 'static,
    ) -> Self {
        let (go, answer) = (go.clone(), Arc::new(answer));
        Self::start(move |_| {
            let (go, answer) = (go.clone(), Arc::clone(&answer));
            async move {
                go.cancelled().await;
                answer()
            }
        })
        .await
    }

    /// An engine that answers each request with the response of `script`.
    pub(crate) async fn start<F>(script: impl Fn(SeenRequest) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sender, seen) = watch::channel(Vec::new());
        let script: Arc<dyn Fn(SeenRequest) -> ResponseFuture + Send + Sync> =
            Arc::new(move |seen| Box::pin(script(seen)));
        let sender = Arc::new(sender);
        let router = Router::new().fallback(move |request: Request| {
            let (script, sender) = (Arc::clone(&script), Arc::clone(&sender));
            async move {
                let (head, body) = request.into_parts();
                let body = body.collect().await.unwrap().to_bytes();
                let seen = SeenRequest {
                    path: head.uri.path().to_owned(),
                    headers: head.headers,
                    raw: String::from_utf8(body.to_vec()).unwrap(),
                };
                sender.send_modify(|all: &mut Vec<SeenRequest>| all.push(seen.clone()));
                script(seen).await
            }
        });
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self {
            port,
            seen,
            _server: server,
        }
    }

    pub(crate) fn requests(&self) -> Vec<SeenRequest> {
        self.seen.borrow().clone()
    }

    /// Waits until the engine has received `count` requests.
    pub(crate) async fn wait_for_requests(&self, count: usize) -> Vec<SeenRequest> {
        let mut seen = self.seen.clone();
        let all = tokio::time::timeout(DEADLINE, seen.wait_for(|all| all.len() >= count)).await;
        all.expect("the engine received too few requests").unwrap().clone()
    }
}

/// A port without a listener.
pub(crate) async fn dead_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

pub(crate) fn json_response(status: u16, body: impl Into<Body>) -> Response<Body> {
    Response::builder()
        .status(StatusCode::from_u16(status).unwrap())
        .header("content-type", "application/json")
        .body(body.into())
        .unwrap()
}

pub(crate) fn sse_response(chunks: Vec<Result<&'static str, &'static str>>) -> Response<Body> {
    let frames = chunks
        .into_iter()
        .map(|chunk| chunk.map(Bytes::from).map_err(std::io::Error::other));
    event_stream(Body::from_stream(futures_util::stream::iter(frames)))
}

pub(crate) fn event_stream(body: Body) -> Response<Body> {
    Response::builder()
        .header("content-type", "text/event-stream; charset=utf-8")
        .body(body)
        .unwrap()
}

/// An error response in vLLM's shape.
pub(crate) fn error_response(status: u16, message: &str) -> Response<Body> {
    json_response(
        status,
        json!({"error": {"message": message, "type": "T", "param": null, "code": status}}).to_string(),
    )
}

/// The transfer parameters of a NIXL prefill engine, with unusual spacing, so that a rewrite of the bytes is visible.
pub(crate) const PARAMS: &str = r#"{"do_remote_prefill": true, "do_remote_decode":false,"remote_block_ids":[[1, 2]],"remote_engine_id":"e","remote_request_id":"r","remote_host":"127.0.0.1","remote_port":5600,"tp_size":1,"transfer_mode":"pull","future":1.50}"#;

/// The response of a NIXL prefill engine.
pub(crate) fn nixl_prefill_response() -> Response<Body> {
    json_response(
        200,
        format!(r#"{{"id":"x","choices":[{{"text":"t","finish_reason":"length"}}],"kv_transfer_params":{PARAMS}}}"#),
    )
}

/// The whole response of a decode engine, with unusual spacing, so that a rewrite of the bytes is visible.
pub(crate) const COMPLETION: &str =
    "{\"id\":\"cmpl-1\", \"choices\":[{\"text\":\" world\",\"finish_reason\":\"length\"}],\n\"new_field\":1.50}";

/// A proxy over scripted engines, and the view of the fleet that it reads.
pub(crate) struct ProxyHarness {
    pub(crate) proxy: Proxy,
    pub(crate) url: String,
    pub(crate) fleet: watch::Sender<Arc<FleetView>>,
    stop: CancellationToken,
    serving: JoinSet<std::io::Result<()>>,
}

pub(crate) fn lmcache(first_token: FirstToken) -> Connector {
    Connector::LmCache(LmCache {
        first_token,
        prefill_buffer_bytes: 0,
        decode_buffer_bytes: 0,
    })
}

pub(crate) fn settings(connector: Connector) -> Settings {
    Settings {
        connector,
        served_model_name: "m".into(),
        notifications: None,
        deadlines: RequestDeadlines {
            prefill: DEADLINE,
            handoff: DEADLINE,
            decode_idle: DEADLINE,
            kv_lease: None,
        },
        asks_engines: false,
        parts: Parts::default(),
        config: ProxyConfig {
            max_body: 10_000,
            max_in_flight: 8,
            ..ProxyConfig::default()
        },
    }
}

fn engine(role: Role, index: usize, port: u16, ranks: u16) -> Arc<EngineView> {
    let ports = |base: u16| (0..ranks).map(|rank| base + rank).collect();
    Arc::new(EngineView {
        id: EngineId::new(role, index),
        role,
        incarnation: Incarnation::FIRST,
        state: EngineState::Ready,
        endpoint: Endpoint {
            host: "127.0.0.1".into(),
            port,
            tensor_parallel: ranks,
            receiver: (role == Role::Decode).then(|| Receiver {
                host: "127.0.0.1".into(),
                init_ports: ports(7300),
                alloc_ports: ports(7400),
            }),
        },
        pid: None,
        reason: None,
        restart_at: None,
        load: Arc::new(Load::default()),
    })
}

impl ProxyHarness {
    /// A proxy with the NIXL connector over engines on these ports.
    pub(crate) async fn nixl(prefill: &[u16], decode: &[u16]) -> Self {
        Self::start(settings(Connector::Nixl(Nixl {})), prefill, decode, 1, None).await
    }

    pub(crate) async fn start(
        settings: Settings,
        prefill: &[u16],
        decode: &[u16],
        ranks: u16,
        notifications: Option<Notifications>,
    ) -> Self {
        let views = |role, ports: &[u16]| -> Vec<Arc<EngineView>> {
            let ports = ports.iter().enumerate();
            ports.map(|(index, port)| engine(role, index, *port, ranks)).collect()
        };
        let engines = [views(Role::Prefill, prefill), views(Role::Decode, decode)].concat();
        let (fleet, view) = watch::channel(Arc::new(FleetView {
            generation: 1,
            stage: FleetStage::Ready,
            engines,
        }));
        let proxy = Proxy::new(settings, view, notifications);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let stop = CancellationToken::new();
        let mut serving = JoinSet::new();
        serving.spawn(proxy.clone().serve(listener, stop.clone()));
        Self {
            proxy,
            url,
            fleet,
            stop,
            serving,
        }
    }

    pub(crate) fn post(&self, path: &str, body: impl Into<reqwest::Body>) -> reqwest::RequestBuilder {
        reqwest::Client::new()
            .post(format!("{}{path}", self.url))
            .header("content-type", "application/json")
            .body(body)
    }

    pub(crate) async fn complete(&self, body: impl Into<reqwest::Body>) -> (u16, String) {
        let response = self.post("/v1/completions", body).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    pub(crate) async fn get(&self, path: &str) -> reqwest::Response {
        reqwest::get(format!("{}{path}", self.url)).await.unwrap()
    }

    /// Publishes a changed fleet view, like the supervisor.
    pub(crate) fn change(&self, change: impl FnOnce(&mut FleetView)) {
        let mut view = FleetView::clone(&self.fleet.borrow());
        view.generation += 1;
        change(&mut view);
        self.fleet.send_replace(Arc::new(view));
    }

    /// Marks the engine as failed and closes its load.
    pub(crate) fn lose(&self, role: Role, index: usize) {
        let id = EngineId::new(role, index);
        self.change(|view| {
            let engine = Arc::make_mut(view.engines.iter_mut().find(|engine| engine.id == id).unwrap());
            engine.state = EngineState::Failed;
            engine.load.close();
        });
    }

    /// Stops the proxy, which finishes its cleanups, and checks that no request, hand-off or load is left.
    pub(crate) async fn finish(mut self) {
        self.stop.cancel();
        let ended = tokio::time::timeout(DEADLINE, self.serving.join_next()).await;
        ended.expect("the proxy did not stop").unwrap().unwrap().unwrap();
        assert_eq!(self.proxy.in_flight(), 0, "requests were left in flight");
        let open = self.metric("xpyd_handoffs_open ");
        assert_eq!(open, "0", "hand-offs were left open");
        for engine in &self.fleet.borrow().engines {
            assert!(engine.load.is_idle(), "{} is left loaded: {:?}", engine.id, engine.load);
        }
    }

    /// The value of the first sample whose line starts with `beginning`; empty if there is none.
    pub(crate) fn metric(&self, beginning: &str) -> String {
        let text = self.proxy.metrics_text();
        let value = text.lines().find_map(|line| line.strip_prefix(beginning));
        value.unwrap_or_default().trim().to_owned()
    }
}

/// Cancels its token when it is dropped, which shows that a connection ended.
pub(crate) struct CancelOnDrop(pub(crate) CancellationToken);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// A task that runs beside the test. Dropping it aborts the task.
pub(crate) struct BackgroundTask<T>(JoinSet<T>);

impl<T: Send + 'static> BackgroundTask<T> {
    pub(crate) fn start(future: impl Future<Output = T> + Send + 'static) -> Self {
        let mut task = JoinSet::new();
        task.spawn(future);
        Self(task)
    }

    /// Waits for the result of the task.
    pub(crate) async fn end(mut self) -> T {
        within_deadline("the end", self.0.join_next()).await.unwrap().unwrap()
    }
}

/// Waits for the future, and panics with `what` after [`DEADLINE`].
pub(crate) async fn within_deadline<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future)
        .await
        .unwrap_or_else(|_| panic!("{what} did not happen"))
}

/// A response that does not depend on the request.
pub(crate) type Script = fn() -> Response<Body>;

/// Gives these responses in order, and repeats the last one.
pub(crate) fn responses_in_turn(answers: Vec<Script>) -> impl Fn(SeenRequest) -> std::future::Ready<Response<Body>> {
    let next = Mutex::new(0);
    move |_| {
        let mut next = next.lock().unwrap();
        let answer = answers[(*next).min(answers.len() - 1)];
        *next += 1;
        std::future::ready(answer())
    }
}

pub(crate) async fn prefill_engine() -> ScriptedEngine {
    ScriptedEngine::start(|_| async { nixl_prefill_response() }).await
}

pub(crate) async fn decode_engine() -> ScriptedEngine {
    ScriptedEngine::start(|_| async { json_response(200, COMPLETION) }).await
}

pub(crate) fn message(body: &str) -> String {
    let body: Value = serde_json::from_str(body).expect("an error is JSON");
    body["error"]["message"]
        .as_str()
        .expect("an error has a message")
        .to_owned()
}

pub(crate) fn code(body: &str) -> String {
    let body: Value = serde_json::from_str(body).expect("an error is JSON");
    body["error"]["code"]
        .as_str()
        .expect("an error of the proxy has a code")
        .to_owned()
}
