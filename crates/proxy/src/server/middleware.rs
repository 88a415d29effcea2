//! The middleware that every request passes before its route: header limits, API keys and CORS.
//!
//! This module knows headers only.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{Response, header};
use axum::middleware::Next;

use super::cors;
use super::respond::respond;
use super::strict_heads::HeadRefusal;
use crate::Shared;
use crate::error::ProxyError;
use crate::overload::Limit;
use crate::telemetry::record::Record;

/// Maximum headers of a request, and maximum bytes of their names and values together. A client behind several
/// gateways sends about forty headers of a few kilobytes.
const MAX_HEADERS: usize = 90;
const MAX_HEADER_BYTES: usize = 32 << 10;

/// Paths that are served on every connection, even beyond the limit.
const ALWAYS: [&str; 5] = ["/health", "/ping", "/ready", "/live", "/metrics"];

/// Runs the request's route, or answers why it is refused.
pub(crate) async fn check_request(
    State(shared): State<Arc<Shared>>,
    mut request: Request,
    next: Next,
) -> Response<Body> {
    let method = request.method().clone();
    let origin = request.headers().get(header::ORIGIN).cloned();
    let pages = &shared.settings.config.cors;
    let record = Arc::new(Record::of_client(&shared, method, request.headers_mut()));
    let mut response = match shared.check(&request) {
        Ok(()) if cors::is_preflight(request.method(), request.headers()) => {
            return cors::preflight(pages, request.headers());
        }
        Ok(()) => {
            request.extensions_mut().insert(Arc::clone(&record));
            next.run(request).await
        }
        Err(error) => respond(&shared, "other", Err(error)),
    };
    cors::mark(pages, origin.as_ref(), response.headers_mut());
    record.answer(response)
}

impl Shared {
    fn check(&self, request: &Request) -> Result<(), ProxyError> {
        let headers = request.headers();
        if let Some(refusal) = HeadRefusal::of(headers) {
            return Err(ProxyError::Http(refusal));
        }
        let limit = request.extensions().get::<Limit>();
        if let Some(limit) = limit.filter(|_| !ALWAYS.contains(&request.uri().path())) {
            self.metrics.overload.reached(*limit);
            return Err(ProxyError::Connections(*limit));
        }
        let bytes: usize = headers
            .iter()
            .map(|(name, value)| name.as_str().len() + value.len())
            .sum();
        if headers.len() > MAX_HEADERS || bytes > MAX_HEADER_BYTES {
            return Err(ProxyError::HeadersTooLarge {
                most: MAX_HEADERS,
                bytes: MAX_HEADER_BYTES,
            });
        }
        let keys = &self.settings.parts.client_keys;
        if keys.allows(request.method(), request.uri().path(), request.headers()) {
            Ok(())
        } else {
            Err(ProxyError::Unauthorized {
                bears_none: !request.headers().contains_key(header::AUTHORIZATION),
            })
        }
    }
}
