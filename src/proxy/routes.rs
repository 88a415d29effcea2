//! The proxy's routes: which request is a generation, which one an engine answers alone, and which is refused.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, Response, header};
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tokio::time::Instant;

use super::Shared;
use super::answer::verbatim;
use super::entrance::enter;
use super::error::{ProxyError, Stage};
use super::flow::{self, Job};
use super::pick;
use super::record::Record;
use super::rules::Kind;
use super::upstream::{Call, Seat, whole};
use crate::fleet::{FleetStage, Role};
use crate::service::WithoutPrefill;

/// How long a client may take to send its body.
const BODY_DEADLINE: Duration = Duration::from_mins(1);

/// The whole API.
pub(super) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/models", get(pass))
        .route("/version", get(pass))
        .route("/tokenize", post(pass))
        .route("/detokenize", post(pass))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(Arc::clone(&shared), enter))
        .with_state(shared)
}

async fn completions(State(shared): State<Arc<Shared>>, request: Request) -> Response<Body> {
    let outcome = Box::pin(generate(&shared, Kind::Completions, request)).await;
    respond(&shared, Kind::Completions.path(), outcome)
}

async fn chat(State(shared): State<Arc<Shared>>, request: Request) -> Response<Body> {
    let outcome = Box::pin(generate(&shared, Kind::Chat, request)).await;
    respond(&shared, Kind::Chat.path(), outcome)
}

async fn generate(shared: &Arc<Shared>, kind: Kind, request: Request) -> Result<Response<Body>, ProxyError> {
    let arrived = Instant::now();
    shared.takes_clients()?;
    let (mut head, body) = request.into_parts();
    let record: Arc<Record> = head
        .extensions
        .remove()
        .expect("the entrance puts one into every request");
    record.generates(session(shared, &head.headers).as_deref());
    let body = read(body, shared.settings.max_body_bytes).await?;
    let permit = shared.admit()?;
    let job = Job {
        kind,
        body,
        session: session(shared, &head.headers),
        headers: shared.crossing(&head.headers),
        pair: None,
        deadlines: shared.deadlines(),
        arrived,
        permit: Arc::new(permit),
        record,
    };
    flow::answer(shared, job).await
}

/// A request that a decode engine answers alone and unchanged.
async fn pass(State(shared): State<Arc<Shared>>, request: Request) -> Response<Body> {
    let path = match request.uri().path() {
        "/tokenize" => "/tokenize",
        "/detokenize" => "/detokenize",
        "/version" => "/version",
        _ => "/v1/models",
    };
    let outcome = Box::pin(pass_to_decoder(&shared, request)).await;
    respond(&shared, path, outcome)
}

async fn pass_to_decoder(shared: &Arc<Shared>, request: Request) -> Result<Response<Body>, ProxyError> {
    shared.takes_clients()?;
    let (head, body) = request.into_parts();
    let body = read(body, shared.settings.max_body_bytes).await?;
    let _permit = shared.admit()?;
    let seat = {
        let view = Arc::clone(&shared.view.borrow());
        let session = session(shared, &head.headers);
        let candidates = view.serving(Role::Decode).collect();
        // No turn of its own: that would shift the pairs of the generations.
        pick::in_order(candidates, 0, session.as_deref(), &[])
            .into_iter()
            .find_map(|engine| Seat::take(engine, &shared.view))
            .ok_or(ProxyError::NoEngine(Role::Decode))?
    };
    let headers = shared.crossing(&head.headers);
    let call = Call {
        method: head.method,
        path: head.uri.path_and_query().map_or("/", |path| path.as_str()),
        headers: &headers,
        request_id: None,
        body,
    };
    let step = async {
        let (head, body) = shared.upstream.send(&seat.engine, call).await?.into_parts();
        Ok((head, whole(body).await?))
    };
    let (head, body) = seat.run(Stage::Pass, shared.settings.prefill_deadline, step).await?;
    Ok(verbatim(head, body))
}

