//! Hints are safe to follow: each command in a hint exists, has the promised effect, and does not touch other runs.

use std::path::Path;
use std::process::Command;

use clap::Parser as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Run, TestEnv, kill_process, wait_for};

/// Every text between backticks in the sources that is an xpyd command.
fn commands(text: &str) -> Vec<String> {
    let spans = text.split('`').skip(1).step_by(2);
    let named = spans.filter(|span| span.starts_with("xpyd ") && !span.contains('\n'));
    named.map(str::to_owned).collect()
}

fn sources(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder").flatten();
    let paths = entries.map(|entry| entry.path());
    let (folders, files): (Vec<_>, Vec<_>) = paths.partition(|path| path.is_dir());
    let inner = folders.iter().flat_map(|folder| sources(folder));
    let is_text = |path: &&std::path::PathBuf| path.extension().is_some_and(|kind| kind == "rs" || kind == "toml");
    files.iter().filter(is_text).cloned().chain(inner).collect()
}

/// The words as a user types them, with example values for placeholders.
fn words(command: &str) -> Vec<String> {
    let mut text = String::new();
    let mut rest = command;
    while let Some((before, after)) = rest.split_once('{') {
        text += before;
        text += "1";
        rest = after.split_once('}').map_or("", |(_, rest)| rest);
    }
    text += rest;
    let mut words: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        let is_value = words.last().is_some_and(|last| last.starts_with("--"));
        // `…` alone stands for the user's options.
        if word != "…" || is_value {
            words.push(word.replace('…', "1"));
        }
    }
    words
}

#[test]
fn every_command_in_a_text_parses() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = 0;
    for path in ["src", "crates"].iter().flat_map(|folder| sources(&root.join(folder))) {
        let text = std::fs::read_to_string(&path).expect("a file");
        let texts = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        for command in texts.flat_map(commands) {
            found += 1;
            let mut words = words(&command);
            // A placeholder for a verb, as in `xpyd VERB`, is no command.
            if words
                .get(1)
                .is_some_and(|word| word.chars().all(char::is_uppercase) || word == "1")
            {
                continue;
            }
            // A verb without its arguments, which the sentence does not need.
            let needs_more = ["restart", "drain", "scale", "sim", "sidecar"];
            if words.len() == 2 && needs_more.contains(&words[1].as_str()) {
                words.push("--help".to_owned());
            }
            let parsed = xpyd::cli::Cli::try_parse_from(&words);
            let is_understood = parsed.as_ref().map_or_else(|error| !error.use_stderr(), |_| true);
            assert!(
                is_understood,
                "{}: `{command}` does not parse: {:?}",
                path.display(),
                parsed.err()
            );
        }
    }
    assert!(found > 30, "only {found} commands were found");
}

/// The commands in the hints of this output.
fn hinted_commands(printed: &str) -> Vec<String> {
    let hints = printed.lines().filter(|line| line.starts_with("hint:"));
    let spans = hints.flat_map(|line| line.split('`').skip(1).step_by(2));
    let named = spans.filter(|span| span.starts_with("xpyd ") || span.starts_with("kill "));
    named.map(str::to_owned).collect()
}

/// Runs one command as it is printed, and checks that it succeeds.
fn run_hint(env: &TestEnv, command: &str) {
    let words: Vec<&str> = command.split_whitespace().collect();
    let output = if words[0] == "xpyd" {
        env.run(&words[1..])
    } else {
        Command::new(words[0]).args(&words[1..]).output().expect("a program")
    };
    assert_eq!(output.status.code(), Some(0), "{command}: {output:?}");
}

/// Two named runs in one test environment. The other run must not be affected.
fn two_runs(env: &TestEnv, more: &[&str]) -> (Vec<(i32, String)>, i32) {
    let up = |name: &str, offset: u16| {
        let offset = format!("port_offset={}", env.offset + offset);
        let fixed = ["up", "-d", "--name", name, "--profile", "1p1d", "--engine", "sim"];
        let settings = ["--set", "sim.preset=instant", "--set", &offset];
        let output = env.run(&[&fixed[..], &settings, more].concat());
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    };
    up("other", 0);
    let others = env.processes();
    up("mine", 2);
    (others, xpyd_of(env, "mine"))
}

