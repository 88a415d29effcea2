//! Log floods: an engine prints as fast as it can, over rotations, restarts and the death of xpyd. No line is lost.

#![expect(clippy::unwrap_used, reason = "a failed helper must fail its test")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::timeout;
use xpyd::fleet::{EngineId, Incarnation, LogLimits};
use xpyd::logs::Follower;
use xpyd::logs::follow::POLL_INTERVAL;
use xpyd::supervisor::AttachableRun;
use xpyd::supervisor::shim::client::{Shim, ShimLog};
use xpyd::supervisor::shim::protocol::{Command, Event, Keep, Spawn};

use crate::skipped;
use crate::support::{DEADLINE, TestEnv, wait_for};

/// The number of lines per incarnation, about 20 MB.
const LINES: u64 = 2_500_000;

/// Log limits with about twenty rotations per incarnation, which keep all files.
const LIMITS: LogLimits = LogLimits {
    file_bytes: 1 << 20,
    files: 1000,
    age: Duration::MAX,
};

fn engine() -> EngineId {
    EngineId::named("decoder1")
}

struct Flood {
    shim: Shim,
    folder: tempfile::TempDir,
    incarnation: Incarnation,
}

impl Flood {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("shim.log");
        let program = Path::new(env!("CARGO_BIN_EXE_xpyd"));
        Self {
            shim: Shim::start(program, ShimLog::File(&log)).await.unwrap(),
            folder,
            incarnation: Incarnation::FIRST,
        }
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("decoder1.log")
    }

    async fn start(&mut self, script: &str, log_limits: LogLimits) {
        let spawn = self.spawn(engine(), script, log_limits);
        self.incarnation = Incarnation(self.incarnation.0 + 1);
        self.shim.send(&spawn).unwrap();
        let event = self.event().await;
        assert!(matches!(event, Event::Spawned { .. }), "{event:?}");
    }

    fn spawn(&self, engine: EngineId, script: &str, log_limits: LogLimits) -> Command {
        Command::Spawn(Spawn {
            log: Some(self.folder.path().join(format!("{engine}.log"))),
            engine,
            incarnation: self.incarnation,
            argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
            env: BTreeMap::new(),
            directory: "/".into(),
            log_limits,
            stop_grace: DEADLINE,
            memo: serde_json::Value::Null,
        })
    }

    async fn event(&mut self) -> Event {
        timeout(DEADLINE, self.shim.event()).await.unwrap().unwrap()
    }

    /// Waits until no process of the engine is left, so that its whole output is in the log.
    async fn end(&mut self) {
        while !matches!(self.event().await, Event::TreeEmpty { .. }) {}
    }
}

/// Reads until a line is `end`, and checks that the numbers before it count from 1 to `last`, `times` times.
fn count_on(mut follower: Follower, last: u64, times: u64) {
    let (_never, pause) = std::sync::mpsc::channel::<()>();
    let (mut seen, mut quiet) = (0, Duration::ZERO);
    while seen < last * times {
        let lines = follower.read_new().unwrap();
        quiet = if lines.is_empty() {
            quiet + POLL_INTERVAL
        } else {
            Duration::ZERO
        };
        assert!(quiet < DEADLINE, "{seen} lines, and no more come");
        if lines.is_empty() {
            assert!(pause.recv_timeout(POLL_INTERVAL).is_err());
        }
        for line in lines {
            let expected = seen % last + 1;
            assert!(
                line == expected.to_string().as_bytes(),
                "line {expected} is {:?}",
                String::from_utf8_lossy(&line)
            );
            seen += 1;
        }
    }
}

fn numbered_files(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).unwrap().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names
        .filter(|name| name.starts_with("decoder1.") && name != "decoder1.log")
        .count()
}

#[tokio::test]
async fn no_line_is_lost_over_rotations_and_a_restart() {
    let mut flood = Flood::new().await;
    let follower = Follower::from_start(&flood.log());
    // The reader follows while the files are renamed.
    let along = std::thread::spawn(move || count_on(follower, LINES, 2));
    for _ in 0..2 {
        flood.start(&format!("seq 1 {LINES}"), LIMITS).await;
        flood.end().await;
    }
    assert!(numbered_files(flood.folder.path()) > 20);
    along.join().unwrap();
    count_on(Follower::from_start(&flood.log()), LINES, 2);
}

