//! Detach and attach: engines that outlive their xpyd, until another one attaches or they are stopped.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use nix::sys::signal::Signal;

use crate::support::{MODEL, Run, TestEnv, completion, kill_process, wait_for, with_requests_meanwhile};

/// A keep time that is longer than any test.
const KEEP: &str = "deadlines.keep=10m";

fn status(env: &TestEnv) -> serde_json::Value {
    let output = env.run(&["status", "--json"]);
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Name, process id and incarnation of every engine. The process id is 0 between two incarnations.
fn engines(env: &TestEnv) -> Vec<(String, i64, i64)> {
    let status = status(env);
    let engines = status["engines"].as_array().expect("a list").iter();
    engines
        .map(|engine| {
            let number = |key: &str| engine[key].as_i64().unwrap_or(0);
            let id = engine["id"].as_str().expect("a name").to_owned();
            (id, number("pid"), number("incarnation"))
        })
        .collect()
}

/// The process with this command line or name.
fn process(env: &TestEnv, command: &str) -> i64 {
    let is_meant = |pid: i32, line: &str| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.trim() == command || name.trim() != "xpyd-monitor" && line.ends_with(command)
    };
    let processes = env.processes();
    let found = processes.iter().find(|(pid, line)| is_meant(*pid, line.trim()));
    found.unwrap_or_else(|| panic!("no {command}: {processes:#?}")).0.into()
}

/// Starts a run, kills its xpyd, and returns its engines.
fn start_and_kill_xpyd<'env>(env: &'env TestEnv, more: &[&str]) -> (Run<'env>, Vec<(String, i64, i64)>) {
    let mut run = env.up(&[&["--set", KEEP], more].concat());
    run.wait_until_ready();
    let engines = engines(env);
    run.kill();
    assert_eq!(env.run(&["status"]).status.code(), Some(8));
    (run, engines)
}

fn stop(env: &TestEnv, run: Run<'_>) -> String {
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    assert_eq!(env.processes(), []);
    env.assert_no_listener();
    text
}

#[test]
fn engines_survive_a_killed_xpyd_and_the_next_attaches() {
    for connector in ["connector=lmcache", "connector=nixl"] {
        let env = TestEnv::new();
        let (_dead, before) = start_and_kill_xpyd(&env, &["--set", connector]);
        let printed = String::from_utf8(env.run(&["status"]).stderr).expect("text");
        assert!(
            printed.contains("has lost its xpyd") && printed.contains("`xpyd up` attaches"),
            "{printed}"
        );
        let mut run = env.up(&["--set", KEEP, "--set", connector]);
        run.wait_until_ready();
        assert_eq!(engines(&env), before, "{connector}");
        let status = status(&env);
        let uptimes = status["engines"].as_array().expect("engines").iter();
        assert!(
            uptimes.clone().all(|engine| engine["uptime_seconds"].is_u64()),
            "{status}"
        );
        let prompt = "a prompt of some length ".repeat(40);
        assert_eq!(
            completion(env.proxy_port(), MODEL, &prompt),
            env.decode_alone(MODEL, &prompt)
        );
        // The second xpyd supervises the engines of the first one.
        kill_process(before[3].1);
        run.wait_for_line("decoder2 serves again");
        assert!(stop(&env, run).contains("was killed by SIGKILL"));
    }
}

#[test]
fn an_engine_that_died_while_detached_is_restarted() {
    let env = TestEnv::new();
    let (_dead, before) = start_and_kill_xpyd(&env, &[]);
    kill_process(before[2].1);
    wait_for("the end of decoder1", || {
        let printed = String::from_utf8(env.run(&["status"]).stderr).expect("text");
        if printed.contains("decoder1 (ended)") {
            Ok(())
        } else {
            Err(printed)
        }
    });
    let mut run = env.up(&["--set", KEEP, "--set", "restart.backoff=10ms"]);
    run.wait_until_ready();
    wait_for("decoder1", || {
        let now = engines(&env);
        if now[2].2 == 2 { Ok(()) } else { Err(format!("{now:?}")) }
    });
    wait_for("all engines", || {
        let states = status(&env)["engines"].to_string();
        if states.matches("\"state\":\"ready\"").count() == 4 {
            Ok(())
        } else {
            Err(states)
        }
    });
    let log = env.log("xpyd.log");
    assert!(log.contains("was killed by SIGKILL while xpyd was away"), "{log}");
    stop(&env, run);
}

