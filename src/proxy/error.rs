//! Everything that can go wrong with a client's request, and the only place that turns it into an OpenAI-shaped error.
//!
//! Knows HTTP statuses and the shape of errors; knows nothing of bodies, engines' choice or connectors' wire formats.

use std::io;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use hyper::header::{ACCEPT_ENCODING, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use hyper::{Response, StatusCode};

use crate::connector::{HandoffError, PairError};
use crate::fleet::{EngineId, FleetStage, Role};
use crate::proxy::body::document::BodyError;
use crate::proxy::overload::Limit;
use crate::proxy::server::strict_heads::Refusal;
use crate::report::one_line;

/// The part of a request's way in which it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Turning the prompt into token ids.
    Tokenize,
    /// The prefill leg.
    Prefill,
    /// The KV's way from the prefill to the decode engine.
    Handoff,
    /// The decode leg.
    Decode,
    /// A request that one engine answers alone.
    Pass,
}

impl Stage {
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

/// The `code` of an error, as an extension of its answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Code(pub(crate) &'static str);

/// Why a request got no answer from the engines.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProxyError {
    /// The client's body is no JSON object.
    #[error("the request body is not usable")]
    Body(#[from] BodyError),
    /// The client's body is too large.
    #[error("the request body is larger than {limit} bytes")]
    TooLarge {
        /// The limit, in bytes.
        limit: usize,
    },
    /// There is no room for the client's body.
    #[error("the bodies of all requests have {limit} bytes at most, and this one has no room")]
    BodiesFull {
        /// The limit, in bytes.
        limit: usize,
    },
    /// The client's body is of another kind. In vLLM's words.
    #[error("Unsupported Media Type: Only 'application/json' is allowed")]
    NotJson,
    /// The client's body is encoded.
    #[error("the request body has the encoding `{0}`, and xpyd takes none: send it without `Content-Encoding`")]
    Encoded(String),
    /// The client did not send its whole body.
    #[error("the request body did not arrive: {0}")]
    Unread(String),
    /// The client's body breaks its own framing.
    #[error("the request body is malformed: {0}")]
    Malformed(String),
    /// A head that another HTTP implementation could read differently, or that asks for what xpyd does not do.
    #[error("{}", .0.message())]
    Http(Refusal),
    /// The request came on a connection beyond a limit.
    #[error("{}", .0.message())]
    Connections(Limit),
    /// The client bears no key that lets it in.
    #[error("{}", if *bears_none { "an API key is needed: `Authorization: Bearer KEY`" } else { "this API key is not known" })]
    Unauthorized {
        /// Whether it bears none at all.
        bears_none: bool,
    },
    /// No such route.
    #[error("xpyd serves no `{method} {path}`")]
    NotFound {
        /// The request's method.
        method: String,
        /// The request's path.
        path: String,
    },
    /// A route that exists, but not for this method.
    #[error("`{path}` takes no `{method}`")]
    WrongMethod {
        /// The request's method.
        method: String,
        /// The request's path.
        path: String,
    },
    /// More, or longer, headers than anybody needs.
    #[error("the request's headers are too many or too large: {most} of together {bytes} bytes are taken")]
    HeadersTooLarge {
        /// Most headers.
        most: usize,
        /// Most bytes of names and values.
        bytes: usize,
    },
    /// A route that clients do not get.
    #[error("xpyd does not pass `{path}` on: {why}")]
    Refused {
        /// The route, as its rule has it.
        path: &'static str,
        /// Why.
        why: &'static str,
    },
    /// The fleet takes no clients now.
    #[error("the fleet is {0} and takes no requests")]
    NotServing(FleetStage),
    /// No engine of a role is ready.
    #[error("no {0} engine is ready")]
    NoEngine(Role),
    /// The proxy is full.
    #[error("{limit} requests are in flight, which is the limit")]
    Busy {
        /// The limit.
        limit: usize,
    },
    /// As many requests wait as may.
    #[error("{limit} requests wait for a decode engine with room, which is the limit")]
    QueueFull {
        /// The limit.
        limit: usize,
        /// Seconds until a new attempt makes sense.
        retry_after: u64,
    },
    /// The request waited in vain.
    #[error("no decode engine had room within {}", humantime::format_duration(*limit))]
    QueueTimeout {
        /// How long it waited.
        limit: Duration,
        /// Seconds until a new attempt makes sense.
        retry_after: u64,
    },
    /// One upstream call failed.
    #[error("stage `{}` failed on engine `{engine}`", stage.as_str())]
    Leg {
        /// Where on the request's way.
        stage: Stage,
        /// The engine that was asked.
        engine: EngineId,
        /// What happened.
        #[source]
        cause: Cause,
    },
}

/// What happened to one upstream call.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Cause {
    /// No connection, or one that broke before the answer began.
    #[error("the engine could not be reached")]
    Unreachable(#[source] Unreachable),
    /// This process has no descriptor for a connection, which is not the engine's fault.
    #[error("xpyd has no file descriptor left for a connection to it")]
    Descriptors(#[source] io::Error),
    /// The answer broke off.
    #[error("the answer broke off: {0}")]
    Broken(String),
    /// The stream ended without its end marker.
    #[error("the stream ended before it was complete")]
    Truncated,
    /// Too slow.
    #[error("nothing came within {}", humantime::format_duration(*.0))]
    Timeout(Duration),
    /// The engine ended or is being stopped.
    #[error("the engine went away")]
    Gone,
    /// An answer of 500 or above.
    #[error("the engine answered {status}: {message}")]
    Status {
        /// The engine's status.
        status: StatusCode,
        /// The beginning of its message.
        message: String,
    },
    /// An answer of 429 or 503: the engine is well, and has no room now.
    #[error("the engine answered {status}: {message}")]
    Busy {
        /// The engine's status.
        status: StatusCode,
        /// The beginning of its message.
        message: String,
        /// Seconds after which it wants to be asked again.
        retry_after: Option<u64>,
    },
    /// An answer in an encoding, although it was to be in none.
    #[error(
        "the engine's answer has the encoding `{0}`, which was not asked for: something between xpyd and the engine compresses"
    )]
    Encoded(String),
    /// An answer of 200 that says that the generation failed.
    #[error("the engine ended the generation with finish reason `{0}`")]
    Finish(String),
    /// The prefill answer holds no usable hand-off.
    #[error("there is no hand-off")]
    Handoff(#[from] HandoffError),
    /// KV did not arrive, and hand-offs are strict.
    #[error("the engine computed the prompt by itself")]
    Recomputed,
    /// The decode engine may have read blocks that the prefill engine had given to another request.
    #[error(
        "its answer began {} after the prefill did, and the KV was kept for {} only",
        humantime::format_duration(Duration::from_secs(age.as_secs())),
        humantime::format_duration(*lease)
    )]
    LeaseOver {
        /// How long after the prefill leg was sent.
        age: Duration,
        /// How long the prefill engine keeps KV.
        lease: Duration,
    },
    /// The two engines cannot work together.
    #[error("the engines do not fit together")]
    Pair(#[from] PairError),
    /// An answer that is not what the route promises.
    #[error("the engine's answer makes no sense: {0}")]
    Nonsense(&'static str),
}

/// Why an engine could not be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unreachable {
    /// Nothing was sent.
    #[error("no connection")]
    Connect(#[source] io::Error),
    /// The request was sent, at least in part.
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
    /// Whether another pair of engines may well answer. Only asked before a byte went to the client.
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
            // A lost notification comes with no other sign. A slow engine was given all the time there is.
            Cause::Timeout(_) => *stage == Stage::Handoff,
            Cause::Pair(_) | Cause::Nonsense(_) | Cause::Encoded(_) | Cause::Descriptors(_) => false,
        }
    }

    /// The seconds after which a busy engine wants to be asked again; `None` for what is no busy engine.
    pub(crate) fn busy(&mut self) -> Option<&mut Option<u64>> {
        match self {
            Self::Leg {
                cause: Cause::Busy { retry_after, .. },
                ..
            } => Some(retry_after),
            _ => None,
        }
    }

    /// Whether it is the engine's own failure, which a next request is likely to meet as well. What the supervisor knows
    /// already, and what another engine may be to blame for, is none.
    pub(crate) fn blames_engine(&self) -> bool {
        match self {
            Self::Leg { stage, cause, .. } => {
                *stage != Stage::Handoff
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

    /// HTTP status, `type` and `code`. The two names are stable: clients may match on them.
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
                | Cause::Nonsense(_) => (StatusCode::BAD_GATEWAY, ENGINE, "engine_failed"),
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

    /// What ends a stream whose status has long been sent: an error event, then the end marker.
    pub(crate) fn to_events(&self) -> Bytes {
        Bytes::from(format!("data: {}\n\ndata: [DONE]\n\n", self.to_json()))
    }

    /// The error as an answer.
    pub(crate) fn to_response(&self) -> Response<Body> {
        let (status, _, code) = self.kind();
        let mut response = Response::new(Body::from(self.to_json()));
        *response.status_mut() = status;
        response.extensions_mut().insert(Code(code));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if matches!(self, Self::Encoded(_)) {
            headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        if matches!(self, Self::TooLarge { .. } | Self::BodiesFull { .. } | Self::Unread(_)) {
            // The rest of the body is never read.
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        let retry_after = match self {
            Self::QueueFull { retry_after, .. } | Self::QueueTimeout { retry_after, .. } => Some(*retry_after),
            Self::Leg {
                cause: Cause::Busy { retry_after, .. },
                ..
            } => Some(retry_after.unwrap_or(1)),
            // A restart of an engine takes longer, a full proxy less; one second keeps clients polite and quick.
            _ if status == StatusCode::SERVICE_UNAVAILABLE => Some(1),
            _ => None,
        };
        if let Some(seconds) = retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
