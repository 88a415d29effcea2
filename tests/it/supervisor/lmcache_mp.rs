//! LMCache MP: engines with a cache server each as sidecar, on simulated engines and a simulated `lmcache server`.

use std::path::Path;
use std::process::Output;

use nix::sys::signal::Signal;

use crate::support::{
    MODEL, Run, TestEnv, completion, completion_with, engine, get, kill_engine, kill_process, metric, wait_for,
    with_requests_meanwhile,
};

/// Starts a fleet of this shape, and waits until it is ready.
fn up<'env>(env: &'env TestEnv, more: &[&str]) -> Run<'env> {
    // The default port is too close to another fleet's proxy, see `support`.
    let fixed = ["--profile", "2p2d-lmcache-mp", "--set", "lmcache_mp.http_port=8100"];
    env.up(&[&fixed, more].concat())
}

/// The processes of the test environment whose command is this verb of xpyd, such as `sim-lmcache`.
fn processes_of(env: &TestEnv, verb: &str) -> Vec<i32> {
    let processes = env.processes().into_iter();
    let processes_of = processes.filter(|(_, command)| command.split(' ').nth(1) == Some(verb));
    processes_of.map(|(pid, _)| pid).collect()
}

/// The process of an engine's cache server, found by its port.
fn cache_server(env: &TestEnv, engine_number: u16) -> i32 {
    let port = format!(" --port {} ", 6555 + env.offset + engine_number);
    let processes = env.processes().into_iter();
    let mut servers = processes.filter(|(_, command)| command.contains("xpyd sim-lmcache") && command.contains(&port));
    servers.next().expect("a cache server").0
}

#[test]
fn lmcache_mp_transfers_by_nixl_and_caches_prefixes() {
    let env = TestEnv::new();
    let mut run = up(&env, &[]);
    run.wait_until_ready();
    for number in 0..4 {
        assert_eq!(get(8100 + env.offset + number, "/healthcheck"), "\"healthy\"");
    }
    let decoder = 7200 + env.offset;
    let kept = || [7100, 7101].map(|port| metric(port + env.offset, "vllm:external_prefix_cache_hits_total", ""));
    let moved = || metric(decoder, "vllm:nixl_bytes_transferred_sum", "");
    let (kept_before, moved_before) = (kept(), moved());
    let common = "what many clients say before they say what they want ".repeat(60);
    for question in ["why", "when", "where", "who"] {
        let prompt = format!("{common}{question}");
        let through = completion(env.proxy_port(), MODEL, &prompt);
        let body = serde_json::json!({
            "model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 12, "cache_salt": question,
        });
        let bearer = format!("Bearer {}", env.engine_key());
        let headers = [("authorization", bearer.as_str())];
        let (status, alone) = crate::support::post_with(decoder, "/v1/completions", &body.to_string(), &headers);
        assert_eq!(status, 200, "{alone}");
        let alone: serde_json::Value = serde_json::from_str(&alone).expect("JSON");
        assert_eq!(alone["choices"][0]["text"], through);
    }
    assert!(moved() > moved_before, "NIXL moved nothing");
    // Two prompts each. The second one starts with the first one.
    for (before, after) in kept_before.into_iter().zip(kept()) {
        assert!(after - before >= 256.0, "{before} {after}");
    }
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("no process and no listener is left"), "{text}");
    assert_eq!(env.processes(), []);
    env.assert_no_listener();
}

#[test]
fn wrong_kv_is_detected_despite_the_decode_cache() {
    let env = TestEnv::new();
    let run = up(&env, &["--set", "sim.faults=[\"garble-kv\"]"]);
    let (code, text) = run.end();
    assert_eq!(code, 5, "{text}");
    assert!(text.contains("the transferred KV is wrong"), "{text}");
    assert_eq!(env.processes(), []);
}

