//! A run under different environments: shells, log-ins, `/tmp` cleaners, resource limits, terminals and containers.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::process::{Resource, Rlimit, prlimit};
use serde_json::Value;

use xpyd::sockets::PortClaim;

use crate::support::{MODEL, Run, TestEnv, completion, ignored_signals, wait_for};

/// The arguments of a fleet with one engine per role.
const SMALL: [&str; 2] = ["--profile", "1p1d"];

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn status(env: &TestEnv, more: &[&str]) -> Value {
    let output = env.run(&[&["status", "--json"], more].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Runs `xpyd up --detach` of the smallest fleet until the command returns.
fn up_detached(env: &TestEnv, more: &[&str]) -> Output {
    let arguments = env.up_arguments(&[&SMALL[..], &["--detach"], more].concat());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let output = env.run(&arguments);
    assert!(output.status.success(), "{}", stderr(&output));
    output
}

fn down(env: &TestEnv, more: &[&str]) {
    let output = env.run(&[&["down"], more].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    env.wait_until_empty();
}

fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("the process exists");
}

fn pid(status: &Value) -> i32 {
    status["run"]["pid"]
        .as_i64()
        .and_then(|pid| i32::try_from(pid).ok())
        .expect("a pid")
}

/// The same command, started by a shell that first runs `first`.
fn after(first: &str, command: &Command) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("{first}; exec \"$0\" \"$@\"")]);
    shell.arg(command.get_program()).args(command.get_args());
    if let Some(folder) = command.get_current_dir() {
        shell.current_dir(folder);
    }
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell.stdin(Stdio::null());
    shell
}

#[test]
fn inherited_ignored_signals_stay_ignored() {
    let env = TestEnv::new();
    let start = |arguments: &[&str], trap: &str| Run::start_command(&env, after(trap, &env.command(arguments)));
    let up = env.up_arguments(&SMALL);
    let up: Vec<&str> = up.iter().map(String::as_str).collect();
    // `nohup` and shells with background jobs start programs like this.
    let mut fleet = start(&up, "trap '' HUP INT QUIT TERM");
    fleet.wait_until_ready();
    let url = format!("http://127.0.0.1:{}", env.proxy_port());
    let bench =
        format!("bench --base-url {url} --num-prompts 1000 --request-rate 1 --random-input-len 10 --ignore-eos");
    let sim = format!("sim {MODEL} --preset instant --port {}", 7209 + env.offset);
    let all = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM];
    assert_eq!(ignored_signals(fleet.pid()), all);
    for (line, printed) in [
        ("logs -f", ""),
        ("status --watch", "is ready"),
        (&bench, ""),
        (&sim, "startup complete"),
        (
            "proxy --port 0 --connector nixl --prefiller-port 1 --decoder-port 1",
            "serving 1 prefill",
        ),
    ] {
        let mut run = start(&line.split(' ').collect::<Vec<_>>(), "trap '' HUP INT QUIT");
        run.wait_for_line(printed);
        assert_eq!(ignored_signals(run.pid()), all[..3], "{line}");
        run.signal(Signal::SIGHUP);
        run.signal(Signal::SIGINT);
        run.signal(Signal::SIGTERM);
        run.end();
    }
    for signal in all {
        fleet.signal(signal);
    }
    assert!(!completion(env.proxy_port(), MODEL, "once").is_empty());
    assert_eq!(status(&env, &[])["stage"], "ready");
    down(&env, &[]);
    assert_eq!(fleet.end().0, 0);
}

#[test]
fn sighup_does_not_stop_a_detached_run() {
    let env = TestEnv::new();
    up_detached(&env, &[]);
    let pid = i32::try_from(status(&env, &[])["run"]["pid"].as_u64().expect("a pid")).expect("a pid");
    kill(Pid::from_raw(pid), Signal::SIGHUP).expect("the run exists");
    wait_for("the line about the signal", || {
        let log = env.log("xpyd.log");
        if log.contains("SIGHUP changes nothing") {
            Ok(())
        } else {
            Err(log)
        }
    });
    assert_eq!(status(&env, &[])["stage"], "ready");
    down(&env, &[]);
}