#[tokio::test]
async fn no_line_is_lost_over_a_detach_and_attach() {
    let mut flood = Flood::new().await;
    let socket = flood.folder.path().join("attach.sock");
    let keep = Keep {
        socket: socket.clone(),
        wait: DEADLINE,
        run_dir: flood.folder.path().to_owned(),
    };
    flood.shim.send(&Command::Keep(keep)).unwrap();
    // The engine prints until another xpyd has attached.
    let attached = flood.folder.path().join("attached");
    let script = format!(
        "seq 1 {LINES}; until [ -e '{}' ]; do :; done; seq 1 {LINES}",
        attached.display()
    );
    flood.start(&script, LIMITS).await;
    let Flood { shim, folder, .. } = flood;
    // The kernel closes the socket like this when xpyd is killed.
    drop(shim);
    let found = tokio::task::spawn_blocking(move || AttachableRun::find(&socket))
        .await
        .unwrap();
    let kept = found.unwrap().expect("the shim waits");
    assert_eq!(kept.kept.run_dir, folder.path());
    let mut flood = Flood {
        shim: Shim::attach(kept).unwrap(),
        folder,
        incarnation: Incarnation::FIRST,
    };
    fs_err::write(attached, "").unwrap();
    flood.end().await;
    assert!(numbered_files(flood.folder.path()) > 20);
    count_on(Follower::from_start(&flood.log()), LINES, 2);
}

/// The size of a burst: 40 MB in a debug build, 300 MB in a release build.
const BURST_LINES: u64 = if cfg!(debug_assertions) { 400_000 } else { 3_000_000 };

#[tokio::test]
async fn a_burst_of_long_stderr_lines_is_complete() {
    let mut flood = Flood::new().await;
    let limits = LogLimits {
        file_bytes: 8 << 20,
        ..LIMITS
    };
    // 100 bytes per line, first on stderr, then on stdout. An engine would hang if only one of them was read.
    let half = BURST_LINES / 2;
    let padding = "x".repeat(90);
    let script = format!(
        "seq -f '%09.0f{padding}' 1 {half} >&2; seq -f '%09.0f{padding}' {} {BURST_LINES}",
        half + 1
    );
    flood.start(&script, limits).await;
    flood.end().await;
    let mut follower = Follower::from_start(&flood.log());
    let mut expected = 0;
    loop {
        let lines = follower.read_new().unwrap();
        if lines.is_empty() {
            break;
        }
        for line in lines {
            expected += 1;
            assert!(
                line.starts_with(format!("{expected:09}x").as_bytes()) && line.len() == 99,
                "line {expected}"
            );
        }
    }
    assert_eq!(expected, BURST_LINES);
}

#[tokio::test]
async fn a_deleted_log_is_created_again() {
    for take_away in [(|log: &Path| std::fs::remove_file(log).unwrap()) as fn(&Path), |log| {
        std::fs::rename(log, log.with_extension("elsewhere")).unwrap();
    }] {
        let mut flood = Flood::new().await;
        let gate = flood.folder.path().join("gate");
        let script = format!(
            "mkfifo '{0}'; seq 1 1000; read line <'{0}'; seq 1 300000",
            gate.display()
        );
        flood.start(&script, LIMITS).await;
        let log = flood.log();
        wait_for("the first lines", || {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            (text.ends_with("\n1000\n") && gate.exists()).then_some(()).ok_or(text)
        });
        take_away(&log);
        std::fs::write(&gate, "go on\n").unwrap();
        flood.end().await;
        count_on(Follower::from_start(&log), 300_000, 1);
        assert!(numbered_files(flood.folder.path()) > 0);
    }
}

const FULL_DISK: &str = "XPYD_TEST_FULL_DISK";

#[test]
fn a_full_disk_drops_counted_output_and_no_engine() {
    let disk = tempfile::tempdir().unwrap();
    // The test runs in its own mount namespace, which ends with it.
    let script = "mount -t tmpfs -o size=4m xpyd-test \"$0\" && exec \"$@\"";
    let inside = |program: &std::ffi::OsStr, arguments: &[&str]| {
        let mut unshare = std::process::Command::new("unshare");
        unshare
            .args(["--mount", "sh", "-c", script])
            .arg(disk.path())
            .arg(program)
            .args(arguments);
        unshare.env(FULL_DISK, disk.path());
        unshare.output()
    };
    if !inside("true".as_ref(), &[]).is_ok_and(|output| output.status.success()) {
        skipped(
            "a_full_disk_drops_counted_output_and_no_engine",
            "no file system can be mounted here",
        );
        return;
    }
    let program = std::env::current_exe().unwrap();
    let output = inside(
        program.as_os_str(),
        &["log_flood::on_a_full_disk", "--exact", "--ignored", "--nocapture"],
    )
    .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("test result: ok. 1 passed;"),
        "{text}"
    );
}

