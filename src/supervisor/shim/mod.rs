//! The shim: a second process of xpyd that is the only parent of the engines, and outlives xpyd by just long enough
//! to take them down. Between the two stands a monitor that does nothing but outlive both.
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
//! | monitor | nobody has to: the engines serve on, and xpyd takes its part, because it is the next subreaper above |
//! | monitor and shim | xpyd; where it attached, and is no ancestor, it finds them by their mark |
//! | all three in the same instant | the kernel kills the leaders; what they started is left to itself |
//!
//! A killed monitor is not replaced: a process inherits what it is an ancestor of, and nobody can become an ancestor of a
//! shim that runs. Should xpyd and shim then be killed at once, `xpyd doctor --reap` finds what is left.
//!
//! It knows nothing of roles, probes, proxies or policy: it starts process trees, keeps what they print, ends them, and
//! says what happened. Everything that decides is on the other side of the socket.

pub mod attach;
mod cgroup;
mod channel;
pub mod client;
mod engine;
mod keep;
mod log;
mod monitor;
pub mod orphans;
pub mod process;
pub mod protocol;
mod shm;
mod sweep;
pub(super) mod tree;

/// The folder in which engines could get cgroups of their own; `None` where this user may make none.
pub fn cgroup_folder() -> Option<std::path::PathBuf> {
    cgroup::delegated()
}
