//! xpyd serves LLMs with prefill and decode on different engines, on one machine or in a Slurm allocation. It launches and supervises the engines,
//! proxies the OpenAI API over them, and benchmarks them.
//!
//! The modules are in layer order: imports go down only. Those that are members of the workspace, below `crates`, appear here as
//! modules too. `tests/it/repository/tidy.rs` has the table of allowed imports, and ARCHITECTURE.md describes the parts.

// Composition root and commands.
pub mod app;
pub mod cli;

// Features. Siblings do not import each other.
pub mod control;
pub mod discovery;
pub mod logs;
pub mod preflight;
pub mod supervisor;
pub mod ui;
pub use xpyd_bench as bench;
pub use xpyd_proxy as proxy;
pub use xpyd_sim as sim;

// Domain.
pub mod engine;
pub mod machine;
pub mod plan;
pub mod profile;
pub mod slurm;
pub use xpyd_base::connector;

// Vocabulary.
pub use xpyd_base::{byte_size, fleet, private, proxy_config, report, signals, sockets, span};
pub(crate) use xpyd_base::{log_file, own_log, samples};