#[test]
fn a_detached_run_is_found_after_its_folder_is_deleted() {
    let env = TestEnv::new();
    up_detached(&env, &[]);
    let folder = env.path().join("xpyd/default");
    let before = status(&env, &[]);
    // A log-out and the next log-in do this.
    std::fs::remove_dir_all(env.path().join("xpyd")).expect("a folder");
    assert_eq!(pid(&status(&env, &[])), pid(&before));
    let arguments = env.up_arguments(&SMALL);
    let second = env.run(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(second.status.code(), Some(8), "{}", stderr(&second));
    assert!(
        stderr(&second).contains(&format!("already exists (pid {})", pid(&before))),
        "{}",
        stderr(&second)
    );
    wait_for("the folder", || {
        let files = ["lock", "run.json", "control.sock", "engine-key"];
        let missing = files.into_iter().filter(|file| !folder.join(file).exists());
        let missing: Vec<&str> = missing.collect();
        if missing.is_empty() {
            Ok(())
        } else {
            Err(format!("{missing:?}"))
        }
    });
    // A `/tmp` cleaner does this: it removes files and keeps sockets.
    for file in ["lock", "run.json"] {
        std::fs::remove_file(folder.join(file)).expect("a file");
    }
    let second = env.run(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(second.status.code(), Some(8), "{}", stderr(&second));
    assert_eq!(pid(&status(&env, &[])), pid(&before));
    std::fs::remove_dir_all(env.path().join("xpyd")).expect("a folder");
    down(&env, &[]);
    assert!(!folder.exists(), "nothing of it is left");
}

#[test]
fn kept_engines_are_found_after_their_folder_is_deleted() {
    let env = TestEnv::new();
    let mut run = env.up(&[&SMALL[..], &["--set", "deadlines.keep=10m"]].concat());
    run.wait_until_ready();
    run.kill();
    wait_for("a run without its xpyd", || {
        let printed = stderr(&env.run(&["status"]));
        if printed.contains("has lost its xpyd") {
            Ok(())
        } else {
            Err(printed)
        }
    });
    std::fs::remove_dir_all(env.path().join("xpyd")).expect("a folder");
    let printed = stderr(&env.run(&["status"]));
    assert!(printed.contains("has lost its xpyd"), "{printed}");
    down(&env, &[]);
}

#[test]
fn a_run_is_found_without_a_login_session() {
    let env = TestEnv::new();
    // Outside of the test's folder the name must be unique on this machine.
    let name = format!("life-{}", std::process::id());
    up_detached(&env, &["--name", &name]);
    let mut elsewhere = env.command(&["status", "--json", "--name", &name]);
    let output = elsewhere.env_remove("XDG_RUNTIME_DIR").output().expect("xpyd runs");
    assert!(output.status.success(), "{}", stderr(&output));
    // A process with its own runtime folder sees only the runs in it.
    let other = TestEnv::new();
    let isolated = other.run(&["status", "--name", &name]);
    assert_eq!(isolated.status.code(), Some(8), "{}", stderr(&isolated));
    // The list contains all runs, from every environment.
    for command in [env.command(&["ps", "--json"]), other.command(&["ps", "--json"])] {
        let mut command = command;
        let output = command.output().expect("xpyd runs");
        let runs: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let runs = runs.as_array().expect("a list");
        let run = runs.iter().find(|run| run["name"] == name.as_str()).expect("the run");
        assert_eq!(
            (&run["state"], &run["engines_ready"], &run["detached"]),
            (&"ready".into(), &2.into(), &true.into())
        );
    }
    let mut down = env.command(&["down", "--name", &name]);
    let output = down.env_remove("XDG_RUNTIME_DIR").output().expect("xpyd runs");
    assert!(output.status.success(), "{}", stderr(&output));
    env.wait_until_empty();
}

#[test]
fn a_suspended_run_is_reported_with_the_resume_command() {
    let env = TestEnv::new();
    let mut run = env.up(&SMALL);
    run.wait_until_ready();
    run.signal(Signal::SIGSTOP);
    wait_for("the stop", || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", run.pid())).expect("a process");
        if stat.contains(") T ") { Ok(()) } else { Err(stat) }
    });
    for command in ["status", "down", "drain decoder1", "status --watch"] {
        let output = env.run(&command.split(' ').collect::<Vec<_>>());
        let printed = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{command}: {printed}");
        assert!(
            printed.contains("is suspended") && printed.contains(&format!("`kill -CONT {}`", run.pid())),
            "{printed}"
        );
        assert!(!printed.contains("KILL"), "{printed}");
    }
    run.signal(Signal::SIGCONT);
    down(&env, &[]);
    assert_eq!(run.end().0, 0);
}

#[test]
fn ctrl_c_during_a_detached_start_leaves_it_running() {
    let env = TestEnv::new();
    let slow = ["--detach", "--set", "sim.faults=[\"slow-start=10s\"]"];
    let mut waiting = env.up(&[&SMALL[..], &slow].concat());
    waiting.wait_for_line("launching");
    waiting.signal(Signal::SIGINT);
    let (code, text) = waiting.end();
    assert_eq!(code, 130, "{text}");
    assert!(text.contains("continues in the background"), "{text}");
    assert!(text.contains("`xpyd status`") && text.contains("`xpyd down`"), "{text}");
    assert!(["starting", "verifying", "ready"].contains(&status(&env, &[])["stage"].as_str().expect("a stage")));
    down(&env, &[]);
}

#[test]
fn a_stopped_detached_start_is_a_failure() {
    let env = TestEnv::new();
    let slow = ["--detach", "--set", "sim.faults=[\"slow-start=1h\"]"];
    let mut waiting = env.up(&[&SMALL[..], &slow].concat());
    waiting.wait_for_line("launching");
    down(&env, &[]);
    let (code, text) = waiting.end();
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("run `default` was stopped before it was ready"), "{text}");
}

