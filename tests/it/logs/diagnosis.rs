//! Diagnosis of failed engines: which hint matches their logs, what xpyd prints, and whether it retries.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use xpyd::fleet::Exit;
use xpyd::logs::{Hint, Position, diagnose, first_error_in, hints};

use crate::support::{Run, TestEnv, engine, kill_engine};

/// The golden logs: `<hint>.log` or `<hint>.<variant>.log` for each hint of `hints.toml`.
fn golden_logs() -> BTreeMap<String, PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/logs/hints");
    let files = std::fs::read_dir(folder).expect("the folder");
    files
        .map(|file| file.expect("a file").path())
        .map(|path| {
            let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
            (name, path)
        })
        .collect()
}

fn hint_named(name: &str) -> &'static Hint {
    let entry = name.split('.').next().unwrap_or_default();
    let found = hints().iter().find(|hint| hint.name == entry);
    found.unwrap_or_else(|| panic!("`{name}.log` belongs to no entry"))
}

/// How the engine of a golden log ended.
fn exit(hint: &Hint) -> Option<Exit> {
    match (&hint.pattern, hint.signal) {
        (_, Some(signal)) => Some(Exit::Signal(signal)),
        (None, None) => None,
        (Some(_), None) => Some(Exit::Code(1)),
    }
}

#[test]
fn every_golden_log_matches_its_hint() {
    let mut table = String::new();
    for (name, path) in golden_logs() {
        let expected = hint_named(&name);
        let diagnosis = diagnose(&path, Position::START, exit(expected));
        let hint = diagnosis.as_ref().and_then(|diagnosis| diagnosis.hint);
        let found = hint.map_or("nothing", |hint| hint.name.as_str());
        let error = diagnosis.as_ref().and_then(|diagnosis| diagnosis.error.as_deref());
        let error = error.unwrap_or("no error");
        writeln!(table, "{name} -> {found}\n    {error}").expect("a string");
    }
    insta::assert_snapshot!(table);
    for line in table.lines().filter(|line| !line.starts_with(' ')) {
        let (name, found) = line.split_once(" -> ").expect("an arrow");
        assert_eq!(hint_named(name).name, found, "{name}");
    }
}

#[test]
fn every_hint_has_a_golden_log() {
    let names: Vec<String> = golden_logs().into_keys().collect();
    assert!(!hints().is_empty());
    for hint in hints() {
        let is_its = |name: &&String| name.split('.').next() == Some(&hint.name);
        assert!(names.iter().any(|name| is_its(&name)), "{} has no log", hint.name);
    }
}

#[test]
fn an_engine_that_was_asked_to_stop_gets_no_hint() {
    let log = &golden_logs()["core-silent"];
    assert!(
        diagnose(log, Position::START, Some(Exit::Code(1)))
            .expect("an error")
            .hint
            .is_some()
    );
    for signal in [1, 2, 15] {
        let diagnosis = diagnose(log, Position::START, Some(Exit::Signal(signal))).expect("an error");
        assert!(diagnosis.hint.is_none(), "{signal}");
    }
}

#[test]
fn good_starts_match_no_hint() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/logs");
    for log in ["nixl-prefill.log", "lmcache-decode.log"] {
        for exit in [None, Some(Exit::Code(0)), Some(Exit::Code(1))] {
            assert!(diagnose(&folder.join(log), Position::START, exit).is_none(), "{log}");
        }
    }
}

#[test]
fn old_incarnations_and_missing_logs_match_no_hint() {
    let golden = golden_logs();
    let log = &golden["port-http"];
    let end = Position::end_of(log).expect("a file");
    assert!(diagnose(log, end, Some(Exit::Code(1))).is_none());
    let killed =
        diagnose(&log.with_extension("gone"), Position::START, Some(Exit::Signal(9))).expect("the signal says enough");
    assert_eq!(
        (killed.error, killed.hint.map(|hint| hint.name.as_str())),
        (None, Some("killed"))
    );
}

