//! Engine logs: errors and phases in real logs, and following files that grow, rotate and are truncated.

#![expect(clippy::unwrap_used, reason = "a failed helper must fail its test")]

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Parser;
use fs_err::{File, OpenOptions};
use jiff::tz::TimeZone;
use proptest::prelude::*;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use xpyd::cli::logs as command;
use xpyd::engine::EngineKind;
use xpyd::fleet::{EngineId, Role};
use xpyd::logs::start::ReadStart;
use xpyd::logs::{Follower, LogsError, PhaseTracker, Position, create_run_folder, first_error_in, watch_phases};
use xpyd::report::{ExitStatus, Failure};
use xpyd::ui::Printer;

use crate::support::DEADLINE;

/// The command line of `xpyd logs` alone.
#[derive(Debug, Parser)]
struct Command {
    #[command(flatten)]
    arguments: command::Arguments,
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/logs")
        .join(name)
}

fn cause(name: &str) -> Option<String> {
    first_error_in(&fixture(name), Position::START).unwrap()
}

#[test]
fn real_failures_are_named_by_their_root_error() {
    assert_eq!(
        cause("fail-model.log").unwrap(),
        "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': \
         '/models/no-such-model'. Use `repo_type` argument if needed."
    );
    assert_eq!(
        cause("fail-port.log").unwrap(),
        "OSError: [Errno 98] Address already in use"
    );
    assert_eq!(
        cause("fail-kvconfig.log").unwrap(),
        "argument --kv-transfer-config: 1 validation error for KVTransferConfig: kv_rank: Unexpected keyword argument"
    );
    assert_eq!(cause("fail-engine-death.log").unwrap(), "KeyError: 'remote_host'");
}

#[test]
fn real_good_starts_have_no_error() {
    assert_eq!(cause("nixl-prefill.log"), None);
    assert_eq!(cause("lmcache-decode.log"), None);
}

#[test]
fn errors_are_not_carried_over_incarnations() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("decoder1.log");
    fs_err::copy(fixture("fail-port.log"), &log).unwrap();
    let second = Position::end_of(&log).unwrap();
    append(&log, &fs_err::read(fixture("fail-engine-death.log")).unwrap());
    assert_eq!(
        first_error_in(&log, second).unwrap().unwrap(),
        "KeyError: 'remote_host'"
    );
}

#[test]
fn start_phases_only_move_forward() {
    for log in ["nixl-prefill.log", "lmcache-decode.log"] {
        let text = fs_err::read(fixture(log)).unwrap();
        let mut tracker = PhaseTracker::new(EngineKind::Vllm);
        let phases: Vec<_> = String::from_utf8_lossy(&text)
            .split(['\n', '\r'])
            .filter_map(|line| tracker.feed(line))
            .collect();
        assert!(
            phases.is_sorted_by(|one, next| one.percent < next.percent),
            "{log}: {phases:?}"
        );
        let mut names: Vec<_> = phases.iter().map(|phase| phase.name).collect();
        names.dedup();
        assert_eq!(
            names,
            [
                "importing",
                "reading config",
                "starting engine core",
                "joining workers",
                "loading weights",
                "sizing KV cache",
                "warming up",
                "starting server",
                "up"
            ],
            "{log}"
        );
    }
}

#[test]
fn a_progress_bar_stays_within_its_phase() {
    let mut tracker = PhaseTracker::new(EngineKind::Vllm);
    let mut percent = |line: &str| tracker.feed(line).map(|phase| (phase.name, phase.percent));
    let bar = |done: u8| {
        format!("\x1b[1mLoading safetensors checkpoint shards:  {done}% Completed | 1/4 [00:01<00:03]\x1b[0m")
    };
    assert_eq!(percent(&bar(50)), Some(("loading weights", 63)));
    assert_eq!(percent(&bar(25)), None);
    assert_eq!(percent(&bar(100)), Some(("loading weights", 70)));
    assert_eq!(
        percent("Capturing CUDA graphs (decode): 50%|"),
        Some(("capturing graphs", 85))
    );
}

fn append(path: &Path, bytes: &[u8]) {
    let mut file = OpenOptions::new().append(true).create(true).open(path).unwrap();
    file.write_all(bytes).unwrap();
}

fn read(follower: &mut Follower) -> Vec<String> {
    let mut all = Vec::new();
    loop {
        let lines = follower.read_new().unwrap();
        if lines.is_empty() {
            return all;
        }
        all.extend(lines.into_iter().map(|line| String::from_utf8(line).unwrap()));
    }
}