/// Not a test by itself: the part of the test above that runs in the namespace.
#[tokio::test]
#[ignore = "run by another test"]
async fn on_a_full_disk() {
    let Some(disk) = std::env::var_os(FULL_DISK).map(PathBuf::from) else {
        return;
    };
    let mut flood = Flood::new().await;
    let gate = flood.folder.path().join("gate");
    let ballast = disk.join("ballast");
    std::fs::write(&ballast, vec![0; 3 << 20]).unwrap();
    // More than the disk and a pipe hold. Then the test frees space, and the engine prints one more line.
    let script = format!(
        "mkfifo '{0}'; seq 1 600000; read line <'{0}'; echo at last",
        gate.display()
    );
    let Command::Spawn(mut spawn) = flood.spawn(engine(), &script, LIMITS) else {
        unreachable!()
    };
    spawn.log = Some(disk.join("decoder1.log"));
    spawn.log_limits.file_bytes = 1 << 30;
    flood.shim.send(&Command::Spawn(spawn)).unwrap();
    assert!(matches!(flood.event().await, Event::Spawned { .. }));
    wait_for("the gate", || if gate.exists() { Ok(()) } else { Err(String::new()) });
    // The pipe opens when the engine reads it, and by then the engine has printed everything.
    let gate = std::fs::OpenOptions::new().write(true).open(&gate).unwrap();
    std::fs::remove_file(&ballast).unwrap();
    drop(gate);
    flood.end().await;
    let text = std::fs::read_to_string(disk.join("decoder1.log")).unwrap();
    let (kept, rest) = text.split_once("\n[xpyd: ").expect("a marker");
    let (lost, rest) = rest
        .split_once(" bytes of output lost here, the disk did not take them]\n")
        .unwrap();
    let rest = rest.strip_suffix("at last\n").expect("the line after space was freed");
    let all: usize = (1..=600_000).map(|number: u32| number.to_string().len() + 1).sum();
    assert_eq!(kept.len() + lost.parse::<usize>().unwrap() + rest.len(), all);
}

#[tokio::test]
async fn last_lines_survive_the_death_of_xpyd() {
    let mut flood = Flood::new().await;
    let folder = flood.folder.path().to_owned();
    let gate = folder.join("gate");
    // The engine runs until xpyd is gone, and then prints more lines.
    let script = format!(
        "trap '' TERM; mkfifo '{gate}'; seq 1 1000; read line <'{gate}'; seq 1001 300000",
        gate = gate.display()
    );
    flood.start(&script, LIMITS).await;
    let startup_finished = Command::StartupFinished { engine: engine() };
    flood.shim.send(&startup_finished).unwrap();
    // Its answer comes after the shim has obeyed the command before it.
    let other = flood.spawn(EngineId::named("decoder2"), "exit", LIMITS);
    flood.shim.send(&other).unwrap();
    flood.event().await;
    let log = flood.log();
    wait_for("the first lines", || {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        text.ends_with("\n1000\n").then_some(()).ok_or(text)
    });
    let Flood {
        shim, folder: _kept, ..
    } = flood;
    drop(shim);
    std::fs::write(&gate, "go on\n").unwrap();
    count_on(Follower::from_start(&log), 300_000, 1);
}

#[tokio::test]
async fn progress_bars_and_huge_lines_do_no_harm() {
    let mut flood = Flood::new().await;
    let limits = LogLimits {
        file_bytes: 1 << 16,
        ..LIMITS
    };
    // A progress bar with 20 000 updates, and a line that is longer than a log file.
    let script = "seq 1 20000 | awk '{ printf \"\\r%d%%|####\", $1 }'; echo; \
                  head -c 1000000 /dev/zero | tr '\\0' x; echo; echo 'INFO 11-22 21:50:42 [a.py:1] done'";
    flood.start(script, limits).await;
    flood.end().await;

    let env = TestEnv::new();
    let output = env.run(&["logs", "--run", flood.folder.path().to_str().unwrap(), "decoder1"]);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let bars = (1..=20_000).map(|number| format!("{number}%|####"));
    assert!(text.lines().take(20_000).eq(bars));
    assert_eq!(text.bytes().filter(|byte| *byte == b'x').count(), 1_000_000);
    assert!(text.ends_with("INFO 11-22 21:50:42 [a.py:1] done\n"));
}

#[tokio::test]
async fn kept_files_are_limited_and_late_readers_get_the_end() {
    let mut flood = Flood::new().await;
    let limits = LogLimits {
        file_bytes: 10_000,
        files: 3,
        ..LIMITS
    };
    flood.start("seq 1 100000", limits).await;
    flood.end().await;
    assert_eq!(numbered_files(flood.folder.path()), 2);
    let lines = Follower::from_start(&flood.log()).read_new().unwrap();
    let first: u64 = String::from_utf8(lines[0].clone()).unwrap().parse().unwrap();
    assert!(first > 90_000, "{first}");
    let text = std::fs::read_to_string(flood.log()).unwrap();
    assert!(text.is_empty() || text.ends_with("\n100000\n"), "{text}");
}
