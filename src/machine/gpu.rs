//! GPUs, as NVML reports them. The library is loaded at run time, so a machine without it is a fact and not a crash. A
//! call that fails leaves its fact out.

mod holders;
mod meter;
mod nvml;
mod release;
mod visible;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use holders::{GpuProcess, LocalProcess};
pub use meter::{Meter, Usage};
pub use release::{Baseline, Release};

/// The GPUs of this machine, within an inherited `CUDA_VISIBLE_DEVICES`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gpus {
    /// NVML was not asked, because the plan needs no GPU.
    NotAsked,
    /// The GPUs that xpyd can use, in NVML's (PCI) order or that of the inherited list.
    Found(Vec<Gpu>),
    /// There is no usable GPU, with the reason.
    Unavailable(String),
}

impl Gpus {
    /// The usable GPUs; empty if there are none.
    pub fn found(&self) -> &[Gpu] {
        match self {
            Self::Found(gpus) => gpus,
            Self::NotAsked | Self::Unavailable(_) => &[],
        }
    }

    /// The GPU with this index.
    pub fn get(&self, index: u32) -> Option<&Gpu> {
        self.found().iter().find(|gpu| gpu.index == index)
    }
}

/// One GPU, or one MIG slice of a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Gpu {
    /// NVML's index, which is CUDA's with `CUDA_DEVICE_ORDER=PCI_BUS_ID`. For a MIG slice, [`slice_number`].
    pub index: u32,
    /// The other node of the Slurm allocation that has it; `None` for this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<GpuNode>,
    /// Product name.
    pub name: String,
    /// `GPU-…` or `MIG-…`, which CUDA accepts as well.
    pub uuid: String,
    /// For a MIG slice, the index of its GPU.
    pub parent: Option<u32>,
    /// Its memory, if NVML reports it.
    pub memory: Option<GpuMemory>,
    /// The processes that compute on it, with the memory they use. `None` if they cannot be listed.
    pub processes: Option<Vec<GpuProcess>>,
    /// The NUMA node of the closest CPUs.
    pub numa_node: Option<u32>,
    /// The closest CPUs, in the kernel's list format: `0-27,56-83`.
    pub cpus: Option<String>,
    /// The PCI address: `00000000:3B:00.0`.
    pub bus_id: Option<String>,
    /// The connection to each other GPU, by index.
    pub paths: BTreeMap<u32, Path>,
    /// Faults that NVML reports.
    pub health: GpuHealth,
}

/// The place of a GPU on another node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuNode {
    /// The node's name.
    pub name: String,
    /// The GPU's index there.
    pub index: u32,
}

/// Memory of a GPU, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GpuMemory {
    /// Total memory.
    pub total: u64,
    /// Free memory.
    pub free: u64,
    /// Allocated memory: total minus free, minus what the driver reserves.
    pub used: u64,
}

/// Faults that NVML reports. XID errors themselves are only in the kernel's log, but the lasting ones show here.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GpuHealth {
    /// Why NVML cannot reach the GPU: it fell off the bus (XID 79), needs a reset (XID 95, 119, …), or this user has no
    /// permission.
    pub unreachable: Option<String>,
    /// Uncorrectable memory errors since the driver was loaded (XID 48, 94, 95).
    pub uncorrected_errors: Option<u64>,
    /// Memory rows (Ampere and later) or pages (before) that are replaced at the next reset (XID 63).
    pub repair_pending: Option<bool>,
    /// A memory row could not be replaced (XID 64).
    pub repair_failed: Option<bool>,
}

impl GpuHealth {
    /// Whether no engine should be started on it.
    pub fn is_broken(&self) -> bool {
        self.unreachable.is_some() || self.repair_failed == Some(true)
    }
}

