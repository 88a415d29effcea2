//! Facts about this machine, gathered once before the plan is made. Only this module asks NVML, `/proc` and Python.

#[cfg(test)]
mod fixture;
mod gpu;
mod huggingface;
mod processors;
mod software;
mod watch;

use std::path::{Path, PathBuf};

pub use gpu::{Gpu, Gpus};
pub use huggingface::{HuggingFace, Token, TokenSource};
pub use processors::Processors;
pub use software::{Engine, Version};
pub use watch::{GpuReading, GpuTotals, GpuWatch};

/// Everything the plan and the checks know about this machine.
#[derive(Debug, Clone)]
pub struct Machine {
    /// The GPUs that xpyd may use, or why none can be seen.
    pub gpus: Gpus,
    /// Token and cache.
    pub hugging_face: HuggingFace,
    /// The installed engine, if the profile's program was found.
    pub engine: Engine,
    /// Cores that this process may run on.
    pub cores: usize,
    /// Memory that could be given to new processes, in bytes.
    pub available_memory_bytes: u64,
    /// This very program, for the simulated engine.
    pub xpyd: PathBuf,
}

/// What to look for.
#[derive(Debug)]
pub struct Wanted<'profile> {
    /// The model, a path or a Hugging Face repository.
    pub model: &'profile str,
    /// The engine's program, a name on PATH or a path; `None` when the simulated engine runs.
    pub program: Option<&'profile str>,
    /// Whether GPUs are needed.
    pub gpus: bool,
}

/// Looks at the machine. Takes well under a second; imports nothing heavy and changes nothing.
pub fn survey(wanted: &Wanted<'_>) -> Machine {
    let memory = sysinfo::System::new_with_specifics(
        sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram()),
    );
    Machine {
        gpus: if wanted.gpus { gpu::survey() } else { Gpus::NotAsked },
        hugging_face: huggingface::survey(wanted.model),
        engine: wanted.program.map_or(Engine::NotAsked, software::survey),
        cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        available_memory_bytes: memory.map_or(0, |memory| memory.available_memory()),
        xpyd: std::env::current_exe().unwrap_or_else(|_| Path::new("xpyd").to_owned()),
    }
}
