//! Engines with a cache server each, through the binary on simulated engines and a simulated `lmcache server`.

use std::path::Path;
use std::process::Output;

use nix::sys::signal::Signal;

use crate::support::{
    Place, Run, asking_meanwhile, completion, completion_with, engine, get, kill_engine, kill_process, metric, wait_for,
};

const MODEL: &str = "meta-llama/Llama-3.1-8B-Instruct";

/// A fleet of this shape, which is `ready` when this returns.
fn up<'place>(place: &'place Place, more: &[&str]) -> Run<'place> {
    // The default is too close to another fleet's proxy, see `support`.
    let fixed = ["--profile", "2p2d-lmcache-mp", "--set", "lmcache_mp.http_port=8100"];
    place.up(&[&fixed, more].concat())
}

/// The processes of the place whose command line begins with its program and this verb: `sim-lmcache`.
fn of_verb(place: &Place, verb: &str) -> Vec<i32> {
    let processes = place.processes().into_iter();
    let of_verb = processes.filter(|(_, command)| command.split(' ').nth(1) == Some(verb));
    of_verb.map(|(pid, _)| pid).collect()
}

/// The cache server of an engine: the one that listens on its port.
fn cache_server(place: &Place, engine_number: u16) -> i32 {
    let port = format!(" --port {} ", 6555 + place.offset + engine_number);
    let processes = place.processes().into_iter();
    let mut servers = processes.filter(|(_, command)| command.contains("xpyd sim-lmcache") && command.contains(&port));
    servers.next().expect("a cache server").0
}

#[test]
fn a_fleet_comes_up_hands_over_by_nixl_and_keeps_what_prompts_have_in_common() {
    let place = Place::new();
    let mut run = up(&place, &[]);
    run.wait_until_ready();
    for number in 0..4 {
        assert_eq!(get(8100 + place.offset + number, "/healthcheck"), "\"healthy\"");
    }
    let decoder = 7200 + place.offset;
    let kept = || [7100, 7101].map(|port| metric(port + place.offset, "vllm:external_prefix_cache_hits_total", ""));
    let moved = || metric(decoder, "vllm:nixl_bytes_transferred_sum", "");
    let (kept_before, moved_before) = (kept(), moved());
    let common = "what many clients say before they say what they want ".repeat(60);
    for question in ["why", "when", "where", "who"] {
        let prompt = format!("{common}{question}");
        let through = completion(place.proxy_port(), MODEL, &prompt);
        let body = serde_json::json!({
            "model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 12, "cache_salt": question,
        });
        let bearer = format!("Bearer {}", place.engine_key());
        let headers = [("authorization", bearer.as_str())];
        let (status, alone) = crate::support::post_with(decoder, "/v1/completions", &body.to_string(), &headers);
        assert_eq!(status, 200, "{alone}");
        let alone: serde_json::Value = serde_json::from_str(&alone).expect("JSON");
        assert_eq!(alone["choices"][0]["text"], through);
    }
    assert!(moved() > moved_before, "NIXL moved nothing");
    // Two prompts each, of which the second one begins as the first.
    for (before, after) in kept_before.into_iter().zip(kept()) {
        assert!(after - before >= 256.0, "{before} {after}");
    }
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("no process and no listener is left"), "{text}");
    assert_eq!(place.processes(), []);
    place.assert_no_listener();
}

#[test]
fn wrong_kv_is_seen_although_the_decode_engine_keeps_what_it_was_handed() {
    let place = Place::new();
    let run = up(&place, &["--set", "sim.faults=[\"garble-kv\"]"]);
    let (code, text) = run.end();
    assert_eq!(code, 5, "{text}");
    assert!(text.contains("the transferred KV is wrong"), "{text}");
    assert_eq!(place.processes(), []);
}

#[test]
fn an_engine_comes_back_with_a_new_cache_server_when_it_has_lost_its_own_and_no_request_is_lost() {
    let place = Place::new();
    let mut run = up(&place, &["--set", "restart.backoff=10ms"]);
    run.wait_until_ready();
    asking_meanwhile(&place, MODEL, || {
        for (number, name) in [(0, "prefiller1"), (3, "decoder2")] {
            let lost = cache_server(&place, number);
            kill_process(lost);
            wait_for(name, || {
                let engine = engine(&place, name);
                let is_back = engine["state"] == "ready" && engine["incarnation"] == 2;
                if is_back { Ok(()) } else { Err(engine.to_string()) }
            });
            assert_ne!(cache_server(&place, number), lost);
            let log = place.log(&format!("{name}.log"));
            assert!(log.contains("sim-lmcache` ended, so the engine ends too"), "{log}");
        }
    });
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    for name in ["prefiller1", "decoder2"] {
        // An engine that is ending refuses hand-offs, which may be seen before its end.
        let is_noticed = ["failed", "is drained and restarted"].map(|how| text.contains(&format!("{name} {how}")));
        assert!(
            is_noticed.contains(&true) && text.contains(&format!("{name} serves again")),
            "{text}"
        );
    }
    assert_eq!(place.processes(), []);
    place.assert_no_listener();
}

