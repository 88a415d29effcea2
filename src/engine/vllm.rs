//! `vllm serve`: the phases of its start.
//!
//! The lines were taken from vLLM 0.32.0's log and source; tqdm bars end in `\r` and carry no prefix.

use super::PhaseMarker;

/// The markers of a start, in order. GPU-only phases are missing from a CPU start, and the other way round.
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

/// Lines after which no start succeeds.
pub const FATAL_PATTERNS: &[&str] = &[
    r"Engine core initialization failed",
    r"EngineCore encountered a fatal error",
    r"EngineDeadError",
    r"WorkerProc hit an exception",
    r"[Aa]ddress already in use",
    r"No available memory for the cache blocks",
    r"CUDA out of memory",
];
