//! Restarts of single engines while the fleet serves: crashes, hangs, drains, backoff and stalled starts.

use std::process::Output;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::Signal;

use crate::support::{MODEL, TestEnv, completion, engine, kill_engine, metric, post, wait_for};

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The processes in a hang report. All processes of simulated engines have this name.
fn processes_in(record: &str) -> usize {
    let lines = record.lines().filter(|line| !line.starts_with(' '));
    lines.filter(|line| line.contains(" xpyd: state ")).count()
}

/// The number of prompt tokens whose KV a decode engine has received.
fn received_tokens(port: u16) -> f64 {
    metric(port, "vllm:prompt_tokens_by_source_total", "external_kv_transfer")
}

#[test]
fn a_killed_decode_engine_restarts_while_clients_are_served() {
    for connector in ["connector=lmcache", "connector=nixl"] {
        let env = TestEnv::new();
        let mut run = env.up(&["--set", connector, "--set", "restart.backoff=10ms"]);
        run.wait_until_ready();
        let ask = |prompt: &str| completion(env.proxy_port(), MODEL, prompt);
        ask("before");
        kill_engine(&env, "decoder1");
        let back = wait_for("decoder1", || {
            ask("meanwhile");
            let engine = engine(&env, "decoder1");
            let is_back = engine["state"] == "ready" && engine["incarnation"] == 2;
            if is_back { Ok(engine) } else { Err(engine.to_string()) }
        });
        assert_eq!(back["reason"], serde_json::Value::Null);
        let before = received_tokens(7200 + env.offset);
        let prompt = "a prompt that is long enough to fill a whole block of KV on its way ".repeat(40);
        // Requests alternate between the two decode engines.
        let answers = [ask(&prompt), ask(&prompt)];
        assert!(
            received_tokens(7200 + env.offset) > before,
            "{connector}: no KV reached the new incarnation"
        );
        let alone = env.decode_alone(MODEL, &prompt);
        assert_eq!(answers, [alone.clone(), alone], "{connector}");
        run.signal(Signal::SIGINT);
        let (code, text) = run.end();
        assert_eq!(code, 0, "{text}");
        assert!(
            text.contains("decoder1 failed") && text.contains("decoder1 serves again"),
            "{text}"
        );
        assert_eq!(env.processes(), []);
        env.assert_no_listener();
    }
}

#[test]
fn a_crash_loop_ends_the_run_with_its_own_exit_code() {
    let env = TestEnv::new();
    let limits = ["--set", "restart.backoff=10ms", "--set", "restart.max_restarts=1"];
    let mut run = env.up(&[&["--profile", "1p1d"], limits.as_slice()].concat());
    run.wait_until_ready();
    kill_engine(&env, "decoder1");
    run.wait_for_line("decoder1 serves again");
    completion(env.proxy_port(), MODEL, "once more");
    kill_engine(&env, "decoder1");
    let (code, text) = run.end();
    assert_eq!(code, 6, "{text}");
    assert!(
        text.contains("no decode engine is left") && text.contains("kept failing"),
        "{text}"
    );
    assert_eq!(env.processes(), []);
}

#[test]
fn a_role_in_backoff_answers_503_until_restarted() {
    let env = TestEnv::new();
    let mut run = env.up(&[
        "--profile",
        "1p1d",
        "--set",
        "restart.backoff=1h",
        "--set",
        "restart.max_backoff=1h",
    ]);
    run.wait_until_ready();
    let refused = env.run(&["restart", "decoder1"]);
    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));
    assert!(
        text(&refused).contains("no other decode engine serves"),
        "{}",
        text(&refused)
    );
    kill_engine(&env, "decoder1");
    run.wait_for_line("decoder1 failed");
    let body = format!("{{\"model\":\"{MODEL}\",\"prompt\":\"x\",\"max_tokens\":2}}");
    assert_eq!(post(env.proxy_port(), "/v1/completions", &body).0, 503);
    let waiting = engine(&env, "decoder1");
    assert_eq!(waiting["state"], "backoff");
    assert!(
        waiting["restart_in_seconds"]
            .as_u64()
            .is_some_and(|seconds| seconds > 3000),
        "{waiting}"
    );
    let restart = env.run(&["restart", "decode"]);
    assert!(restart.status.success(), "{}", text(&restart));
    completion(env.proxy_port(), MODEL, "back again");
}

#[test]
fn a_restart_under_load_loses_no_request() {
    let env = TestEnv::new();
    let mut run = env.up(&[]);
    run.wait_until_ready();
    let (done, port) = (AtomicBool::new(false), env.proxy_port());
    let statuses = std::thread::scope(|scope| {
        let client = |number: usize| {
            let done = &done;
            move || {
                let mut answers = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    let body = serde_json::json!({"model": MODEL, "prompt": format!("{number}"), "max_tokens": 50});
                    answers.push(post(port, "/v1/completions", &body.to_string()));
                }
                answers
            }
        };
        let clients: Vec<_> = (0..4).map(|number| scope.spawn(client(number))).collect();
        let restart = env.run(&["restart", "decoder1", "prefiller2"]);
        done.store(true, Ordering::Relaxed);
        assert!(restart.status.success(), "{}", text(&restart));
        let answers = clients.into_iter().flat_map(|client| client.join().expect("a client"));
        answers.collect::<Vec<_>>()
    });
    let lost: Vec<_> = statuses.iter().filter(|(status, _)| *status != 200).collect();
    assert!(lost.is_empty() && statuses.len() >= 4, "{lost:#?}");
    for (name, incarnation) in [("decoder1", 2), ("prefiller2", 2), ("decoder2", 1), ("prefiller1", 1)] {
        let engine = engine(&env, name);
        assert_eq!(
            (&engine["state"], &engine["incarnation"]),
            (&"ready".into(), &incarnation.into()),
            "{engine}"
        );
    }
}

