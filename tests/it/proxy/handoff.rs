//! The proxy over scripted engines: routes, NIXL hand-offs, failures, and disconnects.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use xpyd::connector::{Connector, Nixl};
use xpyd::fleet::{FleetStage, Role};

use super::harness::{
    self, COMPLETION, CancelOnDrop, PARAMS, ProxyHarness, Script, ScriptedEngine, code, dead_port, decode_engine,
    error_response, json_response, message, nixl_prefill_response, prefill_engine, responses_in_turn, sse_response,
    within_deadline,
};

#[tokio::test]
async fn both_legs_send_the_clients_bytes_and_one_new_id() {
    let (prefill, decode) = (prefill_engine().await, decode_engine().await);
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let body = r#"{ "prompt":"hi", "temperature":0.70, "max_tokens":5,"min_tokens":2,"stream":false,"unknown":[1.0],"kv_transfer_params":{"do_remote_prefill":true}}"#;
    let response = harness
        .post("/v1/completions", body)
        .header("authorization", "Bearer secret")
        .header("x-request-id", "mine")
        .header("x-data-parallel-rank", "7")
        .send()
        .await
        .unwrap();
    assert_eq!(response.headers()["content-type"], "application/json");
    assert_eq!(response.text().await.unwrap(), COMPLETION);
    let (first, second) = (prefill.requests().remove(0), decode.requests().remove(0));
    assert_eq!(
        first.json(),
        json!({"prompt": "hi", "temperature": 0.7, "max_tokens": 1, "stream": false, "unknown": [1.0],
            "kv_transfer_params": {"do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
                "remote_block_ids": null, "remote_host": null, "remote_port": null}})
    );
    let expected = format!(
        r#"{{ "prompt":"hi", "temperature":0.70, "max_tokens":5,"min_tokens":2,"stream":false,"unknown":[1.0],"kv_transfer_params":{PARAMS}}}"#
    );
    assert_eq!(second.raw, expected);
    assert_eq!(first.id(), second.id());
    assert_ne!(first.id(), "mine");
    for seen in [&first, &second] {
        assert_eq!(seen.path, "/v1/completions");
        assert_eq!(seen.headers["authorization"], "Bearer secret");
        assert!(!seen.headers.contains_key("x-data-parallel-rank"));
    }
    assert_eq!(harness.metric(r#"xpyd_handoff_total{outcome="sent"}"#), "1");
    for stage in ["prefill", "handoff", "decode_first_byte"] {
        assert_eq!(
            harness.metric(&format!(r#"xpyd_stage_seconds_count{{stage="{stage}"}}"#)),
            "1",
            "{stage}"
        );
    }
    assert_eq!(harness.metric("xpyd_time_to_first_token_seconds_count"), "1");
    assert_eq!(
        harness.metric(r#"xpyd_requests_total{endpoint="/v1/completions",status="200"}"#),
        "1"
    );
    harness.finish().await;
}

#[tokio::test]
async fn a_chat_uses_the_chat_route_and_streams_unchanged() {
    const STREAM: [&str; 3] = [
        "data: {\"choices\":[{\"del",
        "ta\":{}}]}\n\ndata: {\"x\":1}\n\n",
        "data: [DONE]\n\n",
    ];
    let prefill = prefill_engine().await;
    let decode = ScriptedEngine::start(|_| async { sse_response(STREAM.map(Ok).to_vec()) }).await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}], "stream": true,
        "stream_options": {"include_usage": true}});
    let response = harness
        .post("/v1/chat/completions", body.to_string())
        .send()
        .await
        .unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
    assert_eq!(response.text().await.unwrap(), STREAM.concat());
    let (first, second) = (prefill.requests().remove(0), decode.requests().remove(0));
    assert_eq!(
        (first.path.as_str(), second.path.as_str()),
        ("/v1/chat/completions", "/v1/chat/completions")
    );
    let prefill_body = first.json();
    assert_eq!(prefill_body["tools"], body["tools"]);
    assert_eq!(
        (&prefill_body["max_tokens"], &prefill_body["max_completion_tokens"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(prefill_body["stream"], json!(false));
    assert_eq!(prefill_body.get("stream_options"), None);
    assert_eq!(second.json()["stream_options"], body["stream_options"]);
    harness.finish().await;
}

#[tokio::test]
async fn requests_without_handoff_use_the_decode_engine_alone() {
    let (prefill, decode) = (prefill_engine().await, decode_engine().await);
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    for body in [
        r#"{"prompt":"x","n":2}"#,
        r#"{"prompt":["a","b"]}"#,
        r#"{"prompt":"x","echo":true,"logprobs":1}"#,
    ] {
        assert_eq!(harness.complete(body).await, (200, COMPLETION.to_owned()));
        assert_eq!(decode.requests().last().unwrap().raw, body);
    }
    assert_eq!(prefill.requests().len(), 0);
    assert_eq!(harness.metric(r#"xpyd_handoff_total{outcome="bypassed"}"#), "3");
    harness.finish().await;
}

#[tokio::test]
async fn a_decode_refusal_is_forwarded_and_not_retried() {
    let prefill = prefill_engine().await;
    let decode = ScriptedEngine::start(responses_in_turn(vec![
        || error_response(400, "bad max_tokens"),
        || error_response(404, "unknown model"),
    ]))
    .await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let (status, body) = harness.complete(r#"{"prompt":"x"}"#).await;
    assert_eq!((status, message(&body)), (400, "bad max_tokens".into()));
    assert_eq!(prefill.requests().len(), 1);
    // The prefill engine still holds the KV: the release names a model that does not exist.
    let release = decode.wait_for_requests(2).await.remove(1).json();
    assert_eq!(
        release["kv_transfer_params"],
        serde_json::from_str::<Value>(PARAMS).unwrap()
    );
    assert_ne!(release["model"], json!("m"));
    assert_eq!(harness.metric(r#"xpyd_handoff_total{outcome="refused"}"#), "1");
    harness.finish().await;
}

#[tokio::test]
async fn an_early_failure_is_retried_on_another_pair() {
    let broken: [(Script, bool); 6] = [
        (|| error_response(500, "prefill broke"), true),
        (
            || {
                json_response(
                    200,
                    r#"{"choices":[{"finish_reason":"abort"}],"kv_transfer_params":null}"#,
                )
            },
            true,
        ),
        (
            || {
                json_response(
                    200,
                    r#"{"choices":[{"finish_reason":"length"}],"kv_transfer_params":{"do_remote_prefill":true}}"#,
                )
            },
            true,
        ),
        (|| error_response(500, "decode broke"), false),
        (
            || json_response(200, r#"{"choices":[{"text":"","finish_reason":"error"}]}"#),
            false,
        ),
        (
            || {
                sse_response(vec![Ok(
                    "data: {\"error\":{\"message\":\"lost\",\"code\":500}}\n\ndata: [DONE]\n\n",
                )])
            },
            false,
        ),
    ];
    for (failure, in_prefill) in broken {
        let bad = ScriptedEngine::start(move |_| async move { failure() }).await;
        let (good_prefill, good_decode) = (prefill_engine().await, decode_engine().await);
        let spare = if in_prefill {
            decode_engine().await
        } else {
            prefill_engine().await
        };
        let harness = if in_prefill {
            ProxyHarness::nixl(&[bad.port, good_prefill.port], &[good_decode.port, spare.port]).await
        } else {
            ProxyHarness::nixl(&[good_prefill.port, spare.port], &[bad.port, good_decode.port]).await
        };
        assert_eq!(
            harness.complete(r#"{"prompt":"x"}"#).await,
            (200, COMPLETION.to_owned())
        );
        let first_attempt = bad.requests().remove(0).id().to_owned();
        let fakes = [&good_prefill, &good_decode, &spare];
        let second: Vec<_> = fakes
            .iter()
            .flat_map(|fake| fake.requests())
            .filter(|seen| seen.id() != first_attempt)
            .collect();
        assert_eq!(second.len(), 2, "both legs of the second attempt");
        assert_eq!(second[0].id(), second[1].id());
        assert_eq!(harness.metric("xpyd_retries_total"), "1");
        harness.finish().await;
    }
}

#[tokio::test]
async fn an_unreachable_engine_is_retried_elsewhere_or_named() {
    let (prefill, decode, dead) = (prefill_engine().await, decode_engine().await, dead_port().await);
    let harness = ProxyHarness::nixl(&[dead, prefill.port], &[decode.port]).await;
    assert_eq!(harness.complete(r#"{"prompt":"x"}"#).await.0, 200);
    harness.finish().await;

    let harness = ProxyHarness::nixl(&[dead], &[decode.port]).await;
    let (status, body) = harness.complete(r#"{"prompt":"x"}"#).await;
    assert_eq!((status, code(&body).as_str()), (502, "engine_unreachable"));
    assert!(
        message(&body).contains("`prefill`") && message(&body).contains("`prefiller1`"),
        "{body}"
    );
    assert_eq!(harness.metric(r#"xpyd_handoff_total{outcome="failed"}"#), "3");
    harness.finish().await;
}

#[tokio::test]
async fn a_client_error_event_becomes_the_status() {
    let decode = ScriptedEngine::start(|_| async {
        sse_response(vec![Ok(
            "data: {\"error\":{\"message\":\"too long\",\"code\":400}}\n\n",
        )])
    })
    .await;
    let prefill = prefill_engine().await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let (status, body) = harness.complete(r#"{"prompt":"x","stream":true}"#).await;
    assert_eq!((status, message(&body)), (400, "too long".into()));
    assert_eq!(prefill.requests().len(), 1);
    harness.finish().await;
}

#[tokio::test]
async fn a_broken_stream_ends_with_an_error_event() {
    let ends: [(Option<Result<&str, &str>>, &str); 2] =
        [(Some(Err("cut")), "broke off"), (None, "before it was complete")];
    for (end, reason) in ends {
        let prefill = prefill_engine().await;
        let go = CancellationToken::new();
        let gate = go.clone();
        let decode = ScriptedEngine::start(move |_| {
            let gate = gate.clone();
            async move {
                let first = futures_util::stream::iter([Ok("data: {\"a\":1}\n\ndata: {\"b")]);
                let rest = futures_util::stream::once(async move { gate.cancelled().await })
                    .flat_map(move |()| futures_util::stream::iter(end))
                    .map(|chunk| chunk.map_err(std::io::Error::other));
                harness::event_stream(Body::from_stream(first.chain(rest)))
            }
        })
        .await;
        let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
        let response = harness
            .post("/v1/completions", r#"{"prompt":"x","stream":true}"#)
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), 200);
        let mut stream = response.bytes_stream();
        let first = stream.next().await.unwrap().unwrap();
        assert_eq!(first, "data: {\"a\":1}\n\n", "the unfinished event is held back");
        go.cancel();
        let rest: Vec<_> = within_deadline("the end", stream.map(Result::unwrap).collect()).await;
        let rest = String::from_utf8(rest.concat()).unwrap();
        let error = rest
            .strip_prefix("data: ")
            .and_then(|rest| rest.strip_suffix("\n\ndata: [DONE]\n\n"))
            .unwrap();
        let error = message(error);
        assert!(error.contains(reason) && error.contains("`decoder1`"), "{error}");
        harness.finish().await;
    }
}

/// A decode engine whose stream stops after its first event. The token is cancelled when the proxy disconnects.
async fn stalling_decode_engine() -> (ScriptedEngine, CancellationToken) {
    let hung_up = CancellationToken::new();
    let raise = hung_up.clone();
    let fake = ScriptedEngine::start(move |_| {
        let raise = CancelOnDrop(raise.clone());
        async move {
            let first = futures_util::stream::iter([Ok::<_, std::io::Error>("data: {\"a\":1}\n\n")]);
            let rest = futures_util::stream::once(async move {
                let _raise = raise;
                std::future::pending().await
            });
            harness::event_stream(Body::from_stream(first.chain(rest)))
        }
    })
    .await;
    (fake, hung_up)
}

#[tokio::test]
async fn a_stalled_stream_ends_with_an_error_event() {
    let (decode, hung_up) = stalling_decode_engine().await;
    let prefill = prefill_engine().await;
    let mut settings = harness::settings(Connector::Nixl(Nixl {}));
    settings.deadlines.decode_idle = Duration::from_secs(2);
    let harness = ProxyHarness::start(settings, &[prefill.port], &[decode.port], 1, None).await;
    let (_, text) = harness.complete(r#"{"prompt":"x","stream":true}"#).await;
    assert!(
        text.contains("engine_timeout") && text.ends_with("data: [DONE]\n\n"),
        "{text}"
    );
    within_deadline("the disconnect", hung_up.cancelled()).await;
    harness.finish().await;
}

#[tokio::test]
async fn a_disconnect_cancels_the_running_leg() {
    let (decode, hung_up) = stalling_decode_engine().await;
    let prefill = prefill_engine().await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let response = harness
        .post("/v1/completions", r#"{"prompt":"x","stream":true}"#)
        .send()
        .await
        .unwrap();
    let mut stream = response.bytes_stream();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    within_deadline("the disconnect in the decode leg", hung_up.cancelled()).await;
    harness.finish().await;
    assert_eq!(decode.requests().len(), 1);

    let hung_up = CancellationToken::new();
    let raise = hung_up.clone();
    let prefill = ScriptedEngine::start(move |_| {
        let raise = CancelOnDrop(raise.clone());
        async move {
            let _raise = raise;
            std::future::pending().await
        }
    })
    .await;
    let decode = decode_engine().await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let request = harness.post("/v1/completions", r#"{"prompt":"x"}"#).send();
    tokio::select! {
        _ = request => panic!("the prefill never answers"),
        _ = prefill.wait_for_requests(1) => {}
    }
    within_deadline("the disconnect in the prefill leg", hung_up.cancelled()).await;
    harness.finish().await;
    assert_eq!(decode.requests().len(), 0);
}

#[tokio::test]
async fn legs_on_a_failed_engine_fail_at_once() {
    let stuck = ScriptedEngine::start(|_| std::future::pending()).await;
    let (prefill, decode) = (prefill_engine().await, decode_engine().await);
    let harness = ProxyHarness::nixl(&[stuck.port, prefill.port], &[decode.port]).await;
    let request = harness.complete(r#"{"prompt":"x"}"#);
    let lose = async {
        stuck.wait_for_requests(1).await;
        harness.lose(Role::Prefill, 0);
    };
    let ((status, _), ()) = within_deadline("the retry", futures_util::future::join(request, lose)).await;
    assert_eq!((status, prefill.requests().len()), (200, 1));
    harness.finish().await;

    let (decode, _) = stalling_decode_engine().await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let response = harness
        .post("/v1/completions", r#"{"prompt":"x","stream":true}"#)
        .send()
        .await
        .unwrap();
    harness.lose(Role::Decode, 0);
    let text = within_deadline("the end of the stream", response.text()).await.unwrap();
    assert!(
        text.contains("has stopped") && text.ends_with("data: [DONE]\n\n"),
        "{text}"
    );
    harness.finish().await;
}

#[tokio::test]
async fn a_draining_engine_finishes_its_requests() {
    let go = CancellationToken::new();
    let decode = ScriptedEngine::held_until(&go, || json_response(200, COMPLETION)).await;
    let prefill = prefill_engine().await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let request = harness.complete(r#"{"prompt":"x"}"#);
    let drain = async {
        decode.wait_for_requests(1).await;
        harness.change(|view| {
            view.stage = FleetStage::Draining;
            for engine in &mut view.engines {
                engine.load.close();
                Arc::make_mut(engine).state = xpyd::fleet::EngineState::Draining;
            }
        });
        let (status, body) = harness.complete(r#"{"prompt":"late"}"#).await;
        assert_eq!((status, code(&body).as_str()), (503, "not_serving"));
        go.cancel();
    };
    let (outcome, ()) = within_deadline("the answer", futures_util::future::join(request, drain)).await;
    assert_eq!(outcome, (200, COMPLETION.to_owned()));
    harness.finish().await;
}

#[tokio::test]
async fn refused_requests_get_openai_errors() {
    let (prefill, decode) = (prefill_engine().await, decode_engine().await);
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    let (status, body) = harness.complete("{\"prompt\":\"x\", oops}").await;
    assert_eq!((status, code(&body).as_str()), (400, "invalid_body"));
    assert!(message(&body).contains("line 1 column 16"), "{body}");
    let (status, body) = harness.complete("[1]").await;
    assert_eq!((status, code(&body).as_str()), (400, "invalid_body"));
    let (status, body) = harness.complete(" ".repeat(10_001)).await;
    assert_eq!((status, code(&body).as_str()), (413, "body_too_large"));
    let response = harness.get("/unknown").await;
    assert_eq!(response.status(), 404);
    assert_eq!(code(&response.text().await.unwrap()), "unknown_route");
    let response = harness.get("/v1/completions").await;
    assert_eq!(
        (
            response.status().as_u16(),
            response.headers()["allow"].to_str().unwrap()
        ),
        (405, "POST")
    );
    assert_eq!(code(&response.text().await.unwrap()), "method_not_allowed");
    assert_eq!((prefill.requests().len(), decode.requests().len()), (0, 0));

    assert_eq!(harness.get("/health").await.status(), 200);
    harness.lose(Role::Prefill, 0);
    let response = harness.get("/health").await;
    assert_eq!(
        (
            response.status().as_u16(),
            response.headers()["retry-after"].to_str().unwrap()
        ),
        (503, "1")
    );
    assert!(message(&response.text().await.unwrap()).contains("prefill"));
    let (status, body) = harness.complete(r#"{"prompt":"x"}"#).await;
    assert_eq!((status, code(&body).as_str()), (503, "no_engine"));
    assert_eq!(
        harness.complete(r#"{"prompt":"x","n":2}"#).await.0,
        200,
        "needs no prefill engine"
    );
    harness.change(|view| view.stage = FleetStage::Verifying);
    assert_eq!(harness.get("/health").await.status(), 503);
    harness.finish().await;
}

#[tokio::test]
async fn too_many_requests_in_flight_are_refused() {
    let go = CancellationToken::new();
    let prefill = ScriptedEngine::held_until(&go, nixl_prefill_response).await;
    let decode = decode_engine().await;
    let mut settings = harness::settings(Connector::Nixl(Nixl {}));
    settings.config.max_in_flight = 1;
    let harness = ProxyHarness::start(settings, &[prefill.port], &[decode.port], 1, None).await;
    let first = harness.complete(r#"{"prompt":"x"}"#);
    let second = async {
        prefill.wait_for_requests(1).await;
        assert_eq!(
            harness.metric(r#"xpyd_engine_requests_in_flight{engine="decoder1",role="decode"}"#),
            "1"
        );
        let outcome = harness.complete(r#"{"prompt":"y"}"#).await;
        go.cancel();
        outcome
    };
    let (first, (status, body)) = within_deadline("both answers", futures_util::future::join(first, second)).await;
    assert_eq!(
        (first.0, status, code(&body).as_str()),
        (200, 503, "too_many_requests_in_flight")
    );
    harness.finish().await;
}

#[tokio::test]
async fn requests_rotate_and_sessions_stay() {
    let (p1, p2, d1, d2) = (
        prefill_engine().await,
        prefill_engine().await,
        decode_engine().await,
        decode_engine().await,
    );
    let mut settings = harness::settings(Connector::Nixl(Nixl {}));
    settings.config.bind_sessions = true;
    let harness = ProxyHarness::start(settings, &[p1.port, p2.port], &[d1.port, d2.port], 1, None).await;
    for _ in 0..4 {
        harness.complete(r#"{"prompt":"x"}"#).await;
    }
    let counts = || [&p1, &p2, &d1, &d2].map(|fake| fake.requests().len());
    assert_eq!(counts(), [2, 2, 2, 2]);
    for _ in 0..4 {
        let request = harness
            .post("/v1/completions", r#"{"prompt":"x"}"#)
            .header("session-id", "s");
        assert_eq!(request.send().await.unwrap().status(), 200);
    }
    let mut counts = counts();
    counts[..2].sort_unstable();
    counts[2..].sort_unstable();
    assert_eq!(counts, [2, 6, 2, 6]);
    harness.finish().await;
}

#[tokio::test]
async fn model_and_tokenizer_routes_use_a_decode_engine() {
    let prefill = prefill_engine().await;
    let decode =
        ScriptedEngine::start(|seen| async move { json_response(200, format!("{} {}", seen.path, seen.raw)) }).await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    for path in ["/v1/models", "/version"] {
        assert_eq!(harness.get(path).await.text().await.unwrap(), format!("{path} "));
    }
    for path in ["/tokenize", "/detokenize"] {
        let answer = harness
            .post(path, "{\"a\": 1.0}")
            .send()
            .await
            .unwrap()
            .text()
            .await
            .unwrap();
        assert_eq!(answer, format!("{path} {{\"a\": 1.0}}"));
    }
    assert_eq!(prefill.requests().len(), 0);
    let text = harness.get("/metrics").await.text().await.unwrap();
    assert!(
        text.contains("xpyd_requests_total{endpoint=\"/tokenize\",status=\"200\"} 1\n"),
        "{text}"
    );
    harness.finish().await;
}
