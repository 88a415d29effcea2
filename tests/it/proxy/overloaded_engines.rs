//! Overloaded engines (429 and 503 with `retry-after`): the proxy does not retry them at once, and forwards the wait.

use axum::body::Body;
use axum::http::Response;
use serde_json::json;

use super::harness::{
    COMPLETION, ProxyHarness, ScriptedEngine, code, error_response, json_response, prefill_engine, sse_response,
};
use super::kv_cleanup::is_release;

/// An overloaded engine that sends `retry-after: wait`.
async fn busy_engine(status: u16, wait: &'static str) -> ScriptedEngine {
    ScriptedEngine::start(move |_| async move {
        let mut response = error_response(status, "no room");
        response.headers_mut().insert("retry-after", wait.parse().unwrap());
        response
    })
    .await
}

/// The number of request legs that the engine received.
fn legs(engine: &ScriptedEngine) -> usize {
    engine.requests().iter().filter(|seen| !is_release(seen)).count()
}

async fn ask(harness: &ProxyHarness) -> (u16, String, String) {
    let response = harness
        .post("/v1/completions", r#"{"prompt":"x"}"#)
        .send()
        .await
        .unwrap();
    let wait = response.headers().get("retry-after");
    let wait = wait.map_or("", |value| value.to_str().unwrap()).to_owned();
    (response.status().as_u16(), wait, response.text().await.unwrap())
}

#[tokio::test]
async fn a_busy_engine_is_not_retried_and_retry_after_is_sent() {
    for (status, wait, expected) in [
        (503, "7", "7"),
        (429, "120", "120"),
        (503, "Sun, 06 Nov 1994 08:49:37 GMT", "1"),
        (503, "soon", "1"),
    ] {
        let (prefill, decode) = (prefill_engine().await, busy_engine(status, wait).await);
        let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
        let (got, after, body) = ask(&harness).await;
        assert_eq!((got, after.as_str()), (status, expected), "{body}");
        assert_eq!(code(&body), "engine_overloaded");
        assert!(body.contains("no room"), "{body}");
        assert_eq!((legs(&prefill), legs(&decode)), (1, 1));
        harness.finish().await;

        let (prefill, decode) = (busy_engine(status, wait).await, prefill_engine().await);
        let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
        let (got, after, _) = ask(&harness).await;
        assert_eq!((got, after.as_str()), (status, expected));
        assert_eq!((prefill.requests().len(), decode.requests().len()), (1, 0));
        harness.finish().await;
    }
}

#[tokio::test]
async fn the_longest_retry_after_is_sent_if_all_are_busy() {
    let (prefill, first, second) = (
        prefill_engine().await,
        busy_engine(503, "3").await,
        busy_engine(503, "9").await,
    );
    let harness = ProxyHarness::nixl(&[prefill.port], &[first.port, second.port]).await;
    let (status, after, _) = ask(&harness).await;
    assert_eq!((status, after.as_str()), (503, "9"));
    assert_eq!(prefill.requests().len(), 2, "one for each decode engine");
    harness.finish().await;
}

/// An engine that fails this often is chosen last. A busy engine keeps its turn.
#[tokio::test]
async fn a_busy_engine_does_not_open_the_breaker() {
    let (prefill, full) = (prefill_engine().await, busy_engine(503, "1").await);
    let free = ScriptedEngine::start(|_| async { json_response(200, COMPLETION) }).await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[full.port, free.port]).await;
    for _ in 0..12 {
        assert_eq!(ask(&harness).await.0, 200);
    }
    assert_eq!(
        legs(&full),
        12,
        "a second attempt takes a turn, so that each first one is its"
    );
    harness.finish().await;
}

#[tokio::test]
async fn a_busy_error_event_becomes_the_status() {
    let decode = ScriptedEngine::start(|_| async {
        sse_response(vec![Ok(
            "data: {\"error\":{\"message\":\"no room\",\"type\":\"T\",\"code\":429}}\n\ndata: [DONE]\n\n",
        )])
    })
    .await;
    let prefill = prefill_engine().await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let (status, body) = harness.complete(r#"{"prompt":"x","stream":true}"#).await;
    assert_eq!((status, code(&body).as_str()), (429, "engine_overloaded"));
    harness.finish().await;
}

#[tokio::test]
async fn a_passthrough_429_keeps_the_engines_retry_after() {
    let decode = ScriptedEngine::start(|_| async {
        Response::builder()
            .status(503)
            .header("retry-after", "Wed, 01 Jan 2098 00:00:00 GMT")
            .body(Body::from(json!({"error": {"message": "no room"}}).to_string()))
            .unwrap()
    })
    .await;
    let harness = ProxyHarness::nixl(&[1], &[decode.port]).await;
    let response = harness.post("/v1/embeddings", "{}").send().await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()["retry-after"], "Wed, 01 Jan 2098 00:00:00 GMT");
    harness.finish().await;
}
