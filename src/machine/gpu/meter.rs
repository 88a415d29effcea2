//! Memory of GPUs and who holds it, asked again and again while engines come and go.

use nvml_wrapper::Nvml;

use super::holders::Lookup;
use super::{GpuMemory, GpuProcess, nvml};

/// NVML, kept open.
#[derive(Debug)]
pub struct Meter(Nvml);

/// A GPU at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// Its memory.
    pub memory: GpuMemory,
    /// Processes that compute on it; `None` where they cannot be listed.
    pub processes: Option<Vec<GpuProcess>>,
}

impl Meter {
    /// Loads NVML.
    ///
    /// # Errors
    /// Why it cannot be, as a sentence.
    pub fn open() -> Result<Self, String> {
        nvml::open().map(Self)
    }

    /// The GPU or MIG slice with this UUID as it is now; `None` where NVML does not tell its memory.
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

    /// The processes on every GPU that this machine has, by UUID; what cannot be listed is left out.
    pub fn everywhere(&self) -> Vec<(String, Vec<GpuProcess>)> {
        nvml::processes_everywhere(&self.0)
    }
}