#[test]
fn a_follower_survives_a_late_file_rotation_and_truncation() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("prefiller1.log");
    let mut follower = Follower::from_start(&log);
    assert!(read(&mut follower).is_empty());

    append(&log, b"one\ntwo\nthr");
    assert_eq!(read(&mut follower), ["one", "two"]);
    append(&log, b"ee\nbefore the rotation\n");
    fs_err::rename(&log, folder.path().join("prefiller1.1.log")).unwrap();
    append(&log, b"after it\n");
    assert_eq!(read(&mut follower), ["three", "before the rotation", "after it"]);
    // Other programs rotate logs in other ways.
    fs_err::rename(&log, folder.path().join("prefiller1.log-yesterday")).unwrap();
    append(&log, b"today\n");
    assert_eq!(read(&mut follower), ["today"]);

    File::create(&log).unwrap().write_all(b"new\n").unwrap();
    assert_eq!(read(&mut follower), ["new"]);
    append(&log, b"unfinished");
    assert!(read(&mut follower).is_empty());
    assert_eq!(follower.finish().unwrap(), b"unfinished");
}

#[test]
fn a_rotated_file_is_read_to_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("decoder1.log");
    let mut follower = Follower::from_start(&log);
    append(&log, b"first\n");
    assert_eq!(read(&mut follower), ["first"]);
    // More than the follower reads at once.
    let flood: Vec<String> = (0..3000).map(|number| format!("{number:01000}")).collect();
    append(&log, format!("{}\n", flood.join("\n")).as_bytes());
    fs_err::rename(&log, folder.path().join("decoder1.1.log")).unwrap();
    append(&log, b"last\n");
    let lines = read(&mut follower);
    assert_eq!(lines[..3000], flood);
    assert_eq!(lines[3000..], ["last"]);
}

#[test]
fn several_rotations_are_read_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("decoder1.log");
    let numbered = |number: u32| folder.path().join(format!("decoder1.{number}.log"));
    let mut follower = Follower::from_start(&log);
    append(&log, b"a\n");
    assert_eq!(read(&mut follower), ["a"]);
    append(&log, b"b\n");
    for (number, line) in (1..).zip(["c\n", "d\n", "e\n"]) {
        fs_err::rename(&log, numbered(number)).unwrap();
        append(&log, line.as_bytes());
    }
    assert_eq!(read(&mut follower), ["b", "c", "d", "e"]);

    for (number, line) in (4..).zip(["f\n", "g\n", "h\n"]) {
        fs_err::rename(&log, numbered(number)).unwrap();
        append(&log, line.as_bytes());
    }
    // The follower has read its own file, but not the next one.
    fs_err::remove_file(numbered(4)).unwrap();
    fs_err::remove_file(numbered(5)).unwrap();
    let lines = read(&mut follower);
    assert!(lines[0].contains("output is missing here"), "{lines:?}");
    assert_eq!(lines[1..], ["g", "h"]);
}

proptest! {
    #[test]
    fn writing_reading_and_rotating_lose_no_line(
        steps in proptest::collection::vec(0..4_u8, 0..60),
        pieces in proptest::collection::vec("[a-z]{0,5}\n?", 60),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("decoder1.log");
        let mut follower = Follower::from_start(&log);
        let (mut written, mut seen, mut number) = (String::new(), Vec::new(), 0);
        for (step, piece) in steps.iter().zip(&pieces) {
            match step {
                0 | 1 => {
                    append(&log, piece.as_bytes());
                    written.push_str(piece);
                }
                2 if log.exists() => {
                    number += 1;
                    fs_err::rename(&log, folder.path().join(format!("decoder1.{number}.log"))).unwrap();
                    append(&log, b"");
                }
                _ => seen.extend(read(&mut follower)),
            }
        }
        seen.extend(read(&mut follower));
        seen.extend(follower.finish().map(|line| String::from_utf8(line).unwrap()));
        prop_assert_eq!(seen, written.lines().map(str::to_owned).collect::<Vec<_>>());
    }

    #[test]
    fn tail_then_follow_gives_the_end_of_the_log(
        lines in proptest::collection::vec("[a-c]{0,3}", 0..30),
        unfinished in "[a-c]{0,3}",
        long in 0..3_usize,
        count in 0..40_usize,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("x.log");
        // Longer than the first window, so that the search must widen.
        let mut lines = lines;
        lines.splice(0..0, std::iter::repeat_n("x".repeat(40_000), long));
        let all: Vec<&str> = lines.iter().map(String::as_str).chain([unfinished.as_str()]).collect();
        fs_err::write(&log, all.join("\n")).unwrap();
        // Earlier lines are in rotated files.
        let earlier = ["1", "22", "333"];
        fs_err::write(folder.path().join("x.1.log"), "1\n22\n").unwrap();
        fs_err::write(folder.path().join("x.3.log"), "333\n").unwrap();
        lines.splice(0..0, earlier.map(str::to_owned));
        let start = ReadStart::find(&log, None, Some(count), &TimeZone::UTC).unwrap();
        let mut follower = Follower::from_line(&log, start).unwrap();
        let mut last = read(&mut follower);
        // A rotated file between the two is missing.
        last.retain(|line| !line.starts_with("[xpyd: "));
        prop_assert_eq!(&last, &lines[lines.len().saturating_sub(count)..]);
        append(&log, b" goes on\n");
        prop_assert_eq!(read(&mut follower), [format!("{unfinished} goes on")]);
    }
}