/// The output of `xpyd up` after its engine `prefiller1` died at once with this golden log.
fn output_of_failed_up(last_words: Option<&str>) -> String {
    let env = TestEnv::new();
    let fault = match last_words {
        Some(name) => format!("die-saying={}", golden_logs()[name].display()),
        None => "die-at=kv-cache".to_owned(),
    };
    let run = env.up(&["--profile", "1p1d", "--set", &format!("sim.faults=[{fault:?}]")]);
    let (code, text) = run.end();
    assert_eq!(code, 4, "{text}");
    let (_, failure) = text.split_once("error: ").unwrap_or_else(|| panic!("no error: {text}"));
    // Either engine can die first, and each run has another folder.
    let logs = env.path().canonicalize().expect("the folder");
    let mut printed = format!("error: {failure}").replace("decoder1", "prefiller1");
    while let Some(start) = printed.find(" (/") {
        let end = printed[start..].find(')').expect("a closing parenthesis");
        printed.replace_range(start..=start + end, "");
    }
    let run = std::fs::canonicalize(env.path().join("logs/latest")).expect("the run's folder");
    let printed = printed.replace(&run.display().to_string(), "FOLDER");
    assert!(!printed.contains(&logs.display().to_string()), "{printed}");
    printed
}

#[test]
fn a_known_failure_is_printed_with_cause_and_fix() {
    insta::assert_snapshot!(output_of_failed_up(Some("gpu-memory-taken")));
}

#[test]
fn an_unknown_failure_is_printed_with_its_first_real_error() {
    insta::assert_snapshot!(output_of_failed_up(None));
}

