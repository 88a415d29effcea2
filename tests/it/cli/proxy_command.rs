//! `xpyd proxy` over engines that the test starts, with the flags of LMCache's `disagg_proxy_server.py`.

use std::process::Stdio;

use nix::sys::signal::{Signal, kill};

use crate::support::{MODEL, Run, TestEnv, Unsupervised, completion, post, wait_for};

/// Starts the engines with the command lines of a plan, and waits until they are ready.
pub(super) fn start_engines(env: &TestEnv, profile: &str) -> Vec<Unsupervised> {
    start_changed_engines(env, profile, str::to_owned)
}

/// The same, with words of the command lines replaced.
fn start_changed_engines(env: &TestEnv, profile: &str, change: impl Fn(&str) -> String) -> Vec<Unsupervised> {
    let offset = format!("port_offset={}", env.offset);
    let output = env.run(&[
        "plan",
        "--json",
        "--engine",
        "sim",
        "--profile",
        profile,
        "--set",
        "sim.preset=instant",
        "--set",
        &offset,
    ]);
    let printed: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a plan");
    let plan = &printed["plan"];
    let folder = env.path().join(plan["run_dir"].as_str().expect("a folder"));
    std::fs::create_dir_all(&folder).expect("a folder");
    let engines = plan["engines"].as_array().expect("engines").iter();
    for file in engines.filter_map(|engine| engine.get("file")) {
        let name = file["path"].as_str().expect("a name");
        std::fs::write(folder.join(name), file["content"].as_str().expect("a text")).expect("a file");
    }
    let mut engines = Vec::new();
    for engine in plan["engines"].as_array().expect("engines") {
        let words: Vec<String> = engine["argv"]
            .as_array()
            .expect("words")
            .iter()
            .filter_map(|word| word.as_str().map(&change))
            .collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut command = env.command(&words[1..]);
        for (name, value) in engine["env"].as_object().expect("variables") {
            command.env(name, value.as_str().expect("a text"));
        }
        command.stdout(Stdio::null()).stderr(Stdio::null());
        engines.push(Unsupervised::start(&mut command));
        let port = u16::try_from(engine["endpoint"]["port"].as_u64().expect("a port")).expect("a port");
        wait_for("an engine", || {
            std::net::TcpStream::connect(("127.0.0.1", port))
                .map(drop)
                .map_err(|error| format!("{port}: {error}"))
        });
    }
    engines
}

#[test]
fn xpyd_proxy_serves_over_lmcache_until_sigterm() {
    let env = TestEnv::new();
    let engines = start_engines(&env, "2p2d");
    let port = |base: u16| (base + env.offset).to_string();
    let pair = |base: u16| format!("{},{}", base + env.offset, base + env.offset + 1);
    let mut proxy = Run::start(
        &env,
        &[
            "proxy",
            "--port",
            &port(9100),
            "--prefiller-host",
            "127.0.0.1",
            "--prefiller-port",
            &pair(7100),
            "--decoder-host",
            "127.0.0.1",
            "--decoder-port",
            &pair(7200),
            "--decoder-init-port",
            &port(7300),
            "--decoder-alloc-port",
            &port(7400),
            "--proxy-host",
            "127.0.0.1",
            "--proxy-port",
            &port(7500),
        ],
    );
    proxy.wait_for_line(&port(9100));
    for prompt in ["one", "two and three", "four"] {
        let through = completion(env.proxy_port(), MODEL, prompt);
        assert_eq!(through, completion(7200 + env.offset, MODEL, prompt), "{prompt}");
    }
    let metrics = crate::support::get(env.proxy_port(), "/metrics");
    assert!(
        metrics.contains("xpyd_handoff_total{outcome=\"transferred\"} 3\n"),
        "{metrics}"
    );
    proxy.signal(Signal::SIGTERM);
    let (code, text) = proxy.end();
    assert_eq!(code, 0, "{text}");
    drop(engines);
    env.wait_until_empty();
}

