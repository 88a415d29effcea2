//! Datasets and tokenizers of `xpyd bench`: the requests it sends, and its errors for bad input.
#![expect(clippy::unwrap_used, reason = "a failed helper must fail its test")]

use std::net::SocketAddr;
use std::path::Path;
use std::process::Output;
use std::sync::{Arc, Mutex};

use axum::extract::State;
use axum::http::{HeaderMap, Uri};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use crate::support::TestEnv;

/// The request bodies, in order of arrival.
type RecordedRequests = Arc<Mutex<Vec<(HeaderMap, Value)>>>;

/// A server of the model `tiny` that answers every prompt with ` yes` and records its requests.
struct Server {
    address: SocketAddr,
    seen: RecordedRequests,
    /// Ends the server when dropped.
    _runtime: Runtime,
}

impl Server {
    fn start() -> Self {
        let seen = RecordedRequests::default();
        let app = Router::new()
            .route(
                "/v1/models",
                get(async || Json(json!({"data": [{"id": "tiny", "root": "nobody/tiny"}]}))),
            )
            .route("/v1/completions", post(complete))
            .route("/v1/chat/completions", post(complete))
            .with_state(Arc::clone(&seen));
        let runtime = Runtime::new().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self {
            address,
            seen,
            _runtime: runtime,
        }
    }

    fn bodies(&self) -> Vec<Value> {
        let seen = self.seen.lock().unwrap();
        seen.iter().map(|(_, body)| body.clone()).collect()
    }
}

async fn complete(
    State(seen): State<RecordedRequests>,
    uri: Uri,
    headers: HeaderMap,
    Json(body): Json<Value>,
) -> impl IntoResponse {
    seen.lock().unwrap().push((headers, body));
    let choice = if uri.path().contains("chat") {
        json!({"delta": {"content": " yes"}})
    } else {
        json!({"text": " yes"})
    };
    let usage = json!({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}});
    format!(
        "data: {}\n\ndata: {usage}\n\ndata: [DONE]\n\n",
        json!({"choices": [choice]})
    )
}

/// `xpyd bench` in an empty folder, with no model in any cache.
fn bench(env: &TestEnv, more: &[&str]) -> Output {
    let mut command = env.command(&["bench"]);
    command.args(more).env("HF_HOME", env.path()).env_remove("HF_HUB_CACHE");
    command.output().unwrap()
}

fn tokenizer(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bench/tokenizers");
    folder.join(name).to_str().unwrap().to_owned()
}

