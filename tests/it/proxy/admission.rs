//! Admission by tokens: which requests wait for a decode engine, in which order, and the errors when there is no room.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::http::HeaderMap;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use xpyd::connector::{Connector, FirstToken, Nixl};
use xpyd::fleet::{EngineId, EngineState, FleetStage, Role};
use xpyd::proxy::{CanaryPrompts, Notifications, Settings};
use xpyd::proxy_config::Admission;

use super::harness::{
    self, BackgroundTask, COMPLETION, ProxyHarness, ScriptedEngine, code, json_response, prefill_engine,
    within_deadline,
};
use crate::support::{MODEL, TestEnv, completion, get, wait_for};

/// A decode engine that answers one request per permit.
async fn gated_engine() -> (ScriptedEngine, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    let inside = Arc::clone(&gate);
    let decode = ScriptedEngine::start(move |_| {
        let gate = Arc::clone(&inside);
        async move {
            gate.acquire().await.unwrap().forget();
            json_response(200, COMPLETION)
        }
    })
    .await;
    (decode, gate)
}

fn limited(admission: Admission) -> Settings {
    let mut settings = harness::settings(Connector::Nixl(Nixl {}));
    settings.config.max_in_flight = 64;
    settings.config.admission = admission;
    settings
}

/// A decode engine has room for 100 tokens.
fn small_capacity() -> Admission {
    Admission {
        decode_tokens: Some(100),
        ..Admission::default()
    }
}

type Sent = BackgroundTask<(u16, HeaderMap, String)>;

/// Sends a prompt that needs `tokens` tokens including one for the answer. Its last token is its name.
fn send(harness: &ProxyHarness, key: &str, tokens: usize, name: usize) -> Sent {
    let mut prompt = vec![7; tokens - 2];
    prompt.push(name);
    let body = json!({"prompt": prompt, "max_tokens": 1}).to_string();
    let request = harness
        .post("/v1/completions", body)
        .header("authorization", format!("Bearer {key}"));
    BackgroundTask::start(async move {
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        (status, headers, response.text().await.unwrap())
    })
}

/// The names of the requests that the engine received, in order.
fn names(decode: &ScriptedEngine) -> Vec<u64> {
    let name = |body: Value| body["prompt"].as_array().unwrap().last().unwrap().as_u64().unwrap();
    decode.requests().iter().map(|seen| name(seen.json())).collect()
}

