//! Engines that outlive their xpyd: kept, attached to by the next one, or ended, through the binary on simulated engines.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use nix::sys::signal::Signal;

use crate::support::{Place, Run, asking_meanwhile, completion, kill_process, wait_for};

const MODEL: &str = "meta-llama/Llama-3.1-8B-Instruct";

/// Keeps engines for as long as any test takes.
const KEEP: &str = "deadlines.keep=10m";

fn status(place: &Place) -> serde_json::Value {
    let output = place.run(&["status", "--json"]);
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Name, process id and incarnation of every engine; 0 for the process id of one between two incarnations.
fn engines(place: &Place) -> Vec<(String, i64, i64)> {
    let status = status(place);
    let engines = status["engines"].as_array().expect("a list").iter();
    engines
        .map(|engine| {
            let number = |key: &str| engine[key].as_i64().unwrap_or(0);
            let id = engine["id"].as_str().expect("a name").to_owned();
            (id, number("pid"), number("incarnation"))
        })
        .collect()
}

/// The process whose command line, or name, is this.
fn process(place: &Place, command: &str) -> i64 {
    let is_meant = |pid: i32, line: &str| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.trim() == command || name.trim() != "xpyd-monitor" && line.ends_with(command)
    };
    let processes = place.processes();
    let found = processes.iter().find(|(pid, line)| is_meant(*pid, line.trim()));
    found.unwrap_or_else(|| panic!("no {command}: {processes:#?}")).0.into()
}

/// A run whose xpyd was killed, with its engines as they were.
fn orphaned<'place>(place: &'place Place, more: &[&str]) -> (Run<'place>, Vec<(String, i64, i64)>) {
    let mut run = place.up(&[&["--set", KEEP], more].concat());
    run.wait_until_ready();
    let engines = engines(place);
    run.kill();
    assert_eq!(place.run(&["status"]).status.code(), Some(8));
    (run, engines)
}

fn stop(place: &Place, run: Run<'_>) -> String {
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    assert_eq!(place.processes(), []);
    place.assert_no_listener();
    text
}

#[test]
fn a_killed_xpyd_costs_no_engine_and_the_next_one_attaches() {
    for connector in ["connector=lmcache", "connector=nixl"] {
        let place = Place::new();
        let (_dead, before) = orphaned(&place, &["--set", connector]);
        let told = String::from_utf8(place.run(&["status"]).stderr).expect("text");
        assert!(
            told.contains("has lost its xpyd") && told.contains("`xpyd up` attaches"),
            "{told}"
        );
        let mut run = place.up(&["--set", KEEP, "--set", connector]);
        run.wait_until_ready();
        assert_eq!(engines(&place), before, "{connector}");
        let prompt = "a prompt of some length ".repeat(40);
        assert_eq!(
            completion(place.proxy_port(), MODEL, &prompt),
            place.alone(MODEL, &prompt)
        );
        // What was started by the first xpyd is supervised by the second one.
        kill_process(before[3].1);
        run.wait_for_line("decoder2 serves again");
        assert!(stop(&place, run).contains("was killed by SIGKILL"));
    }
}

#[test]
fn an_engine_that_ended_meanwhile_comes_back_after_the_others_serve() {
    let place = Place::new();
    let (_dead, before) = orphaned(&place, &[]);
    kill_process(before[2].1);
    wait_for("the end of decoder1", || {
        let told = String::from_utf8(place.run(&["status"]).stderr).expect("text");
        if told.contains("decoder1 (ended)") {
            Ok(())
        } else {
            Err(told)
        }
    });
    let mut run = place.up(&["--set", KEEP, "--set", "restart.backoff=10ms"]);
    run.wait_until_ready();
    wait_for("decoder1", || {
        let now = engines(&place);
        if now[2].2 == 2 { Ok(()) } else { Err(format!("{now:?}")) }
    });
    wait_for("all engines", || {
        let states = status(&place)["engines"].to_string();
        if states.matches("\"state\":\"ready\"").count() == 4 {
            Ok(())
        } else {
            Err(states)
        }
    });
    let log = place.log("xpyd.log");
    assert!(log.contains("was killed by SIGKILL while xpyd was away"), "{log}");
    stop(&place, run);
}