fn output_text(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Runs a command that must fail, and checks that its error contains this text.
fn assert_refused(env: &TestEnv, line: &str, expected: &str) {
    let output_text = refusal(env, line);
    assert!(output_text.contains(expected), "{line}: {output_text}");
}

/// Runs a command that must fail before the first request, and returns its error, which is about the data and not a panic.
fn refusal(env: &TestEnv, line: &str) -> String {
    let server = Server::start();
    let base_url = format!("http://{}", server.address);
    let mut words = vec!["--base-url", &base_url];
    words.extend(line.split(' '));
    let output = bench(env, &words);
    let output_text = output_text(&output);
    assert_eq!(output.status.code(), Some(2), "{line}: {output_text}");
    assert!(server.bodies().is_empty(), "{line}: something was sent");
    output_text
}

#[test]
fn prompts_fall_back_to_token_ids_without_a_tokenizer() {
    let (env, server) = (TestEnv::new(), Server::start());
    let base_url = format!("http://{}", server.address);
    let few = [
        "--base-url",
        &base_url,
        "--num-prompts",
        "2",
        "--random-input-len",
        "8",
        "--random-output-len",
        "3",
    ];
    let output = bench(&env, &few);
    assert_eq!(output.status.code(), Some(0), "{}", output_text(&output));
    let reason = output_text(&output);
    assert!(
        reason.contains("prompts are token ids, not text: no tokenizer `nobody/tiny`"),
        "{reason}"
    );
    let output = bench(&env, &[&few[..], &["--tokenizer", &tokenizer("within")]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", output_text(&output));
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(
        printed.contains("WARNING: /tokenize unavailable (404 Not Found: either this server has no /tokenize route"),
        "{printed}"
    );
    let bodies = server.bodies();
    assert!(bodies[0]["prompt"].is_array() && bodies[1]["prompt"].is_array());
    assert!(bodies[2]["prompt"].is_string() && bodies[3]["prompt"].is_string());
    assert_eq!(bodies[3]["ignore_eos"], true);
    let snapshot = env.path().join("hub/models--nobody--tiny/snapshots/abc");
    std::fs::create_dir_all(&snapshot).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(Path::new(&tokenizer("within")).join(name), snapshot.join(name)).unwrap();
    }
    let output = bench(&env, &few);
    assert_eq!(output.status.code(), Some(0), "{}", output_text(&output));
    let sorted = |bodies: &[Value]| {
        let mut texts: Vec<String> = bodies.iter().map(|body| body["prompt"].to_string()).collect();
        texts.sort();
        texts
    };
    let bodies = server.bodies();
    assert_eq!(
        sorted(&bodies[4..6]),
        sorted(&bodies[2..4]),
        "the model's own tokenizer, from the cache"
    );
}

#[test]
fn a_custom_dataset_uses_the_chat_template_without_ignore_eos() {
    let (env, server) = (TestEnv::new(), Server::start());
    std::fs::write(
        env.path().join("a.jsonl"),
        "{\"prompt\": \"hi\", \"output_tokens\": 4}\n\n",
    )
    .unwrap();
    let base_url = format!("http://{}", server.address);
    let line = [
        "--base-url",
        &base_url,
        "--dataset-name",
        "custom",
        "--dataset-path",
        "a.jsonl",
        "--num-prompts",
        "2",
    ];
    let output = bench(
        &env,
        &[
            &line[..],
            &["--custom-output-len", "-1", "--tokenizer", &tokenizer("within")],
        ]
        .concat(),
    );
    assert_eq!(output.status.code(), Some(0), "{}", output_text(&output));
    let bodies = server.bodies();
    assert_eq!(bodies.len(), 2, "one line is used twice");
    assert_eq!(
        bodies[0]["prompt"],
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(
        (&bodies[0]["max_tokens"], bodies[0].get("ignore_eos")),
        (&json!(4), None)
    );
    let output = bench(
        &env,
        &[&line[..], &["--no-oversample", "--skip-tokenizer-init"]].concat(),
    );
    assert_eq!(output.status.code(), Some(0), "{}", output_text(&output));
    assert_eq!(
        server.bodies()[2..],
        [json!({
            "model": "tiny", "prompt": "hi", "repetition_penalty": 1.0, "max_tokens": 256, "logprobs": null, "stream": true,
            "stream_options": {"include_usage": true},
        })]
    );
}

#[test]
fn each_session_turn_follows_and_contains_the_last_answer() {
    let (env, server) = (TestEnv::new(), Server::start());
    let base_url = format!("http://{}", server.address);
    let line = "--backend openai-chat --dataset-name sessions --sessions 3 --turns 3 --random-input-len 4 --turn-input-len 2 \
                --random-output-len 1 --think-time 1ms --session-header x-talk --json";
    let mut words = vec!["--base-url", &base_url];
    words.extend(line.split_whitespace());
    let output = bench(&env, &words);
    assert_eq!(output.status.code(), Some(0), "{}", output_text(&output));
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    let turns = result["xpyd"]["turns"].as_array().unwrap();
    let completed: Vec<&Value> = turns.iter().map(|turn| &turn["completed"]).collect();
    assert_eq!(completed, [3, 3, 3]);
    let seen = server.seen.lock().unwrap();
    assert_eq!(seen.len(), 9);
    for session in 0..3 {
        let name = format!("bench-0-{session}");
        let of_session = seen.iter().filter(|(headers, _)| headers["x-talk"] == *name);
        let messages: Vec<&Vec<Value>> = of_session
            .map(|(_, body)| body["messages"].as_array().unwrap())
            .collect();
        let lengths: Vec<usize> = messages.iter().map(|messages| messages.len()).collect();
        assert_eq!(lengths, [1, 3, 5], "earlier turns come first");
        assert_eq!(messages[2][1], json!({"role": "assistant", "content": " yes"}));
        assert_eq!(messages[2][..3], messages[1][..]);
    }
}

#[test]
fn a_bad_jsonl_dataset_is_reported_by_line_and_field() {
    let env = TestEnv::new();
    let write = |name: &str, text: &str| std::fs::write(env.path().join(name), text).unwrap();
    let own = tokenizer("within");
    let check = |line: &str, expected: &str| assert_refused(&env, line, expected);
    write(
        "broken.jsonl",
        "{\"prompt\": \"a\", \"output_tokens\": 1}\n{\"prompt\": \"b\"\n",
    );
    let custom = format!("--tokenizer {own} --dataset-name custom --custom-output-len -1 --dataset-path");
    check(
        &format!("{custom} broken.jsonl"),
        "broken.jsonl, line 2: not JSON: EOF while parsing",
    );
    write("field.jsonl", "{\"prompt\": \"a\", \"tokens\": 1}\n");
    check(
        &format!("{custom} field.jsonl"),
        "field.jsonl, line 1: no field `output_tokens` among `prompt`, `tokens`; `--custom-output-len` names another field",
    );
    write("text.jsonl", "{\"prompt\": [1], \"output_tokens\": 1}\n");
    check(
        &format!("{custom} text.jsonl"),
        "text.jsonl, line 1: the field `prompt` is [1], not a text",
    );
    write("empty.jsonl", "\n");
    check(
        &format!("{custom} empty.jsonl"),
        "empty.jsonl has no usable request: the file has no entries",
    );
    check(
        &format!("{custom} gone.jsonl"),
        "cannot read the dataset gone.jsonl: no such file",
    );
    check(
        "--dataset-name custom",
        "the dataset `custom` needs a file: set `--dataset-path`",
    );
    check(
        "--dataset-name random --dataset-path a.jsonl",
        "`random` reads no file, but `--dataset-path` is `a.jsonl`",
    );
    check(
        "--dataset-name random --num-prompts 0",
        "the number of prompts must be at least 1",
    );
    let bare = format!(
        "--tokenizer {} --dataset-name custom --dataset-path field.jsonl",
        tokenizer("metaspace")
    );
    check(&bare, "the chat template of the tokenizer");
    check(&bare, "hint: set `--skip-chat-template` to send the prompts unchanged");
}

#[test]
fn bad_csv_and_json_datasets_are_reported_by_position() {
    let env = TestEnv::new();
    let write = |name: &str, text: &str| std::fs::write(env.path().join(name), text).unwrap();
    let own = tokenizer("within");
    let check = |line: &str, expected: &str| assert_refused(&env, line, expected);
    write("list.json", "{}");
    let sharegpt = format!("--tokenizer {own} --dataset-name sharegpt --dataset-path");
    check(
        &format!("{sharegpt} list.json"),
        "list.json: not a JSON list of conversations",
    );
    write("short.json", r#"[{"conversations": [{"value": "a"}]}]"#);
    check(
        &format!("{sharegpt} short.json"),
        "short.json has no usable request: no conversation has two turns",
    );
    write("value.json", r#"[{"conversations": [{"value": "a"}, {"text": "b"}]}]"#);
    check(
        &format!("{sharegpt} value.json"),
        "value.json, entry 1: turn 2 has no text `value`",
    );

    write("a.csv", "Model,Request tokens\nGPT-4,3\n");
    let burstgpt = format!("--tokenizer {own} --dataset-name burstgpt --dataset-path");
    check(
        &format!("{burstgpt} a.csv"),
        "a.csv, line 1: no column `Response tokens`",
    );
    write(
        "b.csv",
        "Timestamp,Model,Request tokens,Response tokens\n1,GPT-4,many,3\n",
    );
    check(
        &format!("{burstgpt} b.csv"),
        "b.csv, line 2: the column `Request tokens` has `many`, not a number of tokens",
    );

    write(
        "t.jsonl",
        r#"{"timestamp": 1, "input_length": 3, "output_length": 2, "ids": [1]}"#,
    );
    let trace = format!("--tokenizer {own} --dataset-name timed_trace --dataset-path");
    check(&format!("{trace} t.jsonl"), "t.jsonl, line 1: no field `hash_ids`");
    check(
        &format!("{trace} t.jsonl --backend openai-chat"),
        "`timed_trace` has prompts of token ids",
    );
    check("--self-timed", "need `--dataset-name timed_trace`");
    write("s.jsonl", r#"{"messages": [{"role": "tool", "content": "x"}]}"#);
    check(
        "--dataset-name sessions --dataset-path s.jsonl",
        "s.jsonl, line 1: message 1 has the unknown role `tool`",
    );
}

#[test]
fn a_missing_tokenizer_is_reported_with_the_fix() {
    let env = TestEnv::new();
    let output_text = refusal(&env, "--tokenizer some/model");
    assert!(
        output_text.contains("no tokenizer `some/model`: no such file or folder, and no"),
        "{output_text}"
    );
    assert!(output_text.contains("hint: `hf download some/model"), "{output_text}");
    let output_text = refusal(&env, "--tokenizer /nowhere/at/all");
    assert!(output_text.contains("no tokenizer `/nowhere/at/all`"), "{output_text}");
    std::fs::create_dir(env.path().join("odd")).unwrap();
    std::fs::write(env.path().join("odd/tokenizer.json"), "{}").unwrap();
    let output_text = refusal(&env, "--tokenizer ./odd");
    assert!(
        output_text.contains("cannot read the tokenizer's file ./odd/tokenizer.json"),
        "{output_text}"
    );
    let output_text = refusal(&env, "--dataset-name prefix_repetition");
    assert!(
        output_text.contains("the dataset `prefix_repetition` needs a tokenizer: no tokenizer `nobody/tiny`"),
        "{output_text}"
    );
    assert!(output_text.contains("hint: `hf download nobody/tiny"), "{output_text}");
}
