//! Chaos runs: a fleet under load while engines are killed, frozen and restarted. No hang, no wrong answer, no KV left.
//!
//! A seed decides the disruptions. `XPYD_CHAOS_SEEDS=20` tries 20 seeds, `XPYD_CHAOS_SEED=7` repeats one.

use std::io::Write as _;
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use futures_util::StreamExt as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};

use crate::support::{DEADLINE, MODEL, TestEnv, completion_of, metric, wait_for};

const CLIENTS: usize = 6;
const REQUESTS: usize = 12;
const DISRUPTIONS: usize = 5;

/// The number of tokens of every answer. At 5 ms each, an engine can die in the middle.
const TOKENS: usize = 40;

/// A prompt and its only right answer.
struct Question {
    prompt: String,
    answer: String,
}

/// How a client reads its response.
#[derive(Debug, Clone, Copy)]
enum ClientBehaviour {
    Whole,
    Stream,
    /// Disconnects after this number of milliseconds.
    Disconnect(u64),
}

/// The seeds to run.
fn seeds() -> Vec<u64> {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    match number("XPYD_CHAOS_SEED") {
        Some(seed) => vec![seed],
        None => (1..=number("XPYD_CHAOS_SEEDS").unwrap_or(1)).collect(),
    }
}

#[test]
fn chaos_over_nixl_loses_nothing() {
    for seed in seeds() {
        chaos_run(seed, &["connector=nixl"]);
    }
}

#[test]
fn chaos_over_strict_nixl_loses_nothing() {
    for seed in seeds() {
        chaos_run(seed, &["connector=nixl", "proxy.handoff.strict=true"]);
    }
}

#[test]
fn chaos_over_lmcache_loses_nothing() {
    for seed in seeds() {
        chaos_run(seed, &["connector=lmcache"]);
    }
}

#[test]
fn chaos_over_lmcache_first_token_loses_nothing() {
    for seed in seeds() {
        chaos_run(seed, &["connector=lmcache", "lmcache.first_token=prefiller"]);
    }
}

fn chaos_run(seed: u64, connector: &[&str]) {
    let env = TestEnv::new();
    let faults =
        r#"sim.faults=["drop-notification=9","repeat-notification=7","delay-notification=700ms/8","fail-transfer=11"]"#;
    let settings = [
        faults,
        "sim.preset=brisk",
        "restart.backoff=50ms",
        "restart.max_restarts=1000",
        "deadlines.stall=15s",
        "deadlines.handoff=2s",
        "deadlines.prefill=1m",
        "deadlines.decode_idle=1m",
        "proxy.routing.attempts=10",
    ];
    let arguments: Vec<&str> = settings
        .iter()
        .chain(connector)
        .flat_map(|setting| ["--set", setting])
        .collect();
    let mut run = env.up(&arguments);
    run.wait_until_ready();
    let questions = questions(&env, seed);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS as u64)
            .map(|client| {
                let (env, questions) = (&env, &questions);
                scope.spawn(move || send_requests(env, questions, seed * 1000 + client))
            })
            .collect();
        disrupt(&env, seed);
        for client in clients {
            client.join().unwrap_or_else(|_| panic!("seed {seed}, {connector:?}"));
        }
    });
    for question in &questions {
        let answer = completion_of(env.proxy_port(), MODEL, &question.prompt, TOKENS);
        assert_eq!(answer, question.answer, "seed {seed}: after the chaos run");
    }
    assert_nothing_is_left(&env, seed);
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "seed {seed}: {text}");
    assert_eq!(env.processes(), []);
}

/// Prompts from one word to several KV chunks, with the answers of one engine alone.
fn questions(env: &TestEnv, seed: u64) -> Vec<Question> {
    let lengths = [1, 40, 400, 900, 1500, 4000];
    let prompts = lengths.iter().map(|words| format!("{seed} {}", "word ".repeat(*words)));
    prompts
        .map(|prompt| Question {
            answer: env.decode_alone_of(MODEL, &prompt, TOKENS),
            prompt,
        })
        .collect()
}

/// Kills, freezes or restarts one engine at a time, and waits until the fleet is complete again, so that one engine of each
/// role is always alive.
fn disrupt(env: &TestEnv, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let mut half_open = Vec::new();
    for _ in 0..DISRUPTIONS {
        let engines = engines(env);
        let (name, incarnation, pid) = engines.choose(&mut random).expect("engines");
        match random.random_range(0..5) {
            0 | 1 => kill(*pid, Signal::SIGKILL).expect("the process exists"),
            2 => kill(*pid, Signal::SIGSTOP).expect("the process exists"),
            3 => {
                let restart = env.run(&["restart", name]);
                assert!(restart.status.success(), "{}", String::from_utf8_lossy(&restart.stderr));
            }
            _ => {
                let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, env.proxy_port())).expect("a connection");
                let head = "POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"prompt\"";
                client.write_all(head.as_bytes()).expect("written");
                half_open.push(client);
                continue;
            }
        }
        // A frozen engine counts as ready until xpyd detects it.
        wait_for("the next incarnation", || {
            let status = status(env);
            let engines = status["engines"].as_array().cloned().unwrap_or_default();
            let is_whole = engines.len() == 4 && engines.iter().all(|engine| engine["state"] == "ready");
            let is_next =
                |engine: &Value| engine["id"] == **name && engine["incarnation"].as_i64() > Some(*incarnation);
            if is_whole && engines.iter().any(is_next) {
                Ok(())
            } else {
                Err(states(&status))
            }
        });
    }
}

