//! The shim with real processes, through its client.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::time::timeout;
use xpyd::fleet::Exit;
use xpyd::fleet::{EngineId, Incarnation, LogLimits};
use xpyd::supervisor::shim::client::{Shim, ShimLog};
use xpyd::supervisor::shim::protocol::{Command, Event, Spawn};

use super::processes::{MARK, marked, read};
use crate::support::{DEADLINE, until};

const PROGRAM: &str = env!("CARGO_BIN_EXE_xpyd");

/// A leader that ignores SIGTERM, with a worker in its session, one in another session, a daemon that forked twice and closed
/// the log, and a grandchild that holds the log. Each prints `up` when it runs.
const STUBBORN: &str = r#"
trap '' TERM
sleep 1000 &
setsid sh -c 'echo up; exec sleep 1000' &
( setsid sh -c 'echo up; exec sleep 1000 >/dev/null 2>&1' & )
sh -c 'sh -c "echo up; exec sleep 1000" & wait' &
echo up
"#;
const STUBBORN_PROCESSES: usize = 6;

fn stubborn(then: &str) -> String {
    format!("{STUBBORN}{then}")
}

/// A shim with its folder, and the mark of all processes that it starts.
struct ShimHarness {
    shim: Shim,
    folder: TempDir,
    mark: String,
}

impl ShimHarness {
    async fn new() -> Self {
        crate::support::reset_ignored_signals();
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("shim.log");
        Self {
            shim: Shim::start(Path::new(PROGRAM), ShimLog::File(&log)).await.unwrap(),
            mark: folder.path().to_string_lossy().into_owned(),
            folder,
        }
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("engine.log")
    }

    async fn event(&mut self) -> Event {
        timeout(DEADLINE, self.shim.event())
            .await
            .expect("an event in time")
            .unwrap()
    }

    /// Starts the script as engine `decoder1`, and returns the process id of its leader.
    async fn spawn(&mut self, script: &str) -> u32 {
        self.shim.send(&spawn(script, &self.mark, &self.log())).unwrap();
        match self.event().await {
            Event::Spawned { pid, .. } => pid,
            other => panic!("{other:?}"),
        }
    }

    async fn spawn_stubborn(&mut self, then: &str) -> u32 {
        let leader = self.spawn(&stubborn(then)).await;
        let log = self.log();
        until("the whole tree is up", || read(&log).lines().count() == 4).await;
        leader
    }

    fn kill(&mut self) {
        self.shim.send(&Command::Kill { engine: engine() }).unwrap();
    }
}

fn engine() -> EngineId {
    EngineId::named("decoder1")
}

fn spawn(script: &str, mark: &str, log: &Path) -> Command {
    Command::Spawn(Spawn {
        engine: engine(),
        incarnation: Incarnation::FIRST,
        argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
        env: BTreeMap::from([(MARK.to_owned(), mark.to_owned())]),
        directory: "/".into(),
        log: Some(log.to_owned()),
        log_limits: LogLimits::default(),
        stop_grace: Duration::from_mins(10),
        memo: serde_json::Value::Null,
    })
}

fn tree_empty() -> Event {
    Event::TreeEmpty {
        engine: engine(),
        incarnation: Incarnation::FIRST,
    }
}

fn exited(exit: Exit) -> Event {
    Event::Exited {
        engine: engine(),
        incarnation: Incarnation::FIRST,
        exit,
    }
}

#[tokio::test]
async fn a_kill_removes_a_tree_that_ignores_sigterm() {
    let mut harness = ShimHarness::new().await;
    harness.spawn_stubborn("wait").await;
    assert_eq!(marked(&harness.mark).len(), STUBBORN_PROCESSES);
    harness.kill();
    assert_eq!(harness.event().await, exited(Exit::Signal(9)));
    assert_eq!(harness.event().await, tree_empty());
    assert_eq!(marked(&harness.mark), []);
}

#[tokio::test]
async fn orphans_of_an_exited_leader_can_be_killed() {
    let mut harness = ShimHarness::new().await;
    harness.spawn_stubborn("exit 0").await;
    assert_eq!(harness.event().await, exited(Exit::Code(0)));
    assert!(!marked(&harness.mark).is_empty());
    harness.kill();
    assert_eq!(harness.event().await, tree_empty());
    assert_eq!(marked(&harness.mark), []);
}

