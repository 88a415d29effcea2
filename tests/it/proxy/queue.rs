//! Admission by tokens: who waits for a decode engine, in which order, and what those are told for whom there is no room.

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
use xpyd::service::Admission;

use super::fake::{self, COMPLETION, Fake, Going, Rig, answer, soon};
use super::{code, prefiller};
use crate::support::{Place, completion, get, wait_for};

const MODEL: &str = "meta-llama/Llama-3.1-8B-Instruct";

/// A decode engine that answers one request per permit.
async fn gated() -> (Fake, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    let inside = Arc::clone(&gate);
    let decode = Fake::start(move |_| {
        let gate = Arc::clone(&inside);
        async move {
            gate.acquire().await.unwrap().forget();
            answer(200, COMPLETION)
        }
    })
    .await;
    (decode, gate)
}

fn limited(admission: Admission) -> Settings {
    let mut settings = fake::settings(Connector::Nixl(Nixl {}));
    settings.max_in_flight = 64;
    settings.service.admission = admission;
    settings
}

/// Room for 100 tokens.
fn narrow() -> Admission {
    Admission {
        decode_tokens: Some(100),
        ..Admission::default()
    }
}

type Sent = Going<(u16, HeaderMap, String)>;

/// Sends a prompt of as many tokens as it says, one of the answer included, named by its last token.
fn send(rig: &Rig, key: &str, tokens: usize, name: usize) -> Sent {
    let mut prompt = vec![7; tokens - 2];
    prompt.push(name);
    let body = json!({"prompt": prompt, "max_tokens": 1}).to_string();
    let request = rig
        .post("/v1/completions", body)
        .header("authorization", format!("Bearer {key}"));
    Going::start(async move {
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        (status, headers, response.text().await.unwrap())
    })
}

/// The names of the requests that the engine has seen, in order.
fn names(decode: &Fake) -> Vec<u64> {
    let name = |body: Value| body["prompt"].as_array().unwrap().last().unwrap().as_u64().unwrap();
    decode.seen().iter().map(|seen| name(seen.json())).collect()
}

