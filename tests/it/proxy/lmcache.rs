//! LMCache: notifications, and KV that must be consumed.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::Response;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use xpyd::connector::FirstToken;
use xpyd::proxy::{Notifications, Settings};
use zeromq::{PushSocket, Socket, SocketSend};

use super::harness::{
    COMPLETION, ProxyHarness, ScriptedEngine, SeenRequest, code, error_response, json_response, lmcache, message,
    settings, within_deadline,
};

/// Sends one notification like a rank of a prefill engine.
async fn notify(port: u16, request_id: &str) {
    let mut socket = PushSocket::new();
    socket.connect(&format!("tcp://127.0.0.1:{port}")).await.unwrap();
    let mut bytes = b"\x82\xa4type\xaaProxyNotif\xa6req_id\xd9".to_vec();
    bytes.push(u8::try_from(request_id.len()).unwrap());
    bytes.extend(request_id.as_bytes());
    socket.send(bytes.into()).await.unwrap();
    // Dropping a socket can lose data that it has not written yet.
    within_deadline("the notification", socket.close()).await;
}

fn spec(seen: &SeenRequest) -> Value {
    seen.json()["kv_transfer_params"]["disagg_spec"].clone()
}

fn request_id(seen: &SeenRequest) -> String {
    spec(seen)["req_id"]
        .as_str()
        .expect("a plain request would kill an LMCache prefill engine")
        .to_owned()
}

/// The tag by which a decode leg finds the KV of this hand-off only.
pub(super) fn tag(prefill: &SeenRequest) -> Value {
    let tag = json!({"lmcache.tag.handoff": request_id(prefill)});
    let carried = &prefill.json()["kv_transfer_params"]["lmcache.tag.handoff"];
    assert_eq!(carried, &tag["lmcache.tag.handoff"], "both legs carry the same tag");
    tag
}

async fn decode_engine() -> ScriptedEngine {
    ScriptedEngine::start(|_| async { json_response(200, COMPLETION) }).await
}

/// A prefill engine that sends `ranks` notifications before it answers.
pub(super) async fn notifying_prefill_engine(port: u16, ranks: usize, body: &'static str) -> ScriptedEngine {
    ScriptedEngine::start(move |seen| async move {
        for _ in 0..ranks {
            notify(port, &request_id(&seen)).await;
        }
        json_response(200, body)
    })
    .await
}

const PREFILLED: &str = r#"{"choices":[{"text":"t","finish_reason":"length"}],"kv_transfer_params":null}"#;

pub(super) async fn harness(
    settings: Settings,
    prefill: &ScriptedEngine,
    decode: &ScriptedEngine,
    ranks: u16,
    socket: Notifications,
) -> ProxyHarness {
    ProxyHarness::start(settings, &[prefill.port], &[decode.port], ranks, Some(socket)).await
}

#[tokio::test]
async fn the_decode_leg_waits_for_every_rank() {
    let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let port = socket.port();
    // One rank notifies before the response, the other one long after it.
    let (prefill, decode) = (
        notifying_prefill_engine(port, 1, PREFILLED).await,
        decode_engine().await,
    );
    let harness = harness(settings(lmcache(FirstToken::Decoder)), &prefill, &decode, 2, socket).await;
    let body = r#"{"prompt":"x", "max_tokens":5,"n":1}"#;
    let request = harness.complete(body);
    let second_rank = async {
        let seen = prefill.wait_for_requests(1).await.remove(0);
        assert_eq!(spec(&seen)["receiver_init_port"], json!([7300, 7301]));
        assert_eq!(request_id(&seen), seen.id());
        // Unknown and repeated notifications arrive in between.
        notify(port, "someone-else").await;
        assert_eq!(decode.requests().len(), 0);
        notify(port, &request_id(&seen)).await;
    };
    let (outcome, ()) = within_deadline("the answer", futures_util::future::join(request, second_rank)).await;
    assert_eq!(outcome, (200, COMPLETION.to_owned()));
    let tagged = format!(
        r#"{},"kv_transfer_params":{}}}"#,
        body.trim_end_matches('}'),
        tag(&prefill.requests()[0])
    );
    assert_eq!(decode.requests()[0].raw, tagged);
    assert_eq!(decode.requests().len(), 1);
    harness.finish().await;
}

