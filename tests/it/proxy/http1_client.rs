//! The proxy's HTTP/1.1 client against engines that write raw bytes: connection reuse and every framing of a response.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::harness::{COMPLETION, PARAMS, ProxyHarness, ScriptedEngine, json_response, nixl_prefill_response};

/// An engine that sends these bytes for every request, and then closes the connection if `closes` is set.
struct RawEngine {
    port: u16,
    connections: Arc<AtomicUsize>,
    _server: JoinSet<()>,
}

impl RawEngine {
    async fn start(answer: String, closes: bool, piece: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let connections = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&connections);
        let mut server = JoinSet::new();
        server.spawn(async move {
            let mut clients = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                counter.fetch_add(1, Ordering::Relaxed);
                clients.spawn(serve_connection(stream, answer.clone(), closes, piece));
            }
        });
        Self {
            port,
            connections,
            _server: server,
        }
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

async fn serve_connection(mut stream: TcpStream, answer: String, closes: bool, piece: usize) {
    while read_request(&mut stream).await.is_some() {
        for piece in answer.as_bytes().chunks(piece) {
            if stream.write_all(piece).await.is_err() {
                return;
            }
            // So that the proxy can read each piece separately.
            tokio::task::yield_now().await;
        }
        if closes {
            return;
        }
    }
}

/// Reads a request with a `content-length`, or the end of the connection.
async fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut read = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&read);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            if body.len() >= length.expect("requests have a length").parse().unwrap() {
                return Some(text.into_owned());
            }
        }
        if stream.read_buf(&mut read).await.ok()? == 0 {
            return None;
        }
    }
}

