//! LMCache: notifications, KV that must be consumed, and the first token of the prefill engine.

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
    COMPLETION, ProxyHarness, ScriptedEngine, SeenRequest, answer, code, error, events, lmcache, message, settings,
    within_deadline,
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
fn tag(prefill: &SeenRequest) -> Value {
    let tag = json!({"lmcache.tag.handoff": request_id(prefill)});
    let carried = &prefill.json()["kv_transfer_params"]["lmcache.tag.handoff"];
    assert_eq!(carried, &tag["lmcache.tag.handoff"], "both legs carry the same tag");
    tag
}

async fn decode_engine() -> ScriptedEngine {
    ScriptedEngine::start(|_| async { answer(200, COMPLETION) }).await
}

/// A prefill engine that sends `ranks` notifications before it answers.
pub(crate) async fn prefiller(port: u16, ranks: usize, body: &'static str) -> ScriptedEngine {
    ScriptedEngine::start(move |seen| async move {
        for _ in 0..ranks {
            notify(port, &request_id(&seen)).await;
        }
        answer(200, body)
    })
    .await
}

const PREFILLED: &str = r#"{"choices":[{"text":"t","finish_reason":"length"}],"kv_transfer_params":null}"#;

async fn harness(
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
    let (prefill, decode) = (prefiller(port, 1, PREFILLED).await, decode_engine().await);
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
    let (prefill, decode) = (prefiller(socket.port(), 1, PREFILLED).await, decode_engine().await);
    let settings = Settings {
        notifications: Some(1),
        ..settings(lmcache(FirstToken::Decoder))
    };
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
    let (prefill, decode) = (prefiller(socket.port(), 0, PREFILLED).await, decode_engine().await);
    let settings = Settings {
        handoff_deadline: Duration::from_millis(200),
        ..settings(lmcache(FirstToken::Decoder))
    };
    let harness = harness(settings, &prefill, &decode, 1, socket).await;
    let (status, body) = harness.complete(r#"{"prompt":"x"}"#).await;
    assert_eq!((status, code(&body).as_str()), (504, "engine_timeout"));
    assert!(
        message(&body).contains("`handoff`") && message(&body).contains("`prefiller1`"),
        "{body}"
    );
    let ids: Vec<String> = prefill.requests().iter().map(request_id).collect();
    assert_eq!(
        ids.len(),
        3,
        "a lost hand-off is tried again, each time with an id of its own"
    );
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
    let (prefill, decode) = (prefiller(port, 0, PREFILLED).await, decode_engine().await);
    let mut settings = Settings {
        handoff_deadline: Duration::from_millis(200),
        ..settings(lmcache(FirstToken::Decoder))
    };
    settings.service.routing.attempts = 1;
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
    let living = prefiller(port, 1, PREFILLED).await;
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
    let (prefill, decode) = (prefiller(port, 0, PREFILLED).await, decode_engine().await);
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
        metrics.contains(r#"xpyd_handoff_cleanups_total{outcome="freed"} 1"#),
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
    let settings = Settings {
        handoff_deadline: Duration::from_mins(2),
        ..settings(lmcache(FirstToken::Decoder))
    };
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
        let prefill = prefiller(socket.port(), 1, PREFILLED).await;
        let decode = ScriptedEngine::start(|seen| async move {
            let choices = r#""choices":[{"text":" world","finish_reason":"length"}]"#;
            if seen.json()["stream"] == true {
                let event = format!("data: {{{choices},{USAGE}}}\n\ndata: [DONE]\n\n");
                super::harness::sse(Body::from(event))
            } else {
                answer(200, format!("{{{choices},{USAGE}}}"))
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
            assert!(metrics.contains(line), "stream: {stream}: {line}\n{metrics}");
        }
    }
}

#[tokio::test]
async fn kv_of_a_refused_decode_is_consumed() {
    let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let prefill = prefiller(socket.port(), 1, PREFILLED).await;
    let decode = ScriptedEngine::start(|seen| async move {
        if seen.json()["max_tokens"] == 1 {
            answer(200, COMPLETION)
        } else {
            error(400, "bad top_p")
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
    let (prefill, decode) = (prefiller(socket.port(), 1, PREFILLED).await, decode_engine().await);
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
    let (prefill, decode) = (prefiller(socket.port(), 1, PREFILLED).await, decode_engine().await);
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

/// The prefill engine's response with the first token: `Hel` is token 42.
const FIRST: &str = r#"{"id":"cmpl-P","object":"text_completion","created":5,"model":"m","choices":[{"index":0,"text":"Hel","logprobs":null,"finish_reason":"length","stop_reason":null}],"usage":{"prompt_tokens":3,"total_tokens":4,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":2}},"kv_transfer_params":{"first_tok":42}}"#;

/// The same, with an answer that is already complete.
const ENDED: &str = r#"{"id":"cmpl-P","object":"text_completion","created":5,"model":"m","choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"stop","stop_reason":7}],"usage":{"prompt_tokens":3,"total_tokens":4,"completion_tokens":1},"kv_transfer_params":{"first_tok":2}}"#;

/// The same, with half a character as first token.
const HALF: &str = r#"{"id":"cmpl-P","object":"text_completion","created":5,"model":"m","choices":[{"index":0,"text":"\ufffd","finish_reason":"length"}],"usage":{"prompt_tokens":3},"kv_transfer_params":{"first_tok":9}}"#;

const REST: &str = r#"{"id":"cmpl-D","object":"text_completion","created":6,"model":"m","choices":[{"index":0,"text":"lo","logprobs":null,"finish_reason":"stop","stop_reason":null}],"usage":{"prompt_tokens":4,"total_tokens":5,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":3}}}"#;

/// Split where a parser that treats each chunk as an event fails.
fn rest_stream() -> Response<Body> {
    events(vec![
        Ok(
            "data: {\"id\":\"cmpl-D\",\"object\":\"text_completion\",\"created\":6,\"model\":\"m\",\"choices\":[{\"index\":0,\"te",
        ),
        Ok(
            "xt\":\"lo\",\"logprobs\":null,\"finish_reason\":null,\"stop_reason\":null}]}\n\ndata: {\"id\":\"cmpl-D\",\"choices\":[{\"index\":0,\"text\":\"!\",\"finish_reason\":\"length\"}]}\n\n",
        ),
        Ok(
            "data: {\"id\":\"cmpl-D\",\"choices\":[],\"usage\":{\"prompt_tokens\":4,\"total_tokens\":6,\"completion_tokens\":2}}\n\n",
        ),
        Ok("data: [DONE]\n\n"),
    ])
}

async fn splice(
    first: &'static str,
    body: &str,
    path: &str,
) -> (u16, String, String, Vec<SeenRequest>, Vec<SeenRequest>) {
    let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let prefill = prefiller(socket.port(), 1, first).await;
    let decode = ScriptedEngine::start(|seen| async move {
        match (seen.path.as_str(), &seen.json()["stream"]) {
            ("/tokenize", _) => answer(200, r#"{"count":3,"max_model_len":99,"tokens":[1,2,3]}"#),
            (_, Value::Bool(true)) => rest_stream(),
            _ => answer(200, REST),
        }
    })
    .await;
    let harness = harness(settings(lmcache(FirstToken::Prefiller)), &prefill, &decode, 1, socket).await;
    let request = harness.post(path, body.to_owned()).header("authorization", "Bearer k");
    let response = within_deadline("the answer", request.send()).await.unwrap();
    let status = response.status().as_u16();
    let content_type = response.headers()["content-type"].to_str().unwrap().to_owned();
    let text = within_deadline("the whole answer", response.text()).await.unwrap();
    harness.finish().await;
    (status, content_type, text, prefill.requests(), decode.requests())
}

fn chunks(text: &str) -> Vec<Value> {
    let data = text.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
    data.map(|data| serde_json::from_str(data).unwrap_or_else(|_| json!(data)))
        .collect()
}

#[tokio::test]
async fn a_first_token_completion_is_one_answer() {
    let body = r#"{"model":"m","prompt":"x","max_tokens":5,"temperature":0}"#;
    let (status, content_type, text, prefill, decode) = splice(FIRST, body, "/v1/completions").await;
    assert_eq!((status, content_type.as_str()), (200, "application/json"));
    let answer: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(answer["id"], "cmpl-P");
    assert_eq!(answer["choices"][0]["text"], "Hello");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let usage = json!({"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 2}});
    assert_eq!(answer["usage"], usage);
    let first = prefill[0].json();
    assert_eq!((&first["prompt"], &first["max_tokens"]), (&json!([1, 2, 3]), &json!(1)));
    assert_eq!(first["kv_transfer_params"]["ret_first_tok"], true);
    assert_eq!(decode[0].json(), json!({"model": "m", "prompt": "x"}));
    let rest = json!({"model": "m", "prompt": [1, 2, 3, 42], "max_tokens": 4, "temperature": 0,
        "kv_transfer_params": tag(&prefill[0])});
    assert_eq!(decode[1].json(), rest);
    assert_eq!(decode.len(), 2);
    for seen in prefill.iter().chain(&decode) {
        assert_eq!(seen.headers["authorization"], "Bearer k");
    }
}

#[tokio::test]
async fn a_first_token_stream_has_one_id_and_right_usage() {
    let body = r#"{"model":"m","prompt":[1,2,3],"stream":true,"stream_options":{"include_usage":true}}"#;
    let (_, content_type, text, _, decode) = splice(FIRST, body, "/v1/completions").await;
    assert!(content_type.starts_with("text/event-stream"));
    let chunks = chunks(&text);
    let texts: Vec<_> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["text"].as_str())
        .collect();
    assert_eq!(texts, ["Hel", "lo", "!"]);
    assert_eq!(chunks.last().unwrap(), "[DONE]");
    let events = &chunks[..chunks.len() - 1];
    assert!(
        events
            .iter()
            .all(|chunk| chunk["id"] == "cmpl-P" && chunk["created"] == 5),
        "{text}"
    );
    let usage = &events.last().unwrap()["usage"];
    assert_eq!(
        (&usage["prompt_tokens"], &usage["completion_tokens"]),
        (&json!(3), &json!(3))
    );
    assert_eq!(events[0]["usage"], Value::Null);
    // The prompt consists of token ids, and vLLM's default of 16 tokens includes the first one.
    assert_eq!(decode.len(), 1);
    assert_eq!(decode[0].json()["max_tokens"], 15);
}

/// The same for a chat, and with a reasoning parser.
const CHAT_FIRST: &str = r#"{"id":"chatcmpl-P","object":"chat.completion","created":5,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"Hel","new":1.50},"finish_reason":"length","stop_reason":null}],"usage":{"prompt_tokens":3,"total_tokens":4,"completion_tokens":1},"kv_transfer_params":{"first_tok":42}}"#;
const CHAT_THOUGHT: &str = r#"{"id":"chatcmpl-P","object":"chat.completion","created":5,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"Hel","reasoning":"Hel"},"finish_reason":"length"}],"usage":{"prompt_tokens":3},"kv_transfer_params":{"first_tok":42}}"#;

const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn a_first_token_chat_continues_the_prefill_response() {
    let body = r#"{"messages":[{"role":"user","content":"x"}],"parallel_tool_calls":true,"logprobs":false}"#;
    let (_, _, text, prefill, decode) = splice(CHAT_FIRST, body, CHAT).await;
    let whole = r#"{"id":"chatcmpl-P","object":"chat.completion","created":5,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"Hello","new":1.50},"finish_reason":"stop","stop_reason":null}],"usage":{"prompt_tokens":3,"total_tokens":5,"completion_tokens":2},"kv_transfer_params":null}"#;
    assert_eq!(text, whole);
    assert_eq!(prefill[0].path, CHAT);
    let params = &prefill[0].json()["kv_transfer_params"];
    assert_eq!(
        (&params["prompt_token_ids"], &params["ret_first_tok"]),
        (&json!([1, 2, 3]), &json!(true))
    );
    // The remaining tokens: 99 minus the 3 of the prompt and the first one.
    let rest = json!({"prompt": [1, 2, 3, 42], "max_tokens": 95, "kv_transfer_params": tag(&prefill[0])});
    assert_eq!((decode[1].path.as_str(), decode[1].json()), ("/v1/completions", rest));

    let body = r#"{"messages":[{"role":"user","content":"x"}],"stream":true,"stream_options":{"include_usage":true},"max_completion_tokens":9}"#;
    let (_, _, text, _, decode) = splice(CHAT_FIRST, body, CHAT).await;
    let chunks = chunks(&text);
    let deltas: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]).collect();
    assert_eq!(*deltas[0], json!({"role": "assistant", "content": ""}));
    let contents: Vec<&Value> = deltas[1..4].iter().map(|delta| &delta["content"]).collect();
    assert_eq!(contents, ["Hel", "lo", "!"]);
    assert_eq!(chunks[3]["choices"][0]["finish_reason"], "length");
    let usage = json!({"prompt_tokens": 3, "total_tokens": 6, "completion_tokens": 3});
    assert_eq!((&chunks[4]["choices"], &chunks[4]["usage"]), (&json!([]), &usage));
    let of_one_answer = |chunk: &Value| {
        chunk["id"] == "chatcmpl-P" && chunk["created"] == 5 && chunk["object"] == "chat.completion.chunk"
    };
    assert!(chunks[..5].iter().all(of_one_answer), "{text}");
    assert_eq!((chunks.len(), &chunks[5]), (6, &json!("[DONE]")));
    assert_eq!(decode[1].json()["max_tokens"], 8);
}

#[tokio::test]
async fn a_first_token_that_is_not_text_goes_to_decode() {
    let body = r#"{"messages":[{"role":"user","content":"x"}]}"#;
    let (status, _, _, prefill, decode) = splice(CHAT_THOUGHT, body, CHAT).await;
    assert_eq!((status, prefill.len()), (200, 1));
    assert!(decode.iter().any(|seen| seen.raw == body), "the client's own request");
}

#[tokio::test]
async fn a_one_token_answer_needs_no_decode_leg() {
    let body = r#"{"model":"m","prompt":"x","max_tokens":1}"#;
    let (_, _, text, prefill, decode) = splice(FIRST, body, "/v1/completions").await;
    let answer: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (
            answer["choices"][0]["text"].as_str(),
            answer["choices"][0]["finish_reason"].as_str()
        ),
        (Some("Hel"), Some("length"))
    );
    assert_eq!(answer["usage"]["completion_tokens"], 1);
    // Only the tokenization and the request that frees the KV in the decode engine's buffer.
    assert_eq!(decode.len(), 2);
    assert_eq!(
        decode[1].json(),
        json!({"model": "m", "prompt": [1, 2, 3, 1], "max_tokens": 1, "kv_transfer_params": tag(&prefill[0])})
    );

    let body = r#"{"model":"m","prompt":"x","stream":true,"stream_options":{"include_usage":true},"max_tokens":9}"#;
    let (_, content_type, text, _, decode) = splice(ENDED, body, "/v1/completions").await;
    assert!(content_type.starts_with("text/event-stream"));
    let chunks = chunks(&text);
    assert_eq!(
        (
            &chunks[0]["choices"][0]["finish_reason"],
            &chunks[0]["choices"][0]["stop_reason"]
        ),
        (&json!("stop"), &json!(7))
    );
    assert_eq!(
        (&chunks[1]["choices"], &chunks[1]["usage"]["completion_tokens"]),
        (&json!([]), &json!(1))
    );
    assert_eq!(chunks[2], "[DONE]");
    assert_eq!(decode[1].json()["max_tokens"], 1);
}

#[tokio::test]
async fn an_incomplete_character_goes_to_decode() {
    let body = r#"{"model":"m","prompt":"x","max_tokens":5}"#;
    let (status, _, text, _, decode) = splice(HALF, body, "/v1/completions").await;
    assert_eq!((status, text.as_str()), (200, REST));
    let mut bodies: Vec<String> = decode[1..].iter().map(|seen| seen.raw.clone()).collect();
    bodies.sort_by_key(|raw| raw.contains("\"x\""));
    assert_eq!(bodies[1], body, "the client's own request");
    assert!(bodies[0].contains("[1,2,3,1]"), "and the KV consumed");
}

#[tokio::test]
async fn inexact_first_token_requests_use_decode_alone() {
    for extra in [r#""logprobs":1"#, r#""stop":["a"]"#, r#""min_tokens":2"#, r#""seed":7"#] {
        let body = format!(r#"{{"model":"m","prompt":"x",{extra}}}"#);
        let (status, _, text, prefill, decode) = splice(FIRST, &body, "/v1/completions").await;
        assert_eq!((status, text.as_str()), (200, REST));
        assert_eq!(
            (prefill.len(), decode.len(), decode[0].raw.as_str()),
            (0, 1, body.as_str())
        );
    }
    let body = r#"{"messages":[{"role":"user","content":"x"}],"tools":[{"type":"function"}]}"#;
    let (_, _, _, prefill, decode) = splice(FIRST, body, "/v1/chat/completions").await;
    assert_eq!(
        (prefill.len(), decode[0].path.as_str(), decode[0].raw.as_str()),
        (0, CHAT, body)
    );
}

#[tokio::test]
async fn a_disconnect_in_decode_still_consumes_the_kv() {
    let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let prefill = prefiller(socket.port(), 1, PREFILLED).await;
    let stuck = CancellationToken::new();
    let gate = stuck.clone();
    let decode = ScriptedEngine::start(move |seen| {
        let gate = gate.clone();
        async move {
            if seen.json()["max_tokens"] != 1 {
                gate.cancelled().await;
            }
            answer(200, COMPLETION)
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