/// A serving fleet of two prefill and two decode engines. Every further start dies with the golden log of this name.
fn with_restarts_failing_by(name: &str, env: &TestEnv, check: impl FnOnce(&mut Run<'_>)) -> String {
    let words = env.path().join("last-words.log");
    let fault = format!("sim.faults=[{:?}]", format!("die-saying={}", words.display()));
    let mut run = env.up(&["--set", &fault, "--set", "restart.backoff=10ms"]);
    run.wait_until_ready();
    std::fs::copy(&golden_logs()[name], &words).expect("a copy");
    kill_engine(env, "decoder1");
    check(&mut run);
    assert_eq!(engine(env, "decoder2")["state"], "ready");
    // The other engine of the role fails in the same way, which ends the run.
    kill_engine(env, "decoder2");
    let (code, text) = run.end();
    assert_eq!(code, if name == "port-http" { 6 } else { 1 }, "{text}");
    assert_eq!(env.processes(), []);
    text
}

#[test]
fn a_permanent_failure_is_not_retried() {
    for (name, title, error) in [
        (
            "gpu-oom",
            "the GPU's memory is too small for this model",
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
        ("flag-unknown", "this vLLM has no such flag", "unrecognized arguments"),
    ] {
        let env = TestEnv::new();
        let text = with_restarts_failing_by(name, &env, |run| {
            // A kill can come from any process, so xpyd restarts the engine.
            run.wait_for_line("the engine was killed from outside; it starts again in");
            run.wait_for_line("it is not started again");
            let failed = engine(&env, "decoder1");
            assert_eq!(
                (&failed["state"], &failed["incarnation"]),
                (&"failed".into(), &2.into()),
                "{failed}"
            );
            let reason = failed["reason"].as_str().expect("a reason");
            assert!(reason.contains(title) && reason.contains(error), "{reason}");
            let status = String::from_utf8(env.run(&["status"]).stdout).expect("text");
            assert!(status.contains(title), "{status}");
        });
        // The final error shows the cause of the last start and its hint.
        let (_, ending) = text.split_once("error: no decode engine is left").expect("an ending");
        assert!(ending.contains(title) && ending.contains("hint:"), "{text}");
        assert!(!ending.contains("killed from outside"), "{text}");
    }
}

#[test]
fn a_lost_port_race_is_retried() {
    let env = TestEnv::new();
    with_restarts_failing_by("port-http", &env, |run| {
        run.wait_for_line("it starts again in");
        let again = run.wait_for_line("an engine's HTTP port is in use");
        assert!(again.contains("it starts again in"), "{again}");
        let last = run.wait_for_line("an engine's HTTP port is in use");
        assert!(last.contains("it kept failing and is not started again"), "{last}");
        assert_eq!(engine(&env, "decoder1")["incarnation"], 3);
    });
}

#[test]
fn an_unknown_failure_follows_the_restart_policy() {
    let env = TestEnv::new();
    let mut run = env.up(&[
        "--set",
        &format!(
            "sim.faults=[{:?}]",
            format!("die-saying={}", env.path().join("words").display())
        ),
        "--set",
        "restart.backoff=10ms",
        "--set",
        "restart.max_restarts=3",
    ]);
    run.wait_until_ready();
    std::fs::write(
        env.path().join("words"),
        "Traceback (most recent call last):\nOddError: who knows\n",
    )
    .expect("a file");
    kill_engine(&env, "decoder1");
    for _ in 0..2 {
        let line = run.wait_for_line("OddError: who knows");
        assert!(line.contains("it starts again in"), "{line}");
    }
    let last = run.wait_for_line("OddError: who knows");
    assert!(last.contains("it kept failing"), "{last}");
    assert_eq!(engine(&env, "decoder1")["incarnation"], 4);
}

#[test]
fn the_always_policy_ignores_the_diagnosis() {
    let env = TestEnv::new();
    let words = env.path().join("words");
    let fault = format!("sim.faults=[{:?}]", format!("die-saying={}", words.display()));
    let mut run = env.up(&[
        "--set",
        &fault,
        "--set",
        "restart.backoff=10ms",
        "--set",
        "restart.policy=always",
        "--set",
        "restart.max_restarts=1000",
        "--set",
        "restart.max_backoff=50ms",
    ]);
    run.wait_until_ready();
    std::fs::copy(&golden_logs()["flag-unknown"], &words).expect("a copy");
    kill_engine(&env, "decoder1");
    for _ in 0..2 {
        let line = run.wait_for_line("this vLLM has no such flag");
        assert!(line.contains("it starts again in"), "{line}");
    }
    std::fs::remove_file(&words).expect("the process exists");
    run.wait_for_line("decoder1 serves again");
}

#[test]
fn a_log_position_survives_rotation() {
    let folder = tempfile::tempdir().expect("a folder");
    let log = folder.path().join("decoder1.log");
    assert_eq!(
        Position::end_of(&log).expect("a missing log is not an error"),
        Position::START
    );
    let error = |name: &str| format!("Traceback (most recent call last):\n{name}Error: x\n");
    let first = |from| first_error_in(&log, from).expect("a log").unwrap_or_default();
    std::fs::write(&log, error("First")).expect("a log");
    let second = Position::end_of(&log).expect("an end");
    std::fs::write(&log, error("First") + &error("Second")).expect("a log");
    assert_eq!(
        [first(Position::START), first(second)],
        ["FirstError: x", "SecondError: x"]
    );
    // The second incarnation fills the file and continues in the next one, where the third one begins.
    std::fs::rename(&log, log.with_extension("1.log")).expect("a rotation");
    std::fs::write(&log, "quiet\n").expect("a log");
    assert_eq!(first(second), "SecondError: x");
    let third = Position::end_of(&log).expect("an end");
    assert_eq!(first(third), "");
    std::fs::write(&log, "quiet\n".to_owned() + &error("Third")).expect("a log");
    assert_eq!(first(third), "ThirdError: x");
    std::fs::rename(&log, log.with_extension("2.log")).expect("a rotation");
    assert_eq!(first(third), "ThirdError: x");
    // Only the part of the second incarnation in the third one's file remains.
    std::fs::remove_file(log.with_extension("1.log")).expect("the process exists");
    assert_eq!(first(second), "ThirdError: x");
}
