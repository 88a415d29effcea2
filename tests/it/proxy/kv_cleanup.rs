//! KV on a prefill engine after a request ends early: how it is freed, what waits for it, and which engine is blamed.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use xpyd::connector::{Connector, Nixl};
use xpyd::fleet::{EngineState, Role};
use xpyd::proxy_config::WithoutPrefill;

use super::harness::{
    BackgroundTask, COMPLETION, ProxyHarness, ScriptedEngine, code, dead_port, decode_engine, error_response,
    json_response, nixl_prefill_response, prefill_engine, settings, within_deadline,
};

/// The model name in requests that make a decode engine free KV.
const RELEASE: &str = "xpyd-releases-kv-with-this-unknown-model";

pub(super) fn is_release(seen: &super::harness::SeenRequest) -> bool {
    seen.json()["model"] == RELEASE && seen.json()["kv_transfer_params"]["remote_engine_id"] == "e"
}

/// A decode engine that refuses unknown models, like vLLM.
async fn decode_engine_that_checks_models() -> ScriptedEngine {
    ScriptedEngine::start(|seen| async move {
        if seen.json()["model"] == RELEASE {
            error_response(404, "no such model")
        } else {
            json_response(200, COMPLETION)
        }
    })
    .await
}

#[tokio::test]
async fn kv_of_an_unreached_decode_engine_is_freed_by_another() {
    let (prefill, other) = (prefill_engine().await, decode_engine_that_checks_models().await);
    let harness = ProxyHarness::nixl(&[prefill.port], &[dead_port().await, other.port]).await;
    let (status, _) = harness.complete(r#"{"prompt":"x"}"#).await;
    assert_eq!(status, 200, "the other decode engine answers");
    let seen = other.wait_for_requests(2).await;
    assert_eq!(seen.iter().filter(|seen| is_release(seen)).count(), 1, "{seen:?}");
    harness.finish().await;
}

#[tokio::test]
async fn kv_of_a_late_prefill_is_freed_after_a_disconnect() {
    let gate = Arc::new(tokio::sync::Notify::new());
    let prefill = ScriptedEngine::start({
        let gate = Arc::clone(&gate);
        move |_| {
            let gate = Arc::clone(&gate);
            async move {
                gate.notified().await;
                nixl_prefill_response()
            }
        }
    })
    .await;
    let decode = decode_engine_that_checks_models().await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let request = harness.post("/v1/completions", r#"{"prompt":"x"}"#).send();
    tokio::select! {
        _ = request => panic!("nothing is answered yet"),
        _ = prefill.wait_for_requests(1) => {}
    }
    // Dropping the request closed the client's connection. The proxy notices that.
    within_deadline("the end of the hand-off", async {
        while !harness.proxy.metrics_text().contains("xpyd_handoffs_open 0\n") {
            tokio::task::yield_now().await;
        }
    })
    .await;
    gate.notify_one();
    let seen = decode.wait_for_requests(1).await;
    assert!(is_release(&seen[0]), "{seen:?}");
    harness.finish().await;
}

#[tokio::test]
async fn kv_of_a_dead_decode_engine_is_freed_by_another() {
    let (prefill, other) = (prefill_engine().await, decode_engine_that_checks_models().await);
    let dying = ScriptedEngine::start(|_| std::future::pending::<axum::http::Response<axum::body::Body>>()).await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[dying.port, other.port]).await;
    let request = harness.complete(r#"{"prompt":"x"}"#);
    let death = async {
        dying.wait_for_requests(1).await;
        harness.lose(Role::Decode, 0);
    };
    let ((status, _), ()) = tokio::join!(request, death);
    assert_eq!(status, 200);
    let seen = other.wait_for_requests(2).await;
    assert_eq!(seen.iter().filter(|seen| is_release(seen)).count(), 1, "{seen:?}");
    harness.finish().await;
}

#[tokio::test]
async fn a_draining_prefill_engine_waits_for_its_kv() {
    let prefill = prefill_engine().await;
    let gate = CancellationToken::new();
    let decode = ScriptedEngine::held_until(&gate, || json_response(200, COMPLETION)).await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let url = format!("{}/v1/completions", harness.url);
    let request = BackgroundTask::start(async move {
        let request = reqwest::Client::new()
            .post(url)
            .header("content-type", "application/json");
        let request = request.body(r#"{"prompt":"x"}"#);
        request.send().await.unwrap().status().as_u16()
    });
    decode.wait_for_requests(1).await;
    let load = Arc::clone(&harness.fleet.borrow().engines[0].load);
    assert_eq!(load.in_flight(), 0, "it computes nothing more for this request");
    harness.change(|view| {
        let engine = Arc::make_mut(&mut view.engines[0]);
        engine.state = EngineState::Draining;
        engine.load.close();
    });
    assert!(futures_util::FutureExt::now_or_never(load.idle()).is_none());
    gate.cancel();
    assert_eq!(request.end().await, 200);
    within_deadline("an idle prefill engine", load.idle()).await;
    harness.finish().await;
}

#[tokio::test]
async fn a_retry_avoids_only_the_failed_engine() {
    let (first, second) = (prefill_engine().await, prefill_engine().await);
    let failing = ScriptedEngine::start(|seen| async move {
        if seen.json()["model"] == RELEASE {
            error_response(404, "no such model")
        } else {
            error_response(500, "broken")
        }
    })
    .await;
    let well = decode_engine_that_checks_models().await;
    let harness = ProxyHarness::nixl(&[first.port, second.port], &[failing.port, well.port]).await;
    let response = within_deadline("an answer", harness.post("/v1/completions", r#"{"prompt":"x"}"#).send())
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    let header = response.headers()["x-xpyd-handoff"].to_str().unwrap().to_owned();
    assert!(
        header.starts_with("sent;") && header.contains(r#"decode="decoder2""#),
        "{header}"
    );
    assert!(header.ends_with(";attempt=2"), "{header}");
    harness.finish().await;
    assert_eq!(well.requests().iter().filter(|seen| !is_release(seen)).count(), 1);
}

#[tokio::test]
async fn a_repeatedly_failing_engine_is_chosen_last() {
    let prefill = prefill_engine().await;
    let failing = ScriptedEngine::start(|_| async { error_response(500, "broken") }).await;
    let well = decode_engine().await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[failing.port, well.port]).await;
    let began = Instant::now();
    for _ in 0..20 {
        assert_eq!(harness.complete(r#"{"prompt":"x"}"#).await.0, 200);
    }
    let asked = failing.requests().iter().filter(|seen| !is_release(seen)).count();
    // After the third failure it rests for a second, then gets one request, and rests for longer.
    let most = 3 + usize::try_from(began.elapsed().as_secs()).expect("a number");
    assert!(
        (3..=most).contains(&asked),
        "{asked} requests, where {most} are the most"
    );
    // With no other left, it is asked again.
    harness.lose(Role::Decode, 1);
    let (status, body) = harness.complete(r#"{"prompt":"x"}"#).await;
    assert_eq!((status, code(&body).as_str()), (502, "engine_failed"));
    harness.finish().await;
}

#[tokio::test]
async fn decode_only_fallback_works_when_enabled() {
    for (policy, expected) in [(WithoutPrefill::Fail, 503), (WithoutPrefill::Aggregate, 200)] {
        let (prefill, decode) = (prefill_engine().await, decode_engine().await);
        let mut settings = settings(Connector::Nixl(Nixl {}));
        settings.config.routing.without_prefill = policy;
        let harness = ProxyHarness::start(settings, &[prefill.port], &[decode.port], 1, None).await;
        harness.lose(Role::Prefill, 0);
        assert_eq!(harness.get("/health").await.status(), expected);
        let request = harness.post("/v1/completions", r#"{"prompt":"x"}"#).send();
        let response = within_deadline("an answer", request).await.unwrap();
        assert_eq!(response.status(), expected);
        if expected == 200 {
            let header = response.headers()["x-xpyd-handoff"].to_str().unwrap();
            assert_eq!(
                header,
                r#"bypassed;reason="without_prefill";decode="decoder1";attempt=1"#
            );
            assert_eq!(decode.requests()[0].json()["kv_transfer_params"], Value::Null);
        }
        harness.finish().await;
    }
}

#[tokio::test]
async fn unfreeable_kv_is_reported_and_blocks_nothing() {
    let prefill = ScriptedEngine::start(|_| async { nixl_prefill_response() }).await;
    let mut settings = settings(Connector::Nixl(Nixl {}));
    settings.deadlines.handoff = Duration::from_millis(200);
    settings.config.routing.attempts = 1;
    let harness = ProxyHarness::start(settings, &[prefill.port], &[dead_port().await], 1, None).await;
    assert_eq!(harness.complete(r#"{"prompt":"x"}"#).await.0, 502);
    let proxy = harness.proxy.clone();
    harness.finish().await;
    let metrics = proxy.metrics_text();
    assert!(
        metrics.contains("xpyd_handoff_cleanups_total{outcome=\"stranded\"} 1\n"),
        "{metrics}"
    );
}
