//! Engines that say that they have no room: they are not asked again at once, and their clients learn when to come back.

use axum::body::Body;
use axum::http::Response;
use serde_json::json;

use super::fake::{COMPLETION, Fake, Rig, answer, error, events};
use super::stranded::is_release;
use super::{code, prefiller};

/// An engine without room, which wants to be asked again after `wait`.
async fn busy(status: u16, wait: &'static str) -> Fake {
    Fake::start(move |_| async move {
        let mut response = error(status, "no room");
        response.headers_mut().insert("retry-after", wait.parse().unwrap());
        response
    })
    .await
}

/// Legs of requests that the engine has seen.
fn legs(engine: &Fake) -> usize {
    engine.seen().iter().filter(|seen| !is_release(seen)).count()
}

async fn ask(rig: &Rig) -> (u16, String, String) {
    let response = rig.post("/v1/completions", r#"{"prompt":"x"}"#).send().await.unwrap();
    let wait = response.headers().get("retry-after");
    let wait = wait.map_or("", |value| value.to_str().unwrap()).to_owned();
    (response.status().as_u16(), wait, response.text().await.unwrap())
}

#[tokio::test]
async fn a_busy_engine_is_asked_once_and_its_client_is_told_when_to_come_back() {
    for (status, wait, told) in [
        (503, "7", "7"),
        (429, "120", "120"),
        (503, "Sun, 06 Nov 1994 08:49:37 GMT", "1"),
        (503, "soon", "1"),
    ] {
        let (prefill, decode) = (prefiller().await, busy(status, wait).await);
        let rig = Rig::nixl(&[prefill.port], &[decode.port]).await;
        let (got, after, body) = ask(&rig).await;
        assert_eq!((got, after.as_str()), (status, told), "{body}");
        assert_eq!(code(&body), "engine_overloaded");
        assert!(body.contains("no room"), "{body}");
        assert_eq!((legs(&prefill), legs(&decode)), (1, 1));
        rig.finish().await;

        let (prefill, decode) = (busy(status, wait).await, prefiller().await);
        let rig = Rig::nixl(&[prefill.port], &[decode.port]).await;
        let (got, after, _) = ask(&rig).await;
        assert_eq!((got, after.as_str()), (status, told));
        assert_eq!((prefill.seen().len(), decode.seen().len()), (1, 0));
        rig.finish().await;
    }
}

#[tokio::test]
async fn another_engine_is_asked_and_the_longest_wait_is_told_where_all_are_busy() {
    let (prefill, first, second) = (prefiller().await, busy(503, "3").await, busy(503, "9").await);
    let rig = Rig::nixl(&[prefill.port], &[first.port, second.port]).await;
    let (status, after, _) = ask(&rig).await;
    assert_eq!((status, after.as_str()), (503, "9"));
    assert_eq!(prefill.seen().len(), 2, "one for each decode engine");
    rig.finish().await;
}

/// An engine that fails so often is the last choice; one that is busy is asked again as soon as it is its turn.
#[tokio::test]
async fn a_busy_engine_is_not_taken_for_a_broken_one() {
    let (prefill, full) = (prefiller().await, busy(503, "1").await);
    let free = Fake::start(|_| async { answer(200, COMPLETION) }).await;
    let rig = Rig::nixl(&[prefill.port], &[full.port, free.port]).await;
    for _ in 0..12 {
        assert_eq!(ask(&rig).await.0, 200);
    }
    assert_eq!(
        legs(&full),
        12,
        "a second attempt takes a turn, so that each first one is its"
    );
    rig.finish().await;
}

#[tokio::test]
async fn an_error_event_of_a_busy_engine_is_its_status() {
    let decode = Fake::start(|_| async {
        events(vec![Ok(
            "data: {\"error\":{\"message\":\"no room\",\"type\":\"T\",\"code\":429}}\n\ndata: [DONE]\n\n",
        )])
    })
    .await;
    let prefill = prefiller().await;
    let rig = Rig::nixl(&[prefill.port], &[decode.port]).await;
    let (status, body) = rig.complete(r#"{"prompt":"x","stream":true}"#).await;
    assert_eq!((status, code(&body).as_str()), (429, "engine_overloaded"));
    rig.finish().await;
}

#[tokio::test]
async fn a_passed_answer_keeps_what_the_engine_says_of_its_room() {
    let decode = Fake::start(|_| async {
        Response::builder()
            .status(503)
            .header("retry-after", "Wed, 01 Jan 2098 00:00:00 GMT")
            .body(Body::from(json!({"error": {"message": "no room"}}).to_string()))
            .unwrap()
    })
    .await;
    let rig = Rig::nixl(&[1], &[decode.port]).await;
    let response = rig.post("/v1/embeddings", "{}").send().await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()["retry-after"], "Wed, 01 Jan 2098 00:00:00 GMT");
    rig.finish().await;
}
