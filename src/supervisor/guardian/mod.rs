//! The guardian: a second process of xpyd that is the only parent of the engines, and outlives xpyd by just long enough
//! to take them down.
//!
//! ```text
//! xpyd ──socketpair── xpyd guardian ──┬── prefiller1 (own session) ── EngineCore, workers ...
//!   commands ──>                      ├── decoder1   (own session) ── ...
//!   <── events                        └── <whatever they lost>      (it is their subreaper)
//! ```
//!
//! It knows nothing of roles, probes, proxies or policy: it starts process trees, keeps what they print, ends them, and
//! says what happened. Everything that decides is on the other side of the socket.

pub mod client;
mod engine;
mod log;
pub mod process;
pub mod protocol;
mod shm;
mod tree;
