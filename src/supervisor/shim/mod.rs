//! The shim: a second process of xpyd and the only parent of the engines. It outlives xpyd, to end the engines or to keep them
//! for the next xpyd. Between the two a monitor waits, which outlives both.
//!
//! ```text
//! xpyd ── monitor ── shim ──┬── prefiller1 (own session) ── EngineCore, workers ...
//!   └──── socketpair ────┘      ├── decoder1   (own session) ── ...
//!   commands ──>  <── events    └── <whatever they lost>      (it is their subreaper)
//! ```
//!
//! | killed | who ends the rest |
//! |---|---|
//! | xpyd, or xpyd and monitor | the shim, which reads the end of its socket: engines that served get a bounded grace; or it keeps them for the next xpyd, as long as it was told to |
//! | shim, or xpyd and shim | the kernel kills the leaders (PDEATHSIG), the monitor what they started |
//! | monitor | nothing ends: the engines keep serving, and xpyd replaces it, because it is the next subreaper above |
//! | monitor and shim | xpyd; after an attach it is no ancestor, and finds them by their mark |
//! | all three at the same instant | the kernel kills the leaders; processes that they started keep running |
//!
//! A killed monitor is not started again: only an ancestor inherits orphans, and no process can become an ancestor of a running
//! shim. If xpyd and shim are then killed at once, `xpyd doctor --reap` finds what is left.
//!
//! The shim knows no roles, probes, proxies or policy: it starts process trees, writes their logs, ends them, and reports. All
//! decisions are made on the other side of the socket.

pub mod attach;
mod attach_socket;
mod cgroup;
mod channel;
pub mod client;
mod engine;
mod log;
mod monitor;
pub mod orphans;
pub mod process;
pub mod protocol;
mod shm;
mod sweep;
pub(super) mod tree;

/// The folder in which engines get cgroups; `None` if this user is not allowed to create any.
pub fn cgroup_folder() -> Option<std::path::PathBuf> {
    cgroup::delegated()
}
