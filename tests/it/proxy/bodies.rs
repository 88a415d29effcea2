//! Limits of request bodies, for each one and for all together.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use xpyd::connector::{Connector, Nixl};

use super::harness::{
    self, BackgroundTask, COMPLETION, ProxyHarness, ScriptedEngine, code, decode_engine, json_response, message,
    nixl_prefill_response, prefill_engine, within_deadline,
};

/// Sends `request`, and returns all bytes until the proxy closes the connection.
async fn exchange(harness: &ProxyHarness, request: &str) -> String {
    let mut stream = TcpStream::connect(harness.url.trim_start_matches("http://"))
        .await
        .unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    within_deadline("the end of the connection", stream.read_to_end(&mut answer))
        .await
        .unwrap();
    String::from_utf8(answer).unwrap()
}

fn many_members(count: usize) -> String {
    let members: Vec<String> = (0..count).map(|number| format!("\"k{number}\":0")).collect();
    format!("{{\"model\":\"m\",\"prompt\":\"x\",{}}}", members.join(","))
}

#[tokio::test]
async fn a_body_with_too_many_members_or_levels_is_refused() {
    let (prefill, decode) = (prefill_engine().await, decode_engine().await);
    let mut settings = harness::settings(Connector::Nixl(Nixl {}));
    settings.config.max_body = 64 << 20;
    let harness = ProxyHarness::start(settings, &[prefill.port], &[decode.port], 1, None).await;
    let deep = format!("{{\"prompt\":{}{}}}", "[".repeat(1_000_000), "]".repeat(1_000_000));
    for (body, limit) in [
        (many_members(200_000), "1024 members"),
        (deep, "1000 levels"),
        (
            format!("{{\"prompt\":\"x\",\"vllm_xargs\":{}}}", many_members(200_000)),
            "1024 members",
        ),
    ] {
        for path in ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"] {
            let response = harness.post(path, body.clone()).send().await.unwrap();
            assert_eq!(response.status(), 400, "{path} {limit}");
            let body = response.text().await.unwrap();
            assert_eq!(code(&body), "invalid_body");
            assert!(message(&body).contains(limit), "{path} {body}");
        }
    }
    assert_eq!((prefill.requests().len(), decode.requests().len()), (0, 0));
    let (status, body) = harness.complete(many_members(1000)).await;
    assert_eq!((status, body.as_str()), (200, COMPLETION));
    harness.finish().await;
}

#[tokio::test]
async fn duplicate_keys_never_reach_an_engine() {
    let (prefill, decode) = (prefill_engine().await, decode_engine().await);
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let body =
        r#"{"prompt":"x","vllm_xargs":{"kv_transfer_params":{"remote_host":"evil"}},"n":2,"vllm_xargs":{"a":1},"n":1}"#;
    assert_eq!(harness.complete(body).await.0, 200);
    let passed = harness.post("/v1/embeddings", body).send().await.unwrap();
    assert_eq!(passed.status(), 200);
    for seen in [prefill.requests(), decode.requests()].concat() {
        assert!(!seen.raw.contains("evil"), "{}", seen.raw);
        assert_eq!(seen.raw.matches("vllm_xargs").count(), 1, "{}", seen.raw);
        assert_eq!(seen.raw.matches("\"n\"").count(), 1, "{}", seen.raw);
    }
    harness.finish().await;
}

#[tokio::test]
async fn a_too_long_body_is_refused_before_100_continue() {
    let (prefill, decode) = (prefill_engine().await, decode_engine().await);
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    for path in ["/v1/completions", "/v1/embeddings"] {
        for length in ["content-length: 10001", "content-length: 100000000000"] {
            for expect in ["expect: 100-continue\r\n", ""] {
                let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\n{expect}{length}\r\n\r\n");
                let answer = exchange(&harness, &head).await;
                assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
                assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
                assert!(answer.contains("body_too_large"), "{answer}");
            }
        }
        let size = 10_001;
        let head = "content-type: application/json\r\ntransfer-encoding: chunked";
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n");
        let answer = exchange(&harness, &format!("{head}{size:x}\r\n{}\r\n", " ".repeat(size))).await;
        assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
        assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
    }
    assert_eq!(harness.metric(r#"xpyd_errors_total{code="body_too_large"}"#), "10");
    harness.finish().await;
}

async fn wait_for_body_bytes(harness: &ProxyHarness, bytes: usize) {
    let bytes = bytes.to_string();
    within_deadline("the bodies", async {
        while harness.metric("xpyd_body_bytes ") != bytes {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// A request body of this number of bytes.
fn body_of(bytes: usize) -> String {
    let body = r#"{"prompt":""}"#;
    body.replace("\"\"", &format!("\"{}\"", "x".repeat(bytes - body.len())))
}

#[tokio::test]
async fn bodies_share_one_memory_budget() {
    let go = CancellationToken::new();
    let prefill = ScriptedEngine::held_until(&go, nixl_prefill_response).await;
    let decode = ScriptedEngine::start(|_| async { json_response(200, COMPLETION) }).await;
    let mut settings = harness::settings(Connector::Nixl(Nixl {}));
    settings.config.admission.body_bytes = 20_000;
    let harness = ProxyHarness::start(settings, &[prefill.port], &[decode.port], 1, None).await;

    // One request is being served, and half of another one has arrived.
    let first = harness.post("/v1/completions", body_of(8_000));
    let first = BackgroundTask::start(async move { first.send().await.unwrap().status().as_u16() });
    prefill.wait_for_requests(1).await;
    let mut half = TcpStream::connect(harness.url.trim_start_matches("http://"))
        .await
        .unwrap();
    let body = body_of(6_000);
    let head =
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 6000\r\n\r\n";
    half.write_all(format!("{head}{}", &body[..5_000]).as_bytes())
        .await
        .unwrap();
    wait_for_body_bytes(&harness, 13_000).await;

    for path in ["/v1/completions", "/v1/embeddings"] {
        let response = harness.post(path, body_of(3_000)).send().await.unwrap();
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()["retry-after"], "1");
        assert_eq!(code(&response.text().await.unwrap()), "too_many_body_bytes");
    }
    // Refused by its header, or when the budget is used up.
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nexpect: 100-continue\r\n\
                content-length: 3000\r\n\r\n";
    let refused = exchange(&harness, head).await;
    assert!(
        refused.starts_with("HTTP/1.1 503 ") && refused.contains("\r\nconnection: close\r\n"),
        "{refused}"
    );
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                transfer-encoding: chunked\r\n\r\n";
    let refused = exchange(&harness, &format!("{head}bb8\r\n{}\r\n", body_of(3_000))).await;
    assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
    assert_eq!(harness.metric(r#"xpyd_errors_total{code="too_many_body_bytes"}"#), "4");
    // A body that fits is served.
    assert_eq!(
        harness
            .post("/v1/embeddings", body_of(1_500))
            .send()
            .await
            .unwrap()
            .status(),
        200
    );

    // A disconnect frees the share of a request, and so does its response.
    drop(half);
    wait_for_body_bytes(&harness, 8_000).await;
    go.cancel();
    assert_eq!(first.end().await, 200);
    wait_for_body_bytes(&harness, 0).await;
    assert_eq!(harness.complete(body_of(9_000)).await.0, 200);
    wait_for_body_bytes(&harness, 0).await;
    harness.finish().await;
}
