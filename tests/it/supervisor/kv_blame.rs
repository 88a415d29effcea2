//! An engine whose KV transfer hangs while its HTTP API answers: xpyd finds and restarts it, and blames no other engine.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::{MODEL, Run, TestEnv, post, wait_for};

const UP: [&str; 6] = [
    "--profile",
    "2p2d-nixl",
    "--set",
    "restart.backoff=10ms",
    "--set",
    "deadlines.keep=10m",
];

/// Blocks the side channel of an engine: it asks for metadata and reads no response, so the engine's only thread for it hangs.
struct BlockedSideChannel(#[expect(dead_code, reason = "held open")] TcpStream);

impl BlockedSideChannel {
    fn of(env: &TestEnv, engine: &str) -> Self {
        let record: Value = serde_json::from_str(&env.log(&format!("{engine}.spawn.json"))).expect("JSON");
        let port = record["env"]["VLLM_NIXL_SIDE_CHANNEL_PORT"].as_str().expect("a port");
        let port: u16 = port.parse().expect("a port");
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("a side channel");
        // ZMTP 3.0: signature, version, mechanism, then the command READY of a REQ socket.
        let mut greeting = b"\xff\0\0\0\0\0\0\0\0\x7f\x03\x00NULL".to_vec();
        greeting.resize(64, 0);
        stream.write_all(&greeting).expect("a greeting");
        stream.read_exact(&mut [0; 64]).expect("a greeting");
        let ready = [&b"\x05READY\x0bSocket-Type\0\0\0\x03REQ\x08Identity\0\0\0\0"[..]].concat();
        stream
            .write_all(&[4, u8::try_from(ready.len()).expect("short")])
            .expect("a head");
        stream.write_all(&ready).expect("a command");
        // An empty frame, then msgpack `[b"get_meta_msg", 0, 1]`, as vLLM sends it.
        let request = b"\x93\xc4\x0cget_meta_msg\x00\x01";
        let mut one = vec![1, 0, 0, u8::try_from(request.len()).expect("short")];
        one.extend_from_slice(request);
        let many = one.repeat(200);
        stream
            .set_write_timeout(Some(Duration::from_secs(5)))
            .expect("a time-out");
        loop {
            match stream.write(&many) {
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Self(stream);
                }
                Err(error) => panic!("not wedged: {error}"),
            }
        }
    }
}

/// The state, the incarnation and the last failure of each engine.
fn engines(env: &TestEnv) -> Vec<(String, String, i64)> {
    let output = env.run(&["status", "--json"]);
    let status: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let engines = status["engines"].as_array().expect("a list").iter();
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    engines
        .map(|engine| {
            (
                text(&engine["id"]),
                text(&engine["state"]),
                engine["incarnation"].as_i64().unwrap_or(0),
            )
        })
        .collect()
}

fn wait_until(env: &TestEnv, incarnations: [i64; 4]) {
    let names = ["prefiller1", "prefiller2", "decoder1", "decoder2"];
    let expected: Vec<_> = names
        .iter()
        .zip(incarnations)
        .map(|(name, incarnation)| ((*name).to_owned(), "ready".to_owned(), incarnation))
        .collect();
    wait_for("the guilty engine alone to be restarted", || {
        let now = engines(env);
        if now == expected {
            Ok(())
        } else {
            Err(format!("{now:?}"))
        }
    });
}

fn stop(env: &TestEnv, run: Run<'_>) -> String {
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    assert_eq!(env.processes(), []);
    env.assert_no_listener();
    text
}

fn ask(env: &TestEnv, index: usize) {
    let body = json!({"model": MODEL, "prompt": format!("{index} {}", "word ".repeat(60)), "max_tokens": 2});
    let (status, text) = post(env.proxy_port(), "/v1/completions", &body.to_string());
    assert_eq!(status, 200, "{text}");
}

#[test]
fn failed_handoffs_identify_the_engine_with_hung_kv() {
    let env = TestEnv::new();
    let mut run = env.up(&UP);
    run.wait_until_ready();
    let blocked = BlockedSideChannel::of(&env, "prefiller2");
    std::thread::scope(|scope| {
        for index in 0..16 {
            let env = &env;
            scope.spawn(move || ask(env, index));
        }
    });
    // The busiest machine can skip the view in which it drains; the reason is printed all the same.
    let line = run.wait_for_line(": its hand-offs with");
    assert!(line.contains("prefiller2"), "{line}");
    wait_until(&env, [1, 2, 1, 1]);
    drop(blocked);
    let metrics = crate::support::get(env.proxy_port(), "/metrics");
    assert!(
        metrics.contains(r#"xpyd_handoff_total{outcome="recomputed"}"#),
        "{metrics}"
    );
    stop(&env, run);
}

#[test]
fn a_restarted_engine_is_not_blamed_for_a_hung_peer() {
    let env = TestEnv::new();
    let mut run = env.up(&UP);
    run.wait_until_ready();
    let blocked = BlockedSideChannel::of(&env, "prefiller2");
    let output = env.run(&["restart", "decoder1"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    wait_until(&env, [1, 2, 2, 1]);
    drop(blocked);
    stop(&env, run);
}

#[test]
fn an_attach_restarts_only_unhealthy_engines() {
    let env = TestEnv::new();
    let mut dead = env.up(&UP);
    dead.wait_until_ready();
    let blocked = BlockedSideChannel::of(&env, "prefiller2");
    dead.kill();
    let mut run = env.up(&UP);
    run.wait_for_line("ready: every pair of engines that serve");
    wait_until(&env, [1, 2, 1, 1]);
    drop(blocked);
    stop(&env, run);
}

#[test]
fn an_attach_serves_while_waiting_for_a_hung_engine() {
    let env = TestEnv::new();
    let mut dead = env.up(&UP);
    dead.wait_until_ready();
    let port = format!(" {} ", 7100 + env.offset);
    let hung: Vec<i32> = env
        .processes()
        .into_iter()
        .filter(|(_, line)| line.contains(&port))
        .map(|(pid, _)| pid)
        .collect();
    let send = |signal| {
        for pid in &hung {
            kill(Pid::from_raw(*pid), signal).expect("the process exists");
        }
    };
    assert!(!hung.is_empty(), "{:?}", env.processes());
    send(Signal::SIGSTOP);
    dead.kill();
    let mut run = env.up(&UP);
    let line = run.wait_for_line("ready: every pair of engines that serve");
    assert!(line.contains("not serving yet: prefiller1"), "{line}");
    ask(&env, 1);
    wait_for("the others", || {
        let states: Vec<String> = engines(&env).into_iter().map(|(_, state, _)| state).collect();
        if states == ["healthy", "ready", "ready", "ready"] {
            Ok(())
        } else {
            Err(format!("{states:?}"))
        }
    });
    send(Signal::SIGCONT);
    wait_until(&env, [1, 1, 1, 1]);
    stop(&env, run);
}
