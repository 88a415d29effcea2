//! `cargo bench --bench proxy`: what proxies cost over engines that answer at once, side by side.
//!
//! `-- --only xpyd,nginx --seconds 3 --repeats 3 --streams 1000`. Everything is on loopback. README.md says how to read it.

#![expect(clippy::print_stdout, reason = "a table is all it is for")]

mod driver;
mod participants;

use std::path::Path;
use std::time::Duration;

use driver::Outcome;
use participants::{Participant, Tree, free_port, null_engine, serves};
use tokio::signal::unix::{SignalKind, signal};

/// Bytes of the short and of the long prompt.
const PROMPTS: [usize; 2] = [500, 34_000];
/// Connections at once.
const CONNECTIONS: [usize; 3] = [1, 8, 64];
/// A stream's events and the time between two.
const EVENTS: u32 = 60;
const INTERVAL: Duration = Duration::from_millis(100);
/// Most requests of one phase.
const MOST: u64 = 1_000_000;

struct Options {
    only: Vec<String>,
    seconds: f64,
    repeats: usize,
    streams: usize,
}

impl Options {
    fn read() -> Self {
        let mut options = Self {
            only: Vec::new(),
            seconds: 2.0,
            repeats: 3,
            streams: 1000,
        };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut value = || words.next().unwrap_or_default();
            match word.as_str() {
                "--only" => options.only = value().split(',').map(str::to_owned).collect(),
                "--seconds" => options.seconds = value().parse().expect("--seconds takes a number"),
                "--repeats" => options.repeats = value().parse().expect("--repeats takes a number"),
                "--streams" => options.streams = value().parse().expect("--streams takes a number"),
                // Cargo gives it to every bench.
                "--bench" => {}
                other => panic!("`{other}` is no option"),
            }
        }
        options
    }
}

/// One measured phase: what was seen, and what the participant used for it.
struct Measured {
    outcome: Outcome,
    cpu: Duration,
    invalid: Option<String>,
}

/// A participant over its own two null engines.
struct Stand {
    participant: Participant,
    port: u16,
    prefill: u16,
    decode: u16,
    tree: Option<Tree>,
    _engines: [Tree; 2],
}