fn xpyd_of(env: &TestEnv, name: &str) -> i32 {
    let status = env.run(&["status", "--json", "--name", name]);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).expect("JSON");
    i32::try_from(status["run"]["pid"].as_i64().expect("a pid")).expect("a pid")
}

/// Waits until only these processes are left, and then stops the other run.
fn assert_only_the_other_run_is_left(env: &TestEnv, others: &[(i32, String)]) {
    wait_for("the end of this run alone", || {
        let now = env.processes();
        if now == others {
            Ok(())
        } else {
            Err(format!("{now:#?}"))
        }
    });
    run_hint(env, "xpyd down --name other");
    env.wait_until_empty();
    env.assert_no_listener();
}

#[test]
fn the_hint_for_a_suspended_xpyd_ends_only_its_run() {
    let env = TestEnv::new();
    let (others, xpyd) = two_runs(&env, &[]);
    kill(Pid::from_raw(xpyd), Signal::SIGSTOP).expect("the process exists");
    let output = env.run(&["down", "--name", "mine"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    let command = format!("kill -CONT {xpyd}");
    assert!(printed.contains(&format!("`{command}`")), "{printed}");
    run_hint(&env, &command);
    run_hint(&env, "xpyd down --name mine");
    assert_only_the_other_run_is_left(&env, &others);
}

#[test]
fn the_hint_for_a_hung_shim_ends_only_its_run() {
    let env = TestEnv::new();
    let (others, xpyd) = two_runs(&env, &[]);
    let shims = || {
        env.processes()
            .into_iter()
            .filter(|(_, command)| command.contains("xpyd shim"))
    };
    let own: Vec<i32> = shims()
        .map(|(pid, _)| pid)
        .filter(|pid| others.iter().all(|(other, _)| other != pid))
        .collect();
    assert_eq!(own.len(), 2, "the shim and its monitor");
    kill_process(xpyd);
    let is_child = |pid: &i32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
        own.iter().any(|parent| status.contains(&format!("PPid:\t{parent}\n")))
    };
    let shim = own.iter().copied().find(is_child).expect("the child of its monitor");
    kill(Pid::from_raw(shim), Signal::SIGSTOP).expect("the process exists");
    let output = env.run(&["down", "--name", "mine"]);
    assert_eq!(output.status.code(), Some(8), "{output:?}");
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    let commands = hinted_commands(&printed);
    assert_eq!(
        commands,
        [format!("kill -KILL {shim}"), "xpyd doctor".to_owned()],
        "{printed}"
    );
    run_hint(&env, &commands[0]);
    assert_only_the_other_run_is_left(&env, &others);
}

#[test]
fn a_named_run_prints_commands_that_name_it() {
    let env = TestEnv::new();
    std::fs::write(env.path().join("keys"), "swordfish\n").expect("a file");
    let mut run = env.up(&["--profile", "1p1d", "--name", "mine", "--api-key-file", "keys"]);
    run.wait_for_line("  and  ");
    let printed = run.seen.join("\n");
    let url = format!("http://127.0.0.1:{}", env.proxy_port());
    let key = format!("$(grep -m1 '^[^#]' '{}')", env.path().join("keys").display());
    for text in [
        &format!("-H \"Authorization: Bearer {key}\""),
        "xpyd status --name mine",
        "xpyd logs decoder1 -f --name mine",
        &format!("OPENAI_API_KEY=\"{key}\" xpyd bench --base-url {url}"),
        "xpyd down --name mine",
    ] {
        assert!(printed.contains(text), "no {text} in\n{printed}");
    }
    // A command for the default run mentions this one.
    let output = env.run(&["status"]);
    let commands = hinted_commands(&String::from_utf8_lossy(&output.stderr));
    assert_eq!(commands, ["xpyd ps"]);
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("`--name mine`"),
        "{output:?}"
    );
    for command in &commands {
        run_hint(&env, command);
    }
    let again = env.run(&["up", "--engine", "sim", "--name", "mine"]);
    let commands = hinted_commands(&String::from_utf8_lossy(&again.stderr));
    assert_eq!(
        commands,
        ["xpyd status --name mine", "xpyd down --name mine"],
        "{again:?}"
    );
    for command in &commands {
        run_hint(&env, command);
    }
    assert_eq!(run.end().0, 0);
}

