//! Talking to a run: its runtime folder, and HTTP over the Unix socket in it.
//!
//! Knows the fleet's vocabulary only; what a status holds and what a stop does is given to it. A run is there exactly as
//! long as its lock is held, or its name by the kernel, so nothing here trusts a process id or a file alone.

pub mod api;
pub mod client;
mod find;
mod run;
pub mod rundir;
pub mod server;