#[test]
fn an_engine_restarts_with_a_new_cache_server() {
    let env = TestEnv::new();
    let mut run = up(&env, &["--set", "restart.backoff=10ms"]);
    run.wait_until_ready();
    with_requests_meanwhile(&env, MODEL, || {
        for (number, name) in [(0, "prefiller1"), (3, "decoder2")] {
            let lost = cache_server(&env, number);
            kill_process(lost);
            wait_for(name, || {
                let engine = engine(&env, name);
                // On a loaded host the second start can fail as well.
                let is_back = engine["state"] == "ready" && engine["incarnation"].as_i64() > Some(1);
                if is_back { Ok(()) } else { Err(engine.to_string()) }
            });
            assert_ne!(cache_server(&env, number), lost);
            let log = env.log(&format!("{name}.log"));
            assert!(log.contains("sim-lmcache` ended, so the engine ends too"), "{log}");
        }
    });
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    for name in ["prefiller1", "decoder2"] {
        // A stopping engine refuses hand-offs, which can be visible before its exit.
        let is_noticed = ["failed", "is drained and restarted"].map(|how| text.contains(&format!("{name} {how}")));
        assert!(
            is_noticed.contains(&true) && text.contains(&format!("{name} serves again")),
            "{text}"
        );
    }
    assert_eq!(env.processes(), []);
    env.assert_no_listener();
}

