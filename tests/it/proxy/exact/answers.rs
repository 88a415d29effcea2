//! Responses: refusals of prefill engines, usage, strict hand-offs, and failed generations.

use futures_util::StreamExt as _;
use serde_json::json;
use xpyd::connector::{Connector, FirstToken, Nixl};
use xpyd::proxy::Notifications;

use crate::proxy::harness::{
    self, COMPLETION, PARAMS, ProxyHarness, ScriptedEngine, error_response, json_response, nixl_prefill_response,
    sse_response,
};
use crate::proxy::lmcache::notifying_prefill_engine;

async fn prefill_engine() -> ScriptedEngine {
    ScriptedEngine::start(|_| async { nixl_prefill_response() }).await
}

fn outcome(harness: &ProxyHarness, outcome: &str) -> String {
    harness.metric(&format!("xpyd_handoff_total{{outcome=\"{outcome}\"}}"))
}

#[tokio::test]
async fn the_decode_engine_decides_on_prefill_refusals() {
    // The prefill engine refuses a field that the proxy itself has changed.
    let prefill = ScriptedEngine::start(|_| async { error_response(400, "max_tokens=1 is too small") }).await;
    let body = r#"{"prompt":"x", "min_tokens":2,"max_tokens":5}"#;
    for (decoder, status) in [("fine", 200), ("min_tokens must be", 400)] {
        let decode = ScriptedEngine::start(move |_| async move {
            if decoder == "fine" {
                json_response(200, COMPLETION)
            } else {
                error_response(400, decoder)
            }
        })
        .await;
        let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
        let (got, text) = harness.complete(body).await;
        assert_eq!(got, status, "{text}");
        assert!(text == COMPLETION || text.contains("min_tokens must be"), "{text}");
        let seen = decode.requests();
        assert_eq!((seen.len(), seen[0].raw.as_str()), (1, body));
        let counted = if status == 200 { "bypassed" } else { "refused" };
        assert_eq!(outcome(&harness, counted), "1");
        assert_eq!(harness.metric("xpyd_retries_total"), "0");
        harness.finish().await;
    }
}

