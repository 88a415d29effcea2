//! Command lines of users who know `vllm serve` or other launchers, and engine options that xpyd itself decides.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::{Command, Output};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::{MODEL, Run, TestEnv, engine, post, wait_for};

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// The plan of a fleet of simulated engines, with its findings.
fn plan(env: &TestEnv, more: &[&str]) -> Value {
    let fixed = ["plan", "--json", "--engine", "sim"];
    let output = env.run(&[&fixed[..], more].concat());
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{more:?}: {error}: {}", text(&output)))
}

fn failures(plan: &Value) -> Vec<String> {
    let findings = plan["findings"].as_array().expect("findings").iter();
    let failed = findings.filter(|finding| finding["level"] == "fail");
    failed
        .map(|finding| format!("{} {}", finding["message"], finding["hint"]))
        .collect()
}

#[test]
fn owned_engine_flags_are_refused_with_the_profile_key() {
    let env = TestEnv::new();
    for (set, named, key) in [
        (r#"prefill.args=["--port", "9590"]"#, "--port", "prefill.port"),
        (r#"decode.args=["--host=0.0.0.0"]"#, "--host", "proxy.host"),
        (
            r#"vllm.args=["--kv_transfer_config.kv_role", "kv_both"]"#,
            "--kv_transfer_config",
            "connector",
        ),
        (
            r#"decode.args=["--served-model", "x"]"#,
            "--served-model",
            "served_model_name",
        ),
        (r#"vllm.args=["--config", "c.yaml"]"#, "--config", "vllm.args"),
        (
            r#"vllm.args=["--disable-log-stats"]"#,
            "--disable-log-stats",
            "take it out",
        ),
        (
            r#"decode.env={CUDA_VISIBLE_DEVICES="1"}"#,
            "CUDA_VISIBLE_DEVICES",
            "decode.gpus",
        ),
    ] {
        // Somebody's fleet can have the default ports.
        let offset = format!("port_offset={}", env.offset);
        let failures = failures(&plan(&env, &["--set", set, "--set", &offset]));
        let [failure] = &failures[..] else {
            panic!("{set}: {failures:?}");
        };
        // A key for all engines applies to each role.
        let key = if named == "--config" { "prefill.args" } else { key };
        assert!(failure.contains(named) && failure.contains(key), "{set}: {failure}");
    }
    let arguments = env.up_arguments(&["--set", r#"prefill.args=["--port", "9590"]"#]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let output = env.run(&arguments);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    assert!(
        text(&output).contains("`--port` in `prefill.args`"),
        "{}",
        text(&output)
    );
    assert!(!env.path().join("logs").exists(), "nothing was started");
}

#[test]
fn a_fleet_shape_is_a_word_and_engine_flags_follow_dashes() {
    let env = TestEnv::new();
    let mut run = env.up(&[
        "3p1d",
        "--tensor-parallel-size",
        "2",
        "--",
        "--max-num-seqs",
        "128",
        "-tp",
        "1",
        "--max-model-len=4k",
        "--lora-modules",
        "a=b",
    ]);
    run.wait_until_ready();
    let plan: Value = serde_json::from_str(&env.log("plan.json")).expect("a plan");
    let engines = plan["engines"].as_array().expect("engines");
    assert_eq!(engines.len(), 4);
    for engine in engines {
        let words: Vec<&str> = engine["argv"]
            .as_array()
            .expect("words")
            .iter()
            .filter_map(Value::as_str)
            .collect();
        let value = |name: &str| {
            words
                .iter()
                .position(|word| *word == name)
                .map(|index| words[index + 1])
        };
        assert_eq!(value("--tensor-parallel-size"), Some("1"), "the last one wins");
        assert_eq!(value("--max-model-len"), Some("4000"));
        assert_eq!(value("--max-num-seqs"), Some("128"));
        assert!(
            !words.contains(&"-tp") && !words.contains(&"--max-model-len=4k"),
            "{words:?}"
        );
    }
    let log = env.log("prefiller3.log");
    assert!(
        log.contains("these options change nothing here: --max-num-seqs, --lora-modules"),
        "{log}"
    );
}

#[test]
fn engine_flags_after_dashes_reach_a_detached_run() {
    let env = TestEnv::new();
    let arguments = env.up_arguments(&["-d", "1p1d", "--", "--max-num-seqs", "3"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let output = env.run(&arguments);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let plan = env.log("plan.json");
    assert_eq!(plan.matches("--max-num-seqs").count(), 2, "{plan}");
    assert!(!plan.contains("--detached-child"), "{plan}");
    let output = env.run(&["down"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
}

#[test]
fn misplaced_vllm_options_get_a_hint() {
    let env = TestEnv::new();
    let shown = plan(
        &env,
        &["1p1d", "--host", "0.0.0.0", "--tp", "2", "--connector", "lmcache-mp"],
    );
    assert_eq!(shown["plan"]["proxy"]["host"], "0.0.0.0");
    assert_eq!(shown["plan"]["connector"]["name"], "lmcache-mp");
    assert_eq!(shown["plan"]["engines"][1]["endpoint"]["tensor_parallel"], 2);
    for (arguments, expected) in [
        (&["up", "--max-model-len", "8192"][..], "after `--`"),
        (&["plan", "--max_num_seqs=8"], "after `--`"),
        (&["up", "--gpus", "0,1"], "prefill.gpus"),
        (&["up", "org/model"], "--model org/model"),
        (&["plan", "2p2e"], "did you mean"),
    ] {
        let output = env.run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(text(&output).contains(expected), "{arguments:?}: {}", text(&output));
    }
}

#[test]
fn profiles_are_shown_as_files_and_resolved() {
    let env = TestEnv::new();
    let file = "extends = \"1p3d\"\nmodel = \"tiny\" # mine\n";
    std::fs::write(env.path().join("my.toml"), file).expect("a file");
    let show = |arguments: &[&str]| text(&env.run(&[&["profiles", "show"], arguments].concat()));
    assert_eq!(show(&["./my.toml"]), file);
    let whole = show(&["--resolved", "./my.toml"]);
    assert!(!whole.contains("extends"), "{whole}");
    for line in ["model = \"tiny\"", "count = 3", "max_model_len = 16384", "[lmcache]"] {
        assert!(whole.contains(line), "{line}: {whole}");
    }
    std::fs::write(env.path().join("whole.toml"), whole).expect("a file");
    let output = env.run(&["profiles", "validate", "whole.toml"]);
    assert!(output.status.success(), "{}", text(&output));
    let generated = show(&["5p7d"]);
    assert!(generated.contains("decode.count = 7"), "{generated}");
    // The line is for editors; for TOML it is a comment.
    assert!(generated.starts_with("#:schema https://"), "{generated}");
    std::fs::write(env.path().join("5p7d.toml"), generated).expect("a file");
    assert_eq!(env.run(&["profiles", "validate", "./5p7d.toml"]).status.code(), Some(0));
}

#[test]
fn the_schema_of_profiles_is_printed_as_json() {
    let output = TestEnv::new().run(&["profiles", "schema"]);
    assert_eq!(output.status.code(), Some(0));
    let schema: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(schema["additionalProperties"], false);
    let count = &schema["properties"]["decode"]["properties"]["count"];
    assert_eq!((&count["minimum"], &count["default"]), (&1.into(), &1.into()));
}

#[test]
fn an_unrunnable_profile_fails_validation() {
    let env = TestEnv::new();
    for (file, expected) in [
        ("prefill.port = 7201", "port 7201 is used twice"),
        ("sim.preset = \"h200\"", "unknown preset `h200`; known are instant"),
        ("sim.faults = [\"explode\"]", "sim.faults"),
        ("decode.args = [\"--port\", \"1\"]", "`--port` in `decode.args`"),
        ("nixl.prefill_side_channel_port = 0", "nixl.prefill_side_channel_port"),
        ("vllm.env = {\"A=B\" = \"1\"}", "vllm.env.A=B"),
    ] {
        std::fs::write(env.path().join("my.toml"), format!("extends = \"2p2d\"\n{file}\n")).expect("a file");
        let output = env.run(&["profiles", "validate", "my.toml"]);
        assert_eq!(output.status.code(), Some(2), "{file}: {}", text(&output));
        assert!(text(&output).contains(expected), "{file}: {}", text(&output));
    }
    // A finding that depends on the installed software is not an error of the profile.
    std::fs::write(
        env.path().join("my.toml"),
        "extends = \"2p2d\"\nconnector = \"lmcache\"\n",
    )
    .expect("a file");
    let output = env.run(&["profiles", "validate", "my.toml"]);
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn engines_do_not_inherit_planned_variables() {
    let env = TestEnv::new();
    let arguments = env.up_arguments(&["1p1d", "--", "--data-parallel-size", "2"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut command = env.command(&arguments);
    command
        .env("VLLM_PORT", "tcp://10.0.0.1:8000")
        .env("VLLM_DP_SIZE", "4")
        .env("VLLM_LOGGING_LEVEL", "DEBUG");
    let mut run = Run::start_command(&env, command);
    run.wait_until_ready();
    let engines = env
        .processes()
        .into_iter()
        .filter(|(_, command)| command.contains(" sim ") && !command.contains("--engine"));
    let mut seen = 0;
    for (pid, _) in engines {
        let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let environ = String::from_utf8_lossy(&environ);
        assert!(
            !environ.contains("VLLM_PORT=tcp") && !environ.contains("VLLM_DP_SIZE"),
            "{environ}"
        );
        seen += usize::from(environ.contains("VLLM_LOGGING_LEVEL=DEBUG"));
    }
    assert!(seen >= 2, "{seen} engines");
}

#[test]
fn hints_name_what_was_typed() {
    let env = TestEnv::new();
    let set = |value| ["up", "1p1d", "--engine", "sim", "--dry-run", "--set", value];
    for (words, said, unsaid) in [
        (&["ps", "-a"][..], "unexpected argument", "option of vLLM"),
        (&["down", "--all"], "unexpected argument", "option of vLLM"),
        (&["plan", "-tp", "2"], "`--tp 2`", "-- -t"),
        (&["plan", "--enigne", "sim"], "--engine", "-- --enigne"),
        (&set("restart.policy=no"), "restart.policy", "--model"),
        (&set("port_offset=-1"), "port_offset", "without quotes"),
        (&["scale", "decode=+1"], "`decode=4`", "no run"),
        (
            &["up", "-d", "--engine", "sim", "--access-log", "/dev/stdout"],
            "name a file",
            "ready",
        ),
        (&["status", "--name=-x"], "-x", "xpyd up"),
        (
            &[
                "bench",
                "--base-url",
                "http://127.0.0.1:9",
                "--save-result",
                "--result-dir",
                "file/x",
            ],
            "--result-dir",
            "refused",
        ),
    ] {
        std::fs::write(env.path().join("file"), "").expect("a file");
        let output = env.run(words);
        let printed = text(&output);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {printed}");
        assert!(
            printed.contains(said) && !printed.contains(unsaid),
            "{words:?}: {printed}"
        );
    }
    let doctor = env.run(&[
        "doctor",
        "1p1d",
        "--engine",
        "sim",
        "--set",
        &format!("port_offset={}", env.offset),
        "--json",
    ]);
    assert!(text(&doctor).contains(r#""check":"#), "{}", text(&doctor));
    let empty = env
        .command(&["plan", "1p1d", "--engine", "sim"])
        .env("CLIENT_BOUND", "")
        .output();
    assert!(empty.expect("it runs").status.success());
}

#[test]
fn an_access_log_into_a_pipe_without_reader_is_refused() {
    let env = TestEnv::new();
    nix::unistd::mkfifo(&env.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    let arguments = env.up_arguments(&["--profile", "1p1d", "--access-log", "pipe"]);
    let output = env.run(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
}

#[test]
fn the_control_socket_takes_any_content_type() {
    let env = TestEnv::new();
    let mut run = env.up(&["--profile", "1p1d"]);
    run.wait_until_ready();
    let status: Value = serde_json::from_slice(&env.run(&["status", "--json"]).stdout).expect("JSON");
    let ask = |method: &str, path: &str, body: &str| {
        let socket = status["run"]["control_socket"].as_str().expect("a path");
        let mut stream = UnixStream::connect(socket).expect("a socket");
        // The content type of `curl -d`.
        let form = "content-type: application/x-www-form-urlencoded";
        let length = body.len();
        write!(stream, "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{form}\r\ncontent-length: {length}\r\n\r\n{body}").expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    };
    for (method, path, body, code) in [
        ("GET", "/v1/down", "", "405"),
        ("POST", "/v1/down", r#"{"force":"yes"}"#, "400"),
        ("POST", "/v1/engines/decoder1/restart", "", "409"),
    ] {
        let answer = ask(method, path, body);
        assert!(
            answer.contains(code) && answer.contains(r#"{"error":""#),
            "{path}: {answer}"
        );
    }
    let forced = ask("POST", "/v1/engines/decoder1/restart", r#"{"force":true}"#);
    assert!(forced.contains(" 202 "), "{forced}");
    run.wait_for_line("decoder1 serves again");
    // Other services reopen their logs on these signals.
    run.signal(Signal::SIGUSR1);
    run.signal(Signal::SIGUSR2);
    assert_eq!(engine(&env, "decoder1")["state"], "ready");
    run.signal(Signal::SIGTERM);
    assert_eq!(run.end().0, 0);
}

#[test]
fn a_run_starts_under_any_umask() {
    let env = TestEnv::new();
    let arguments = env.up_arguments(&["--profile", "1p1d", "--name", "masked"]);
    let inner = env.command(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let mut shell = Command::new("sh");
    shell
        .args(["-c", "umask 0177; exec \"$0\" \"$@\""])
        .arg(inner.get_program())
        .args(inner.get_args());
    shell
        .current_dir(env.path())
        .envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut run = Run::start_command(&env, shell);
    run.wait_until_ready();
    run.signal(Signal::SIGTERM);
    assert_eq!(run.end().0, 0);
}

#[test]
fn ctrl_c_ends_the_wait_for_a_drain_with_a_hint() {
    let env = TestEnv::new();
    let more = [
        "--profile",
        "1p1d",
        "--set",
        "decode.count=2",
        "--set",
        "sim.preset=h100-llama-3.1-8b",
    ];
    let mut run = env.up(&[&more[..], &["--name", "mine"]].concat());
    run.wait_until_ready();
    let port = env.proxy_port();
    // The request takes half a minute, and a drain waits for it.
    let long = serde_json::json!({"model": MODEL, "prompt": "x", "max_tokens": 4000, "ignore_eos": true});
    let request = std::thread::spawn(move || post(port, "/v1/completions", &long.to_string()));
    let busy = wait_for("an engine with a request", || {
        let status: Value =
            serde_json::from_slice(&env.run(&["status", "--json", "--name", "mine"]).stdout).expect("JSON");
        let mut engines = status["engines"].as_array().expect("engines").iter();
        let busy = engines.find(|engine| engine["role"] == "decode" && engine["in_flight"] != 0);
        busy.map(|engine| engine["id"].as_str().expect("a name").to_owned())
            .ok_or(status.to_string())
    });
    let mut drain = Run::start(&env, &["drain", &busy, "--name", "mine"]);
    drain.wait_for_line("draining");
    drain.signal(Signal::SIGINT);
    let (code, printed) = drain.end();
    assert_eq!(code, 130, "{printed}");
    assert!(
        printed.contains("the drain continues") && printed.contains("`xpyd status --name mine`"),
        "{printed}"
    );
    assert!(env.run(&["down", "--name", "mine", "--force"]).status.success());
    run.end();
    drop(request.join());
}

#[test]
fn following_logs_of_an_ended_run_ends() {
    let env = TestEnv::new();
    let mut run = env.up(&["--profile", "1p1d"]);
    run.wait_until_ready();
    run.signal(Signal::SIGTERM);
    assert_eq!(run.end().0, 0);
    let folder = std::fs::canonicalize(env.path().join("logs/latest")).expect("a folder");
    for more in [&[][..], &["--run", folder.to_str().expect("a path")]] {
        let (code, printed) = Run::start(&env, &[&["logs", "-f", "decoder1"], more].concat()).end();
        assert_eq!(code, 0, "{printed}");
        assert!(printed.contains("Starting to load model"), "{printed}");
    }
}

#[test]
fn a_port_offset_does_not_move_the_port_flag() {
    let env = TestEnv::new();
    let port = |more: &[&str]| {
        let offset = &["1p1d", "--set", "port_offset=1000"][..];
        plan(&env, &[offset, more].concat())["plan"]["proxy"]["port"].as_u64()
    };
    assert_eq!(port(&["--port", "8000"]), Some(8000));
    assert_eq!(port(&["--set", "proxy.port=8000"]), Some(9000));
}
