//! SSE comments and events without data: engines and the proxy send them to keep connections open. They are not tokens.

use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use xpyd::connector::{Connector, Nixl};
use xpyd::proxy::Settings;

use super::harness::{
    self, ProxyHarness, ScriptedEngine, code, prefill_engine, responses_in_turn, sse_response, within_deadline,
};

/// Keepalive comments and empty events, in every spelling.
const KEEPALIVES: &str =
    ": keep-alive\n\n:\r\n\r\ndata:\n\ndata: \t\n\nretry: 3000\n\nid: 7\n\nevent: ping\nid: 8\ndata:\n\n\n\n";

const STREAM: &str = r#"{"prompt":"x","stream":true}"#;

#[tokio::test]
async fn an_error_after_comments_is_retried() {
    let failing = || {
        sse_response(vec![
            Ok(KEEPALIVES),
            Ok("data: {\"error\":{\"message\":\"boom\",\"code\":500}}\n\ndata: [DONE]\n\n"),
        ])
    };
    let good = || sse_response(vec![Ok(KEEPALIVES), Ok("data: {\"a\":1}\n\n"), Ok("data: [DONE]\n\n")]);
    let prefill = prefill_engine().await;
    let decode = ScriptedEngine::start(responses_in_turn(vec![failing, good])).await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let (status, text) = harness.complete(STREAM).await;
    assert_eq!(status, 200);
    assert_eq!(
        text,
        format!("{KEEPALIVES}data: {{\"a\":1}}\n\ndata: [DONE]\n\n"),
        "comments are passed on"
    );
    assert_eq!(prefill.requests().len(), 2);
    harness.finish().await;
}

#[tokio::test]
async fn comments_do_not_count_as_first_token() {
    let go = CancellationToken::new();
    let gate = go.clone();
    let decode = ScriptedEngine::start(move |_| {
        let gate = gate.clone();
        async move {
            let first = stream::iter([KEEPALIVES; 3].map(Ok::<_, std::io::Error>));
            let rest = stream::once(async move {
                gate.cancelled().await;
                Ok("data: {\"a\":1}\n\ndata: [DONE]\n\n")
            });
            harness::event_stream(Body::from_stream(first.chain(rest)))
        }
    })
    .await;
    let prefill = prefill_engine().await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let request = harness.post("/v1/completions", STREAM);
    let asked = harness::BackgroundTask::start(async move { request.send().await.unwrap().text().await.unwrap() });
    decode.wait_for_requests(1).await;
    // The proxy has read the comments long before it reads this response of another request.
    for _ in 0..20 {
        assert_eq!(harness.get("/health").await.status(), 200);
        assert_eq!(harness.metric("xpyd_time_to_first_token_seconds_count "), "0");
    }
    go.cancel();
    assert!(asked.end().await.ends_with("data: [DONE]\n\n"));
    assert_eq!(harness.metric("xpyd_time_to_first_token_seconds_count "), "1");
    harness.finish().await;
}

#[tokio::test]
async fn comments_between_tokens_are_not_counted() {
    let decode = ScriptedEngine::start(|_| async {
        let pieces = [
            "data: {\"a\":1}\n\n",
            KEEPALIVES,
            KEEPALIVES,
            "data: {\"b\":1}\n\ndata: [DONE]\n\n",
        ];
        // Each event is read separately, because the next one is created after the last one was sent.
        let pieces = stream::iter(pieces).then(|piece| async move {
            tokio::task::yield_now().await;
            Ok::<_, std::io::Error>(piece)
        });
        harness::event_stream(Body::from_stream(pieces))
    })
    .await;
    let prefill = prefill_engine().await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let (_, text) = harness.complete(STREAM).await;
    assert_eq!(text.matches("keep-alive").count(), 2, "{text}");
    let gaps: u64 = harness.metric("xpyd_inter_token_seconds_count ").parse().unwrap();
    assert!(gaps <= 1, "{gaps}");
    harness.finish().await;
}

