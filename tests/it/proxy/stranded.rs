//! KV that a prefill engine keeps: who frees it when the request ends early, who waits for it, and who is to blame.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio_util::sync::CancellationToken;
use xpyd::connector::{Connector, Nixl};
use xpyd::fleet::{EngineState, Role};
use xpyd::service::WithoutPrefill;

use super::fake::{COMPLETION, Fake, Going, Rig, answer, dead_port, error, nixl_prefilled, settings, soon};
use super::{code, decoder, prefiller};

/// The model that a decode engine is asked for when it shall free KV.
const RELEASE: &str = "xpyd-releases-kv-with-this-unknown-model";

pub(super) fn is_release(seen: &super::fake::Seen) -> bool {
    seen.json()["model"] == RELEASE && seen.json()["kv_transfer_params"]["remote_engine_id"] == "e"
}

/// A decode engine that refuses unknown models, as all do.
async fn strict_decoder() -> Fake {
    Fake::start(|seen| async move {
        if seen.json()["model"] == RELEASE {
            error(404, "no such model")
        } else {
            answer(200, COMPLETION)
        }
    })
    .await
}

#[tokio::test]
async fn kv_is_freed_by_another_decode_engine_where_its_own_was_never_reached() {
    let (prefill, other) = (prefiller().await, strict_decoder().await);
    let rig = Rig::nixl(&[prefill.port], &[dead_port().await, other.port]).await;
    let (status, _) = rig.complete(r#"{"prompt":"x"}"#).await;
    assert_eq!(status, 200, "the other decode engine answers");
    let seen = other.saw(2).await;
    assert_eq!(seen.iter().filter(|seen| is_release(seen)).count(), 1, "{seen:?}");
    rig.finish().await;
}

#[tokio::test]
async fn kv_of_a_prefill_that_ends_just_after_its_client_left_is_freed() {
    let gate = Arc::new(tokio::sync::Notify::new());
    let prefill = Fake::start({
        let gate = Arc::clone(&gate);
        move |_| {
            let gate = Arc::clone(&gate);
            async move {
                gate.notified().await;
                nixl_prefilled()
            }
        }
    })
    .await;
    let decode = strict_decoder().await;
    let rig = Rig::nixl(&[prefill.port], &[decode.port]).await;
    let request = rig.post("/v1/completions", r#"{"prompt":"x"}"#).send();
    tokio::select! {
        _ = request => panic!("nothing is answered yet"),
        _ = prefill.saw(1) => {}
    }
    // The connection of the client closed with its request, and the proxy comes to know that.
    soon("the end of the hand-off", async {
        while !rig.proxy.metrics_text().contains("xpyd_handoffs_open 0") {
            tokio::task::yield_now().await;
        }
    })
    .await;
    gate.notify_one();
    let seen = decode.saw(1).await;
    assert!(is_release(&seen[0]), "{seen:?}");
    rig.finish().await;
}

#[tokio::test]
async fn kv_of_a_decode_engine_that_dies_is_freed_by_another_one() {
    let (prefill, other) = (prefiller().await, strict_decoder().await);
    let dying = Fake::start(|_| std::future::pending::<axum::http::Response<axum::body::Body>>()).await;
    let rig = Rig::nixl(&[prefill.port], &[dying.port, other.port]).await;
    let request = rig.complete(r#"{"prompt":"x"}"#);
    let death = async {
        dying.saw(1).await;
        rig.lose(Role::Decode, 0);
    };
    let ((status, _), ()) = tokio::join!(request, death);
    assert_eq!(status, 200);
    let seen = other.saw(2).await;
    assert_eq!(seen.iter().filter(|seen| is_release(seen)).count(), 1, "{seen:?}");
    rig.finish().await;
}

#[tokio::test]
async fn a_prefill_engine_that_drains_waits_until_its_kv_is_fetched() {
    let prefill = prefiller().await;
    let gate = CancellationToken::new();
    let decode = Fake::held(&gate, || answer(200, COMPLETION)).await;
    let rig = Rig::nixl(&[prefill.port], &[decode.port]).await;
    let url = format!("{}/v1/completions", rig.url);
    let request = Going::start(async move {
        let request = reqwest::Client::new()
            .post(url)
            .header("content-type", "application/json");
        let request = request.body(r#"{"prompt":"x"}"#);
        request.send().await.unwrap().status().as_u16()
    });
    decode.saw(1).await;
    let load = Arc::clone(&rig.fleet.borrow().engines[0].load);
    assert_eq!(load.in_flight(), 0, "it computes nothing more for this request");
    rig.change(|view| {
        let engine = Arc::make_mut(&mut view.engines[0]);
        engine.state = EngineState::Draining;
        engine.load.close();
    });
    assert!(futures_util::FutureExt::now_or_never(load.idle()).is_none());
    gate.cancel();
    assert_eq!(request.end().await, 200);
    soon("an idle prefill engine", load.idle()).await;
    rig.finish().await;
}

#[tokio::test]
async fn only_the_engine_that_failed_is_left_alone_by_the_next_attempt() {
    let (first, second) = (prefiller().await, prefiller().await);
    let failing = Fake::start(|seen| async move {
        if seen.json()["model"] == RELEASE {
            error(404, "no such model")
        } else {
            error(500, "broken")
        }
    })
    .await;
    let well = strict_decoder().await;
    let rig = Rig::nixl(&[first.port, second.port], &[failing.port, well.port]).await;
    let response = soon("an answer", rig.post("/v1/completions", r#"{"prompt":"x"}"#).send())
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    let told = response.headers()["x-xpyd-handoff"].to_str().unwrap().to_owned();
    assert!(
        told.starts_with("sent;") && told.contains(r#"decode="decoder2""#),
        "{told}"
    );
    assert!(told.ends_with(";attempt=2"), "{told}");
    rig.finish().await;
    assert_eq!(well.seen().iter().filter(|seen| !is_release(seen)).count(), 1);
}

#[tokio::test]
async fn an_engine_that_fails_again_and_again_is_the_last_choice() {
    let prefill = prefiller().await;
    let failing = Fake::start(|_| async { error(500, "broken") }).await;
    let well = decoder().await;
    let rig = Rig::nixl(&[prefill.port], &[failing.port, well.port]).await;
    let began = Instant::now();
    for _ in 0..20 {
        assert_eq!(rig.complete(r#"{"prompt":"x"}"#).await.0, 200);
    }
    let asked = failing.seen().iter().filter(|seen| !is_release(seen)).count();
    // After the third failure it rests for a second, then is asked once, and rests for longer.
    let most = 3 + usize::try_from(began.elapsed().as_secs()).expect("a number");
    assert!(
        (3..=most).contains(&asked),
        "{asked} requests, where {most} are the most"
    );
    // With no other left, it is asked again.
    rig.lose(Role::Decode, 1);
    let (status, body) = rig.complete(r#"{"prompt":"x"}"#).await;
    assert_eq!((status, code(&body).as_str()), (502, "engine_failed"));
    rig.finish().await;
}

#[tokio::test]
async fn without_prefill_engines_decode_engines_answer_alone_if_they_may() {
    for (policy, expected) in [(WithoutPrefill::Fail, 503), (WithoutPrefill::Aggregate, 200)] {
        let (prefill, decode) = (prefiller().await, decoder().await);
        let mut settings = settings(Connector::Nixl(Nixl {}));
        settings.service.routing.without_prefill = policy;
        let rig = Rig::start(settings, &[prefill.port], &[decode.port], 1, None).await;
        rig.lose(Role::Prefill, 0);
        assert_eq!(rig.get("/health").await.status(), expected);
        let request = rig.post("/v1/completions", r#"{"prompt":"x"}"#).send();
        let response = soon("an answer", request).await.unwrap();
        assert_eq!(response.status(), expected);
        if expected == 200 {
            let told = response.headers()["x-xpyd-handoff"].to_str().unwrap();
            assert_eq!(told, r#"bypassed;reason="without_prefill";decode="decoder1";attempt=1"#);
            assert_eq!(decode.seen()[0].json()["kv_transfer_params"], Value::Null);
        }
        rig.finish().await;
    }
}

#[tokio::test]
async fn kv_that_nobody_can_free_is_told_of_and_holds_up_nothing() {
    let prefill = Fake::start(|_| async { nixl_prefilled() }).await;
    let mut settings = settings(Connector::Nixl(Nixl {}));
    settings.handoff_deadline = Duration::from_millis(200);
    settings.service.routing.attempts = 1;
    let rig = Rig::start(settings, &[prefill.port], &[dead_port().await], 1, None).await;
    assert_eq!(rig.complete(r#"{"prompt":"x"}"#).await.0, 502);
    let proxy = rig.proxy.clone();
    rig.finish().await;
    let metrics = proxy.metrics_text();
    assert!(
        metrics.contains(r#"xpyd_handoff_cleanups_total{outcome="stranded"} 1"#),
        "{metrics}"
    );
}
