//! `cargo bench --bench proxy`: the cost of proxies in front of engines that answer at once, side by side.
//!
//! `-- --only xpyd,nginx --seconds 3 --repeats 3 --streams 1000`. Everything is on loopback. README.md explains the
//! results. `cargo test` makes a small run.

#![expect(clippy::print_stdout, reason = "a table is all it is for")]

mod check;
mod driver;
#[path = "../common/listing.rs"]
mod listing;
mod participants;
mod table;
#[path = "../common/tree.rs"]
mod tree;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use driver::PhaseResult;
use participants::{Participant, null_engine};
use table::{ProxyTable, Streams, WholeAnswers};
use tokio::signal::unix::{SignalKind, signal};
use tree::{Tree, free_port, serves};

/// Bytes of the short and of the long prompt.
const PROMPTS: [usize; 2] = [500, 34_000];
/// Connections at once.
const CONNECTIONS: [usize; 3] = [1, 8, 64];

struct Options {
    only: Vec<String>,
    seconds: f64,
    repeats: usize,
    streams: usize,
    /// Most requests of one phase.
    most: u64,
    /// A stream's events and the time between two.
    events: u32,
    interval: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            only: Vec::new(),
            seconds: 2.0,
            repeats: 3,
            streams: 1000,
            most: 1_000_000,
            events: 60,
            interval: Duration::from_millis(100),
        }
    }
}

impl Options {
    fn read(mut words: impl Iterator<Item = String>) -> Self {
        let mut options = Self::default();
        while let Some(word) = words.next() {
            let mut value = || words.next().unwrap_or_default();
            match word.as_str() {
                "--only" => options.only = value().split(',').map(str::to_owned).collect(),
                "--seconds" => options.seconds = value().parse().expect("--seconds takes a number"),
                "--repeats" => options.repeats = value().parse().expect("--repeats takes a number"),
                "--streams" => options.streams = value().parse().expect("--streams takes a number"),
                BENCH => {}
                other => panic!("`{other}` is no option"),
            }
        }
        options
    }

    fn chose(&self, participant: Participant) -> bool {
        let named = |name: &String| participant.name().starts_with(name.as_str());
        participant == Participant::Base || self.only.is_empty() || self.only.iter().any(named)
    }
}

/// The argument that Cargo passes to benches and not to tests.
const BENCH: &str = "--bench";

/// One measured phase: its result, and the resources of the participant.
struct Measured {
    outcome: PhaseResult,
    cpu: Duration,
    invalid: Option<String>,
}

/// A participant over its own two null engines.
struct Deployment {
    participant: Participant,
    port: u16,
    prefill: u16,
    decode: u16,
    tree: Option<Tree>,
    _engines: [Tree; 2],
}

impl Deployment {
    async fn start(participant: Participant, folder: &Path, options: &Options) -> Result<Self, String> {
        let port = || free_port().map_err(|error| error.to_string());
        let (prefill, decode, mut own) = (port()?, port()?, port()?);
        let engine =
            |port| null_engine(folder, port, options.events, options.interval).map_err(|error| error.to_string());
        let engines = [engine(prefill)?, engine(decode)?];
        if !(serves(prefill).await && serves(decode).await) {
            return Err("the null engines do not serve".into());
        }
        let tree = match participant.command(folder, own, prefill, decode)? {
            None => {
                own = decode;
                None
            }
            Some(command) => {
                let log = folder.join(format!("{}.log", participant.name()));
                Some(Tree::start(command, &log).map_err(|error| error.to_string())?)
            }
        };
        if !serves(own).await {
            return Err("does not serve".into());
        }
        Ok(Self {
            participant,
            port: own,
            prefill,
            decode,
            tree,
            _engines: engines,
        })
    }

    fn cpu(&self) -> Duration {
        self.tree.as_ref().map_or(Duration::ZERO, Tree::cpu)
    }

    /// Resident memory, in MiB.
    fn rss(&self) -> f64 {
        self.tree.as_ref().map_or(0, Tree::rss) as f64 / 1024.0
    }

    async fn seen(&self) -> Result<[u64; 2], String> {
        Ok([driver::seen(self.prefill).await?, driver::seen(self.decode).await?])
    }

