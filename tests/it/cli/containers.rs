//! xpyd as the first process of a container, and containers beside each other.

use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{MODEL, Run, TestEnv, completion, wait_for};

/// The arguments of a fleet with one engine per role.
const SMALL: [&str; 2] = ["--profile", "1p1d"];

fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("the process exists");
}

/// A command as the first process of a container; `None` on machines where that is not
/// possible: it needs root, and not every machine allows it.
fn contained(env: &TestEnv, arguments: &[&str]) -> Option<Command> {
    let inside = |arguments: &[&str]| {
        let xpyd = env.command(arguments);
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
        command
            .arg(xpyd.get_program())
            .args(xpyd.get_args())
            .current_dir(env.path())
            .stdin(Stdio::null());
        command.envs(xpyd.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command
    };
    let works = inside(&["--version"]).output();
    works
        .is_ok_and(|output| output.status.success())
        .then(|| inside(arguments))
}

fn contained_up(env: &TestEnv) -> Option<Run<'_>> {
    let arguments = env.up_arguments(&SMALL);
    let command = contained(env, &arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
    Some(Run::start_command(env, command))
}

/// The process that a container begins with, seen from outside.
fn first_process(run: &Run<'_>) -> i32 {
    children(run.pid())[0]
}

fn children(pid: i32) -> Vec<i32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

#[test]
fn containers_with_shared_cgroups_do_not_kill_each_other() {
    let (one, two) = (TestEnv::new(), TestEnv::new());
    let Some(mut first) = contained_up(&one) else { return };
    first.wait_until_ready();
    // Process ids are the same in both.
    let mut second = contained_up(&two).expect("another container");
    second.wait_until_ready();
    send(first_process(&second), Signal::SIGTERM);
    assert_eq!(second.end().0, 0);
    assert!(!completion(one.proxy_port(), MODEL, "still here").is_empty());
    send(first_process(&first), Signal::SIGTERM);
    let (code, text) = first.end();
    assert_eq!(code, 0, "{text}");
    assert!(!text.contains("failed"), "{text}");
}

#[test]
fn as_pid_1_xpyd_reaps_orphans_and_forwards_signals() {
    let env = TestEnv::new();
    let Some(mut run) = contained_up(&env) else { return };
    run.wait_until_ready();
    let first = first_process(&run);
    // `docker exec` leaves orphans like this.
    let stray = Command::new("nsenter")
        .args([
            "--target",
            &first.to_string(),
            "--pid",
            "--mount",
            "sh",
            "-c",
            "sh -c 'exec sleep 0.1' & echo stray",
        ])
        .output()
        .expect("nsenter runs");
    assert_eq!(stray.stdout, b"stray\n", "{stray:?}");
    wait_for("the end of the remaining processes", || {
        let left = children(first);
        if left.len() == 1 {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    });
    send(first, Signal::SIGTERM);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("no process and no listener is left"), "{text}");
}