#[test]
fn follow_commands_succeed_on_sigint_and_broken_pipe() {
    let env = TestEnv::new();
    let mut run = env.up(&SMALL);
    run.wait_until_ready();
    for arguments in [&["logs", "-f"][..], &["status", "--watch"]] {
        let mut following = Run::start(&env, arguments);
        following.wait_for_line("");
        following.signal(Signal::SIGINT);
        let (code, text) = following.end();
        assert_eq!(code, 0, "{arguments:?}: {text}");
        // The reader takes one line, as `head -1` does. The command writes nothing more in the meantime.
        let mut reader = env.command(arguments);
        let mut child = reader
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("xpyd runs");
        let mut first = [0];
        let mut pipe = child.stdout.take().expect("a pipe");
        pipe.read_exact(&mut first).expect("a line");
        drop(pipe);
        assert_eq!(child.wait().expect("it ends").code(), Some(0), "{arguments:?}");
    }
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0);
}

#[test]
fn failed_writes_to_stdout_are_errors() {
    let env = TestEnv::new();
    let mut run = env.up(&SMALL);
    run.wait_until_ready();
    for command in [
        "--help",
        "--version",
        "up --help",
        "profiles list",
        "profiles list --json",
        "profiles show 2p2d",
        "profiles validate 2p2d",
        "plan --engine sim",
        "plan --engine sim --json",
        "up --engine sim --dry-run",
        "status",
        "status --json",
        "status --watch",
        "ps",
        "ps --json",
        "logs",
        "logs --json",
        "logs -f",
        "completions bash",
    ] {
        let mut command_line = env.command(&command.split(' ').collect::<Vec<_>>());
        let full = File::options().write(true).open("/dev/full").expect("a device");
        let output = command_line.stdout(full).output().expect("xpyd runs");
        let printed = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{command}: {printed}");
        assert!(
            printed.contains("cannot write to the standard output"),
            "{command}: {printed}"
        );
    }
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0);
}

