//! `xpyd up` and its sidecars on simulated engines: a whole life, and what is left of it.

use std::io::Write as _;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Place, completion, get, post, post_with, wait_for};

const MODEL: &str = "meta-llama/Llama-3.1-8B-Instruct";

#[test]
fn a_fleet_comes_up_serves_and_leaves_nothing_after_ctrl_c() {
    let place = Place::new();
    let mut run = place.up(&[]);
    run.wait_until_ready();
    let port = place.proxy_port();
    let through = completion(port, MODEL, "The quick brown fox jumps over the lazy dog");
    let alone = place.alone(MODEL, "The quick brown fox jumps over the lazy dog");
    assert_eq!(through, alone);
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("no process and no listener is left"), "{text}");
    assert_eq!(place.processes(), []);
    place.assert_no_listener();
    for log in ["prefiller1.log", "prefiller2.log", "decoder1.log", "decoder2.log"] {
        assert!(place.log(log).contains("Application startup complete."), "{log}");
    }
}

#[test]
fn every_connector_and_tensor_parallel_profile_comes_up() {
    for (profile, more) in [
        ("2p2d-nixl", vec![]),
        ("1p1d-tp2", vec![]),
        ("1p3d", vec![]),
        ("1p1d", vec!["--set", "lmcache.first_token=prefiller"]),
    ] {
        let place = Place::new();
        let mut run = place.up(&[&["--profile", profile], more.as_slice()].concat());
        run.wait_until_ready();
        let text = completion(place.proxy_port(), MODEL, "one two three");
        assert_eq!(text, place.alone(MODEL, "one two three"), "{profile}");
        run.signal(Signal::SIGTERM);
        let (code, text) = run.end();
        assert_eq!(code, 0, "{profile}: {text}");
        assert_eq!(place.processes(), [], "{profile}");
    }
}

#[test]
fn nothing_is_left_when_xpyd_is_killed() {
    let place = Place::new();
    let mut run = place.up(&[]);
    run.wait_until_ready();
    run.signal(Signal::SIGKILL);
    place.wait_until_empty();
    place.assert_no_listener();
}

#[test]
fn nothing_is_left_when_xpyd_is_killed_during_the_start() {
    let place = Place::new();
    let mut run = place.up(&["--set", "sim.faults=[\"slow-start=60s\"]"]);
    run.wait_for_line("logs in");
    wait_for("engines", || {
        if place.processes().len() > 4 {
            Ok(())
        } else {
            Err(format!("{:?}", place.processes()))
        }
    });
    run.signal(Signal::SIGKILL);
    place.wait_until_empty();
}

#[test]
fn a_second_ctrl_c_kills_engines_that_ignore_sigterm() {
    let place = Place::new();
    let mut run = place.up(&["--profile", "1p1d", "--set", "sim.faults=[\"ignore-sigterm\"]"]);
    run.wait_until_ready();
    run.signal(Signal::SIGINT);
    run.wait_for_line("press Ctrl+C again to force");
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 130, "{text}");
    assert_eq!(place.processes(), []);
    place.assert_no_listener();
}

