//! Every cell of docs/matrix.md: the response of the fleet equals that of one engine, for each kind of hand-off.
//!
//! Only ids and times differ. The engines report cached tokens, so KV from another engine would be visible.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::{MODEL, Run, TestEnv, Unsupervised, engine, get, post, wait_for};

const COMPLETIONS: &str = "/v1/completions";

/// Which engines handle a request.
#[derive(Debug, Clone, Copy, PartialEq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
enum Fate {
    /// Prefill on one engine, and decode on another.
    Handed,
    /// A decode engine alone.
    Alone,
    /// An engine refuses it.
    Refused,
}

/// The kind of hand-off.
#[derive(Debug, Clone, Copy, PartialEq)]
enum HandoffKind {
    Nixl,
    Decoder,
    Prefiller,
}

impl HandoffKind {
    fn settings(self) -> &'static [&'static str] {
        match self {
            Self::Nixl => &["--connector", "nixl"],
            Self::Decoder => &["--connector", "lmcache"],
            Self::Prefiller => &["--connector", "lmcache", "--set", "lmcache.first_token=prefiller"],
        }
    }
}

/// A single engine without a connector.
struct SingleEngine {
    _process: Unsupervised,
    port: u16,
}

impl SingleEngine {
    fn start(env: &TestEnv) -> Self {
        let arguments = [
            "sim",
            MODEL,
            "--port",
            "0",
            "--enable-prompt-tokens-details",
            "--max-model-len",
            "16384",
        ];
        let mut process = Unsupervised::start(env.command(&arguments).stderr(Stdio::piped()));
        let mut log = BufReader::new(process.stderr());
        let mut line = String::new();
        let address = loop {
            line.clear();
            assert!(log.read_line(&mut line).unwrap() > 0, "the engine ended");
            if let Some((_, address)) = line.trim_end().split_once("Starting vLLM server on http://") {
                break address.to_owned();
            }
        };
        // The engine must not block when the reader stops.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        let port: u16 = address.rsplit_once(':').unwrap().1.parse().unwrap();
        wait_for("the engine", || {
            let health = std::net::TcpStream::connect(("127.0.0.1", port));
            health.map(drop).map_err(|error| error.to_string())
        });
        Self {
            _process: process,
            port,
        }
    }
}

