//! `vllm serve`: its command line, its variables, and the phases of its start.
//!
//! Flags and log lines are those of vLLM 0.32.0. tqdm bars end in `\r` and have no prefix.

use std::time::Duration;

use super::{PhaseMarker, ProgressMetrics, ServeSpec, arguments};
use crate::connector::Device;

/// Seconds after SIGTERM at which vLLM kills its own processes. Until then running requests continue, but the proxy has
/// drained before. With the default of 0, vLLM kills its workers at once, and NIXL and shared memory are never cleaned up.
/// A real engine uses the whole time even when idle: it frees its resources within a second or two, and then Python needs
/// the rest to exit.
pub const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// Seconds at which `EngineCore` sends SIGTERM to workers that it has told to exit. It ends those that have cleaned up;
/// the others ignore it. `EngineCore` removes its own shared memory only after they have exited.
const WORKER_GRACE: Duration = Duration::from_secs(3);

/// The first port that vLLM of the first engine tries for itself; each further engine starts [`OWN_PORTS`] later.
///
/// vLLM takes the first port that it can bind without `SO_REUSEADDR`, so it skips ports that xpyd holds. Without a start
/// port it asks the kernel for a free port and binds it later, and engines that start together take each other's ports.
const FIRST_OWN_PORT: u16 = 7600;

/// Number of ports that an engine can try before it reaches those of the next one.
const OWN_PORTS: u16 = 20;

/// The option for the fraction of each GPU's memory that an engine uses, weights included.
pub const MEMORY_OPTION: &str = "--gpu-memory-utilization";

/// vLLM's default for [`MEMORY_OPTION`]: 0.92 with vLLM 0.32, 0.9 with older versions.
pub fn default_memory_utilization(is_recent: bool) -> f64 {
    if is_recent { 0.92 } else { 0.9 }
}

/// The option that makes an engine report how much of a prompt it did not compute: the only proof of a transfer per
/// request.
const TOKEN_DETAILS: &str = "--enable-prompt-tokens-details";

/// The options of the engine in a whole command line. Words before `serve` belong to other programs.
pub fn own_arguments(argv: &[String]) -> &[String] {
    let verb = argv.iter().position(|word| word == "serve" || word == "sim");
    verb.map_or(argv, |verb| &argv[verb + 1..])
}

/// The API keys that an engine accepts: `--api-key`, else the variable; empty if it needs none.
pub fn api_keys<'engine>(argv: &'engine [String], variable: Option<&'engine str>) -> Vec<&'engine str> {
    let given = arguments::read(own_arguments(argv));
    // As in argparse, the last one counts.
    let given = given.into_iter().rfind(|given| given.name == "--api-key");
    let keys = given.map_or_else(|| variable.into_iter().collect(), |given| given.values);
    keys.into_iter().filter(|key| !key.is_empty()).collect()
}

/// The environment variable with the API key.
pub const API_KEY_VARIABLE: &str = "VLLM_API_KEY";

/// The arguments after `vllm serve`. The simulated engine takes the same.
pub(super) fn command_line(serve: &ServeSpec<'_>) -> Vec<String> {
    let mut words: Vec<String> = vec![serve.model.to_owned()];
    let mut flag = |name: &str, value: String| words.extend([format!("--{name}"), value]);
    flag("host", serve.endpoint.host.clone());
    flag("port", serve.endpoint.port.to_string());
    flag("served-model-name", serve.served_model_name.to_owned());
    flag("tensor-parallel-size", serve.endpoint.tensor_parallel.to_string());
    if let Some(tokens) = serve.max_model_len {
        flag("max-model-len", tokens.to_string());
    }
    if let Some(part) = serve.gpu_memory_utilization {
        flag("gpu-memory-utilization", part.to_string());
    }
    if serve.has_shutdown_timeout {
        flag("shutdown-timeout", SHUTDOWN_TIMEOUT.as_secs().to_string());
    }
    flag("kv-transfer-config", serve.launch.kv_transfer_config.to_string());
    if !serve.numa_nodes.is_empty() {
        // Explicit, because vLLM's own search fails if xpyd itself is bound to some CPUs.
        words.extend(["--numa-bind".to_owned(), "--numa-bind-nodes".to_owned()]);
        words.extend(serve.numa_nodes.iter().map(u32::to_string));
    }
    if !arguments::read(serve.args)
        .iter()
        .any(|given| given.name == TOKEN_DETAILS)
    {
        words.push(TOKEN_DETAILS.to_owned());
    }
    words.extend(serve.launch.arguments.iter().cloned());
    words.extend(serve.args.iter().cloned());
    words
}