#[test]
fn engines_that_nobody_comes_for_end_after_their_time() {
    let place = Place::new();
    let mut run = place.up(&["--set", "deadlines.keep=100ms"]);
    run.wait_until_ready();
    run.signal(Signal::SIGKILL);
    place.wait_until_empty();
    place.assert_no_listener();
}

#[test]
fn a_new_run_does_not_remove_the_logs_of_one_whose_engines_live() {
    let (place, ports) = (Place::new(), Place::new());
    let offset = format!("port_offset={}", ports.offset);
    let newer = |name: &str| {
        let run = ["--name", name, "--keep-logs", "1", "--set", &offset];
        let output = place.run(&[&["up", "--engine", "sim", "--profile", "1p1d", "--detach"], &run[..]].concat());
        assert!(output.status.success(), "{output:?}");
        let output = place.run(&["down", "--name", name]);
        assert!(output.status.success(), "{output:?}");
    };
    let mut run = place.up(&["--profile", "1p1d", "--set", "deadlines.keep=10m"]);
    run.wait_until_ready();
    let first = place.path().join("logs/latest").canonicalize().expect("its folder");
    newer("second");
    assert!(first.join("decoder1.log").exists(), "it serves");
    run.kill();
    newer("third");
    assert!(first.join("decoder1.log").exists(), "its engines wait");
    let output = place.run(&["down"]);
    assert!(output.status.success(), "{output:?}");
    newer("fourth");
    assert!(!first.exists(), "it is over");
}

#[test]
fn xpyd_can_leave_its_engines_and_down_ends_them() {
    let place = Place::new();
    let mut run = place.up(&[]);
    run.wait_until_ready();
    let before = engines(&place);
    let left = place.run(&["down", "--keep-engines"]);
    assert_eq!(left.status.code(), Some(0), "{left:?}");
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("the engines wait for the next `xpyd up`"), "{text}");

    let mut run = place.up(&["--set", "deadlines.keep=0s"]);
    run.wait_until_ready();
    assert_eq!(engines(&place), before);
    assert_eq!(place.run(&["down", "--keep-engines"]).status.code(), Some(0));
    drop(run);

    let down = place.run(&["down"]);
    assert_eq!(down.status.code(), Some(0), "{down:?}");
    assert_eq!(place.processes(), []);
    place.assert_no_listener();
    assert_eq!(place.run(&["down"]).status.code(), Some(8), "nothing is left to end");
}

#[test]
fn an_upgrade_refuses_no_connection_and_every_answer_is_right() {
    let place = Place::new();
    let mut run = place.up(&[]);
    run.wait_until_ready();
    let mut next = None;
    asking_meanwhile(&place, MODEL, || {
        assert_eq!(place.run(&["down", "--keep-engines"]).status.code(), Some(0));
        let (code, text) = run.end();
        assert_eq!(code, 0, "{text}");
        let run = next.insert(place.up(&[]));
        run.wait_until_ready();
    });
    stop(&place, next.expect("a run"));
}

#[test]
fn clients_wait_while_no_xpyd_is_there() {
    let place = Place::new();
    let (_dead, _) = orphaned(&place, &[]);
    let port = place.proxy_port();
    let (answer, mut run) = std::thread::scope(|scope| {
        let client = scope.spawn(|| completion(port, MODEL, "once"));
        let mut run = place.up(&["--set", KEEP]);
        run.wait_until_ready();
        (client.join().expect("an answer"), run)
    });
    assert_eq!(answer, place.alone(MODEL, "once"));

    // The next one serves elsewhere: nobody waits at the old port for nothing.
    run.kill();
    let elsewhere = format!("{}", port + 1);
    let mut run = place.up(&["--set", KEEP, "--port", &elsewhere]);
    run.wait_until_ready();
    let refused = std::net::TcpStream::connect((std::net::Ipv4Addr::LOCALHOST, port));
    assert!(refused.is_err(), "{refused:?}");

    // Nobody waits for engines that are taken down.
    run.kill();
    assert_eq!(place.run(&["down"]).status.code(), Some(0));
    place.assert_no_listener();
}

