//! Causes: what xpyd makes of the logs of engines that failed, and what it prints when one does.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use xpyd::fleet::Exit;
use xpyd::logs::{Hint, diagnose, hints};

use crate::support::Place;

/// The golden logs: `<entry>.log` or `<entry>.<variant>.log` for each entry of `hints.toml`.
fn golden() -> BTreeMap<String, PathBuf> {
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

fn entry(name: &str) -> &'static Hint {
    let entry = name.split('.').next().unwrap_or_default();
    let found = hints().iter().find(|hint| hint.name == entry);
    found.unwrap_or_else(|| panic!("`{name}.log` belongs to no entry"))
}

/// How the engine ended whose failure an entry tells.
fn exit(hint: &Hint) -> Option<Exit> {
    match (&hint.pattern, hint.signal) {
        (_, Some(signal)) => Some(Exit::Signal(signal)),
        (None, None) => None,
        (Some(_), None) => Some(Exit::Code(1)),
    }
}

#[test]
fn every_golden_log_leads_to_its_entry_by_its_first_real_error() {
    let mut table = String::new();
    for (name, path) in golden() {
        let expected = entry(&name);
        let diagnosis = diagnose(&path, 0, exit(expected));
        let hint = diagnosis.as_ref().and_then(|diagnosis| diagnosis.hint);
        let found = hint.map_or("nothing", |hint| hint.name.as_str());
        let error = diagnosis.as_ref().and_then(|diagnosis| diagnosis.error.as_deref());
        let error = error.unwrap_or("no error");
        writeln!(table, "{name} -> {found}\n    {error}").expect("a string");
    }
    insta::assert_snapshot!(table);
    for line in table.lines().filter(|line| !line.starts_with(' ')) {
        let (name, found) = line.split_once(" -> ").expect("an arrow");
        assert_eq!(entry(name).name, found, "{name}");
    }
}

#[test]
fn every_entry_has_a_golden_log() {
    let names: Vec<String> = golden().into_keys().collect();
    for hint in hints() {
        let is_its = |name: &&String| name.split('.').next() == Some(&hint.name);
        assert!(names.iter().any(|name| is_its(&name)), "{} has no log", hint.name);
    }
}

#[test]
fn an_engine_that_was_asked_to_stop_gets_no_hint() {
    let log = &golden()["core-silent"];
    assert!(diagnose(log, 0, Some(Exit::Code(1))).expect("an error").hint.is_some());
    for signal in [1, 2, 15] {
        let diagnosis = diagnose(log, 0, Some(Exit::Signal(signal))).expect("an error");
        assert!(diagnosis.hint.is_none(), "{signal}");
    }
}

#[test]
fn good_starts_lead_to_no_entry() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/logs");
    for log in ["nixl-prefill.log", "lmcache-decode.log"] {
        for exit in [None, Some(Exit::Code(0)), Some(Exit::Code(1))] {
            assert!(diagnose(&folder.join(log), 0, exit).is_none(), "{log}");
        }
    }
}

#[test]
fn what_an_earlier_incarnation_said_and_a_log_that_is_not_there_lead_to_nothing() {
    let golden = golden();
    let log = &golden["port-http"];
    let end = std::fs::metadata(log).expect("a file").len();
    assert!(diagnose(log, end, Some(Exit::Code(1))).is_none());
    let killed = diagnose(&log.with_extension("gone"), 0, Some(Exit::Signal(9))).expect("the signal says enough");
    assert_eq!(
        (killed.error, killed.hint.map(|hint| hint.name.as_str())),
        (None, Some("killed"))
    );
}

/// What `xpyd up` prints after its engine `prefiller1` died at once, as after these last words.
fn printed(last_words: Option<&str>) -> String {
    let place = Place::new();
    let fault = match last_words {
        Some(name) => format!("die-saying={}", golden()[name].display()),
        None => "die-at=kv-cache".to_owned(),
    };
    let run = place.up(&["--profile", "1p1d", "--set", &format!("sim.faults=[{fault:?}]")]);
    let (code, text) = run.end();
    assert_eq!(code, 4, "{text}");
    let (_, failure) = text.split_once("error: ").unwrap_or_else(|| panic!("no error: {text}"));
    // Which of the two engines dies first is chance, and the folder is another in each run.
    let logs = place.path().canonicalize().expect("the folder");
    let mut printed = format!("error: {failure}").replace("decoder1", "prefiller1");
    while let Some(start) = printed.find(" (/") {
        let end = printed[start..].find(')').expect("a closing parenthesis");
        printed.replace_range(start..=start + end, "");
    }
    assert!(!printed.contains(&logs.display().to_string()), "{printed}");
    printed
}

#[test]
fn a_known_failure_is_printed_with_its_cause_and_what_to_do() {
    insta::assert_snapshot!(printed(Some("gpu-memory-taken")));
}

#[test]
fn an_unknown_failure_is_printed_with_its_first_real_error() {
    insta::assert_snapshot!(printed(None));
}
