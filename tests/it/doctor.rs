//! `xpyd doctor` and `xpyd bundle`: what they find, what they mend, and what they keep to themselves.

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

use crate::support::{Place, Unsupervised, wait_for};

/// A folder with a `vllm` and a `python` that says that this is installed.
fn environment(place: &Place, packages: &Value, options: &[&str], connectors: &[&str]) -> PathBuf {
    let bin = place.path().join("env/bin");
    std::fs::create_dir_all(&bin).expect("a folder");
    let found = json!({"python": "3.12.3", "packages": packages, "options": options, "connectors": connectors});
    for (name, text) in [("python", format!("echo '{found}'")), ("vllm", "exit 1".to_owned())] {
        std::fs::write(bin.join(name), format!("#!/bin/sh\n{text}\n")).expect("a file");
        std::fs::set_permissions(bin.join(name), std::fs::Permissions::from_mode(0o755)).expect("a mode");
    }
    bin
}

/// A folder that is a model.
fn model(place: &Place) -> PathBuf {
    let folder = place.path().join("model");
    std::fs::create_dir_all(&folder).expect("a folder");
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::write(folder.join(name), "{}").expect("a file");
    }
    folder
}

/// `xpyd doctor` for a fleet without a GPU, on this environment.
fn doctor(place: &Place, bin: &Path, more: &[&str]) -> Command {
    let model = model(place);
    let offset = format!("port_offset={}", place.offset);
    let fixed = ["doctor", "--json", "--profile", "cpu-1p1d", "--set", &offset];
    let mut command = place.command(&fixed.iter().chain(more).copied().collect::<Vec<_>>());
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
fn a_machine_with_nothing_is_no_failure() {
    let place = Place::new();
    let mut command = place.command(&["doctor", "--json"]);
    let (code, findings) = findings(command.env("PATH", place.path()));
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
fn what_is_installed_is_told_and_passes() {
    let place = Place::new();
    let packages = json!({"vllm": "0.32.0+cpu", "nixl-cu13": "1.5.1", "torch": "2.13.0+cpu"});
    let bin = environment(&place, &packages, &[], GOOD);
    let (code, findings) = findings(&mut doctor(&place, &bin, &[]));
    assert_eq!(code, 0, "{findings:#?}");
    assert_eq!(text(&findings["python"], "message"), "Python 3.12.3, torch 2.13.0+cpu");
    assert_eq!(text(&findings["nixl"], "message"), "nixl 1.5.1");
    assert_eq!(text(&findings["ports"], "level"), "pass");
    assert!(text(&findings["model"], "message").ends_with("is a folder on this machine"));
}

/// Options that the installed vLLM has.
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

/// `xpyd doctor MORE` on an environment with these packages and connectors says `words` in its finding of `check`, with what to
/// do, and ends by its level.
fn says(packages: &Value, connectors: &[&str], more: &[&str], (check, words): (&str, &str)) {
    let place = Place::new();
    let bin = environment(&place, packages, OPTIONS, connectors);
    let (code, findings) = findings(&mut doctor(&place, &bin, more));
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
fn what_is_not_installed_is_named() {
    says(
        &json!({"vllm": "0.32.0"}),
        GOOD,
        &[],
        ("nixl", "nixl is not installed beside vLLM"),
    );
    says(&json!({}), GOOD, &[], ("nixl", "could not be read"));
    let both = json!({"vllm": "0.32.0", "nixl": "1.5.1", "lmcache": "0.5.6"});
    let store = ["--set", "connector=lmcache-mp"];
    says(&both, GOOD, &store, ("lmcache_program", "is not beside `vllm`"));
}

#[test]
fn what_the_installed_version_does_not_understand_is_named_before_it_starts() {
    let good = json!({"vllm": "0.32.0", "nixl": "1.5.1"});
    says(
        &good,
        &["Other"],
        &[],
        ("connector", "vLLM 0.32.0 has no NixlConnector"),
    );
    let removed = ["--set", "vllm.args=[\"--disable-log-requests\"]"];
    says(
        &good,
        GOOD,
        &removed,
        ("options", "vLLM 0.32.0 has no option `--disable-log-requests`"),
    );
    let typo = ["--set", "decode.args=[\"--max-model-lenn\", \"8\"]"];
    says(
        &good,
        GOOD,
        &typo,
        ("options", "no option `--max-model-lenn`, and decoder1"),
    );
    let forced = ["--connector", "lmcache"];
    says(&good, GOOD, &forced, ("plan", "connector `lmcache` is not safe here"));
}

#[test]
fn roles_and_a_model_that_cannot_work_are_named() {
    let good = json!({"vllm": "0.32.0", "nixl": "1.5.1"});
    let seed = ["--set", "decode.env={PYTHONHASHSEED=\"1\"}"];
    says(&good, GOOD, &seed, ("hash_seed", "PYTHONHASHSEED differs"));
    let dtype = ["--set", "decode.args=[\"--dtype\", \"half\"]"];
    says(&good, GOOD, &dtype, ("roles", "no hand-off can work"));
    let model = ["--model", "/no/such/model"];
    says(&good, GOOD, &model, ("model", "`/no/such/model` is not there"));
}

#[test]
fn a_port_that_is_taken_is_named_with_its_process() {
    let place = Place::new();
    let port = 7100 + place.offset;
    let _holder = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("a free port");
    let bin = environment(&place, &json!({"vllm": "0.32.0", "nixl": "1.5.1"}), &[], GOOD);
    let (code, findings) = findings(&mut doctor(&place, &bin, &[]));
    assert_eq!(code, 3);
    let message = text(&findings["ports"], "message");
    let wanted = format!(
        "1 port is taken: {port} (prefiller1 http) by process {}",
        std::process::id()
    );
    assert!(message.starts_with(&wanted), "{message}");
}

#[test]
fn people_read_topics_with_what_to_do_and_the_sum_at_the_end() {
    let place = Place::new();
    let output = place
        .command(&["doctor"])
        .env("PATH", place.path())
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
fn a_profile_that_is_wrong_is_a_usage_error() {
    let output = Place::new().run(&["doctor", "--profile", "no-such"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

/// The runtime folder of a run that was killed.
fn killed_run(place: &Place, name: &str) -> PathBuf {
    let folder = place.path().join("xpyd").join(name);
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
fn what_a_killed_run_has_left_is_found_listed_and_removed_and_nothing_else() {
    let place = Place::new();
    let folder = killed_run(&place, "old");
    let mine = place.path().join("xpyd/old/mine");
    std::fs::write(&mine, "of the user").expect("a file");
    let (_, found) = findings(&mut place.command(&["doctor", "--json"]));
    assert!(
        text(&found["runs"], "message").ends_with("still there: old"),
        "{found:#?}"
    );
    assert!(folder.join("run.json").exists(), "looking changes nothing");

    let output = place.run(&["doctor", "--fix"]);
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(printed.contains("removing:\n  the files of run `old`"), "{printed}");
    assert!(!folder.join("run.json").exists() && !folder.join("control.sock").exists());
    assert!(mine.exists());
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(
        shown.contains("no run was killed"),
        "what is told is what is true now: {shown}"
    );
}

/// A process with the mark of an engine whose shim is dead.
fn left_engine(place: &Place) -> (Unsupervised, u32) {
    // A process that has ended: its id is nobody's, or by now somebody's that is no shim.
    let mut ended = Command::new("true").spawn().expect("it starts");
    ended.wait().expect("it ends");
    let mut command = Command::new("sleep");
    command
        .arg("1000")
        .arg0("VLLM::Worker_TP7")
        .current_dir(place.path())
        .env("XPYD_TREE", format!("{}.decoder1.1", ended.id()))
        .stdout(Stdio::null());
    let process = Unsupervised::start(&mut command);
    let pid = wait_for("its process", || {
        let found = place
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
    let place = Place::new();
    // Its parent is this test, which is no engine's: what counts is that somebody of the same kind could have started it.
    let mut parent = Command::new("python3");
    parent
        .args([
            "-c",
            "import subprocess; subprocess.Popen(['VLLM::EngineCore', '1000'], executable='/bin/sleep').wait()",
        ])
        .current_dir(place.path());
    let _parent = Unsupervised::start(&mut parent);
    let pid = wait_for("its process", || {
        let found = place
            .processes()
            .into_iter()
            .find(|(_, command)| command.starts_with("VLLM::EngineCore"));
        found.map(|(pid, _)| pid).ok_or_else(String::new)
    });
    let output = place.run(&["doctor", "--reap", "--yes", "--pid", &pid.to_string()]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("nothing to end"),
        "{output:?}"
    );
    kill(Pid::from_raw(pid), None).expect("it lives");
}

#[test]
fn engines_of_a_dead_run_are_shown_and_ended_once_somebody_says_so() {
    let place = Place::new();
    // Python makes it an orphan: its parent ends at once, and what adopts it is no engine's.
    let (process, pid) = left_engine(&place);
    let only = pid.to_string();
    let (_, found) = findings(&mut place.command(&["doctor", "--json"]));
    assert!(found.contains_key("orphans"));

    let mut run = place.up(&["--profile", "1p1d"]);
    let note = run.wait_for_line("note: engines that nobody watches");
    assert!(note.contains("`xpyd doctor --reap`"), "{note}");
    run.wait_until_ready();
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0);

    let output = place.run(&["doctor", "--reap", "--pid", &only]);
    assert_eq!(output.status.code(), Some(2), "nobody can be asked: {output:?}");
    assert!(
        String::from_utf8_lossy(&output.stdout).contains(&only),
        "it is shown: {output:?}"
    );
    kill(Pid::from_raw(i32::try_from(pid).expect("a pid")), None).expect("it lives");

    let output = place.run(&["doctor", "--reap", "--yes", "--pid", &only]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("ended 1 process"),
        "{output:?}"
    );
    drop(process);
    place.wait_until_empty();
}

/// Every file of an archive with its text.
fn unpacked(path: &Path) -> BTreeMap<String, String> {
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
fn a_bundle_holds_what_helps_and_no_secret() {
    let place = Place::new();
    let key = place.path().join("keys");
    std::fs::write(&key, "# keys\nplainword-of-a-client\n").expect("a file");
    let key_file = key.display().to_string();
    let secret_args = "decode.args=[\"--api-key\", \"swordfish1\"]";
    let secret_env = "prefill.env={MY_SECRET=\"swordfish2\", VLLM_API_KEY=\"swordfish1\"}";
    let mut run = place.up(&[
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
    let log = place.path().join("logs/latest/decoder1.log");
    let mut content = std::fs::read_to_string(&log).expect("a log");
    content.push_str("authorization: Bearer swordfish3\nnon-default args: {'api_key': ['swordfish1']}\n");
    content.push_str(
        "GET https://cdn/x?X-Amz-Signature=swordfish4 hf_swordfishswordfish plainword-of-a-client marlin-token\n",
    );
    std::fs::write(&log, content).expect("a log");

    let output = place
        .command(&["bundle", "--output", "out.tar.gz"])
        .env("HF_TOKEN", "marlin-token")
        .output()
        .expect("xpyd runs");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "out.tar.gz\n");
    let archive = place.path().join("out.tar.gz");
    let mode = std::fs::metadata(&archive).expect("a file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let files = unpacked(&archive);
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

    let again = place.run(&["bundle", "--output", "out.tar.gz"]);
    assert_eq!(
        again.status.code(),
        Some(2),
        "an archive is never written over: {again:?}"
    );
}

#[test]
fn a_bundle_can_be_made_where_nothing_ever_ran_and_long_logs_keep_both_ends() {
    let place = Place::new();
    let folder = place.path().join("a-run");
    std::fs::create_dir(&folder).expect("a folder");
    let line = "x".repeat(1000);
    let lines: Vec<String> = (0..8000).map(|number| format!("{number} {line}")).collect();
    std::fs::write(folder.join("prefiller1.log"), lines.join("\n")).expect("a file");
    let output = place.run(&["bundle", "--output", "out.tar.gz", "--run", "a-run"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let files = unpacked(&place.path().join("out.tar.gz"));
    let log = &files["run/prefiller1.log"];
    assert!(
        log.starts_with("0 x") && log.contains("bytes were left out") && log.contains("\n7999 x"),
        "{}",
        log.len()
    );
    assert!(log.len() < 6 << 20);
    let output = place.run(&["bundle", "--output", "none.tar.gz"]);
    assert_eq!(output.status.code(), Some(0), "no run at all: {output:?}");
}
