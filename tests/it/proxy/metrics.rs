//! Metrics of the proxy under its own and vLLM's names, merged engine metrics, access log and trace context.

use axum::body::Body;
use futures_util::StreamExt;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use xpyd::connector::{Connector, Nixl};
use xpyd::proxy::{AccessLog, Traces};

use super::harness::{
    self, COMPLETION, CancelOnDrop, ProxyHarness, Script, ScriptedEngine, dead_port, decode_engine, error_response,
    json_response, prefill_engine, responses_in_turn, sse_response, within_deadline,
};

const EVENT: &str = "data: {\"choices\":[{\"text\":\"a\"}]}\n\n";
const DONE: &str = "data: [DONE]\n\n";

/// The number of requests with this outcome.
fn count_by_outcome(harness: &ProxyHarness, outcome: &str) -> String {
    harness.metric(&format!(r#"xpyd_request_seconds_count{{outcome="{outcome}"}}"#))
}

#[tokio::test]
async fn every_generation_is_counted_once_by_outcome() {
    let prefill = prefill_engine().await;
    let script: Vec<Script> = vec![
        || json_response(200, COMPLETION),
        || sse_response([EVENT, DONE].map(Ok).to_vec()),
        || error_response(400, "no"),
        || error_response(500, "broke"),
        || error_response(500, "broke"),
        || error_response(500, "broke"),
    ];
    let decode = ScriptedEngine::start(responses_in_turn(script)).await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let streamed = r#"{"prompt":"x","stream":true}"#;
    for (body, outcome, count) in [
        (r#"{"prompt":"x"}"#, "answered", "1"),
        (streamed, "answered", "2"),
        (r#"{"prompt":"x"}"#, "refused", "1"),
        (r#"{"prompt":"x"}"#, "failed", "1"),
    ] {
        harness.complete(body).await;
        wait_for_outcome(&harness, outcome, count).await;
    }
    assert_eq!(count_by_outcome(&harness, "left"), "");
    assert_eq!(
        harness.metric("vllm:e2e_request_latency_seconds_count{model_name=\"m\"}"),
        "2"
    );
    harness.finish().await;
}

/// The proxy counts a request when its last resource is dropped, which can be after its last byte.
async fn wait_for_outcome(harness: &ProxyHarness, outcome: &str, count: &str) {
    within_deadline(outcome, async {
        while count_by_outcome(harness, outcome) != count {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn abandoned_or_broken_streams_are_not_successes() {
    let cut = CancellationToken::new();
    let gate = cut.clone();
    let prefill = prefill_engine().await;
    let decode = ScriptedEngine::start(move |_| {
        let gate = gate.clone();
        async move {
            let first = futures_util::stream::iter([Ok(EVENT)]);
            let rest = futures_util::stream::once(async move {
                gate.cancelled().await;
                Err(std::io::Error::other("cut"))
            });
            harness::event_stream(Body::from_stream(first.chain(rest)))
        }
    })
    .await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let request = || {
        harness
            .post("/v1/completions", r#"{"prompt":"x","stream":true}"#)
            .send()
    };
    let mut stream = request().await.unwrap().bytes_stream();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    wait_for_outcome(&harness, "left", "1").await;
    let mut stream = request().await.unwrap().bytes_stream();
    stream.next().await.unwrap().unwrap();
    cut.cancel();
    while stream.next().await.is_some() {}
    wait_for_outcome(&harness, "broken", "1").await;
    assert_eq!(count_by_outcome(&harness, "answered"), "");
    harness.finish().await;
}

#[tokio::test]
async fn inter_token_latency_is_observed_per_read() {
    let next = CancellationToken::new();
    let gate = next.clone();
    let prefill = prefill_engine().await;
    let decode = ScriptedEngine::start(move |_| {
        let gate = gate.clone();
        async move {
            let first = futures_util::stream::iter([Ok::<_, std::io::Error>(EVENT)]);
            let second = futures_util::stream::once(async move {
                gate.cancelled().await;
                Ok([EVENT, EVENT, DONE].concat())
            });
            harness::event_stream(Body::from_stream(
                first.map(|event| event.map(str::to_owned)).chain(second),
            ))
        }
    })
    .await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let request = harness
        .post("/v1/completions", r#"{"prompt":"x","stream":true}"#)
        .send();
    let mut stream = request.await.unwrap().bytes_stream();
    stream.next().await.unwrap().unwrap();
    let gaps = || harness.metric("xpyd_inter_token_seconds_count");
    assert_eq!(gaps(), "0");
    next.cancel();
    while stream.next().await.is_some() {}
    assert_eq!(gaps(), "1");
    assert_eq!(
        harness.metric("vllm:inter_token_latency_seconds_count{model_name=\"m\"}"),
        "1"
    );
    assert_eq!(
        harness.metric("vllm:time_to_first_token_seconds_count{model_name=\"m\"}"),
        "1"
    );
    harness.finish().await;
}

#[tokio::test]
async fn the_fleet_exports_vllms_metric_names() {
    let go = CancellationToken::new();
    let prefill = ScriptedEngine::held_until(&go, harness::nixl_prefill_response).await;
    let decode = decode_engine().await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let request = harness.complete(r#"{"prompt":"x"}"#);
    let look = async {
        prefill.wait_for_requests(1).await;
        assert_eq!(harness.metric("vllm:num_requests_running{model_name=\"m\"}"), "1");
        assert_eq!(harness.metric("vllm:num_requests_waiting{model_name=\"m\"}"), "0");
        go.cancel();
    };
    let ((status, _), ()) = within_deadline("the answer", futures_util::future::join(request, look)).await;
    assert_eq!(status, 200);
    assert_eq!(harness.metric("vllm:num_requests_running{model_name=\"m\"}"), "0");
    harness.finish().await;
}

/// Prometheus asks for `OpenMetrics`. Other clients get the classic text format.
#[tokio::test]
async fn metrics_use_the_requested_format() {
    let harness = ProxyHarness::nixl(&[1], &[1]).await;
    let ask = async |accept: &str| {
        let request = reqwest::Client::new().get(format!("{}/metrics", harness.url));
        let response = request.header("accept", accept).send().await.unwrap();
        let kind = response.headers()["content-type"].to_str().unwrap().to_owned();
        (kind, response.text().await.unwrap())
    };
    for accept in ["*/*", "text/plain", "text/html", "application/openmetrics-text;q=0"] {
        let (kind, text) = ask(accept).await;
        assert_eq!(kind, "text/plain; version=0.0.4; charset=utf-8", "{accept}");
        assert!(
            text.contains("# TYPE xpyd_retries_total counter\nxpyd_retries_total 0\n"),
            "{text}"
        );
        assert!(!text.contains("# EOF"), "{text}");
    }
    let (kind, text) = ask("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3").await;
    assert_eq!(kind, "application/openmetrics-text; version=1.0.0; charset=utf-8");
    assert!(
        text.contains("# TYPE xpyd_retries counter\n") && text.ends_with("# EOF\n"),
        "{text}"
    );
    harness.finish().await;
}

/// `xpyd proxy` does not supervise its engines, so `/health` asks them.
#[tokio::test]
async fn health_asks_unsupervised_engines() {
    let well = || ScriptedEngine::start(|_| async { json_response(200, "") });
    let ill = ScriptedEngine::start(|_| async { json_response(503, "") }).await;
    let (prefill, decode) = (well().await, well().await);
    for (engines, is_well) in [
        ((vec![prefill.port], vec![decode.port]), true),
        (
            (vec![prefill.port, ill.port], vec![dead_port().await, decode.port]),
            true,
        ),
        ((vec![prefill.port], vec![dead_port().await]), false),
        ((vec![dead_port().await], vec![decode.port]), false),
        ((vec![prefill.port], vec![ill.port]), false),
    ] {
        let mut settings = harness::settings(Connector::Nixl(Nixl {}));
        settings.asks_engines = true;
        let harness = ProxyHarness::start(settings, &engines.0, &engines.1, 1, None).await;
        assert_eq!(harness.get("/live").await.status(), 200);
        for path in ["/health", "/ping", "/ready"] {
            let status = harness.get(path).await.status();
            assert_eq!(status, if is_well { 200 } else { 503 }, "{path} of {engines:?}");
        }
        harness.finish().await;
    }
}

/// The outcome `left` means that the client disconnected, and nothing else.
#[tokio::test]
async fn the_access_log_marks_only_real_disconnects() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("access.log");
    let decode = ScriptedEngine::start(|seen| async move {
        match &*seen.path {
            "/v1/completions" => sse_response(vec![Ok("data: {}\n\n"), Ok("data: [DONE]\n\n")]),
            "/v1/responses" => sse_response(vec![Ok("event: a\ndata: {}\n\n")]),
            _ => json_response(200, "{}"),
        }
    })
    .await;
    let mut settings = harness::settings(Connector::Nixl(Nixl {}));
    settings.parts.access_log = Some(AccessLog::open(&file, 1 << 20).unwrap());
    let harness = ProxyHarness::start(settings, &[1], &[decode.port], 1, None).await;
    let client = reqwest::Client::new();
    let url = |path: &str| format!("{}{path}", harness.url);
    for path in ["/v1/models", "/version", "/v1/responses/resp_1"] {
        client.get(url(path)).send().await.unwrap().bytes().await.unwrap();
    }
    client.head(url("/v1/models")).send().await.unwrap();
    for (path, body) in [
        ("/tokenize", "{}"),
        ("/v1/embeddings", "{}"),
        ("/v1/responses", "{}"),
        ("/v1/completions", r#"{"prompt":"x","n":2,"stream":true}"#),
    ] {
        let request = client.post(url(path)).header("content-type", "application/json");
        request.body(body).send().await.unwrap().bytes().await.unwrap();
    }
    harness.finish().await;
    let printed = std::fs::read_to_string(&file).unwrap();
    let outcomes = printed
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["outcome"].to_string());
    assert_eq!(outcomes.collect::<Vec<_>>(), ["\"answered\""; 8], "{printed}");
}

/// An engine that answers every request with this text.
async fn engine_with_page(text: &'static str) -> ScriptedEngine {
    ScriptedEngine::start(move |_| async move { json_response(200, text) }).await
}

#[tokio::test]
async fn merged_metrics_keep_fleet_names_distinct() {
    const PAGE: &str = "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{engine=\"0\"} 3.0\n";
    for by_option in [true, false] {
        let (prefill, decode) = (engine_with_page(PAGE).await, engine_with_page(PAGE).await);
        let mut settings = harness::settings(Connector::Nixl(Nixl {}));
        settings.config.metrics.merge = by_option;
        let harness = ProxyHarness::start(settings, &[prefill.port], &[decode.port], 1, None).await;
        let plain = harness.get("/metrics").await.text().await.unwrap();
        assert_eq!(plain.contains("exported_engine"), by_option, "{plain}");
        let response = harness.get("/metrics?engines").await;
        assert_eq!(
            response.headers()["content-type"],
            "text/plain; version=0.0.4; charset=utf-8"
        );
        let merged = response.text().await.unwrap();
        for (engine, role) in [("prefiller1", "prefill"), ("decoder1", "decode")] {
            let sample =
                format!(r#"vllm:num_requests_running{{engine="{engine}",role="{role}",exported_engine="0"}} 3.0"#);
            assert!(merged.contains(&sample), "{merged}");
        }
        assert_eq!(
            merged.matches("# TYPE vllm:num_requests_running ").count(),
            1,
            "{merged}"
        );
        assert!(merged.contains("# TYPE xpyd_retries_total counter"), "{merged}");
        harness.finish().await;
    }
}

#[tokio::test]
async fn concurrent_scrapes_share_one_engine_request() {
    let (prefill, decode) = (engine_with_page("m 1\n").await, engine_with_page("m 1\n").await);
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    for path in ["/metrics?engines", "/version"] {
        let before = decode.requests().len();
        let answers = futures_util::future::join_all((0..40).map(|_| harness.get(path))).await;
        assert!(answers.iter().all(|answer| answer.status() == 200), "{path}");
        let asked = decode.requests().len() - before;
        // One request to the engine, and possibly a second one if the first response is too old by now.
        assert!((1..20).contains(&asked), "{path}: {asked}");
    }
    harness.finish().await;
}

#[tokio::test]
async fn failed_engine_scrapes_are_counted_and_block_nothing() {
    let hung_up = CancellationToken::new();
    let raise = hung_up.clone();
    let stuck = ScriptedEngine::start(move |_| {
        let raise = CancelOnDrop(raise.clone());
        async move {
            let _raise = raise;
            std::future::pending().await
        }
    })
    .await;
    let endless = ScriptedEngine::start(|_| async {
        let line = futures_util::stream::repeat_with(|| Ok::<_, std::io::Error>("m 1\n".repeat(1 << 14)));
        json_response(200, Body::from_stream(line))
    })
    .await;
    let broken = ScriptedEngine::start(|_| async { error_response(500, "broke") }).await;
    let good = engine_with_page("m 1\n").await;
    let prefill = [stuck.port, dead_port().await, good.port];
    let harness = ProxyHarness::nixl(&prefill, &[endless.port, broken.port]).await;
    let merged = harness.get("/metrics?engines").await.text().await.unwrap();
    assert!(
        merged.contains("m{engine=\"prefiller3\",role=\"prefill\"} 1\n"),
        "{merged}"
    );
    let unread = merged
        .lines()
        .filter(|line| line.starts_with("xpyd_engine_metrics_unread_total{") && line.ends_with(" 1"));
    assert_eq!(unread.count(), 4, "{merged}");
    within_deadline("the disconnect", hung_up.cancelled()).await;
    harness.finish().await;
}

/// Trace, span and flags of a `traceparent`.
fn traceparent_fields(headers: &axum::http::HeaderMap) -> [String; 3] {
    let value = headers["traceparent"].to_str().unwrap();
    let parts: Vec<&str> = value.split('-').collect();
    assert_eq!((parts.len(), parts[0]), (4, "00"), "{value}");
    assert_eq!((parts[1].len(), parts[2].len()), (32, 16), "{value}");
    [parts[1], parts[2], parts[3]].map(str::to_owned)
}

/// A proxy with tracing whose collector is unreachable.
async fn traced_harness(percent: u8) -> (ScriptedEngine, ScriptedEngine, ProxyHarness) {
    let (prefill, decode) = (prefill_engine().await, decode_engine().await);
    let endpoint = format!("http://127.0.0.1:{}/v1/traces", dead_port().await);
    let mut settings = harness::settings(Connector::Nixl(Nixl {}));
    settings.parts.traces = Some(Traces::open(&endpoint, percent).unwrap());
    let harness = ProxyHarness::start(settings, &[prefill.port], &[decode.port], 1, None).await;
    (prefill, decode, harness)
}

#[tokio::test]
async fn every_leg_has_its_own_span_in_the_clients_trace() {
    let (prefill, decode, harness) = traced_harness(0).await;
    let (trace, span) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    for flags in ["01", "00"] {
        for path in ["/v1/completions", "/tokenize"] {
            let request = harness
                .post(path, r#"{"prompt":"x"}"#)
                .header("traceparent", format!("00-{trace}-{span}-{flags}"))
                .header("tracestate", "vendor=1");
            assert_eq!(request.send().await.unwrap().status(), 200);
        }
        let seen = [prefill.requests(), decode.requests()].concat();
        let legs: Vec<_> = seen
            .iter()
            .rev()
            .map(|seen| traceparent_fields(&seen.headers))
            .collect();
        let mut spans: Vec<_> = legs.iter().map(|[_, span, _]| span.clone()).collect();
        spans.push(span.into());
        spans.sort();
        spans.dedup();
        assert_eq!(spans.len(), legs.len() + 1, "each has its own: {legs:?}");
        for seen in &seen {
            assert_eq!(seen.headers["tracestate"], "vendor=1");
        }
        // The client's own sampling decision applies.
        let [_, _, last] = traceparent_fields(&decode.requests().last().unwrap().headers);
        assert_eq!(last, flags);
        assert!(legs.iter().all(|[id, ..]| id == trace), "{legs:?}");
    }
    harness.finish().await;
}

#[tokio::test]
async fn a_new_trace_follows_the_sampling_ratio() {
    for (percent, flags) in [(100, "01"), (0, "00")] {
        let (prefill, decode, harness) = traced_harness(percent).await;
        for broken in [
            None,
            Some("garbage"),
            Some("00-00000000000000000000000000000000-00f067aa0ba902b7-01"),
        ] {
            let request = harness.post("/v1/completions", r#"{"prompt":"x"}"#);
            let request = broken
                .into_iter()
                .fold(request, |request, value| request.header("traceparent", value));
            assert_eq!(request.send().await.unwrap().status(), 200);
            let seen = [prefill.requests().pop().unwrap(), decode.requests().pop().unwrap()];
            let [first, second] = seen.map(|seen| traceparent_fields(&seen.headers));
            assert_eq!((&first[0], &first[2]), (&second[0], &flags.to_owned()));
            assert_ne!(first[1], second[1]);
        }
        harness.finish().await;
    }
}

#[tokio::test]
async fn without_tracing_the_trace_context_is_forwarded() {
    let (prefill, decode) = (prefill_engine().await, decode_engine().await);
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let context = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let request = harness
        .post("/v1/completions", r#"{"prompt":"x"}"#)
        .header("traceparent", context);
    request.send().await.unwrap();
    for seen in [prefill.requests(), decode.requests()].concat() {
        assert_eq!(seen.headers["traceparent"], context);
    }
    harness.finish().await;
}
