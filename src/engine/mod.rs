//! Model servers that xpyd can run: what to execute, when it is ready, and what its log says while it starts.

pub mod vllm;

use serde::{Deserialize, Serialize};

/// The program that serves the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// `vllm serve`.
    Vllm,
    /// `xpyd sim`, the built-in simulated engine: vLLM-shaped, and reads the same arguments, files and variables.
    Sim,
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

impl EngineKind {
    /// The markers of a start, in the order in which an engine prints them.
    pub fn phase_markers(self) -> &'static [PhaseMarker] {
        // The simulated engine prints vLLM's lines.
        match self {
            Self::Vllm | Self::Sim => vllm::PHASE_MARKERS,
        }
    }

    /// Patterns of log lines that say that the start has failed for good.
    pub fn fatal_patterns(self) -> &'static [&'static str] {
        match self {
            Self::Vllm | Self::Sim => vllm::FATAL_PATTERNS,
        }
    }
}
