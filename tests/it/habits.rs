//! What people type who come from `vllm serve` and from other launchers, and what they give engines although xpyd decides it.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::{Command, Output};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::{Place, Run, engine, post, wait_for};

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// The plan of simulated engines, with its findings.
fn plan(place: &Place, more: &[&str]) -> Value {
    let fixed = ["plan", "--json", "--engine", "sim"];
    let output = place.run(&[&fixed[..], more].concat());
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
fn what_xpyd_decides_is_refused_with_the_key_to_use_before_anything_starts() {
    let place = Place::new();
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
        let failures = failures(&plan(&place, &["--set", set]));
        let [failure] = &failures[..] else {
            panic!("{set}: {failures:?}");
        };
        // The key of all engines is that of each role.
        let key = if named == "--config" { "prefill.args" } else { key };
        assert!(failure.contains(named) && failure.contains(key), "{set}: {failure}");
    }
    let arguments = place.up_arguments(&["--set", r#"prefill.args=["--port", "9590"]"#]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let output = place.run(&arguments);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    assert!(
        text(&output).contains("`--port` in `prefill.args`"),
        "{}",
        text(&output)
    );
    assert!(!place.path().join("logs").exists(), "nothing was started");
}

#[test]
fn any_fleet_is_a_word_and_what_follows_two_dashes_goes_to_the_engines() {
    let place = Place::new();
    let mut run = place.up(&[
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
    let plan: Value = serde_json::from_str(&place.log("plan.json")).expect("a plan");
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
    let log = place.log("prefiller3.log");
    assert!(
        log.contains("these options change nothing here: --max-num-seqs, --lora-modules"),
        "{log}"
    );
}

#[test]
fn what_follows_two_dashes_goes_along_when_the_run_is_detached() {
    let place = Place::new();
    let arguments = place.up_arguments(&["-d", "1p1d", "--", "--max-num-seqs", "3"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let output = place.run(&arguments);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let plan = place.log("plan.json");
    assert_eq!(plan.matches("--max-num-seqs").count(), 2, "{plan}");
    assert!(!plan.contains("--detached-child"), "{plan}");
    let output = place.run(&["down"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
}

#[test]
fn hosts_and_ranks_are_flags_and_vllms_options_are_shown_their_place() {
    let place = Place::new();
    let shown = plan(
        &place,
        &["1p1d", "--host", "0.0.0.0", "--tp", "2", "--connector", "lmcache-mp"],
    );
    assert_eq!(shown["plan"]["proxy"]["host"], "0.0.0.0");
    assert_eq!(shown["plan"]["connector"]["name"], "lmcache-mp");
    assert_eq!(shown["plan"]["engines"][1]["endpoint"]["tensor_parallel"], 2);
    for (arguments, told) in [
        (&["up", "--max-model-len", "8192"][..], "behind `--`"),
        (&["plan", "--max_num_seqs=8"], "behind `--`"),
        (&["up", "--gpus", "0,1"], "prefill.gpus"),
        (&["up", "org/model"], "--model org/model"),
        (&["plan", "2p2e"], "did you mean"),
    ] {
        let output = place.run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(text(&output).contains(told), "{arguments:?}: {}", text(&output));
    }
}

#[test]
fn profiles_are_shown_as_files_and_as_a_whole() {
    let place = Place::new();
    let file = "extends = \"1p3d\"\nmodel = \"tiny\" # mine\n";
    std::fs::write(place.path().join("my.toml"), file).expect("a file");
    let show = |arguments: &[&str]| text(&place.run(&[&["profiles", "show"], arguments].concat()));
    assert_eq!(show(&["./my.toml"]), file);
    let whole = show(&["--resolved", "./my.toml"]);
    assert!(!whole.contains("extends"), "{whole}");
    for line in ["model = \"tiny\"", "count = 3", "max_model_len = 16384", "[lmcache]"] {
        assert!(whole.contains(line), "{line}: {whole}");
    }
    std::fs::write(place.path().join("whole.toml"), whole).expect("a file");
    let output = place.run(&["profiles", "validate", "whole.toml"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(show(&["5p7d"]).contains("decode.count = 7"));
}

#[test]
fn a_profile_that_can_run_nowhere_is_not_a_good_one() {
    let place = Place::new();
    for (file, told) in [
        ("prefill.port = 7201", "port 7201 is needed twice"),
        ("sim.preset = \"h200\"", "unknown preset `h200`; known are instant"),
        ("sim.faults = [\"explode\"]", "sim.faults"),
        ("decode.args = [\"--port\", \"1\"]", "`--port` in `decode.args`"),
        ("nixl.prefill_side_channel_port = 0", "nixl.prefill_side_channel_port"),
        ("vllm.env = {\"A=B\" = \"1\"}", "vllm.env.A=B"),
    ] {
        std::fs::write(place.path().join("my.toml"), format!("extends = \"2p2d\"\n{file}\n")).expect("a file");
        let output = place.run(&["profiles", "validate", "my.toml"]);
        assert_eq!(output.status.code(), Some(2), "{file}: {}", text(&output));
        assert!(text(&output).contains(told), "{file}: {}", text(&output));
    }
    // What depends on what is installed is no fault of the profile.
    std::fs::write(
        place.path().join("my.toml"),
        "extends = \"2p2d\"\nconnector = \"lmcache\"\n",
    )
    .expect("a file");
    let output = place.run(&["profiles", "validate", "my.toml"]);
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn engines_do_not_inherit_what_the_plan_decides() {
    let place = Place::new();
    let arguments = place.up_arguments(&["1p1d", "--", "--data-parallel-size", "2"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut command = place.command(&arguments);
    command
        .env("VLLM_PORT", "tcp://10.0.0.1:8000")
        .env("VLLM_DP_SIZE", "4")
        .env("VLLM_LOGGING_LEVEL", "DEBUG");
    let mut run = Run::of(&place, command);
    run.wait_until_ready();
    let engines = place
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
fn hints_are_about_what_was_typed() {
    let place = Place::new();
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
        std::fs::write(place.path().join("file"), "").expect("a file");
        let output = place.run(words);
        let printed = text(&output);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {printed}");
        assert!(
            printed.contains(said) && !printed.contains(unsaid),
            "{words:?}: {printed}"
        );
    }
    let doctor = place.run(&[
        "doctor",
        "1p1d",
        "--engine",
        "sim",
        "--set",
        &format!("port_offset={}", place.offset),
        "--json",
    ]);
    assert!(text(&doctor).contains(r#""check":"#), "{}", text(&doctor));
    let empty = place
        .command(&["plan", "1p1d", "--engine", "sim"])
        .env("CLIENT_BOUND", "")
        .output();
    assert!(empty.expect("it runs").status.success());
}

#[test]
fn an_access_log_that_nobody_reads_is_refused() {
    let place = Place::new();
    nix::unistd::mkfifo(&place.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    let arguments = place.up_arguments(&["--profile", "1p1d", "--access-log", "pipe"]);
    let output = place.run(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
}

#[test]
fn the_control_socket_reads_a_body_of_any_type_and_answers_errors_in_one_shape() {
    let place = Place::new();
    let mut run = place.up(&["--profile", "1p1d"]);
    run.wait_until_ready();
    let status: Value = serde_json::from_slice(&place.run(&["status", "--json"]).stdout).expect("JSON");
    let ask = |method: &str, path: &str, body: &str| {
        let socket = status["run"]["control_socket"].as_str().expect("a path");
        let mut stream = UnixStream::connect(socket).expect("a socket");
        // What `curl -d` claims.
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
    // Signals on which other services reopen their logs.
    run.signal(Signal::SIGUSR1);
    run.signal(Signal::SIGUSR2);
    assert_eq!(engine(&place, "decoder1")["state"], "ready");
    run.signal(Signal::SIGTERM);
    assert_eq!(run.end().0, 0);
}

#[test]
fn a_run_starts_under_any_umask() {
    let place = Place::new();
    let arguments = place.up_arguments(&["--profile", "1p1d", "--name", "masked"]);
    let inner = place.command(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let mut shell = Command::new("sh");
    shell
        .args(["-c", "umask 0177; exec \"$0\" \"$@\""])
        .arg(inner.get_program())
        .args(inner.get_args());
    shell
        .current_dir(place.path())
        .envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut run = Run::of(&place, shell);
    run.wait_until_ready();
    run.signal(Signal::SIGTERM);
    assert_eq!(run.end().0, 0);
}

#[test]
fn ctrl_c_ends_the_waiting_for_a_drain_and_the_hint_names_the_run() {
    let place = Place::new();
    let more = [
        "--profile",
        "1p1d",
        "--set",
        "decode.count=2",
        "--set",
        "sim.preset=h100-llama-3.1-8b",
    ];
    let mut run = place.up(&[&more[..], &["--name", "mine"]].concat());
    run.wait_until_ready();
    let port = place.proxy_port();
    // It takes half a minute, and a drain waits for it.
    let long = serde_json::json!({"model": "meta-llama/Llama-3.1-8B-Instruct", "prompt": "x", "max_tokens": 4000, "ignore_eos": true});
    let request = std::thread::spawn(move || post(port, "/v1/completions", &long.to_string()));
    let busy = wait_for("an engine with a request", || {
        let status: Value =
            serde_json::from_slice(&place.run(&["status", "--json", "--name", "mine"]).stdout).expect("JSON");
        let mut engines = status["engines"].as_array().expect("engines").iter();
        let busy = engines.find(|engine| engine["role"] == "decode" && engine["in_flight"] != 0);
        busy.map(|engine| engine["id"].as_str().expect("a name").to_owned())
            .ok_or(status.to_string())
    });
    let mut drain = Run::start(&place, &["drain", &busy, "--name", "mine"]);
    drain.wait_for_line("draining");
    drain.signal(Signal::SIGINT);
    let (code, told) = drain.end();
    assert_eq!(code, 130, "{told}");
    assert!(
        told.contains("the drain goes on") && told.contains("`xpyd status --name mine`"),
        "{told}"
    );
    assert!(place.run(&["down", "--name", "mine", "--force"]).status.success());
    run.end();
    drop(request.join());
}

#[test]
fn following_the_logs_of_an_ended_run_ends() {
    let place = Place::new();
    let mut run = place.up(&["--profile", "1p1d"]);
    run.wait_until_ready();
    run.signal(Signal::SIGTERM);
    assert_eq!(run.end().0, 0);
    let folder = std::fs::canonicalize(place.path().join("logs/latest")).expect("a folder");
    for more in [&[][..], &["--run", folder.to_str().expect("a path")]] {
        let (code, printed) = Run::start(&place, &[&["logs", "-f", "decoder1"], more].concat()).end();
        assert_eq!(code, 0, "{printed}");
        assert!(printed.contains("Starting to load model"), "{printed}");
    }
}

#[test]
fn a_port_offset_does_not_move_the_port_of_the_flag() {
    let place = Place::new();
    let port = |more: &[&str]| {
        let offset = &["1p1d", "--set", "port_offset=1000"][..];
        plan(&place, &[offset, more].concat())["plan"]["proxy"]["port"].as_u64()
    };
    assert_eq!(port(&["--port", "8000"]), Some(8000));
    assert_eq!(port(&["--set", "proxy.port=8000"]), Some(9000));
}
