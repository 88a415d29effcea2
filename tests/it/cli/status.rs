//! `xpyd status`: one run of several, over the raw socket, and `--watch` from the start of a run to its end.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;

use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::{DEADLINE, Run, TestEnv, wait_for};

const SMALL: [&str; 2] = ["--profile", "1p1d"];

/// The output of `xpyd status --json`.
fn status(env: &TestEnv, name: &str) -> Value {
    let output = env.run(&["status", "--json", "--name", name]);
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Every JSON object in the output.
fn objects(lines: &[String]) -> Vec<Value> {
    let json = lines.iter().filter(|line| line.starts_with('{'));
    json.map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[test]
fn start_progress_uses_the_last_start_and_never_drops() {
    let env = TestEnv::new();
    let slow = [SMALL.as_slice(), &["--set", "sim.faults=[\"slow-start=2s\"]"]].concat();
    // The file is no JSON, which must not fail the start.
    let kept = env.path().join("state/xpyd/starts.json");
    std::fs::create_dir_all(kept.parent().expect("a folder")).expect("a folder");
    std::fs::write(&kept, "{").expect("a file");
    let mut first = env.up(&slow);
    let line = first.wait_for_line("started: ");
    assert!(
        line.starts_with("started: prefiller1 ") && line.contains(", decoder1 "),
        "{line}"
    );
    first.wait_until_ready();
    assert!(
        !first.seen.iter().any(|line| line.contains(" left)")),
        "{:?}",
        first.seen
    );
    first.signal(Signal::SIGINT);
    first.end();
    let starts: Value = serde_json::from_slice(&std::fs::read(&kept).expect("a file")).expect("JSON");
    assert_eq!(starts.as_array().map(Vec::len), Some(2), "{starts}");

    let mut second = env.up(&slow);
    second.wait_for_line("logs in");
    let mut watch = Run::start(&env, &["status", "--watch", "0.1", "--json"]);
    second.wait_for_line(" left)");
    watch.wait_for_line("\"stage\":\"ready\"");
    second.signal(Signal::SIGINT);
    second.end();
    let (code, text) = watch.end();
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("nothing of it is left"), "{text}");
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let (mut highest, mut has_estimate) = (0, false);
    for object in objects(&lines) {
        let engine = &object["engines"][0];
        has_estimate |= engine["eta_seconds"].as_u64().is_some_and(|seconds| seconds > 0);
        if let Some(percent) = engine["percent"].as_u64() {
            assert!(percent >= highest, "{text}");
            assert_eq!(percent == 100, engine["state"] == "ready", "{text}");
            highest = percent;
        }
    }
    assert!(has_estimate && highest == 100, "{text}");
}

#[test]
fn status_watch_prints_changes_and_ends_with_the_run() {
    let env = TestEnv::new();
    let mut run = env.up(&SMALL);
    run.wait_for_line("logs in");
    let mut watch = Run::start(&env, &["status", "--watch", "0.1"]);
    run.wait_until_ready();
    watch.wait_for_line("run `default` is ready: http://127.0.0.1:");
    watch.wait_for_line("decoder1 is ready");
    let left_early = Run::start(&env, &["status", "--watch"]);
    run.signal(Signal::SIGKILL);
    let (code, text) = watch.end();
    assert_eq!(code, 1, "{text}");
    assert!(
        text.contains("has ended without recording how") && text.contains("hint: "),
        "{text}"
    );
    assert_eq!(text.matches("decoder1 is ready").count(), 1, "{text}");
    left_early.end();
    env.wait_until_empty();
    let (code, text) = Run::start(&env, &["status", "--watch"]).end();
    assert_eq!(code, 8, "{text}");
}

#[test]
fn ctrl_c_ends_the_watch_and_restores_the_terminal() {
    let env = TestEnv::new();
    let mut run = env.up(&SMALL);
    run.wait_until_ready();
    let size = Winsize {
        ws_row: 6,
        ws_col: 60,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let terminal = openpty(&size, None).expect("a terminal");
    let mut watch = env
        .command(&["status", "--watch", "0.1"])
        .env("TERM", "xterm")
        .stdout(Stdio::from(terminal.slave))
        .stderr(Stdio::null())
        .spawn()
        .expect("xpyd starts");
    let mut screen = std::fs::File::from(terminal.master);
    let mut drawn = Vec::new();
    let mut buffer = [0; 4096];
    while String::from_utf8_lossy(&drawn).matches("is ready").count() < 3 {
        let count = screen.read(&mut buffer).expect("a picture");
        drawn.extend_from_slice(&buffer[..count]);
    }
    kill(Pid::from_raw(i32::try_from(watch.id()).expect("a pid")), Signal::SIGINT).expect("the process exists");
    // Linux reports the end of a pseudo-terminal as EIO.
    while let Ok(count) = screen.read(&mut buffer) {
        drawn.extend_from_slice(&buffer[..count]);
    }
    assert_eq!(watch.wait().expect("an end").code(), Some(0));
    let drawn = String::from_utf8_lossy(&drawn);
    assert!(
        drawn.starts_with("\u{1b}[?1049h") && drawn.ends_with("\u{1b}[?1049l"),
        "{drawn:?}"
    );
    assert!(
        drawn.split("\u{1b}[H").all(|picture| picture.lines().count() <= 6),
        "{drawn:?}"
    );
}

#[test]
fn runs_are_selected_by_name() {
    let (env, other) = (TestEnv::new(), TestEnv::new());
    let mut first = env.up(&SMALL);
    let offset = format!("port_offset={}", other.offset);
    let mut second = env.up(&[SMALL.as_slice(), &["--name", "second", "--set", &offset]].concat());
    first.wait_until_ready();
    second.wait_until_ready();
    for (name, offset) in [("default", env.offset), ("second", other.offset)] {
        let status = status(&env, name);
        assert_eq!(status["run"]["name"], name);
        assert_eq!(status["engines"][0]["port"], 7100 + offset, "{status}");
    }
    assert_eq!(env.run(&["down", "--name", "second"]).status.code(), Some(0));
    assert_eq!(second.end().0, 0);
    assert_eq!(env.run(&["status", "--name", "second"]).status.code(), Some(8));
    assert_eq!(status(&env, "default")["stage"], "ready");
    first.signal(Signal::SIGINT);
    first.end();
}

#[test]
fn the_control_socket_serves_plain_http() {
    let env = TestEnv::new();
    let mut run = env.up(&SMALL);
    run.wait_until_ready();
    let socket = status(&env, "default")["run"]["control_socket"]
        .as_str()
        .expect("a path")
        .to_owned();
    // The same request as `curl --unix-socket`.
    let ask = |method: &str, path: &str| {
        let mut stream = UnixStream::connect(&socket).expect("a socket");
        stream.set_read_timeout(Some(DEADLINE)).expect("a deadline");
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: xpyd\r\nConnection: close\r\n\r\n"
        )
        .expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        let code = head.split(' ').nth(1).expect("a status").to_owned();
        (code, serde_json::from_str::<Value>(body).expect("JSON"))
    };
    let (code, answer) = ask("GET", "/v1/status");
    assert_eq!((code.as_str(), &answer["stage"]), ("200", &Value::from("ready")));
    let (code, answer) = ask("GET", "/v1/nothing");
    assert_eq!(code, "404");
    let words = answer["error"].as_str().expect("a sentence").split([' ', ',']);
    let routes: Vec<&str> = words.filter(|word| word.starts_with("/v1/")).collect();
    assert!(routes.contains(&"/v1/status"), "{answer}");
    for route in routes {
        assert!(
            include_str!("../../../docs/operations.md").contains(route),
            "{route} is not in docs/operations.md"
        );
    }
    assert_eq!(ask("POST", "/v1/engines/decoder7/restart").0, "404");
    // The only decode engine is not drained without force.
    assert_eq!(ask("POST", "/v1/engines/decoder1/drain").0, "409");
    assert_eq!(ask("POST", "/v1/down").0, "202");
    assert_eq!(run.end().0, 0);
    wait_for("the socket's end", || {
        let is_there = std::path::Path::new(&socket).exists();
        if is_there { Err(socket.clone()) } else { Ok(()) }
    });
}
