//! The supervisor, its shim, and engines that restart, are added, drained, or outlive it.

#![expect(clippy::unwrap_used, reason = "a failed helper must fail its test")]

mod detach_attach;
mod engine_access;
mod fleet;
mod kv_blame;
mod lmcache_mp;
mod nodes;
mod ports;
mod processes;
mod restart;
mod scale;
mod shim;
