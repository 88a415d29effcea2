//! The vocabulary of xpyd: what more than one part of it speaks of.
//!
//! It knows no engine that runs, no profile and no plan. `tests/it/repository/tidy.rs` has the order of its modules.

pub mod byte_size;
pub mod connector;
pub mod fleet;
pub mod http1;
pub mod log_file;
pub mod own_log;
pub mod private;
pub mod proxy_config;
pub mod report;
pub mod samples;
pub mod signals;
pub mod sockets;
pub mod span;
pub mod web;
pub mod zmtp;