#[test]
fn unattached_engines_end_after_the_keep_time() {
    let env = TestEnv::new();
    let mut run = env.up(&["--set", "deadlines.keep=100ms"]);
    run.wait_until_ready();
    run.signal(Signal::SIGKILL);
    env.wait_until_empty();
    env.assert_no_listener();
}

#[test]
fn a_new_run_keeps_the_logs_of_living_engines() {
    let (env, ports) = (TestEnv::new(), TestEnv::new());
    let offset = format!("port_offset={}", ports.offset);
    let newer = |name: &str| {
        let run = ["--name", name, "--keep-logs", "1", "--set", &offset];
        let output = env.run(&[&["up", "--engine", "sim", "--profile", "1p1d", "--detach"], &run[..]].concat());
        assert!(output.status.success(), "{output:?}");
        let output = env.run(&["down", "--name", name]);
        assert!(output.status.success(), "{output:?}");
    };
    let mut run = env.up(&["--profile", "1p1d", "--set", "deadlines.keep=10m"]);
    run.wait_until_ready();
    let first = env.path().join("logs/latest").canonicalize().expect("its folder");
    newer("second");
    assert!(first.join("decoder1.log").exists(), "it serves");
    run.kill();
    newer("third");
    assert!(first.join("decoder1.log").exists(), "its engines wait");
    let output = env.run(&["down"]);
    assert!(output.status.success(), "{output:?}");
    newer("fourth");
    assert!(!first.exists(), "it is over");
}

#[test]
fn xpyd_can_leave_its_engines_for_down_to_end() {
    let env = TestEnv::new();
    let mut run = env.up(&[]);
    run.wait_until_ready();
    let before = engines(&env);
    let left = env.run(&["down", "--keep-engines"]);
    assert_eq!(left.status.code(), Some(0), "{left:?}");
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("the engines wait for the next `xpyd up`"), "{text}");

    let mut run = env.up(&["--set", "deadlines.keep=0s"]);
    run.wait_until_ready();
    assert_eq!(engines(&env), before);
    assert_eq!(env.run(&["down", "--keep-engines"]).status.code(), Some(0));
    drop(run);

    let down = env.run(&["down"]);
    assert_eq!(down.status.code(), Some(0), "{down:?}");
    assert_eq!(env.processes(), []);
    env.assert_no_listener();
    assert_eq!(env.run(&["down"]).status.code(), Some(8), "nothing is left to end");
}

#[test]
fn an_upgrade_loses_no_connection_or_answer() {
    let env = TestEnv::new();
    let mut run = env.up(&[]);
    run.wait_until_ready();
    let mut next = None;
    with_requests_meanwhile(&env, MODEL, || {
        assert_eq!(env.run(&["down", "--keep-engines"]).status.code(), Some(0));
        let (code, text) = run.end();
        assert_eq!(code, 0, "{text}");
        let run = next.insert(env.up(&[]));
        run.wait_until_ready();
    });
    stop(&env, next.expect("a run"));
}

#[test]
fn clients_wait_while_xpyd_is_away() {
    let env = TestEnv::new();
    let (_dead, _) = start_and_kill_xpyd(&env, &[]);
    let port = env.proxy_port();
    let (answer, mut run) = std::thread::scope(|scope| {
        let client = scope.spawn(|| completion(port, MODEL, "once"));
        let mut run = env.up(&["--set", KEEP]);
        run.wait_until_ready();
        (client.join().expect("an answer"), run)
    });
    assert_eq!(answer, env.decode_alone(MODEL, "once"));

    // The next xpyd serves on another port, so no client must wait on the old one.
    run.kill();
    let elsewhere = format!("{}", port + 1);
    let mut run = env.up(&["--set", KEEP, "--port", &elsewhere]);
    run.wait_until_ready();
    let refused = std::net::TcpStream::connect((std::net::Ipv4Addr::LOCALHOST, port));
    assert!(refused.is_err(), "{refused:?}");

    // Clients do not wait for engines that are being stopped.
    run.kill();
    assert_eq!(env.run(&["down"]).status.code(), Some(0));
    env.assert_no_listener();
}

