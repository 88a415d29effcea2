//! `xpyd bench` against other kinds of servers: behind gateways and TLS, with unlisted models, large events, and other stream
//! endings. Checks what the user sees and what the server receives.
#![expect(clippy::unwrap_used, reason = "a failed helper must fail its test")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Output;
use std::sync::{Arc, Mutex};

use rcgen::{CertifiedKey, generate_simple_self_signed};
use serde_json::Value;

use crate::support::TestEnv;

/// Starts a server of the model `m` that answers every completion with these bytes. It runs until the test process ends.
struct Server {
    port: u16,
    /// The headers of all requests, in lower case.
    heads: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(stream: impl Into<String>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (heads, stream) = (Arc::<Mutex<Vec<String>>>::default(), Arc::new(stream.into()));
        let seen = Arc::clone(&heads);
        std::thread::spawn(move || {
            for connection in listener.incoming().map_while(Result::ok) {
                let (seen, stream) = (Arc::clone(&seen), Arc::clone(&stream));
                // A client that disconnected gets no response.
                std::thread::spawn(move || serve(&connection, &seen, &stream).ok());
            }
        });
        Self { port, heads }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The headers of the requests with this method.
    fn request_headers(&self, method: &str) -> Vec<String> {
        let heads = self.heads.lock().unwrap();
        let heads = heads.iter().filter(|head| head.starts_with(&method.to_lowercase()));
        heads.cloned().collect()
    }
}

fn serve(connection: &TcpStream, seen: &Mutex<Vec<String>>, stream: &str) -> std::io::Result<()> {
    let mut reader = BufReader::new(connection.try_clone()?);
    let (mut head, mut length) = (String::new(), 0);
    for line in reader.by_ref().lines() {
        let line = line?.to_lowercase();
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
        if line.is_empty() {
            break;
        }
        head.push_str(&line);
        head.push('\n');
    }
    reader.read_exact(&mut vec![0; length])?;
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    seen.lock().unwrap().push(head);
    let (status, kind, body) = match path.as_str() {
        "/v1/models" => ("200 OK", "application/json", r#"{"data": [{"id": "m"}]}"#),
        "/v1/completions" | "/v1/chat/completions" => ("200 OK", "text/event-stream", stream),
        _ => ("404 Not Found", "text/plain", ""),
    };
    let length = body.len();
    let mut connection = connection;
    write!(
        connection,
        "HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )
}

/// Sends four small requests with `--json --save-detailed`.
fn bench(env: &TestEnv, url: &str, more: &[&str]) -> Output {
    let fixed = [
        "bench",
        "--base-url",
        url,
        "--num-prompts",
        "4",
        "--random-input-len",
        "8",
        "--json",
    ];
    env.run(&[&fixed[..], &["--save-detailed"], more].concat())
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn result(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", stderr(output)))
}

const TOKEN: &str = "data: {\"choices\":[{\"text\":\"a\",\"finish_reason\":null}]}\n\n";
const END: &str = "data: {\"choices\":[{\"text\":\"b\",\"finish_reason\":\"stop\"}]}\n\n";
const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":8,\"completion_tokens\":2}}\n\n";
const DONE: &str = "data: [DONE]\n\n";

#[test]
fn every_request_has_the_given_headers_and_url_credentials() {
    let (env, server) = (TestEnv::new(), Server::start([TOKEN, END, USAGE, DONE].concat()));
    let given = [
        "--header",
        "Host=model.example.com",
        "Content-Type=application/json; charset=utf-8",
        "X-Team=a",
    ];
    let output = bench(&env, &server.url().replace("//", "//user:p%40ss@"), &given);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let (asked, measured) = (server.request_headers("GET"), server.request_headers("POST"));
    assert!(!asked.is_empty());
    assert_eq!(measured.len(), 4);
    for head in asked.iter().chain(&measured) {
        for line in [
            "\nhost: model.example.com\n",
            "\nauthorization: basic dxnlcjpwqhnz\n",
            "\nx-team: a\n",
            "\ncontent-type: application/json; charset=utf-8\n",
        ] {
            assert_eq!(head.matches(line).count(), 1, "{line} in {head}");
        }
        assert_eq!(
            (head.matches("host:").count(), head.matches("content-type:").count()),
            (1, 1),
            "{head}"
        );
    }
    let printed = stderr(&output) + &String::from_utf8_lossy(&output.stdout);
    assert!(!printed.contains("p%40ss") && !printed.contains("p@ss"), "{printed}");
}

#[test]
fn a_header_wins_over_url_user_and_environment_key() {
    let (env, server) = (TestEnv::new(), Server::start([TOKEN, END, USAGE, DONE].concat()));
    let url = server.url().replace("//", "//user:pass@");
    let authorizations = |server: &Server| -> Vec<String> {
        let heads = std::mem::take(&mut *server.heads.lock().unwrap());
        let lines = heads
            .iter()
            .flat_map(|head| head.lines().filter(|line| line.starts_with("authorization")));
        let mut lines: Vec<String> = lines.map(str::to_owned).collect();
        lines.dedup();
        lines
    };
    let mut command = env.command(&[
        "bench",
        "--base-url",
        &url,
        "--num-prompts",
        "2",
        "--random-input-len",
        "8",
    ]);
    assert!(command.env("OPENAI_API_KEY", "sk-1").output().unwrap().status.success());
    assert_eq!(authorizations(&server), ["authorization: basic dxnlcjpwyxnz"]);
    bench(&env, &url, &["--header", "Authorization=Bearer mine"]);
    assert_eq!(authorizations(&server), ["authorization: bearer mine"]);
}

#[test]
fn an_unlisted_model_is_requested_with_a_warning() {
    let (env, server) = (TestEnv::new(), Server::start([TOKEN, END, USAGE, DONE].concat()));
    for flags in [["--model", "sql-lora"], ["--served-model-name", "alias"]] {
        let output = bench(&env, &server.url(), &flags);
        let printed = stderr(&output);
        assert_eq!(output.status.code(), Some(0), "{printed}");
        assert_eq!(result(&output)["completed"], 4);
        let warning = format!("warning: the server does not serve the model `{}`", flags[1]);
        assert!(
            printed.contains(&warning) && printed.contains("hint: the server has `m`"),
            "{printed}"
        );
    }
    let swept = bench(&env, &server.url(), &["--model", "sql-lora", "--sweep", "rate=100"]);
    assert!(
        stderr(&swept).contains("warning: the server does not serve"),
        "{}",
        stderr(&swept)
    );
}

#[test]
fn large_events_are_read_up_to_the_clients_limit() {
    let env = TestEnv::new();
    let event = |bytes: usize| {
        format!(
            "data: {{\"choices\":[{{\"text\":\"a\",\"x\":\"{}\"}}]}}\n\n",
            "x".repeat(bytes)
        )
    };
    let server = Server::start([&event(3 << 20), END, USAGE, DONE].concat());
    let output = bench(&env, &server.url(), &[]);
    assert_eq!(result(&output)["completed"], 4, "{}", stderr(&output));
    let server = Server::start([&event(65 << 20), END, DONE].concat());
    let output = bench(&env, &server.url(), &["--num-prompts", "1"]);
    let printed = stderr(&output);
    assert!(
        printed.contains("an event of the stream exceeds the limit of 64 MiB"),
        "{printed}"
    );
    assert!(!printed.contains("is a completions route"), "{printed}");
}

#[test]
fn responses_aborted_by_the_server_are_failures() {
    let env = TestEnv::new();
    let end = |reason: &str| format!("data: {{\"choices\":[{{\"text\":\"\",\"finish_reason\":\"{reason}\"}}]}}\n\n");
    for (stream, cause) in [
        (
            [TOKEN, &end("abort"), DONE].concat(),
            "the server ended the answer with `finish_reason` `abort`",
        ),
        (
            [TOKEN, &end("error"), USAGE, DONE].concat(),
            "the server ended the answer with `finish_reason` `error`",
        ),
        (
            [TOKEN, "event: error\ndata: {\"message\":\"out of memory\"}\n\n"].concat(),
            "the server failed during the stream: out of memory",
        ),
    ] {
        let server = Server::start(stream);
        let output = bench(&env, &server.url(), &[]);
        assert_eq!(output.status.code(), Some(1));
        let result = result(&output);
        assert_eq!((&result["completed"], &result["failed"]), (&0.into(), &4.into()));
        assert!(
            stderr(&output).contains(&format!("4 of 4 requests failed: {cause}")),
            "{}",
            stderr(&output)
        );
    }
}

#[test]
fn a_finish_reason_replaces_the_done_marker() {
    let env = TestEnv::new();
    let server = Server::start([TOKEN, END, USAGE].concat());
    let output = bench(&env, &server.url(), &[]);
    assert_eq!(result(&output)["completed"], 4, "{}", stderr(&output));
    let server = Server::start(TOKEN);
    let output = bench(&env, &server.url(), &[]);
    let printed = stderr(&output);
    assert!(
        printed.contains("the stream ended early, without `[DONE]`")
            && printed.contains("hint: the server closed connections before"),
        "{printed}"
    );
}

#[test]
fn tokens_are_counted_from_text_without_server_usage() {
    let env = TestEnv::new();
    let chunk = |text: &str| format!("data: {{\"choices\":[{{\"text\":\"{text}\"}}]}}\n\n");
    let server = Server::start([&chunk("a b c d e f"), &chunk(" g h"), DONE].concat());
    let output = bench(&env, &server.url(), &[]);
    assert_eq!(result(&output)["total_output_tokens"], 8, "a token a chunk");
    let note = "note: the server reported no usage for 4 answers, and there is no tokenizer";
    assert!(stderr(&output).contains(note), "{}", stderr(&output));
    // A tokenizer of this repository in which every word is one token.
    let tokenizer = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/bench/tokenizers/metaspace");
    for detail in [&["--save-detailed"][..], &[]] {
        let fixed = [
            "bench",
            "--json",
            "--num-prompts",
            "4",
            "--random-input-len",
            "8",
            "--tokenizer",
            tokenizer,
        ];
        let output = env.run(&[&fixed[..], &["--base-url", &server.url()], detail].concat());
        let result = result(&output);
        let tokens = result["total_output_tokens"].as_u64().unwrap();
        assert!(tokens >= 32, "{tokens} tokens of 32 words: {}", stderr(&output));
        assert!(
            result["xpyd"]["notes"]
                .to_string()
                .contains("the server reported no usage for 4 answers"),
            "{result}"
        );
        assert!(
            stderr(&output).contains("the tokenizer counted their tokens"),
            "{}",
            stderr(&output)
        );
    }
}

#[test]
fn non_generation_endpoints_are_refused() {
    let (env, server) = (TestEnv::new(), Server::start([TOKEN, END, DONE].concat()));
    for (flags, expected) in [
        (
            &["--backend", "openai-embeddings"][..],
            "xpyd measures text generation only; use one of `openai`, `vllm`, `openai-chat`",
        ),
        (
            &["--backend", "tgi"],
            "the backends are `openai`, `vllm`, `openai-chat`",
        ),
        (&["--header", "Content-Length=3"], "xpyd sets `content-length` itself"),
    ] {
        let output = bench(&env, &server.url(), flags);
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains(expected), "{}", stderr(&output));
    }
    assert!(server.request_headers("POST").is_empty());
}

#[test]
fn files_written_by_python_tools_are_read() {
    let (env, server) = (TestEnv::new(), Server::start([TOKEN, END, USAGE, DONE].concat()));
    let text = "\u{feff}{\"prompt\":\"a\",\"score\":NaN,\"most\":-Infinity}\n{\"prompt\":\"a \\ud83d b\"}\n";
    std::fs::write(env.path().join("odd.jsonl"), text).unwrap();
    let flags = [
        "--dataset-name",
        "custom",
        "--dataset-path",
        "odd.jsonl",
        "--num-prompts",
        "2",
    ];
    let output = bench(&env, &server.url(), &flags);
    assert_eq!(result(&output)["completed"], 2, "{}", stderr(&output));
    std::fs::write(env.path().join("null.jsonl"), "{\"prompt\":null}\n").unwrap();
    let flags = [
        "--dataset-name",
        "custom",
        "--dataset-path",
        "null.jsonl",
        "--num-prompts",
        "2",
    ];
    let output = bench(&env, &server.url(), &flags);
    assert!(
        stderr(&output).contains("null.jsonl, line 1: the field `prompt` is null"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_tls_server_needs_a_trusted_certificate() {
    let env = TestEnv::new();
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(env.path().join("cert.pem"), cert.pem()).unwrap();
    std::fs::write(env.path().join("key.pem"), signing_key.serialize_pem()).unwrap();
    let mut run = env.up(&["--profile", "1p1d", "--tls-cert", "cert.pem", "--tls-key", "key.pem"]);
    run.wait_until_ready();
    let url = format!("https://localhost:{}", env.proxy_port());
    let fixed = [
        "bench",
        "--json",
        "--num-prompts",
        "4",
        "--random-input-len",
        "8",
        "--base-url",
        &url,
    ];

    let stranger = env.run(&fixed);
    let printed = stderr(&stranger);
    assert_eq!(stranger.status.code(), Some(2), "{printed}");
    assert!(
        printed.contains("certificate")
            && printed.contains("hint: set `SSL_CERT_FILE=ca.pem` to trust its certificate, or `--insecure`"),
        "{printed}"
    );
    let trusting = env.command(&fixed).env("SSL_CERT_FILE", "cert.pem").output().unwrap();
    assert_eq!(result(&trusting)["completed"], 4, "{}", stderr(&trusting));
    let careless = env.run(&[&fixed[..], &["--insecure"]].concat());
    let careless = result(&careless);
    assert_eq!(careless["completed"], 4);
    // The stage times and the engines' counters are read over TLS, too.
    assert_eq!(careless["xpyd"]["where"]["remote_kv"]["answered"], 4, "{careless}");

    let plain = env.run(&[
        "bench",
        "--base-url",
        &url.replace("https", "http"),
        "--num-prompts",
        "1",
    ]);
    assert_eq!(plain.status.code(), Some(2), "{}", stderr(&plain));
}