#[test]
fn a_pipe_that_nobody_reads_holds_up_neither_a_fleet_nor_its_end() {
    let place = Place::new();
    let arguments = place.up_arguments(&["--profile", "1p1d", "--set", "restart.backoff=10ms"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (unread, mut full) = std::io::pipe().expect("a pipe");
    fcntl(&full, FcntlArg::F_SETPIPE_SZ(4096)).expect("a small pipe");
    full.write_all(&[b'x'; 4096]).expect("room for it");
    let stdout = full.try_clone().expect("a descriptor");
    let mut command = place.command(&arguments);
    let mut xpyd = command.stdout(stdout).stderr(full).spawn().expect("xpyd starts");
    let status = |what: &str, is_there: &dyn Fn(&serde_json::Value) -> bool| {
        wait_for(what, || {
            let output = place.run(&["status", "--json"]);
            let status = serde_json::from_slice(&output.stdout).unwrap_or_default();
            if is_there(&status) {
                Ok(status)
            } else {
                Err(status.to_string())
            }
        })
    };
    let ready = status("a ready fleet", &|status| status["stage"] == "ready");
    completion(place.proxy_port(), MODEL, "one two three");
    // Much is to be said about an engine that fails and comes back.
    let decoder = ready["engines"][1]["pid"].as_i64().expect("a pid");
    kill(Pid::from_raw(i32::try_from(decoder).expect("a pid")), Signal::SIGKILL).expect("it is there");
    status("the decode engine", &|status| {
        let engine = &status["engines"][1];
        engine["incarnation"] == 2 && engine["state"] == "ready"
    });
    completion(place.proxy_port(), MODEL, "one two three");
    let pid = i32::try_from(xpyd.id()).expect("a pid");
    kill(Pid::from_raw(pid), Signal::SIGTERM).expect("it is there");
    let ended = wait_for("the end of xpyd", || {
        xpyd.try_wait()
            .expect("a child")
            .ok_or_else(|| format!("{:#?}", place.processes()))
    });
    assert_eq!(ended.code(), Some(0));
    assert_eq!(place.processes(), []);
    drop(unread);
}

#[test]
fn an_up_during_a_slow_stop_is_refused_until_nothing_is_left() {
    let place = Place::new();
    let slow = [
        "--profile",
        "1p1d",
        "--set",
        "deadlines.stop=60s",
        "--set",
        "sim.faults=[\"ignore-sigterm\"]",
    ];
    let mut run = place.up(&slow);
    run.wait_until_ready();
    run.signal(Signal::SIGINT);
    run.wait_for_line("press Ctrl+C again to force");
    let (code, text) = place.up(&["--profile", "1p1d"]).end();
    assert_eq!(code, 8, "{text}");
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 130);
    let mut next = place.up(&["--profile", "1p1d"]);
    next.wait_until_ready();
    next.signal(Signal::SIGTERM);
    assert_eq!(next.end().0, 0);
}

#[test]
fn engines_that_ignore_sigterm_are_killed_when_their_grace_is_over() {
    let place = Place::new();
    let faults = "sim.faults=[\"ignore-sigterm\"]";
    let mut run = place.up(&["--profile", "1p1d", "--set", faults, "--set", "deadlines.stop=1s"]);
    run.wait_until_ready();
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    assert_eq!(place.processes(), []);
}

#[test]
fn an_engine_that_fails_to_start_ends_the_run_with_its_first_error() {
    let place = Place::new();
    let mut run = place.up(&["--set", "sim.faults=[\"die-at=weights\"]"]);
    run.wait_for_line("error:");
    let (code, text) = run.end();
    assert_eq!(code, 4, "{text}");
    assert!(
        text.contains("caused by:") && text.contains("hint: `xpyd logs "),
        "{text}"
    );
    assert_eq!(place.processes(), []);
}

#[test]
fn a_hand_off_that_moves_no_kv_keeps_the_fleet_from_getting_ready() {
    let place = Place::new();
    let faults = "sim.faults=[\"drop-notification\"]";
    let run = place.up(&["--profile", "1p1d", "--set", faults, "--set", "deadlines.handoff=1s"]);
    let (code, text) = run.end();
    assert_eq!(code, 5, "{text}");
    assert!(
        text.contains("the hand-off from prefiller1 to decoder1 does not work"),
        "{text}"
    );
    assert_eq!(place.processes(), []);
}

#[test]
fn kv_that_arrives_wrong_keeps_the_fleet_from_getting_ready() {
    for connector in ["connector=lmcache", "connector=nixl"] {
        let place = Place::new();
        let faults = ["--set", "sim.faults=[\"garble-kv\"]", "--set", connector];
        let (code, text) = place.up(&[&["--profile", "1p1d"], faults.as_slice()].concat()).end();
        assert_eq!(code, 5, "{text}");
        assert!(text.contains("the transferred KV is wrong"), "{text}");
        assert_eq!(place.processes(), []);
    }
}

#[test]
fn kv_that_arrives_wrong_with_long_prompts_alone_keeps_the_fleet_from_getting_ready() {
    let place = Place::new();
    // The first hand-off is that of the short prompt.
    let faults = ["--set", "sim.faults=[\"garble-kv=2\"]", "--set", "connector=nixl"];
    let (code, text) = place.up(&[&["--profile", "1p1d"], faults.as_slice()].concat()).end();
    assert_eq!(code, 5, "{text}");
    let told = "to a prompt of 8";
    assert!(
        text.contains(told) && text.contains("the transferred KV is wrong"),
        "{text}"
    );
    assert_eq!(place.processes(), []);
}

#[test]
fn answers_that_differ_by_the_order_of_additions_alone_do_not_keep_a_fleet_from_getting_ready() {
    // Each second sequence: what the decode engine says alone always parts from what it says through the pair.
    for every in ["drift=2", "drift=3"] {
        let place = Place::new();
        let faults = format!("sim.faults=[\"{every}\"]");
        let mut run = place.up(&["--profile", "1p1d", "--set", &faults]);
        run.wait_until_ready();
        run.signal(Signal::SIGINT);
        let (code, text) = run.end();
        assert_eq!(code, 0, "{text}");
    }
}

#[test]
fn the_others_serve_on_when_an_engine_dies_and_the_run_ends_with_the_last_of_a_role() {
    let place = Place::new();
    let mut run = place.up(&["--set", "restart.policy=never"]);
    run.wait_until_ready();
    let engine = |name: &str| {
        let output = place.run(&["status", "--json"]);
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let engines = status["engines"].as_array().expect("a list").clone();
        engines
            .into_iter()
            .find(|engine| engine["id"] == name)
            .expect("an engine")
    };
    let kill_engine = |name: &str| {
        let pid = engine(name)["pid"].as_i64().expect("a pid");
        kill(Pid::from_raw(i32::try_from(pid).expect("a pid")), Signal::SIGKILL).expect("it is there");
    };
    kill_engine("decoder1");
    run.wait_for_line("decoder1 failed");
    for _ in 0..4 {
        completion(place.proxy_port(), MODEL, "still here");
    }
    assert_eq!(engine("decoder1")["state"], "failed");
    kill_engine("decoder2");
    let (code, text) = run.end();
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("no decode engine is left"), "{text}");
    assert_eq!(place.processes(), []);
}