#[test]
fn engines_of_a_detached_run_survive_an_abort() {
    let env = TestEnv::new();
    let arguments = env.up_arguments(&["--detach"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let up = env.run(&arguments);
    assert_eq!(up.status.code(), Some(0), "{up:?}");
    let before = engines(&env);
    // A panic of the release build and a failed allocation raise this signal.
    let pid = status(&env)["run"]["pid"].as_i64().expect("a pid");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(pid).expect("a pid")),
        Signal::SIGABRT,
    )
    .expect("xpyd is there");
    wait_for("the end of xpyd", || match env.run(&["status"]).status.code() {
        Some(8) => Ok(()),
        code => Err(format!("{code:?}")),
    });
    let mut run = env.up(&[]);
    run.wait_until_ready();
    assert_eq!(engines(&env), before);
    stop(&env, run);
}

#[test]
fn engines_restart_after_their_log_folder_is_deleted() {
    let env = TestEnv::new();
    let settings = [
        "--set",
        KEEP,
        "--set",
        "connector=lmcache",
        "--set",
        "restart.backoff=10ms",
    ];
    let mut run = env.up(&settings);
    run.wait_until_ready();
    let remove = || {
        let folder = env.path().join("logs/latest").canonicalize().expect("the run's folder");
        std::fs::remove_dir_all(folder).expect("removed");
    };
    remove();
    let restart = env.run(&["restart", "decoder1"]);
    assert_eq!(restart.status.code(), Some(0), "{restart:?}");
    remove();
    let before = engines(&env);
    run.kill();
    let mut run = env.up(&settings);
    run.wait_until_ready();
    assert_eq!(engines(&env), before);
    kill_process(before[0].1);
    run.wait_for_line("prefiller1 serves again");
    remove();
    let scale = env.run(&["scale", "decode=3"]);
    assert_eq!(scale.status.code(), Some(0), "{scale:?}");
    stop(&env, run);
}

#[test]
fn attaching_with_another_plan_is_refused() {
    let env = TestEnv::new();
    let (_dead, before) = start_and_kill_xpyd(&env, &[]);
    for (change, expected) in [
        ("decode.count=1", "decoder2 is not part of this plan"),
        ("vllm.max_model_len=1024", "a command line that differs"),
    ] {
        let run = env.up(&["--set", change]);
        let (code, text) = run.end();
        assert_eq!(code, 8, "{text}");
        assert!(
            text.contains(expected) && text.contains("stop them first: `xpyd down`"),
            "{text}"
        );
    }
    let mut run = env.up(&[]);
    run.wait_until_ready();
    assert_eq!(engines(&env), before);
    stop(&env, run);
}

#[test]
fn killing_a_waiting_shim_leaves_nothing() {
    let env = TestEnv::new();
    let (_dead, _) = start_and_kill_xpyd(&env, &[]);
    kill_process(process(&env, "xpyd shim"));
    env.wait_until_empty();
    assert_eq!(env.run(&["down"]).status.code(), Some(8), "nothing is left to end");
}

#[test]
fn killing_the_shim_after_an_attach_leaves_nothing() {
    for has_monitor in [true, false] {
        let env = TestEnv::new();
        let (_dead, before) = start_and_kill_xpyd(&env, &[]);
        let mut run = env.up(&[]);
        run.wait_until_ready();
        if !has_monitor {
            kill_monitor(&env);
            assert_eq!(engines(&env), before, "the fleet serves without it");
        }
        kill_process(process(&env, "xpyd shim"));
        let (code, text) = run.end();
        assert_eq!(code, 1, "{text}");
        assert!(text.contains("supervision was lost"), "{text}");
        env.wait_until_empty();
        env.assert_no_listener();
    }
}

