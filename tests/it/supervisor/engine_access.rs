//! Access to the engines of a run by key, and permissions of the files that a run writes.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use crate::support::{MODEL, Run, TestEnv, completion, completion_with, kill_engine, post_with};

/// Every file and folder below this folder.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = vec![folder.to_owned()];
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.is_symlink() {
            found.extend(files_below(&path));
        } else {
            found.push(path);
        }
    }
    found
}

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).expect("a file").permissions().mode() & 0o777
}

/// Whether the key check of an engine or a proxy accepts a request with these headers.
fn accepts(port: u16, headers: &[(&str, &str)]) -> bool {
    match post_with(port, "/v1/models", "{}", headers).0 {
        401 => false,
        // The route accepts no POST.
        405 => true,
        other => panic!("status {other}"),
    }
}

fn key_file(env: &TestEnv) -> PathBuf {
    env.path().join("xpyd/default/engine-key")
}

/// Checks that each engine accepts this key and no other.
fn assert_engines_require(key: &str, ports: &[u16]) {
    let bearer = format!("Bearer {key}");
    for port in ports {
        assert!(!accepts(*port, &[]), "{port}");
        assert!(!accepts(*port, &[("authorization", "Bearer swordfish")]), "{port}");
        assert!(accepts(*port, &[("authorization", &bearer)]), "{port}");
    }
}

#[test]
fn engines_accept_only_xpyds_key() {
    let env = TestEnv::new();
    let profile = [
        "--profile",
        "1p1d",
        "--set",
        "deadlines.keep=1m",
        "--set",
        "restart.backoff=10ms",
    ];
    let mut run = env.up(&profile);
    run.wait_until_ready();
    let ports = [7100, 7200, 7201].map(|base| base + env.offset);
    let key = env.engine_key();
    assert!(key.len() > 32, "128 bits in hexadecimal, and a prefix");
    assert_eq!(mode(&key_file(&env)), 0o600);
    assert_engines_require(&key, &ports[..2]);
    // A client of the proxy needs no key. A client with another key is served as well.
    let answer = completion(env.proxy_port(), MODEL, "one two");
    let sent = [("authorization", "Bearer of-a-client")];
    assert_eq!(completion_with(env.proxy_port(), MODEL, "one two", 12, &sent), answer);
    // xpyd prints where the key is.
    let status = String::from_utf8(env.run(&["status"]).stdout).expect("text");
    assert!(status.contains(&key_file(&env).display().to_string()), "{status}");
    assert!(!status.contains(&key), "{status}");
    let json: serde_json::Value = serde_json::from_slice(&env.run(&["status", "--json"]).stdout).expect("JSON");
    assert_eq!(json["run"]["engine_key_file"], key_file(&env).display().to_string());
    // The key is on no command line and in no other file.
    let processes = env.processes();
    assert!(processes.len() >= 5, "xpyd, its shim and engines: {processes:#?}");
    assert!(processes.iter().all(|(_, command)| !command.contains(&key)));
    let with_it = files_below(env.path())
        .into_iter()
        .filter(|path| std::fs::read(path).is_ok_and(|content| String::from_utf8_lossy(&content).contains(&key)));
    assert_eq!(with_it.collect::<Vec<_>>(), [key_file(&env)]);
    // A restarted engine and an added one require the same key.
    kill_engine(&env, "decoder1");
    run.wait_for_line("decoder1 serves again");
    let scaled = env.run(&["scale", "decode=2"]);
    assert_eq!(scaled.status.code(), Some(0), "{scaled:?}");
    assert_engines_require(&key, &ports);
    // So do the engines after another xpyd attached.
    run.kill();
    assert_eq!(env.engine_key(), key);
    let attached = [&profile[..], &["--set", "decode.count=2"]].concat();
    let mut run = env.up(&attached);
    run.wait_until_ready();
    assert_eq!(env.engine_key(), key);
    assert_engines_require(&key, &ports);
    assert_eq!(completion(env.proxy_port(), MODEL, "one two"), answer);
    let left = env.run(&["down", "--keep-engines"]);
    assert_eq!(left.status.code(), Some(0), "{left:?}");
    run.end();
    assert_engines_require(&env.engine_key(), &ports);
    assert_eq!(env.run(&["down"]).status.code(), Some(0));
    assert!(!key_file(&env).exists(), "it goes with the engines");
    env.wait_until_empty();
}

