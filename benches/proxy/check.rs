//! A small run of the bench, as a test: every row exists and has counts, and nothing is left behind. It asserts no
//! times.

use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::Instant;

use crate::tree::{Tree, is_running};
use crate::{BENCH, CONNECTIONS, Options, PROMPTS, measure_all};

/// A generous time limit.
const PATIENCE: Duration = Duration::from_mins(1);

pub(crate) async fn all() {
    let began = Instant::now();
    every_row_is_there_and_counts().await;
    a_bench_that_is_killed_leaves_no_process().await;
    println!("the bench works; checked in {:?}", began.elapsed());
}

async fn every_row_is_there_and_counts() {
    let options = Options {
        only: vec!["xpyd".to_owned()],
        repeats: 1,
        streams: 4,
        most: 50,
        events: 5,
        interval: Duration::from_millis(20),
        ..Options::default()
    };
    let table = measure_all(&options).await;
    table.print_goals();
    let invalid: Vec<_> = table.invalid().collect();
    assert!(invalid.is_empty(), "{invalid:#?}");
    let participants = 2;
    assert_eq!(table.whole.len(), participants * PROMPTS.len() * CONNECTIONS.len());
    assert_eq!(table.streams.len(), participants * PROMPTS.len());
    for row in &table.whole {
        assert!(
            row.rate[0] > 0.0 && row.p50[0] > 0.0 && row.p99[0] >= row.p50[0],
            "no times"
        );
    }
    for row in &table.streams {
        assert!(row.p50[0] > 0.0 && row.p99[0] >= row.p50[0], "no events");
    }
}

async fn a_bench_that_is_killed_leaves_no_process() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(std::env::current_exe().expect("a program"));
    command.args([BENCH, "--only", "xpyd", "--seconds", "3600"]);
    let bench = Tree::start(command, &folder.path().join("bench.log")).expect("it starts");
    // The bench, two engines for each of two participants, xpyd, and who ends each of these five.
    let started = until("all processes of the bench", || {
        Some(bench.processes()).filter(|all| all.len() >= 11)
    })
    .await;
    kill(Pid::from_raw(started[0].cast_signed()), Signal::SIGKILL).expect("it is there");
    until("the end of all processes", || {
        let left = started.iter().filter(|pid| is_running(**pid)).count();
        (left == 0).then_some(())
    })
    .await;
}

/// Repeats a check until it succeeds.
async fn until<T>(what: &str, ask: impl Fn() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(began.elapsed() < PATIENCE, "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