#[test]
fn a_dumb_terminal_gets_plain_lines() {
    let env = TestEnv::new();
    let arguments = env.up_arguments(&SMALL);
    let mut command = env.command(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let terminal = openpty(None, None).expect("a terminal");
    let writer = |terminal: &OwnedFd| terminal.try_clone().expect("a descriptor");
    let mut child = command
        .env("TERM", "dumb")
        // If this is set, libraries assume that every terminal has colours.
        .env("CI", "true")
        .stdout(writer(&terminal.slave))
        .stderr(terminal.slave)
        .spawn()
        .expect("xpyd runs");
    // This process has closed its writing end, so the terminal reports its end after the last writer has exited.
    drop(command);
    let (mut screen, mut text) = (File::from(terminal.master), String::new());
    let (mut buffer, mut is_stopping) = ([0; 4096], false);
    while let Ok(count @ 1..) = screen.read(&mut buffer) {
        text.push_str(&String::from_utf8_lossy(&buffer[..count]));
        // A second signal would kill the engines that the first one stops.
        if text.contains("press Ctrl+C to stop") && !is_stopping {
            send(i32::try_from(child.id()).expect("a pid"), Signal::SIGTERM);
            is_stopping = true;
        }
    }
    assert_eq!(child.wait().expect("it ends").code(), Some(0), "{text}");
    // The earlier states can be over before the test looks.
    for engine in ["prefiller1", "decoder1"] {
        let is_ready = |line: &str| line.split_whitespace().take(2).eq([engine, "ready"]);
        assert!(text.lines().any(is_ready), "no `ready` of {engine}: {text}");
    }
    assert!(!text.contains('\u{1b}'), "{text}");
}

#[test]
fn a_file_size_limit_only_drops_log_lines() {
    let env = TestEnv::new();
    let mut run = env.up(&SMALL);
    run.wait_until_ready();
    let processes = env.processes();
    let limit = |bytes: Option<u64>| {
        let mut limited = 0;
        for (pid, command) in &processes {
            if command.trim().ends_with("shim") || *pid == run.pid() {
                let pid = rustix::process::Pid::from_raw(*pid).expect("a pid");
                let (current, maximum) = (bytes, None);
                prlimit(Some(pid), Resource::Fsize, Rlimit { current, maximum }).expect("a limit");
                limited += 1;
            }
        }
        assert!(limited >= 2, "xpyd and its shim: {processes:#?}");
    };
    limit(Some(1));
    for _ in 0..3 {
        assert!(!completion(env.proxy_port(), MODEL, "once").is_empty());
    }
    // The shim has read all output by now, or reads it after the limit is lifted.
    assert_eq!(status(&env, &[])["stage"], "ready");
    let lost = |log: &str| log.contains("bytes of output lost here");
    wait_for("a report of the lost lines", || {
        limit(Some(1));
        completion(env.proxy_port(), MODEL, "once");
        limit(None);
        completion(env.proxy_port(), MODEL, "once");
        let logs = [env.log("decoder1.log"), env.log("prefiller1.log")];
        if logs.iter().any(|log| lost(log)) {
            Ok(())
        } else {
            Err(logs.concat())
        }
    });
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
}

#[test]
fn a_file_size_limit_is_reported_before_the_start() {
    let env = TestEnv::new();
    let plan = env.command(&["plan", "--engine", "sim"]);
    let output = after("ulimit -f 100000", &plan).output().expect("xpyd runs");
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(
        printed.contains("warn  fsize") && printed.contains("ulimit -f unlimited"),
        "{printed}"
    );
}

#[test]
fn a_run_that_starts_now_keeps_its_ports() {
    let env = TestEnv::new();
    let profile = format!("extends = \"1p1d\"\nengine = \"sim\"\nport_offset = {}\n", env.offset);
    std::fs::write(env.path().join("small.toml"), profile).expect("a file");
    // As a run that has chosen its ports, and has not opened them yet.
    let claim = PortClaim::take([env.proxy_port()]).expect("a free port");
    let dry = ["up", "--dry-run", "--name", "two", "--profile", "small.toml"];
    let output = env.run(&dry);
    let printed = stderr(&output);
    assert!(
        printed.contains("note: another run that starts now uses ports of this profile"),
        "{printed}"
    );
    drop(claim);
    assert!(!stderr(&env.run(&dry)).contains("another run"));
}

#[test]
fn a_second_run_gets_its_own_ports() {
    let env = TestEnv::new();
    let profile = format!("extends = \"1p1d\"\nengine = \"sim\"\nport_offset = {}\n", env.offset);
    std::fs::write(env.path().join("small.toml"), profile).expect("a file");
    let mut run = env.up(&SMALL);
    run.wait_until_ready();
    // The test has only one range of ports, so the second run is planned and not started.
    let second = ["up", "--dry-run", "--name", "two", "--profile", "small.toml"];
    // Another test's fleet can take the ports between the choice and the check.
    wait_for("ports that stay free", || {
        let output = env.run(&second);
        let (planned, printed) = (String::from_utf8_lossy(&output.stdout).into_owned(), stderr(&output));
        assert!(output.status.success(), "{printed}");
        assert!(
            printed.contains("note: run `default` uses ports of this profile"),
            "{printed}"
        );
        assert!(!planned.contains(&format!(":{}", env.proxy_port())), "{planned}");
        if planned.contains("fail") { Err(planned) } else { Ok(()) }
    });
    // xpyd does not move ports that the user set.
    let offset = format!("port_offset={}", env.offset);
    let output = env.run(&["up", "--name", "two", "--profile", "small.toml", "--set", &offset]);
    let printed = stderr(&output);
    assert_eq!(output.status.code(), Some(3), "{printed}");
    assert!(
        printed.contains(&format!("in use by run `default` (pid {})", run.pid())),
        "{printed}"
    );
    assert!(printed.contains("`xpyd down`"), "{printed}");
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0);
}

