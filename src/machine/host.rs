//! Name and size of this machine, for comparisons of measurements.

use std::num::NonZero;
use std::thread;

use serde::Serialize;
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// A short description of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Host {
    /// Its host name.
    pub name: Option<String>,
    /// Number of cores that this process can use.
    pub cores: usize,
    /// Its memory, in bytes.
    pub memory_bytes: u64,
}

impl Host {
    /// The description of this machine.
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
