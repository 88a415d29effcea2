//! Engines that speak HTTP/1.1 byte by byte: connections are used again, and an answer may be framed in any way.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::fake::{COMPLETION, Fake, PARAMS, Rig, nixl_prefilled};

/// An engine that sends these bytes for every request, and then closes the connection if it is told to.
struct Raw {
    port: u16,
    connections: Arc<AtomicUsize>,
    _server: JoinSet<()>,
}

impl Raw {
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
                clients.spawn(talk(stream, answer.clone(), closes, piece));
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

async fn talk(mut stream: TcpStream, answer: String, closes: bool, piece: usize) {
    while read_request(&mut stream).await.is_some() {
        for piece in answer.as_bytes().chunks(piece) {
            if stream.write_all(piece).await.is_err() {
                return;
            }
            // So that each piece may be read on its own.
            tokio::task::yield_now().await;
        }
        if closes {
            return;
        }
    }
}

/// Reads a request with a length, or the end of the connection.
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

fn whole(body: &str) -> String {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn prefilled() -> String {
    whole(&format!(
        r#"{{"choices":[{{"text":"t","finish_reason":"length"}}],"kv_transfer_params":{PARAMS}}}"#
    ))
}

#[tokio::test]
async fn one_connection_to_an_engine_serves_one_request_after_the_other() {
    const STREAM: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n\
        e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
    let prefill = Raw::start(prefilled(), false, 4096).await;
    let decode = Raw::start(STREAM.to_owned(), false, 4096).await;
    let rig = Rig::nixl(&[prefill.port], &[decode.port]).await;
    for _ in 0..3 {
        let (status, text) = rig.complete(r#"{"prompt":"x","stream":true}"#).await;
        assert_eq!((status, text.as_str()), (200, "data: [DONE]\n\n"));
    }
    assert_eq!((prefill.connections(), decode.connections()), (1, 1));
    rig.finish().await;
}

#[tokio::test]
async fn an_answer_may_be_framed_in_any_way_and_come_in_any_pieces() {
    let chunks = format!(
        "{:x};x=\"y\"\r\n{}\r\n{:X}\r\n{}\r\n0\r\nx-sum: 1\r\n\r\n",
        9,
        &COMPLETION[..9],
        COMPLETION.len() - 9,
        &COMPLETION[9..]
    );
    let json = "content-type: application/json\r\n";
    for (answer, closes) in [
        (whole(COMPLETION), false),
        (
            format!("HTTP/1.1 200 OK\r\n{json}transfer-encoding: chunked\r\n\r\n{chunks}"),
            false,
        ),
        (format!("HTTP/1.1 200 OK\r\n{json}\r\n{COMPLETION}"), true),
        (format!("HTTP/1.0 200 OK\r\n{json}\r\n{COMPLETION}"), true),
        (
            format!("HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n{}", whole(COMPLETION)),
            false,
        ),
    ] {
        for piece in [1, 7, 4096] {
            let prefill = Fake::start(|_| async { nixl_prefilled() }).await;
            let decode = Raw::start(answer.clone(), closes, piece).await;
            let rig = Rig::nixl(&[prefill.port], &[decode.port]).await;
            let (status, text) = rig.complete(r#"{"prompt":"x"}"#).await;
            assert_eq!((status, text.as_str()), (200, COMPLETION), "{answer}");
            rig.finish().await;
        }
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_or_makes_no_sense_is_an_error_of_the_engine() {
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
        let decode = Raw::start(answer.clone(), true, 4096).await;
        let rig = Rig::nixl(&[1], &[decode.port]).await;
        // Two choices need no prefill engine.
        let (status, text) = rig.complete(r#"{"prompt":"x","n":2}"#).await;
        let error: serde_json::Value = serde_json::from_str(&text).expect("an error is JSON");
        assert_eq!(
            (status, &error["error"]["type"]),
            (502, &json!("engine_error")),
            "{answer}: {text}"
        );
        rig.finish().await;
    }
}