#[test]
fn xpyd_proxy_names_engines_that_do_not_answer() {
    let env = TestEnv::new();
    let port = |base: u16| (base + env.offset).to_string();
    let ports = [
        "--port",
        &port(9100),
        "--prefiller-port",
        &port(7100),
        "--decoder-port",
        &port(7200),
    ];
    let mut proxy = Run::start(&env, &[&["proxy", "--connector", "nixl"][..], &ports].concat());
    for (engine, base) in [("prefiller1", 7100), ("decoder1", 7200)] {
        let line = proxy.wait_for_line("does not answer `/health`");
        assert!(
            line.contains(&format!("warn  {engine} at ")) && line.contains(&port(base)),
            "{line}"
        );
    }
    proxy.signal(Signal::SIGTERM);
    assert_eq!(proxy.end().0, 0);
}

/// The text of a streamed greedy completion.
fn streamed(port: u16, prompt: &str) -> String {
    let body =
        serde_json::json!({"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 12, "stream": true});
    let (status, text) = post(port, "/v1/completions", &body.to_string());
    assert_eq!(status, 200, "{text}");
    let events = text
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .filter(|data| *data != "[DONE]");
    let texts = events.map(|data| serde_json::from_str::<serde_json::Value>(data).expect("JSON"));
    texts
        .filter_map(|event| Some(event["choices"][0]["text"].as_str()?.to_owned()))
        .collect()
}

/// A decode engine hangs for longer than the prefill engine's KV lease. Then it reads reused blocks and answers 200 with a
/// wrong text. Only the elapsed time shows the error.
#[test]
fn output_from_expired_kv_is_never_returned() {
    let env = TestEnv::new();
    let lease = |word: &str| {
        let seconds = word.find("\"kv_lease_duration\":").map(|at| at + 20);
        seconds.map_or_else(
            || word.to_owned(),
            |at| {
                let rest = word[at..].trim_start_matches(|digit: char| digit.is_ascii_digit());
                format!("{}8{rest}", &word[..at])
            },
        )
    };
    let engines = start_changed_engines(&env, "2p2d-nixl", lease);
    let port = |base: u16| (base + env.offset).to_string();
    let mut proxy = Run::start(
        &env,
        &[
            "proxy",
            "--connector",
            "nixl",
            "--kv-lease",
            "8s",
            "--port",
            &port(9100),
            "--prefiller-port",
            &port(7100),
            "--decoder-port",
            &port(7200),
        ],
    );
    proxy.wait_for_line(&port(9100));
    let expired = || {
        let metrics = crate::support::get(7100 + env.offset, "/metrics");
        let line = metrics
            .lines()
            .find(|line| line.starts_with("vllm:nixl_num_kv_expired_reqs_total"));
        let count = line.and_then(|line| line.rsplit(' ').next()).unwrap_or("0").to_owned();
        count.parse::<f64>().expect("a number")
    };
    let alone = completion(7200 + env.offset, MODEL, "a text to continue");
    let decoder = engines[2].pid();
    for already in [0.0, 1.0] {
        kill(decoder, Signal::SIGSTOP).expect("stopped");
        let (proxy_port, streams) = (env.proxy_port(), already > 0.5);
        let asking = std::thread::spawn(move || {
            if streams {
                streamed(proxy_port, "a text to continue")
            } else {
                completion(proxy_port, MODEL, "a text to continue")
            }
        });
        wait_for("the end of the lease", || {
            let count = expired();
            if count > already {
                Ok(())
            } else {
                Err(format!("{count} leases ended"))
            }
        });
        kill(decoder, Signal::SIGCONT).expect("continued");
        assert_eq!(asking.join().expect("an answer"), alone, "streams: {streams}");
    }
    let metrics = crate::support::get(env.proxy_port(), "/metrics");
    assert!(metrics.contains("xpyd_kv_leases_outlived_total 2\n"), "{metrics}");
    proxy.signal(Signal::SIGTERM);
    let (code, text) = proxy.end();
    assert_eq!(code, 0, "{text}");
    drop(engines);
    env.wait_until_empty();
}

#[test]
fn flag_lists_of_unequal_length_are_refused() {
    let env = TestEnv::new();
    let output = env.run(&[
        "proxy",
        "--prefiller-host",
        "a,b",
        "--prefiller-port",
        "1,2,3",
        "--decoder-host",
        "c",
        "--decoder-port",
        "4",
    ]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(
        text.contains("--prefiller-host") && text.contains("--prefiller-port"),
        "{text}"
    );
}