/// The text without ids and times, which differ between any two responses.
fn normalised(text: &str) -> String {
    let ids = regex::Regex::new(r"\b(cmpl|chatcmpl|resp|msg)[-_][0-9a-f]{32}").unwrap();
    let times = regex::Regex::new(r#""(created|created_at)":\d+"#).unwrap();
    let text = ids.replace_all(text, "$1-ID");
    times.replace_all(&text, r#""$1":0"#).into_owned()
}

/// The number of requests of each fate that the proxy has counted.
fn counts(port: u16) -> [u64; 3] {
    let text = get(port, "/metrics");
    let of = |outcomes: &[&str]| {
        let sample = |outcome: &&str| {
            let beginning = format!("xpyd_handoff_total{{outcome=\"{outcome}\"}} ");
            let value = text.lines().find_map(|line| line.strip_prefix(&beginning));
            value.map_or(0, |value| value.parse::<u64>().unwrap())
        };
        outcomes.iter().map(sample).sum()
    };
    [
        of(&["transferred", "sent"]),
        of(&["bypassed"]),
        of(&["refused", "failed", "recomputed"]),
    ]
}

/// A request as additions to the plainest one, and its fates if the decode engine or the prefill engine makes the first token.
/// The value `"-"` removes a field, and `{"of": x, "times": n}` repeats `x` n times.
#[derive(serde::Deserialize)]
struct Cell(String, serde_json::Map<String, Value>, Fate, Fate);

/// The cells, which `tests/real/matrix.py` uses as well.
const CELLS: &str = include_str!("../../../fixtures/cells.json");

/// The request body of a cell.
fn body(path: &str, cell: &serde_json::Map<String, Value>, mode: &Value) -> String {
    let mut body = json!({"model": MODEL, "max_tokens": 17, "temperature": 0});
    if path == COMPLETIONS {
        body["prompt"] = json!("Once upon a time there was a ship");
    } else {
        body["messages"] = json!([{"role": "user", "content": "Tell me a story"}]);
    }
    let fields = body.as_object_mut().unwrap();
    // The fields of the cell win over those of the response mode.
    for (key, value) in mode.as_object().unwrap().iter().chain(cell) {
        fields.insert(key.clone(), repeated(value));
    }
    fields.retain(|_, value| value != "-");
    body.to_string()
}

fn repeated(value: &Value) -> Value {
    let Some(times) = value["times"].as_u64().and_then(|times| usize::try_from(times).ok()) else {
        return value.clone();
    };
    match &value["of"] {
        Value::String(text) => json!(text.repeat(times)),
        list => {
            let list = list.as_array().unwrap();
            list.iter().cycle().take(list.len() * times).cloned().collect()
        }
    }
}

/// How responses are requested: whole or streamed, with or without usage.
fn response_modes() -> [Value; 4] {
    [
        json!({}),
        json!({"stream": true}),
        json!({"stream": true, "stream_options": {"include_usage": true}}),
        json!({"stream": true, "stream_options": {"include_usage": true, "continuous_usage_stats": true}}),
    ]
}

fn up(env: &TestEnv, kind: HandoffKind) -> Run<'_> {
    let mut arguments = vec!["--profile", "1p1d", "--set", "force_connector=true"];
    for setting in [
        r#"prefill.args=["--enable-prompt-tokens-details"]"#,
        r#"decode.args=["--enable-prompt-tokens-details"]"#,
        "sim.max_model_len=16384",
    ] {
        arguments.extend(["--set", setting]);
    }
    arguments.extend(kind.settings());
    env.up(&arguments)
}

fn check(kind: HandoffKind) {
    let env = TestEnv::new();
    let mut fleet = up(&env, kind);
    let alone = SingleEngine::start(&env);
    fleet.wait_until_ready();
    let port = env.proxy_port();
    let mut wrong = Vec::new();
    let matrix: BTreeMap<String, Vec<Cell>> = serde_json::from_str(CELLS).unwrap();
    for (path, cells) in &matrix {
        for Cell(name, cell, by_decoder, by_prefiller) in cells {
            let declared = *if kind == HandoffKind::Prefiller {
                by_prefiller
            } else {
                by_decoder
            };
            for mode in &response_modes() {
                // Per-event usage includes the first token, which the first-token path cannot count.
                let counts_each = mode.to_string().contains("continuous");
                let text = body(path, cell, mode);
                let expected = post(alone.port, path, &text);
                let fate = match declared {
                    _ if expected.0 != 200 => Fate::Refused,
                    Fate::Handed if counts_each && kind == HandoffKind::Prefiller => Fate::Alone,
                    declared => declared,
                };
                let before = counts(port);
                let got = post(port, path, &text);
                let after = counts(port);
                let counted = [0, 1, 2].map(|index| after[index] - before[index]);
                let due = match fate {
                    Fate::Handed => [1, 0, 0],
                    Fate::Alone => [0, 1, 0],
                    Fate::Refused => [0, 0, 1],
                };
                if (got.0, normalised(&got.1)) != (expected.0, normalised(&expected.1)) || counted != due {
                    wrong.push(format!(
                        "{kind:?} {path} {name}: {text}\n  fleet  {counted:?} {got:?}\n  engine {due:?} {expected:?}"
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} cells differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn every_nixl_cell_equals_one_engines_answer() {
    check(HandoffKind::Nixl);
}

#[test]
fn every_lmcache_cell_equals_one_engines_answer() {
    check(HandoffKind::Decoder);
}

#[test]
fn every_first_token_cell_equals_one_engines_answer() {
    check(HandoffKind::Prefiller);
}

#[test]
fn every_passthrough_route_equals_one_engines_answer() {
    let env = TestEnv::new();
    let mut fleet = up(&env, HandoffKind::Nixl);
    let alone = SingleEngine::start(&env);
    fleet.wait_until_ready();
    let messages = json!([{"role": "user", "content": "Tell me of the sea"}]);
    let response = |more: Value| {
        let mut body =
            json!({"model": MODEL, "input": "Tell me of the sea", "max_output_tokens": 12, "temperature": 0});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let posts = [
        ("/v1/responses", response(json!({}))),
        (
            "/v1/responses",
            response(json!({"stream": true, "kv_transfer_params": {"do_remote_prefill": true}})),
        ),
        ("/v1/responses", response(json!({"model": "other"}))),
        (
            "/v1/messages",
            json!({"model": MODEL, "messages": messages, "max_tokens": 9, "system": "Be brief"}),
        ),
        (
            "/v1/messages",
            json!({"model": MODEL, "messages": messages, "max_tokens": 9, "stream": true}),
        ),
        ("/v1/messages", json!({"model": MODEL, "max_tokens": 9})),
        (
            "/v1/messages/count_tokens",
            json!({"model": MODEL, "messages": messages}),
        ),
        ("/tokenize", json!({"prompt": "one day", "return_token_strs": true})),
        ("/tokenize", json!({"messages": messages})),
        ("/detokenize", json!({"tokens": [65_800, 65_801]})),
        ("/detokenize", json!({"tokens": [200_000]})),
        // The model supports no embeddings, so the fleet does not either.
        ("/v1/embeddings", json!({"model": MODEL, "input": "x"})),
        ("/v1/score", json!({"model": MODEL})),
        ("/v1/of_a_later_version", json!({"model": MODEL})),
        ("/not_known", json!({})),
    ];
    for (path, body) in posts {
        let (got, expected) = (
            post(env.proxy_port(), path, &body.to_string()),
            post(alone.port, path, &body.to_string()),
        );
        assert_eq!(got.0, expected.0, "{path} {body}");
        if path != "/not_known" {
            assert_eq!(normalised(&got.1), normalised(&expected.1), "{path} {body}");
        }
    }
    for path in ["/v1/models", "/version", "/ping", "/health", "/v1/of_a_later_version"] {
        let (got, expected) = (get(env.proxy_port(), path), get(alone.port, path));
        assert_eq!(normalised(&got), normalised(&expected), "{path}");
    }
}

#[test]
fn an_aborted_stream_ends_with_an_error_event() {
    let env = TestEnv::new();
    let faults = r#"sim.faults=["stall-decode=9"]"#;
    let mut fleet = env.up(&["--profile", "1p1d", "--set", faults, "--set", "restart.backoff=60s"]);
    fleet.wait_until_ready();
    let port = env.proxy_port();
    let fields = json!({"prompt": "a b c", "stream": true, "max_tokens": 50, "ignore_eos": true});
    let body = body(COMPLETIONS, fields.as_object().unwrap(), &json!({}));
    let begun = || {
        let text = get(port, "/metrics");
        let sample = |line: &str| {
            line.strip_prefix("xpyd_time_to_first_token_seconds_count ")
                .map(str::to_owned)
        };
        text.lines().find_map(sample)
    };
    let before = begun();
    let is_begun = || {
        if begun() == before {
            Err(format!("{before:?}"))
        } else {
            Ok(())
        }
    };
    let (status, text) = std::thread::scope(|scope| {
        let stream = scope.spawn(|| post(port, COMPLETIONS, &body));
        wait_for("the first token", is_begun);
        // vLLM ends running requests with reason `abort` when it stops.
        let decoder = engine(&env, "decoder1")["pid"].as_i64().unwrap();
        kill(Pid::from_raw(i32::try_from(decoder).unwrap()), Signal::SIGTERM).unwrap();
        stream.join().unwrap()
    });
    assert_eq!(status, 200);
    assert!(
        text.contains("\"error\":{") && text.ends_with("data: [DONE]\n\n"),
        "{text}"
    );
    assert!(!text.contains("\"abort\""), "{text}");
}