fn whole_response(body: &str) -> String {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn prefilled() -> String {
    whole_response(&format!(
        r#"{{"choices":[{{"text":"t","finish_reason":"length"}}],"kv_transfer_params":{PARAMS}}}"#
    ))
}

#[tokio::test]
async fn an_engine_connection_is_reused() {
    const STREAM: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n\
        e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
    let prefill = RawEngine::start(prefilled(), false, 4096).await;
    let decode = RawEngine::start(STREAM.to_owned(), false, 4096).await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    for _ in 0..3 {
        let (status, text) = harness.complete(r#"{"prompt":"x","stream":true}"#).await;
        assert_eq!((status, text.as_str()), (200, "data: [DONE]\n\n"));
    }
    assert_eq!((prefill.connections(), decode.connections()), (1, 1));
    harness.finish().await;
}

/// The proxy does not read beyond the end of a response, whatever its framing.
#[tokio::test]
async fn a_passthrough_connection_is_reused() {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n";
    for answer in [
        whole_response("{}"),
        whole_response(""),
        format!("{head}transfer-encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n"),
        format!("{head}transfer-encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\nx-sum: 1\r\n\r\n"),
        "HTTP/1.1 204 No Content\r\n\r\n".to_owned(),
    ] {
        for piece in [1, 4096] {
            let decode = RawEngine::start(answer.clone(), false, piece).await;
            let harness = ProxyHarness::nixl(&[1], &[decode.port]).await;
            for _ in 0..4 {
                let response = harness.post("/v1/embeddings", "{}").send().await.unwrap();
                assert!(response.status().is_success(), "{answer}");
                response.bytes().await.unwrap();
            }
            assert_eq!(decode.connections(), 1, "{answer}");
            harness.finish().await;
        }
    }
}

#[tokio::test]
async fn every_response_framing_and_split_is_read() {
    let chunks = format!(
        "{:x};x=\"y\"\r\n{}\r\n{:X}\r\n{}\r\n0\r\nx-sum: 1\r\n\r\n",
        9,
        &COMPLETION[..9],
        COMPLETION.len() - 9,
        &COMPLETION[9..]
    );
    let json = "content-type: application/json\r\n";
    for (answer, closes) in [
        (whole_response(COMPLETION), false),
        (
            format!("HTTP/1.1 200 OK\r\n{json}transfer-encoding: chunked\r\n\r\n{chunks}"),
            false,
        ),
        (format!("HTTP/1.1 200 OK\r\n{json}\r\n{COMPLETION}"), true),
        (format!("HTTP/1.0 200 OK\r\n{json}\r\n{COMPLETION}"), true),
        (
            format!(
                "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n{}",
                whole_response(COMPLETION)
            ),
            false,
        ),
    ] {
        for piece in [1, 7, 4096] {
            let prefill = ScriptedEngine::start(|_| async { nixl_prefill_response() }).await;
            let decode = RawEngine::start(answer.clone(), closes, piece).await;
            let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
            let (status, text) = harness.complete(r#"{"prompt":"x"}"#).await;
            assert_eq!((status, text.as_str()), (200, COMPLETION), "{answer}");
            harness.finish().await;
        }
    }
}

#[tokio::test]
async fn truncated_or_invalid_responses_are_engine_errors() {
    let body = r#"{"choices":[]"#;
    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{}".to_owned(),
        format!(
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n",
            body.len()
        ),
        format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nsize\r\n{body}\r\n"),
        "HTTP/1.1 200".to_owned(),
        "SSH-2.0-OpenSSH\r\n\r\n".to_owned(),
        String::new(),
    ] {
        let decode = RawEngine::start(answer.clone(), true, 4096).await;
        let harness = ProxyHarness::nixl(&[1], &[decode.port]).await;
        // A request with two choices skips the prefill engine.
        let (status, text) = harness.complete(r#"{"prompt":"x","n":2}"#).await;
        let error: serde_json::Value = serde_json::from_str(&text).expect("an error is JSON");
        assert_eq!(
            (status, &error["error"]["type"]),
            (502, &json!("engine_error")),
            "{answer}: {text}"
        );
        harness.finish().await;
    }
}

/// Headers for encodings, ranges and conditional requests, and hop-by-hop headers.
const REMOVED_HEADERS: [(&str, &str); 12] = [
    ("accept-encoding", "gzip, br"),
    ("te", "trailers"),
    ("trailer", "x-sum"),
    ("connection", "x-hop, keep-alive"),
    ("x-hop", "1"),
    ("keep-alive", "timeout=5"),
    ("range", "bytes=0-1"),
    ("if-range", "\"a\""),
    ("if-match", "\"a\""),
    ("if-none-match", "*"),
    ("if-modified-since", "Sun, 06 Nov 1994 08:49:37 GMT"),
    ("if-unmodified-since", "Sun, 06 Nov 1994 08:49:37 GMT"),
];

#[tokio::test]
async fn accept_encoding_never_reaches_an_engine() {
    let prefill = ScriptedEngine::start(|_| async { nixl_prefill_response() }).await;
    let decode = ScriptedEngine::start(|_| async { json_response(200, COMPLETION) }).await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    for path in ["/v1/completions", "/v1/responses"] {
        let mut request = harness.post(path, r#"{"prompt":"x"}"#).header("x-mine", "1");
        for (name, value) in REMOVED_HEADERS {
            request = request.header(name, value);
        }
        assert_eq!(request.send().await.unwrap().status(), 200);
    }
    harness.get("/version").await;
    harness.get("/metrics?engines").await;
    assert!(!prefill.requests().is_empty() && !decode.requests().is_empty());
    for seen in prefill.requests().iter().chain(&decode.requests()) {
        assert_eq!(seen.headers["accept-encoding"], "identity", "{}", seen.path);
        let crossed = |name: &&str| *name != "accept-encoding" && seen.headers.contains_key(*name);
        let crossed: Vec<_> = REMOVED_HEADERS
            .map(|(name, _)| name)
            .into_iter()
            .filter(crossed)
            .collect();
        assert!(crossed.is_empty(), "{} {crossed:?}", seen.path);
    }
    assert!(prefill.requests()[0].headers.contains_key("x-mine"));
    harness.finish().await;
}

#[tokio::test]
async fn a_compressed_response_is_reported() {
    let encoded = |kind: &str| {
        format!(
            "HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\n\x1f\x08ab"
        )
    };
    let good = ScriptedEngine::start(|_| async { nixl_prefill_response() }).await;
    for kind in ["application/json", "text/event-stream"] {
        let raw = RawEngine::start(encoded(kind), false, 4096).await;
        for (prefill, decode) in [(raw.port, good.port), (good.port, raw.port)] {
            let harness = ProxyHarness::nixl(&[prefill], &[decode]).await;
            let (status, text) = harness.complete(r#"{"prompt":"x","stream":true}"#).await;
            assert!(status == 502 && text.contains("encoding `gzip`"), "{status} {text}");
            harness.finish().await;
        }
        // The proxy forwards responses that it does not parse unchanged.
        let harness = ProxyHarness::nixl(&[1], &[raw.port]).await;
        let response = harness.post("/v1/embeddings", "{}").send().await.unwrap();
        assert_eq!(response.headers()["content-encoding"], "gzip");
        assert_eq!(response.bytes().await.unwrap(), "\x1f\x08ab");
        harness.finish().await;
    }
}
