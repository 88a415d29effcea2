//! The null engine: it answers at once, so that a benchmark measures only the proxy in front of it.
//!
//! No scheduler, no KV, no model: canned answers in vLLM's shape, selected by the request body. Each event of a stream
//! has its send time in nanoseconds of the wall clock, so that a reader on the same machine can compute the delay.
//! `/counts` has the number of requests.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::http::{HeaderValue, Method, Request, Response, header};
use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use memchr::memmem;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

/// Largest body of a request, in bytes.
const MAX_BODY_BYTES: usize = 64 << 20;

/// The hand-off parameters of a null prefill engine: NIXL's (vLLM 0.33.0 `nixl/pull_scheduler.py`).
const PREFILLED: &str = concat!(
    r#"{"id":"cmpl-null","object":"text_completion","created":1,"model":"null","choices":[{"index":0,"text":" a","logprobs":null,"#,
    r#""finish_reason":"length","stop_reason":null,"prompt_logprobs":null}],"usage":{"prompt_tokens":512,"total_tokens":513,"#,
    r#""completion_tokens":1},"kv_transfer_params":{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":"#,
    r#"[[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31,32]],"remote_engine_id":"null","#,
    r#""remote_request_id":"cmpl-null-0","remote_host":"127.0.0.1","remote_port":5600,"tp_size":1,"transfer_mode":"pull","remote_registration_generation":0}}"#,
);

/// The answer of a null decode engine without streaming.
pub const COMPLETION: &str = concat!(
    r#"{"id":"cmpl-null","object":"text_completion","created":1,"model":"null","choices":[{"index":0,"text":" a b c","#,
    r#""logprobs":null,"finish_reason":"length","stop_reason":null,"prompt_logprobs":null}],"usage":{"prompt_tokens":512,"#,
    r#""total_tokens":515,"completion_tokens":3}}"#,
);

/// The stream settings of a null engine.
#[derive(Debug, Clone, Copy)]
pub struct NullEngine {
    /// Events per stream, without the end marker.
    pub events: u32,
    /// Time between two events.
    pub interval: Duration,
}

#[derive(Debug, Default)]
struct Counts {
    whole: AtomicU64,
    streams: AtomicU64,
    prefills: AtomicU64,
}

impl NullEngine {
    /// Serves until the process ends.
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn serve(self, listener: TcpListener) -> std::io::Result<Infallible> {
        let counts = Arc::new(Counts::default());
        let mut connections = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let counts = Arc::clone(&counts);
            connections.spawn(async move {
                let service = service_fn(move |request| {
                    let counts = Arc::clone(&counts);
                    async move { Ok::<_, Infallible>(self.answer(&counts, request).await) }
                });
                // A client that disconnects is not an error.
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
            while connections.try_join_next().is_some() {}
        }
    }

    async fn answer(self, counts: &Counts, request: Request<Incoming>) -> Response<Body> {
        let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        if request.method() != Method::POST {
            return json(match request.uri().path() {
                "/counts" => counts.to_json(),
                "/v1/models" => r#"{"object":"list","data":[{"id":"null","object":"model"}]}"#.to_owned(),
                _ => "{}".to_owned(),
            });
        }
        let Ok(body) = Limited::new(request.into_body(), MAX_BODY_BYTES).collect().await else {
            return Response::new(Body::empty());
        };
        let body = body.to_bytes();
        let asks = |key: &str| {
            let tail = memmem::find(&body, key.as_bytes()).map(|at| &body[at + key.len()..]);
            tail.is_some_and(|tail| tail.trim_ascii_start().starts_with(b"true"))
        };
        if asks(r#""do_remote_decode":"#) {
            count(&counts.prefills);
            return json(PREFILLED);
        }
        if asks(r#""stream":"#) {
            count(&counts.streams);
            return self.stream();
        }
        count(&counts.whole);
        json(COMPLETION)
    }

    fn stream(self) -> Response<Body> {
        let mut ticks = interval_at(Instant::now(), self.interval.max(Duration::from_micros(1)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let events = stream::unfold((ticks, 0), move |(mut ticks, sent)| async move {
            if sent > self.events {
                return None;
            }
            ticks.tick().await;
            let event = if sent == self.events {
                Bytes::from_static(b"data: [DONE]\n\n")
            } else {
                event()
            };
            Some((Ok::<_, Infallible>(event), (ticks, sent + 1)))
        });
        let mut response = Response::new(Body::from_stream(events));
        let content_type = HeaderValue::from_static("text/event-stream; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, content_type);
        response
    }
}

impl Counts {
    fn to_json(&self) -> String {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        format!(
            r#"{{"whole":{},"streams":{},"prefills":{}}}"#,
            read(&self.whole),
            read(&self.streams),
            read(&self.prefills)
        )
    }
}

/// One token event of vLLM's length, with its creation time.
fn event() -> Bytes {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Bytes::from(format!(
        concat!(
            r#"data: {{"id":"cmpl-null","object":"text_completion","created":1,"model":"null","choices":[{{"index":0,"text":" a","#,
            r#""logprobs":null,"finish_reason":null,"stop_reason":null}}],"usage":null,"sent":{}}}"#,
            "\n\n"
        ),
        now.as_nanos()
    ))
}

fn json(body: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(body.into());
    let content_type = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}