#[test]
fn a_cache_server_never_outlives_its_engine() {
    let env = TestEnv::new();
    let mut run = up(&env, &["--set", "restart.policy=never"]);
    run.wait_until_ready();
    assert_eq!(processes_of(&env, "sim-lmcache").len(), 4);
    kill_engine(&env, "decoder1");
    wait_for("the end of its cache server", || {
        let left = [processes_of(&env, "sim-lmcache"), processes_of(&env, "sidecar")];
        if left.iter().all(|pids| pids.len() == 3) {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    });
    run.signal(Signal::SIGKILL);
    env.wait_until_empty();
    env.assert_no_listener();
    drop(run);

    let mut run = up(&env, &[]);
    run.wait_until_ready();
    run.signal(Signal::SIGKILL);
    // The shim and its monitor.
    processes_of(&env, "shim").into_iter().for_each(kill_process);
    wait_for("the end of the processes that outlived their parent", || {
        let left = [processes_of(&env, "sim-lmcache"), processes_of(&env, "sidecar")];
        if left.iter().all(Vec::is_empty) {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    });
    // EngineCore and workers of simulated engines become orphans then, like real ones.
    env.processes().into_iter().for_each(|(pid, _)| kill_process(pid));
}

#[test]
fn a_failed_cache_server_start_fails_the_engine() {
    let env = TestEnv::new();
    let (code, text) = up(&env, &["--set", "lmcache_mp.l1_size=1MiB"]).end();
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("size_gb must provide room for one chunk"), "{text}");
    // All four engines fail. The first failure ends the run, possibly before the others have reported theirs.
    let logs = ["prefiller1", "prefiller2", "decoder1", "decoder2"].map(|engine| env.log(&format!("{engine}.log")));
    let reason = "ended (exit code 1) before it listened on port";
    assert!(logs.iter().any(|log| log.contains(reason)), "{logs:?}");
    assert_eq!(env.processes(), []);
}

#[test]
fn added_and_restarted_engines_have_cache_servers() {
    let env = TestEnv::new();
    let mut run = up(&env, &[]);
    run.wait_until_ready();
    let before = cache_server(&env, 2);
    for verb in [&["scale", "decode=3"][..], &["restart", "decoder1"]] {
        let output = env.run(verb);
        assert!(output.status.success(), "{}", text(&output));
    }
    assert_ne!(cache_server(&env, 2), before);
    let joined = cache_server(&env, 4);
    assert_eq!(processes_of(&env, "sim-lmcache").len(), 5);
    let output = env.run(&["scale", "decode=2"]);
    assert!(output.status.success(), "{}", text(&output));
    wait_for("the end of the cache server", || {
        let left = processes_of(&env, "sim-lmcache");
        if left.contains(&joined) {
            Err(format!("{left:?}"))
        } else {
            Ok(())
        }
    });
    assert_eq!(
        completion(env.proxy_port(), MODEL, "one two three"),
        env.decode_alone(MODEL, "one two three")
    );
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    assert_eq!(env.processes(), []);
}

#[test]
fn xpyd_proxy_serves_lmcache_mp_engines() {
    let env = TestEnv::new();
    let mut run = up(&env, &[]);
    run.wait_until_ready();
    let ports = |base: u16| format!("{},{}", base + env.offset, base + 1 + env.offset);
    let own_port = env.proxy_port() + 1;
    let (prefill, decode, own) = (ports(7100), ports(7200), own_port.to_string());
    let arguments = [
        "proxy",
        "--connector",
        "lmcache-mp",
        "--port",
        &own,
        "--prefiller-port",
        &prefill,
        "--decoder-port",
        &decode,
    ];
    let key = env.engine_key();
    let mut command = env.command(&arguments);
    command.env("VLLM_API_KEY", &key);
    let mut proxy = Run::start_command(&env, command);
    proxy.wait_for_line("serving 2 prefill and 2 decode engines");
    let moved = || metric(7200 + env.offset, "vllm:nixl_bytes_transferred_sum", "");
    let before = moved();
    // Requests alternate between the two decode engines.
    let bearer = format!("Bearer {key}");
    let prompt = "a prompt for `xpyd proxy`";
    let answers = [(); 2].map(|()| completion_with(own_port, MODEL, prompt, 12, &[("authorization", &bearer)]));
    assert_eq!(answers, [(); 2].map(|()| completion(env.proxy_port(), MODEL, prompt)));
    assert!(moved() > before);
}

/// Runs `xpyd sidecar` with these commands to its end. Returns its output and its remaining processes.
fn sidecar(env: &TestEnv, deadline: &str, commands: &[&str]) -> Output {
    let port = (6555 + env.offset).to_string();
    let flags = [
        "sidecar",
        "--host",
        "127.0.0.1",
        "--port",
        &port,
        "--deadline",
        deadline,
        "--grace",
        "1s",
        "--",
    ];
    env.run(&[&flags, commands].concat())
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn an_engine_does_not_start_without_its_sidecar() {
    let env = TestEnv::new();
    let engine = ["--", "touch", "started"];
    for (deadline, command, expected) in [
        (
            "100ms",
            &["sleep", "1000"][..],
            "its sidecar `sleep 1000` did not listen on port",
        ),
        (
            "1m",
            &["sh", "-c", "exit 3"],
            "its sidecar `sh -c` ended (exit code 3) before it listened on port",
        ),
        ("1m", &["no-such-program"], "cannot start `no-such-program`"),
    ] {
        let output = sidecar(&env, deadline, &[command, &engine].concat());
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output).contains(expected), "{}", text(&output));
        env.wait_until_empty();
    }
    assert!(!Path::new(&env.path().join("started")).exists());
}

#[test]
fn the_leader_becomes_the_engine() {
    let env = TestEnv::new();
    let program = env!("CARGO_BIN_EXE_xpyd");
    let (port, http) = ((6555 + env.offset).to_string(), (8100 + env.offset).to_string());
    let server = [program, "sim-lmcache", "server", "--port", &port, "--http-port", &http];
    let server = [
        &server[..],
        &["--host", "127.0.0.1", "--l1-size-gb", "1", "--eviction-policy", "LRU"],
    ]
    .concat();
    let output = sidecar(
        &env,
        "1m",
        &[&server, &["--", "sh", "-c", "echo $$ $PPID; exit 7"][..]].concat(),
    );
    assert_eq!(output.status.code(), Some(7), "{}", text(&output));
    let pids = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        pids.trim_end().ends_with(&std::process::id().to_string()),
        "its parent is who started it: {pids}"
    );
    env.wait_until_empty();
}
