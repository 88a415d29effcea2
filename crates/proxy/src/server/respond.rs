//! Turns the outcome of a route into an answer, and counts it.

use axum::body::Body;
use axum::http::Response;

use crate::Shared;
use crate::error::{ErrorCode, ProxyError};
use crate::telemetry::record::RouteLabel;
use xpyd_base::report::one_line;

pub(crate) fn respond(
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
    shared.metrics.count_answer(endpoint, response.status().as_u16());
    if let Some(ErrorCode(code)) = response.extensions().get() {
        shared.metrics.count_error(code);
    }
    response.extensions_mut().insert(RouteLabel(endpoint));
    response
}