#[tokio::test]
async fn sigterm_reaches_only_the_leader_once() {
    let mut harness = ShimHarness::new().await;
    let script = r#"
        sh -c 'trap "echo worker got it" TERM; while :; do sleep 0.01; done' &
        trap 'echo leader got it; trap "echo leader got it again" TERM; sleep 0.2; kill -9 $!; exit 7' TERM
        echo up
        while :; do sleep 0.01; done
    "#;
    harness.spawn(script).await;
    let log = harness.log();
    until("the leader is up", || read(&log).contains("up")).await;
    for _ in 0..2 {
        harness.shim.send(&Command::Terminate { engine: engine() }).unwrap();
    }
    assert_eq!(harness.event().await, exited(Exit::Code(7)));
    // The worker's `sleep` can end either way: the tree is empty, or still there to be killed.
    harness.kill();
    assert_eq!(harness.event().await, tree_empty());
    assert_eq!(read(&log), "up\nleader got it\n");
}

#[tokio::test]
async fn children_of_an_exited_wrapper_get_sigterm() {
    let mut harness = ShimHarness::new().await;
    // A shell without `exec` ends on SIGTERM and forwards no signal.
    let script = r#"
        sh -c 'trap "echo clean end; exit 0" TERM; echo up; while :; do sleep 0.01; done' &
        wait
    "#;
    harness.spawn(script).await;
    let log = harness.log();
    until("the server is up", || read(&log).contains("up")).await;
    harness.shim.send(&Command::Terminate { engine: engine() }).unwrap();
    assert_eq!(harness.event().await, exited(Exit::Signal(15)));
    assert_eq!(harness.event().await, tree_empty());
    // The shell can also print that its `sleep` was terminated.
    let said = read(&log);
    assert!(said.starts_with("up\n") && said.ends_with("clean end\n"), "{said}");
}

#[tokio::test]
async fn the_log_is_complete_when_the_exit_is_reported() {
    const LINES: usize = 200_000;
    let mut harness = ShimHarness::new().await;
    harness.spawn(&format!("seq 1 {LINES}; printf 'no newline' >&2")).await;
    assert_eq!(harness.event().await, exited(Exit::Code(0)));
    let mut expected = (1..=LINES).fold(String::new(), |mut text, line| {
        writeln!(text, "{line}").unwrap();
        text
    });
    expected.push_str("no newline");
    assert!(read(&harness.log()) == expected, "the log differs");
}

#[tokio::test]
async fn an_engine_starts_in_a_clean_session() {
    let mut harness = ShimHarness::new().await;
    let leader = harness
        .spawn("cat; grep -E '^Sig(Blk|Ign)' /proc/self/status; readlink /proc/self/fd/0; cut -d' ' -f6 /proc/$$/stat")
        .await;
    assert_eq!(harness.event().await, exited(Exit::Code(0)));
    let text = read(&harness.log());
    let words: Vec<&str> = text.split_whitespace().collect();
    let [_, blocked, _, ignored, stdin, session] = words[..] else {
        panic!("{text}")
    };
    // Signals 32 and 33 belong to the C library.
    let standard = |mask: &str| u64::from_str_radix(mask, 16).unwrap() & 0x7fff_ffff;
    assert_eq!((standard(blocked), standard(ignored)), (0, 0));
    assert_eq!((stdin, session), ("/dev/null", leader.to_string().as_str()));
}

