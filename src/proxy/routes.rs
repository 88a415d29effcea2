//! The proxy's routes, served by the rules of `api`.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, Response, header, request};
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodFilter, on};
use tokio::time::Instant;

use super::Shared;
use super::api::{self, Course, Methods, Rule};
use super::entrance::enter;
use super::error::{Code, ProxyError};
use super::flow::{self, Job};
use super::guard::Clock;
use super::pass;
use super::record::Record;
use super::rules::Kind;
use crate::fleet::Role;
use crate::report::one_line;
use crate::service::WithoutPrefill;

/// The whole API.
pub(super) fn router(shared: Arc<Shared>) -> Router {
    let mut router = Router::new();
    for rule in api::ROUTES {
        let methods = match rule.methods {
            Methods::Get => MethodFilter::GET,
            Methods::Post => MethodFilter::POST,
            Methods::Both => MethodFilter::GET.or(MethodFilter::POST),
        };
        let handler =
            move |State(shared): State<Arc<Shared>>, request| async move { follow(&shared, rule, request).await };
        router = router.route(rule.path, on(methods, handler));
    }
    router
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(Arc::clone(&shared), enter))
        .with_state(shared)
}

/// Does with a request what its route's rule says.
async fn follow(shared: &Arc<Shared>, rule: &'static Rule, request: Request) -> Response<Body> {
    let outcome = match rule.course {
        Course::Generate(kind) => Box::pin(generate(shared, kind, request)).await,
        Course::Health => return health(shared),
        Course::Metrics => return metrics(shared, asks_for_engines(&request)).await,
        Course::Version => version(shared).await,
        Course::Pass if !api::is_plain(request.uri().path()) => Err(not_found(request.method(), &request)),
        Course::Pass => Box::pin(pass_on(shared, request)).await,
        Course::Refuse(why) => Err(ProxyError::Refused { path: rule.path, why }),
    };
    respond(shared, rule.path, outcome)
}

async fn generate(shared: &Arc<Shared>, kind: Kind, request: Request) -> Result<Response<Body>, ProxyError> {
    let arrived = Instant::now();
    shared.takes_clients()?;
    let (mut head, body) = request.into_parts();
    let record = record(&mut head);
    record.generates(session(shared, &head.headers).as_deref());
    let body = shared.bodies.read(body).await?;
    record.has_read();
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

/// A request that a decode engine answers alone.
async fn pass_on(shared: &Arc<Shared>, request: Request) -> Result<Response<Body>, ProxyError> {
    shared.takes_clients()?;
    let (mut head, body) = request.into_parts();
    let record = record(&mut head);
    let body = shared.bodies.read(body).await?;
    let clock = Clock {
        record,
        last_read: None,
        _permit: Arc::new(shared.admit()?),
    };
    let session = session(shared, &head.headers);
    pass::answer(shared, &head, &body, session.as_deref(), clock).await
}

/// The record of a request that came in.
fn record(head: &mut request::Parts) -> Arc<Record> {
    head.extensions
        .remove()
        .expect("the entrance puts one into every request")
}

/// The route that an answer is counted under, as its extension.
#[derive(Debug, Clone, Copy)]
pub(super) struct Endpoint(pub(super) &'static str);

/// Whether clients are served: 200 while there is a ready engine of each role.
fn health(shared: &Shared) -> Response<Body> {
    match shared.is_healthy() {
        Ok(()) => Response::new(Body::empty()),
        Err(error) => error.to_response(),
    }
}

/// `?engines` asks for the engines' metrics, too.
fn asks_for_engines(request: &Request) -> bool {
    let query = request.uri().query().unwrap_or_default();
    query.split('&').any(|part| part == "engines")
}

async fn version(shared: &Shared) -> Result<Response<Body>, ProxyError> {
    shared.takes_clients()?;
    shared.engine_version().await
}

async fn metrics(shared: &Shared, with_engines: bool) -> Response<Body> {
    let (text, content_type) = if with_engines || shared.settings.service.metrics.merge {
        (
            shared.merged_metrics().await,
            "text/plain; version=0.0.4; charset=utf-8",
        )
    } else {
        let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        (shared.metrics_text(true).into(), content_type)
    };
    let mut response = Response::new(Body::from(text));
    let content_type = HeaderValue::from_static(content_type);
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}

async fn unknown(State(shared): State<Arc<Shared>>, method: Method, request: Request) -> Response<Body> {
    respond(&shared, "other", Err(not_found(&method, &request)))
}

fn not_found(method: &Method, request: &Request) -> ProxyError {
    ProxyError::NotFound {
        method: method.to_string(),
        path: request.uri().path().to_owned(),
    }
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
        tracing::warn!(
            kind = error.code(),
            endpoint,
            error = one_line(&error),
            "request failed"
        );
        error.to_response()
    });
    shared.metrics.answered(endpoint, response.status().as_u16());
    if let Some(Code(code)) = response.extensions().get() {
        shared.metrics.failed(code);
    }
    response.extensions_mut().insert(Endpoint(endpoint));
    response
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
            stage if stage.serves() => Ok(()),
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
