//! GPUs, as far as NVML tells. Its library is loaded at run time, so a machine without it is a fact and not a crash, and a
//! call that fails leaves its fact out.

mod holders;
mod meter;
mod nvml;
mod release;
mod visible;

use std::collections::BTreeMap;

use serde::Serialize;

pub use holders::{GpuProcess, LocalProcess};
pub use meter::{Meter, Usage};
pub use release::{Baseline, Release};

/// What NVML says, within an inherited `CUDA_VISIBLE_DEVICES`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gpus {
    /// The plan needs none.
    NotAsked,
    /// These may be used, in NVML's (PCI) order or that of the inherited list.
    Found(Vec<Gpu>),
    /// None can be seen, and why.
    Unavailable(String),
}

impl Gpus {
    /// Those that may be used; none where none can be seen.
    pub fn found(&self) -> &[Gpu] {
        match self {
            Self::Found(gpus) => gpus,
            Self::NotAsked | Self::Unavailable(_) => &[],
        }
    }

    /// The one of this number.
    pub fn get(&self, index: u32) -> Option<&Gpu> {
        self.found().iter().find(|gpu| gpu.index == index)
    }
}

/// One GPU, or one slice of a GPU that is divided by MIG.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Gpu {
    /// NVML's index, which is CUDA's with `CUDA_DEVICE_ORDER=PCI_BUS_ID`. Of a MIG slice, [`slice_number`].
    pub index: u32,
    /// Product name.
    pub name: String,
    /// `GPU-…` or `MIG-…`, by which CUDA takes it as well.
    pub uuid: String,
    /// Of a MIG slice, the index of the GPU that it is part of.
    pub parent: Option<u32>,
    /// Its memory.
    pub memory: Option<GpuMemory>,
    /// Processes that compute on it, with what they hold. `None` where they cannot be listed.
    pub processes: Option<Vec<GpuProcess>>,
    /// The NUMA node of the CPUs next to it.
    pub numa_node: Option<u32>,
    /// The CPUs next to it, as the kernel writes lists of them: `0-27,56-83`.
    pub cpus: Option<String>,
    /// Its place on the bus: `00000000:3B:00.0`.
    pub bus_id: Option<String>,
    /// How it is connected to the others, by their index.
    pub paths: BTreeMap<u32, Path>,
    /// What is wrong with it, or may be.
    pub health: Health,
}

/// Memory of a GPU, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct GpuMemory {
    /// All of it.
    pub total: u64,
    /// Not in use.
    pub free: u64,
    /// Allocated; total less free, and less what the driver keeps for itself.
    pub used: u64,
}

/// What NVML knows of a GPU's faults. XID errors themselves are in the kernel's log only, but the lasting ones leave these.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Health {
    /// Why NVML cannot reach it: it fell off the bus (XID 79), needs a reset (XID 95, 119, …), or this user may not use it.
    pub unreachable: Option<String>,
    /// Memory errors that could not be corrected since the driver was loaded (XID 48, 94, 95).
    pub uncorrected_errors: Option<u64>,
    /// Rows of memory (Ampere and later) or pages (before) wait for a reset to be replaced (XID 63).
    pub repair_pending: Option<bool>,
    /// A row of memory could not be replaced (XID 64).
    pub repair_failed: Option<bool>,
}

impl Health {
    /// Whether nothing should be started on it.
    pub fn is_broken(&self) -> bool {
        self.unreachable.is_some() || self.repair_failed == Some(true)
    }
}

/// The way between two GPUs, the best first. The names of `nvidia-smi topo` stand behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Path {
    /// They are the same one.
    Same,
    /// `NVLink`, directly or through an `NVSwitch` (`NV#`).
    NvLink,
    /// Only switches of the bus (`PIX`, `PXB`).
    Switch,
    /// The same NUMA node (`PHB`, `NODE`).
    Numa,
    /// The link between processors (`SYS`).
    System,
    /// NVML does not tell.
    Unknown,
}

impl Path {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Same => "the same GPU",
            Self::NvLink => "NVLink",
            Self::Switch => "a PCIe switch",
            Self::Numa => "one NUMA node",
            Self::System => "two NUMA nodes",
            Self::Unknown => "a way that NVML does not tell",
        }
    }
}

/// The driver of NVIDIA's GPUs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Driver {
    /// `570.86.15`.
    pub version: Option<String>,
    /// The newest CUDA that it can run, `12.8`.
    pub cuda: Option<String>,
    /// `CUDA_VISIBLE_DEVICES` of xpyd itself, which hides GPUs that the driver has.
    pub visible: Option<String>,
}

impl Driver {
    /// What is known of it, as in `driver 570.86.15` and `CUDA 12.8`.
    pub fn versions(&self) -> Vec<String> {
        let both = [("driver", &self.version), ("CUDA", &self.cuda)];
        let known = both
            .into_iter()
            .filter_map(|(what, version)| Some(format!("{what} {}", version.as_ref()?)));
        known.collect()
    }
}

impl Gpu {
    /// The way to another one.
    pub fn path(&self, other: u32) -> Path {
        if self.index == other {
            return Path::Same;
        }
        self.paths.get(&other).copied().unwrap_or(Path::Unknown)
    }

    /// How people call it: `GPU 3`, `GPU 3 slice 1`.
    pub fn label(&self) -> String {
        match self.parent {
            Some(parent) => format!(
                "GPU {parent} slice {}",
                self.index.saturating_sub(slice_number(parent, 0))
            ),
            None => format!("GPU {}", self.index),
        }
    }
}

/// The number by which plans and profiles call slice `slice` of the GPU `parent`: 1000, 1001, … for the slices of GPU 0,
/// 1010, … for those of GPU 1. A GPU has seven slices at most, and a machine has far fewer than a thousand GPUs.
pub fn slice_number(parent: u32, slice: u32) -> u32 {
    1000 + 10 * parent + slice
}

/// Loads NVML; the error is a sentence.
pub(super) fn open() -> Result<nvml_wrapper::Nvml, String> {
    nvml::open()
}

/// Asks NVML for everything.
pub(super) fn survey() -> (Gpus, Driver) {
    let library = match nvml::open() {
        Ok(library) => library,
        Err(reason) => return (Gpus::Unavailable(reason), Driver::default()),
    };
    let driver = Driver {
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
