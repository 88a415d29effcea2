//! The proxy's middleware: API keys, headers in both directions, request ids, and stage times in responses.

use xpyd::connector::{Connector, Nixl};
use xpyd::proxy::{ClientKeys, EngineKey, Parts};

use super::harness::{
    self, COMPLETION, ProxyHarness, ScriptedEngine, code, decode_engine, json_response, nixl_prefill_response,
    prefill_engine,
};

/// A proxy with its own key over two engines that get another key.
async fn harness_with_keys(pass_key_through: bool) -> (ScriptedEngine, ScriptedEngine, ProxyHarness) {
    let (prefill, decode) = (prefill_engine().await, decode_engine().await);
    let mut settings = harness::settings(Connector::Nixl(Nixl {}));
    settings.parts = Parts {
        client_keys: ClientKeys::read("clients").unwrap(),
        engine_key: Some(EngineKey::new("engines").unwrap()),
        ..Parts::default()
    };
    settings.config.guard.pass_key_through = pass_key_through;
    let harness = ProxyHarness::start(settings, &[prefill.port], &[decode.port], 1, None).await;
    (prefill, decode, harness)
}

#[tokio::test]
async fn a_checked_key_is_forwarded_only_on_request() {
    for (pass_through, sent) in [(false, "Bearer engines"), (true, "Bearer clients")] {
        let (prefill, decode, harness) = harness_with_keys(pass_through).await;
        let request = |path: &str| {
            harness
                .post(path, r#"{"prompt":"x"}"#)
                .header("authorization", "Bearer clients")
        };
        assert_eq!(request("/v1/completions").send().await.unwrap().status(), 200);
        assert_eq!(request("/tokenize").send().await.unwrap().status(), 200);
        for seen in [prefill.requests(), decode.requests()].concat() {
            assert_eq!(seen.headers["authorization"], sent, "{}", seen.path);
        }
        harness.finish().await;
    }
}

#[tokio::test]
async fn a_request_without_a_key_is_refused() {
    let (prefill, decode, harness) = harness_with_keys(false).await;
    let response = harness
        .post("/v1/completions", r#"{"prompt":"x"}"#)
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 401);
    assert_eq!(response.headers()["www-authenticate"], "Bearer");
    assert_eq!(code(&response.text().await.unwrap()), "invalid_api_key");
    // The response does not show whether the route exists.
    assert_eq!(harness.get("/unknown").await.status(), 401);
    assert_eq!(harness.get("/health").await.status(), 200);
    assert_eq!((prefill.requests().len(), decode.requests().len()), (0, 0));
    harness.finish().await;
}

#[tokio::test]
async fn without_proxy_keys_the_clients_key_is_forwarded() {
    let prefill = ScriptedEngine::start(|_| async { nixl_prefill_response() }).await;
    let decode = ScriptedEngine::start(|_| async { json_response(200, COMPLETION) }).await;
    let mut settings = harness::settings(Connector::Nixl(Nixl {}));
    settings.parts.engine_key = Some(EngineKey::new("engines").unwrap());
    let harness = ProxyHarness::start(settings, &[prefill.port], &[decode.port], 1, None).await;
    let body = r#"{"prompt":"x"}"#;
    harness.complete(body).await;
    let own = harness
        .post("/v1/completions", body)
        .header("authorization", "Bearer own");
    own.send().await.unwrap();
    for seen in [prefill.requests(), decode.requests()] {
        let keys: Vec<_> = seen.iter().map(|seen| seen.headers.get("authorization")).collect();
        assert_eq!(keys[0], None, "a request without a key must not use the fleet's key");
        assert_eq!(keys[1].unwrap(), "Bearer own");
    }
    harness.finish().await;
}

#[tokio::test]
async fn engine_control_headers_are_removed_and_the_id_echoed() {
    let (prefill, decode) = (prefill_engine().await, decode_engine().await);
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let steering = [
        ("X-Vllm-Priority", "-100"),
        ("x-vllm-of-tomorrow", "1"),
        ("x-data-parallel-rank", "1"),
        ("x-data-parallel-host", "elsewhere"),
        ("x-session-id", "s"),
        ("endpoint-load-metrics-format", "JSON"),
        ("x-request-id", "mine-1"),
    ];
    for path in ["/v1/completions", "/tokenize"] {
        let mut request = harness.post(path, r#"{"prompt":"x"}"#).header("x-harmless", "1");
        for (name, value) in steering {
            request = request.header(name, value);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.headers()["x-request-id"], "mine-1");
    }
    let seen = [prefill.requests(), decode.requests()].concat();
    assert_eq!(seen.len(), 3);
    for seen in seen {
        assert_eq!(seen.headers["x-harmless"], "1");
        for (name, value) in steering {
            assert_ne!(
                seen.headers.get(name).and_then(|sent| sent.to_str().ok()),
                Some(value),
                "{name} on {}",
                seen.path
            );
        }
    }
    // A client without a request id gets the one that engines see.
    let response = harness
        .post("/v1/completions", r#"{"prompt":"x"}"#)
        .send()
        .await
        .unwrap();
    assert_eq!(
        response.headers()["x-request-id"],
        decode.requests().last().unwrap().id()
    );
    // Refusals contain the id, too. An invalid id is not echoed.
    let refused = harness
        .post("/v1/completions", "[1]")
        .header("x-request-id", "mine-2")
        .send()
        .await
        .unwrap();
    assert_eq!(
        (refused.status().as_u16(), &refused.headers()["x-request-id"]),
        (400, &"mine-2".parse().unwrap())
    );
    let long = harness
        .post("/v1/completions", "[1]")
        .header("x-request-id", "i".repeat(129))
        .send()
        .await
        .unwrap();
    assert!(!long.headers().contains_key("x-request-id"));
    harness.finish().await;
}

#[tokio::test]
async fn too_many_or_too_large_headers_are_refused() {
    let (prefill, decode) = (prefill_engine().await, decode_engine().await);
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let plain = || harness.post("/v1/completions", r#"{"prompt":"x"}"#);
    let many = (0..91).fold(plain(), |request, index| request.header(format!("x-{index}"), "1"));
    for request in [many, plain().header("x-large", "x".repeat(33 << 10))] {
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 431);
        assert_eq!(code(&response.text().await.unwrap()), "headers_too_large");
    }
    let enough = (0..80).fold(plain(), |request, index| {
        request.header(format!("x-{index}"), "x".repeat(300))
    });
    assert_eq!(enough.send().await.unwrap().status(), 200);
    assert_eq!(prefill.requests().len(), 1);
    harness.finish().await;
}

#[tokio::test]
async fn a_response_reports_its_stage_times() {
    const STREAM: [&str; 2] = ["data: {\"a\":1}\n\n", "data: [DONE]\n\n"];
    let prefill = prefill_engine().await;
    let decode = ScriptedEngine::start(|seen| async move {
        if seen.json()["stream"] == true {
            harness::sse_response(STREAM.map(Ok).to_vec())
        } else {
            json_response(200, COMPLETION)
        }
    })
    .await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    for (body, stages) in [
        (
            r#"{"prompt":"x"}"#,
            &["read", "queue", "prefill", "handoff", "first-token", "total"][..],
        ),
        (
            r#"{"prompt":"x","stream":true}"#,
            &["read", "queue", "prefill", "handoff", "first-token", "total"],
        ),
        (r#"{"prompt":"x","n":2}"#, &["read", "queue", "first-token", "total"]),
    ] {
        let response = harness.post("/v1/completions", body).send().await.unwrap();
        let timing = response.headers()["server-timing"].to_str().unwrap().to_owned();
        let reported: Vec<&str> = timing
            .split(", ")
            .map(|entry| {
                let (name, time) = entry.split_once(";dur=").unwrap();
                assert!(time.parse::<f64>().unwrap() >= 0.0, "{timing}");
                name
            })
            .collect();
        assert_eq!(reported, stages, "{body}");
    }
    let response = harness.post("/tokenize", "{}").send().await.unwrap();
    assert!(!response.headers().contains_key("server-timing"));
    harness.finish().await;
}