#[tokio::test]
async fn a_missing_program_is_a_failed_spawn() {
    let mut harness = ShimHarness::new().await;
    let Command::Spawn(mut wrong) = spawn("", &harness.mark, &harness.log()) else {
        unreachable!()
    };
    wrong.argv = vec!["/no/such/program".to_owned()];
    harness.shim.send(&Command::Spawn(wrong)).unwrap();
    match harness.event().await {
        Event::SpawnFailed { reason, .. } => assert!(reason.contains("/no/such/program"), "{reason}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_second_start_of_a_living_engine_is_refused() {
    let mut harness = ShimHarness::new().await;
    harness.spawn("exec sleep 1000").await;
    harness
        .shim
        .send(&spawn("exec sleep 1000", &harness.mark, &harness.log()))
        .unwrap();
    assert!(matches!(harness.event().await, Event::SpawnFailed { .. }));
    assert_eq!(marked(&harness.mark).len(), 1);
}

#[tokio::test]
async fn shared_memory_of_a_killed_tree_is_removed() {
    let mut harness = ShimHarness::new().await;
    let file = tempfile::Builder::new()
        .prefix("xpyd-test-")
        .tempdir_in("/dev/shm")
        .unwrap();
    let path = file.path().with_extension("segment");
    harness
        .spawn(&format!("exec 3<>{}; echo up; exec sleep 1000", path.display()))
        .await;
    let log = harness.log();
    until("the segment is there", || read(&log).contains("up")).await;
    assert!(path.exists());
    harness.kill();
    harness.event().await;
    assert_eq!(harness.event().await, tree_empty());
    assert!(!path.exists());
}

#[tokio::test]
async fn terminal_signals_do_not_end_the_shim() {
    let mut harness = ShimHarness::new().await;
    let shim = Pid::from_raw(harness.shim.pid().try_into().unwrap());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
        kill(shim, signal).unwrap();
    }
    harness.spawn("exit 3").await;
    assert_eq!(harness.event().await, exited(Exit::Code(3)));
}

#[tokio::test]
async fn a_shutdown_kills_the_rest_and_ends_the_shim() {
    let mut harness = ShimHarness::new().await;
    harness.spawn_stubborn("wait").await;
    harness.shim.send(&Command::Shutdown).unwrap();
    while timeout(DEADLINE, harness.shim.event()).await.unwrap().is_ok() {}
    harness.shim.ended().await;
    assert_eq!(marked(&harness.mark), []);
}

#[tokio::test]
async fn nothing_is_left_when_the_shim_is_killed() {
    for then in ["wait", "exit 0"] {
        let mut harness = ShimHarness::new().await;
        harness.spawn_stubborn(then).await;
        let shim = Pid::from_raw(harness.shim.pid().try_into().unwrap());
        kill(shim, Signal::SIGKILL).unwrap();
        while timeout(DEADLINE, harness.shim.event()).await.unwrap().is_ok() {}
        assert_eq!(harness.shim.sweep().await, []);
        assert_eq!(marked(&harness.mark), [], "leader: {then}");
    }
}

#[tokio::test]
async fn killing_xpyd_terminates_engines_gracefully() {
    for settled in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let mut xpyd = Process::new(std::env::current_exe().unwrap())
            .args(["supervisor::shim::play_xpyd", "--exact", "--ignored", "--nocapture"])
            .env(PLAY, folder.path())
            .envs(settled.then_some((PLAY_SETTLED, "1")))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mark = folder.path().to_string_lossy().into_owned();
        let up = BufReader::new(xpyd.stdout.take().unwrap())
            .lines()
            .any(|line| line.unwrap() == "the tree is up");
        assert!(up && !marked(&mark).is_empty());
        xpyd.kill().unwrap();
        xpyd.wait().unwrap();
        until("nothing is left", || marked(&mark).is_empty()).await;
        assert_eq!(
            read(&folder.path().join("engine.log")).contains("asked to leave"),
            settled
        );
    }
}

const PLAY: &str = "XPYD_TEST_PLAY";
const PLAY_SETTLED: &str = "XPYD_TEST_PLAY_SETTLED";

/// Not a test: the process that stands in for xpyd above. It starts a tree, prints that, and waits to be killed.
#[tokio::test]
#[ignore = "run by another test"]
async fn play_xpyd() {
    let Ok(mark) = std::env::var(PLAY) else { return };
    let folder = PathBuf::from(&mark);
    let log = folder.join("engine.log");
    let mut shim = Shim::start(Path::new(PROGRAM), ShimLog::File(&folder.join("shim.log")))
        .await
        .unwrap();
    let leader = "trap 'echo asked to leave; exit 0' TERM; while :; do sleep 0.01; done";
    shim.send(&spawn(&stubborn(leader), &mark, &log)).unwrap();
    if std::env::var_os(PLAY_SETTLED).is_some() {
        shim.send(&Command::StartupFinished { engine: engine() }).unwrap();
    }
    assert!(matches!(shim.event().await.unwrap(), Event::Spawned { .. }));
    until("the tree is up", || read(&log).lines().count() == 4).await;
    println!("\nthe tree is up");
    std::future::pending::<()>().await;
}
