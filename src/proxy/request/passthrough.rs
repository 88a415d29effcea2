//! Requests that a decode engine answers alone: edited as generations are, and streamed back as the answer comes.
//!
//! Knows no field of any of them. An engine that cannot be reached is left for the next one, since nothing was sent.

use std::sync::Arc;

use axum::body::Body;
use axum::http::request::Parts;
use axum::http::{Response, header};
use bytes::Bytes;

use super::answer::is_event_stream;
use super::stream_body::{Clock, End, Guarded, GuardedBody};
use crate::fleet::Role;
use crate::proxy::Shared;
use crate::proxy::body::document::Document;
use crate::proxy::body::read::encoding;
use crate::proxy::body::sse::Events;
use crate::proxy::error::{Cause, ProxyError, Stage};
use crate::proxy::schedule::lease::Seat;
use crate::proxy::schedule::pick;
use crate::proxy::upstream::{Call, forwardable};

/// Passes a request on to a decode engine, and its answer back.
pub(crate) async fn answer(
    shared: &Arc<Shared>,
    head: &Parts,
    body: &Bytes,
    session: Option<&str>,
    clock: Clock,
) -> Result<Response<Body>, ProxyError> {
    let body = edited(body)?;
    let headers = shared.crossing(&head.headers);
    let idle = shared.deadlines().decode;
    let mut outcome = Err(ProxyError::NoEngine(Role::Decode));
    for seat in seats(shared, session) {
        let call = Call {
            method: head.method.clone(),
            path: head.uri.path_and_query().map_or("/", |path| path.as_str()),
            headers: &headers,
            request_id: None,
            body: body.clone(),
        };
        let step = shared.upstream.send(&seat.engine, call);
        match seat.run(Stage::Pass, idle, step).await {
            Ok(answer) => {
                let (mut head, body) = answer.into_parts();
                let guarded = Guarded {
                    stage: Stage::Pass,
                    end: End::AnyEvent,
                    events: (is_event_stream(&head) && encoding(&head.headers).is_none()).then(Events::default),
                    ..Guarded::new(Arc::new(seat), idle, clock)
                };
                // Events may be held back, so only what is no stream keeps its length.
                let length = head.headers.get(header::CONTENT_LENGTH).cloned();
                head.headers = forwardable(&head.headers);
                head.headers
                    .extend(length.map(|length| (header::CONTENT_LENGTH, length)));
                let body = Body::new(GuardedBody::new(Bytes::new(), body, guarded));
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

/// The body without what no client may set. One that is no JSON object to the proxy may be one to an engine, whose reader
/// takes more, and so is not passed.
fn edited(body: &Bytes) -> Result<Bytes, ProxyError> {
    if body.is_empty() {
        return Ok(Bytes::new());
    }
    Ok(Document::parse(body)?.edited(&[]).into())
}

/// A place on every decode engine that lets requests in, the one with the fewest first; where there is a session, its own.
/// They take no turn of the generations, whose pairs would shift.
fn seats(shared: &Arc<Shared>, session: Option<&str>) -> impl Iterator<Item = Seat> {
    let view = Arc::clone(&shared.view.borrow());
    let mut engines: Vec<_> = view.serving(Role::Decode).collect();
    engines.sort_by_key(|engine| engine.load.in_flight());
    let engines: Vec<_> = pick::in_order(engines, 0, session, &[])
        .into_iter()
        .map(Arc::clone)
        .collect();
    let view = shared.view.clone();
    engines.into_iter().filter_map(move |engine| Seat::take(&engine, &view))
}