/// The route that an answer is counted under, as its extension.
#[derive(Debug, Clone, Copy)]
pub(super) struct Endpoint(pub(super) &'static str);

/// Whether clients are served: 200 while there is a ready engine of each role.
async fn health(State(shared): State<Arc<Shared>>) -> Response<Body> {
    match shared.is_healthy() {
        Ok(()) => Response::new(Body::empty()),
        Err(error) => error.to_response(),
    }
}

async fn metrics(State(shared): State<Arc<Shared>>, request: Request) -> Response<Body> {
    let query = request.uri().query().unwrap_or_default();
    let merges = shared.settings.service.metrics.merge || query.split('&').any(|part| part == "engines");
    let (text, content_type) = if merges {
        (
            shared.merged_metrics().await,
            "text/plain; version=0.0.4; charset=utf-8",
        )
    } else {
        let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        (shared.metrics_text(true), content_type)
    };
    let mut response = Response::new(Body::from(text));
    let content_type = HeaderValue::from_static(content_type);
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}

async fn unknown(State(shared): State<Arc<Shared>>, method: Method, request: Request) -> Response<Body> {
    let error = ProxyError::NotFound {
        method: method.to_string(),
        path: request.uri().path().to_owned(),
    };
    respond(&shared, "other", Err(error))
}

/// axum adds `Allow`.
async fn wrong_method(State(shared): State<Arc<Shared>>, method: Method, request: Request) -> Response<Body> {
    let error = ProxyError::WrongMethod {
        method: method.to_string(),
        path: request.uri().path().to_owned(),
    };
    respond(&shared, "other", Err(error))
}

pub(super) fn respond(
    shared: &Shared,
    endpoint: &'static str,
    outcome: Result<Response<Body>, ProxyError>,
) -> Response<Body> {
    let mut response = outcome.unwrap_or_else(|error| {
        tracing::warn!(endpoint, error = crate::report::one_line(&error), "request failed");
        error.to_response()
    });
    shared.metrics.answered(endpoint, response.status().as_u16());
    response.extensions_mut().insert(Endpoint(endpoint));
    response
}

async fn read(body: Body, limit: usize) -> Result<Bytes, ProxyError> {
    let read = tokio::time::timeout(BODY_DEADLINE, Limited::new(body, limit).collect()).await;
    match read {
        Err(_) => Err(ProxyError::Unread(format!(
            "no end within {}",
            humantime::format_duration(BODY_DEADLINE)
        ))),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(ProxyError::TooLarge { limit }),
        Ok(Err(error)) => Err(ProxyError::Unread(error.to_string())),
        Ok(Ok(body)) => Ok(body.to_bytes()),
    }
}

fn session(shared: &Shared, headers: &HeaderMap) -> Option<String> {
    let name = shared.settings.session_header.as_deref()?;
    let value = headers.get(name)?.to_str().ok()?;
    (!value.is_empty()).then(|| value.to_owned())
}

impl Shared {
    /// Whether the fleet is at a stage that takes clients. Which engines a request needs is its own matter.
    fn takes_clients(&self) -> Result<(), ProxyError> {
        match self.view.borrow().stage {
            FleetStage::Ready => Ok(()),
            stage => Err(ProxyError::NotServing(stage)),
        }
    }

    /// Whether a request that needs both roles would be served.
    fn is_healthy(&self) -> Result<(), ProxyError> {
        self.takes_clients()?;
        let view = self.view.borrow();
        let needs_prefill = self.settings.service.routing.without_prefill == WithoutPrefill::Fail;
        let missing = [Role::Prefill, Role::Decode]
            .into_iter()
            .filter(|role| needs_prefill || *role == Role::Decode)
            .find(|role| view.serving(*role).next().is_none());
        missing.map_or(Ok(()), |role| Err(ProxyError::NoEngine(role)))
    }
}
