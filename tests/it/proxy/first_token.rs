//! The first token of the prefill engine (`lmcache.first_token = "prefiller"`): xpyd streams it to the client,
//! and the decode engine continues.

use axum::body::Body;
use axum::http::Response;
use serde_json::{Value, json};
use xpyd::connector::FirstToken;
use xpyd::proxy::Notifications;

use super::harness::{ScriptedEngine, SeenRequest, json_response, lmcache, settings, sse_response, within_deadline};
use super::lmcache::{harness, notifying_prefill_engine, tag};

/// The prefill engine's response with the first token: `Hel` is token 42.
const FIRST: &str = r#"{"id":"cmpl-P","object":"text_completion","created":5,"model":"m","choices":[{"index":0,"text":"Hel","logprobs":null,"finish_reason":"length","stop_reason":null}],"usage":{"prompt_tokens":3,"total_tokens":4,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":2}},"kv_transfer_params":{"first_tok":42}}"#;

/// The same, with an answer that is already complete.
const ENDED: &str = r#"{"id":"cmpl-P","object":"text_completion","created":5,"model":"m","choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"stop","stop_reason":7}],"usage":{"prompt_tokens":3,"total_tokens":4,"completion_tokens":1},"kv_transfer_params":{"first_tok":2}}"#;

/// The same, with half a character as first token.
const HALF_CHARACTER: &str = r#"{"id":"cmpl-P","object":"text_completion","created":5,"model":"m","choices":[{"index":0,"text":"\ufffd","finish_reason":"length"}],"usage":{"prompt_tokens":3},"kv_transfer_params":{"first_tok":9}}"#;

const REST: &str = r#"{"id":"cmpl-D","object":"text_completion","created":6,"model":"m","choices":[{"index":0,"text":"lo","logprobs":null,"finish_reason":"stop","stop_reason":null}],"usage":{"prompt_tokens":4,"total_tokens":5,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":3}}}"#;

/// Split where a parser that treats each chunk as an event fails.
fn rest_stream() -> Response<Body> {
    sse_response(vec![
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

async fn run_first_token(
    first: &'static str,
    body: &str,
    path: &str,
) -> (u16, String, String, Vec<SeenRequest>, Vec<SeenRequest>) {
    let socket = Notifications::bind("127.0.0.1", 0).await.unwrap();
    let prefill = notifying_prefill_engine(socket.port(), 1, first).await;
    let decode = ScriptedEngine::start(|seen| async move {
        match (seen.path.as_str(), &seen.json()["stream"]) {
            ("/tokenize", _) => json_response(200, r#"{"count":3,"max_model_len":99,"tokens":[1,2,3]}"#),
            (_, Value::Bool(true)) => rest_stream(),
            _ => json_response(200, REST),
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
    let (status, content_type, text, prefill, decode) = run_first_token(FIRST, body, "/v1/completions").await;
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
    let (_, content_type, text, _, decode) = run_first_token(FIRST, body, "/v1/completions").await;
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
    let (_, _, text, prefill, decode) = run_first_token(CHAT_FIRST, body, CHAT).await;
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
    let (_, _, text, _, decode) = run_first_token(CHAT_FIRST, body, CHAT).await;
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
    let (status, _, _, prefill, decode) = run_first_token(CHAT_THOUGHT, body, CHAT).await;
    assert_eq!((status, prefill.len()), (200, 1));
    assert!(decode.iter().any(|seen| seen.raw == body), "the client's own request");
}

#[tokio::test]
async fn a_one_token_answer_needs_no_decode_leg() {
    let body = r#"{"model":"m","prompt":"x","max_tokens":1}"#;
    let (_, _, text, prefill, decode) = run_first_token(FIRST, body, "/v1/completions").await;
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
    let (_, content_type, text, _, decode) = run_first_token(ENDED, body, "/v1/completions").await;
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
    let (status, _, text, _, decode) = run_first_token(HALF_CHARACTER, body, "/v1/completions").await;
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
        let (status, _, text, prefill, decode) = run_first_token(FIRST, &body, "/v1/completions").await;
        assert_eq!((status, text.as_str()), (200, REST));
        assert_eq!(
            (prefill.len(), decode.len(), decode[0].raw.as_str()),
            (0, 1, body.as_str())
        );
    }
    let body = r#"{"messages":[{"role":"user","content":"x"}],"tools":[{"type":"function"}]}"#;
    let (_, _, _, prefill, decode) = run_first_token(FIRST, body, "/v1/chat/completions").await;
    assert_eq!(
        (prefill.len(), decode[0].path.as_str(), decode[0].raw.as_str()),
        (0, CHAT, body)
    );
}
