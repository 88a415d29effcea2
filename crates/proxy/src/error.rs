//! All failures of a client's request, and the only place that turns one into an OpenAI-shaped error.
//!
//! This module knows HTTP statuses and the shape of errors, but not bodies, scheduling or connectors' wire formats.

use std::io;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use hyper::header::{ACCEPT_ENCODING, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use hyper::{Response, StatusCode};

use crate::body::document::BodyError;
use crate::overload::Limit;
use crate::server::strict_heads::HeadRefusal;
use xpyd_base::connector::{HandoffError, PairError};
use xpyd_base::fleet::{EngineId, FleetStage, Role};
use xpyd_base::report::one_line;

/// The stage of a request that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RequestStage {
    /// Tokenizing the prompt.
    Tokenize,
    /// The prefill leg.
    Prefill,
    /// The KV transfer from the prefill to the decode engine.
    Handoff,
    /// The decode leg.
    Decode,
    /// A request that one engine answers alone.
    Pass,
}

impl RequestStage {
    /// Its name in messages, codes and metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Tokenize => "tokenize",
            Self::Prefill => "prefill",
            Self::Handoff => "handoff",
            Self::Decode => "decode",
            Self::Pass => "pass",
        }
    }
}

/// The `code` of an error, as an extension of its response.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ErrorCode(pub(crate) &'static str);

/// Why the engines did not answer a request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProxyError {
    /// The client's body is not a JSON object.
    #[error("cannot read the request body")]
    Body(#[from] BodyError),
    /// The client's body is too large.
    #[error("the request body is larger than {limit} bytes")]
    TooLarge {
        /// The limit, in bytes.
        limit: usize,
    },
    /// The byte budget of all bodies has no room for the client's body.
    #[error("the request bodies in the proxy have reached the limit of {limit} bytes")]
    BodiesFull {
        /// The limit, in bytes.
        limit: usize,
    },
    /// The client's body has another content type. The text is vLLM's.
    #[error("Unsupported Media Type: Only 'application/json' is allowed")]
    NotJson,
    /// The client's body has a content encoding.
    #[error("xpyd does not support the content encoding `{0}` of the request body: send it without `Content-Encoding`")]
    Encoded(String),
    /// The client did not send its whole body.
    #[error("the request body did not arrive: {0}")]
    Unread(String),
    /// The client's body breaks its chunked framing.
    #[error("the request body is malformed: {0}")]
    Malformed(String),
    /// A request header section that another HTTP implementation could read differently, or that asks for something
    /// xpyd does not support.
    #[error("{}", .0.message())]
    Http(HeadRefusal),
    /// The request came on a connection beyond a limit.
    #[error("{}", .0.message())]
    Connections(Limit),
    /// The client sent no valid API key.
    #[error("{}", if *bears_none { "an API key is required: `Authorization: Bearer KEY`" } else { "invalid API key" })]
    Unauthorized {
        /// Whether the request has no `Authorization` header.
        bears_none: bool,
    },
    /// No route has this path.
    #[error("xpyd does not serve `{method} {path}`")]
    NotFound {
        /// The request's method.
        method: String,
        /// The request's path.
        path: String,
    },
    /// The route does not accept this method.
    #[error("`{path}` does not accept `{method}`")]
    WrongMethod {
        /// The request's method.
        method: String,
        /// The request's path.
        path: String,
    },
    /// The request has too many or too large headers.
    #[error("too many or too large request headers: the limit is {most} headers of {bytes} bytes together")]
    HeadersTooLarge {
        /// Maximum number of headers.
        most: usize,
        /// Maximum bytes of their names and values together.
        bytes: usize,
    },
    /// A route that xpyd does not forward.
    #[error("xpyd does not forward `{path}`: {why}")]
    Refused {
        /// The path of the route, as in the route table.
        path: &'static str,
        /// The reason, as a clause.
        why: &'static str,
    },
    /// The fleet does not serve clients now.
    #[error("the fleet is {0} and does not accept requests")]
    NotServing(FleetStage),
    /// No engine of a role is ready.
    #[error("no {0} engine is ready")]
    NoEngine(Role),
    /// The maximum number of requests is in flight.
    #[error("{limit} requests are in flight, which is the limit")]
    Busy {
        /// The maximum length of the queue.
        limit: usize,
    },
    /// The queue has its maximum length.
    #[error("the queue is full: {limit} requests wait for a decode engine with room")]
    QueueFull {
        /// The limit.
        limit: usize,
        /// Seconds after which a retry makes sense.
        retry_after: u64,
    },
    /// The request waited until the queue's deadline.
    #[error("no decode engine had room within {}", humantime::format_duration(*limit))]
    QueueTimeout {
        /// The queue's deadline.
        limit: Duration,
        /// Seconds after which a retry makes sense.
        retry_after: u64,
    },
    /// One call to an engine failed.
    #[error("stage `{}` failed on engine `{engine}`", stage.as_str())]
    Leg {
        /// The stage of the request.
        stage: RequestStage,
        /// The engine that was called.
        engine: EngineId,
        /// Why the call failed.
        #[source]
        cause: Cause,
    },
}