impl Stand {
    async fn start(participant: Participant, folder: &Path) -> Result<Self, String> {
        let port = || free_port().map_err(|error| error.to_string());
        let (prefill, decode, mut own) = (port()?, port()?, port()?);
        let engine = |port| null_engine(folder, port, EVENTS, INTERVAL).map_err(|error| error.to_string());
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

    async fn seen(&self) -> Result<[u64; 2], String> {
        Ok([driver::seen(self.prefill).await?, driver::seen(self.decode).await?])
    }

    async fn measure(&self, load: impl Future<Output = Outcome>) -> Measured {
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

    /// Asks until an answer comes: a router may look at its engines first.
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

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// The numbers of one participant that ratios are made of.
#[derive(Default, Clone)]
struct Row {
    cpu: Vec<f64>,
    p50: Vec<f64>,
}

#[tokio::main]
async fn main() {
    let mut terminated = signal(SignalKind::terminate()).expect("signals");
    // What was started ends with the measurement, however that ends: dropping it kills the trees.
    tokio::select! {
        () = measure_all() => {}
        _ = terminated.recv() => println!("terminated"),
        _ = tokio::signal::ctrl_c() => println!("interrupted"),
    }
}

async fn measure_all() {
    let options = Options::read();
    let folder = tempfile::tempdir().expect("a folder");
    println!(
        "medians of {} repeats; CPU of the whole process tree; latency is added to the base's",
        options.repeats
    );
    println!(
        "{:<14} {:>6} {:>5} {:>9} {:>10} {:>9} {:>9} {:>8}",
        "", "prompt", "conn", "req/s", "CPU us/req", "p50 us", "p99 us", "RSS MiB"
    );
    let mut rows: Vec<(Participant, Row)> = Vec::new();
    let mut stands = Vec::new();
    for participant in Participant::ALL {
        let chosen = options.only.is_empty()
            || options
                .only
                .iter()
                .any(|name| participant.name().starts_with(name.as_str()));
        if !(chosen || participant == Participant::Base) {
            continue;
        }
        match Stand::start(participant, folder.path()).await {
            Err(reason) => println!("{:<14} {reason}", participant.name()),
            Ok(stand) => stands.push(stand),
        }
    }
    let mut base: Vec<[f64; 2]> = Vec::new();
    for stand in &stands {
        stand.warm_up().await;
        let row = whole_answers(stand, &options, &mut base).await;
        rows.push((stand.participant, row));
    }
    println!(
        "\n{:<14} {:>7} {:>12} {:>12} {:>9} {:>9}",
        "", "streams", "CPU us/event", "KiB/stream", "p50 us", "p99 us"
    );
    for stand in &stands {
        streams(stand, &options).await;
    }
    ratios(&rows);
}

async fn whole_answers(stand: &Stand, options: &Options, base: &mut Vec<[f64; 2]>) -> Row {
    let mut row = Row::default();
    let cells = PROMPTS
        .iter()
        .flat_map(|prompt| CONNECTIONS.map(|connections| (*prompt, connections)));
    for (index, (prompt, connections)) in cells.enumerate() {
        let mut all = [const { Vec::new() }; 4];
        let mut invalid = None;
        for _ in 0..options.repeats {
            let time = Duration::from_secs_f64(options.seconds);
            let measured = stand
                .measure(driver::whole(stand.port, prompt, connections, time, MOST))
                .await;
            let outcome = &measured.outcome;
            let requests = outcome.requests as f64;
            let values = [
                requests / outcome.wall.as_secs_f64(),
                micros(measured.cpu) / requests,
                outcome.quantile(0.5),
                outcome.quantile(0.99),
            ];
            for (list, value) in all.iter_mut().zip(values) {
                list.push(value);
            }
            invalid = invalid.or(measured.invalid);
        }
        let [rate, cpu, mut p50, mut p99] = all.map(median);
        if stand.participant == Participant::Base {
            base.push([p50, p99]);
        } else if let Some(under) = base.get(index) {
            (p50, p99) = (p50 - under[0], p99 - under[1]);
        }
        row.cpu.push(cpu);
        row.p50.push(p50);
        let rss = stand.tree.as_ref().map_or(0, Tree::rss) as f64 / 1024.0;
        let invalid = invalid.map(|why| format!("  INVALID: {why}")).unwrap_or_default();
        println!(
            "{:<14} {prompt:>6} {connections:>5} {rate:>9.0} {cpu:>10.1} {p50:>9.0} {p99:>9.0} {rss:>8.1}{invalid}",
            stand.participant.name()
        );
    }
    row
}

async fn streams(stand: &Stand, options: &Options) {
    for prompt in PROMPTS {
        // Memory is looked at in the middle of the streams' life; connections of earlier phases have been closed by then.
        let before = stand.tree.as_ref().map_or(0, Tree::rss);
        let middle = async {
            tokio::time::sleep(INTERVAL * EVENTS / 2).await;
            stand.tree.as_ref().map_or(0, Tree::rss)
        };
        let mut rss = before;
        let load = async {
            let (outcome, seen) = tokio::join!(driver::streams(stand.port, prompt, options.streams), middle);
            rss = seen;
            outcome
        };
        let measured = stand.measure(load).await;
        let outcome = &measured.outcome;
        let events = outcome.times.len() as f64;
        println!(
            "{:<14} {:>7} {:>12.2} {:>12.1} {:>9.0} {:>9.0}  prompt {prompt}{}",
            stand.participant.name(),
            options.streams,
            micros(measured.cpu) / events,
            rss.saturating_sub(before) as f64 / options.streams as f64,
            outcome.quantile(0.5),
            outcome.quantile(0.99),
            measured
                .invalid
                .map(|why| format!("  INVALID: {why}"))
                .unwrap_or_default()
        );
    }
}

/// The goals, as ratios to the peers of the same run.
fn ratios(rows: &[(Participant, Row)]) {
    let of = |participant| rows.iter().find(|(other, _)| *other == participant).map(|(_, row)| row);
    let Some(xpyd) = of(Participant::Xpyd) else { return };
    println!();
    for (index, connections) in CONNECTIONS.iter().enumerate() {
        let ratio = |peer: Option<&Row>, factor: f64| {
            peer.map_or("n/a".to_owned(), |peer| {
                format!("{:.2}", xpyd.cpu[index] / (peer.cpu[index] * factor))
            })
        };
        println!(
            "{connections:>3} connections: CPU is {} of vllm-router's (goal 0.25), {} of two nginx hops' (goal 1.50)",
            ratio(of(Participant::VllmRouter), 1.0),
            ratio(of(Participant::Nginx), 2.0)
        );
    }
    if let Some(peer) = of(Participant::VllmRouter) {
        println!(
            "  1 connection: added p50 is {:.2} of vllm-router's (goal 0.33)",
            xpyd.p50[0] / peer.p50[0]
        );
    }
}
