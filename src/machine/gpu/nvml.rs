//! Queries to NVML. A query that fails leaves its fact out, with a line in the debug log. Only a library that cannot list
//! its GPUs is an error.

use std::collections::BTreeMap;
use std::ffi::OsString;

use nvml_wrapper::enum_wrappers::device::{EccCounter, MemoryError, P2pCapabilitiesIndex, P2pStatus, TopologyLevel};
use nvml_wrapper::enums::device::{SampleValue, UsedGpuMemory};
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::sys_exports::field_id::{NVML_FI_DEV_REMAPPED_FAILURE, NVML_FI_DEV_REMAPPED_PENDING};
use nvml_wrapper::{Device, Nvml};

use super::holders::Lookup;
use super::{Gpu, GpuDriver, GpuHealth, GpuMemory, GpuProcess, Path, slice_number};

/// A variable with the absolute path of another library, for drivers in unusual places and for tests.
const LIBRARY_VARIABLE: &str = "XPYD_NVML";

/// Links of one GPU; NVML's own limit.
const MAX_LINKS: u32 = 18;

/// `NVML_AFFINITY_SCOPE_NODE`: the whole NUMA node, not only the closest part of the processor.
const NODE_SCOPE: u32 = 0;

/// Number of requested words, of 64 CPUs each.
const CPU_WORDS: usize = 16;

/// Loads and initialises the library.
pub(super) fn open() -> Result<Nvml, String> {
    let named = std::env::var_os(LIBRARY_VARIABLE).filter(|path| !path.is_empty());
    // The wrapper's default name needs the development package; every driver ships this one.
    let library = named.unwrap_or_else(|| OsString::from("libnvidia-ml.so.1"));
    match Nvml::builder().lib_path(&library).init() {
        Ok(nvml) => Ok(nvml),
        Err(NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound) => Err(format!(
            "no NVIDIA driver: the library {} cannot be loaded",
            library.display()
        )),
        Err(NvmlError::LibRmVersionMismatch) => Err(
            "the NVIDIA driver was updated, and its library does not match the kernel module: reboot, or reload the \
             modules"
                .to_owned(),
        ),
        Err(error) => Err(format!("NVML failed: {error}")),
    }
}

pub(super) fn driver(nvml: &Nvml) -> GpuDriver {
    let cuda = known("cuda version", nvml.sys_cuda_driver_version());
    GpuDriver {
        version: known("driver version", nvml.sys_driver_version()),
        cuda: cuda.map(|number| format!("{}.{}", number / 1000, number % 1000 / 10)),
        visible: None,
    }
}

/// The answer, if NVML has one.
fn known<T>(what: &str, answer: Result<T, NvmlError>) -> Option<T> {
    answer
        .inspect_err(|error| tracing::debug!(what, %error, "NVML does not report it"))
        .ok()
}

/// Every GPU. A GPU with MIG is replaced by its slices.
pub(super) fn list(nvml: &Nvml) -> Result<Vec<Gpu>, NvmlError> {
    let count = nvml.device_count()?;
    let devices: Vec<(u32, Result<Device<'_>, NvmlError>)> =
        (0..count).map(|index| (index, nvml.device_by_index(index))).collect();
    let links = links(nvml, &devices);
    let mut lookup = Lookup::default();
    let mut gpus: Vec<Gpu> = Vec::new();
    for (index, device) in &devices {
        let device = match device {
            Ok(device) => device,
            Err(error) => {
                gpus.push(unreachable(*index, error));
                continue;
            }
        };
        let whole = Gpu {
            numa_node: numa_node(device),
            cpus: known("cpus", device.cpu_affinity_within_scope(CPU_WORDS, NODE_SCOPE))
                .and_then(|mask| list_of(&mask)),
            bus_id: known("bus id", device.pci_info()).map(|place| place.bus_id),
            paths: links.get(index).cloned().unwrap_or_default(),
            health: health(device),
            ..about(*index, device, &mut lookup)
        };
        if known("mig mode", device.mig_mode()).is_some_and(|mode| mode.current == 1) {
            gpus.extend(slices(&whole, device, &mut lookup));
        } else {
            gpus.push(whole);
        }
    }
    connect_slices(&mut gpus);
    Ok(gpus)
}

/// A GPU of which only the index is known.
fn unreachable(index: u32, error: &NvmlError) -> Gpu {
    Gpu {
        index,
        name: "unknown".to_owned(),
        health: GpuHealth {
            unreachable: Some(error.to_string()),
            ..GpuHealth::default()
        },
        ..Gpu::default()
    }
}

/// The facts that slices have as well.
fn about(index: u32, device: &Device<'_>, lookup: &mut Lookup) -> Gpu {
    let uuid = device.uuid();
    let lost = match &uuid {
        Err(error @ (NvmlError::GpuLost | NvmlError::ResetRequired)) => Some(error.to_string()),
        _ => None,
    };
    Gpu {
        index,
        name: known("name", device.name()).unwrap_or_else(|| "unknown".to_owned()),
        uuid: known("uuid", uuid).unwrap_or_default(),
        memory: memory(device),
        processes: processes(device, lookup),
        health: GpuHealth {
            unreachable: lost,
            ..GpuHealth::default()
        },
        ..Gpu::default()
    }
}

pub(super) fn memory(device: &Device<'_>) -> Option<GpuMemory> {
    let memory = known("memory", device.memory_info())?;
    Some(GpuMemory {
        total: memory.total,
        free: memory.free,
        used: memory.used,
    })
}

/// The processes that compute on it, directly or through MPS.
pub(super) fn processes(device: &Device<'_>, lookup: &mut Lookup) -> Option<Vec<GpuProcess>> {
    let mut processes = known("processes", device.running_compute_processes())?;
    processes.extend(known("mps processes", device.mps_running_compute_processes()).unwrap_or_default());
    processes.sort_by_key(|process| process.pid);
    processes.dedup_by_key(|process| process.pid);
    let processes = processes.into_iter().map(|process| GpuProcess {
        pid: process.pid,
        bytes: match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        },
        local: lookup.process(process.pid),
    });
    Some(processes.collect())
}