#[tokio::test]
async fn a_refused_lmcache_prefill_leaves_no_kv() {
    let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let prefill = ScriptedEngine::start(|_| async { error_response(404, "no such model") }).await;
    let decode = ScriptedEngine::start(|_| async { error_response(404, "no such model, says the decoder") }).await;
    let settings = harness::settings(harness::lmcache(FirstToken::Decoder));
    let harness = ProxyHarness::start(settings, &[prefill.port], &[decode.port], 1, Some(socket)).await;
    let (status, text) = harness.complete(r#"{"model":"z","prompt":"x"}"#).await;
    assert!(status == 404 && text.contains("says the decoder"), "{text}");
    harness.finish().await;
    assert_eq!(decode.requests().len(), 1);
}

/// Whole responses and streams whose usage contains cached tokens.
fn decoded(stream: bool, cached: u64) -> String {
    let usage =
        format!("\"usage\":{{\"prompt_tokens\":300, \"prompt_tokens_details\":{{\"cached_tokens\":{cached}}}}}");
    if stream {
        format!("data: {{\"choices\":[{{\"text\":\"a\"}}]}}\n\ndata: {{\"choices\":[],{usage}}}\n\ndata: [DONE]\n\n")
    } else {
        format!("{{\"choices\":[{{\"text\":\"a\",\"finish_reason\":\"length\"}}],\n{usage},\"new\":1.50}}")
    }
}

const PREFILLED: &str = r#"{"choices":[{"text":"t","finish_reason":"length"}],"usage":{"prompt_tokens":300,"prompt_tokens_details":{"cached_tokens":16}},"kv_transfer_params":null}"#;

#[tokio::test]
async fn usage_has_prefill_cache_hits_and_metrics_decode_hits() {
    for stream in [false, true] {
        for (cached, counted) in [(299, "transferred"), (0, "recomputed")] {
            let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
            let prefill = notifying_prefill_engine(socket.port(), 1, PREFILLED).await;
            let decode = ScriptedEngine::start(move |_| async move {
                let body = decoded(stream, cached);
                if stream {
                    harness::event_stream(body.into())
                } else {
                    json_response(200, body)
                }
            })
            .await;
            let settings = harness::settings(harness::lmcache(FirstToken::Decoder));
            let harness = ProxyHarness::start(settings, &[prefill.port], &[decode.port], 1, Some(socket)).await;
            let (status, text) = harness
                .complete(json!({"prompt": "x", "stream": stream}).to_string())
                .await;
            assert_eq!((status, text), (200, decoded(stream, 16)));
            assert_eq!(outcome(&harness, counted), "1", "{stream} {cached}");
            harness.finish().await;
        }
    }
}

/// Requests without those of one token, which free unused KV.
fn legs(fake: &ScriptedEngine) -> usize {
    fake.requests()
        .iter()
        .filter(|seen| seen.json()["max_tokens"] != 1)
        .count()
}

#[tokio::test]
async fn a_strict_handoff_without_kv_is_retried() {
    let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let prefill = notifying_prefill_engine(socket.port(), 1, PREFILLED).await;
    let missing = ScriptedEngine::start(|_| async { json_response(200, decoded(false, 0)) }).await;
    let there = ScriptedEngine::start(|_| async { json_response(200, decoded(false, 299)) }).await;
    let mut settings = harness::settings(harness::lmcache(FirstToken::Decoder));
    settings.config.handoff.strict = true;
    let harness = ProxyHarness::start(settings, &[prefill.port], &[missing.port, there.port], 1, Some(socket)).await;
    let answered = harness.complete(r#"{"prompt":"x"}"#).await;
    assert_eq!(answered, (200, decoded(false, 16)));
    assert_eq!((legs(&missing), legs(&there)), (1, 1));
    assert_eq!(outcome(&harness, "transferred"), "1");
    assert_eq!(
        (outcome(&harness, "failed"), outcome(&harness, "recomputed")),
        ("1".into(), String::new())
    );
    harness.finish().await;
}

#[tokio::test]
async fn a_strict_first_token_handoff_without_kv_is_retried() {
    const FIRST: &str = r#"{"id":"cmpl-P","object":"text_completion","created":5,"model":"m","choices":[{"index":0,"text":"Hel","logprobs":null,"finish_reason":"length","stop_reason":null}],"usage":{"prompt_tokens":300,"total_tokens":301,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":16}},"kv_transfer_params":{"first_tok":42}}"#;
    let rest = |cached: u64| {
        format!(
            r#"{{"id":"cmpl-D","choices":[{{"index":0,"text":"lo","finish_reason":"stop"}}],"usage":{{"prompt_tokens":301,"total_tokens":302,"completion_tokens":1,"prompt_tokens_details":{{"cached_tokens":{cached}}}}}}}"#
        )
    };
    for (strict, asked, counted) in [(true, [1, 1], "transferred"), (false, [1, 0], "recomputed")] {
        let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
        let prefill = notifying_prefill_engine(socket.port(), 1, FIRST).await;
        let missing = ScriptedEngine::start(move |_| std::future::ready(json_response(200, rest(0)))).await;
        let there = ScriptedEngine::start(move |_| std::future::ready(json_response(200, rest(300)))).await;
        let mut settings = harness::settings(harness::lmcache(FirstToken::Prefiller));
        settings.config.handoff.strict = strict;
        let decode = [missing.port, there.port];
        let harness = ProxyHarness::start(settings, &[prefill.port], &decode, 1, Some(socket)).await;
        let prompt: Vec<u32> = (0..300).collect();
        let request = harness.post("/v1/completions", json!({"model": "m", "prompt": prompt}).to_string());
        let response = request.send().await.unwrap();
        let printed = response.headers()["x-xpyd-handoff"].to_str().unwrap().to_owned();
        assert!(printed.starts_with(counted), "{printed}");
        assert!(response.text().await.unwrap().contains(r#""text":"Hello""#));
        assert_eq!(outcome(&harness, counted), "1");
        assert_eq!([legs(&missing), legs(&there)], asked);
        harness.finish().await;
    }
}

#[tokio::test]
async fn nixl_cached_tokens_prove_the_transfer() {
    const COUNT: &str = r#","remote_prefill_cached_tokens":16}"#;
    for (cached, counted) in [(300, "transferred"), (0, "recomputed")] {
        let params = PARAMS.replace('}', COUNT);
        let prefilled = format!(
            r#"{{"choices":[{{"finish_reason":"length"}}],"usage":{{"prompt_tokens_details":{{"cached_tokens":16}}}},"kv_transfer_params":{params}}}"#
        );
        let prefill = ScriptedEngine::start(move |_| std::future::ready(json_response(200, prefilled.clone()))).await;
        let decode = ScriptedEngine::start(move |_| async move { json_response(200, decoded(false, cached)) }).await;
        let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
        assert_eq!(harness.complete(r#"{"prompt":"x"}"#).await, (200, decoded(false, 16)));
        assert_eq!(outcome(&harness, counted), "1");
        harness.finish().await;
        let sent = &decode.requests()[0].raw;
        assert!(!sent.contains("remote_prefill_cached_tokens"), "{sent}");
    }
}

#[tokio::test]
async fn a_response_without_usage_proves_nothing() {
    const STREAM: &str = "data: {\"choices\":[{\"text\":\"a\"}]}\n\ndata: [DONE]\n\n";
    let prefill = prefill_engine().await;
    let decode = ScriptedEngine::start(|_| async { sse_response(vec![Ok(STREAM)]) }).await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let request = harness.post("/v1/completions", r#"{"prompt":"x","stream":true}"#);
    let response = request.send().await.unwrap();
    let label = response.headers()["x-xpyd-handoff"].to_str().unwrap().to_owned();
    assert!(label.starts_with("sent;"), "{label}");
    assert_eq!(response.text().await.unwrap(), STREAM);
    assert_eq!(
        (outcome(&harness, "sent"), outcome(&harness, "transferred")),
        ("1".into(), String::new())
    );
    harness.finish().await;
}

#[tokio::test]
async fn a_late_failure_ends_with_an_error_event() {
    const FIRST: &str = "data: {\"choices\":[{\"index\":0,\"text\":\"\\\"abort\\\"\"}]}\n\n";
    const LAST: &str = "data: {\"choices\":[{\"index\":1,\"finish_reason\":null},{\"index\":0,\"finish_reason\":\"abort\"}]}\n\ndata: [DONE]\n\n";
    const LOST: &str =
        "data: {\"choices\":[{\"index\":1,\"text\":\"\",\"finish_reason\":\"error\"}]}\n\ndata: [DONE]\n\n";
    const TOGETHER: &str = "data: {\"choices\":[{\"index\":0,\"text\":\"\\\"abort\\\"\"}]}\n\ndata: {\"choices\":[{\"finish_reason\":\"abort\"}]}\n\ndata: [DONE]\n\n";
    // In a separate chunk, and in one chunk with the first event.
    let streams: [(Vec<&str>, bool); 4] = [
        (vec![FIRST, LAST], true),
        (vec![FIRST, LOST], true),
        (vec![TOGETHER], true),
        (vec![FIRST, LAST], false),
    ];
    for (chunks, handed) in streams {
        let prefill = prefill_engine().await;
        let sent = chunks.clone();
        let decode = ScriptedEngine::start(move |_| {
            std::future::ready(sse_response(sent.iter().map(|chunk| Ok(*chunk)).collect()))
        })
        .await;
        let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
        let body = json!({"prompt": "x", "stream": true, "n": if handed { 1 } else { 2 }});
        let (status, text) = harness.complete(body.to_string()).await;
        assert_eq!(status, 200);
        let rest = text.strip_prefix(FIRST).unwrap();
        assert!(
            rest.starts_with("data: {\"error\":") && rest.contains("finish reason"),
            "{rest}"
        );
        assert!(
            rest.ends_with("data: [DONE]\n\n") && !rest.contains("finish_reason"),
            "{rest}"
        );
        assert_eq!(
            (outcome(&harness, "failed"), outcome(&harness, "transferred")),
            ("1".into(), String::new())
        );
        harness.finish().await;
    }
}

#[tokio::test]
async fn engine_error_events_are_forwarded_and_counted() {
    const STREAM: &str = "data: {\"choices\":[{\"text\":\"a\"}]}\n\ndata: {\"error\":{\"message\":\"lost\",\"code\":500}}\n\ndata: [DONE]\n\n";
    let prefill = prefill_engine().await;
    let decode = ScriptedEngine::start(|_| async { sse_response(vec![Ok(&STREAM[..34]), Ok(&STREAM[34..])]) }).await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let (_, text) = harness.complete(r#"{"prompt":"x","stream":true}"#).await;
    assert_eq!(text, STREAM);
    assert_eq!(outcome(&harness, "failed"), "1");
    harness.finish().await;
}

#[tokio::test]
async fn an_abandoned_stream_is_counted_by_its_state() {
    let prefill = prefill_engine().await;
    let decode = ScriptedEngine::start(|_| async {
        let first = futures_util::stream::iter([Ok::<_, std::io::Error>("data: {\"choices\":[]}\n\n")]);
        harness::event_stream(axum::body::Body::from_stream(
            first.chain(futures_util::stream::pending()),
        ))
    })
    .await;
    let harness = ProxyHarness::start(
        harness::settings(Connector::Nixl(Nixl {})),
        &[prefill.port],
        &[decode.port],
        1,
        None,
    )
    .await;
    let response = harness
        .post("/v1/completions", r#"{"prompt":"x","stream":true}"#)
        .send()
        .await
        .unwrap();
    let mut stream = response.bytes_stream();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    let proxy = harness.proxy.clone();
    harness.finish().await;
    let counted = "xpyd_handoff_total{outcome=\"sent\"} 1\n";
    assert!(proxy.metrics_text().contains(counted), "{}", proxy.metrics_text());
}