/// The variables. Those of the connector and the profile come later and win.
pub(super) fn environment(serve: &ServeSpec<'_>) -> Vec<(String, String)> {
    let mut variables: Vec<(&str, String)> = vec![
        // The engines must compute the same hashes of chunks and blocks.
        ("PYTHONHASHSEED", "0".to_owned()),
        // The log is a file: no colours, and no line in a buffer when a process dies.
        ("PYTHONUNBUFFERED", "1".to_owned()),
        ("VLLM_LOGGING_COLOR", "0".to_owned()),
        // Only xpyd's deadline decides: vLLM's own leaves its workers behind when it fires.
        (
            "VLLM_ENGINE_READY_TIMEOUT_S",
            (seconds(serve.ready_deadline) + 600).to_string(),
        ),
        (
            "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS",
            WORKER_GRACE.as_secs().to_string(),
        ),
    ];
    // With data parallelism all ranks would start at the same port, and older versions search for a second one forever.
    if serve.data_parallel == 1 {
        let add = u16::try_from(serve.number)
            .unwrap_or(u16::MAX)
            .saturating_mul(OWN_PORTS);
        let first = FIRST_OWN_PORT.saturating_add(serve.port_offset);
        variables.push(("VLLM_PORT", first.saturating_add(add).to_string()));
    }
    match serve.device {
        Device::Cuda => {
            variables.push(("CUDA_VISIBLE_DEVICES", serve.visible_gpus.to_owned()));
            // CUDA's default order is by speed, NVML's by bus.
            variables.push(("CUDA_DEVICE_ORDER", "PCI_BUS_ID".to_owned()));
            let rdma = if serve.rdma { "rc," } else { "" };
            variables.push(("UCX_TLS", format!("cuda_ipc,cuda_copy,sm,self,{rdma}tcp")));
        }
        Device::Cpu => variables.push(("CUDA_VISIBLE_DEVICES", String::new())),
    }
    let variables = variables.into_iter().map(|(name, value)| (name.to_owned(), value));
    variables.chain([step_deadline(serve)]).collect()
}

/// Time after which the engine core gives up on a worker and exits. A worker that hangs before its first step for a
/// request is in no metric, so only the engine core can notice.
pub(super) fn step_deadline(serve: &ServeSpec<'_>) -> (String, String) {
    let name = "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS".to_owned();
    (name, seconds(serve.stall).max(1).to_string())
}

/// Whole seconds for vLLM, which waits in milliseconds of 31 bits.
fn seconds(span: Duration) -> u64 {
    span.as_secs().min(1_000_000)
}

/// The markers of a start, in order. A CPU start lacks the phases of GPUs, and the reverse.
pub const PHASE_MARKERS: &[PhaseMarker] = &[
    PhaseMarker {
        phase: "importing",
        pattern: r"version \S+$|non-default args: ",
        percent: 15,
    },
    PhaseMarker {
        phase: "reading config",
        pattern: r"Resolved architecture: \S+",
        percent: 20,
    },
    PhaseMarker {
        phase: "starting engine core",
        pattern: r"Initializing a V1 LLM engine",
        percent: 35,
    },
    PhaseMarker {
        phase: "joining workers",
        pattern: r"world_size=\d+ rank=\d+",
        percent: 50,
    },
    PhaseMarker {
        phase: "loading weights",
        pattern: r"Starting to load model ",
        percent: 55,
    },
    PhaseMarker {
        phase: "loading weights",
        pattern: r"Loading safetensors checkpoint shards:\s+(\d+)% Completed",
        percent: 56,
    },
    PhaseMarker {
        phase: "compiling",
        pattern: r"Starting torch\.compile|Compiling a graph for",
        percent: 70,
    },
    PhaseMarker {
        phase: "sizing KV cache",
        pattern: r"(?:GPU|CPU) KV cache size: [\d,]+ tokens",
        percent: 80,
    },
    PhaseMarker {
        phase: "capturing graphs",
        pattern: r"Capturing CUDA graphs.*?(\d+)%",
        percent: 82,
    },
    PhaseMarker {
        phase: "warming up",
        pattern: r"Creating v1 connector with name: ",
        percent: 88,
    },
    PhaseMarker {
        phase: "starting server",
        pattern: r"init engine \(.*\) took [\d.]+ s",
        percent: 92,
    },
    PhaseMarker {
        phase: "starting server",
        pattern: r"Starting vLLM server on ",
        percent: 97,
    },
    PhaseMarker {
        phase: "up",
        pattern: r"Application startup complete\.",
        percent: 100,
    },
];

/// Requests that wait for remote KV do not count as running, so a slow transfer is not a hang.
pub const PROGRESS_METRICS: ProgressMetrics = ProgressMetrics {
    path: "/metrics",
    running: "vllm:num_requests_running",
    counters: &["vllm:generation_tokens_total", "vllm:prompt_tokens_total"],
    expired_leases: "vllm:nixl_num_kv_expired_reqs_total",
    late_reads: "vllm:nixl_num_notifications_after_expiry_total",
};