#[test]
fn an_ended_run_leaves_no_runtime_files() {
    let env = TestEnv::new();
    let mut run = env.up(&[&SMALL[..], &["--name", "short"]].concat());
    run.wait_until_ready();
    assert!(env.path().join("xpyd/short/lock").exists());
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0);
    assert!(!env.path().join("xpyd/short").exists());
}

#[test]
fn unusable_folders_are_named_with_a_hint() {
    let env = TestEnv::new();
    std::fs::write(env.path().join("file"), "").expect("a file");
    for verb in [&["plan"][..], &["up", "--dry-run"]] {
        let output = env.run(&[verb, &["--engine", "sim", "--logs", "file/logs"]].concat());
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            printed.contains("fail  logs") && printed.contains("--logs DIR"),
            "{printed}"
        );
    }
    let output = env.run(&["up", "--engine", "sim", "--logs", "file/logs"]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));

    let gone = env.path().join("gone");
    std::fs::create_dir(&gone).expect("a folder");
    let up = env.command(&["up", "--engine", "sim"]);
    let mut command = after("cd gone && rmdir ../gone", &up);
    let output = command.output().expect("xpyd runs");
    let printed = stderr(&output);
    assert!(
        printed.contains("the working folder") && printed.contains("hint: `cd` to a folder that exists"),
        "{printed}"
    );
}

#[test]
fn usage_errors_exit_with_2() {
    let env = TestEnv::new();
    for line in [
        "up --engine sim --name a/b",
        "status --name a/b",
        "down --name .",
        "logs --name a/b",
        "stop",
        "pu",
    ] {
        let output = env.run(&line.split(' ').collect::<Vec<_>>());
        assert_eq!(output.status.code(), Some(2), "{line}: {}", stderr(&output));
    }
}

#[test]
fn an_unstarted_engine_differs_from_an_unknown_one() {
    let env = TestEnv::new();
    let folder = env.path().join("logs/20260101-000000-1p1d");
    std::fs::create_dir_all(&folder).expect("a folder");
    std::fs::write(folder.join("plan.json"), r#"{"engines": [{"id": "decoder1"}]}"#).expect("a file");
    std::fs::write(folder.join("xpyd.log"), "a line\n").expect("a file");
    let of_run = |role: &str| {
        let folder: PathBuf = folder.clone();
        env.run(&["logs", role, "--run", folder.to_str().expect("a path")])
    };
    let never = of_run("decoder1");
    assert_eq!(never.status.code(), Some(1), "{}", stderr(&never));
    assert!(stderr(&never).contains("ended before its start"), "{}", stderr(&never));
    let unknown = of_run("decoder9");
    assert_eq!(unknown.status.code(), Some(2), "{}", stderr(&unknown));
    assert!(!stderr(&unknown).contains("did you mean"), "{}", stderr(&unknown));
}