/// The processes on every GPU or slice, by UUID, if they can be listed.
pub(super) fn processes_everywhere(nvml: &Nvml) -> Vec<(String, Vec<GpuProcess>)> {
    let mut lookup = Lookup::default();
    let count = known("count", nvml.device_count()).unwrap_or(0);
    let cards = (0..count).filter_map(|index| nvml.device_by_index(index).ok());
    let devices = cards.flat_map(|device| {
        let slices: Vec<Device<'_>> = slices_of(&device).into_iter().map(|(_, slice)| slice).collect();
        if slices.is_empty() { vec![device] } else { slices }
    });
    devices
        .filter_map(|device| Some((device.uuid().ok()?, processes(&device, &mut lookup)?)))
        .collect()
}

/// The slices of a GPU with MIG, by their number. The numbers can have gaps.
fn slices_of<'nvml>(device: &Device<'nvml>) -> Vec<(u32, Device<'nvml>)> {
    if known("mig mode", device.mig_mode()).is_none_or(|mode| mode.current != 1) {
        return Vec::new();
    }
    let most = known("mig device count", device.mig_device_count()).unwrap_or(0);
    let slices = (0..most).filter_map(|slice| Some((slice, device.mig_device_by_index(slice).ok()?)));
    slices.collect()
}

fn slices(whole: &Gpu, device: &Device<'_>, lookup: &mut Lookup) -> Vec<Gpu> {
    slices_of(device)
        .into_iter()
        .map(|(slice, device)| Gpu {
            parent: Some(whole.index),
            numa_node: whole.numa_node,
            cpus: whole.cpus.clone(),
            bus_id: whole.bus_id.clone(),
            health: whole.health.clone(),
            ..about(slice_number(whole.index, slice), &device, lookup)
        })
        .collect()
}

/// Slices communicate through the host, even with slices of the same GPU.
fn connect_slices(gpus: &mut [Gpu]) {
    let nodes: Vec<(u32, Option<u32>, Option<u32>)> =
        gpus.iter().map(|gpu| (gpu.index, gpu.parent, gpu.numa_node)).collect();
    for gpu in gpus {
        for (index, parent, node) in &nodes {
            if *index == gpu.index || (parent.is_none() && gpu.parent.is_none()) {
                continue;
            }
            let path = match (gpu.numa_node, node) {
                _ if gpu.parent.is_some() && gpu.parent == *parent => Path::Numa,
                (Some(own), Some(other)) if own == *other => Path::Numa,
                (Some(_), Some(_)) => Path::System,
                _ => Path::Unknown,
            };
            gpu.paths.insert(*index, path);
        }
    }
}

/// The NUMA node of the closest memory. `nvmlDeviceGetNumaNodeId` answers another question: the node that a GPU itself is.
fn numa_node(device: &Device<'_>) -> Option<u32> {
    let mask = known("numa node", device.memory_affinity(1, NODE_SCOPE))?;
    let mask = mask.first().copied().filter(|mask| mask.is_power_of_two())?;
    Some(mask.trailing_zeros())
}

