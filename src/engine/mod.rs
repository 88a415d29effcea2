//! The model servers that xpyd can run: command line, readiness, and log lines of a start.

pub mod arguments;
pub mod vllm;

use std::path::Path;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::connector::{Device, Launch, Sidecar};
use crate::fleet::Endpoint;

/// Time limit for a sidecar until it listens. `lmcache server` imports torch, which took 6 s on an idle machine and 20 s
/// on a busy one.
const SIDECAR_DEADLINE: Duration = Duration::from_mins(3);

/// The program that serves the model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// `vllm serve`
    #[default]
    Vllm,
    /// `xpyd sim`, the built-in simulated engine, which takes the same arguments, files and variables as vLLM
    Sim,
}

/// The decisions from which an engine's command line is built.
#[derive(Debug)]
pub struct ServeSpec<'plan> {
    /// The path of xpyd itself, which starts sidecars.
    pub xpyd: &'plan Path,
    /// The program: `vllm`, or `xpyd` for the simulated engine.
    pub program: &'plan Path,
    /// The model: a path or a repository.
    pub model: &'plan str,
    /// The model name that clients use.
    pub served_model_name: &'plan str,
    /// The address to listen on, and the number of ranks.
    pub endpoint: &'plan Endpoint,
    /// Number of engines of the fleet before this one.
    pub number: usize,
    /// The offset of every port of the fleet.
    pub port_offset: u16,
    /// Data-parallel ranks.
    pub data_parallel: u16,
    /// The device on which it computes.
    pub device: Device,
    /// Its GPUs, in the form of `CUDA_VISIBLE_DEVICES`.
    pub visible_gpus: &'plan str,
    /// The NUMA node of each of its GPUs, to which its workers are bound; empty: not bound.
    pub numa_nodes: &'plan [u32],
    /// Whether KV can also go over RDMA: other nodes take part, and this one has devices for it.
    pub rdma: bool,
    /// The fraction of its GPUs' memory, 0 to 1; default: the engine's own.
    pub gpu_memory_utilization: Option<f64>,
    /// Longest prompt plus answer, in tokens.
    pub max_model_len: Option<u32>,
    /// The arguments and variables of its connector.
    pub launch: &'plan Launch,
    /// The profile's own arguments. They are last, so that they win.
    pub args: &'plan [String],
    /// Whether the program has the option `--shutdown-timeout`.
    pub has_shutdown_timeout: bool,
    /// xpyd's time limit for the start.
    pub ready_deadline: Duration,
    /// How long an engine with work to do can make no progress.
    pub stall: Duration,
    /// Time from SIGTERM to SIGKILL.
    pub stop: Duration,
    /// For the simulated engine: the timing preset and the faults.
    pub sim: (&'plan str, &'plan [String]),
}

/// A phase of an engine's start, recognised by a log line.
#[derive(Debug, Clone, Copy)]
pub struct PhaseMarker {
    /// The phase that begins when the pattern matches, for people: `loading weights`.
    pub phase: &'static str,
    /// Regular expression for one log line without colours. The first capture group, if any, is a percentage.
    pub pattern: &'static str,
    /// Progress of the whole start at the beginning of this phase, in percent, for an engine on a warm machine.
    pub percent: u8,
}

/// Names of the Prometheus samples that distinguish a working engine from a hung one.
#[derive(Debug, Clone, Copy)]
pub struct ProgressMetrics {
    /// The path of the metrics: `/metrics`.
    pub path: &'static str,
    /// Number of running requests.
    pub running: &'static str,
    /// Counters of which at least one grows during any work.
    pub counters: &'static [&'static str],
    /// Counter of KV leases that expired before a decode engine used them.
    pub expired_leases: &'static str,
    /// Counter of reads of KV whose lease had expired.
    pub late_reads: &'static str,
}

impl EngineKind {
    /// The name in profiles and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Sim => "sim",
        }
    }

    /// The program and its arguments.
    pub fn command(self, serve: &ServeSpec<'_>) -> Vec<String> {
        let sidecar = serve.launch.sidecar.as_ref();
        let mut argv = sidecar.map_or_else(Vec::new, |sidecar| self.sidecar_command(sidecar, serve));
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

    /// The words before the engine's own command line if a sidecar must start first: see `xpyd sidecar`.
    fn sidecar_command(self, sidecar: &Sidecar, serve: &ServeSpec<'_>) -> Vec<String> {
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

    /// Variables on top of xpyd's own environment. Those of the connector and the profile come later and win.
    pub fn environment(self, serve: &ServeSpec<'_>) -> Vec<(String, String)> {
        match self {
            Self::Vllm => vllm::environment(serve),
            Self::Sim => vec![vllm::step_deadline(serve)],
        }
    }

    /// The path that answers 200 when an engine accepts requests.
    pub fn ready_path(self) -> &'static str {
        match self {
            Self::Vllm | Self::Sim => "/health",
        }
    }

    /// The markers of a start, in the order of an engine's log.
    pub fn phase_markers(self) -> &'static [PhaseMarker] {
        // The simulated engine writes vLLM's lines.
        match self {
            Self::Vllm | Self::Sim => vllm::PHASE_MARKERS,
        }
    }

    /// The metrics that show an engine's progress.
    pub fn progress_metrics(self) -> ProgressMetrics {
        match self {
            Self::Vllm | Self::Sim => vllm::PROGRESS_METRICS,
        }
    }
}
