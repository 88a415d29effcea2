//! Accuracy of the bench client: connection reuse, streams split at any byte, send times, and what it reports about itself.
//! The server writes given bytes, so that a test can split them anywhere.
#![expect(clippy::unwrap_used, reason = "a failed helper must fail its test")]

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use xpyd::bench::{self, Report, Spec};

use super::fake_server::spec;

/// A server that answers every request with the same bytes, one piece per write.
struct ByteServer {
    base_url: String,
    connections: Arc<AtomicUsize>,
    /// Ends the server when dropped.
    _task: JoinSet<()>,
}

impl ByteServer {
    async fn start(pieces: Vec<String>, closes: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base_url = format!("http://{}", listener.local_addr().unwrap());
        let connections = Arc::new(AtomicUsize::new(0));
        let (pieces, accepted) = (Arc::new(pieces), Arc::clone(&connections));
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut all = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                all.spawn(answer(stream, Arc::clone(&pieces), Arc::clone(&accepted), closes));
            }
        });
        Self {
            base_url,
            connections,
            _task: task,
        }
    }

    async fn run(&self, spec: Spec) -> Report {
        bench::run(&spec, &|_| {}, CancellationToken::new()).await.unwrap()
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

async fn answer(mut stream: TcpStream, pieces: Arc<Vec<String>>, connections: Arc<AtomicUsize>, closes: bool) {
    let mut read = Vec::new();
    let mut is_counted = false;
    loop {
        while !is_whole(&read) {
            match stream.read_buf(&mut read).await {
                Ok(count) if count > 0 => {}
                _ => return,
            }
        }
        // Requests for metrics use other connections.
        if !is_counted && read.starts_with(b"POST") {
            connections.fetch_add(1, Ordering::SeqCst);
            is_counted = true;
        }
        read.clear();
        for piece in pieces.iter() {
            if stream.write_all(piece.as_bytes()).await.is_err() {
                return;
            }
            tokio::task::yield_now().await;
        }
        if closes {
            return;
        }
    }
}

/// Whether these bytes are a whole request. A connection has at most one at a time.
fn is_whole(read: &[u8]) -> bool {
    let text = String::from_utf8_lossy(read);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    body.len() >= length.map_or(0, |length| length.parse().unwrap())
}

const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n";

fn event(data: &str) -> String {
    let data = format!("data: {data}\n\n");
    format!("{:x}\r\n{data}\r\n", data.len())
}

/// A chunked response of three events with two tokens each, usage, and `[DONE]`.
fn stream() -> Vec<String> {
    let mut pieces = vec![format!("{HEAD}transfer-encoding: chunked\r\n\r\n")];
    pieces.extend((0..3).map(|_| event(r#"{"choices":[{"index":0,"text":" x y","token_ids":[1,2]}]}"#)));
    pieces.push(event(
        r#"{"choices":[],"usage":{"prompt_tokens":17,"completion_tokens":6}}"#,
    ));
    pieces.push(event("[DONE]") + "0\r\n\r\n");
    pieces
}

/// A run that sends one request at a time.
fn sequential(server: &ByteServer) -> Spec {
    Spec {
        max_concurrency: NonZeroUsize::new(1),
        keep_texts: false,
        ..spec(&server.base_url)
    }
}

#[tokio::test]
async fn a_finished_connection_is_reused() {
    let server = ByteServer::start(stream(), false).await;
    let report = server.run(sequential(&server)).await;
    assert_eq!(
        (report.metrics.completed, report.failed()),
        (8, 0),
        "{:?}",
        report.failures()
    );
    // One connection per sending thread; a machine with two cores has one such thread.
    let connections = server.connections();
    assert!(connections <= report.client_usage.threads, "{connections} connections");
    assert_eq!(report.validity().connections, connections);
}

#[tokio::test]
async fn a_closed_connection_is_replaced() {
    let mut pieces = vec![format!("{HEAD}connection: close\r\n\r\n")];
    pieces.push("data: {\"choices\":[{\"text\":\"a\"}]}\n\n".to_owned());
    pieces.push("data: [DONE]\n\n".to_owned());
    let server = ByteServer::start(pieces, true).await;
    let report = server.run(sequential(&server)).await;
    assert_eq!(
        (report.metrics.completed, report.failed()),
        (8, 0),
        "{:?}",
        report.failures()
    );
    assert_eq!(server.connections(), 8);
}

#[tokio::test]
async fn a_stream_can_be_split_at_any_byte() {
    let whole = stream().concat();
    let cut = whole.chars().map(String::from).collect();
    let server = ByteServer::start(cut, false).await;
    let report = server.run(sequential(&server)).await;
    assert_eq!(
        (report.metrics.completed, report.failed()),
        (8, 0),
        "{:?}",
        report.failures()
    );
    assert_eq!(report.metrics.total_output_tokens, 8 * 6);
}

#[tokio::test]
async fn the_result_reports_confidence_and_client_saturation() {
    let server = ByteServer::start(stream(), false).await;
    let report = server.run(spec(&server.base_url)).await;
    let own = &report.to_json(false)["xpyd"];
    assert!(own["valid"].is_boolean() && own["reasons"].is_array(), "{own}");
    let all = &own["statistics"]["all"];
    assert_eq!(all["ttft_ms"]["p99"]["of_requests"], 8, "{own}");
    let interval = &all["ttft_ms"]["mean"]["interval"];
    assert!(
        interval[0].as_f64() <= interval[1].as_f64() && interval[0].is_number(),
        "{own}"
    );
    // The server's token ids show two tokens per chunk.
    assert_eq!(own["statistics"]["tokens_per_chunk"], "told by the server");
    assert_eq!(
        (&all["itl_chunk_gap_ms"]["values"], &all["itl_per_token_ms"]["values"]),
        (&16.into(), &32.into())
    );
    let reads = own["client"]["reads"].as_u64().unwrap() + own["client"]["reads_without_receipt"].as_u64().unwrap();
    assert!(reads >= 8, "{own}");
    let remarks = report.remarks();
    assert!(
        remarks.contains("of 8 requests: close to the slowest") && remarks.contains("ITL per token"),
        "{remarks}"
    );
}

#[tokio::test]
async fn no_request_is_sent_early() {
    let server = ByteServer::start(stream(), false).await;
    let mut spec = spec(&server.base_url);
    spec.arrivals.request_rate = 200.0;
    let report = server.run(spec).await;
    assert_eq!(report.records.len(), 8);
    for record in &report.records {
        assert!(record.started >= record.scheduled, "{record:?}");
        assert!(
            record.released >= record.scheduled && record.admitted >= record.released,
            "{record:?}"
        );
    }
}

#[tokio::test]
async fn a_silent_server_is_reported_by_connection() {
    let server = ByteServer::start(vec![String::new()], true).await;
    let report = server.run(sequential(&server)).await;
    assert_eq!(
        report.failures()[0].cause,
        "no answer to the request: the server closed the connection"
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gone = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let report = server.run(spec(&gone)).await;
    let cause = &report.failures()[0].cause;
    assert!(cause.starts_with("no connection to the server: "), "{cause}");
}
