//! `xpyd proxy` alone, over engines that somebody else started, with the flags of LMCache's `disagg_proxy_server.py`.

use std::process::Stdio;

use nix::sys::signal::Signal;

use crate::support::{Place, Run, Unsupervised, completion, wait_for};

const MODEL: &str = "meta-llama/Llama-3.1-8B-Instruct";

/// Starts the engines of a plan by its own command lines, and waits until they are up.
fn start_engines(place: &Place, profile: &str) -> Vec<Unsupervised> {
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
    for file in plan["files"].as_array().expect("files") {
        let name = file["path"].as_str().expect("a name");
        std::fs::write(folder.join(name), file["content"].as_str().expect("a text")).expect("a file");
    }
    let mut engines = Vec::new();
    for engine in plan["engines"].as_array().expect("engines") {
        let words: Vec<&str> = engine["argv"]
            .as_array()
            .expect("words")
            .iter()
            .filter_map(|word| word.as_str())
            .collect();
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
