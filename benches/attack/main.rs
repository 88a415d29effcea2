//! `cargo bench --bench attack -- growth|storm|fuzz|load|soak`: attacks on xpyd, each with a table at its end.
//!
//! README.md describes the tools and their options. `cargo test` runs each of them in a small form.

#![expect(clippy::print_stdout, reason = "a table is all it is for")]
#![expect(
    clippy::format_collect,
    clippy::format_push_string,
    reason = "hostile text is made once, and is easiest to read so"
)]

mod aftermath;
mod answers;
mod check;
mod client;
mod commands;
mod engine;
mod faults;
mod fleet;
mod fuzz;
mod growth;
mod http;
mod inputs;
#[path = "../common/listing.rs"]
mod listing;
mod load;
mod options;
mod outcomes;
mod packets;
mod private;
mod proxy_fixture;
mod shapes;
mod soak;
mod storm;
#[expect(dead_code, reason = "other benches need more of it")]
#[path = "../common/tree.rs"]
mod tree;
mod usage;

use std::process::ExitCode;
use std::time::Duration;

use engine::ENGINE;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use options::{BENCH, Options, Tool};
use tokio::signal::unix::{SignalKind, signal};

/// The findings of a tool, one per line. Empty means that xpyd withstood the attack.
type Findings = Vec<String>;

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    raise_descriptor_limit();
    if let [engine, port, events, interval] = &words[..]
        && engine == ENGINE
    {
        let interval = Duration::from_millis(interval.parse().expect("milliseconds"));
        let served = engine::serve(
            port.parse().expect("a port"),
            events.parse().expect("a number"),
            interval,
        )
        .await;
        println!("{served:?}");
        return ExitCode::FAILURE;
    }
    if !words.iter().any(|word| word == BENCH) {
        if !listing::printed(&words) {
            check::all().await;
        }
        return ExitCode::SUCCESS;
    }
    let options = match Options::read(words.into_iter()) {
        Ok(options) => options,
        Err(reason) => {
            println!("{reason}\n\n{}", options::USAGE);
            return ExitCode::from(2);
        }
    };
    let mut terminated = signal(SignalKind::terminate()).expect("signals");
    // Dropping the tool stops everything that it started.
    let findings = tokio::select! {
        findings = run(&options) => findings,
        _ = terminated.recv() => vec!["ended by SIGTERM".to_owned()],
        _ = tokio::signal::ctrl_c() => vec!["ended by Ctrl+C".to_owned()],
    };
    for finding in &findings {
        println!("FOUND: {finding}");
    }
    if findings.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

async fn run(options: &Options) -> Findings {
    match options.tool {
        Tool::Growth => growth::run(options).await,
        Tool::Storm => storm::run(options).await,
        Tool::Fuzz => fuzz::run(options).await,
        Tool::Load => load::run(options).await,
        Tool::Soak => soak::run(options).await,
    }
}

/// Thousands of connections need more descriptors than the usual soft limit of 1024. Child processes inherit the limit.
fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // If this fails, the attack reaches the soft limit and reports that.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
