//! A recording engine: every request that reaches it must be well-formed and must not have fields that clients are not
//! allowed to send to engines.
//!
//! Its answers depend on the prompt, and its decode legs check that the hand-off parameters belong to the same prompt.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::answers::{self, Leg};
use crate::http::{self, find};
use crate::inputs::FORBIDDEN;

/// The argument that starts this program as the engine. After it: port, events per stream, milliseconds between events.
pub(crate) const ENGINE: &str = "--engine";

/// Headers that end at the proxy.
const FORBIDDEN_HEADERS: [&str; 9] = [
    "transfer-encoding",
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authorization",
    "expect",
    "upgrade",
    "te",
    "trailer",
];

/// The violations by kind, with a count and an example of each.
type Violations = BTreeMap<String, (u64, String)>;

#[derive(Debug)]
struct Engine {
    events: usize,
    interval: Duration,
    requests: AtomicU64,
    crossed: AtomicU64,
    violations: Mutex<Violations>,
}

/// The requests that an engine has received.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Seen {
    pub(crate) requests: u64,
    /// Decode legs with the hand-off of another prompt.
    pub(crate) crossed: u64,
    pub(crate) violations: Violations,
}

/// Queries the requests of an engine.
pub(crate) async fn seen(port: u16) -> Result<Seen, String> {
    let response = http::get(port, "/seen", Duration::from_mins(1)).await;
    let response = response.map_err(|failure| format!("the recording engine: {failure:?}"))?;
    serde_json::from_slice(&response.body).map_err(|error| format!("the recording engine: {error}"))
}

/// The text of an answer.
pub(crate) fn answer(prompt: &str, tokens: usize) -> String {
    (0..tokens).map(|index| token(prompt, index)).collect()
}

fn token(prompt: &str, index: usize) -> String {
    format!(
        " {:x}",
        hash(prompt).rotate_left(u32::try_from(index % 64).unwrap_or(0)) & 0xffff
    )
}

/// FNV-1a.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Serves until the process ends.
pub(crate) async fn serve(port: u16, events: usize, interval: Duration) -> std::io::Result<()> {
    let engine = Arc::new(Engine {
        events,
        interval,
        requests: AtomicU64::new(0),
        crossed: AtomicU64::new(0),
        violations: Mutex::default(),
    });
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        while connections.try_join_next().is_some() {}
        let engine = Arc::clone(&engine);
        connections.spawn(async move {
            // A proxy can disconnect when its client does.
            let _ = engine.serve_connection(stream).await;
        });
    }
}

/// The head and the body of one request.
struct Request {
    head: String,
    body: Vec<u8>,
}

impl Engine {
    async fn serve_connection(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut buffer = Vec::new();
        while let Some(request) = self.read(&mut stream, &mut buffer).await? {
            self.answer(&mut stream, &request).await?;
            if header(&request.head, "connection") == Some("close") {
                break;
            }
        }
        stream.shutdown().await
    }

    async fn read(&self, stream: &mut TcpStream, buffer: &mut Vec<u8>) -> std::io::Result<Option<Request>> {
        let end = loop {
            if let Some(end) = find(buffer, b"\r\n\r\n") {
                break end + 4;
            }
            if stream.read_buf(buffer).await? == 0 {
                if !buffer.is_empty() {
                    self.violation("bytes after a request", buffer);
                }
                return Ok(None);
            }
        };
        let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
        let length = header(&head, "content-length")
            .and_then(|value| value.parse().ok())
            .unwrap_or(0);
        while buffer.len() < end + length {
            if stream.read_buf(buffer).await? == 0 {
                return Ok(None);
            }
        }
        let body = buffer[end..end + length].to_vec();
        buffer.drain(..end + length);
        Ok(Some(Request { head, body }))
    }

    async fn answer(&self, stream: &mut TcpStream, request: &Request) -> std::io::Result<()> {
        let path = request.head.split(' ').nth(1).unwrap_or_default();
        if path == "/seen" {
            return reply(stream, 200, &json!(self.seen())).await;
        }
        self.requests.fetch_add(1, Ordering::Relaxed);
        if let Some(what) = fault_of(request) {
            self.violation(what, &[request.head.as_bytes(), &request.body].concat());
        }
        if !matches!(path, "/v1/completions" | "/v1/chat/completions") {
            return reply(stream, 200, &json!({"object": "list", "data": [], "path": path})).await;
        }
        let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        let prompt = match (&body["prompt"], &body["messages"]) {
            (Value::String(prompt), _) => prompt.clone(),
            (Value::Null, Value::Null) => return reply(stream, 400, &json!({"error": {"message": "no prompt"}})).await,
            (Value::Null, prompt) | (prompt, _) => prompt.to_string(),
        };
        let (parameters, own) = (&body["kv_transfer_params"], format!("{:x}", hash(&prompt)));
        let is_prefill = parameters["do_remote_decode"] == true;
        let leg = if is_prefill { Leg::Prefill } else { Leg::Decode };
        if let Some(response) = answers::response(&prompt, leg) {
            return stream.write_all(&response).await;
        }
        if is_prefill {
            return reply(stream, 200, &prefilled(&prompt, &own)).await;
        }
        if parameters["do_remote_prefill"] == true && parameters["remote_request_id"] != own.as_str() {
            self.crossed.fetch_add(1, Ordering::Relaxed);
        }
        let wanted = body["max_tokens"]
            .as_u64()
            .and_then(|wanted| usize::try_from(wanted).ok());
        let tokens = wanted.unwrap_or(self.events).clamp(1, self.events);
        if body["stream"] == true {
            return self.stream(stream, &prompt, tokens).await;
        }
        sleep(self.interval * u32::try_from(tokens).unwrap_or(u32::MAX)).await;
        let choice = json!([{"index": 0, "text": answer(&prompt, tokens), "finish_reason": "length"}]);
        reply(
            stream,
            200,
            &json!({"object": "text_completion", "choices": choice, "usage": usage(tokens)}),
        )
        .await
    }

