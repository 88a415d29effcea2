//! `xpyd proxy` alone, over engines that somebody else started, with the flags of LMCache's `disagg_proxy_server.py`.

use std::process::Stdio;

use nix::sys::signal::{Signal, kill};

use crate::support::{Place, Run, Unsupervised, completion, post, wait_for};

const MODEL: &str = "meta-llama/Llama-3.1-8B-Instruct";

/// Starts the engines of a plan by its own command lines, and waits until they are up.
fn start_engines(place: &Place, profile: &str) -> Vec<Unsupervised> {
    start_changed_engines(place, profile, str::to_owned)
}

/// The same with other words in the command lines.
fn start_changed_engines(place: &Place, profile: &str, change: impl Fn(&str) -> String) -> Vec<Unsupervised> {
    let offset = format!("port_offset={}", place.offset);
    let output = place.run(&[
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
    let folder = place.path().join(plan["run_dir"].as_str().expect("a folder"));
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
        let mut command = place.command(&words[1..]);
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
fn a_proxy_of_its_own_serves_engines_over_lmcache_and_stops_on_sigterm() {
    let place = Place::new();
    let engines = start_engines(&place, "2p2d");
    let port = |base: u16| (base + place.offset).to_string();
    let pair = |base: u16| format!("{},{}", base + place.offset, base + place.offset + 1);
    let mut proxy = Run::start(
        &place,
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
        let through = completion(place.proxy_port(), MODEL, prompt);
        assert_eq!(through, completion(7200 + place.offset, MODEL, prompt), "{prompt}");
    }
    let metrics = crate::support::get(place.proxy_port(), "/metrics");
    assert!(
        metrics.contains("xpyd_handoff_total{outcome=\"transferred\"} 3"),
        "{metrics}"
    );
    proxy.signal(Signal::SIGTERM);
    let (code, text) = proxy.end();
    assert_eq!(code, 0, "{text}");
    drop(engines);
    place.wait_until_empty();
}

/// The text of a greedy completion that comes as events.
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

/// A decode engine stands still for longer than the prefill engine keeps KV. It then reads blocks of nobody, answers 200
/// with another text, and nothing but the time says so.
#[test]
fn a_text_made_of_kv_that_outlived_its_lease_reaches_no_client() {
    let place = Place::new();
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
    let engines = start_changed_engines(&place, "2p2d-nixl", lease);
    let port = |base: u16| (base + place.offset).to_string();
    let mut proxy = Run::start(
        &place,
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
        let metrics = crate::support::get(7100 + place.offset, "/metrics");
        let line = metrics
            .lines()
            .find(|line| line.starts_with("vllm:nixl_num_kv_expired_reqs_total"));
        let count = line.and_then(|line| line.rsplit(' ').next()).unwrap_or("0").to_owned();
        count.parse::<f64>().expect("a number")
    };
    let alone = completion(7200 + place.offset, MODEL, "a text to continue");
    let decoder = engines[2].pid();
    for already in [0.0, 1.0] {
        kill(decoder, Signal::SIGSTOP).expect("stopped");
        let (proxy_port, streams) = (place.proxy_port(), already > 0.5);
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
    let metrics = crate::support::get(place.proxy_port(), "/metrics");
    assert!(metrics.contains("xpyd_kv_leases_outlived_total 2"), "{metrics}");
    proxy.signal(Signal::SIGTERM);
    let (code, text) = proxy.end();
    assert_eq!(code, 0, "{text}");
    drop(engines);
    place.wait_until_empty();
}

#[test]
fn lists_of_unequal_length_are_refused_with_their_flags() {
    let place = Place::new();
    let output = place.run(&[
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