fn health(device: &Device<'_>) -> GpuHealth {
    let remapped = known(
        "remapped rows",
        device.field_values_for(&[
            FieldId(NVML_FI_DEV_REMAPPED_PENDING),
            FieldId(NVML_FI_DEV_REMAPPED_FAILURE),
        ]),
    )
    .unwrap_or_default();
    let is_set = |position: usize| match remapped.get(position)?.as_ref().ok()?.value.as_ref().ok()? {
        SampleValue::U32(value) => Some(*value > 0),
        SampleValue::U64(value) => Some(*value > 0),
        SampleValue::I64(value) => Some(*value > 0),
        SampleValue::F64(_) => None,
    };
    let pages = || known("retired pages", device.are_pages_pending_retired());
    let errors = device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile);
    GpuHealth {
        unreachable: None,
        uncorrected_errors: known("ecc errors", errors),
        repair_pending: is_set(0).or_else(pages),
        repair_failed: is_set(1),
    }
}

/// The connections between every two GPUs.
fn links(nvml: &Nvml, devices: &[(u32, Result<Device<'_>, NvmlError>)]) -> BTreeMap<u32, BTreeMap<u32, Path>> {
    let devices: Vec<(u32, &Device<'_>)> = devices
        .iter()
        .filter_map(|(index, device)| Some((*index, device.as_ref().ok()?)))
        .collect();
    let mut links: BTreeMap<u32, BTreeMap<u32, Path>> = BTreeMap::new();
    for (position, (index, device)) in devices.iter().enumerate() {
        for (other_index, other) in &devices[position + 1..] {
            let path = path(device, other, || nvml.device_by_index(*other_index));
            links.entry(*index).or_default().insert(*other_index, path);
            links.entry(*other_index).or_default().insert(*index, path);
        }
    }
    links
}

/// The connection between two GPUs. The wrapper takes the other GPU by value, so `again` opens it once more.
fn path<'nvml>(
    device: &Device<'nvml>,
    other: &Device<'nvml>,
    again: impl FnOnce() -> Result<Device<'nvml>, NvmlError>,
) -> Path {
    let by_nvlink = match device.p2p_status(other, P2pCapabilitiesIndex::NvLink) {
        Ok(status) => status == P2pStatus::Ok,
        // Older drivers only report where each link ends.
        Err(_) => are_linked(device, other),
    };
    if by_nvlink {
        return Path::NvLink;
    }
    match known(
        "topology",
        again().and_then(|other| device.topology_common_ancestor(other)),
    ) {
        Some(TopologyLevel::Internal | TopologyLevel::Single | TopologyLevel::Multiple) => Path::Switch,
        Some(TopologyLevel::HostBridge | TopologyLevel::Node) => Path::Numa,
        Some(TopologyLevel::System) => Path::System,
        None => match (numa_node(device), numa_node(other)) {
            (Some(own), Some(others)) if own == others => Path::Numa,
            (Some(_), Some(_)) => Path::System,
            _ => Path::Unknown,
        },
    }
}

/// Whether a link of one GPU ends at the other.
fn are_linked(device: &Device<'_>, other: &Device<'_>) -> bool {
    let Ok(place) = other.pci_info() else { return false };
    (0..MAX_LINKS)
        .map(|link| device.link_wrapper_for(link))
        .filter(|link| link.is_active().is_ok_and(|active| active))
        .any(|link| link.remote_pci_info().is_ok_and(|remote| remote.bus_id == place.bus_id))
}

/// A mask of CPUs in the kernel's list format: `0-27,56-83`. `None` if it is empty.
fn list_of(mask: &[u64]) -> Option<String> {
    let is_set = |cpu: usize| mask.get(cpu / 64).is_some_and(|word| word >> (cpu % 64) & 1 == 1);
    let mut ranges: Vec<String> = Vec::new();
    let mut first = None;
    for cpu in 0..=mask.len() * 64 {
        match (first, is_set(cpu)) {
            (None, true) => first = Some(cpu),
            (Some(start), false) => {
                ranges.push(if start + 1 == cpu {
                    start.to_string()
                } else {
                    format!("{start}-{}", cpu - 1)
                });
                first = None;
            }
            _ => {}
        }
    }
    (!ranges.is_empty()).then(|| ranges.join(","))
}

#[cfg(test)]
mod tests {
    use super::list_of;

    #[test]
    fn masks_become_lists() {
        assert_eq!(list_of(&[0b1011, 1]).as_deref(), Some("0-1,3,64"));
        assert_eq!(list_of(&[u64::MAX]).as_deref(), Some("0-63"));
        assert_eq!(list_of(&[0, 0]), None);
    }
}
