//! GPUs, through NVML. Its library is loaded at run time, so a machine without it is a fact and not a crash.

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

/// What NVML says, within an inherited `CUDA_VISIBLE_DEVICES`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gpus {
    /// The plan needs none.
    NotAsked,
    /// These may be used, in NVML's (PCI) order.
    Found(Vec<Gpu>),
    /// None can be seen, and why.
    Unavailable(String),
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// NVML's index, which is CUDA's with `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
    pub index: u32,
    /// Product name.
    pub name: String,
    /// `GPU-…`.
    pub uuid: String,
    /// All of its memory, in bytes.
    pub memory_total_bytes: u64,
    /// Memory that is not in use, in bytes.
    pub memory_free_bytes: u64,
}

/// Asks NVML.
pub(super) fn survey() -> Gpus {
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    match list() {
        Ok(gpus) => match visible {
            Some(visible) => Gpus::Found(within(&gpus, &visible)),
            None => Gpus::Found(gpus),
        },
        Err(NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound) => {
            Gpus::Unavailable("no NVIDIA driver: its library libnvidia-ml.so.1 cannot be loaded".to_owned())
        }
        Err(error) => Gpus::Unavailable(format!("NVML failed: {error}")),
    }
}

/// Loads NVML.
pub(super) fn open() -> Result<Nvml, NvmlError> {
    Nvml::builder()
        // The default name needs the development package; every driver ships this one.
        .lib_path(std::ffi::OsStr::new("libnvidia-ml.so.1"))
        .init()
}

fn list() -> Result<Vec<Gpu>, NvmlError> {
    let nvml = open()?;
    (0..nvml.device_count()?)
        .map(|index| {
            let device = nvml.device_by_index(index)?;
            let memory = device.memory_info()?;
            Ok(Gpu {
                index,
                name: device.name()?,
                uuid: device.uuid()?,
                memory_total_bytes: memory.total,
                memory_free_bytes: memory.free,
            })
        })
        .collect()
}

/// The GPUs that an inherited `CUDA_VISIBLE_DEVICES` leaves, in its order. As CUDA does, an entry that names no GPU
/// hides itself and all after it.
fn within(gpus: &[Gpu], visible: &str) -> Vec<Gpu> {
    visible
        .split(',')
        .map(str::trim)
        .map_while(|entry| {
            gpus.iter().find(|gpu| {
                entry.parse() == Ok(gpu.index) || (entry.starts_with("GPU-") && gpu.uuid.starts_with(entry))
            })
        })
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(index: u32) -> Gpu {
        let uuid = format!("GPU-{index}{index}{index}");
        Gpu {
            index,
            name: "H100".into(),
            uuid,
            memory_total_bytes: 80 << 30,
            memory_free_bytes: 79 << 30,
        }
    }

    #[test]
    fn an_inherited_list_is_the_universe_and_keeps_its_order() {
        let gpus: Vec<Gpu> = (0..4).map(gpu).collect();
        let seen = |visible: &str| within(&gpus, visible).iter().map(|gpu| gpu.index).collect::<Vec<_>>();
        assert_eq!(seen("2,0"), [2, 0]);
        assert_eq!(seen("GPU-333, 1"), [3, 1]);
        assert_eq!(seen("1,9,2"), [1]);
        assert_eq!(seen(""), [0u32; 0]);
    }
}
