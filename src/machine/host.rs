//! What this machine is called and how large it is, for whoever compares what was measured on it.

use std::num::NonZero;
use std::thread;

use serde::Serialize;
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// A machine, in short.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Host {
    /// Its name in the network.
    pub name: Option<String>,
    /// Cores that this process may run on.
    pub cores: usize,
    /// Its memory, in bytes.
    pub memory_bytes: u64,
}

impl Host {
    /// This machine.
    pub fn here() -> Self {
        let memory = MemoryRefreshKind::nothing().with_ram();
        Self {
            name: System::host_name().ok(),
            cores: thread::available_parallelism().map_or(1, NonZero::get),
            memory_bytes: System::new_with_specifics(RefreshKind::nothing().with_memory(memory))
                .map_or(0, |system| system.total_memory()),
        }
    }
}
