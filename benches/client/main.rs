//! `cargo bench --bench client`: how accurate benchmark clients are, and how much CPU they use per event.
//!
//! `-- --only xpyd --rates 20,50,100,500 --seconds 6`. Everything is on loopback. README.md explains the results.
//! `cargo test` makes a small run.

#![expect(clippy::print_stdout, reason = "a table is all it is for")]

mod check;
mod ground_truth;
#[path = "../common/listing.rs"]
mod listing;
mod participants;
mod server;
mod table;
#[path = "../common/tree.rs"]
mod tree;

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use ground_truth::{ClientResult, Comparison, Counts, GroundTruth};
use participants::{Load, Participant};
use server::Pace;
use table::{ClientRow, ClientTable};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep};
use tree::{Tree, free_port, is_running, serves};

/// The argument that Cargo passes to benches and not to tests.
const BENCH: &str = "--bench";

/// The argument that starts this program as the server.
const SERVE: &str = "--serve";

/// Time limit for the first request. Python needs half a minute to start on a busy machine.
const START: Duration = Duration::from_mins(3);

/// Interval of progress queries to the server.
const LOOK: Duration = Duration::from_millis(100);

struct Options {
    only: Vec<String>,
    rates: Vec<f64>,
    seconds: f64,
    tokens: u32,
    pace: Pace,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            only: Vec::new(),
            rates: vec![20.0, 50.0, 100.0, 500.0, 1000.0, 2000.0],
            seconds: 6.0,
            tokens: 128,
            pace: Pace {
                first: Duration::from_millis(100),
                next: Duration::from_millis(20),
            },
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
                "--rates" => {
                    let rates = value();
                    let rates = rates
                        .split(',')
                        .map(|rate| rate.parse().expect("--rates takes numbers"));
                    options.rates = rates.collect();
                }
                BENCH => {}
                other => panic!("`{other}` is no option"),
            }
        }
        options
    }

    fn chose(&self, participant: Participant) -> bool {
        self.only.is_empty()
            || self
                .only
                .iter()
                .any(|name| participant.name().starts_with(name.as_str()))
    }
}

/// The server, in a process of its own.
struct Server {
    port: u16,
    _tree: Tree,
}

impl Server {
    async fn start(folder: &Path, pace: Pace) -> Result<Self, String> {
        let port = free_port().map_err(|error| error.to_string())?;
        let mut command = Command::new(std::env::current_exe().map_err(|error| error.to_string())?);
        let micros = |time: Duration| time.as_micros().to_string();
        command.args([SERVE, &port.to_string(), &micros(pace.first), &micros(pace.next)]);
        let tree = Tree::start(command, &folder.join("server.log")).map_err(|error| error.to_string())?;
        if !serves(port).await {
            return Err("the server does not serve".to_owned());
        }
        Ok(Self { port, _tree: tree })
    }

    async fn ask<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T, String> {
        let url = format!("http://127.0.0.1:{}{path}", self.port);
        let answer = reqwest::get(url).await.map_err(|error| error.to_string())?;
        answer.json().await.map_err(|error| error.to_string())
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [serve, port, first, next] = &words[..]
        && serve == SERVE
    {
        let micros = |word: &String| Duration::from_micros(word.parse().expect("microseconds"));
        let pace = Pace {
            first: micros(first),
            next: micros(next),
        };
        let ended = server::serve(port.parse().expect("a port"), pace);
        println!("{ended:?}");
        return ExitCode::FAILURE;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
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
                if table.is_valid() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
            }
            _ = terminated.recv() => ExitCode::FAILURE,
            _ = tokio::signal::ctrl_c() => ExitCode::FAILURE,
        }
    })
}

/// Measures all participants under every load and prints each row when it is ready.
async fn measure_all(options: &Options) -> ClientTable {
    let folder = tempfile::tempdir().expect("a folder");
    let mut table = ClientTable::default();
    let server = match Server::start(folder.path(), options.pace).await {
        Ok(server) => server,
        Err(reason) => {
            table.add_failed(&reason);
            return table;
        }
    };
    println!(
        "true: as the server wrote it, {:.0} ms to the first token and {:.0} ms between two; load average {}",
        options.pace.first.as_secs_f64() * 1e3,
        options.pace.next.as_secs_f64() * 1e3,
        fs::read_to_string("/proc/loadavg")
            .unwrap_or_default()
            .split(' ')
            .next()
            .unwrap_or_default(),
    );
    ClientTable::print_head();
    for participant in Participant::ALL
        .into_iter()
        .filter(|participant| options.chose(*participant))
    {
        for &rate in &options.rates {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a number of requests"
            )]
            let load = Load {
                rate,
                requests: (rate * options.seconds).max(1.0) as usize,
                tokens: options.tokens,
            };
            let command = participant.command(load, server.port, &folder.path().join("result.json"));
            let command = match command {
                Ok(command) => command,
                Err(reason) => {
                    println!("{:<12} {reason}", participant.name());
                    break;
                }
            };
            match measure(&server, participant, load, command, folder.path()).await {
                Ok(row) => table.add(row),
                Err(reason) => table.add_failed(&format!("{} at {rate} req/s: {reason}", participant.name())),
            }
        }
    }
    table
}

/// One client under one load.
async fn measure(
    server: &Server,
    participant: Participant,
    load: Load,
    command: Command,
    folder: &Path,
) -> Result<ClientRow, String> {
    server.ask::<GroundTruth>("/truth").await?;
    let before: Counts = server.ask("/counts").await?;
    let log = folder.join("client.log");
    let client = Tree::start(command, &log).map_err(|error| error.to_string())?;
    let begun = Instant::now();
    let counts = async || -> Result<Counts, String> {
        let now: Counts = server.ask("/counts").await?;
        Ok(Counts {
            requests: now.requests - before.requests,
            events: now.events - before.events,
        })
    };
    // Work before the first request does not count.
    while counts().await?.requests == 0 {
        if begun.elapsed() > START || !is_running(client.root()) {
            return Err(format!("it sent nothing: {}", last_line(&log)));
        }
        sleep(LOOK).await;
    }
    let (first, cpu) = (Instant::now(), client.cpu());
    let seen = counts().await?;
    let all = load.requests as u64 * u64::from(load.tokens);
    let mut now = seen;
    while now.events < all && is_running(client.root()) {
        sleep(LOOK).await;
        now = counts().await?;
    }
    let (cpu, wall, rss) = (client.cpu().saturating_sub(cpu), first.elapsed(), client.rss());
    while is_running(client.root()) {
        if first.elapsed() > wall + START {
            return Err("it does not end".to_owned());
        }
        sleep(LOOK).await;
    }
    let ground_truth: GroundTruth = server.ask("/truth").await?;
    let result = fs::read(folder.join("result.json")).map_err(|_| last_line(&log))?;
    fs::remove_file(folder.join("result.json")).map_err(|error| error.to_string())?;
    let result: ClientResult = serde_json::from_slice(&result).map_err(|error| error.to_string())?;
    let compared = Comparison::new(&ground_truth, &result)?;
    let events = (now.events - seen.events) as f64;
    Ok(ClientRow {
        participant,
        rate: load.rate,
        events: events / wall.as_secs_f64(),
        cpu: cpu.as_secs_f64() * 1e6 / events,
        cores: cpu.as_secs_f64() / wall.as_secs_f64(),
        rss: rss as f64 / 1024.0,
        compared,
    })
}

/// The last output of a client.
fn last_line(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    text.lines().next_back().unwrap_or_default().to_owned()
}