#[test]
fn an_aborted_xpyd_costs_no_engine_of_a_detached_run() {
    let place = Place::new();
    let arguments = place.up_arguments(&["--detach"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let up = place.run(&arguments);
    assert_eq!(up.status.code(), Some(0), "{up:?}");
    let before = engines(&place);
    // What the process gets from a panic of the release build, and from an allocation that fails.
    let pid = status(&place)["run"]["pid"].as_i64().expect("a pid");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(pid).expect("a pid")),
        Signal::SIGABRT,
    )
    .expect("xpyd is there");
    wait_for("the end of xpyd", || match place.run(&["status"]).status.code() {
        Some(8) => Ok(()),
        code => Err(format!("{code:?}")),
    });
    let mut run = place.up(&[]);
    run.wait_until_ready();
    assert_eq!(engines(&place), before);
    stop(&place, run);
}

#[test]
fn engines_start_again_after_the_folder_of_their_logs_was_removed() {
    let place = Place::new();
    let settings = [
        "--set",
        KEEP,
        "--set",
        "connector=lmcache",
        "--set",
        "restart.backoff=10ms",
    ];
    let mut run = place.up(&settings);
    run.wait_until_ready();
    let remove = || {
        let folder = place
            .path()
            .join("logs/latest")
            .canonicalize()
            .expect("the run's folder");
        std::fs::remove_dir_all(folder).expect("removed");
    };
    remove();
    let restart = place.run(&["restart", "decoder1"]);
    assert_eq!(restart.status.code(), Some(0), "{restart:?}");
    remove();
    let before = engines(&place);
    run.kill();
    let mut run = place.up(&settings);
    run.wait_until_ready();
    assert_eq!(engines(&place), before);
    kill_process(before[0].1);
    run.wait_for_line("prefiller1 serves again");
    remove();
    let scale = place.run(&["scale", "decode=3"]);
    assert_eq!(scale.status.code(), Some(0), "{scale:?}");
    stop(&place, run);
}

#[test]
fn another_plan_is_refused_and_leaves_the_engines_alone() {
    let place = Place::new();
    let (_dead, before) = orphaned(&place, &[]);
    for (change, told) in [
        ("decode.count=1", "decoder2 is not part of this plan"),
        ("vllm.max_model_len=1024", "another command line"),
    ] {
        let run = place.up(&["--set", change]);
        let (code, text) = run.end();
        assert_eq!(code, 8, "{text}");
        assert!(
            text.contains(told) && text.contains("`xpyd down` ends them first"),
            "{text}"
        );
    }
    let mut run = place.up(&[]);
    run.wait_until_ready();
    assert_eq!(engines(&place), before);
    stop(&place, run);
}

#[test]
fn nothing_is_left_when_the_shim_is_killed_while_it_waits() {
    let place = Place::new();
    let (_dead, _) = orphaned(&place, &[]);
    kill_process(process(&place, "xpyd shim"));
    place.wait_until_empty();
    assert_eq!(place.run(&["down"]).status.code(), Some(8), "nothing is left to end");
}

#[test]
fn nothing_is_left_when_the_shim_is_killed_after_another_xpyd_attached() {
    for has_monitor in [true, false] {
        let place = Place::new();
        let (_dead, before) = orphaned(&place, &[]);
        let mut run = place.up(&[]);
        run.wait_until_ready();
        if !has_monitor {
            kill_monitor(&place);
            assert_eq!(engines(&place), before, "the fleet serves without it");
        }
        kill_process(process(&place, "xpyd shim"));
        let (code, text) = run.end();
        assert_eq!(code, 1, "{text}");
        assert!(text.contains("supervision was lost"), "{text}");
        place.wait_until_empty();
        place.assert_no_listener();
    }
}

/// Kills the monitor, and waits until xpyd has seen it.
fn kill_monitor(place: &Place) {
    kill_process(process(place, "xpyd-monitor"));
    wait_for("xpyd to see the end of the monitor", || {
        let log = place.log("xpyd.log");
        if log.contains("monitor was killed") {
            Ok(())
        } else {
            Err(log)
        }
    });
}

