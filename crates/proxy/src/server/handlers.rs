//! Serves the routes of `route_table`.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode, header, request};
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodFilter, on};
use tokio::time::Instant;

use super::middleware::check_request;
use super::respond::respond;
use super::route_table::{self, Route, RouteAction, RouteMethods};
use crate::Shared;
use crate::body::read;
use crate::body::serving_mode::GenerationKind;
use crate::error::ProxyError;
use crate::request::attempt::Job;
use crate::request::keep_alive;
use crate::request::passthrough;
use crate::request::stream_body::TokenTimer;
use crate::telemetry::record::Record;
use xpyd_base::samples::as_text_format;

/// The router of the whole API.
pub(crate) fn router(shared: Arc<Shared>) -> Router {
    let mut router = Router::new();
    for route in route_table::ROUTES {
        let methods = match route.methods {
            RouteMethods::Get => MethodFilter::GET,
            RouteMethods::Post => MethodFilter::POST,
            RouteMethods::Both => MethodFilter::GET.or(MethodFilter::POST),
        };
        let handler =
            move |State(shared): State<Arc<Shared>>, request| async move { dispatch(&shared, route, request).await };
        router = router.route(route.path, on(methods, handler));
    }
    router
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(Arc::clone(&shared), check_request))
        .with_state(shared)
}

/// Runs the action of a route.
async fn dispatch(shared: &Arc<Shared>, route: &'static Route, request: Request) -> Response<Body> {
    let outcome = match route.action {
        RouteAction::Generate(kind) => Box::pin(generate(shared, kind, request)).await,
        RouteAction::Health => return health(shared).await,
        RouteAction::Live => return Response::new(Body::empty()),
        RouteAction::Metrics => {
            let (with_engines, open) = (asks_for_engines(&request), wants_open_metrics(request.headers()));
            return metrics(shared, with_engines, open).await;
        }
        RouteAction::Version => version(shared).await,
        RouteAction::Pass if !route_table::is_plain(request.uri().path()) => {
            return unknown_path(shared, request).await;
        }
        RouteAction::Pass => Box::pin(pass_on(shared, route, request)).await,
        RouteAction::Refuse(why) => Err(ProxyError::Refused { path: route.path, why }),
    };
    respond(shared, route.path, outcome)
}

async fn generate(shared: &Arc<Shared>, kind: GenerationKind, request: Request) -> Result<Response<Body>, ProxyError> {
    let arrived = Instant::now();
    shared.check_serving()?;
    let (mut head, body) = request.into_parts();
    let record = record(&mut head);
    record.begin_generation(session(shared, &head.headers).as_deref());
    let body = shared.bodies.read(&head.headers, body).await?;
    record.body_received();
    let permit = shared.admit()?;
    let job = Job {
        kind,
        body,
        session: session(shared, &head.headers),
        headers: shared.engine_headers(&head.headers),
        pair: None,
        deadlines: shared.deadlines(),
        arrived,
        permit: Arc::new(permit),
        record,
    };
    keep_alive::answer(shared, job).await
}

/// Forwards a request to a decode engine that answers alone.
async fn pass_on(shared: &Arc<Shared>, route: &Route, request: Request) -> Result<Response<Body>, ProxyError> {
    shared.check_serving()?;
    let (mut head, body) = request.into_parts();
    let record = record(&mut head);
    let body = shared
        .bodies
        .read(&head.headers, body)
        .await
        .map_err(|error| match error {
            // A route that the proxy does not know must not take a form or a file, which the proxy could not check.
            ProxyError::NotJson if route.path == route_table::REST => not_found(&head),
            error => error,
        })?;
    let timer = TokenTimer {
        record,
        last_read: None,
        _permit: Arc::new(shared.admit()?),
    };
    let session = session(shared, &head.headers);
    passthrough::answer(shared, &head, &body, session.as_deref(), timer).await
}

/// The record that the middleware puts into every request.
fn record(head: &mut request::Parts) -> Arc<Record> {
    head.extensions
        .remove()
        .expect("the middleware puts one into every request")
}

/// Answers 200 while there is a ready engine of each role.
async fn health(shared: &Shared) -> Response<Body> {
    match shared.is_healthy().await {
        Ok(()) => Response::new(Body::empty()),
        Err(error) => error.to_response(),
    }
}

/// Whether `?engines` asks for the engines' metrics as well.
fn asks_for_engines(request: &Request) -> bool {
    let query = request.uri().query().unwrap_or_default();
    query.split('&').any(|part| part == "engines")
}

async fn version(shared: &Shared) -> Result<Response<Body>, ProxyError> {
    shared.check_serving()?;
    shared.engine_version().await
}

/// Answers in Prometheus' text format, unless the client prefers `OpenMetrics`. The engines' metrics are always in
/// the former.
async fn metrics(shared: &Shared, with_engines: bool, open: bool) -> Response<Body> {
    let classic = "text/plain; version=0.0.4; charset=utf-8";
    let (text, content_type) = if with_engines || shared.settings.config.metrics.merge {
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

/// Whether the client names `OpenMetrics` and prefers it at least as much as the text format.
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
    unknown_path(&shared, request).await
}

/// A path without a route. A path with an extra trailing slash is redirected, as vLLM's server does.
async fn unknown_path(shared: &Shared, request: Request) -> Response<Body> {
    let (head, mut body) = request.into_parts();
    read::drain(&mut body).await;
    let is_served =
        |path: &&str| route_table::find(path).is_some_and(|route| !matches!(route.action, RouteAction::Refuse(_)));
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

/// axum adds the `Allow` header.
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
    let name = shared.settings.config.bound_session_header()?;
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