async fn queued(rig: &Rig, count: usize) {
    let count = count.to_string();
    soon("the queue", async {
        while rig.metric("xpyd_requests_queued ") != count {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

async fn good(sent: Sent) {
    let (status, _, body) = sent.end().await;
    assert_eq!((status, body.as_str()), (200, COMPLETION));
}

#[tokio::test]
async fn waiters_take_turns_by_client_and_go_in_order_within_one() {
    let (prefill, (decode, gate)) = (prefiller().await, gated().await);
    let rig = Rig::start(limited(narrow()), &[prefill.port], &[decode.port], 1, None).await;
    let mut all = vec![send(&rig, "greedy", 60, 0)];
    decode.saw(1).await;
    for (count, (key, name)) in [("greedy", 1), ("greedy", 2), ("greedy", 3), ("modest", 4), ("third", 5)]
        .into_iter()
        .enumerate()
    {
        all.push(send(&rig, key, 60, name));
        queued(&rig, count + 1).await;
    }
    assert_eq!(prefill.seen().len(), 1, "nobody prefills what has no place to decode");
    for seen in 2..=6 {
        gate.add_permits(1);
        decode.saw(seen).await;
    }
    gate.add_permits(1);
    assert_eq!(names(&decode), [0, 1, 4, 5, 2, 3]);
    for sent in all {
        good(sent).await;
    }
    assert_eq!(rig.metric(r#"xpyd_stage_seconds_count{stage="queue"}"#), "5");
    rig.finish().await;
}

#[tokio::test]
async fn something_large_is_neither_starved_nor_refused() {
    let (prefill, (decode, gate)) = (prefiller().await, gated().await);
    let rig = Rig::start(limited(narrow()), &[prefill.port], &[decode.port], 1, None).await;
    let mut all = vec![send(&rig, "a", 40, 0), send(&rig, "a", 40, 1)];
    decode.saw(2).await;
    // Larger than the engine: it waits until that is empty. The small one would fit in, but came later.
    all.push(send(&rig, "a", 500, 2));
    queued(&rig, 1).await;
    all.push(send(&rig, "b", 5, 3));
    queued(&rig, 2).await;
    gate.add_permits(1);
    soon("the first end", async {
        while rig.fleet.borrow().engines[1].load.in_flight() != 1 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    queued(&rig, 2).await;
    for seen in 3..=4 {
        gate.add_permits(1);
        decode.saw(seen).await;
    }
    gate.add_permits(1);
    assert_eq!(names(&decode)[2..], [2, 3]);
    for sent in all {
        good(sent).await;
    }
    rig.finish().await;
}

#[tokio::test]
async fn a_full_queue_and_a_wait_in_vain_say_when_to_come_back() {
    let full = Admission {
        max_queued: 0,
        ..narrow()
    };
    let in_vain = Admission {
        queue_deadline: Duration::from_millis(50),
        ..narrow()
    };
    for (admission, status, expected) in [(full, 429, "queue_full"), (in_vain, 503, "queue_timeout")] {
        let (prefill, (decode, gate)) = (prefiller().await, gated().await);
        let rig = Rig::start(limited(admission), &[prefill.port], &[decode.port], 1, None).await;
        let first = send(&rig, "a", 60, 0);
        decode.saw(1).await;
        let (told, headers, body) = send(&rig, "b", 60, 1).end().await;
        assert_eq!((told, code(&body).as_str()), (status, expected));
        assert_eq!(headers["retry-after"], "1");
        queued(&rig, 0).await;
        gate.add_permits(1);
        good(first).await;
        assert_eq!((prefill.seen().len(), decode.seen().len()), (1, 1));
        rig.finish().await;
    }
}

#[tokio::test]
async fn only_so_many_may_wait() {
    let (prefill, (decode, gate)) = (prefiller().await, gated().await);
    let admission = Admission {
        max_queued: 1,
        ..narrow()
    };
    let rig = Rig::start(limited(admission), &[prefill.port], &[decode.port], 1, None).await;
    let first = send(&rig, "a", 60, 0);
    decode.saw(1).await;
    let second = send(&rig, "a", 60, 1);
    queued(&rig, 1).await;
    assert_eq!(send(&rig, "b", 60, 2).end().await.0, 429);
    gate.add_permits(2);
    good(first).await;
    good(second).await;
    rig.finish().await;
}

#[tokio::test]
async fn a_waiter_that_leaves_frees_its_place_and_holds_up_nobody() {
    let (prefill, (decode, gate)) = (prefiller().await, gated().await);
    let rig = Rig::start(limited(narrow()), &[prefill.port], &[decode.port], 1, None).await;
    let first = send(&rig, "a", 60, 0);
    decode.saw(1).await;
    let leaves = send(&rig, "a", 500, 1);
    queued(&rig, 1).await;
    let stays = send(&rig, "b", 40, 2);
    queued(&rig, 2).await;
    drop(leaves);
    // The engine has room for the small one; only the large one stood before it.
    decode.saw(2).await;
    assert_eq!(names(&decode), [0, 2]);
    gate.add_permits(2);
    good(first).await;
    good(stays).await;
    rig.finish().await;
}

#[tokio::test]
async fn waiters_see_engines_come_and_the_fleet_stop() {
    let (prefill, (decode, gate), (other, open)) = (prefiller().await, gated().await, gated().await);
    let rig = Rig::start(limited(narrow()), &[prefill.port], &[decode.port, other.port], 1, None).await;
    rig.change(|view| Arc::make_mut(&mut view.engines[2]).state = EngineState::Starting);
    let first = send(&rig, "a", 60, 0);
    decode.saw(1).await;
    let second = send(&rig, "a", 60, 1);
    queued(&rig, 1).await;
    rig.change(|view| Arc::make_mut(&mut view.engines[2]).state = EngineState::Ready);
    other.saw(1).await;
    let third = send(&rig, "a", 60, 2);
    queued(&rig, 1).await;
    rig.change(|view| view.stage = FleetStage::Draining);
    let (status, _, body) = third.end().await;
    assert_eq!((status, code(&body).as_str()), (503, "not_serving"));
    gate.add_permits(1);
    open.add_permits(1);
    good(first).await;
    good(second).await;
    rig.finish().await;
}

#[tokio::test]
async fn what_the_prefill_engine_counted_corrects_the_estimate() {
    let prefill = Fake::start(|_| async {
        let usage = r#""usage":{"prompt_tokens":4}"#;
        let choices = r#""choices":[{"text":"t","finish_reason":"length"}]"#;
        answer(
            200,
            format!(r#"{{{choices},{usage},"kv_transfer_params":{}}}"#, fake::PARAMS),
        )
    })
    .await;
    let (decode, gate) = gated().await;
    let rig = Rig::start(limited(narrow()), &[prefill.port], &[decode.port], 1, None).await;
    // Ninety tokens by its bytes: a second one fits in only because the first is known to have four.
    let text = json!({"prompt": "x".repeat(358), "max_tokens": 1}).to_string();
    let sent = [text.clone(), text].map(|body| Going::start(rig.post("/v1/completions", body).send()));
    decode.saw(2).await;
    gate.add_permits(2);
    for sent in sent {
        assert_eq!(sent.end().await.unwrap().status(), 200);
    }
    rig.finish().await;
}

#[tokio::test]
async fn lmcaches_buffer_is_full_until_the_decode_engine_has_taken_the_kv() {
    let notifications = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let prefill = prefiller().await;
    let gate = Arc::new(Semaphore::new(0));
    let inside = Arc::clone(&gate);
    let decode = Fake::start(move |_| {
        let gate = Arc::clone(&inside);
        async move {
            gate.acquire().await.unwrap().forget();
            let first = futures_util::stream::iter([Ok::<_, std::io::Error>("data: {\"a\":1}\n\n")]);
            fake::sse(Body::from_stream(first.chain(futures_util::stream::pending())))
        }
    })
    .await;
    let mut settings = limited(Admission {
        buffer_tokens: 256,
        ..Admission::default()
    });
    settings.connector = fake::lmcache(FirstToken::Decoder);
    // No notification is awaited: the prefill's answer is the hand-off.
    settings.notifications = Some(0);
    let rig = Rig::start(settings, &[prefill.port], &[decode.port], 1, Some(notifications)).await;
    let send = || Going::start(rig.post("/v1/completions", r#"{"prompt":[1],"stream":true}"#).send());
    let first = send();
    decode.saw(1).await;
    let second = send();
    queued(&rig, 1).await;
    gate.add_permits(1);
    // It goes on, but its KV has left the buffer.
    let first = first.end().await.unwrap();
    decode.saw(2).await;
    gate.add_permits(1);
    let second = second.end().await.unwrap();
    assert_eq!(
        (first.status(), second.status()),
        (reqwest::StatusCode::OK, reqwest::StatusCode::OK)
    );
    drop((first, second));
    rig.finish().await;
}

#[tokio::test]
async fn a_canary_learns_how_many_tokens_an_engine_has_room_for() {
    const PAGE: &str = "vllm:cache_config_info{block_size=\"16\",engine=\"0\",num_gpu_blocks=\"10\"} 1.0\n";
    let prefill = prefiller().await;
    let gate = Arc::new(Semaphore::new(0));
    let inside = Arc::clone(&gate);
    let moved = AtomicUsize::new(0);
    let decode = Fake::start(move |seen| {
        let gate = Arc::clone(&inside);
        let moved = moved.fetch_add(1, Ordering::Relaxed);
        async move {
            if seen.path == "/metrics" {
                return answer(
                    200,
                    format!("{PAGE}vllm:nixl_bytes_transferred_sum{{engine=\"0\"}} {moved}.0\n"),
                );
            }
            if !seen.raw.contains("Canary") {
                gate.acquire().await.unwrap().forget();
            }
            answer(200, COMPLETION)
        }
    })
    .await;
    let rig = Rig::start(limited(Admission::default()), &[prefill.port], &[decode.port], 1, None).await;
    let pair = (EngineId::new(Role::Prefill, 0), EngineId::new(Role::Decode, 0));
    rig.proxy
        .canary(&pair.0, &pair.1, CanaryPrompts::Short)
        .await
        .expect("a good pair");
    let before = decode.seen().len();
    let first = send(&rig, "a", 100, 0);
    decode.saw(before + 1).await;
    let second = send(&rig, "a", 100, 1);
    queued(&rig, 1).await;
    gate.add_permits(2);
    good(first).await;
    good(second).await;
    rig.finish().await;
}

/// A chat with an image of a megabyte, by its `data:` URL.
fn image() -> String {
    let url = format!("data:image/png;base64,{}", "QUJD".repeat(1 << 18));
    let parts = json!([{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": url}}]);
    json!({"max_tokens": 4, "messages": [{"role": "user", "content": parts}]}).to_string()
}

#[tokio::test]
async fn an_image_weighs_as_little_as_it_does_in_an_engine() {
    let (prefill, (decode, gate)) = (prefiller().await, gated().await);
    let mut settings = limited(Admission {
        decode_tokens: Some(4000),
        ..Admission::default()
    });
    settings.max_body_bytes = 4 << 20;
    let rig = Rig::start(settings, &[prefill.port], &[decode.port], 1, None).await;
    let text = send(&rig, "a", 100, 0);
    decode.saw(1).await;
    let request = rig.post("/v1/chat/completions", image());
    let seen = Going::start(async move { request.send().await.unwrap().status().as_u16() });
    decode.saw(2).await;
    let last = send(&rig, "a", 100, 1);
    decode.saw(3).await;
    gate.add_permits(3);
    good(text).await;
    good(last).await;
    assert_eq!(seen.end().await, 200);
    rig.finish().await;
}

/// It may be smaller than its bytes say, so others go first for a while; what was counted waits in its turn.
#[tokio::test]
async fn who_only_by_an_estimate_has_no_room_holds_nobody_up() {
    let (prefill, (decode, gate)) = (prefiller().await, gated().await);
    let rig = Rig::start(limited(narrow()), &[prefill.port], &[decode.port], 1, None).await;
    let mut all = vec![send(&rig, "a", 40, 0)];
    decode.saw(1).await;
    let request = rig.post(
        "/v1/completions",
        json!({"prompt": "x".repeat(2000), "max_tokens": 1}).to_string(),
    );
    let large = Going::start(async move { request.send().await.unwrap().status().as_u16() });
    queued(&rig, 1).await;
    for name in 1..=3 {
        all.push(send(&rig, "b", 5, name));
        decode.saw(name + 1).await;
    }
    queued(&rig, 1).await;
    gate.add_permits(4);
    for sent in all {
        good(sent).await;
    }
    decode.saw(5).await;
    gate.add_permits(1);
    assert_eq!(large.end().await, 200);
    rig.finish().await;
}

#[tokio::test]
async fn no_prompt_weighs_more_than_the_model_reads() {
    let gate = Arc::new(Semaphore::new(0));
    let inside = Arc::clone(&gate);
    let prefill = prefiller().await;
    let decode = Fake::start(move |seen| {
        let gate = Arc::clone(&inside);
        async move {
            if seen.path == "/v1/models" {
                return answer(200, r#"{"data":[{"id":"m","max_model_len":50},{"id":"lora"}]}"#);
            }
            gate.acquire().await.unwrap().forget();
            answer(200, COMPLETION)
        }
    })
    .await;
    let mut settings = limited(narrow());
    settings.max_body_bytes = 1 << 20;
    let rig = Rig::start(settings, &[prefill.port], &[decode.port], 1, None).await;
    let first = send(&rig, "a", 40, 0);
    decode.saw(1).await;
    let large = |letter: &str| {
        let body = json!({"prompt": letter.repeat(100_000), "max_tokens": 1}).to_string();
        let request = rig.post("/v1/completions", body);
        Going::start(async move { request.send().await.unwrap().status().as_u16() })
    };
    let second = large("x");
    // It asks how long the model is, and fits in beside the first one.
    assert_eq!(decode.saw(3).await[1].path, "/v1/models");
    gate.add_permits(2);
    good(first).await;
    assert_eq!(second.end().await, 200);
    let third = large("y");
    assert_ne!(decode.saw(4).await[3].path, "/v1/models", "it is known now");
    gate.add_permits(1);
    assert_eq!(third.end().await, 200);
    rig.finish().await;
}

/// Room for three of them at once.
#[test]
fn a_fleet_under_more_load_than_it_has_room_for_answers_everybody() {
    let place = Place::new();
    let mut run = place.up(&["--profile", "1p1d", "--set", "proxy.admission.decode_tokens=64"]);
    run.wait_until_ready();
    let port = place.proxy_port();
    let expected = completion(port, MODEL, "a prompt of its own");
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(completion(port, MODEL, "a prompt of its own"), expected));
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
async fn a_waiter_is_told_when_the_last_decode_engine_is_lost() {
    let (prefill, (decode, _gate)) = (prefiller().await, gated().await);
    let rig = Rig::start(limited(narrow()), &[prefill.port], &[decode.port], 1, None).await;
    let first = send(&rig, "a", 60, 0);
    decode.saw(1).await;
    let second = send(&rig, "a", 60, 1);
    queued(&rig, 1).await;
    rig.lose(Role::Decode, 0);
    for sent in [first, second] {
        let (status, _, body) = sent.end().await;
        assert_eq!((status, code(&body).as_str()), (503, "no_engine"));
    }
    rig.finish().await;
}
