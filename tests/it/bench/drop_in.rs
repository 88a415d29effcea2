//! Command lines for `vllm bench serve`, run unchanged by xpyd: output, saved file, and exit code.
//!
//! The real client ran with the same flags. `tests/fixtures/bench/captures` holds what it printed and saved.

use std::path::Path;
use std::process::Output;

use serde_json::Value;

use super::fake_server::{Behaviour, Server};
use crate::support::TestEnv;

/// Runs `xpyd bench` with the server's port and these flags.
fn bench(server: &Server, env: &TestEnv, words: &[&str], flags: &str) -> Output {
    let port = server.address.port().to_string();
    let mut line: Vec<&str> = words.to_vec();
    line.extend(["--port", &port]);
    line.extend(flags.split_whitespace());
    // The server runs on this runtime, so the call must not block it.
    tokio::task::block_in_place(|| env.run(&line))
}

fn capture(name: &str, extension: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bench/captures");
    std::fs::read_to_string(folder.join(format!("{name}.{extension}"))).expect("a capture")
}

/// The texts of standard output and standard error.
fn text(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// A line without measured values: the label of a table row, or the whole line.
fn without_values(line: &str) -> &str {
    let is_row = line.len() >= 51 && line.as_bytes()[40] == b' ' && !line.starts_with(['=', '-']);
    if is_row { &line[..40] } else { line }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vllm_command_line_gives_vllms_output_and_file() {
    for name in [
        "plain",
        "brief",
        "preparation",
        "first_model",
        "chat",
        "queue",
        "exponential_ramp",
        "probe",
        "one_token",
    ] {
        let server = Server::start(|_| Behaviour::Answer).await;
        let env = TestEnv::new();
        let flags = capture(name, "flags");
        let (line, file_name) = flags.trim().split_once('\n').unwrap();
        let line = line.replace("--tokenizer tiny-llama", "");
        let output = bench(
            &server,
            &env,
            &["bench", "serve"],
            &format!("{line} --result-dir saved"),
        );
        let (stdout, stderr) = text(&output);
        assert!(output.status.success(), "{name}: {stderr}");

        let theirs = capture(name, "txt").replace(
            "First model name: tiny, first model id: tiny-llama",
            "First model name: tiny, first model id: /models/tiny",
        );
        // xpyd needs a tokenizer for these prompts, and draws no plots.
        let is_ours = |line: &&str| !line.starts_with("WARNING: /tokenize") && !line.starts_with("tip: ");
        let theirs: Vec<&str> = theirs.lines().filter(is_ours).map(without_values).collect();
        let ours: Vec<&str> = stdout.lines().map(without_values).collect();
        assert_eq!(ours, theirs, "{name}");

        let saved: Vec<_> = std::fs::read_dir(env.path().join("saved")).unwrap().collect();
        let [Ok(saved)] = &saved[..] else { panic!("{saved:?}") };
        let masked = |name: &str| {
            name.chars()
                .map(|c| if c.is_ascii_digit() { '0' } else { c })
                .collect::<String>()
        };
        let own_name = saved.file_name().into_string().unwrap();
        assert_eq!(
            masked(&own_name),
            masked(file_name).replace("tiny-llama", "tiny"),
            "{name}"
        );
        let keys = |text: &str| {
            let value: Value = serde_json::from_str(&text.replace("Infinity", "0")).unwrap();
            value.as_object().unwrap().keys().cloned().collect::<Vec<_>>()
        };
        let mut expected = keys(&capture(name, "json"));
        expected.push("xpyd".to_owned());
        assert_eq!(
            keys(&std::fs::read_to_string(saved.path()).unwrap()),
            expected,
            "{name}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_set_the_exit_code_except_in_vllm_mode() {
    let server = Server::start(|index| {
        if index % 4 == 1 {
            Behaviour::Fail
        } else {
            Behaviour::Answer
        }
    })
    .await;
    let env = TestEnv::new();
    let flags = "--num-prompts 8 --max-concurrency 1 --random-input-len 8 --random-output-len 2";
    for (words, code) in [
        (&["bench"][..], 1),
        (&["bench", "serve"], 0),
        (&["bench", "--allow-failures"], 0),
    ] {
        let output = bench(&server, &env, words, flags);
        let (stdout, stderr) = text(&output);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {stderr}");
        let failures: Vec<&str> = stdout
            .lines()
            .skip_while(|line| !line.starts_with("Failed requests during"))
            .take(4)
            .collect();
        assert_eq!(
            failures,
            [
                "Failed requests during benchmark run detected (capping to 10):",
                "Error 0: HTTP 500 Internal Server Error: out of luck",
                "Error 1: HTTP 500 Internal Server Error: out of luck",
                "============ Serving Benchmark Result ============",
            ]
        );
    }
    let output = bench(&server, &env, &["bench", "serve", "--json"], flags);
    let (stdout, stderr) = text(&output);
    let result: Value = serde_json::from_str(&stdout).expect("JSON alone");
    assert_eq!(result["failed"], 2);
    assert!(stderr.contains("2 of 8 requests failed: HTTP 500"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn append_result_adds_one_line() {
    let server = Server::start(|_| Behaviour::Answer).await;
    let env = TestEnv::new();
    let flags =
        "--num-prompts 1 --random-input-len 8 --random-output-len 2 --append-result --result-filename all.jsonl";
    for _ in 0..2 {
        let output = bench(&server, &env, &["bench"], flags);
        assert!(output.status.success(), "{}", text(&output).1);
    }
    let file = std::fs::read_to_string(env.path().join("all.jsonl")).unwrap();
    let lines: Vec<Value> = file
        .split('\n')
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2);
    assert!(lines.iter().all(|line| line["completed"] == 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn impossible_requests_are_one_clear_error() {
    let server = Server::start(|_| Behaviour::Answer).await;
    let env = TestEnv::new();
    for (flags, expected) in [
        (
            "--backend openai-audio",
            "text generation only; use one of `openai`, `vllm`, `openai-chat`",
        ),
        ("--base-url ftp://h:1", "is not a URL of the form `http://host:port`"),
        (
            "--request-rate 1 --ramp-up-strategy linear --ramp-up-start-rps 1 --ramp-up-end-rps 2",
            "`--request-rate` and `--ramp-up-strategy` exclude each other",
        ),
    ] {
        let output = bench(&server, &env, &["bench", "serve"], flags);
        let (_, stderr) = text(&output);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains(expected), "{stderr}");
    }
    assert!(server.seen.lock().unwrap().is_empty());
}
