//! The control of a run: its runtime folder, and HTTP over the Unix socket in it.
//!
//! It knows only the fleet's vocabulary; the app gives it the status and carries out its requests. A run exists exactly as long as
//! its lock or its abstract socket is held, so nothing here trusts a process id or a file alone.

pub mod api;
pub mod client;
mod find;
mod run;
pub mod rundir;
pub mod server;