#[tokio::test]
async fn phases_of_a_growing_log_arrive_until_ready() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("prefiller1.log");
    // Lines of an earlier incarnation are not phases of this one.
    let earlier = b"INFO:     Application startup complete.\n";
    append(&log, earlier);
    let (sender, mut phases) = mpsc::channel(8);
    let engine = EngineId::new(Role::Prefill, 0);
    let mut watch = JoinSet::new();
    watch.spawn(watch_phases(
        log.clone(),
        earlier.len() as u64,
        EngineKind::Sim,
        engine.clone(),
        sender,
    ));

    append(
        &log,
        b"(APIServer pid=9) INFO 11-22 21:50:42 [model.py:733] Resolved architecture: LlamaForCausalLM\n",
    );
    let (from, phase) = tokio::time::timeout(DEADLINE, phases.recv()).await.unwrap().unwrap();
    assert_eq!((from, phase.name), (engine, "reading config"));
    append(&log, b"INFO:     Application startup complete.\n");
    let (_, phase) = tokio::time::timeout(DEADLINE, phases.recv()).await.unwrap().unwrap();
    assert_eq!((phase.name, phase.percent), ("up", 100));
    tokio::time::timeout(DEADLINE, watch.join_next())
        .await
        .unwrap()
        .unwrap()
        .unwrap()
        .unwrap();
}

#[test]
fn only_old_folders_of_ended_runs_are_removed() {
    let root = tempfile::tempdir().unwrap();
    // xpyd did not create this folder, and it is the oldest one.
    fs_err::create_dir(root.path().join("00000000-000000-mine")).unwrap();
    let running = create_run_folder(root.path(), "2p2d", 2).unwrap();
    let mut ended = Vec::new();
    for _ in 0..3 {
        ended.push(
            create_run_folder(root.path(), "my profile/x", 2)
                .unwrap()
                .path()
                .to_owned(),
        );
    }
    let newest = create_run_folder(root.path(), "1p1d", 2).unwrap();

    assert!(root.path().join("00000000-000000-mine").exists());
    assert!(running.path().exists());
    assert!(newest.path().exists());
    assert!(ended.iter().all(|path| !path.exists()), "{ended:?}");
    assert!(ended[0].to_str().unwrap().ends_with("-my_profile_x"));
    let latest = fs_err::canonicalize(root.path().join("latest")).unwrap();
    assert_eq!(latest, fs_err::canonicalize(newest.path()).unwrap());
}

#[test]
fn a_folder_named_latest_is_not_replaced() {
    let root = tempfile::tempdir().unwrap();
    fs_err::create_dir(root.path().join("latest")).unwrap();
    let error = create_run_folder(root.path(), "2p2d", 5).unwrap_err();
    assert!(matches!(error, LogsError::LatestIsNotALink(_)), "{error}");
}

async fn logs_command(arguments: &[&str]) -> Result<ExitStatus, Failure> {
    let command = Command::try_parse_from([&["logs"], arguments].concat()).unwrap();
    command::run(command.arguments, Printer { quiet: true }).await
}

#[tokio::test]
async fn logs_reads_a_folder_without_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    append(&folder.path().join("prefiller1.log"), b"one\ntwo");
    assert_eq!(
        logs_command(&["--run", path, "-n", "1", "prefill"]).await.unwrap(),
        ExitStatus::Success
    );

    let unknown = logs_command(&["--run", path, "prefiler1"]).await.unwrap_err();
    assert_eq!(unknown.status, ExitStatus::Usage);
    assert!(unknown.to_string().contains("did you mean `prefiller1`?"), "{unknown}");
    let nowhere = logs_command(&["--run", &format!("{path}/gone")]).await.unwrap_err();
    assert_eq!(nowhere.status, ExitStatus::Usage);
}
