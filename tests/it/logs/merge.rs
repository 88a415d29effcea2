//! `xpyd logs`: several logs merged by time, and parts of them.

#![expect(clippy::unwrap_used, reason = "a failed helper must fail its test")]

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use nix::sys::signal::Signal;
use proptest::prelude::*;
use serde_json::Value;
use xpyd::logs::Merge;

use crate::support::TestEnv;

/// 2026-11-22T22:00:00Z in microseconds.
const BEGAN: i64 = 1_795_384_800_000_000;

/// The timestamp of a line in the style of one of several writers; `None` for a line without one.
fn stamped(style: u8, micros: i64, text: &str) -> String {
    let time = Timestamp::from_microsecond(BEGAN + micros).unwrap();
    match style {
        0 => format!("{time:.6}  INFO xpyd::app: {text}"),
        1 => format!(
            "\x1b[32;20m[{},{:03}] LMCache INFO:\x1b[0m {text}",
            time.strftime("%Y-%m-%d %H:%M:%S"),
            micros / 1000 % 1000
        ),
        2 => format!(
            "(EngineCore pid=7) INFO {} [core.py:1] {text}",
            time.strftime("%m-%d %H:%M:%S")
        ),
        _ => format!("INFO:     {text}"),
    }
}

/// The time as precise as a timestamp of this style.
fn precision(style: u8) -> i64 {
    [1, 1000, 1_000_000][usize::from(style)]
}

/// A line to write: log, timestamp style, and microseconds since the line before it.
type Planned = (usize, u8, i64);

/// Writes the lines into up to three logs of a folder, each over several files. Returns effective time, log and text of each
/// line, in the order of writing.
fn write(folder: &Path, planned: &[Planned], lines_per_file: usize) -> Vec<(Option<i64>, usize, String)> {
    let mut texts = vec![Vec::new(); 3];
    let mut latest = [None; 3];
    let mut now = 0;
    let mut all = Vec::new();
    for (number, &(log, style, later)) in planned.iter().enumerate() {
        now += later;
        let line = stamped(style, now, &format!("line {number}"));
        if style < 3 {
            latest[log] = latest[log].max(Some(BEGAN + now / precision(style) * precision(style)));
        }
        all.push((latest[log], log, format!("line {number}")));
        texts[log].push(line);
    }
    for (log, lines) in texts.iter().enumerate() {
        let mut files = lines
            .chunks(lines_per_file)
            .map(|lines| lines.join("\n") + "\n")
            .peekable();
        let mut number = 0;
        while let Some(text) = files.next() {
            number += 1;
            let name = match files.peek() {
                Some(_) => format!("log{log}.{number}.log"),
                None => format!("log{log}.log"),
            };
            let path = folder.join(name);
            fs_err::write(&path, text).unwrap();
            let written = UNIX_EPOCH + Duration::from_micros(BEGAN.unsigned_abs()) + Duration::from_hours(20 * 24);
            std::fs::File::options()
                .append(true)
                .open(path)
                .unwrap()
                .set_modified(written)
                .unwrap();
        }
    }
    // Lines before a log's first timestamp count as equally old.
    for log in 0..3 {
        let first = all.iter().filter(|line| line.1 == log).find_map(|line| line.0);
        for line in all.iter_mut().filter(|line| line.1 == log && line.0.is_none()) {
            line.0 = first;
        }
    }
    all
}

fn merged(folder: &Path, since: Option<i64>) -> Vec<(Option<i64>, usize, String)> {
    let paths = [0, 1, 2].map(|log| folder.join(format!("log{log}.log")));
    let paths = paths.iter().map(std::path::PathBuf::as_path);
    let mut merge = Merge::open(paths, since, None, &TimeZone::UTC).unwrap();
    let mut all = Vec::new();
    loop {
        let records = merge.read_new().unwrap();
        if records.is_empty() {
            return all;
        }
        all.extend(records.into_iter().map(|record| {
            let line = String::from_utf8(record.line).unwrap();
            let text = line.rfind("line ").map(|at| line[at..].to_owned()).unwrap();
            (record.time, record.log, text)
        }));
    }
}

