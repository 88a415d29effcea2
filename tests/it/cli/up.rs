//! `xpyd up` on simulated engines, from the start to the stop, and what it leaves behind.

use std::io::Write as _;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{MODEL, TestEnv, completion, get, post, post_with, wait_for};

#[test]
fn a_fleet_starts_serves_and_leaves_nothing_on_ctrl_c() {
    let env = TestEnv::new();
    let mut run = env.up(&[]);
    run.wait_until_ready();
    let port = env.proxy_port();
    let through = completion(port, MODEL, "The quick brown fox jumps over the lazy dog");
    let alone = env.decode_alone(MODEL, "The quick brown fox jumps over the lazy dog");
    assert_eq!(through, alone);
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("no process and no listener is left"), "{text}");
    assert_eq!(env.processes(), []);
    env.assert_no_listener();
    for log in ["prefiller1.log", "prefiller2.log", "decoder1.log", "decoder2.log"] {
        assert!(env.log(log).contains("Application startup complete."), "{log}");
    }
}

#[test]
fn every_connector_and_tensor_parallel_profile_starts() {
    for (profile, more) in [
        ("2p2d-nixl", vec![]),
        ("1p1d-tp2", vec![]),
        ("1p3d", vec![]),
        ("1p1d", vec!["--set", "lmcache.first_token=prefiller"]),
    ] {
        let env = TestEnv::new();
        let mut run = env.up(&[&["--profile", profile], more.as_slice()].concat());
        run.wait_until_ready();
        let text = completion(env.proxy_port(), MODEL, "one two three");
        assert_eq!(text, env.decode_alone(MODEL, "one two three"), "{profile}");
        run.signal(Signal::SIGTERM);
        let (code, text) = run.end();
        assert_eq!(code, 0, "{profile}: {text}");
        assert_eq!(env.processes(), [], "{profile}");
    }
}

#[test]
fn nothing_is_left_when_xpyd_is_killed() {
    let env = TestEnv::new();
    let mut run = env.up(&[]);
    run.wait_until_ready();
    run.signal(Signal::SIGKILL);
    env.wait_until_empty();
    env.assert_no_listener();
}

#[test]
fn nothing_is_left_when_xpyd_is_killed_during_the_start() {
    let env = TestEnv::new();
    let mut run = env.up(&["--set", "sim.faults=[\"slow-start=60s\"]"]);
    run.wait_for_line("logs in");
    wait_for("engines", || {
        if env.processes().len() > 4 {
            Ok(())
        } else {
            Err(format!("{:?}", env.processes()))
        }
    });
    run.signal(Signal::SIGKILL);
    env.wait_until_empty();
}

#[test]
fn a_second_ctrl_c_kills_engines_that_ignore_sigterm() {
    let env = TestEnv::new();
    let mut run = env.up(&["--profile", "1p1d", "--set", "sim.faults=[\"ignore-sigterm\"]"]);
    run.wait_until_ready();
    run.signal(Signal::SIGINT);
    run.wait_for_line("press Ctrl+C again to force");
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 130, "{text}");
    assert_eq!(env.processes(), []);
    env.assert_no_listener();
}

