//! `xpyd proxy --discover`: engines that come and go.

use nix::sys::signal::Signal;

use super::proxy_command::start_engines;
use crate::support::{MODEL, Run, TestEnv, completion, status_of, wait_for};

const FILE: &str = "endpoints.yaml";

/// Replaces the list of engines, as llm-d wants it: by a rename.
fn list(env: &TestEnv, engines: &[(&str, &str, u16)]) {
    let entry = |(name, role, port): &(&str, &str, u16)| {
        format!(
            "  - {{name: {name}, address: 127.0.0.1, port: \"{}\", labels: {{llm-d.ai/role: {role}}}}}\n",
            port + env.offset
        )
    };
    let text = format!("endpoints:\n{}", engines.iter().map(entry).collect::<String>());
    let new = env.path().join("new.yaml");
    std::fs::write(&new, text).expect("a file");
    std::fs::rename(new, env.path().join(FILE)).expect("a file");
}

fn start(env: &TestEnv) -> Run<'_> {
    let (port, source) = (env.proxy_port().to_string(), format!("file:{FILE}"));
    let line = [
        "proxy",
        "--connector",
        "nixl",
        "--port",
        &port,
        "--discover",
        &source,
        "--access-log",
        "access.jsonl",
    ];
    let mut proxy = Run::start(env, &line);
    proxy.wait_for_line("serving the engines of");
    proxy
}

fn ready(env: &TestEnv) -> u16 {
    status_of(env.proxy_port(), "/ready")
}

#[test]
fn engines_serve_after_a_canary_and_leave_after_their_requests() {
    let env = TestEnv::new();
    let _engines = start_engines(&env, "2p2d-nixl");
    let mut proxy = start(&env);
    proxy.wait_for_line("cannot read the engines");
    assert_eq!(ready(&env), 503);
    list(&env, &[("p1", "prefill", 7100), ("d1", "decode", 7200)]);
    proxy.wait_for_line("d1 serves");
    wait_for("readiness", || {
        if ready(&env) == 200 { Ok(()) } else { Err(String::new()) }
    });
    let alone = completion(7200 + env.offset, MODEL, "found");
    assert_eq!(completion(env.proxy_port(), MODEL, "found"), alone);
    // Nothing listens on the port of d3.
    let more = [
        ("p1", "prefill", 7100),
        ("d1", "decode", 7200),
        ("d2", "decode", 7201),
        ("d3", "decode", 7209),
    ];
    list(&env, &more);
    proxy.wait_for_line("d3 gets no requests yet");
    wait_for("requests on both", || {
        assert_eq!(completion(env.proxy_port(), MODEL, "found"), alone);
        let log = std::fs::read_to_string(env.path().join("access.jsonl")).unwrap_or_default();
        let seen = |engine: &str| log.contains(&format!("\"{engine}\""));
        assert!(!seen("d3"), "{log}");
        if seen("d1") && seen("d2") { Ok(()) } else { Err(log) }
    });
    list(&env, &[("p1", "prefill", 7100), ("d2", "decode", 7201)]);
    proxy.wait_for_line("d1 left");
    assert_eq!(completion(env.proxy_port(), MODEL, "found"), alone);
    std::fs::write(env.path().join(FILE), "endpoints: [").expect("a file");
    proxy.wait_for_line("cannot read the engines");
    assert_eq!(
        completion(env.proxy_port(), MODEL, "found"),
        alone,
        "the known engines go on"
    );
    proxy.signal(Signal::SIGTERM);
    assert_eq!(proxy.end().0, 0);
}

#[test]
fn a_name_stands_for_the_engines_at_its_addresses() {
    let env = TestEnv::new();
    let _engines = start_engines(&env, "1p1d-nixl");
    let [port, prefill, decode] = [9100, 7100, 7200].map(|base: u16| base + env.offset);
    let source = format!("dns:prefill=127.0.0.1:{prefill},decode=127.0.0.1:{decode}");
    let port = port.to_string();
    let mut proxy = Run::start(
        &env,
        &["proxy", "--connector", "nixl", "--port", &port, "--discover", &source],
    );
    proxy.wait_for_line("decode-127.0.0.1 serves");
    let alone = completion(decode, MODEL, "found");
    wait_for("readiness", || {
        if ready(&env) == 200 { Ok(()) } else { Err(String::new()) }
    });
    assert_eq!(completion(env.proxy_port(), MODEL, "found"), alone);
    proxy.signal(Signal::SIGTERM);
    assert_eq!(proxy.end().0, 0);
}

#[test]
fn a_fleet_can_be_found_by_its_own_list() {
    let env = TestEnv::new();
    let mut run = env.up(&["--profile", "1p1d", "--connector", "nixl", "--write-endpoints", FILE]);
    run.wait_until_ready();
    let text = wait_for("the list", || {
        let text = std::fs::read_to_string(env.path().join(FILE)).unwrap_or_default();
        if text.contains("decoder1") { Ok(text) } else { Err(text) }
    });
    let listed = text
        .replace(&(7100 + env.offset).to_string(), "7100")
        .replace(&(7200 + env.offset).to_string(), "7200");
    insta::assert_snapshot!(listed, @r#"
    endpoints:
      - name: prefiller1
        address: "127.0.0.1"
        port: "7100"
        labels: {llm-d.ai/role: prefill}
      - name: decoder1
        address: "127.0.0.1"
        port: "7200"
        labels: {llm-d.ai/role: decode}
    "#);
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0);
    assert!(!env.path().join(FILE).exists(), "no engine is left");
}
