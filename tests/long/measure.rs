//! Measurements of supervision on simulated engines: durations, memory and throughput. They assert nothing about time.
//!
//! `cargo test --release --test long -- --ignored --nocapture --test-threads 1 measure::`

#![expect(clippy::print_stdout, reason = "measurements are printed")]
#![expect(clippy::unwrap_used, reason = "a measurement that cannot go on has failed")]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::sys::signal::Signal;
use xpyd::fleet::{EngineId, Incarnation, LogLimits};
use xpyd::supervisor::shim::client::{Shim, ShimLog};
use xpyd::supervisor::shim::protocol::{Command, Event, Spawn};

use crate::support::{DEADLINE, TestEnv, get};
use crate::teardown_matrix::Victim;

fn milliseconds(since: SystemTime) -> u128 {
    since.elapsed().unwrap().as_millis()
}

fn print_percentiles(what: &str, mut took: Vec<u128>) {
    took.sort_unstable();
    let (count, last) = (took.len(), took.len() - 1);
    println!(
        "{what}, ms, {count} runs: p50 {} p99 {} max {}",
        took[count / 2],
        took[count * 99 / 100],
        took[last]
    );
}

/// The time from SIGKILL of xpyd until no process of four idle engines is left, and the idle cost of xpyd, shim and monitor.
#[test]
#[ignore = "a measurement"]
fn teardown_after_sigkill() {
    let env = TestEnv::new();
    let mut took = Vec::new();
    for turn in 0..50 {
        let mut run = env.up(&["--profile", "2p2d"]);
        run.wait_until_ready();
        let processes = env.processes();
        for victim in [Victim::Xpyd, Victim::Shim, Victim::Monitor] {
            if turn == 0 {
                let memory =
                    std::fs::read_to_string(format!("/proc/{}/smaps_rollup", victim.find(&processes))).unwrap();
                let lines = memory
                    .lines()
                    .filter(|line| line.starts_with("Rss") || line.starts_with("Pss:"));
                println!("{victim:?}: {}", lines.collect::<Vec<_>>().join(", "));
            }
        }
        let began = SystemTime::now();
        run.signal(Signal::SIGKILL);
        while processes
            .iter()
            .any(|(pid, _)| std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|command| !command.is_empty()))
        {
            std::thread::yield_now();
        }
        took.push(milliseconds(began));
    }
    print_percentiles("SIGKILL of xpyd to an empty tree of four engines", took);
}

/// The time from Ctrl+C until xpyd has ended, with four idle engines.
#[test]
#[ignore = "a measurement"]
fn graceful_stop() {
    let env = TestEnv::new();
    let mut took = Vec::new();
    for _ in 0..20 {
        let mut run = env.up(&["--profile", "2p2d"]);
        run.wait_until_ready();
        let began = SystemTime::now();
        run.signal(Signal::SIGINT);
        assert_eq!(run.end().0, 0);
        took.push(milliseconds(began));
    }
    print_percentiles("Ctrl+C to the end of four engines", took);
}

/// The time from the start of `xpyd up` until `/health` of both instant engines answers, and until clients are served. For
/// comparison, the time until `/health` of one such engine without xpyd.
#[test]
#[ignore = "a measurement"]
fn start() {
    let env = TestEnv::new();
    let (mut healthy, mut ready, mut alone) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..20 {
        let began = SystemTime::now();
        let mut run = env.up(&["--profile", "1p1d"]);
        while !get_or_nothing(&env).contains("verifying") && !get_or_nothing(&env).contains("\"ready\"") {}
        healthy.push(milliseconds(began));
        run.wait_until_ready();
        ready.push(milliseconds(began));
        run.signal(Signal::SIGINT);
        run.end();
        let began = SystemTime::now();
        let port = (7200 + env.offset).to_string();
        let mut engine = env
            .command(&["sim", "model", "--port", &port, "--preset", "instant"])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        while std::net::TcpStream::connect(("127.0.0.1", 7200 + env.offset)).is_err() {
            std::thread::yield_now();
        }
        get(7200 + env.offset, "/health");
        alone.push(milliseconds(began));
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(engine.id().try_into().unwrap()),
            Signal::SIGTERM,
        )
        .unwrap();
        engine.wait().unwrap();
    }
    print_percentiles("start of xpyd to /health of two engines seen", healthy);
    print_percentiles("start of xpyd to a fleet that serves", ready);
    print_percentiles("start of one engine to its /health, without xpyd", alone);
}

/// The status of the run over its control socket; empty if there is none yet.
fn get_or_nothing(env: &TestEnv) -> String {
    let output = env.run(&["status", "--json"]);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The log throughput in bytes per second, from an engine through the shim to rotated files.
#[tokio::test]
#[ignore = "a measurement"]
async fn log_throughput() {
    const BYTES: u64 = 2_000_000_000;
    let folder = tempfile::tempdir().unwrap();
    let mut shim = Shim::start(
        Path::new(env!("CARGO_BIN_EXE_xpyd")),
        ShimLog::File(&folder.path().join("shim.log")),
    )
    .await
    .unwrap();
    let line = "x".repeat(199);
    let spawn = Command::Spawn(Spawn {
        engine: EngineId::named("decoder1"),
        incarnation: Incarnation::FIRST,
        argv: ["sh", "-c", &format!("yes {line} | head -c {BYTES}")]
            .map(str::to_owned)
            .to_vec(),
        env: BTreeMap::new(),
        directory: "/".into(),
        log: Some(folder.path().join("decoder1.log")),
        log_limits: LogLimits {
            file_bytes: 64 << 20,
            files: 4,
            age: Duration::MAX,
        },
        stop_grace: DEADLINE,
        memo: serde_json::Value::Null,
    });
    let began = SystemTime::now();
    shim.send(&spawn).unwrap();
    while !matches!(shim.event().await.unwrap(), Event::TreeEmpty { .. }) {}
    let took = milliseconds(began);
    println!(
        "log throughput: {} MB/s ({BYTES} bytes in {took} ms)",
        u128::from(BYTES) / 1000 / took
    );
}
