//! Repeated queries of the memory and processes of GPUs, while engines start and stop.

use nvml_wrapper::Nvml;

use super::holders::Lookup;
use super::{GpuMemory, GpuProcess, nvml};

/// An open NVML library.
#[derive(Debug)]
pub struct Meter(Nvml);

/// The state of a GPU at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// Its total, free and used memory, in bytes.
    pub memory: GpuMemory,
    /// The processes that compute on it; `None` if they cannot be listed.
    pub processes: Option<Vec<GpuProcess>>,
}

impl Meter {
    /// Loads NVML and keeps it open.
    ///
    /// # Errors
    /// A sentence that says why the library cannot be loaded.
    pub fn open() -> Result<Self, String> {
        nvml::open().map(Self)
    }

    /// The current state of the GPU or MIG slice with this UUID; `None` if NVML does not report its memory.
    pub fn usage(&self, uuid: &str) -> Option<Usage> {
        let device = self
            .0
            .device_by_uuid(uuid)
            .inspect_err(|error| tracing::debug!(uuid, %error, "NVML does not know the GPU"))
            .ok()?;
        Some(Usage {
            memory: nvml::memory(&device)?,
            processes: nvml::processes(&device, &mut Lookup::default()),
        })
    }

    /// The processes on every GPU of this machine, by UUID. GPUs whose processes cannot be listed are left out.
    pub fn everywhere(&self) -> Vec<(String, Vec<GpuProcess>)> {
        nvml::processes_everywhere(&self.0)
    }
}
