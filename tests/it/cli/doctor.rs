//! `xpyd doctor` and `xpyd bundle`: findings, repairs, and the secrets that they leave out.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::{TestEnv, Unsupervised, wait_for};

/// A folder with a `vllm`, and a `python` that reports these packages as installed.
fn environment(env: &TestEnv, packages: &Value, options: &[&str], connectors: &[&str]) -> PathBuf {
    let bin = env.path().join("env/bin");
    std::fs::create_dir_all(&bin).expect("a folder");
    let found = json!({"python": "3.12.3", "packages": packages, "options": options, "connectors": connectors});
    for (name, text) in [("python", format!("echo '{found}'")), ("vllm", "exit 1".to_owned())] {
        std::fs::write(bin.join(name), format!("#!/bin/sh\n{text}\n")).expect("a file");
        std::fs::set_permissions(bin.join(name), std::fs::Permissions::from_mode(0o755)).expect("a mode");
    }
    bin
}

/// A folder with a model's `config.json`.
fn model(env: &TestEnv) -> PathBuf {
    let folder = env.path().join("model");
    std::fs::create_dir_all(&folder).expect("a folder");
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::write(folder.join(name), "{}").expect("a file");
    }
    folder
}

/// Runs `xpyd doctor` for a fleet without GPUs in this Python environment.
fn doctor(env: &TestEnv, bin: &Path, more: &[&str]) -> Command {
    let model = model(env);
    let offset = format!("port_offset={}", env.offset);
    let fixed = ["doctor", "--json", "--profile", "cpu-1p1d", "--set", &offset];
    let mut command = env.command(&fixed.iter().chain(more).copied().collect::<Vec<_>>());
    if !more.contains(&"--model") {
        command.arg("--model").arg(model);
    }
    command.env("PATH", bin);
    command
}

fn findings(command: &mut Command) -> (i32, BTreeMap<String, Value>) {
    let output = command.output().expect("xpyd runs");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    let findings = report["findings"].as_array().expect("a list");
    let by_check = findings
        .iter()
        .map(|finding| (finding["check"].as_str().expect("text").to_owned(), finding.clone()));
    (output.status.code().unwrap_or(-1), by_check.collect())
}

fn text<'finding>(finding: &'finding Value, key: &str) -> &'finding str {
    finding[key].as_str().unwrap_or_default()
}

const GOOD: &[&str] = &[
    "NixlConnector",
    "MultiConnector",
    "LMCacheConnectorV1",
    "LMCacheMPConnector",
];

#[test]
fn doctor_passes_on_a_bare_machine() {
    let env = TestEnv::new();
    let mut command = env.command(&["doctor", "--json"]);
    let (code, findings) = findings(command.env("PATH", env.path()));
    assert_eq!(code, 0, "{findings:#?}");
    assert_eq!(
        text(&findings["vllm"], "message"),
        "the program `vllm` was not found on PATH"
    );
    assert!(text(&findings["vllm"], "hint").contains("pip install vllm"));
    for check in ["gpu", "hf_token", "nofile", "shm", "orphans", "runs", "cgroup"] {
        assert!(findings.contains_key(check), "{check}: {findings:#?}");
    }
}

#[test]
fn installed_packages_are_reported_and_pass() {
    let env = TestEnv::new();
    let packages = json!({"vllm": "0.32.0+cpu", "nixl-cu13": "1.5.1", "torch": "2.13.0+cpu"});
    let bin = environment(&env, &packages, &[], GOOD);
    let (code, findings) = findings(&mut doctor(&env, &bin, &[]));
    assert_eq!(code, 0, "{findings:#?}");
    assert_eq!(text(&findings["python"], "message"), "Python 3.12.3, torch 2.13.0+cpu");
    assert_eq!(text(&findings["nixl"], "message"), "nixl 1.5.1");
    assert_eq!(text(&findings["ports"], "level"), "pass");
    assert!(text(&findings["model"], "message").ends_with("is a folder on this machine"));
}

/// The options of the installed vLLM.
const OPTIONS: &[&str] = &[
    "--max-model-len",
    "--port",
    "--served-model-name",
    "--host",
    "--tensor-parallel-size",
    "--shutdown-timeout",
    "--kv-transfer-config",
    "--dtype",
    "--enforce-eager",
    "--enable-prefix-caching",
    "--enable-prompt-tokens-details",
];

