//! Profiles: what the user asks for, in TOML, before xpyd looks at the machine.
//!
//! A profile is a stack of layers: a shipped profile, the user's file, `--set` overrides, flags. Each layer is checked
//! alone, so that an error points at the line that the user wrote. Then the layers are merged, later ones win, and missing
//! keys get their defaults.

mod args_to_keys;
mod deadlines;
mod file;
mod layers;
mod ranges;
#[cfg(test)]
mod reference;
mod restart;
mod schema;
mod suggestions;

use std::collections::BTreeMap;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::connector::{ConnectorChoice, Device, FirstToken};
use crate::engine::{EngineKind, arguments};
use crate::fleet::LogLimits;
use crate::proxy_config::ProxyConfig;

pub use deadlines::Deadlines;
pub use layers::{Override, ProfileError, load, load_with, resolved, shipped, shipped_names, text};
pub use restart::{RestartPolicy, RestartWhen};
pub use schema::schema;

/// A complete and checked profile. Nothing in it depends on the machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// The name of a shipped profile, or the path of the user's file.
    pub name: String,
    /// The description in `xpyd profiles list`.
    pub description: String,
    /// Model path or Hugging Face repository.
    pub model: String,
    /// The model name that clients use.
    pub served_model_name: String,
    /// The program that serves the model.
    pub engine: EngineKind,
    /// The connector, or `auto`.
    pub connector: ConnectorChoice,
    /// Whether to use a connector that the plan would refuse.
    pub force_connector: bool,
    /// The device on which engines compute.
    pub device: Device,
    /// Added to every port of the profile, so that several fleets fit on one machine.
    pub port_offset: u16,
    /// The prefill engines.
    pub prefill: RoleProfile,
    /// The decode engines.
    pub decode: RoleProfile,
    /// Options for vLLM.
    pub vllm: VllmProfile,
    /// Options for the simulated engine.
    pub sim: SimProfile,
    /// Options for NIXL.
    pub nixl: NixlProfile,
    /// Options for LMCache.
    pub lmcache: LmCacheProfile,
    /// Options for LMCache MP.
    pub lmcache_mp: LmCacheMpProfile,
    /// The configuration of the proxy.
    pub proxy: ProxyConfig,
    /// Whether `port_offset` leaves the proxy's port as it is, because `--port` sets it.
    pub proxy_port_is_exact: bool,
    /// The time limits of a run.
    pub deadlines: Deadlines,
    /// The rules for restarting engines that failed.
    pub restart: RestartPolicy,
    /// Limits on the engines' log files.
    pub logs: LogLimits,
}

/// The engines of one role.
#[derive(Debug, Clone, PartialEq)]
pub struct RoleProfile {
    /// Number of engines, at least 1.
    pub count: u16,
    /// HTTP port of the first engine; the nth listens on `port + n - 1`.
    pub port: u16,
    /// Tensor-parallel ranks per engine, each with its own GPU.
    pub tensor_parallel: u16,
    /// Indices of the GPUs of all engines of the role, in order; if empty, the plan chooses.
    pub gpus: Vec<u32>,
    /// The fraction of each GPU's memory for an engine, 0 to 1; default: that of `vllm`.
    pub gpu_memory_utilization: Option<f64>,
    /// Additional arguments for the engine.
    pub args: Vec<String>,
    /// Additional environment variables.
    pub env: BTreeMap<String, String>,
}

/// The parallel ranks of an engine. Each rank has its own GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranks {
    /// Tensor-parallel ranks.
    pub tensor: u16,
    /// Pipeline-parallel stages.
    pub pipeline: u16,
    /// Prefill-context-parallel ranks.
    pub context: u16,
    /// Data-parallel ranks; each is a complete engine core.
    pub data: u16,
}

impl Ranks {
    /// The total number of ranks, as vLLM counts them (`config/parallel.py`).
    pub fn total(self) -> usize {
        let all = [self.tensor, self.pipeline, self.context, self.data];
        all.iter().map(|&ranks| usize::from(ranks)).product()
    }
}

impl Profile {
    /// The ranks of each engine of a role. Ranks without a key are read from the arguments.
    pub fn ranks(&self, role: &RoleProfile) -> Ranks {
        let number = |name: &str| {
            let number = self.argument(role, name).and_then(|value| value.parse().ok());
            number.unwrap_or(1).max(1)
        };
        Ranks {
            tensor: role.tensor_parallel,
            pipeline: number("--pipeline-parallel-size"),
            context: number("--prefill-context-parallel-size"),
            data: number("--data-parallel-size"),
        }
    }

