//! Faults that need the kernel's help: a process that SIGKILL does not end, and reused process ids.
//!
//! Both need rights that not every machine grants. Without them the tests report `SKIPPED` through [`skipped`].

#![expect(clippy::unwrap_used, reason = "a failed helper must fail its test")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command as Process;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::time::{Instant, timeout};
use xpyd::fleet::{EngineId, Incarnation, LogLimits};
use xpyd::supervisor::shim::client::{Shim, ShimLog};
use xpyd::supervisor::shim::protocol::{Command, Event, Spawn};

use crate::skipped;
use crate::support::{DEADLINE, TestEnv, until};

const PROGRAM: &str = env!("CARGO_BIN_EXE_xpyd");

/// A freezer of cgroup version 1. A frozen process waits in the kernel in state `D`, and no signal ends it; cgroup version 2
/// lets SIGKILL end frozen processes, so it cannot replace this.
struct Freezer(PathBuf);

impl Freezer {
    /// Returns `None` if there is no such hierarchy, or the user is not allowed to create a group in it.
    fn new(purpose: &str) -> Option<Self> {
        let mounts = std::fs::read_to_string("/proc/mounts").ok()?;
        let is_freezer = |options: &str| options.split(',').any(|option| option == "freezer");
        let folder = mounts.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            (fields.get(2) == Some(&"cgroup") && is_freezer(fields.get(3)?)).then(|| PathBuf::from(fields[1]))
        })?;
        let own = folder.join(format!("xpyd-test-{purpose}-{}", std::process::id()));
        std::fs::create_dir(&own).ok()?;
        Some(Self(own))
    }

    async fn freeze(&self, pid: i32) {
        std::fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
        self.set("FROZEN");
        until("it is frozen", || {
            read(&self.0.join("freezer.state")).trim() == "FROZEN"
        })
        .await;
    }

    fn set(&self, state: &str) {
        std::fs::write(self.0.join("freezer.state"), state).unwrap();
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        self.set("THAWED");
        // The kernel removes a process from the group shortly after its end.
        let give_up = Instant::now() + DEADLINE;
        while std::fs::remove_dir(&self.0).is_err() && Instant::now() < give_up {
            std::thread::yield_now();
        }
    }
}

#[tokio::test]
async fn an_unkillable_process_is_named_and_not_called_stopped() {
    let Some(freezer) = Freezer::new("worker") else {
        skipped(
            "an_unkillable_process_is_named_and_not_called_stopped",
            "cgroup version 1 has no freezer here",
        );
        return;
    };
    let env = TestEnv::new();
    let mut run = env.up(&["--profile", "1p1d"]);
    run.wait_until_ready();
    let processes = env.processes();
    let (frozen, _) = processes
        .iter()
        .find(|(_, command)| command.contains("VLLM::Worker"))
        .unwrap();
    freezer.freeze(*frozen).await;
    run.signal(Signal::SIGINT);
    run.wait_for_line("press Ctrl+C again to force");
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 7, "{text}");
    assert!(!text.contains("no process and no listener is left"), "{text}");
    assert!(
        text.lines()
            .any(|line| line.contains(&format!("process {frozen} (`")) && line.contains("state D")),
        "{text}"
    );
    drop(freezer);
    // The pending SIGKILL ends the process.
    env.wait_until_empty();
}