#[tokio::test]
async fn comments_do_not_keep_a_hung_stream_alive() {
    for (path, body) in [
        ("/v1/completions", STREAM),
        ("/v1/responses", r#"{"input":"x","stream":true}"#),
    ] {
        for beginning in ["data: {\"a\":1}\n\n", ""] {
            let decode = ScriptedEngine::start(move |_| async move {
                let turns = tokio::time::interval(Duration::from_millis(20));
                let rest = stream::unfold(turns, |mut turns| async {
                    turns.tick().await;
                    Some((Ok::<_, std::io::Error>(KEEPALIVES), turns))
                });
                harness::event_stream(Body::from_stream(stream::iter([Ok(beginning)]).chain(rest)))
            })
            .await;
            let prefill = prefill_engine().await;
            let mut settings = harness::settings(Connector::Nixl(Nixl {}));
            settings.deadlines.decode_idle = Duration::from_secs(1);
            let harness = ProxyHarness::start(settings, &[prefill.port], &[decode.port], 1, None).await;
            let response = harness.post(path, body).send().await.unwrap();
            let text = within_deadline("its end", response.text()).await.unwrap();
            let data_lines = text
                .lines()
                .filter_map(|line| line.strip_prefix("data: "))
                .chain([&*text]);
            let mut errors = data_lines.filter_map(|data| serde_json::from_str::<Value>(data).ok());
            assert!(
                errors.any(|event| event["error"]["code"] == "engine_timeout"),
                "{path} {text}"
            );
            harness.finish().await;
        }
    }
}

/// The rest of a stream, without comments.
async fn without_comments(stream: impl Stream<Item = reqwest::Result<Bytes>>) -> String {
    let rest: Vec<_> = within_deadline("the end", stream.map(Result::unwrap).collect()).await;
    let rest = String::from_utf8(rest.concat()).unwrap();
    rest.replace(": keep-alive\n\n", "")
}

/// A proxy that sends a keepalive comment after very short pauses.
fn with_keepalive() -> Settings {
    let mut settings = harness::settings(Connector::Nixl(Nixl {}));
    settings.config.streams.keep_alive = Duration::from_millis(50);
    settings
}

#[tokio::test]
async fn keepalive_comments_are_sent_during_prefill() {
    let go = CancellationToken::new();
    let prefill = ScriptedEngine::held_until(&go, harness::nixl_prefill_response).await;
    let decode =
        ScriptedEngine::start(|_| async { sse_response(vec![Ok("data: {\"a\":1}\n\n"), Ok("data: [DONE]\n\n")]) })
            .await;
    let harness = ProxyHarness::start(with_keepalive(), &[prefill.port], &[decode.port], 1, None).await;
    let response = harness.post("/v1/completions", STREAM).send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
    let mut stream = response.bytes_stream();
    for _ in 0..3 {
        assert_eq!(
            within_deadline("a comment", stream.next()).await.unwrap().unwrap(),
            ": keep-alive\n\n"
        );
    }
    go.cancel();
    let rest = without_comments(stream).await;
    assert_eq!(rest, "data: {\"a\":1}\n\ndata: [DONE]\n\n");
    assert_eq!(harness.metric(r#"xpyd_request_seconds_count{outcome="answered"}"#), "1");
    harness.finish().await;
}

#[tokio::test]
async fn a_failure_after_a_comment_is_an_error_event() {
    for (status, outcome) in [(500, "broken"), (400, "refused")] {
        let go = CancellationToken::new();
        let decode = ScriptedEngine::held_until(&go, move || harness::error_response(status, "of the engine")).await;
        let prefill = prefill_engine().await;
        let harness = ProxyHarness::start(with_keepalive(), &[prefill.port], &[decode.port], 1, None).await;
        let response = harness.post("/v1/completions", STREAM).send().await.unwrap();
        assert_eq!(response.status(), 200);
        let mut stream = response.bytes_stream();
        assert_eq!(
            within_deadline("a comment", stream.next()).await.unwrap().unwrap(),
            ": keep-alive\n\n"
        );
        go.cancel();
        let rest = without_comments(stream).await;
        assert!(
            rest.starts_with("data: {\"error\":") && rest.contains("of the engine"),
            "{rest}"
        );
        assert!(rest.ends_with("\n\ndata: [DONE]\n\n"), "{rest}");
        let count = format!("xpyd_request_seconds_count{{outcome=\"{outcome}\"}}");
        within_deadline("its end", async {
            while harness.metric(&count) != "1" {
                tokio::task::yield_now().await;
            }
        })
        .await;
        harness.finish().await;
    }
}

#[tokio::test]
async fn fast_and_non_stream_responses_get_no_comments() {
    let decode = ScriptedEngine::start(|seen| async move {
        if seen.raw.contains("\"stream\":true") {
            sse_response(vec![Ok("data: {\"a\":1}\n\ndata: [DONE]\n\n")])
        } else {
            harness::json_response(200, harness::COMPLETION)
        }
    })
    .await;
    let prefill = prefill_engine().await;
    let mut settings = with_keepalive();
    settings.config.streams.keep_alive = Duration::from_mins(10);
    let harness = ProxyHarness::start(settings, &[prefill.port], &[decode.port], 1, None).await;
    assert_eq!(
        harness.complete(STREAM).await,
        (200, "data: {\"a\":1}\n\ndata: [DONE]\n\n".to_owned())
    );
    assert_eq!(
        harness.complete(r#"{"prompt":"x"}"#).await,
        (200, harness::COMPLETION.to_owned())
    );
    let (status, body) = harness.complete(r#"{"prompt":"x","stream":true"#).await;
    assert_eq!((status, code(&body).as_str()), (400, "invalid_body"));
    harness.finish().await;
}