/// Why one call to an engine failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Cause {
    /// No connection, or the connection broke before the answer began.
    #[error("the engine could not be reached")]
    Unreachable(#[source] Unreachable),
    /// This process has no file descriptor left for a connection. The engine is not at fault.
    #[error("xpyd has no file descriptor left for a connection to the engine")]
    Descriptors(#[source] io::Error),
    /// The answer broke off.
    #[error("the answer broke off: {0}")]
    Broken(String),
    /// The stream ended without its end marker.
    #[error("the stream ended before it was complete")]
    Truncated,
    /// The stage exceeded its deadline.
    #[error("no data within {}", humantime::format_duration(*.0))]
    Timeout(Duration),
    /// The engine ended or is being stopped.
    #[error("the engine has stopped")]
    Gone,
    /// The engine answered with status 500 or above, except 503.
    #[error("the engine answered {status}: {message}")]
    Status {
        /// The engine's status.
        status: StatusCode,
        /// The beginning of its message.
        message: String,
    },
    /// The engine answered 429 or 503: it is healthy but has no capacity now.
    #[error("the engine answered {status}: {message}")]
    Busy {
        /// The engine's status.
        status: StatusCode,
        /// The beginning of its message.
        message: String,
        /// Seconds after which the engine wants the next attempt, from its `Retry-After`.
        retry_after: Option<u64>,
    },
    /// The answer has a content encoding although xpyd accepts none.
    #[error(
        "the engine's answer has the content encoding `{0}`, which xpyd does not accept: something between xpyd and the engine compresses"
    )]
    Encoded(String),
    /// The engine answered 200, but its finish reason says that the generation failed.
    #[error("the engine ended the generation with finish reason `{0}`")]
    Finish(String),
    /// The prefill engine's answer contains no usable hand-off.
    #[error("the prefill answer has no usable hand-off")]
    Handoff(#[from] HandoffError),
    /// KV did not arrive, and hand-offs are strict.
    #[error("the engine computed the prompt by itself")]
    Recomputed,
    /// The decode engine could have read blocks that the prefill engine had given to another request.
    #[error(
        "the answer began {} after the prefill, but the lease on its KV is {}",
        humantime::format_duration(Duration::from_secs(age.as_secs())),
        humantime::format_duration(*lease)
    )]
    LeaseOver {
        /// Time since the prefill leg was sent.
        age: Duration,
        /// How long the prefill engine keeps KV.
        lease: Duration,
    },
    /// The two engines cannot work together.
    #[error("the engines are incompatible")]
    Pair(#[from] PairError),
    /// The engine's answer breaks the contract of its route.
    #[error("invalid answer from the engine: {0}")]
    InvalidAnswer(&'static str),
}

/// Why a call did not reach an engine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unreachable {
    /// The engine got nothing.
    #[error("no connection")]
    Connect(#[source] io::Error),
    /// The engine got the request, at least in part.
    #[error("no answer")]
    NoAnswer(#[source] io::Error),
}

impl Unreachable {
    /// Whether the engine never saw the request.
    pub(crate) fn is_connect(&self) -> bool {
        matches!(self, Self::Connect(_))
    }
}

impl ProxyError {
    /// Whether another pair of engines could answer. Asked only before a byte went to the client.
    pub(crate) fn can_be_retried(&self) -> bool {
        let Self::Leg { stage, cause, .. } = self else {
            return false;
        };
        match cause {
            Cause::Unreachable(_)
            | Cause::Broken(_)
            | Cause::Truncated
            | Cause::Gone
            | Cause::Status { .. }
            | Cause::Busy { .. }
            | Cause::Finish(_)
            | Cause::Handoff(_)
            | Cause::Recomputed
            | Cause::LeaseOver { .. } => true,
            // A lost notification leaves no other sign. A slow engine has used the whole deadline.
            Cause::Timeout(_) => *stage == RequestStage::Handoff,
            Cause::Pair(_) | Cause::InvalidAnswer(_) | Cause::Encoded(_) | Cause::Descriptors(_) => false,
        }
    }

    /// The busy engine's wish for the next attempt, in seconds. `None` if the error is not a busy engine.
    pub(crate) fn busy(&mut self) -> Option<&mut Option<u64>> {
        match self {
            Self::Leg {
                cause: Cause::Busy { retry_after, .. },
                ..
            } => Some(retry_after),
            _ => None,
        }
    }

    /// Whether the engine is at fault, so that its next request probably fails as well. Failures that the supervisor
    /// already knows, or that another engine could have caused, do not count.
    pub(crate) fn blames_engine(&self) -> bool {
        match self {
            Self::Leg { stage, cause, .. } => {
                *stage != RequestStage::Handoff
                    && !matches!(
                        cause,
                        Cause::Gone
                            | Cause::Pair(_)
                            | Cause::Handoff(_)
                            | Cause::Descriptors(_)
                            | Cause::Busy { .. }
                            | Cause::Encoded(_)
                    )
            }
            _ => false,
        }
    }

    /// HTTP status, `type` and `code`. Both names are stable, because clients can match on them.
    fn kind(&self) -> (StatusCode, &'static str, &'static str) {
        const CLIENT: &str = "invalid_request_error";
        const BUSY: &str = "overloaded_error";
        const ENGINE: &str = "engine_error";
        match self {
            Self::Body(_) => (StatusCode::BAD_REQUEST, CLIENT, "invalid_body"),
            Self::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, CLIENT, "body_too_large"),
            Self::BodiesFull { .. } => (StatusCode::SERVICE_UNAVAILABLE, BUSY, "too_many_body_bytes"),
            Self::NotJson => (StatusCode::BAD_REQUEST, CLIENT, "unsupported_media_type"),
            Self::Encoded(_) => (StatusCode::UNSUPPORTED_MEDIA_TYPE, CLIENT, "unsupported_encoding"),
            Self::Unread(_) => (StatusCode::REQUEST_TIMEOUT, CLIENT, "body_incomplete"),
            Self::Malformed(_) => (StatusCode::BAD_REQUEST, CLIENT, "malformed_body"),
            Self::Http(refusal) => (refusal.status(), CLIENT, refusal.code()),
            Self::Connections(_) => (StatusCode::SERVICE_UNAVAILABLE, BUSY, "too_many_connections"),
            Self::Unauthorized { .. } => (StatusCode::UNAUTHORIZED, CLIENT, "invalid_api_key"),
            Self::NotFound { .. } => (StatusCode::NOT_FOUND, CLIENT, "unknown_route"),
            Self::WrongMethod { .. } => (StatusCode::METHOD_NOT_ALLOWED, CLIENT, "method_not_allowed"),
            Self::HeadersTooLarge { .. } => (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, CLIENT, "headers_too_large"),
            Self::Refused { .. } => (StatusCode::FORBIDDEN, CLIENT, "route_refused"),
            Self::NotServing(_) => (StatusCode::SERVICE_UNAVAILABLE, BUSY, "not_serving"),
            Self::NoEngine(_) => (StatusCode::SERVICE_UNAVAILABLE, BUSY, "no_engine"),
            Self::Busy { .. } => (StatusCode::SERVICE_UNAVAILABLE, BUSY, "too_many_requests_in_flight"),
            Self::QueueFull { .. } => (StatusCode::TOO_MANY_REQUESTS, BUSY, "queue_full"),
            Self::QueueTimeout { .. } => (StatusCode::SERVICE_UNAVAILABLE, BUSY, "queue_timeout"),
            Self::Leg { cause, .. } => match cause {
                Cause::Timeout(_) => (StatusCode::GATEWAY_TIMEOUT, ENGINE, "engine_timeout"),
                Cause::Busy { status, .. } => (*status, BUSY, "engine_overloaded"),
                Cause::Descriptors(_) => (StatusCode::SERVICE_UNAVAILABLE, BUSY, "out_of_descriptors"),
                Cause::Unreachable(_) | Cause::Gone => (StatusCode::BAD_GATEWAY, ENGINE, "engine_unreachable"),
                Cause::Handoff(_) | Cause::Recomputed | Cause::LeaseOver { .. } => {
                    (StatusCode::BAD_GATEWAY, ENGINE, "no_handoff")
                }
                Cause::Pair(_) => (StatusCode::INTERNAL_SERVER_ERROR, ENGINE, "engines_do_not_fit"),
                Cause::Broken(_)
                | Cause::Truncated
                | Cause::Status { .. }
                | Cause::Encoded(_)
                | Cause::Finish(_)
                | Cause::InvalidAnswer(_) => (StatusCode::BAD_GATEWAY, ENGINE, "engine_failed"),
            },
        }
    }

    /// The `code` that clients get, one for each kind of failure.
    pub(crate) fn code(&self) -> &'static str {
        self.kind().2
    }

    /// The error as JSON text, in OpenAI's shape.
    pub(crate) fn to_json(&self) -> String {
        let (_, kind, code) = self.kind();
        serde_json::json!({
            "error": {"message": one_line(self), "type": kind, "param": null, "code": code},
        })
        .to_string()
    }

    /// Ends a stream whose status has been sent: an error event, then the end marker.
    pub(crate) fn to_events(&self) -> Bytes {
        Bytes::from(format!("data: {}\n\ndata: [DONE]\n\n", self.to_json()))
    }

    /// The error as a response.
    pub(crate) fn to_response(&self) -> Response<Body> {
        let (status, _, code) = self.kind();
        let mut response = Response::new(Body::from(self.to_json()));
        *response.status_mut() = status;
        response.extensions_mut().insert(ErrorCode(code));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if matches!(self, Self::Encoded(_)) {
            headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        if matches!(self, Self::TooLarge { .. } | Self::BodiesFull { .. } | Self::Unread(_)) {
            // The proxy never reads the rest of the body.
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        let retry_after = match self {
            Self::QueueFull { retry_after, .. } | Self::QueueTimeout { retry_after, .. } => Some(*retry_after),
            Self::Leg {
                cause: Cause::Busy { retry_after, .. },
                ..
            } => Some(retry_after.unwrap_or(1)),
            // An engine's restart takes longer and a full proxy recovers sooner; one second keeps clients polite and
            // quick.
            _ if status == StatusCode::SERVICE_UNAVAILABLE => Some(1),
            _ => None,
        };
        if let Some(seconds) = retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