async fn wait_until_queued(harness: &ProxyHarness, count: usize) {
    let count = count.to_string();
    within_deadline("the queue", async {
        while harness.metric("xpyd_requests_queued ") != count {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

async fn assert_served(sent: Sent) {
    let (status, _, body) = sent.end().await;
    assert_eq!((status, body.as_str()), (200, COMPLETION));
}

#[tokio::test]
async fn clients_take_turns_in_the_queue() {
    let (prefill, (decode, gate)) = (prefill_engine().await, gated_engine().await);
    let harness = ProxyHarness::start(limited(small_capacity()), &[prefill.port], &[decode.port], 1, None).await;
    let mut all = vec![send(&harness, "greedy", 60, 0)];
    decode.wait_for_requests(1).await;
    for (count, (key, name)) in [("greedy", 1), ("greedy", 2), ("greedy", 3), ("modest", 4), ("third", 5)]
        .into_iter()
        .enumerate()
    {
        all.push(send(&harness, key, 60, name));
        wait_until_queued(&harness, count + 1).await;
    }
    assert_eq!(
        prefill.requests().len(),
        1,
        "there is no prefill before there is room to decode"
    );
    for seen in 2..=6 {
        gate.add_permits(1);
        decode.wait_for_requests(seen).await;
    }
    gate.add_permits(1);
    assert_eq!(names(&decode), [0, 1, 4, 5, 2, 3]);
    for sent in all {
        assert_served(sent).await;
    }
    assert_eq!(harness.metric(r#"xpyd_stage_seconds_count{stage="queue"}"#), "5");
    harness.finish().await;
}

#[tokio::test]
async fn a_large_request_is_not_starved_or_refused() {
    let (prefill, (decode, gate)) = (prefill_engine().await, gated_engine().await);
    let harness = ProxyHarness::start(limited(small_capacity()), &[prefill.port], &[decode.port], 1, None).await;
    let mut all = vec![send(&harness, "a", 40, 0), send(&harness, "a", 40, 1)];
    decode.wait_for_requests(2).await;
    // Larger than the engine's room, so it waits until the engine is empty. The small one would fit, but arrived later.
    all.push(send(&harness, "a", 500, 2));
    wait_until_queued(&harness, 1).await;
    all.push(send(&harness, "b", 5, 3));
    wait_until_queued(&harness, 2).await;
    gate.add_permits(1);
    within_deadline("the first end", async {
        while harness.fleet.borrow().engines[1].load.in_flight() != 1 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    wait_until_queued(&harness, 2).await;
    for seen in 3..=4 {
        gate.add_permits(1);
        decode.wait_for_requests(seen).await;
    }
    gate.add_permits(1);
    assert_eq!(names(&decode)[2..], [2, 3]);
    for sent in all {
        assert_served(sent).await;
    }
    harness.finish().await;
}

#[tokio::test]
async fn a_full_queue_and_a_timeout_send_retry_after() {
    let full = Admission {
        max_queued: 0,
        ..small_capacity()
    };
    let in_vain = Admission {
        queue_deadline: Duration::from_millis(50),
        ..small_capacity()
    };
    for (admission, status, expected) in [(full, 429, "queue_full"), (in_vain, 503, "queue_timeout")] {
        let (prefill, (decode, gate)) = (prefill_engine().await, gated_engine().await);
        let harness = ProxyHarness::start(limited(admission), &[prefill.port], &[decode.port], 1, None).await;
        let first = send(&harness, "a", 60, 0);
        decode.wait_for_requests(1).await;
        let (printed, headers, body) = send(&harness, "b", 60, 1).end().await;
        assert_eq!((printed, code(&body).as_str()), (status, expected));
        assert_eq!(headers["retry-after"], "1");
        wait_until_queued(&harness, 0).await;
        gate.add_permits(1);
        assert_served(first).await;
        assert_eq!((prefill.requests().len(), decode.requests().len()), (1, 1));
        harness.finish().await;
    }
}

#[tokio::test]
async fn the_queue_length_is_limited() {
    let (prefill, (decode, gate)) = (prefill_engine().await, gated_engine().await);
    let admission = Admission {
        max_queued: 1,
        ..small_capacity()
    };
    let harness = ProxyHarness::start(limited(admission), &[prefill.port], &[decode.port], 1, None).await;
    let first = send(&harness, "a", 60, 0);
    decode.wait_for_requests(1).await;
    let second = send(&harness, "a", 60, 1);
    wait_until_queued(&harness, 1).await;
    assert_eq!(send(&harness, "b", 60, 2).end().await.0, 429);
    gate.add_permits(2);
    assert_served(first).await;
    assert_served(second).await;
    harness.finish().await;
}

#[tokio::test]
async fn a_disconnected_waiter_frees_its_place() {
    let (prefill, (decode, gate)) = (prefill_engine().await, gated_engine().await);
    let harness = ProxyHarness::start(limited(small_capacity()), &[prefill.port], &[decode.port], 1, None).await;
    let first = send(&harness, "a", 60, 0);
    decode.wait_for_requests(1).await;
    let leaves = send(&harness, "a", 500, 1);
    wait_until_queued(&harness, 1).await;
    let stays = send(&harness, "b", 40, 2);
    wait_until_queued(&harness, 2).await;
    drop(leaves);
    // The engine has room for the small one. Only the large one was ahead of it.
    decode.wait_for_requests(2).await;
    assert_eq!(names(&decode), [0, 2]);
    gate.add_permits(2);
    assert_served(first).await;
    assert_served(stays).await;
    harness.finish().await;
}

#[tokio::test]
async fn waiters_notice_new_engines_and_shutdown() {
    let (prefill, (decode, gate), (other, open)) = (prefill_engine().await, gated_engine().await, gated_engine().await);
    let harness = ProxyHarness::start(
        limited(small_capacity()),
        &[prefill.port],
        &[decode.port, other.port],
        1,
        None,
    )
    .await;
    harness.change(|view| Arc::make_mut(&mut view.engines[2]).state = EngineState::Starting);
    let first = send(&harness, "a", 60, 0);
    decode.wait_for_requests(1).await;
    let second = send(&harness, "a", 60, 1);
    wait_until_queued(&harness, 1).await;
    harness.change(|view| Arc::make_mut(&mut view.engines[2]).state = EngineState::Ready);
    other.wait_for_requests(1).await;
    let third = send(&harness, "a", 60, 2);
    wait_until_queued(&harness, 1).await;
    harness.change(|view| view.stage = FleetStage::Draining);
    let (status, _, body) = third.end().await;
    assert_eq!((status, code(&body).as_str()), (503, "not_serving"));
    gate.add_permits(1);
    open.add_permits(1);
    assert_served(first).await;
    assert_served(second).await;
    harness.finish().await;
}

#[tokio::test]
async fn prefill_usage_corrects_the_token_estimate() {
    let prefill = ScriptedEngine::start(|_| async {
        let usage = r#""usage":{"prompt_tokens":4}"#;
        let choices = r#""choices":[{"text":"t","finish_reason":"length"}]"#;
        json_response(
            200,
            format!(r#"{{{choices},{usage},"kv_transfer_params":{}}}"#, harness::PARAMS),
        )
    })
    .await;
    let (decode, gate) = gated_engine().await;
    let harness = ProxyHarness::start(limited(small_capacity()), &[prefill.port], &[decode.port], 1, None).await;
    // The estimate by bytes is 90 tokens. A second one fits only because the first is known to have four.
    let text = json!({"prompt": "x".repeat(358), "max_tokens": 1}).to_string();
    let sent = [text.clone(), text].map(|body| BackgroundTask::start(harness.post("/v1/completions", body).send()));
    decode.wait_for_requests(2).await;
    gate.add_permits(2);
    for sent in sent {
        assert_eq!(sent.end().await.unwrap().status(), 200);
    }
    harness.finish().await;
}

#[tokio::test]
async fn lmcache_buffer_space_is_held_until_kv_is_consumed() {
    let notifications = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let prefill = prefill_engine().await;
    let gate = Arc::new(Semaphore::new(0));
    let inside = Arc::clone(&gate);
    let decode = ScriptedEngine::start(move |_| {
        let gate = Arc::clone(&inside);
        async move {
            gate.acquire().await.unwrap().forget();
            let first = futures_util::stream::iter([Ok::<_, std::io::Error>("data: {\"a\":1}\n\n")]);
            harness::event_stream(Body::from_stream(first.chain(futures_util::stream::pending())))
        }
    })
    .await;
    let mut settings = limited(Admission {
        buffer_tokens: 256,
        ..Admission::default()
    });
    settings.connector = harness::lmcache(FirstToken::Decoder);
    // The proxy waits for no notification: the prefill response completes the hand-off.
    settings.notifications = Some(0);
    let harness = ProxyHarness::start(settings, &[prefill.port], &[decode.port], 1, Some(notifications)).await;
    let send = || {
        BackgroundTask::start(
            harness
                .post("/v1/completions", r#"{"prompt":[1],"stream":true}"#)
                .send(),
        )
    };
    let first = send();
    decode.wait_for_requests(1).await;
    let second = send();
    wait_until_queued(&harness, 1).await;
    gate.add_permits(1);
    // The request continues, but its KV has left the buffer.
    let first = first.end().await.unwrap();
    decode.wait_for_requests(2).await;
    gate.add_permits(1);
    let second = second.end().await.unwrap();
    assert_eq!(
        (first.status(), second.status()),
        (reqwest::StatusCode::OK, reqwest::StatusCode::OK)
    );
    drop((first, second));
    harness.finish().await;
}

#[tokio::test]
async fn the_canary_learns_the_kv_capacity() {
    const PAGE: &str = "vllm:cache_config_info{block_size=\"16\",engine=\"0\",num_gpu_blocks=\"10\"} 1.0\n";
    let prefill = prefill_engine().await;
    let gate = Arc::new(Semaphore::new(0));
    let inside = Arc::clone(&gate);
    let moved = AtomicUsize::new(0);
    let decode = ScriptedEngine::start(move |seen| {
        let gate = Arc::clone(&inside);
        let moved = moved.fetch_add(1, Ordering::Relaxed);
        async move {
            if seen.path == "/metrics" {
                return json_response(
                    200,
                    format!("{PAGE}vllm:nixl_bytes_transferred_sum{{engine=\"0\"}} {moved}.0\n"),
                );
            }
            if !seen.raw.contains("Canary") {
                gate.acquire().await.unwrap().forget();
            }
            json_response(200, COMPLETION)
        }
    })
    .await;
    let harness = ProxyHarness::start(limited(Admission::default()), &[prefill.port], &[decode.port], 1, None).await;
    let pair = (EngineId::new(Role::Prefill, 0), EngineId::new(Role::Decode, 0));
    harness
        .proxy
        .canary(&pair.0, &pair.1, CanaryPrompts::Short)
        .await
        .expect("a good pair");
    let before = decode.requests().len();
    let first = send(&harness, "a", 100, 0);
    decode.wait_for_requests(before + 1).await;
    let second = send(&harness, "a", 100, 1);
    wait_until_queued(&harness, 1).await;
    gate.add_permits(2);
    assert_served(first).await;
    assert_served(second).await;
    harness.finish().await;
}

/// A chat with an image of 1 MB in a `data:` URL.
fn image() -> String {
    let url = format!("data:image/png;base64,{}", "QUJD".repeat(1 << 18));
    let parts = json!([{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": url}}]);
    json!({"max_tokens": 4, "messages": [{"role": "user", "content": parts}]}).to_string()
}

#[tokio::test]
async fn an_image_counts_as_its_tokens() {
    let (prefill, (decode, gate)) = (prefill_engine().await, gated_engine().await);
    let mut settings = limited(Admission {
        decode_tokens: Some(4000),
        ..Admission::default()
    });
    settings.config.max_body = 4 << 20;
    let harness = ProxyHarness::start(settings, &[prefill.port], &[decode.port], 1, None).await;
    let text = send(&harness, "a", 100, 0);
    decode.wait_for_requests(1).await;
    let request = harness.post("/v1/chat/completions", image());
    let seen = BackgroundTask::start(async move { request.send().await.unwrap().status().as_u16() });
    decode.wait_for_requests(2).await;
    let last = send(&harness, "a", 100, 1);
    decode.wait_for_requests(3).await;
    gate.add_permits(3);
    assert_served(text).await;
    assert_served(last).await;
    assert_eq!(seen.end().await, 200);
    harness.finish().await;
}

/// An estimated request can be smaller than its bytes suggest, so others can overtake it for a while. A counted one cannot be
/// overtaken.
#[tokio::test]
async fn an_estimated_shortage_blocks_no_other_client() {
    let (prefill, (decode, gate)) = (prefill_engine().await, gated_engine().await);
    let harness = ProxyHarness::start(limited(small_capacity()), &[prefill.port], &[decode.port], 1, None).await;
    let mut all = vec![send(&harness, "a", 40, 0)];
    decode.wait_for_requests(1).await;
    let request = harness.post(
        "/v1/completions",
        json!({"prompt": "x".repeat(2000), "max_tokens": 1}).to_string(),
    );
    let large = BackgroundTask::start(async move { request.send().await.unwrap().status().as_u16() });
    wait_until_queued(&harness, 1).await;
    for name in 1..=3 {
        all.push(send(&harness, "b", 5, name));
        decode.wait_for_requests(name + 1).await;
    }
    wait_until_queued(&harness, 1).await;
    gate.add_permits(4);
    for sent in all {
        assert_served(sent).await;
    }
    decode.wait_for_requests(5).await;
    gate.add_permits(1);
    assert_eq!(large.end().await, 200);
    harness.finish().await;
}

#[tokio::test]
async fn a_prompt_counts_at_most_the_model_length() {
    let gate = Arc::new(Semaphore::new(0));
    let inside = Arc::clone(&gate);
    let prefill = prefill_engine().await;
    let decode = ScriptedEngine::start(move |seen| {
        let gate = Arc::clone(&inside);
        async move {
            if seen.path == "/v1/models" {
                return json_response(200, r#"{"data":[{"id":"m","max_model_len":50},{"id":"lora"}]}"#);
            }
            gate.acquire().await.unwrap().forget();
            json_response(200, COMPLETION)
        }
    })
    .await;
    let mut settings = limited(small_capacity());
    settings.config.max_body = 1 << 20;
    let harness = ProxyHarness::start(settings, &[prefill.port], &[decode.port], 1, None).await;
    let first = send(&harness, "a", 40, 0);
    decode.wait_for_requests(1).await;
    let large = |letter: &str| {
        let body = json!({"prompt": letter.repeat(100_000), "max_tokens": 1}).to_string();
        let request = harness.post("/v1/completions", body);
        BackgroundTask::start(async move { request.send().await.unwrap().status().as_u16() })
    };
    let second = large("x");
    // The proxy asks for the model's length, so the second one fits beside the first.
    assert_eq!(decode.wait_for_requests(3).await[1].path, "/v1/models");
    gate.add_permits(2);
    assert_served(first).await;
    assert_eq!(second.end().await, 200);
    let third = large("y");
    assert_ne!(
        decode.wait_for_requests(4).await[3].path,
        "/v1/models",
        "it is known now"
    );
    gate.add_permits(1);
    assert_eq!(third.end().await, 200);
    harness.finish().await;
}

/// Each question would otherwise delay its request, as the proxy leaves 200 ms between two of them.
#[tokio::test]
async fn an_engine_that_reports_no_model_length_is_asked_once() {
    let prefill = prefill_engine().await;
    let decode = ScriptedEngine::start(|seen| async move {
        let is_list = seen.path == "/v1/models";
        json_response(
            200,
            if is_list {
                r#"{"data":[{"id":"m"}]}"#
            } else {
                COMPLETION
            },
        )
    })
    .await;
    let mut settings = harness::settings(Connector::Nixl(Nixl {}));
    settings.config.max_body = 1 << 20;
    let harness = ProxyHarness::start(settings, &[prefill.port], &[decode.port], 1, None).await;
    for _ in 0..3 {
        let body = json!({"prompt": "x".repeat(100_000), "max_tokens": 1}).to_string();
        let response = harness.post("/v1/completions", body).send().await.unwrap();
        assert_eq!(response.status().as_u16(), 200);
    }
    let paths = decode.requests().into_iter().map(|seen| seen.path);
    assert_eq!(paths.filter(|path| path == "/v1/models").count(), 1);
    harness.finish().await;
}

/// There is room for three requests at once.
#[test]
fn an_overloaded_fleet_answers_every_client() {
    let env = TestEnv::new();
    let mut run = env.up(&["--profile", "1p1d", "--set", "proxy.admission.decode_tokens=64"]);
    run.wait_until_ready();
    let port = env.proxy_port();
    let expected = completion(port, MODEL, "a unique prompt");
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(completion(port, MODEL, "a unique prompt"), expected));
        }
    });
    wait_for("an empty queue", || {
        let metrics = get(port, "/metrics");
        let empty = metrics.lines().any(|line| line == "xpyd_requests_queued 0");
        if empty { Ok(()) } else { Err(metrics) }
    });
    run.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(run.end().0, 0);
}

#[tokio::test]
async fn a_waiter_fails_when_the_last_decode_engine_fails() {
    let (prefill, (decode, _gate)) = (prefill_engine().await, gated_engine().await);
    let harness = ProxyHarness::start(limited(small_capacity()), &[prefill.port], &[decode.port], 1, None).await;
    let first = send(&harness, "a", 60, 0);
    decode.wait_for_requests(1).await;
    let second = send(&harness, "a", 60, 1);
    wait_until_queued(&harness, 1).await;
    harness.lose(Role::Decode, 0);
    for sent in [first, second] {
        let (status, _, body) = sent.end().await;
        assert_eq!((status, code(&body).as_str()), (503, "no_engine"));
    }
    harness.finish().await;
}