fn planned(lines: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Planned>> {
    let later = prop_oneof![Just(0), 0..2_000_000_i64, 0..100_000_000_i64];
    proptest::collection::vec((0..3_usize, 0..4_u8, later), lines)
}

proptest! {
    #[test]
    fn merging_keeps_every_line_and_each_logs_order(
        planned in planned(0..60),
        lines_per_file in 1..20_usize,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut expected = write(folder.path(), &planned, lines_per_file);
        // The sort is stable, so lines of one log stay in their order.
        expected.sort_by_key(|(time, log, _)| (*time, *log));
        prop_assert_eq!(merged(folder.path(), None), expected);
    }
}

proptest! {
    // The logs are longer than one window, so that the search bisects.
    #![proptest_config(ProptestConfig::with_cases(20))]
    #[test]
    fn since_gives_the_end_of_the_merged_log(
        planned in planned(1..40),
        lines_per_file in 3000..20_000_usize,
        share in 0..120_i64,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let planned: Vec<Planned> = planned.iter().copied().cycle().take(8000).collect();
        let all = write(folder.path(), &planned, lines_per_file);
        let length: i64 = planned.iter().map(|line| line.2).sum();
        let since = BEGAN + length / 100 * share;
        let mut expected = Vec::new();
        for log in 0..3 {
            // From the first line whose own timestamp is late enough.
            let begin = all.iter().zip(&planned).position(|(line, (of, style, _))| {
                *of == log && *style < 3 && line.0 >= Some(since)
            });
            let is_unstamped = all.iter().zip(&planned).all(|(_, (of, style, _))| *of != log || *style == 3);
            let begin = if is_unstamped { Some(0) } else { begin };
            expected.extend(all[begin.unwrap_or(all.len())..].iter().filter(|line| line.1 == log).cloned());
        }
        expected.sort_by_key(|(time, log, _)| (*time, *log));
        // The message leaves out both values, because they are long.
        prop_assert!(merged(folder.path(), Some(since)) == expected);
    }
}

/// Runs `xpyd logs` on the folder `run` of the test environment, in UTC.
fn logs(env: &TestEnv, arguments: &[&str]) -> String {
    let output = env
        .command(&[&["logs", "--run", "run"], arguments].concat())
        .env("TZ", "UTC")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The logs of an old run, written by hand: two engines and xpyd.
fn env_with_run() -> TestEnv {
    let env = TestEnv::new();
    let folder = env.path().join("run");
    fs_err::create_dir(&folder).unwrap();
    let write = |name: &str, text: &str| fs_err::write(folder.join(name), text).unwrap();
    write(
        "prefiller1.1.log",
        "(APIServer pid=9) INFO 11-22 21:50:42 [a.py:1] first\n",
    );
    write(
        "prefiller1.log",
        "(EngineCore pid=10) ERROR 11-22 21:50:44 [b.py:2] Boom: caf\u{e9}\nTraceback\n\r 10%\r100%\nunfinished",
    );
    write(
        "decoder1.log",
        "\x1b[32;20m[2026-11-22 21:50:43,158] LMCache INFO:\x1b[0m Created\n",
    );
    write(
        "xpyd.log",
        "2026-11-22T21:50:43.2Z  WARN xpyd::app: slow\n2026-11-22T21:50:50Z  INFO xpyd::app: end\n",
    );
    env
}

#[test]
fn logs_merges_by_time_and_names_the_engine() {
    let env = env_with_run();
    assert_eq!(
        logs(&env, &[]),
        "prefiller1 | (APIServer pid=9) INFO 11-22 21:50:42 [a.py:1] first\n\
         decoder1   | [2026-11-22 21:50:43,158] LMCache INFO: Created\n\
         xpyd       | 2026-11-22T21:50:43.2Z  WARN xpyd::app: slow\n\
         prefiller1 | (EngineCore pid=10) ERROR 11-22 21:50:44 [b.py:2] Boom: caf\u{e9}\n\
         prefiller1 | Traceback\n\
         prefiller1 |  10%\n\
         prefiller1 | 100%\n\
         xpyd       | 2026-11-22T21:50:50Z  INFO xpyd::app: end\n\
         prefiller1 | unfinished\n"
    );
}

#[test]
fn json_output_has_one_object_per_line() {
    let env = env_with_run();
    let lines: Vec<Value> = logs(&env, &["--json", "--grep", "boom: CAF\u{c9}|trace", "-i"])
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        lines,
        [
            serde_json::json!({
                "role": "prefiller1", "time": "2026-11-22T21:50:44Z", "level": "ERROR", "process": "EngineCore pid=10",
                "text": "(EngineCore pid=10) ERROR 11-22 21:50:44 [b.py:2] Boom: caf\u{e9}",
            }),
            serde_json::json!({"role": "prefiller1", "time": "2026-11-22T21:50:44Z", "text": "Traceback"}),
        ]
    );
}

#[test]
fn tail_and_since_can_be_combined() {
    let env = env_with_run();
    let shown = |arguments: &[&str]| {
        let text = logs(&env, arguments);
        let last_word = |line: &str| line.split(' ').next_back().unwrap().to_owned();
        text.lines().map(last_word).collect::<Vec<_>>()
    };
    assert_eq!(
        shown(&["-n", "5", "prefill"]),
        ["first", "caf\u{e9}", "Traceback", "10%", "100%", "unfinished"][..]
    );
    assert_eq!(shown(&["-n", "1", "prefill", "xpyd"]), ["100%", "end", "unfinished"]);
    let since = "2026-11-22T21:50:43.2Z";
    assert_eq!(shown(&["--since", since, "decode", "xpyd"]), ["slow", "end"]);
    assert_eq!(shown(&["--since", since, "-n", "1", "xpyd"]), ["end"]);
    assert_eq!(shown(&["--since", since, "-n", "9", "xpyd"]), ["slow", "end"]);
    assert_eq!(shown(&["--since", "2026-11-22 21:50:44", "xpyd"]), ["end"]);
    assert_eq!(shown(&["--since", "1s", "decode"]), [""; 0]);
}

#[test]
fn invalid_times_and_patterns_are_refused() {
    let env = env_with_run();
    for wrong in [["--since", "yesterday"], ["--since", "25:00"], ["--grep", "("]] {
        let output = env.run(&["logs", "--run", "run", wrong[0], wrong[1]]);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    }
}

#[test]
fn logs_of_a_killed_run_are_in_order() {
    let env = TestEnv::new();
    let mut run = env.up(&[
        "--profile",
        "1p1d",
        "--set",
        "logs.file_size=1KiB",
        "--set",
        "logs.files=100",
    ]);
    run.wait_until_ready();
    run.signal(Signal::SIGKILL);
    drop(run);
    env.wait_until_empty();
    // The shim has received the log limits of the profile.
    assert!(!env.log("decoder1.1.log").is_empty());
    let output = env.run(&["logs", "--json"]);
    assert!(output.status.success(), "{output:?}");
    let mut times = Vec::new();
    let mut roles = String::new();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        times.push(line["time"].as_str().map(|time| time.parse::<Timestamp>().unwrap()));
        write!(roles, "{} ", line["role"].as_str().unwrap()).unwrap();
    }
    assert!(times.is_sorted(), "{times:?}");
    for role in ["prefiller1", "decoder1", "xpyd"] {
        assert!(roles.contains(role), "{role}");
    }
}

#[test]
fn timestamps_use_a_named_time_zone() {
    let zone = "America/Los_Angeles";
    // Python also uses UTC if the machine has no time zone database.
    let offset = if Path::new("/usr/share/zoneinfo").join(zone).exists() {
        8
    } else {
        0
    };
    let env = env_with_run();
    let mut command = env.command(&["logs", "--run", "run", "prefiller1", "--json", "--tail", "all"]);
    let output = command.env("TZ", zone).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    let expected: Timestamp = "2026-11-22T21:50:42Z".parse().unwrap();
    let expected = expected + jiff::SignedDuration::from_hours(offset);
    assert_eq!(first["time"], expected.to_string(), "{text}");
}