#[tokio::test]
async fn mla_models_need_one_notification() {
    let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let (prefill, decode) = (
        notifying_prefill_engine(socket.port(), 1, PREFILLED).await,
        decode_engine().await,
    );
    let mut settings = settings(lmcache(FirstToken::Decoder));
    settings.notifications = Some(1);
    let harness = harness(settings, &prefill, &decode, 4, socket).await;
    let outcome = within_deadline("the answer", harness.complete(r#"{"prompt":"x"}"#)).await;
    assert_eq!(outcome, (200, COMPLETION.to_owned()));
    harness.finish().await;
}

#[tokio::test]
async fn an_unreachable_prefill_engine_owes_no_notification() {
    let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let decode = decode_engine().await;
    let settings = settings(lmcache(FirstToken::Decoder));
    let harness = ProxyHarness::start(
        settings,
        &[super::harness::dead_port().await],
        &[decode.port],
        1,
        Some(socket),
    )
    .await;
    let (status, body) = harness.complete(r#"{"prompt":"x"}"#).await;
    assert_eq!((status, code(&body).as_str()), (502, "engine_unreachable"));
    assert_eq!(
        harness.metric("xpyd_handoffs_open "),
        "0",
        "no clean-up waits for KV that cannot come"
    );
    harness.finish().await;
}

#[tokio::test]
async fn a_lost_notification_fails_at_its_deadline() {
    let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let (prefill, decode) = (
        notifying_prefill_engine(socket.port(), 0, PREFILLED).await,
        decode_engine().await,
    );
    let mut settings = settings(lmcache(FirstToken::Decoder));
    settings.deadlines.handoff = Duration::from_millis(200);
    let harness = harness(settings, &prefill, &decode, 1, socket).await;
    let (status, body) = harness.complete(r#"{"prompt":"x"}"#).await;
    assert_eq!((status, code(&body).as_str()), (504, "engine_timeout"));
    assert!(
        message(&body).contains("`handoff`") && message(&body).contains("`prefiller1`"),
        "{body}"
    );
    let ids: Vec<String> = prefill.requests().iter().map(request_id).collect();
    assert_eq!(ids.len(), 3, "a lost hand-off is retried, each time with a new id");
    assert_ne!(ids[0], ids[1]);
    harness.finish().await;
    let seen = decode.wait_for_requests(3).await;
    assert!(
        seen.len() == 3 && seen.iter().all(|seen| seen.json()["max_tokens"] == 1),
        "the KV may be there all the same, and is taken out of the buffer: {seen:?}"
    );
}

#[tokio::test]
async fn kv_of_a_late_notification_is_consumed() {
    let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let port = socket.port();
    let (prefill, decode) = (
        notifying_prefill_engine(port, 0, PREFILLED).await,
        decode_engine().await,
    );
    let mut settings = settings(lmcache(FirstToken::Decoder));
    settings.deadlines.handoff = Duration::from_millis(200);
    settings.config.routing.attempts = 1;
    let harness = harness(settings, &prefill, &decode, 1, socket).await;
    assert_eq!(harness.complete(r#"{"prompt":"x"}"#).await.0, 504);
    decode.wait_for_requests(1).await;
    // No engine is held in the meantime, so a drain does not wait.
    within_deadline("an idle decode engine", harness.fleet.borrow().engines[1].load.idle()).await;
    notify(port, &request_id(&prefill.requests()[0])).await;
    let seen = decode.wait_for_requests(2).await;
    assert_eq!(seen[1].json()["max_tokens"], 1);
    harness.finish().await;
}

#[tokio::test]
async fn half_written_kv_is_consumed_and_never_reused() {
    let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let port = socket.port();
    // The first engine dies in its prefill leg, the second one hands over.
    let dying = ScriptedEngine::start(|_| std::future::pending::<Response<Body>>()).await;
    let living = notifying_prefill_engine(port, 1, PREFILLED).await;
    let decode = decode_engine().await;
    let settings = settings(lmcache(FirstToken::Decoder));
    let harness = ProxyHarness::start(settings, &[dying.port, living.port], &[decode.port], 1, Some(socket)).await;
    let request = harness.complete(r#"{"prompt":"x","max_tokens":7}"#);
    let death = async {
        dying.wait_for_requests(1).await;
        harness.lose(xpyd::fleet::Role::Prefill, 0);
    };
    let ((status, _), ()) = tokio::join!(request, death);
    assert_eq!(status, 200);
    let seen = decode.wait_for_requests(2).await;
    let carried = |tokens: u64| {
        let leg = seen.iter().find(|seen| seen.json()["max_tokens"] == tokens);
        leg.expect("both legs").json()["kv_transfer_params"].clone()
    };
    assert_eq!(carried(1), tag(&dying.requests()[0]), "taken out");
    assert_eq!(carried(7), tag(&living.requests()[0]), "the answer's own");
    harness.finish().await;
}

#[tokio::test]
async fn kv_arriving_after_a_disconnect_is_consumed() {
    let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let port = socket.port();
    let (prefill, decode) = (
        notifying_prefill_engine(port, 0, PREFILLED).await,
        decode_engine().await,
    );
    let harness = harness(settings(lmcache(FirstToken::Decoder)), &prefill, &decode, 1, socket).await;
    let request = harness
        .post(
            "/v1/chat/completions",
            r#"{"messages":[],"stream":true,"max_completion_tokens":99}"#,
        )
        .send();
    tokio::select! {
        _ = request => panic!("no notification, no answer"),
        _ = prefill.wait_for_requests(1) => {}
    }
    notify(port, &request_id(&prefill.requests()[0])).await;
    let consumed = decode.wait_for_requests(1).await.remove(0);
    assert_eq!(consumed.path, "/v1/chat/completions");
    let expected = json!({"messages": [], "stream": false, "max_completion_tokens": 1, "max_tokens": 1,
        "kv_transfer_params": tag(&prefill.requests()[0])});
    assert_eq!(consumed.json(), expected);
    let proxy = harness.proxy.clone();
    harness.finish().await;
    let metrics = proxy.metrics_text();
    assert!(
        metrics.contains("xpyd_handoff_cleanups_total{outcome=\"freed\"} 1\n"),
        "{metrics}"
    );
}

/// vLLM aborts a prefill after its client disconnects. Then it neither pushes KV nor notifies.
#[tokio::test]
async fn a_disconnect_in_prefill_frees_the_decode_engine() {
    let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let port = socket.port();
    let prefill = ScriptedEngine::start(|_| std::future::pending::<Response<Body>>()).await;
    let decode = decode_engine().await;
    let mut settings = settings(lmcache(FirstToken::Decoder));
    settings.deadlines.handoff = Duration::from_mins(2);
    let harness = harness(settings, &prefill, &decode, 1, socket).await;
    tokio::select! {
        _ = harness.complete(r#"{"prompt":"x"}"#) => panic!("no prefill, no answer"),
        _ = prefill.wait_for_requests(1) => {}
    }
    // Its hand-off deadline is two minutes, and a drain would wait for that long.
    let load = &harness.fleet.borrow().engines[1].load.clone();
    tokio::time::timeout(Duration::from_secs(20), load.idle())
        .await
        .expect("an idle decode engine");
    // A notification that arrives later is still consumed.
    notify(port, &request_id(&prefill.requests()[0])).await;
    decode.wait_for_requests(1).await;
    harness.finish().await;
}

/// A decode engine with a late lookup computes the prompt itself. No other request finds KV with the tag of this hand-off.
#[tokio::test]
async fn unused_kv_is_consumed() {
    const USAGE: &str =
        r#""usage":{"prompt_tokens":550,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":0}}"#;
    for stream in [false, true] {
        let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
        let prefill = notifying_prefill_engine(socket.port(), 1, PREFILLED).await;
        let decode = ScriptedEngine::start(|seen| async move {
            let choices = r#""choices":[{"text":" world","finish_reason":"length"}]"#;
            if seen.json()["stream"] == true {
                let event = format!("data: {{{choices},{USAGE}}}\n\ndata: [DONE]\n\n");
                super::harness::event_stream(Body::from(event))
            } else {
                json_response(200, format!("{{{choices},{USAGE}}}"))
            }
        })
        .await;
        let harness = harness(settings(lmcache(FirstToken::Decoder)), &prefill, &decode, 1, socket).await;
        let body = json!({"prompt": "x", "max_tokens": 7, "stream": stream}).to_string();
        assert_eq!(within_deadline("the answer", harness.complete(body)).await.0, 200);
        let seen = decode.wait_for_requests(2).await;
        let tag = tag(&prefill.requests()[0]);
        assert_eq!(seen[1].json()["kv_transfer_params"], tag, "stream: {stream}");
        assert_eq!(seen[1].json()["max_tokens"], 1, "stream: {stream}");
        let proxy = harness.proxy.clone();
        harness.finish().await;
        let metrics = proxy.metrics_text();
        for line in [
            r#"xpyd_handoff_total{outcome="recomputed"} 1"#,
            r#"xpyd_handoff_cleanups_total{outcome="freed"} 1"#,
            "xpyd_handoffs_open 0",
        ] {
            assert!(
                metrics.lines().any(|found| found == line),
                "stream: {stream}: {line}\n{metrics}"
            );
        }
    }
}

#[tokio::test]
async fn kv_of_a_refused_decode_is_consumed() {
    let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let prefill = notifying_prefill_engine(socket.port(), 1, PREFILLED).await;
    let decode = ScriptedEngine::start(|seen| async move {
        if seen.json()["max_tokens"] == 1 {
            json_response(200, COMPLETION)
        } else {
            error_response(400, "bad top_p")
        }
    })
    .await;
    let harness = harness(settings(lmcache(FirstToken::Decoder)), &prefill, &decode, 1, socket).await;
    let (status, body) = harness.complete(r#"{"prompt":"x","top_p":"?"}"#).await;
    assert_eq!((status, message(&body)), (400, "bad top_p".into()));
    assert_eq!(decode.wait_for_requests(2).await[1].json()["max_tokens"], 1);
    harness.finish().await;
}

#[tokio::test]
async fn a_decode_engine_with_wrong_port_count_is_skipped() {
    let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let (prefill, decode) = (
        notifying_prefill_engine(socket.port(), 1, PREFILLED).await,
        decode_engine().await,
    );
    let harness = harness(settings(lmcache(FirstToken::Decoder)), &prefill, &decode, 1, socket).await;
    harness.change(|view| Arc::make_mut(&mut view.engines[0]).endpoint.tensor_parallel = 2);
    let (status, body) = harness.complete(r#"{"prompt":"x"}"#).await;
    assert_eq!((status, code(&body).as_str()), (500, "engines_do_not_fit"));
    assert_eq!(prefill.requests().len(), 0);
    harness.finish().await;
}

#[tokio::test]
async fn requests_without_handoff_skip_the_prefill_engine() {
    let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let (prefill, decode) = (
        notifying_prefill_engine(socket.port(), 1, PREFILLED).await,
        decode_engine().await,
    );
    let harness = harness(settings(lmcache(FirstToken::Decoder)), &prefill, &decode, 1, socket).await;
    for body in [
        r#"{"prompt":["a","b"]}"#,
        r#"{"prompt":"x","n":2}"#,
        r#"{"prompt":"x","max_tokens":0}"#,
    ] {
        assert_eq!(harness.complete(body).await.0, 200);
    }
    assert_eq!(harness.get("/v1/models").await.status(), 200);
    assert_eq!(prefill.requests().len(), 0);
    harness.finish().await;
}

#[tokio::test]
async fn a_disconnect_in_decode_still_consumes_the_kv() {
    let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let prefill = notifying_prefill_engine(socket.port(), 1, PREFILLED).await;
    let stuck = CancellationToken::new();
    let gate = stuck.clone();
    let decode = ScriptedEngine::start(move |seen| {
        let gate = gate.clone();
        async move {
            if seen.json()["max_tokens"] != 1 {
                gate.cancelled().await;
            }
            json_response(200, COMPLETION)
        }
    })
    .await;
    let harness = harness(settings(lmcache(FirstToken::Decoder)), &prefill, &decode, 1, socket).await;
    let request = harness
        .post("/v1/completions", r#"{"prompt":"x","max_tokens":50}"#)
        .send();
    tokio::select! {
        _ = request => panic!("the decode engine never answers"),
        _ = decode.wait_for_requests(1) => {}
    }
    assert_eq!(decode.wait_for_requests(2).await[1].json()["max_tokens"], 1);
    harness.finish().await;
}