#[test]
fn errors_are_printed_with_quiet() {
    let env = TestEnv::new();
    let offset = format!("port_offset={}", env.offset);
    let taken = std::net::TcpListener::bind(("127.0.0.1", 7200 + env.offset)).expect("a free port");
    let fleet = ["--engine", "sim", "--set", &offset];
    let of = |verb: &[&'static str]| [verb, &fleet].concat();
    for arguments in [
        of(&["-q", "up"]),
        of(&["-q", "up", "-d"]),
        [&["-q", "bench", "--profile", "2p2d", "--num-prompts", "1"][..], &fleet].concat(),
        vec!["-q", "status"],
        vec!["-q", "down"],
        vec!["-q", "logs", "--name", "none"],
        vec!["-q", "restart", "decoder1"],
        vec!["-q", "drain", "decoder1"],
        vec!["-q", "scale", "decode=2"],
        vec!["-q", "bundle", "--output", "nowhere/x.tar.gz"],
        vec!["-q", "profiles", "check", "nowhere.toml"],
        vec!["-q", "proxy", "--api-key-file", "nowhere", "--connector", "nixl"],
        vec![
            "-q",
            "bench",
            "--base-url",
            "http://127.0.0.1:1",
            "--num-prompts",
            "1",
            "--ready-check-timeout-sec",
            "0",
        ],
    ] {
        let output = env.run(&arguments);
        let printed = String::from_utf8_lossy(&output.stderr);
        assert_ne!(output.status.code(), Some(0), "{arguments:?}");
        assert!(printed.contains("error:"), "{arguments:?} printed `{printed}`");
    }
    drop(taken);
}

#[test]
fn a_killed_start_is_reported() {
    let env = TestEnv::new();
    let arguments = env.up_arguments(&["-d", "-q", "--set", "sim.faults=[\"freeze-at=server\"]"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let run = Run::start(&env, &arguments);
    let child = wait_for("the process that stays", || {
        let found = env
            .processes()
            .into_iter()
            .find(|(_, command)| command.contains("--detached-child"));
        found.map(|(pid, _)| pid).ok_or_else(|| "none".to_owned())
    });
    kill_process(child);
    let (code, printed) = run.end();
    assert_eq!(code, 1, "{printed}");
    assert!(printed.contains("was killed by signal 9"), "{printed}");
    env.wait_until_empty();
}

#[test]
fn invalid_values_are_explained_in_plain_words() {
    let env = TestEnv::new();
    std::fs::create_dir_all(env.path().join("run")).expect("a folder");
    std::fs::write(env.path().join("run/decoder1.log"), "one\ntwo\n").expect("a log");
    for (line, expected) in [
        ("bench --request-rate fast", "expected a number"),
        (
            "bench --request-rate -1",
            "the request rate must be more than 0, not -1",
        ),
        ("bench --num-prompts -5", "expected a whole number, at least 0"),
        ("bench --max-concurrency 0", "must be at least 1"),
        ("bench --seed 99999999999", "is not in 0..=4294967295"),
        ("bench --port 99999", "is not in 0..=65535"),
        (
            "logs --run run --grep (",
            "`--grep` is not a regular expression: unclosed group",
        ),
        ("logs --run run --tail many", "expected a number of lines, or `all`"),
        (
            "bench --from nofile.json --report page.html",
            "cannot make a report of `nofile.json`",
        ),
    ] {
        let output = env.run(&line.split(' ').collect::<Vec<_>>());
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{line}: {text}");
        assert!(text.contains(expected), "{line}: {text}");
        for theirs in ["literal", "digit found", "target type", "metadata", "tip:"] {
            assert!(!text.contains(theirs), "{line}: {text}");
        }
    }
    let all = env.run(&["logs", "--run", "run", "--tail", "all"]);
    assert!(
        String::from_utf8_lossy(&all.stdout).contains("two"),
        "{}",
        String::from_utf8_lossy(&all.stderr)
    );
    let near = env.run(&["bench", "--request-rat", "1"]);
    let text = String::from_utf8_lossy(&near.stderr).into_owned();
    assert!(
        text.contains("hint: ") && text.contains("--request-rate") && !text.contains("tip:"),
        "{text}"
    );
}