fn status(env: &TestEnv) -> Value {
    let output = env.run(&["status", "--json"]);
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

/// The engines of a status as text.
fn states(status: &Value) -> String {
    let engines = status["engines"].as_array().into_iter().flatten();
    let lines = engines.map(|engine| {
        let text = |key: &str| engine[key].to_string();
        format!(
            "{} {} {} {}",
            text("id"),
            text("state"),
            text("incarnation"),
            text("reason")
        )
    });
    lines.collect::<Vec<_>>().join("; ")
}

/// The name, the incarnation and the leader of each engine.
fn engines(env: &TestEnv) -> Vec<(String, i64, Pid)> {
    let status = status(env);
    let engines = status["engines"].as_array().expect("a list").iter();
    engines
        .map(|engine| {
            let number = |key: &str| engine[key].as_i64().expect("a number");
            let pid = Pid::from_raw(i32::try_from(number("pid")).expect("a pid"));
            (
                engine["id"].as_str().expect("a name").to_owned(),
                number("incarnation"),
                pid,
            )
        })
        .collect()
}

fn assert_nothing_is_left(env: &TestEnv, seed: u64) {
    let at = |base: u16| base + env.offset;
    let gauges = [
        (at(9100), "xpyd_handoffs_open "),
        (at(9100), "xpyd_requests_in_flight "),
        (at(7100), "vllm:kv_cache_usage_perc"),
        (at(7101), "vllm:kv_cache_usage_perc"),
        (at(7200), "vllm:kv_cache_usage_perc"),
        (at(7201), "vllm:kv_cache_usage_perc"),
        (at(7200), "vllm:sim_lmcache_buffered_pages"),
        (at(7201), "vllm:sim_lmcache_buffered_pages"),
    ];
    wait_for("nothing to be left", || {
        let left: Vec<String> = gauges
            .iter()
            .map(|(port, name)| (port, name, metric(*port, name, "")))
            .filter(|(.., value)| *value != 0.0)
            .map(|(port, name, value)| format!("{} on {port}: {value}", name.trim()))
            .collect();
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("seed {seed}: {left:?}"))
        }
    });
}

/// Sends the requests of one client, one at a time.
fn send_requests(env: &TestEnv, questions: &[Question], seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let url = format!("http://127.0.0.1:{}/v1/completions", env.proxy_port());
    for _ in 0..REQUESTS {
        let question = questions.choose(&mut random).expect("a question");
        let behaviour = match random.random_range(0..4) {
            0 => ClientBehaviour::Disconnect(random.random_range(0..150)),
            1 => ClientBehaviour::Whole,
            _ => ClientBehaviour::Stream,
        };
        let body = json!({"model": MODEL, "prompt": question.prompt, "temperature": 0, "max_tokens": TOKENS,
            "stream": !matches!(behaviour, ClientBehaviour::Whole)});
        // A separate connection, which closes when the client disconnects.
        let request = reqwest::Client::new()
            .post(&url)
            .header("content-type", "application/json")
            .body(body.to_string())
            .send();
        runtime.block_on(async {
            let outcome = match behaviour {
                ClientBehaviour::Disconnect(after) => {
                    let after = Duration::from_millis(after);
                    tokio::time::timeout(after, check_response(request, question))
                        .await
                        .unwrap_or(Ok(()))
                }
                ClientBehaviour::Whole | ClientBehaviour::Stream => {
                    tokio::time::timeout(DEADLINE, check_response(request, question))
                        .await
                        .unwrap_or_else(|_| Err("it hangs".to_owned()))
                }
            };
            outcome.unwrap_or_else(|error| panic!("{behaviour:?} of {} bytes: {error}", question.prompt.len()));
        });
    }
}

/// Checks a response. A request without any byte yet must succeed. A started stream is allowed to end with an error event.
async fn check_response(
    request: impl Future<Output = reqwest::Result<reqwest::Response>>,
    question: &Question,
) -> Result<(), String> {
    let response = request.await.map_err(|error| format!("no answer: {error:?}"))?;
    let status = response.status();
    let is_stream = response.headers()["content-type"]
        .as_bytes()
        .starts_with(b"text/event-stream");
    let mut text = String::new();
    let mut body = response.bytes_stream();
    while let Some(chunk) = body.next().await {
        let chunk = chunk.map_err(|error| format!("it broke off: {error:?} after {text}"))?;
        text.push_str(&String::from_utf8_lossy(&chunk));
    }
    if status != 200 {
        return Err(format!("{status}: {text}"));
    }
    let expected = question.answer.as_str();
    if !is_stream {
        let answer: Value = serde_json::from_str(&text).map_err(|error| format!("{error}: {text}"))?;
        let given = answer["choices"][0]["text"].as_str().unwrap_or_default();
        return if given == expected {
            Ok(())
        } else {
            Err(format!("wrong: {given:?}, not {expected:?}"))
        };
    }
    let events: Vec<Value> = text
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "))
        .map(|data| serde_json::from_str(data).unwrap_or_else(|_| json!(data)))
        .collect();
    if events.last().is_none_or(|last| last != "[DONE]") {
        return Err(format!("a silent end: {text}"));
    }
    let given: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["text"].as_str())
        .collect();
    let failed = events.iter().any(|event| event["error"].is_object());
    if given == expected && !failed || failed && !given.is_empty() && expected.starts_with(&given) {
        Ok(())
    } else {
        let errors: Vec<&Value> = events.iter().filter(|event| event["error"].is_object()).collect();
        Err(format!("wrong: {given:?}, not {expected:?}: {errors:?}"))
    }
}
