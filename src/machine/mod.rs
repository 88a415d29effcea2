//! Facts about this machine. Only this module asks NVML and Python.

mod expand;
#[cfg(test)]
mod fixture;
mod gpu;
mod host;
pub mod huggingface;
mod model;
mod processors;
mod software;
mod system;
mod watch;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::thread;

pub use gpu::{
    Baseline, Driver, Gpu, GpuMemory, GpuProcess, Gpus, Health, LocalProcess, Meter, Path as GpuPath, Release, Usage,
    slice_number,
};
pub use host::Host;
pub use huggingface::{HuggingFace, Token, TokenSource};
pub use model::{KvShape, ModelSize};
pub use processors::Processors;
pub use software::{Engine, Environment, Version};
pub use system::{Limit, Listener, Pcie, Space, System};
pub use watch::{GpuReading, GpuTotals, GpuWatch};

/// Everything the plan and the checks know about this machine.
#[derive(Debug, Clone)]
pub struct Machine {
    /// The GPUs that xpyd may use, or why none can be seen.
    pub gpus: Gpus,
    /// Their driver.
    pub driver: Driver,
    /// Token and cache.
    pub hugging_face: HuggingFace,
    /// How large the model is, if it is here and engines want GPUs for it.
    pub model: Option<ModelSize>,
    /// The installed engine, if the profile's program was found.
    pub engine: Engine,
    /// Cores that this process may run on.
    pub cores: usize,
    /// Memory that could be given to new processes, in bytes.
    pub available_memory_bytes: u64,
    /// Limits, shared memory, ports, clock.
    pub system: System,
    /// vLLM's variables in xpyd's own environment, which engines inherit; no key is among them.
    pub inherited: BTreeMap<String, String>,
    /// Whether processes can be bound to a NUMA node: there is more than one, and `numactl`, which vLLM does it with.
    pub binds_numa: bool,
    /// This very program, for the simulated engine.
    pub xpyd: PathBuf,
}

/// What to look for.
#[derive(Debug)]
pub struct Wanted<'profile> {
    /// The model, a path or a Hugging Face repository; `None` when none is to be served.
    pub model: Option<&'profile str>,
    /// Whether the hub is asked whose the token is, even if nothing is to be fetched.
    pub asks_for_account: bool,
    /// Branch, tag or commit of the model.
    pub revision: &'profile str,
    /// Variables that the profile gives all engines.
    pub env: &'profile BTreeMap<String, String>,
    /// The engine's program, a name on PATH or a path; `None` when the simulated engine runs.
    pub program: Option<&'profile str>,
    /// Whether GPUs are needed.
    pub gpus: bool,
}

/// Of a profile without variables.
static NO_VARIABLES: BTreeMap<String, String> = BTreeMap::new();

impl Wanted<'_> {
    /// What every machine has, and no more: no model, no engine, no GPU.
    pub fn nothing() -> Self {
        Self {
            model: None,
            asks_for_account: false,
            revision: huggingface::MAIN,
            env: &NO_VARIABLES,
            program: None,
            gpus: false,
        }
    }
}

/// Looks at the machine, in well under a second, or in three where the hub has to be asked and does not answer. Imports
/// nothing heavy and changes nothing. What takes a while is looked at side by side.
pub fn survey(wanted: &Wanted<'_>) -> Machine {
    let memory = sysinfo::System::new_with_specifics(
        sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram()),
    );
    let settings = huggingface::Settings::read(wanted.env);
    let (hugging_face, engine, system, (gpus, driver)) = thread::scope(|scope| {
        let hugging_face = scope.spawn(|| huggingface::survey(wanted, &settings));
        let engine = scope.spawn(|| {
            let found = |program| software::survey(program, wanted.env);
            wanted.program.map_or(Engine::NotAsked, found)
        });
        let system = scope.spawn(system::survey);
        let gpus = if wanted.gpus {
            gpu::survey()
        } else {
            (Gpus::NotAsked, Driver::default())
        };
        (joined(hugging_face), joined(engine), joined(system), gpus)
    });
    let folder = hugging_face.model.folder.as_deref().filter(|_| wanted.gpus);
    Machine {
        binds_numa: wanted.gpus && binds_numa(&gpus),
        gpus,
        driver,
        model: folder.and_then(model::survey),
        hugging_face,
        engine,
        cores: thread::available_parallelism().map_or(1, std::num::NonZero::get),
        available_memory_bytes: memory.map_or(0, |memory| memory.available_memory()),
        system,
        inherited: inherited(),
        xpyd: std::env::current_exe().unwrap_or_else(|_| Path::new("xpyd").to_owned()),
    }
}

fn inherited() -> BTreeMap<String, String> {
    let text =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    text.filter(|(name, _)| name.starts_with("VLLM_") && !name.ends_with("KEY"))
        .collect()
}

/// The version of the vLLM that this program starts, if its metadata can be read.
pub fn vllm_version(program: &str) -> Option<String> {
    match software::survey(program, &BTreeMap::new()) {
        Engine::Found { vllm, .. } => vllm.map(|version| version.text),
        Engine::Missing(_) | Engine::NotAsked => None,
    }
}

/// What a thread found; its panic is this thread's.
fn joined<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn binds_numa(gpus: &Gpus) -> bool {
    let mut nodes: Vec<u32> = gpus.found().iter().filter_map(|gpu| gpu.numa_node).collect();
    nodes.sort_unstable();
    nodes.dedup();
    let has_several = nodes.len() > 1 || Path::new("/sys/devices/system/node/node1").is_dir();
    has_several && software::find("numactl", None).is_some()
}