/// Checks that `xpyd doctor MORE` on these packages and connectors has a finding of `check` with `words` and a hint, and that
/// its level decides the exit code.
fn assert_finding(packages: &Value, connectors: &[&str], more: &[&str], (check, words): (&str, &str)) {
    let env = TestEnv::new();
    let bin = environment(&env, packages, OPTIONS, connectors);
    let (code, findings) = findings(&mut doctor(&env, &bin, more));
    let found = findings
        .get(check)
        .unwrap_or_else(|| panic!("no {check}: {findings:#?}"));
    assert!(text(found, "message").contains(words), "{found}");
    let fails = text(found, "level") == "fail";
    assert_eq!(code, if fails { 3 } else { 0 }, "{check}: {findings:#?}");
    let hint_is_missing = text(found, "hint").is_empty() && text(found, "level") == "fail";
    assert!(!hint_is_missing, "{found}");
}

#[test]
fn missing_packages_are_named() {
    assert_finding(
        &json!({"vllm": "0.32.0"}),
        GOOD,
        &[],
        ("nixl", "nixl is not installed in vLLM's environment"),
    );
    assert_finding(&json!({}), GOOD, &[], ("nixl", "cannot check"));
    let both = json!({"vllm": "0.32.0", "nixl": "1.5.1", "lmcache": "0.5.6"});
    let store = ["--set", "connector=lmcache-mp"];
    assert_finding(
        &both,
        GOOD,
        &store,
        ("lmcache_program", "is not in the folder of `vllm`"),
    );
}

#[test]
fn options_unknown_to_the_installed_vllm_are_named() {
    let good = json!({"vllm": "0.32.0", "nixl": "1.5.1"});
    assert_finding(
        &good,
        &["Other"],
        &[],
        ("connector", "vLLM 0.32.0 has no NixlConnector"),
    );
    let removed = ["--set", "vllm.args=[\"--disable-log-requests\"]"];
    assert_finding(
        &good,
        GOOD,
        &removed,
        ("options", "vLLM 0.32.0 has no option `--disable-log-requests`"),
    );
    let typo = ["--set", "decode.args=[\"--max-model-lenn\", \"8\"]"];
    assert_finding(
        &good,
        GOOD,
        &typo,
        ("options", "no option `--max-model-lenn`, so decoder1"),
    );
    let forced = ["--connector", "lmcache"];
    assert_finding(&good, GOOD, &forced, ("plan", "connector `lmcache` is not safe here"));
}

#[test]
fn impossible_roles_and_models_are_named() {
    let good = json!({"vllm": "0.32.0", "nixl": "1.5.1"});
    let seed = ["--set", "decode.env={PYTHONHASHSEED=\"1\"}"];
    assert_finding(&good, GOOD, &seed, ("hash_seed", "PYTHONHASHSEED differs"));
    let dtype = ["--set", "decode.args=[\"--dtype\", \"half\"]"];
    assert_finding(&good, GOOD, &dtype, ("roles", "KV transfers cannot work"));
    let model = ["--model", "/no/such/model"];
    assert_finding(&good, GOOD, &model, ("model", "`/no/such/model` does not exist"));
}

#[test]
fn a_taken_port_is_named_with_its_process() {
    let env = TestEnv::new();
    let port = 7100 + env.offset;
    let _holder = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("a free port");
    let bin = environment(&env, &json!({"vllm": "0.32.0", "nixl": "1.5.1"}), &[], GOOD);
    let (code, findings) = findings(&mut doctor(&env, &bin, &[]));
    assert_eq!(code, 3);
    let message = text(&findings["ports"], "message");
    let wanted = format!(
        "1 port is in use: {port} (prefiller1 http) by process {}",
        std::process::id()
    );
    assert!(message.starts_with(&wanted), "{message}");
}