    async fn measure(&self, load: impl Future<Output = PhaseResult>) -> Measured {
        let (before, cpu) = (self.seen().await, self.cpu());
        let outcome = load.await;
        let (cpu, after) = (self.cpu().saturating_sub(cpu), self.seen().await);
        let invalid = match (before, after, outcome.errors.first()) {
            (_, _, Some(error)) => Some(format!("{} errors, such as: {error}", outcome.errors.len())),
            (Ok(before), Ok(after), None) => {
                let wanted = [
                    if self.participant.prefills() {
                        outcome.requests
                    } else {
                        0
                    },
                    outcome.requests,
                ];
                let seen = [after[0] - before[0], after[1] - before[1]];
                (seen != wanted).then(|| format!("engines saw {seen:?} requests, not {wanted:?}"))
            }
            (Err(error), ..) | (_, Err(error), _) => Some(error),
        };
        Measured { outcome, cpu, invalid }
    }

    /// Repeats a request until it is answered, because a router can check its engines first.
    async fn warm_up(&self) {
        for _ in 0..100 {
            let outcome = driver::whole(self.port, PROMPTS[0], 8, Duration::from_millis(500), 500).await;
            if outcome.errors.is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if !words.iter().any(|word| word == BENCH) {
        if !listing::printed(&words) {
            check::all().await;
        }
        return ExitCode::SUCCESS;
    }
    let mut terminated = signal(SignalKind::terminate()).expect("signals");
    let options = Options::read(words.into_iter());
    // Dropping this kills everything that was started, however the measurement ends.
    tokio::select! {
        table = measure_all(&options) => {
            table.print_goals();
            if table.invalid().next().is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
        _ = terminated.recv() => ExitCode::FAILURE,
        _ = tokio::signal::ctrl_c() => ExitCode::FAILURE,
    }
}

/// Measures all participants and prints each row when it is ready.
async fn measure_all(options: &Options) -> ProxyTable {
    let folder = tempfile::tempdir().expect("a folder");
    let mut stands = Vec::new();
    for participant in Participant::ALL
        .into_iter()
        .filter(|participant| options.chose(*participant))
    {
        match Deployment::start(participant, folder.path(), options).await {
            Err(reason) => println!("{:<14} {reason}", participant.name()),
            Ok(stand) => stands.push(stand),
        }
    }
    println!(
        "medians of {} repeats; CPU of the whole process tree; latency is added to the base's",
        options.repeats
    );
    WholeAnswers::print_head();
    let mut table = ProxyTable::default();
    for stand in &stands {
        stand.warm_up().await;
        for prompt in PROMPTS {
            for connections in CONNECTIONS {
                let row = whole_answers(stand, options, prompt, connections).await;
                table.add_whole(row);
            }
        }
    }
    Streams::print_head();
    for stand in &stands {
        for prompt in PROMPTS {
            table.add_streams(streams(stand, options, prompt).await);
        }
    }
    table
}

async fn whole_answers(stand: &Deployment, options: &Options, prompt: usize, connections: usize) -> WholeAnswers {
    let mut row = WholeAnswers::new(stand.participant, prompt, connections);
    for _ in 0..options.repeats {
        let time = Duration::from_secs_f64(options.seconds);
        let load = driver::whole(stand.port, prompt, connections, time, options.most);
        let Measured { outcome, cpu, invalid } = stand.measure(load).await;
        let requests = outcome.requests as f64;
        row.rate.push(requests / outcome.wall.as_secs_f64());
        row.cpu.push(micros(cpu) / requests);
        row.p50.push(outcome.quantile(0.5));
        row.p99.push(outcome.quantile(0.99));
        row.rss.push(stand.rss());
        row.invalid.extend(invalid);
    }
    row
}

async fn streams(stand: &Deployment, options: &Options, prompt: usize) -> Streams {
    let mut row = Streams::new(stand.participant, prompt, options.streams);
    for _ in 0..options.repeats {
        // Memory is measured in the middle of the streams; connections of earlier phases are closed by then.
        let before = stand.rss();
        let middle = async {
            tokio::time::sleep(options.interval * options.events / 2).await;
            stand.rss()
        };
        let mut grown = before;
        let load = async {
            let (outcome, seen) = tokio::join!(driver::streams(stand.port, prompt, options.streams), middle);
            grown = seen;
            outcome
        };
        let Measured { outcome, cpu, invalid } = stand.measure(load).await;
        row.cpu.push(micros(cpu) / outcome.times.len() as f64);
        row.memory
            .push((grown - before).max(0.0) * 1024.0 / options.streams as f64);
        row.p50.push(outcome.quantile(0.5));
        row.p99.push(outcome.quantile(0.99));
        row.invalid.extend(invalid);
    }
    row
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