#[test]
fn client_keys_are_not_in_engine_environments() {
    let env = TestEnv::new();
    let arguments = env.up_arguments(&["--profile", "1p1d"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut command = env.command(&arguments);
    command.env("XPYD_API_KEY", "swordfish");
    let mut run = Run::start_command(&env, command);
    run.wait_until_ready();
    assert!(accepts(env.proxy_port(), &[("authorization", "Bearer swordfish")]));
    assert!(!accepts(env.proxy_port(), &[]));
    let others = env.processes().into_iter().filter(|(pid, _)| *pid != run.pid());
    let environments: Vec<String> = others
        .map(|(pid, _)| std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default())
        .map(|environment| String::from_utf8_lossy(&environment).into_owned())
        .collect();
    assert!(environments.len() >= 4, "shim, its monitor and two engines");
    assert!(
        environments
            .iter()
            .all(|environment| !environment.contains("swordfish"))
    );
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0);
}

#[test]
fn a_user_key_protects_all_engines_and_empty_opens_them() {
    for (settings, are_open) in [
        // Only one role has a configured key. The other role must not be open.
        (&["decode.args=[\"--api-key\", \"swordfish\"]"][..], [false, false]),
        (
            &["prefill.env={VLLM_API_KEY=\"\"}", "decode.env={VLLM_API_KEY=\"\"}"],
            [true, true],
        ),
        // Engines check the clients' keys here, so xpyd gives them none.
        (&["proxy.guard.pass_key_through=true"], [true, true]),
    ] {
        let env = TestEnv::new();
        let mut more = vec!["--profile", "1p1d"];
        more.extend(settings.iter().flat_map(|setting| ["--set", *setting]));
        let mut run = env.up(&more);
        run.wait_until_ready();
        assert!(!key_file(&env).exists(), "{settings:?}");
        let ports = [7100, 7200].map(|base| base + env.offset);
        assert_eq!(ports.map(|port| accepts(port, &[])), are_open, "{settings:?}");
        run.signal(Signal::SIGINT);
        assert_eq!(run.end().0, 0);
    }
}

#[test]
fn files_of_a_run_are_private_and_without_secrets() {
    let env = TestEnv::new();
    std::fs::write(env.path().join("keys"), "swordfish\n").expect("a file");
    std::fs::set_permissions(env.path().join("keys"), std::fs::Permissions::from_mode(0o644)).expect("a file");
    let mut more = vec![
        "--profile",
        "1p1d",
        "--api-key-file",
        "keys",
        "--access-log",
        "access.log",
    ];
    for setting in [
        "decode.env={DB_URL=\"postgres://me:swordfish@db/x\"}",
        "proxy.traces.otlp_endpoint=\"http://me:swordfish@127.0.0.1:9/v1/traces?token=swordfish\"",
        "restart.backoff=10ms",
    ] {
        more.extend(["--set", setting]);
    }
    let mut run = env.up(&more);
    run.wait_until_ready();
    let printed = run.seen.join("\n");
    assert!(
        printed.contains("others can read") && printed.contains("chmod 600 keys"),
        "{printed}"
    );
    kill_engine(&env, "decoder1");
    run.wait_for_line("decoder1 serves again");
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0);
    let [logs, access] = ["logs", "access.log"].map(|name| env.path().join(name));
    let written = [files_below(&logs), vec![access]].concat();
    assert!(written.iter().any(|path| path.ends_with("plan.json")), "{written:?}");
    for path in written.iter().filter(|path| !path.is_symlink()) {
        let wanted = if path.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(mode(path), wanted, "{}", path.display());
        let text = String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
        assert!(!text.contains("swordfish"), "{} holds a secret", path.display());
    }
}