    /// The value of an option in the arguments. The arguments of the role come after those of all engines.
    pub fn argument<'profile>(&'profile self, role: &'profile RoleProfile, name: &str) -> Option<&'profile str> {
        arguments::value(&role.args, name).or_else(|| arguments::value(&self.vllm.args, name))
    }
}

/// Options for vLLM, for engines of both roles.
#[derive(Debug, Clone, PartialEq)]
pub struct VllmProfile {
    /// The `vllm` program: a name on PATH or a path.
    pub program: String,
    /// Longest prompt plus answer, in tokens; default: the model's own limit.
    pub max_model_len: Option<u32>,
    /// The fraction of each GPU's memory for an engine, 0 to 1; default: vLLM's own.
    pub gpu_memory_utilization: Option<f64>,
    /// Additional arguments.
    pub args: Vec<String>,
    /// Additional environment variables.
    pub env: BTreeMap<String, String>,
}

/// Options for the simulated engine.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SimProfile {
    /// The timing preset; `xpyd sim --help` lists them.
    pub preset: String,
    /// Longest prompt plus answer, in tokens, if `vllm.max_model_len` is not set.
    pub max_model_len: u32,
    /// Faults of every engine, in the syntax of `xpyd sim --fault`.
    pub faults: Vec<String>,
}

impl Default for SimProfile {
    fn default() -> Self {
        Self {
            preset: "h100-llama-3.1-8b".to_owned(),
            max_model_len: 131_072,
            faults: Vec::new(),
        }
    }
}

/// Options for NIXL.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NixlProfile {
    /// Side channel port of the first prefill engine; one per engine.
    pub prefill_side_channel_port: u16,
    /// Side channel port of the first decode engine; one per engine.
    pub decode_side_channel_port: u16,
    /// How long a prefill engine keeps KV for a decode engine. Default and minimum: what the deadlines need (16 minutes by
    /// default; `docs/clocks.md`).
    #[serde(deserialize_with = "crate::span::deserialize_some")]
    #[schemars(with = "Option<crate::span::Text>")]
    pub lease: Option<Duration>,
}

impl Default for NixlProfile {
    fn default() -> Self {
        Self {
            prefill_side_channel_port: 5600,
            decode_side_channel_port: 5700,
            lease: None,
        }
    }
}

/// Options for LMCache.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LmCacheProfile {
    /// The engine that generates the first token.
    pub first_token: FirstToken,
    /// Init port of the first decode engine; one per engine and rank.
    pub init_port: u16,
    /// Allocation port of the first decode engine; one per engine and rank.
    pub alloc_port: u16,
    /// The port on which the proxy receives notifications.
    pub notify_port: u16,
    /// Send buffer of a prefill engine.
    #[serde(rename = "prefill_buffer", with = "crate::byte_size")]
    #[schemars(with = "crate::byte_size::Text")]
    pub prefill_buffer_bytes: u64,
    /// Receive buffer of a decode engine.
    #[serde(rename = "decode_buffer", with = "crate::byte_size")]
    #[schemars(with = "crate::byte_size::Text")]
    pub decode_buffer_bytes: u64,
    /// Notifications to wait for after each prefill. Default: one per rank. Models with MLA send one.
    pub notifications: Option<u16>,
}

impl Default for LmCacheProfile {
    fn default() -> Self {
        Self {
            // The ports are those of LMCache's `disagg_prefill/xpyd` example.
            first_token: FirstToken::Decoder,
            init_port: 7300,
            alloc_port: 7400,
            notify_port: 7500,
            prefill_buffer_bytes: 1 << 30,
            decode_buffer_bytes: 2 << 30,
            notifications: None,
        }
    }
}

/// Options for LMCache MP.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LmCacheMpProfile {
    /// Request port of the first engine's cache server; one per engine.
    pub port: u16,
    /// HTTP port of the first engine's cache server; one per engine.
    pub http_port: u16,
    /// The memory of each cache server.
    #[serde(rename = "l1_size", with = "crate::byte_size")]
    #[schemars(with = "crate::byte_size::Text")]
    pub l1_bytes: u64,
}

impl Default for LmCacheMpProfile {
    fn default() -> Self {
        Self {
            // The ports are those of LMCache's guide to disaggregated prefill with cache servers.
            port: 6555,
            http_port: 8090,
            l1_bytes: 8 << 30,
        }
    }
}

#[cfg(test)]
mod tests;