/// The connection between two GPUs, the best first. The comments name the terms of `nvidia-smi topo`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Path {
    /// The same GPU.
    Same,
    /// `NVLink`, directly or through an `NVSwitch` (`NV#`).
    NvLink,
    /// Only PCIe switches (`PIX`, `PXB`).
    Switch,
    /// Within a NUMA node (`PHB`, `NODE`).
    Numa,
    /// The link between CPU sockets (`SYS`).
    System,
    /// The network between two nodes.
    Network,
    /// NVML does not report it.
    Unknown,
}

impl Path {
    /// The name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Same => "the same GPU",
            Self::NvLink => "NVLink",
            Self::Switch => "a PCIe switch",
            Self::Numa => "one NUMA node",
            Self::System => "two NUMA nodes",
            Self::Network => "the network",
            Self::Unknown => "an unknown connection",
        }
    }
}

/// The NVIDIA driver.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GpuDriver {
    /// Its version: `570.86.15`.
    pub version: Option<String>,
    /// The newest CUDA version that it supports: `12.8`.
    pub cuda: Option<String>,
    /// `CUDA_VISIBLE_DEVICES` of xpyd itself, which hides GPUs that the driver has.
    pub visible: Option<String>,
}

impl GpuDriver {
    /// The known versions, such as `driver 570.86.15` and `CUDA 12.8`.
    pub fn versions(&self) -> Vec<String> {
        let both = [("driver", &self.version), ("CUDA", &self.cuda)];
        let known = both
            .into_iter()
            .filter_map(|(what, version)| Some(format!("{what} {}", version.as_ref()?)));
        known.collect()
    }
}

impl Gpu {
    /// The connection to another GPU.
    pub fn path(&self, other: u32) -> Path {
        if self.index == other {
            return Path::Same;
        }
        self.paths.get(&other).copied().unwrap_or(Path::Unknown)
    }

    /// The other node that has it; `None` for this one.
    pub fn node_name(&self) -> Option<&str> {
        self.node.as_ref().map(|node| node.name.as_str())
    }

    /// The name for people: `GPU 3`, `GPU 3 slice 1`.
    pub fn label(&self) -> String {
        match self.parent {
            Some(parent) => format!(
                "GPU {parent} slice {}",
                self.index.saturating_sub(slice_number(parent, 0))
            ),
            None => match &self.node {
                Some(node) => format!("GPU {} ({} of {})", self.index, node.index, node.name),
                None => format!("GPU {}", self.index),
            },
        }
    }
}

/// The index of MIG slice `slice` of the GPU `parent` in plans and profiles: 1000, 1001, … for the slices of GPU 0, 1010,
/// … for those of GPU 1. A GPU has at most seven slices, and a machine far fewer than a thousand GPUs.
pub fn slice_number(parent: u32, slice: u32) -> u32 {
    1000 + 10 * parent + slice
}

/// Loads NVML. The error is a sentence.
pub(super) fn open() -> Result<nvml_wrapper::Nvml, String> {
    nvml::open()
}

/// Queries NVML for all facts.
pub(super) fn survey() -> (Gpus, GpuDriver) {
    let library = match nvml::open() {
        Ok(library) => library,
        Err(reason) => return (Gpus::Unavailable(reason), GpuDriver::default()),
    };
    let driver = GpuDriver {
        visible: visible_devices(),
        ..nvml::driver(&library)
    };
    match usable(&library) {
        Ok(gpus) => (Gpus::Found(gpus), driver),
        Err(error) => (Gpus::Unavailable(format!("NVML failed: {error}")), driver),
    }
}

/// The GPUs within an inherited `CUDA_VISIBLE_DEVICES`.
pub(super) fn usable(library: &nvml_wrapper::Nvml) -> Result<Vec<Gpu>, nvml_wrapper::error::NvmlError> {
    let gpus = nvml::list(library)?;
    Ok(match visible_devices() {
        Some(visible) => visible::within(&gpus, &visible),
        None => gpus,
    })
}

fn visible_devices() -> Option<String> {
    std::env::var("CUDA_VISIBLE_DEVICES").ok()
}