#[test]
fn a_killed_monitor_costs_no_engine() {
    let place = Place::new();
    let mut run = place.up(&[]);
    run.wait_until_ready();
    let before = engines(&place);
    kill_monitor(&place);
    let prompt = "a prompt of some length ".repeat(40);
    completion(place.proxy_port(), MODEL, &prompt);
    assert_eq!(engines(&place), before);
    stop(&place, run);

    let mut run = place.up(&[]);
    run.wait_until_ready();
    kill_monitor(&place);
    kill_process(process(&place, "xpyd shim"));
    let (code, text) = run.end();
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("supervision was lost"), "{text}");
    place.wait_until_empty();
    place.assert_no_listener();
}

#[test]
fn engines_whose_monitor_is_gone_can_still_be_taken_down() {
    let place = Place::new();
    let (_dead, _) = orphaned(&place, &[]);
    kill_process(process(&place, "xpyd-monitor"));
    let down = place.run(&["down"]);
    assert_eq!(down.status.code(), Some(0), "{down:?}");
    place.wait_until_empty();
}

#[test]
fn whoever_sends_no_command_loses_the_connection_and_no_engine_ends() {
    let place = Place::new();
    let (_dead, before) = orphaned(&place, &[]);
    let long = vec![b'x'; 3 << 20];
    for sent in [&b"{}\n"[..], b"\n", b"GET / HTTP/1.1\r\n\r\n", b"\xff\x00\n", &long] {
        let mut stream = UnixStream::connect(place.path().join("xpyd/default/attach.sock")).expect("a shim");
        // It may close before it has read all.
        let _ = stream.write_all(sent);
        let mut told = Vec::new();
        // What it has not read resets the connection.
        let _ = stream.read_to_end(&mut told);
    }
    let mut run = place.up(&["--set", KEEP]);
    run.wait_until_ready();
    assert_eq!(engines(&place), before);
    stop(&place, run);
}

#[test]
fn the_fleet_is_resumed_as_it_had_become() {
    let place = Place::new();
    let command = ["--profile", "1p1d", "--set", KEEP];
    let mut dead = place.up(&command);
    dead.wait_until_ready();
    for counts in [&["prefill=3", "decode=2"][..], &["prefill=2"]] {
        let output = place.run(&[&["scale"], counts].concat());
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    }
    let states = || {
        let status = status(&place);
        let engines = status["engines"].as_array().expect("a list").iter();
        let state = |engine: &serde_json::Value| format!("{} {}", engine["id"], engine["state"]).replace('"', "");
        engines.map(state).collect::<Vec<_>>()
    };
    let as_scaled = [
        "prefiller1 ready",
        "prefiller2 ready",
        "prefiller3 stopped",
        "decoder1 ready",
        "decoder2 ready",
    ];
    assert_eq!(states(), as_scaled);
    dead.kill();
    let mut run = place.up(&command);
    run.wait_until_ready();
    assert_eq!(states(), as_scaled);
    let left = place.run(&["down", "--keep-engines"]);
    assert_eq!(left.status.code(), Some(0), "{left:?}");
    run.end();

    let mut run = place.up(&command);
    run.wait_until_ready();
    assert_eq!(states(), as_scaled);
    let output = place.run(&["scale", "prefill=3"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(states()[2], "prefiller3 ready");
    stop(&place, run);
}

#[test]
fn an_engine_that_joined_starts_again_under_the_xpyd_that_attached() {
    let place = Place::new();
    let connector = ["--connector", "lmcache", "--set", "force_connector=true"];
    let command = [&["--profile", "1p1d", "--set", KEEP], &connector[..]].concat();
    let mut dead = place.up(&command);
    dead.wait_until_ready();
    let output = place.run(&["scale", "prefill=2", "decode=2"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    dead.kill();
    for entry in std::fs::read_dir(place.path().join("logs/latest")).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            std::fs::remove_file(path).expect("removable");
        }
    }
    let mut run = place.up(&command);
    run.wait_until_ready();
    // A decode engine listens elsewhere after each start, which its file must say; a canary proves it.
    for engine in ["decoder2", "prefiller2"] {
        let output = place.run(&["restart", engine]);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    }
    stop(&place, run);
}