#[test]
fn text_output_has_topics_fixes_and_a_summary() {
    let env = TestEnv::new();
    let output = env
        .command(&["doctor"])
        .env("PATH", env.path())
        .output()
        .expect("xpyd runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.starts_with("software\n  warn  vllm"), "{text}");
    assert!(
        text.contains("hint: `pip install vllm nixl`") && !text.contains('\x1b'),
        "{text}"
    );
    assert!(
        text.trim_end()
            .lines()
            .last()
            .is_some_and(|line| line.contains(" passed, in ")),
        "{text}"
    );
}

#[test]
fn an_invalid_profile_is_a_usage_error() {
    let output = TestEnv::new().run(&["doctor", "--profile", "no-such"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

/// The runtime folder of a run that was killed.
fn killed_run(env: &TestEnv, name: &str) -> PathBuf {
    let folder = env.path().join("xpyd").join(name);
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&folder)
        .expect("a folder");
    for file in ["lock", "run.json", "control.sock"] {
        std::fs::write(folder.join(file), "").expect("a file");
    }
    folder
}

#[test]
fn only_leftovers_of_killed_runs_are_listed_and_removed() {
    let env = TestEnv::new();
    let folder = killed_run(&env, "old");
    let mine = env.path().join("xpyd/old/mine");
    std::fs::write(&mine, "of the user").expect("a file");
    let (_, found) = findings(&mut env.command(&["doctor", "--json"]));
    assert!(
        text(&found["runs"], "message").ends_with("killed runs are left: old"),
        "{found:#?}"
    );
    assert!(folder.join("run.json").exists(), "looking changes nothing");

    let output = env.run(&["doctor", "--fix"]);
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(printed.contains("removing:\n  the files of run `old`"), "{printed}");
    assert!(!folder.join("run.json").exists() && !folder.join("control.sock").exists());
    assert!(mine.exists());
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(
        shown.contains("no files of killed runs"),
        "the report is up to date: {shown}"
    );
}

/// A process marked as an engine whose shim is dead.
fn orphaned_engine(env: &TestEnv) -> (Unsupervised, u32) {
    // The process has ended. Its id is unused, or belongs to a process that is no shim.
    let mut ended = Command::new("true").spawn().expect("it starts");
    ended.wait().expect("it ends");
    let mut command = Command::new("sleep");
    command
        .arg("1000")
        .arg0("VLLM::Worker_TP7")
        .current_dir(env.path())
        .env("XPYD_TREE", format!("{}.decoder1.1", ended.id()))
        .stdout(Stdio::null());
    let process = Unsupervised::start(&mut command);
    let pid = wait_for("its process", || {
        let found = env
            .processes()
            .into_iter()
            .find(|(_, command)| command.contains("VLLM::Worker_TP7"));
        found
            .map(|(pid, _)| u32::try_from(pid).expect("a pid"))
            .ok_or_else(String::new)
    });
    (process, pid)
}

#[test]
fn an_engine_with_a_living_parent_is_never_reaped() {
    let env = TestEnv::new();
    // The parent is alive and could manage this process, so xpyd must not kill it.
    let mut parent = Command::new("python3");
    parent
        .args([
            "-c",
            "import subprocess; subprocess.Popen(['VLLM::EngineCore', '1000'], executable='/bin/sleep').wait()",
        ])
        .current_dir(env.path());
    let _parent = Unsupervised::start(&mut parent);
    let pid = wait_for("its process", || {
        let found = env
            .processes()
            .into_iter()
            .find(|(_, command)| command.starts_with("VLLM::EngineCore"));
        found.map(|(pid, _)| pid).ok_or_else(String::new)
    });
    let output = env.run(&["doctor", "--reap", "--yes", "--pid", &pid.to_string()]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("no orphaned engine process"),
        "{output:?}"
    );
    kill(Pid::from_raw(pid), None).expect("it lives");
}

#[test]
fn orphaned_engines_are_ended_only_with_the_flag() {
    let env = TestEnv::new();
    // Python makes it an orphan: its parent exits at once, and the process that adopts it manages no engine.
    let (process, pid) = orphaned_engine(&env);
    let only = pid.to_string();
    let (_, found) = findings(&mut env.command(&["doctor", "--json"]));
    assert!(found.contains_key("orphans"));

    let mut run = env.up(&["--profile", "1p1d"]);
    let note = run.wait_for_line("note: orphaned engine processes");
    assert!(note.contains("`xpyd doctor --reap`"), "{note}");
    run.wait_until_ready();
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0);

    let output = env.run(&["doctor", "--reap", "--pid", &only]);
    assert_eq!(output.status.code(), Some(2), "there is no terminal to ask: {output:?}");
    assert!(
        String::from_utf8_lossy(&output.stdout).contains(&only),
        "it is shown: {output:?}"
    );
    kill(Pid::from_raw(i32::try_from(pid).expect("a pid")), None).expect("it lives");

    let output = env.run(&["doctor", "--reap", "--yes", "--pid", &only]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("killed 1 process"),
        "{output:?}"
    );
    drop(process);
    env.wait_until_empty();
}

/// Every file of an archive by name, with its text.
fn unpack(path: &Path) -> BTreeMap<String, String> {
    let file = std::fs::File::open(path).expect("an archive");
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(file));
    let entries = archive.entries().expect("entries").map(|entry| {
        let mut entry = entry.expect("an entry");
        let name = entry.path().expect("a path").display().to_string();
        let mut text = String::new();
        entry.read_to_string(&mut text).expect("text");
        (
            name.split_once('/').map_or(name.clone(), |(_, rest)| rest.to_owned()),
            text,
        )
    });
    entries.collect()
}

#[test]
fn a_bundle_contains_no_secret() {
    let env = TestEnv::new();
    let key = env.path().join("keys");
    std::fs::write(&key, "# keys\nplainword-of-a-client\n").expect("a file");
    let key_file = key.display().to_string();
    let secret_args = "decode.args=[\"--api-key\", \"swordfish1\"]";
    let secret_env = "prefill.env={MY_SECRET=\"swordfish2\", VLLM_API_KEY=\"swordfish1\"}";
    let mut run = env.up(&[
        "--profile",
        "1p1d",
        "--set",
        secret_args,
        "--set",
        secret_env,
        "--api-key-file",
        &key_file,
    ]);
    run.wait_until_ready();
    run.signal(Signal::SIGTERM);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    let log = env.path().join("logs/latest/decoder1.log");
    let mut content = std::fs::read_to_string(&log).expect("a log");
    content.push_str("authorization: Bearer swordfish3\nnon-default args: {'api_key': ['swordfish1']}\n");
    content.push_str(
        "GET https://cdn/x?X-Amz-Signature=swordfish4 hf_swordfishswordfish plainword-of-a-client marlin-token\n",
    );
    std::fs::write(&log, content).expect("a log");

    let output = env
        .command(&["bundle", "--output", "out.tar.gz"])
        .env("HF_TOKEN", "marlin-token")
        .output()
        .expect("xpyd runs");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "out.tar.gz\n");
    let archive = env.path().join("out.tar.gz");
    let mode = std::fs::metadata(&archive).expect("a file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let files = unpack(&archive);
    for name in [
        "about.txt",
        "findings.json",
        "variables.txt",
        "packages.txt",
        "run/plan.json",
        "run/decoder1.log",
        "run/xpyd.log",
    ] {
        assert!(files.contains_key(name), "{name}: {:?}", files.keys());
    }
    for (name, text) in &files {
        for secret in ["swordfish", "plainword-of-a-client", "marlin"] {
            assert!(!text.contains(secret), "{name} holds {secret}");
        }
    }
    assert!(files["run/decoder1.log"].contains("<redacted>"));
    assert!(files["run/plan.json"].contains("\"prefiller1\""));

    let again = env.run(&["bundle", "--output", "out.tar.gz"]);
    assert_eq!(
        again.status.code(),
        Some(2),
        "an archive is never written over: {again:?}"
    );
}

#[test]
fn a_bundle_works_without_runs_and_cuts_long_logs() {
    let env = TestEnv::new();
    let folder = env.path().join("a-run");
    std::fs::create_dir(&folder).expect("a folder");
    let line = "x".repeat(1000);
    let lines: Vec<String> = (0..8000).map(|number| format!("{number} {line}")).collect();
    std::fs::write(folder.join("prefiller1.log"), lines.join("\n")).expect("a file");
    let output = env.run(&["bundle", "--output", "out.tar.gz", "--run", "a-run"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let files = unpack(&env.path().join("out.tar.gz"));
    let log = &files["run/prefiller1.log"];
    assert!(
        log.starts_with("0 x") && log.contains("bytes were left out") && log.contains("\n7999 x"),
        "{}",
        log.len()
    );
    assert!(log.len() < 6 << 20);
    let output = env.run(&["bundle", "--output", "none.tar.gz"]);
    assert_eq!(output.status.code(), Some(0), "no run at all: {output:?}");
}