#[test]
fn a_detached_run_is_seen_followed_and_stopped_from_elsewhere() {
    let place = Place::new();
    let arguments = place.up_arguments(&["--detach"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let started = place.run(&arguments);
    let text = String::from_utf8_lossy(&started.stderr).into_owned();
    assert!(started.status.success(), "{text}");
    assert!(
        text.contains("ready: every pair") && text.contains("runs in the background"),
        "{text}"
    );

    let status = place.run(&["status"]);
    let table = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(
        status.status.success() && table.contains("prefiller1") && table.contains("ready"),
        "{table}"
    );

    let logs = place.run(&["logs", "decoder1", "--tail", "5"]);
    assert!(logs.status.success() && !logs.stdout.is_empty(), "{logs:?}");

    let second = place.run(&arguments);
    assert_eq!(
        second.status.code(),
        Some(8),
        "{}",
        String::from_utf8_lossy(&second.stderr)
    );

    let down = place.run(&["down"]);
    assert!(down.status.success(), "{}", String::from_utf8_lossy(&down.stderr));
    assert_eq!(place.processes(), []);
    assert_eq!(place.run(&["down"]).status.code(), Some(8));
    assert_eq!(place.run(&["status"]).status.code(), Some(8));
    // The files outlive the run.
    let logs = place.run(&["logs", "decoder1", "--tail", "5"]);
    assert!(logs.status.success() && !logs.stdout.is_empty(), "{logs:?}");
}

#[test]
fn a_detached_run_that_fails_says_so_at_once() {
    let place = Place::new();
    let arguments = place.up_arguments(&["--detach", "--set", "sim.faults=[\"die-at=weights\"]"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let started = place.run(&arguments);
    let text = String::from_utf8_lossy(&started.stderr).into_owned();
    assert_eq!(started.status.code(), Some(4), "{text}");
    assert!(text.contains("error:"), "{text}");
    place.wait_until_empty();
}

#[test]
fn a_taken_port_is_named_with_its_holder_before_anything_starts() {
    let place = Place::new();
    let port = 7201 + place.offset;
    let _holder = std::net::TcpListener::bind(("127.0.0.1", port)).expect("a free port");
    let (code, text) = place.up(&[]).end();
    assert_eq!(code, 3, "{text}");
    assert!(text.contains(&port.to_string()) && text.contains("decoder2"), "{text}");
    assert!(text.contains(&std::process::id().to_string()), "the holder: {text}");
}

#[test]
fn without_gpus_the_preflight_points_to_the_simulated_engine() {
    let place = Place::new();
    let output = place.command(&["up"]).env("PATH", "").output().expect("xpyd runs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("fail  vllm:") && text.contains("--engine sim"), "{text}");
}

#[test]
fn a_dry_run_prints_the_plan_and_starts_nothing() {
    let place = Place::new();
    let (dry, plan) = (
        place.run(&["up", "--engine", "sim", "--dry-run"]),
        place.run(&["plan", "--engine", "sim"]),
    );
    assert!(dry.status.success());
    assert_eq!(
        String::from_utf8_lossy(&dry.stdout),
        String::from_utf8_lossy(&plan.stdout)
    );
    assert!(!place.path().join("logs").exists());
}

#[test]
fn a_session_keeps_its_engines() {
    let place = Place::new();
    let mut run = place.up(&["--client-bound", "--client-bound-key", "x-chat"]);
    run.wait_until_ready();
    let body = format!("{{\"model\":\"{MODEL}\",\"prompt\":\"x\",\"max_tokens\":2}}");
    let before = served_by_decoders(&place);
    for _ in 0..6 {
        let (status, text) = post_with(place.proxy_port(), "/v1/completions", &body, &[("x-chat", "one")]);
        assert_eq!(status, 200, "{text}");
    }
    let after = served_by_decoders(&place);
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
        post(place.proxy_port(), "/v1/completions", &body);
    }
    let grown: Vec<u64> = served_by_decoders(&place)
        .iter()
        .zip(&after)
        .map(|(now, before)| now - before)
        .collect();
    assert_eq!(grown, [2, 2], "requests without a session go round");
}

/// Requests that each of the two decode engines has finished.
fn served_by_decoders(place: &Place) -> [u64; 2] {
    [7200, 7201].map(|port| {
        let text = get(port + place.offset, "/metrics");
        let counts = text
            .lines()
            .filter(|line| line.starts_with("vllm:request_success_total"));
        let sum: f64 = counts
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum();
        // A count, which has no fraction.
        format!("{sum}").parse().expect("a whole number")
    })
}

#[test]
fn the_demo_shows_a_whole_life_and_ends_by_itself() {
    let place = Place::new();
    let offset = place.offset.to_string();
    let output = place.run(&[
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
    assert!(data.contains("Successful requests:                     2"), "{data}");
    let stages = text.split("STAGE").nth(1).expect("the table of stages");
    assert!(
        stages.contains("prefill compute") && stages.contains("2 of 2 requests used remote KV"),
        "every stage was measured: {stages}"
    );
    assert!(
        text.contains("no process and no listener is left") && text.contains("up --engine sim"),
        "{text}"
    );
    assert_eq!(place.processes(), []);
}

#[test]
fn the_bench_finds_the_running_fleet_by_itself() {
    let place = Place::new();
    let mut run = place.up(&["--profile", "1p1d"]);
    run.wait_until_ready();
    let output = place.run(&[
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
