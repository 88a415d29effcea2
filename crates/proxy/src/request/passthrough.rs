//! Requests that a decode engine answers alone, on any route: the body is edited as a generation's is, and the answer
//! is streamed back.
//!
//! This module knows no field of these requests. If an engine cannot be reached, the next one gets the request,
//! because nothing was sent.

use std::sync::Arc;

use axum::body::Body;
use axum::http::request::Parts;
use axum::http::{Response, header};
use bytes::Bytes;

use super::answer::is_event_stream;
use super::stream_body::{StreamBody, StreamContext, StreamEnd, TokenTimer};
use crate::Shared;
use crate::body::document::Document;
use crate::body::read::encoding;
use crate::body::sse::Events;
use crate::error::{Cause, ProxyError, RequestStage};
use crate::schedule::lease::EngineLease;
use crate::schedule::pick;
use crate::upstream::{Call, forwardable};
use xpyd_base::fleet::Role;

/// Forwards a request to a decode engine, and its answer to the client.
pub(crate) async fn answer(
    shared: &Arc<Shared>,
    head: &Parts,
    body: &Bytes,
    session: Option<&str>,
    timer: TokenTimer,
) -> Result<Response<Body>, ProxyError> {
    let body = edited(body)?;
    let headers = shared.engine_headers(&head.headers);
    let idle = shared.deadlines().decode_idle;
    let mut outcome = Err(ProxyError::NoEngine(Role::Decode));
    for lease in leases(shared, session) {
        let call = Call {
            method: head.method.clone(),
            path: head.uri.path_and_query().map_or("/", |path| path.as_str()),
            headers: &headers,
            request_id: None,
            body: body.clone(),
        };
        let step = shared.upstream.send(&lease.engine, call);
        match lease.run(RequestStage::Pass, idle, step).await {
            Ok(answer) => {
                let (mut head, body) = answer.into_parts();
                let stream = StreamContext {
                    stage: RequestStage::Pass,
                    end: StreamEnd::AnyEvent,
                    events: (is_event_stream(&head) && encoding(&head.headers).is_none()).then(Events::default),
                    ..StreamContext::new(Arc::new(lease), idle, timer)
                };
                // Events can be held back, so only an answer that is not a stream keeps its length.
                let length = head.headers.get(header::CONTENT_LENGTH).cloned();
                head.headers = forwardable(&head.headers);
                head.headers
                    .extend(length.map(|length| (header::CONTENT_LENGTH, length)));
                let body = Body::new(StreamBody::new(Bytes::new(), body, stream));
                return Ok(Response::from_parts(head, body));
            }
            Err(error) if is_unsent(&error) => outcome = Err(error),
            Err(error) => return Err(error),
        }
    }
    outcome
}

/// Whether the engine never saw the request.
fn is_unsent(error: &ProxyError) -> bool {
    matches!(error, ProxyError::Leg { cause: Cause::Unreachable(error), .. } if error.is_connect())
}

/// The body without the fields that a client must not set. A body that the proxy cannot parse is refused, because an
/// engine's parser accepts more.
fn edited(body: &Bytes) -> Result<Bytes, ProxyError> {
    if body.is_empty() {
        return Ok(Bytes::new());
    }
    Ok(Document::parse(body)?.edited(&[]).into())
}

/// A lease on each decode engine that accepts requests, the least loaded first, or the session's own first. Such a
/// request takes no turn in the round robin of generations, whose pairs would shift.
fn leases(shared: &Arc<Shared>, session: Option<&str>) -> impl Iterator<Item = EngineLease> {
    let view = Arc::clone(&shared.view.borrow());
    let mut engines: Vec<_> = view.serving(Role::Decode).collect();
    engines.sort_by_key(|engine| engine.load.in_flight());
    let engines: Vec<_> = pick::in_order(engines, 0, session, &[])
        .into_iter()
        .map(Arc::clone)
        .collect();
    let view = shared.view.clone();
    engines
        .into_iter()
        .filter_map(move |engine| EngineLease::acquire(&engine, &view))
}
