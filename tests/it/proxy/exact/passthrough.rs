//! Passthrough: requests that a decode engine answers alone, and requests that never reach an engine.

use std::time::Duration;

use axum::body::Body;
use axum::http::Response;
use futures_util::StreamExt as _;
use serde_json::Value;
use xpyd::connector::{Connector, Nixl};
use xpyd::fleet::Role;

use crate::proxy::harness::{self, ProxyHarness, ScriptedEngine, dead_port, json_response, within_deadline};

async fn harness(decode: &ScriptedEngine) -> (ScriptedEngine, ProxyHarness) {
    let prefill = ScriptedEngine::start(|_| async { json_response(500, "unused") }).await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    (prefill, harness)
}

async fn echo() -> ScriptedEngine {
    ScriptedEngine::start(|seen| async move { json_response(200, format!("{} {}", seen.path, seen.raw)) }).await
}

#[tokio::test]
async fn reserved_fields_are_removed_from_passthrough_requests() {
    let decode = echo().await;
    let (_prefill, harness) = harness(&decode).await;
    for path in [
        "/v1/responses",
        "/v1/messages",
        "/v1/embeddings",
        "/tokenize",
        "/v1/of_a_later_version",
        "/v1/responses/resp_1/cancel",
    ] {
        let body = r#"{"input" :"x", "kv_transfer_params":{"do_remote_prefill":true},"vllm_xargs":{"a":1,"kv_transfer_params":"x"},"new":1.50}"#;
        let answer = harness.post(path, body).send().await.unwrap().text().await.unwrap();
        assert_eq!(
            answer,
            format!(r#"{path} {{"input" :"x","vllm_xargs":{{"a":1}},"new":1.50}}"#)
        );
    }
    harness.finish().await;
}

/// Like Python, the proxy parses JSON in UTF-16 and after a byte order mark, so that no parameter is hidden from it.
#[tokio::test]
async fn a_body_is_parsed_as_an_engine_parses_it() {
    let decode = echo().await;
    let (_prefill, harness) = harness(&decode).await;
    let body = r#"{"kv_transfer_params":{"do_remote_prefill":true},"text":"ä🌊"}"#;
    let units = || body.encode_utf16();
    let marked = || std::iter::once(0xfeff_u16).chain(units());
    for (name, bytes) in [
        ("UTF-8 with a mark", [b"\xef\xbb\xbf", body.as_bytes()].concat()),
        ("UTF-16, little end first", units().flat_map(u16::to_le_bytes).collect()),
        ("UTF-16, big end first", units().flat_map(u16::to_be_bytes).collect()),
        ("the same with a mark", marked().flat_map(u16::to_le_bytes).collect()),
        ("and the other way round", marked().flat_map(u16::to_be_bytes).collect()),
    ] {
        let answer = harness
            .post("/v1/embeddings", bytes)
            .send()
            .await
            .unwrap()
            .text()
            .await
            .unwrap();
        assert_eq!(answer, "/v1/embeddings {\"text\":\"ä🌊\"}", "{name}");
    }
    harness.finish().await;
}

#[tokio::test]
async fn an_unreadable_body_is_not_forwarded() {
    let decode = echo().await;
    let (_prefill, harness) = harness(&decode).await;
    // Python uses the first one.
    for body in [
        br#"{"kv_transfer_params":{"do_remote_prefill":true},"x":NaN}"#.to_vec(),
        b"\xff\xfe{".to_vec(),
        b"{\0\0\0".to_vec(),
        b"--b\r\ncontent-disposition: form-data; name=\"vllm_xargs\"\r\n\r\n{}\r\n--b--".to_vec(),
    ] {
        let response = harness.post("/v1/embeddings", body).send().await.unwrap();
        assert_eq!(response.status(), 400);
        let body: Value = serde_json::from_str(&response.text().await.unwrap()).unwrap();
        assert_eq!(body["error"]["code"], "invalid_body");
    }
    assert_eq!(decode.requests().len(), 0);
    harness.finish().await;
}

#[tokio::test]
async fn engine_control_routes_are_refused_in_any_spelling() {
    let decode = echo().await;
    let (prefill, harness) = harness(&decode).await;
    for path in [
        "/sleep",
        "/wake_up",
        "/pause",
        "/resume",
        "/abort_requests",
        "/reset_prefix_cache",
        "/collective_rpc",
        "/scale_elastic_ep",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/inference/v1/generate",
        "/v1/audio/transcriptions",
        "/update_weights",
    ] {
        let response = harness.post(path, "{}").send().await.unwrap();
        assert_eq!(response.status(), 403, "{path}");
        let body: Value = serde_json::from_str(&response.text().await.unwrap()).unwrap();
        assert_eq!(body["error"]["code"], "route_refused", "{path}");
    }
    for path in [
        "/v1/load%5Flora_adapter",
        "/v1/load_lora_adapter/",
        "/v1//load_lora_adapter",
        "/inference/v1/other",
        "/not_known",
    ] {
        assert_eq!(harness.post(path, "{}").send().await.unwrap().status(), 404, "{path}");
    }
    assert_eq!((prefill.requests().len(), decode.requests().len()), (0, 0));
    harness.finish().await;
}

/// An engine whose response starts and then stalls.
async fn stalling_engine(content_type: &'static str) -> ScriptedEngine {
    ScriptedEngine::start(move |_| async move {
        let first = futures_util::stream::iter([Ok::<_, std::io::Error>("event: a\ndata: {\"a\":1}\n\n")]);
        let body = Body::from_stream(first.chain(futures_util::stream::pending()));
        Response::builder()
            .header("content-type", content_type)
            .body(body)
            .unwrap()
    })
    .await
}

#[tokio::test]
async fn a_passthrough_stream_is_unbuffered_and_ends_loudly() {
    let decode = stalling_engine("text/event-stream; charset=utf-8").await;
    let (_prefill, harness) = harness(&decode).await;
    let response = within_deadline("the head", harness.post("/v1/messages", r#"{"stream":true}"#).send())
        .await
        .unwrap();
    let mut stream = response.bytes_stream();
    let first = within_deadline("the first event", stream.next())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(first, "event: a\ndata: {\"a\":1}\n\n");
    harness.lose(Role::Decode, 0);
    let rest: Vec<_> = within_deadline("the end", stream.map(Result::unwrap).collect()).await;
    let rest = String::from_utf8(rest.concat()).unwrap();
    assert!(rest.starts_with("event: error\ndata: {\"error\":"), "{rest}");
    assert!(rest.contains("engine_unreachable"), "{rest}");
    harness.finish().await;
}

#[tokio::test]
async fn a_stalled_passthrough_response_is_closed() {
    let decode = stalling_engine("application/json").await;
    let prefill = echo().await;
    let mut settings = harness::settings(Connector::Nixl(Nixl {}));
    settings.deadlines.decode_idle = Duration::from_secs(2);
    let harness = ProxyHarness::start(settings, &[prefill.port], &[decode.port], 1, None).await;
    let response = harness.post("/v1/embeddings", "{}").send().await.unwrap();
    assert!(
        within_deadline("the end", response.text()).await.is_err(),
        "it is not whole"
    );
    harness.finish().await;
}

#[tokio::test]
async fn a_passthrough_stream_needs_no_done_marker() {
    let whole = "event: message_start\ndata: {}\n\nevent: message_stop\ndata: {}\n\n";
    let decode = ScriptedEngine::start(move |_| async move { harness::sse_response(vec![Ok(whole)]) }).await;
    let (_prefill, harness) = harness(&decode).await;
    let response = harness.post("/v1/messages", "{}").send().await.unwrap();
    assert_eq!(response.text().await.unwrap(), whole);
    harness.finish().await;
}

#[tokio::test]
async fn passthrough_uses_the_least_busy_reachable_engine() {
    let (prefill, busy, idle) = (
        echo().await,
        ScriptedEngine::start(|_| std::future::pending()).await,
        echo().await,
    );
    let harness = ProxyHarness::nixl(&[prefill.port], &[busy.port, idle.port]).await;
    let stuck = harness.post("/v1/responses", "{}").send();
    let second = async {
        busy.wait_for_requests(1).await;
        harness.post("/v1/responses", "{}").send().await.unwrap().status()
    };
    tokio::select! {
        _ = stuck => panic!("it never answers"),
        status = within_deadline("the answer", second) => assert_eq!(status, 200),
    }
    assert_eq!((busy.requests().len(), idle.requests().len()), (1, 1));
    harness.finish().await;

    let harness = ProxyHarness::nixl(&[prefill.port], &[dead_port().await, idle.port]).await;
    assert_eq!(harness.get("/v1/models").await.status(), 200);
    harness.finish().await;
}

#[tokio::test]
async fn a_passthrough_response_keeps_status_and_length() {
    let decode = ScriptedEngine::start(|_| async { harness::error_response(422, "no such field") }).await;
    let (_prefill, harness) = harness(&decode).await;
    let response = harness.post("/v1/responses", "{}").send().await.unwrap();
    assert_eq!(response.status(), 422);
    let length: usize = response.headers()["content-length"].to_str().unwrap().parse().unwrap();
    assert_eq!(response.text().await.unwrap().len(), length);
    harness.finish().await;
}