#[test]
fn a_drained_engine_stays_stopped_until_restarted() {
    let env = TestEnv::new();
    let mut run = env.up(&[]);
    run.wait_until_ready();
    let unknown = env.run(&["drain", "decodr2"]);
    assert_eq!(unknown.status.code(), Some(2), "{}", text(&unknown));
    assert!(
        text(&unknown).contains("did you mean `decoder2`?"),
        "{}",
        text(&unknown)
    );
    let drained = env.run(&["drain", "decoder2"]);
    assert!(drained.status.success(), "{}", text(&drained));
    assert_eq!(engine(&env, "decoder2")["state"], "stopped");
    for _ in 0..3 {
        completion(env.proxy_port(), MODEL, "the other one");
    }
    let last = env.run(&["drain", "decoder1"]);
    assert_eq!(last.status.code(), Some(1), "{}", text(&last));
    let restart = env.run(&["restart", "decoder2"]);
    assert!(restart.status.success(), "{}", text(&restart));
    assert_eq!(engine(&env, "decoder2")["state"], "ready");
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    assert_eq!(env.processes(), []);
}

#[test]
fn a_worker_hung_before_counting_a_request_is_restarted() {
    let env = TestEnv::new();
    // A canary sends two requests to the decode engine, so the second request of a client hangs.
    let mut run = env.up(&[
        "--profile",
        "1p1d",
        "--set",
        "sim.faults=[\"hang=3\"]",
        "--set",
        "deadlines.stall=10s",
        "--set",
        "restart.backoff=10ms",
    ]);
    run.wait_until_ready();
    completion(env.proxy_port(), MODEL, "the last one");
    let body = serde_json::json!({"model": MODEL, "prompt": "one too many", "max_tokens": 2});
    let (status, answer) = post(env.proxy_port(), "/v1/completions", &body.to_string());
    assert!(status >= 500, "{status}: {answer}");
    run.wait_for_line("decoder1 failed");
    run.wait_for_line("decoder1 serves again");
}

#[test]
fn a_prefill_engine_without_progress_counts_as_hung() {
    let env = TestEnv::new();
    let patient = "prefill.env={VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=\"600\"}";
    let mut run = env.up(&[
        "--profile",
        "1p1d",
        "--set",
        "decode.count=2",
        "--set",
        "sim.faults=[\"hang=3\"]",
        "--set",
        patient,
        "--set",
        "deadlines.stall=10s",
        "--set",
        "restart.backoff=10ms",
    ]);
    run.wait_until_ready();
    // One canary for each decode engine, and one more request.
    completion(env.proxy_port(), MODEL, "the last one");
    let body = serde_json::json!({"model": MODEL, "prompt": "one too many", "max_tokens": 2});
    let (status, answer) = post(env.proxy_port(), "/v1/completions", &body.to_string());
    assert!(status >= 500, "{status}: {answer}");
    run.wait_for_line("prefiller1 failed: hung: 1 requests run");
}

#[test]
fn a_hung_engine_is_restarted() {
    let env = TestEnv::new();
    let mut run = env.up(&[
        "--profile",
        "1p1d",
        "--set",
        "sim.faults=[\"stall-decode=20\"]",
        "--set",
        "deadlines.stall=10s",
        "--set",
        "restart.backoff=10ms",
        "--set",
        "decode.env.A_SECRET=swordfish",
    ]);
    run.wait_until_ready();
    let body = serde_json::json!({"model": MODEL, "prompt": "for ever", "max_tokens": 60, "ignore_eos": true});
    let (status, answer) = post(env.proxy_port(), "/v1/completions", &body.to_string());
    assert!(status >= 500, "{status}: {answer}");
    let failed = run.wait_for_line("decoder1 failed: hung: 1 requests run");
    assert!(
        failed.contains("what it was doing is in `decoder1.hang.1.txt`"),
        "{failed}"
    );
    let state = env.log("decoder1.hang.1.txt");
    assert!(processes_in(&state) >= 3, "API server, engine core, worker: {state}");
    for expected in [
        "decoder1, start 1",
        "    thread ",
        "1 running",
        "vllm:num_requests_running",
    ] {
        assert!(state.contains(expected), "{expected}: {state}");
    }
    assert!(!state.contains("swordfish"), "{state}");
    run.wait_for_line("decoder1 serves again");
    completion(env.proxy_port(), MODEL, "a short one");
}

#[test]
fn a_stalled_start_fails_with_its_last_phase() {
    let env = TestEnv::new();
    let run = env.up(&[
        "--profile",
        "1p1d",
        "--set",
        "sim.faults=[\"freeze-at=weights\"]",
        "--set",
        "deadlines.start_stall=10s",
    ]);
    let (code, text) = run.end();
    assert_eq!(code, 5, "{text}");
    let (_, failure) = text.split_once("error: ").expect("an error");
    assert!(
        failure.contains("stalled while starting, in phase: joining workers; no output, CPU time or reads for "),
        "{text}"
    );
    let name = if failure.starts_with("decoder1") {
        "decoder1"
    } else {
        "prefiller1"
    };
    let file = format!("{name}.hang.1.txt");
    assert!(failure.contains(&format!("what it was doing is in `{file}`")), "{text}");
    let state = env.log(&file);
    assert!(processes_in(&state) >= 3, "API server, engine core, worker: {state}");
    assert_eq!(env.processes(), []);
    let zero = env.run(&["up", "--engine", "sim", "--set", "deadlines.start_stall=0s"]);
    assert_eq!(zero.status.code(), Some(2), "{}", String::from_utf8_lossy(&zero.stderr));
}
