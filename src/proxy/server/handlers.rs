//! The proxy's routes, served by the rules of `api`.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode, header, request};
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodFilter, on};
use tokio::time::Instant;

use super::middleware::enter;
use super::respond::respond;
use super::route_table::{self, Course, Methods, Rule};
use crate::proxy::Shared;
use crate::proxy::body::read;
use crate::proxy::body::serving_mode::Kind;
use crate::proxy::error::ProxyError;
use crate::proxy::request::attempt::Job;
use crate::proxy::request::keep_alive;
use crate::proxy::request::passthrough;
use crate::proxy::request::stream_body::Clock;
use crate::proxy::telemetry::record::Record;
use crate::samples::as_text_format;

/// The whole API.
pub(crate) fn router(shared: Arc<Shared>) -> Router {
    let mut router = Router::new();
    for rule in route_table::ROUTES {
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
        Course::Health => return health(shared).await,
        Course::Metrics => {
            let (with_engines, open) = (asks_for_engines(&request), wants_open_metrics(request.headers()));
            return metrics(shared, with_engines, open).await;
        }
        Course::Version => version(shared).await,
        Course::Pass if !route_table::is_plain(request.uri().path()) => return elsewhere(shared, request).await,
        Course::Pass => Box::pin(pass_on(shared, rule, request)).await,
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
    let body = shared.bodies.read(&head.headers, body).await?;
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
    keep_alive::answer(shared, job).await
}

/// A request that a decode engine answers alone.
async fn pass_on(shared: &Arc<Shared>, rule: &Rule, request: Request) -> Result<Response<Body>, ProxyError> {
    shared.takes_clients()?;
    let (mut head, body) = request.into_parts();
    let record = record(&mut head);
    let body = shared
        .bodies
        .read(&head.headers, body)
        .await
        .map_err(|error| match error {
            // No route that the proxy does not know takes a form or a file, which it could not look through.
            ProxyError::NotJson if rule.path == route_table::REST => not_found(&head),
            error => error,
        })?;
    let clock = Clock {
        record,
        last_read: None,
        _permit: Arc::new(shared.admit()?),
    };
    let session = session(shared, &head.headers);
    passthrough::answer(shared, &head, &body, session.as_deref(), clock).await
}

/// The record of a request that came in.
fn record(head: &mut request::Parts) -> Arc<Record> {
    head.extensions
        .remove()
        .expect("the entrance puts one into every request")
}

/// Whether clients are served: 200 while there is a ready engine of each role.
async fn health(shared: &Shared) -> Response<Body> {
    match shared.is_healthy().await {
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

/// In Prometheus' text format, unless the client asks for `OpenMetrics`. The engines' metrics are always in the former.
async fn metrics(shared: &Shared, with_engines: bool, open: bool) -> Response<Body> {
    let classic = "text/plain; version=0.0.4; charset=utf-8";
    let (text, content_type) = if with_engines || shared.settings.service.metrics.merge {
        (shared.merged_metrics().await, classic)
    } else {
        let text = shared.metrics_text(true);
        if open {
            (
                text.into(),
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
            )
        } else {
            (as_text_format(&text).into_owned().into(), classic)
        }
    };
    let mut response = Response::new(Body::from(text));
    let content_type = HeaderValue::from_static(content_type);
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}

/// Whether `OpenMetrics` is wanted by name, and at least as much as the text format.
fn wants_open_metrics(headers: &HeaderMap) -> bool {
    let weight = |name: &str| {
        let values = headers
            .get_all(header::ACCEPT)
            .iter()
            .filter_map(|value| value.to_str().ok());
        let weights = values.flat_map(|value| value.split(',')).filter_map(|range| {
            let mut parts = range.split(';').map(str::trim);
            let is_named = parts.next().is_some_and(|kind| kind.eq_ignore_ascii_case(name));
            let weight = parts.find_map(|part| part.strip_prefix("q=").or(part.strip_prefix("Q=")));
            is_named.then(|| weight.map_or(1.0, |weight| weight.parse::<f32>().unwrap_or(0.0)))
        });
        weights.fold(0.0, f32::max)
    };
    let open = weight("application/openmetrics-text");
    open > 0.0 && open >= weight("text/plain")
}

async fn unknown(State(shared): State<Arc<Shared>>, request: Request) -> Response<Body> {
    elsewhere(&shared, request).await
}

/// A path that is no route. One with a slash too many is sent to the route, as vLLM's server does it.
async fn elsewhere(shared: &Shared, request: Request) -> Response<Body> {
    let (head, mut body) = request.into_parts();
    read::drain(&mut body).await;
    let is_served = |path: &&str| route_table::find(path).is_some_and(|rule| !matches!(rule.course, Course::Refuse(_)));
    let route = head.uri.path().strip_suffix('/').filter(is_served);
    let Some(route) = route else {
        return respond(shared, "other", Err(not_found(&head)));
    };
    let query = head.uri.query().map_or_else(String::new, |query| format!("?{query}"));
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    let location = HeaderValue::from_str(&format!("{route}{query}")).ok();
    let location = location.map(|location| (header::LOCATION, location));
    response.headers_mut().extend(location);
    respond(shared, "other", Ok(response))
}

fn not_found(head: &request::Parts) -> ProxyError {
    ProxyError::NotFound {
        method: head.method.to_string(),
        path: head.uri.path().to_owned(),
    }
}

/// axum adds `Allow`.
async fn wrong_method(State(shared): State<Arc<Shared>>, request: Request) -> Response<Body> {
    let (head, mut body) = request.into_parts();
    read::drain(&mut body).await;
    let error = if route_table::find(head.uri.path()).is_some() {
        ProxyError::WrongMethod {
            method: head.method.to_string(),
            path: head.uri.path().to_owned(),
        }
    } else {
        not_found(&head)
    };
    respond(&shared, "other", Err(error))
}

fn session(shared: &Shared, headers: &HeaderMap) -> Option<String> {
    let name = shared.settings.session_header.as_deref()?;
    let value = headers.get(name)?.to_str().ok()?;
    (!value.is_empty()).then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_metrics_must_be_asked_for_by_name() {
        let wants = |accept: &str| {
            wants_open_metrics(&HeaderMap::from_iter([(
                header::ACCEPT,
                accept.parse().expect("a value"),
            )]))
        };
        assert!(!wants_open_metrics(&HeaderMap::new()));
        for accept in [
            "",
            "*/*",
            "text/plain",
            "application/json",
            "application/openmetrics-text;q=0",
            "text/plain;version=0.0.4, application/openmetrics-text;q=0.5",
        ] {
            assert!(!wants(accept), "{accept}");
        }
        for accept in [
            "application/openmetrics-text",
            "Application/OpenMetrics-Text; version=1.0.0; q=0.1",
            "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
            "text/html, application/openmetrics-text",
        ] {
            assert!(wants(accept), "{accept}");
        }
    }
}