#[test]
fn an_unread_output_pipe_does_not_block_a_run() {
    let env = TestEnv::new();
    let arguments = env.up_arguments(&["--profile", "1p1d", "--set", "restart.backoff=10ms"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (unread, mut full) = std::io::pipe().expect("a pipe");
    fcntl(&full, FcntlArg::F_SETPIPE_SZ(4096)).expect("a small pipe");
    full.write_all(&[b'x'; 4096]).expect("room for it");
    let stdout = full.try_clone().expect("a descriptor");
    let mut command = env.command(&arguments);
    let mut xpyd = command.stdout(stdout).stderr(full).spawn().expect("xpyd starts");
    let status = |what: &str, is_there: &dyn Fn(&serde_json::Value) -> bool| {
        wait_for(what, || {
            let output = env.run(&["status", "--json"]);
            let status = serde_json::from_slice(&output.stdout).unwrap_or_default();
            if is_there(&status) {
                Ok(status)
            } else {
                Err(status.to_string())
            }
        })
    };
    let ready = status("a ready fleet", &|status| status["stage"] == "ready");
    completion(env.proxy_port(), MODEL, "one two three");
    // An engine that fails and restarts produces much output.
    let decoder = ready["engines"][1]["pid"].as_i64().expect("a pid");
    kill(Pid::from_raw(i32::try_from(decoder).expect("a pid")), Signal::SIGKILL).expect("the process exists");
    status("the decode engine", &|status| {
        let engine = &status["engines"][1];
        engine["incarnation"] == 2 && engine["state"] == "ready"
    });
    completion(env.proxy_port(), MODEL, "one two three");
    let pid = i32::try_from(xpyd.id()).expect("a pid");
    kill(Pid::from_raw(pid), Signal::SIGTERM).expect("the process exists");
    let ended = wait_for("the end of xpyd", || {
        xpyd.try_wait()
            .expect("a child")
            .ok_or_else(|| format!("{:#?}", env.processes()))
    });
    assert_eq!(ended.code(), Some(0));
    assert_eq!(env.processes(), []);
    drop(unread);
}

#[test]
fn up_is_refused_while_an_earlier_run_stops() {
    let env = TestEnv::new();
    let slow = [
        "--profile",
        "1p1d",
        "--set",
        "deadlines.stop=60s",
        "--set",
        "sim.faults=[\"ignore-sigterm\"]",
    ];
    let mut run = env.up(&slow);
    run.wait_until_ready();
    run.signal(Signal::SIGINT);
    run.wait_for_line("press Ctrl+C again to force");
    let (code, text) = env.up(&["--profile", "1p1d"]).end();
    assert_eq!(code, 8, "{text}");
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 130);
    let mut next = env.up(&["--profile", "1p1d"]);
    next.wait_until_ready();
    next.signal(Signal::SIGTERM);
    assert_eq!(next.end().0, 0);
}

#[test]
fn engines_that_ignore_sigterm_are_killed_after_the_grace() {
    let env = TestEnv::new();
    let faults = "sim.faults=[\"ignore-sigterm\"]";
    let mut run = env.up(&["--profile", "1p1d", "--set", faults, "--set", "deadlines.stop=1s"]);
    run.wait_until_ready();
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    assert_eq!(env.processes(), []);
}

#[test]
fn a_failed_engine_start_ends_the_run_with_its_error() {
    let env = TestEnv::new();
    let mut run = env.up(&["--set", "sim.faults=[\"die-at=weights\"]"]);
    run.wait_for_line("error:");
    let (code, text) = run.end();
    assert_eq!(code, 4, "{text}");
    assert!(
        text.contains("caused by:") && text.contains("hint: `xpyd logs "),
        "{text}"
    );
    assert_eq!(env.processes(), []);
}

#[test]
fn a_handoff_without_kv_fails_the_canary() {
    let env = TestEnv::new();
    let faults = "sim.faults=[\"drop-notification\"]";
    let run = env.up(&["--profile", "1p1d", "--set", faults, "--set", "deadlines.handoff=1s"]);
    let (code, text) = run.end();
    assert_eq!(code, 5, "{text}");
    assert!(
        text.contains("the hand-off from prefiller1 to decoder1 does not work"),
        "{text}"
    );
    assert_eq!(env.processes(), []);
}

#[test]
fn wrong_kv_fails_the_canary() {
    for connector in ["connector=lmcache", "connector=nixl"] {
        let env = TestEnv::new();
        let faults = ["--set", "sim.faults=[\"garble-kv\"]", "--set", connector];
        let (code, text) = env.up(&[&["--profile", "1p1d"], faults.as_slice()].concat()).end();
        assert_eq!(code, 5, "{text}");
        assert!(text.contains("the transferred KV is wrong"), "{text}");
        assert_eq!(env.processes(), []);
    }
}

#[test]
fn wrong_kv_of_long_prompts_fails_the_canary() {
    let env = TestEnv::new();
    // The canary's first hand-off uses the short prompt.
    let faults = ["--set", "sim.faults=[\"garble-kv=2\"]", "--set", "connector=nixl"];
    let (code, text) = env.up(&[&["--profile", "1p1d"], faults.as_slice()].concat()).end();
    assert_eq!(code, 5, "{text}");
    let printed = "to a prompt of 8";
    assert!(
        text.contains(printed) && text.contains("the transferred KV is wrong"),
        "{text}"
    );
    assert_eq!(env.processes(), []);
}

#[test]
fn rounding_differences_do_not_fail_the_canary() {
    // Every second sequence differs, so the decode engine's own output never equals the pair's.
    for every in ["drift=2", "drift=3"] {
        let env = TestEnv::new();
        let faults = format!("sim.faults=[\"{every}\"]");
        let mut run = env.up(&["--profile", "1p1d", "--set", &faults]);
        run.wait_until_ready();
        run.signal(Signal::SIGINT);
        let (code, text) = run.end();
        assert_eq!(code, 0, "{text}");
    }
}

#[test]
fn the_run_ends_with_the_last_engine_of_a_role() {
    let env = TestEnv::new();
    let mut run = env.up(&["--set", "restart.policy=never"]);
    run.wait_until_ready();
    let engine = |name: &str| {
        let output = env.run(&["status", "--json"]);
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let engines = status["engines"].as_array().expect("a list").clone();
        engines
            .into_iter()
            .find(|engine| engine["id"] == name)
            .expect("an engine")
    };
    let kill_engine = |name: &str| {
        let pid = engine(name)["pid"].as_i64().expect("a pid");
        kill(Pid::from_raw(i32::try_from(pid).expect("a pid")), Signal::SIGKILL).expect("the process exists");
    };
    kill_engine("decoder1");
    run.wait_for_line("decoder1 failed");
    for _ in 0..4 {
        completion(env.proxy_port(), MODEL, "still here");
    }
    assert_eq!(engine("decoder1")["state"], "failed");
    kill_engine("decoder2");
    let (code, text) = run.end();
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("no decode engine is left"), "{text}");
    assert_eq!(env.processes(), []);
}