#[test]
fn a_cache_server_ends_with_its_engine_and_with_xpyd_and_with_the_shim() {
    let place = Place::new();
    let mut run = up(&place, &["--set", "restart.policy=never"]);
    run.wait_until_ready();
    assert_eq!(of_verb(&place, "sim-lmcache").len(), 4);
    kill_engine(&place, "decoder1");
    wait_for("the end of its cache server", || {
        let left = [of_verb(&place, "sim-lmcache"), of_verb(&place, "sidecar")];
        if left.iter().all(|pids| pids.len() == 3) {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    });
    run.signal(Signal::SIGKILL);
    place.wait_until_empty();
    place.assert_no_listener();
    drop(run);

    let mut run = up(&place, &[]);
    run.wait_until_ready();
    run.signal(Signal::SIGKILL);
    // The shim and its monitor.
    of_verb(&place, "shim").into_iter().for_each(kill_process);
    wait_for("the end of what only its parent's death ends", || {
        let left = [of_verb(&place, "sim-lmcache"), of_verb(&place, "sidecar")];
        if left.iter().all(Vec::is_empty) {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    });
    // EngineCore and workers of simulated engines are nobody's then, as real ones.
    place.processes().into_iter().for_each(|(pid, _)| kill_process(pid));
}

#[test]
fn an_engine_whose_cache_server_cannot_start_fails_with_the_reason() {
    let place = Place::new();
    let (code, text) = up(&place, &["--set", "lmcache_mp.l1_size=1MiB"]).end();
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("size_gb must provide room for one chunk"), "{text}");
    // All four fail; the first one ends the run, and with it the others, perhaps before they have said so.
    let logs = ["prefiller1", "prefiller2", "decoder1", "decoder2"].map(|engine| place.log(&format!("{engine}.log")));
    let reason = "ended (exit code 1) before it listened on port";
    assert!(logs.iter().any(|log| log.contains(reason)), "{logs:?}");
    assert_eq!(place.processes(), []);
}

#[test]
fn engines_that_join_or_start_again_have_cache_servers_of_their_own() {
    let place = Place::new();
    let mut run = up(&place, &[]);
    run.wait_until_ready();
    let before = cache_server(&place, 2);
    for verb in [&["scale", "decode=3"][..], &["restart", "decoder1"]] {
        let output = place.run(verb);
        assert!(output.status.success(), "{}", text(&output));
    }
    assert_ne!(cache_server(&place, 2), before);
    let joined = cache_server(&place, 4);
    assert_eq!(of_verb(&place, "sim-lmcache").len(), 5);
    let output = place.run(&["scale", "decode=2"]);
    assert!(output.status.success(), "{}", text(&output));
    wait_for("the end of the cache server", || {
        let left = of_verb(&place, "sim-lmcache");
        if left.contains(&joined) {
            Err(format!("{left:?}"))
        } else {
            Ok(())
        }
    });
    assert_eq!(
        completion(place.proxy_port(), MODEL, "one two three"),
        place.alone(MODEL, "one two three")
    );
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    assert_eq!(place.processes(), []);
}

#[test]
fn the_proxy_alone_serves_such_engines() {
    let place = Place::new();
    let mut run = up(&place, &[]);
    run.wait_until_ready();
    let ports = |base: u16| format!("{},{}", base + place.offset, base + 1 + place.offset);
    let own_port = place.proxy_port() + 1;
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
    let key = place.engine_key();
    let mut command = place.command(&arguments);
    command.env("VLLM_API_KEY", &key);
    let mut proxy = Run::of(&place, command);
    proxy.wait_for_line("serving 2 prefill and 2 decode engines");
    let moved = || metric(7200 + place.offset, "vllm:nixl_bytes_transferred_sum", "");
    let before = moved();
    // Two decode engines take turns.
    let bearer = format!("Bearer {key}");
    let prompt = "a prompt for a proxy of its own";
    let answers = [(); 2].map(|()| completion_with(own_port, MODEL, prompt, 12, &[("authorization", &bearer)]));
    assert_eq!(answers, [(); 2].map(|()| completion(place.proxy_port(), MODEL, prompt)));
    assert!(moved() > before);
}

/// `xpyd sidecar` with these commands, and what is left of it.
fn sidecar(place: &Place, deadline: &str, commands: &[&str]) -> Output {
    let port = (6555 + place.offset).to_string();
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
    place.run(&[&flags, commands].concat())
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_sidecar_that_does_not_come_up_is_named_and_the_engine_never_starts() {
    let place = Place::new();
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
        let output = sidecar(&place, deadline, &[command, &engine].concat());
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output).contains(expected), "{}", text(&output));
        place.wait_until_empty();
    }
    assert!(!Path::new(&place.path().join("started")).exists());
}

#[test]
fn the_leader_becomes_the_engine() {
    let place = Place::new();
    let program = env!("CARGO_BIN_EXE_xpyd");
    let (port, http) = ((6555 + place.offset).to_string(), (8100 + place.offset).to_string());
    let server = [program, "sim-lmcache", "server", "--port", &port, "--http-port", &http];
    let server = [
        &server[..],
        &["--host", "127.0.0.1", "--l1-size-gb", "1", "--eviction-policy", "LRU"],
    ]
    .concat();
    let output = sidecar(
        &place,
        "1m",
        &[&server, &["--", "sh", "-c", "echo $$ $PPID; exit 7"][..]].concat(),
    );
    assert_eq!(output.status.code(), Some(7), "{}", text(&output));
    let pids = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        pids.trim_end().ends_with(&std::process::id().to_string()),
        "its parent is who started it: {pids}"
    );
    place.wait_until_empty();
}
