//! Model servers that xpyd can run: what to execute, when it is ready, and what its log says while it starts.

pub mod arguments;
pub mod vllm;

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::connector::{Device, Launch, Sidecar};
use crate::fleet::Endpoint;

/// How long a sidecar may take until it listens. `lmcache server` imports torch, which took it 6 s on a quiet machine and
/// 20 s on a busy one.
const SIDECAR_DEADLINE: Duration = Duration::from_mins(3);

/// The program that serves the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// `vllm serve`.
    Vllm,
    /// `xpyd sim`, the built-in simulated engine: vLLM-shaped, and reads the same arguments, files and variables.
    Sim,
}

/// What is decided about an engine before its command line is written.
#[derive(Debug)]
pub struct Serve<'plan> {
    /// xpyd itself, which starts sidecars.
    pub xpyd: &'plan Path,
    /// The program: `vllm`, or `xpyd` for the simulated engine.
    pub program: &'plan Path,
    /// Model path or repository.
    pub model: &'plan str,
    /// Name for clients.
    pub served_model_name: &'plan str,
    /// Where to listen, and over how many ranks to spread.
    pub endpoint: &'plan Endpoint,
    /// How many engines of the fleet come before it.
    pub number: usize,
    /// What is added to every port of the fleet.
    pub port_offset: u16,
    /// Data-parallel ranks.
    pub data_parallel: u16,
    /// Where it computes.
    pub device: Device,
    /// Its GPUs, as `CUDA_VISIBLE_DEVICES` has them.
    pub visible_gpus: &'plan str,
    /// The NUMA node of each of its GPUs, to bind its workers to; empty binds nothing.
    pub numa_nodes: &'plan [u32],
    /// The part of its GPUs' memory that it may use, 0 to 1; its own default when absent.
    pub gpu_memory_utilization: Option<f64>,
    /// Longest prompt plus answer, in tokens.
    pub max_model_len: Option<u32>,
    /// What its connector adds.
    pub launch: &'plan Launch,
    /// The profile's own arguments, last so that they win.
    pub args: &'plan [String],
    /// Whether the program knows `--shutdown-timeout`.
    pub has_shutdown_timeout: bool,
    /// xpyd's own deadline for the start.
    pub ready_deadline: Duration,
    /// How long an engine with something to do may get nothing done.
    pub stall: Duration,
    /// How long it may take to leave when asked.
    pub stop: Duration,
    /// What only the simulated engine is told: the timing preset and the faults.
    pub sim: (&'plan str, &'plan [String]),
}

/// A step of an engine's start that its log shows.
#[derive(Debug, Clone, Copy)]
pub struct PhaseMarker {
    /// The phase that has begun when the pattern matches, for people: `loading weights`.
    pub phase: &'static str,
    /// Regular expression on one log line, free of colours. A first capture group, if any, is a percentage.
    pub pattern: &'static str,
    /// How far the whole start is when this phase begins, 0 to 100, for an engine on a warm machine.
    pub percent: u8,
}

/// Names of the Prometheus samples that tell a working engine from a hung one.
#[derive(Debug, Clone, Copy)]
pub struct ProgressMetrics {
    /// Where they are: `/metrics`.
    pub path: &'static str,
    /// Requests being computed now.
    pub running: &'static str,
    /// Counters of which at least one grows while anything is computed.
    pub counters: &'static [&'static str],
    /// KV that was kept for a decode engine until its lease ended.
    pub expired_leases: &'static str,
    /// Decode engines that reported a read of KV that was no longer kept for them.
    pub late_reads: &'static str,
}

impl EngineKind {
    /// Its name in profiles and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Sim => "sim",
        }
    }

    /// Program and arguments.
    pub fn command(self, serve: &Serve<'_>) -> Vec<String> {
        let sidecar = serve.launch.sidecar.as_ref();
        let mut argv = sidecar.map_or_else(Vec::new, |sidecar| self.accompanied(sidecar, serve));
        argv.push(serve.program.display().to_string());
        match self {
            Self::Vllm => argv.push("serve".to_owned()),
            Self::Sim => argv.push("sim".to_owned()),
        }
        argv.extend(vllm::command_line(serve));
        if self == Self::Sim {
            let (preset, faults) = serve.sim;
            argv.extend(["--preset".to_owned(), preset.to_owned()]);
            argv.extend(faults.iter().flat_map(|fault| ["--fault".to_owned(), fault.clone()]));
        }
        argv
    }

    /// What stands before the engine's own command line where a sidecar must be there first: see `xpyd sidecar`.
    fn accompanied(self, sidecar: &Sidecar, serve: &Serve<'_>) -> Vec<String> {
        let mut argv = vec![serve.xpyd.display().to_string(), "sidecar".to_owned()];
        let mut flag = |name: &str, value: String| argv.extend([format!("--{name}"), value]);
        flag("host", serve.endpoint.host.clone());
        flag("port", sidecar.port.to_string());
        let deadline = SIDECAR_DEADLINE.min(serve.ready_deadline);
        flag("deadline", humantime::format_duration(deadline).to_string());
        flag("grace", humantime::format_duration(serve.stop).to_string());
        argv.push("--".to_owned());
        match self {
            Self::Vllm => argv.push(serve.program.with_file_name(sidecar.program).display().to_string()),
            Self::Sim => argv.extend([serve.xpyd.display().to_string(), format!("sim-{}", sidecar.program)]),
        }
        argv.extend(sidecar.arguments.iter().cloned());
        argv.push("--".to_owned());
        argv
    }

    /// Variables on top of xpyd's own environment, before those of the connector and of the profile.
    pub fn environment(self, serve: &Serve<'_>) -> Vec<(String, String)> {
        match self {
            Self::Vllm => vllm::environment(serve),
            Self::Sim => vec![vllm::step_deadline(serve)],
        }
    }

    /// The path whose 200 means that an engine takes requests.
    pub fn ready_path(self) -> &'static str {
        match self {
            Self::Vllm | Self::Sim => "/health",
        }
    }

    /// The markers of a start, in the order in which an engine prints them.
    pub fn phase_markers(self) -> &'static [PhaseMarker] {
        // The simulated engine prints vLLM's lines.
        match self {
            Self::Vllm | Self::Sim => vllm::PHASE_MARKERS,
        }
    }

    /// What `/metrics` says about an engine's progress.
    pub fn progress_metrics(self) -> ProgressMetrics {
        match self {
            Self::Vllm | Self::Sim => vllm::PROGRESS_METRICS,
        }
    }
}