#[tokio::test]
async fn shared_memory_is_removed_before_its_owner_is_killed() {
    let Some(freezer) = Freezer::new("segment") else {
        skipped(
            "shared_memory_is_removed_before_its_owner_is_killed",
            "cgroup version 1 has no freezer here",
        );
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let mut shim = Shim::start(Path::new(PROGRAM), ShimLog::File(&folder.path().join("shim.log")))
        .await
        .unwrap();
    let segment = Path::new("/dev/shm").join(format!("xpyd-test-frozen-{}", std::process::id()));
    let script = format!("exec 3<>{}; echo up; exec sleep 1000", segment.display());
    shim.send(&spawn(folder.path(), "decoder1", &script)).unwrap();
    let Event::Spawned { pid, .. } = event(&mut shim).await else {
        panic!("no start")
    };
    let log = folder.path().join("decoder1.log");
    until("the segment is there", || segment.exists() && !read(&log).is_empty()).await;
    freezer.freeze(pid.try_into().unwrap()).await;
    let engine = EngineId::named("decoder1");
    shim.send(&Command::Kill { engine }).unwrap();
    tokio::select! {
        event = shim.event() => panic!("the unkillable process has ended: {event:?}"),
        () = until("the segment is gone", || !segment.exists()) => {}
    }
    drop(freezer);
    while !matches!(event(&mut shim).await, Event::TreeEmpty { .. }) {}
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

const IN_NAMESPACE: &str = "XPYD_TEST_PID_NAMESPACE";

/// A limit of process ids that is so small that ids are reused within a moment.
const MOST_PIDS: &str = "400";

#[test]
fn a_kill_never_hits_a_reused_pid() {
    let namespace = ["--pid", "--fork", "--kill-child", "--mount-proc"];
    let may = Process::new("unshare")
        .args(namespace)
        .args(["sh", "-c", "echo 400 > /proc/sys/kernel/pid_max"])
        .output()
        .is_ok_and(|output| output.status.success());
    // Before Linux 6.14 the limit applies to the whole machine, which the test must not change.
    let outside: u32 = read(Path::new("/proc/sys/kernel/pid_max")).trim().parse().unwrap();
    if !may || outside <= 400 {
        skipped(
            "a_kill_never_hits_a_reused_pid",
            "process id namespaces have no limit of their own here",
        );
        return;
    }
    let output = Process::new("unshare")
        .args(namespace)
        .arg(std::env::current_exe().unwrap())
        .args(["kernel::in_a_namespace", "--exact", "--ignored", "--nocapture"])
        .env(IN_NAMESPACE, "1")
        .output()
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
async fn in_a_namespace() {
    if std::env::var_os(IN_NAMESPACE).is_none() {
        return;
    }
    std::fs::write("/proc/sys/kernel/pid_max", MOST_PIDS).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut shim = Shim::start(Path::new(PROGRAM), ShimLog::File(&folder.path().join("shim.log")))
        .await
        .unwrap();
    // Its child in another session is known as a member of the tree before it ends.
    // Ids below 300 are never reused. The shim reaps the orphan, which makes it read the tree.
    let victim = "while [ $(sh -c 'echo $$') -lt 310 ]; do :; done; \
                  setsid sleep 1000 & echo $! > child; (true &); read line < gate; kill -9 $!; wait $!; echo gone > gone; exec sleep 1000";
    nix::unistd::mkfifo(&folder.path().join("gate"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    shim.send(&spawn(folder.path(), "decoder1", victim)).unwrap();
    assert!(matches!(event(&mut shim).await, Event::Spawned { .. }));
    until("its child is there", || {
        read(&folder.path().join("child")).ends_with('\n')
    })
    .await;
    let child: u32 = read(&folder.path().join("child")).trim().parse().unwrap();
    // The other engine uses up ids until it has the child's.
    let other = format!(
        "read line < start; while :; do sleep 1000 & \
         if [ $! = {child} ]; then echo $! > taken; exec sleep 1000; fi; kill -9 $!; wait $!; done"
    );
    nix::unistd::mkfifo(&folder.path().join("start"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    shim.send(&spawn(folder.path(), "decoder2", &other)).unwrap();
    assert!(matches!(event(&mut shim).await, Event::Spawned { .. }));
    std::fs::write(folder.path().join("gate"), "go\n").unwrap();
    until("the child is gone", || folder.path().join("gone").exists()).await;
    std::fs::write(folder.path().join("start"), "go\n").unwrap();
    until("its id is reused", || folder.path().join("taken").exists()).await;

    shim.send(&Command::Kill {
        engine: EngineId::named("decoder1"),
    })
    .unwrap();
    while !matches!(event(&mut shim).await, Event::TreeEmpty { engine, .. } if engine == EngineId::named("decoder1")) {}
    // The process can still be between fork and `exec` of `sleep`. A killed process never gets there.
    until("the other engine's process sleeps", || {
        read(Path::new(&format!("/proc/{child}/stat"))).contains("(sleep) S")
    })
    .await;
}

/// The command that starts a script in `folder`, with its log there.
fn spawn(folder: &Path, engine: &str, script: &str) -> Command {
    Command::Spawn(Spawn {
        engine: EngineId::named(engine),
        incarnation: Incarnation::FIRST,
        argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
        env: BTreeMap::new(),
        directory: folder.to_owned(),
        log: Some(folder.join(format!("{engine}.log"))),
        log_limits: LogLimits::default(),
        stop_grace: Duration::from_mins(10),
        memo: serde_json::Value::Null,
    })
}

async fn event(shim: &mut Shim) -> Event {
    timeout(DEADLINE, shim.event()).await.unwrap().unwrap()
}