    async fn stream(&self, stream: &mut TcpStream, prompt: &str, tokens: usize) -> std::io::Result<()> {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).await?;
        for index in 0..tokens {
            if index > 0 {
                sleep(self.interval).await;
            }
            let reason = if index + 1 == tokens {
                json!("length")
            } else {
                Value::Null
            };
            let choice = json!([{"index": 0, "text": token(prompt, index), "finish_reason": reason}]);
            let event = format!("data: {}\n\n", json!({"object": "text_completion", "choices": choice}));
            stream
                .write_all(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes())
                .await?;
        }
        stream.write_all(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n").await
    }

    fn violation(&self, what: &str, bytes: &[u8]) {
        let mut violations = self.violations.lock().unwrap_or_else(PoisonError::into_inner);
        let example = || format!("{:?}", String::from_utf8_lossy(&bytes[..bytes.len().min(600)]));
        let entry = violations.entry(what.to_owned()).or_insert_with(|| (0, example()));
        entry.0 += 1;
    }

    fn seen(&self) -> Seen {
        let violations = self.violations.lock().unwrap_or_else(PoisonError::into_inner);
        Seen {
            requests: self.requests.load(Ordering::Relaxed),
            crossed: self.crossed.load(Ordering::Relaxed),
            violations: violations.clone(),
        }
    }
}

fn header<'head>(head: &'head str, name: &str) -> Option<&'head str> {
    let mut lines = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    lines
        .find(|(own, _)| own.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.trim())
}

/// The violations in a request of a proxy.
fn fault_of(request: &Request) -> Option<&'static str> {
    let mut lines = request.head.trim_end_matches("\r\n").split("\r\n");
    let words: Vec<&str> = lines.next().unwrap_or_default().split(' ').collect();
    let [method, target, "HTTP/1.1"] = words[..] else {
        return Some("a malformed request line");
    };
    let is_visible = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
    if !method.bytes().all(|byte| byte.is_ascii_uppercase()) || !target.starts_with('/') || !is_visible(target) {
        return Some("a malformed request line");
    }
    let path = target.split('?').next().unwrap_or_default().to_ascii_lowercase();
    if path.starts_with("/sleep") || ["lora", "..", "%2e"].iter().any(|part| path.contains(part)) {
        return Some("a forbidden route");
    }
    let mut seen = Vec::new();
    for line in lines {
        let Some((name, value)) = line.split_once(':') else {
            return Some("a header without a colon");
        };
        let name = name.to_ascii_lowercase();
        if name.is_empty() || !is_visible(&name) || value.bytes().any(|byte| byte < b' ' && byte != b'\t') {
            return Some("a malformed header");
        }
        if FORBIDDEN_HEADERS.contains(&name.as_str()) {
            return Some("a header for one hop");
        }
        if matches!(name.as_str(), "content-length" | "host" | "x-request-id") && seen.contains(&name) {
            return Some("a header given twice");
        }
        seen.push(name);
    }
    let is_forbidden = request.head.contains(FORBIDDEN) || find(&request.body, FORBIDDEN.as_bytes()).is_some();
    is_forbidden.then_some("what only xpyd may say")
}

/// The answer of a NIXL prefill engine. The request id is derived from the prompt.
fn prefilled(prompt: &str, own: &str) -> Value {
    json!({"object": "text_completion", "usage": usage(1),
        "choices": [{"index": 0, "text": token(prompt, 0), "finish_reason": "length"}],
        "kv_transfer_params": {"do_remote_prefill": true, "do_remote_decode": false, "remote_block_ids": [[1, 2]],
            "remote_engine_id": "recording", "remote_request_id": own, "remote_host": "127.0.0.1", "remote_port": 5600,
            "tp_size": 1}})
}

fn usage(tokens: usize) -> Value {
    json!({"prompt_tokens": 8, "completion_tokens": tokens, "total_tokens": 8 + tokens})
}

async fn reply(stream: &mut TcpStream, status: u16, body: &Value) -> std::io::Result<()> {
    let body = body.to_string();
    let head = format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).await
}