/// Kills the shim monitor, and waits until xpyd has noticed.
fn kill_monitor(env: &TestEnv) {
    kill_process(process(env, "xpyd-monitor"));
    wait_for("xpyd to see the end of the monitor", || {
        let log = env.log("xpyd.log");
        if log.contains("monitor was killed") {
            Ok(())
        } else {
            Err(log)
        }
    });
}

#[test]
fn engines_survive_a_killed_shim_monitor() {
    let env = TestEnv::new();
    let mut run = env.up(&[]);
    run.wait_until_ready();
    let before = engines(&env);
    kill_monitor(&env);
    let prompt = "a prompt of some length ".repeat(40);
    completion(env.proxy_port(), MODEL, &prompt);
    assert_eq!(engines(&env), before);
    stop(&env, run);

    let mut run = env.up(&[]);
    run.wait_until_ready();
    kill_monitor(&env);
    kill_process(process(&env, "xpyd shim"));
    let (code, text) = run.end();
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("supervision was lost"), "{text}");
    env.wait_until_empty();
    env.assert_no_listener();
}

#[test]
fn down_works_without_the_shim_monitor() {
    let env = TestEnv::new();
    let (_dead, _) = start_and_kill_xpyd(&env, &[]);
    kill_process(process(&env, "xpyd-monitor"));
    let down = env.run(&["down"]);
    assert_eq!(down.status.code(), Some(0), "{down:?}");
    env.wait_until_empty();
}

#[test]
fn a_client_without_a_valid_command_is_disconnected() {
    let env = TestEnv::new();
    let (_dead, before) = start_and_kill_xpyd(&env, &[]);
    let long = vec![b'x'; 3 << 20];
    for sent in [&b"{}\n"[..], b"\n", b"GET / HTTP/1.1\r\n\r\n", b"\xff\x00\n", &long] {
        let mut stream = UnixStream::connect(env.path().join("xpyd/default/attach.sock")).expect("a shim");
        // The shim can close the connection before it has read everything.
        let _ = stream.write_all(sent);
        let mut printed = Vec::new();
        // Unread data resets the connection.
        let _ = stream.read_to_end(&mut printed);
    }
    let mut run = env.up(&["--set", KEEP]);
    run.wait_until_ready();
    assert_eq!(engines(&env), before);
    stop(&env, run);
}

#[test]
fn an_attach_restores_drained_and_added_engines() {
    let env = TestEnv::new();
    let command = ["--profile", "1p1d", "--set", KEEP];
    let mut dead = env.up(&command);
    dead.wait_until_ready();
    for counts in [&["prefill=3", "decode=2"][..], &["prefill=2"]] {
        let output = env.run(&[&["scale"], counts].concat());
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    }
    let states = || {
        let status = status(&env);
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
    let mut run = env.up(&command);
    run.wait_until_ready();
    assert_eq!(states(), as_scaled);
    let left = env.run(&["down", "--keep-engines"]);
    assert_eq!(left.status.code(), Some(0), "{left:?}");
    run.end();

    let mut run = env.up(&command);
    run.wait_until_ready();
    assert_eq!(states(), as_scaled);
    let output = env.run(&["scale", "prefill=3"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(states()[2], "prefiller3 ready");
    stop(&env, run);
}

#[test]
fn an_added_engine_restarts_after_an_attach() {
    let env = TestEnv::new();
    let connector = ["--connector", "lmcache", "--set", "force_connector=true"];
    let command = [&["--profile", "1p1d", "--set", KEEP], &connector[..]].concat();
    let mut dead = env.up(&command);
    dead.wait_until_ready();
    let output = env.run(&["scale", "prefill=2", "decode=2"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    dead.kill();
    let mut removed = 0;
    for entry in std::fs::read_dir(env.path().join("logs/latest")).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            std::fs::remove_file(path).expect("removable");
            removed += 1;
        }
    }
    assert!(removed > 0, "no engine has a file");
    let mut run = env.up(&command);
    run.wait_until_ready();
    // A decode engine listens on another port after each start. Its file must contain it, which a canary proves.
    for engine in ["decoder2", "prefiller2"] {
        let output = env.run(&["restart", engine]);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    }
    stop(&env, run);
}
