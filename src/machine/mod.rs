//! Facts about this machine. Only this module queries NVML and Python.

mod expand;
#[cfg(test)]
mod fixture;
mod gpu;
mod host;
pub mod huggingface;
mod model;
mod nodes;
mod processors;
mod software;
mod system;
mod watch;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::thread;

pub use gpu::{
    Baseline, Gpu, GpuDriver, GpuHealth, GpuMemory, GpuNode, GpuProcess, Gpus, LocalProcess, Meter, Path as GpuPath,
    Release, Usage, slice_number,
};
pub use host::Host;
pub use huggingface::{HuggingFace, Token, TokenSource};
pub use model::{KvShape, ModelSize};
pub use nodes::{NodeFacts, NodeQuestion, Nodes, OtherNode, facts as node_facts, survey as survey_nodes};
pub use processors::Processors;
pub use software::{Installation, PythonEnvironment, Version};
pub use system::{FilesystemSpace, Limit, Listener, Pcie, System};
pub use watch::{GpuReading, GpuTotals, GpuWatch};

/// The facts about this machine for the plan and the checks.
#[derive(Debug, Clone)]
pub struct Machine {
    /// The GPUs that xpyd can use, or why there are none.
    pub gpus: Gpus,
    /// The GPU driver.
    pub driver: GpuDriver,
    /// Token, cache, and the hub's answers.
    pub hugging_face: HuggingFace,
    /// The size of the model, if it is on this machine and engines need GPUs for it.
    pub model: Option<ModelSize>,
    /// The installed engine, if the profile's program was found.
    pub engine: Installation,
    /// Number of cores that this process can use.
    pub cores: usize,
    /// Memory that is available to new processes, in bytes.
    pub available_memory_bytes: u64,
    /// Limits, shared memory, ports, clock.
    pub system: System,
    /// vLLM's variables in xpyd's own environment, which engines inherit, without keys.
    pub inherited: BTreeMap<String, String>,
    /// Whether processes can be bound to a NUMA node: the machine has more than one, and `numactl`, which vLLM uses.
    pub binds_numa: bool,
    /// The path of this program, for the simulated engine.
    pub xpyd: PathBuf,
    /// The nodes on which engines run.
    pub nodes: Nodes,
}

/// What to look for on the machine.
#[derive(Debug)]
pub struct SurveyRequest<'profile> {
    /// The model, a path or a Hugging Face repository; `None` without a model.
    pub model: Option<&'profile str>,
    /// Whether to ask the hub for the token's account even if nothing is to be downloaded.
    pub asks_for_account: bool,
    /// Branch, tag or commit of the model.
    pub revision: &'profile str,
    /// Variables that the profile gives all engines.
    pub env: &'profile BTreeMap<String, String>,
    /// The engine's program, a name on PATH or a path; `None` for the simulated engine.
    pub program: Option<&'profile str>,
    /// Whether GPUs are needed.
    pub gpus: bool,
}

/// The variables of a request without a profile.
static NO_VARIABLES: BTreeMap<String, String> = BTreeMap::new();

impl SurveyRequest<'_> {
    /// A request without model, engine and GPU.
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

/// Surveys the machine, with concurrent queries. It takes well under a second, or three seconds if the hub has to be asked
/// and does not answer. It imports no heavy package and changes nothing.
pub fn survey(wanted: &SurveyRequest<'_>) -> Machine {
    let memory = sysinfo::System::new_with_specifics(
        sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram()),
    );
    let settings = huggingface::Settings::read(wanted.env);
    let (hugging_face, engine, system, (gpus, driver)) = thread::scope(|scope| {
        let hugging_face = scope.spawn(|| huggingface::survey(wanted, &settings));
        let engine = scope.spawn(|| {
            let found = |program| software::survey(program, wanted.env);
            wanted.program.map_or(Installation::NotAsked, found)
        });
        let system = scope.spawn(system::survey);
        let gpus = if wanted.gpus {
            gpu::survey()
        } else {
            (Gpus::NotAsked, GpuDriver::default())
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
        nodes: Nodes::default(),
    }
}

fn inherited() -> BTreeMap<String, String> {
    let text =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    text.filter(|(name, _)| name.starts_with("VLLM_") && !name.ends_with("KEY"))
        .collect()
}

/// The version of the vLLM of this program, if its metadata can be read.
pub fn vllm_version(program: &str) -> Option<String> {
    let installed = software::survey(program, &BTreeMap::new());
    installed.vllm_version().map(str::to_owned)
}

/// The result of a thread. A panic in it continues here.
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