#[test]
fn a_detached_run_is_controlled_from_another_shell() {
    let env = TestEnv::new();
    let arguments = env.up_arguments(&["--detach"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let started = env.run(&arguments);
    let text = String::from_utf8_lossy(&started.stderr).into_owned();
    assert!(started.status.success(), "{text}");
    assert!(
        text.contains("ready: every pair") && text.contains("runs in the background"),
        "{text}"
    );

    let status = env.run(&["status"]);
    let table = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(
        status.status.success() && table.contains("prefiller1") && table.contains("ready"),
        "{table}"
    );

    let logs = env.run(&["logs", "decoder1", "--tail", "5"]);
    assert!(logs.status.success() && !logs.stdout.is_empty(), "{logs:?}");

    let second = env.run(&arguments);
    assert_eq!(
        second.status.code(),
        Some(8),
        "{}",
        String::from_utf8_lossy(&second.stderr)
    );

    let down = env.run(&["down"]);
    assert!(down.status.success(), "{}", String::from_utf8_lossy(&down.stderr));
    assert_eq!(env.processes(), []);
    assert_eq!(env.run(&["down"]).status.code(), Some(8));
    assert_eq!(env.run(&["status"]).status.code(), Some(8));
    // The log files remain after the run.
    let logs = env.run(&["logs", "decoder1", "--tail", "5"]);
    assert!(logs.status.success() && !logs.stdout.is_empty(), "{logs:?}");
}

#[test]
fn a_failed_detached_start_is_reported_at_once() {
    let env = TestEnv::new();
    let arguments = env.up_arguments(&["--detach", "--set", "sim.faults=[\"die-at=weights\"]"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let started = env.run(&arguments);
    let text = String::from_utf8_lossy(&started.stderr).into_owned();
    assert_eq!(started.status.code(), Some(4), "{text}");
    assert!(text.contains("error:"), "{text}");
    env.wait_until_empty();
}

#[test]
fn a_taken_port_is_reported_before_the_start() {
    let env = TestEnv::new();
    let port = 7201 + env.offset;
    let _holder = std::net::TcpListener::bind(("127.0.0.1", port)).expect("a free port");
    let (code, text) = env.up(&[]).end();
    assert_eq!(code, 3, "{text}");
    assert!(
        text.contains(&format!(" {port} (")) && text.contains("decoder2"),
        "{text}"
    );
    assert!(
        text.contains(&format!(" by process {} (", std::process::id())),
        "the holder: {text}"
    );
}

#[test]
fn without_gpus_preflight_suggests_the_simulated_engine() {
    let env = TestEnv::new();
    let output = env.command(&["up"]).env("PATH", "").output().expect("xpyd runs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("fail  vllm:") && text.contains("--engine sim"), "{text}");
}

#[test]
fn a_dry_run_prints_the_plan_and_starts_nothing() {
    let env = TestEnv::new();
    let offset = format!("port_offset={}", env.offset);
    let shown = |command: &[&str]| {
        let output = env.run(&[command, &["--engine", "sim", "--set", &offset]].concat());
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // How long the checks took.
        let lines = text.lines().filter(|line| !line.contains(" passed, in "));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let planned = shown(&["plan"]);
    assert!(planned.len() > 20, "{planned:?}");
    assert_eq!(shown(&["up", "--dry-run"]), planned);
    assert!(!env.path().join("logs").exists());
}

#[test]
fn a_session_stays_on_its_engines() {
    let env = TestEnv::new();
    let mut run = env.up(&["--client-bound", "--client-bound-key", "x-chat"]);
    run.wait_until_ready();
    let body = format!("{{\"model\":\"{MODEL}\",\"prompt\":\"x\",\"max_tokens\":2}}");
    let before = served_by_decoders(&env);
    for _ in 0..6 {
        let (status, text) = post_with(env.proxy_port(), "/v1/completions", &body, &[("x-chat", "one")]);
        assert_eq!(status, 200, "{text}");
    }
    let after = served_by_decoders(&env);
    let grown: Vec<u64> = after
        .iter()
        .zip(&before)
        .map(|(after, before)| after - before)
        .collect();
    assert!(
        grown == [6, 0] || grown == [0, 6],
        "one session on two decoders: {grown:?}"
    );
    for _ in 0..4 {
        post(env.proxy_port(), "/v1/completions", &body);
    }
    let grown: Vec<u64> = served_by_decoders(&env)
        .iter()
        .zip(&after)
        .map(|(now, before)| now - before)
        .collect();
    assert_eq!(grown, [2, 2], "requests without a session go round");
}

/// Finished requests of each of the two decode engines.
fn served_by_decoders(env: &TestEnv) -> [u64; 2] {
    [7200, 7201].map(|port| {
        let text = get(port + env.offset, "/metrics");
        let counts = text
            .lines()
            .filter(|line| line.starts_with("vllm:request_success_total"));
        let sum: f64 = counts
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum();
        // The metric is a count, so it has no fraction.
        format!("{sum}").parse().expect("a whole number")
    })
}

#[test]
fn the_demo_runs_to_its_end() {
    let env = TestEnv::new();
    let offset = env.offset.to_string();
    let output = env.run(&[
        "demo",
        "--preset",
        "instant",
        "--num-prompts",
        "2",
        "--port-offset",
        &offset,
    ]);
    let (data, text) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{text}");
    assert!(data.contains("Successful requests:                     2 "), "{data}");
    let stages = text.split("STAGE").nth(1).expect("the table of stages");
    assert!(
        stages.contains("prefill compute") && stages.contains("2 of 2 requests used remote KV"),
        "every stage was measured: {stages}"
    );
    assert!(
        text.contains("no process and no listener is left") && text.contains("up --engine sim"),
        "{text}"
    );
    assert_eq!(env.processes(), []);
}

#[test]
fn bench_finds_the_running_fleet() {
    let env = TestEnv::new();
    let mut run = env.up(&["--profile", "1p1d"]);
    run.wait_until_ready();
    let output = env.run(&[
        "bench",
        "--num-prompts",
        "4",
        "--request-rate",
        "inf",
        "--random-input-len",
        "64",
        "--json",
    ]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        (&report["completed"], &report["total_input_tokens"]),
        (&4.into(), &256.into())
    );
}
