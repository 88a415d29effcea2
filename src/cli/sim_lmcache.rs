//! `xpyd sim-lmcache`: runs one simulated cache server, with the arguments of `lmcache server`.

use clap::{Args, Subcommand};

use crate::report::{ExitStatus, Failure};
use crate::sim;

/// Arguments of `xpyd sim-lmcache`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    verb: LmcacheCommand,
}

#[derive(Debug, Subcommand)]
enum LmcacheCommand {
    /// Cache KV for one engine
    Server(ServerArguments),
}

/// The arguments of `lmcache server` that xpyd passes.
#[derive(Debug, Args)]
struct ServerArguments {
    /// Address for engines
    #[arg(long, default_value = "localhost")]
    host: String,
    /// Port for engines
    #[arg(long, default_value_t = 5555)]
    port: u16,
    /// Address of the HTTP server
    #[arg(long, default_value = "127.0.0.1")]
    http_host: String,
    /// Port of the HTTP server
    #[arg(long, default_value_t = 8080)]
    http_port: u16,
    /// Memory, in units of 2^30 bytes
    #[arg(long)]
    l1_size_gb: f64,
    /// The eviction policy of a full cache
    #[arg(long)]
    eviction_policy: EvictionPolicy,
    /// Tokens per chunk
    #[arg(long, default_value_t = 256)]
    chunk_size: usize,
    /// Accepted without effect
    #[arg(long)]
    instance_id: Option<String>,
    /// Accepted without effect
    #[arg(long)]
    supported_transfer_mode: Option<TransferMode>,
}

/// The policies of LMCache 0.5.6.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
#[value(rename_all = "verbatim")]
enum EvictionPolicy {
    #[value(name = "LRU")]
    Lru,
    #[value(name = "ARC")]
    Arc,
    #[value(name = "IsolatedLRU")]
    IsolatedLru,
    #[value(name = "noop")]
    Noop,
}

/// The side that moves KV between engine and server.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
enum TransferMode {
    LmcacheDriven,
    EngineDriven,
    Auto,
}

/// Serves until a signal.
pub(super) async fn run(arguments: Arguments) -> Result<ExitStatus, Failure> {
    let LmcacheCommand::Server(server) = arguments.verb;
    let server = sim::CacheServer {
        requests: (server.host, server.port),
        http: (server.http_host, server.http_port),
        l1_gibibytes: server.l1_size_gb,
        chunk_tokens: server.chunk_size,
    };
    // Its log has the reason; only the exit code is missing.
    Ok(server
        .run(sim::LogTarget::Stderr)
        .await
        .map_or(ExitStatus::Failure, |()| ExitStatus::Success))
}
