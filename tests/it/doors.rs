//! Who gets in at the engines of a run, and who can read what a run writes.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use crate::support::{Place, Run, completion, completion_with, kill_engine, post_with};

const MODEL: &str = "meta-llama/Llama-3.1-8B-Instruct";

/// Every file and folder below this one.
fn below(folder: &Path) -> Vec<PathBuf> {
    let mut found = vec![folder.to_owned()];
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.is_symlink() {
            found.extend(below(&path));
        } else {
            found.push(path);
        }
    }
    found
}

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).expect("a file").permissions().mode() & 0o777
}

/// Whether a request with these headers gets past the keys of an engine or a proxy.
fn lets_in(port: u16, headers: &[(&str, &str)]) -> bool {
    match post_with(port, "/v1/models", "{}", headers).0 {
        401 => false,
        // That route takes no POST.
        405 => true,
        other => panic!("status {other}"),
    }
}

fn key_file(place: &Place) -> PathBuf {
    place.path().join("xpyd/default/engine-key")
}

/// Each of the engines wants this key, and lets nobody else in.
fn assert_they_want(key: &str, ports: &[u16]) {
    let bearer = format!("Bearer {key}");
    for port in ports {
        assert!(!lets_in(*port, &[]), "{port}");
        assert!(!lets_in(*port, &[("authorization", "Bearer swordfish")]), "{port}");
        assert!(lets_in(*port, &[("authorization", &bearer)]), "{port}");
    }
}

#[test]
fn engines_take_requests_from_xpyd_and_its_operator_only() {
    let place = Place::new();
    let profile = [
        "--profile",
        "1p1d",
        "--set",
        "deadlines.keep=1m",
        "--set",
        "restart.backoff=10ms",
    ];
    let mut run = place.up(&profile);
    run.wait_until_ready();
    let ports = [7100, 7200, 7201].map(|base| base + place.offset);
    let key = place.engine_key();
    assert!(key.len() > 32, "128 bits in hexadecimal, and a prefix");
    assert_eq!(mode(&key_file(&place)), 0o600);
    assert_they_want(&key, &ports[..2]);
    // A client of the proxy needs no key, and one that sends another gets an answer all the same.
    let answer = completion(place.proxy_port(), MODEL, "one two");
    let sent = [("authorization", "Bearer of-a-client")];
    assert_eq!(completion_with(place.proxy_port(), MODEL, "one two", 12, &sent), answer);
    // Its operator is told where it is.
    let status = String::from_utf8(place.run(&["status"]).stdout).expect("text");
    assert!(status.contains(&key_file(&place).display().to_string()), "{status}");
    assert!(!status.contains(&key), "{status}");
    let json: serde_json::Value = serde_json::from_slice(&place.run(&["status", "--json"]).stdout).expect("JSON");
    assert_eq!(json["run"]["engine_key_file"], key_file(&place).display().to_string());
    // It is on no command line and in no other file.
    assert!(place.processes().iter().all(|(_, command)| !command.contains(&key)));
    let with_it = below(place.path())
        .into_iter()
        .filter(|path| std::fs::read(path).is_ok_and(|content| String::from_utf8_lossy(&content).contains(&key)));
    assert_eq!(with_it.collect::<Vec<_>>(), [key_file(&place)]);
    // A restarted engine and one that joins want the same key.
    kill_engine(&place, "decoder1");
    run.wait_for_line("decoder1 serves again");
    let scaled = place.run(&["scale", "decode=2"]);
    assert_eq!(scaled.status.code(), Some(0), "{scaled:?}");
    assert_they_want(&key, &ports);
    // So do those that the next xpyd finds.
    run.kill();
    assert_eq!(place.engine_key(), key);
    let attached = [&profile[..], &["--set", "decode.count=2"]].concat();
    let mut run = place.up(&attached);
    run.wait_until_ready();
    assert_eq!(place.engine_key(), key);
    assert_they_want(&key, &ports);
    assert_eq!(completion(place.proxy_port(), MODEL, "one two"), answer);
    let left = place.run(&["down", "--keep-engines"]);
    assert_eq!(left.status.code(), Some(0), "{left:?}");
    run.end();
    assert_they_want(&place.engine_key(), &ports);
    assert_eq!(place.run(&["down"]).status.code(), Some(0));
    assert!(!key_file(&place).exists(), "it goes with the engines");
    place.wait_until_empty();
}

#[test]
fn engines_know_no_key_of_a_client() {
    let place = Place::new();
    let arguments = place.up_arguments(&["--profile", "1p1d"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut command = place.command(&arguments);
    command.env("XPYD_API_KEY", "swordfish");
    let mut run = Run::of(&place, command);
    run.wait_until_ready();
    assert!(lets_in(place.proxy_port(), &[("authorization", "Bearer swordfish")]));
    assert!(!lets_in(place.proxy_port(), &[]));
    let others = place.processes().into_iter().filter(|(pid, _)| *pid != run.pid());
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
fn a_key_of_the_user_is_that_of_all_engines_and_an_empty_one_opens_them() {
    for (settings, are_open) in [
        // Only one role was given a key; the other one must be no way around it.
        (&["decode.args=[\"--api-key\", \"swordfish\"]"][..], [false, false]),
        (
            &["prefill.env={VLLM_API_KEY=\"\"}", "decode.env={VLLM_API_KEY=\"\"}"],
            [true, true],
        ),
        // Engines shall see the keys of clients, so they have none of their own.
        (&["proxy.guard.pass_key_through=true"], [true, true]),
    ] {
        let place = Place::new();
        let mut more = vec!["--profile", "1p1d"];
        more.extend(settings.iter().flat_map(|setting| ["--set", *setting]));
        let mut run = place.up(&more);
        run.wait_until_ready();
        assert!(!key_file(&place).exists(), "{settings:?}");
        let ports = [7100, 7200].map(|base| base + place.offset);
        assert_eq!(ports.map(|port| lets_in(port, &[])), are_open, "{settings:?}");
        run.signal(Signal::SIGINT);
        assert_eq!(run.end().0, 0);
    }
}

#[test]
fn what_a_run_writes_is_its_users_own_and_holds_no_secret() {
    let place = Place::new();
    std::fs::write(place.path().join("keys"), "swordfish\n").expect("a file");
    std::fs::set_permissions(place.path().join("keys"), std::fs::Permissions::from_mode(0o644)).expect("a file");
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
    let mut run = place.up(&more);
    run.wait_until_ready();
    let printed = run.seen.join("\n");
    assert!(
        printed.contains("others can read") && printed.contains("chmod 600 keys"),
        "{printed}"
    );
    kill_engine(&place, "decoder1");
    run.wait_for_line("decoder1 serves again");
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0);
    let [logs, access] = ["logs", "access.log"].map(|name| place.path().join(name));
    let written = [below(&logs), vec![access]].concat();
    assert!(written.iter().any(|path| path.ends_with("plan.json")), "{written:?}");
    for path in written.iter().filter(|path| !path.is_symlink()) {
        let wanted = if path.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(mode(path), wanted, "{}", path.display());
        let text = String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
        assert!(!text.contains("swordfish"), "{} holds a secret", path.display());
    }
}
