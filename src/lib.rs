//! xpyd runs prefill/decode-disaggregated LLM serving on one machine: it launches the engines, proxies the OpenAI API
//! over them, watches them, benches them and takes them down.
//!
//! The modules stand in layer order. Imports go down only; `tests/it/repository/tidy.rs` holds the table. ARCHITECTURE.md tells the
//! whole story.

// Composition root and commands.
pub mod app;
pub mod cli;

// Features. Siblings do not import each other.
pub mod bench;
pub mod control;
pub mod logs;
pub mod preflight;
pub mod proxy;
pub mod sim;
pub mod supervisor;
pub mod ui;

// Domain.
pub mod connector;
pub mod engine;
pub mod machine;
pub mod plan;
pub mod profile;

// Vocabulary.
pub mod fleet;
pub(crate) mod log_file;
pub(crate) mod own_log;
pub mod private;
pub mod report;
pub(crate) mod samples;
pub mod service;
pub mod signals;
pub mod sockets;
pub mod span;
pub(crate) mod wire;
pub(crate) mod zmtp;
