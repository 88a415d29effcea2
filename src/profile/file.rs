//! The TOML structure of a profile file, and its default values.

use std::collections::BTreeMap;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer};

use super::ranges::MOST_RANKS;
use super::{
    Deadlines, LmCacheMpProfile, LmCacheProfile, NixlProfile, Profile, RestartPolicy, RoleProfile, SimProfile,
    VllmProfile,
};
use crate::connector::{ConnectorChoice, Device};
use crate::engine::EngineKind;
use crate::fleet::{LogLimits, MAX_ENGINES_PER_ROLE};
use crate::proxy_config::ProxyConfig;
use crate::{byte_size, span};

/// The ports of the first prefill engine and the first decode engine. All default ports are those of LMCache's
/// `disagg_prefill/xpyd` example.
pub(super) const PREFILL_PORT: u16 = 7100;
pub(super) const DECODE_PORT: u16 = 7200;

/// A profile file. Each layer can leave out any key; [`File::resolve`] checks that the merged result is complete. The
/// comments of the fields are the descriptions in the JSON Schema.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct File {
    /// The profile that this one changes: the name of a shipped profile, or the path of a file, relative to this one.
    #[serde(rename = "extends")]
    _extends: Option<String>,
    /// What the profile is for, as `xpyd profiles list` prints it.
    description: Option<String>,
    /// The model: a repository of Hugging Face such as `Qwen/Qwen3-8B`, or a folder. Required, here or in the extended
    /// profile.
    model: Option<String>,
    /// The model name that clients use. Default: `model`.
    served_model_name: Option<String>,
    /// The program that serves the model.
    engine: EngineKind,
    /// How KV moves from prefill to decode. `auto` is LMCache where the installed versions make it safe, else NIXL.
    connector: ConnectorChoice,
    /// Uses a connector that xpyd would refuse for the installed versions.
    force_connector: bool,
    /// The device on which engines compute.
    device: Device,
    /// Added to every port of the profile, so that several fleets fit on one machine.
    port_offset: u16,
    /// The prefill engines: they read prompts and compute their KV.
    prefill: RoleTable,
    /// The decode engines: they generate the answers.
    decode: RoleTable,
    /// Options of vLLM, for the engines of both roles.
    vllm: VllmTable,
    /// Options of the simulated engine (`engine = "sim"`).
    sim: SimProfile,
    /// Options of the connectors `nixl` and `lmcache-mp`.
    nixl: NixlProfile,
    /// Options of the connector `lmcache`.
    lmcache: LmCacheProfile,
    /// Options of the connector `lmcache-mp`.
    lmcache_mp: LmCacheMpProfile,
    /// The proxy, which serves the OpenAI API.
    proxy: ProxyConfig,
    /// Time limits.
    deadlines: Deadlines,
    /// When an engine that failed is restarted.
    restart: RestartPolicy,
    /// Limits on the log file of each engine.
    logs: LogsTable,
}

/// `[prefill]` and `[decode]`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct RoleTable {
    /// Number of engines.
    #[schemars(range(min = 1, max = MAX_ENGINES_PER_ROLE))]
    count: u16,
    /// HTTP port of the first engine; the nth engine listens on `port + n - 1`.
    port: Option<u16>,
    /// Tensor-parallel ranks of each engine. Each rank has its own GPU.
    #[schemars(range(min = 1, max = MOST_RANKS))]
    tensor_parallel: u16,
    /// Indices of the GPUs of all engines of the role, in order. Default: xpyd chooses GPUs that are close to each other.
    gpus: Vec<u32>,
    /// The fraction of a GPU's memory that an engine uses. Default: `vllm.gpu_memory_utilization`. Below 0.48 for all
    /// engines, two share a GPU if there are too few.
    gpu_memory_utilization: Option<MemoryFraction>,
    /// Additional arguments for `vllm serve`, after those of `vllm.args`.
    args: Vec<String>,
    /// Additional environment variables of the engines.
    env: BTreeMap<String, EnvValue>,
}

impl Default for RoleTable {
    fn default() -> Self {
        Self {
            count: 1,
            port: None,
            tensor_parallel: 1,
            gpus: Vec::new(),
            gpu_memory_utilization: None,
            args: Vec::new(),
            env: BTreeMap::new(),
        }
    }
}

/// `[vllm]`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct VllmTable {
    /// The `vllm` program: a name on PATH, or a path.
    program: String,
    /// Longest prompt plus answer, in tokens. Default: the limit of the model.
    max_model_len: Option<u32>,
    /// The fraction of a GPU's memory that an engine uses. Default: that of vLLM.
    gpu_memory_utilization: Option<MemoryFraction>,
    /// Additional arguments for `vllm serve`.
    args: Vec<String>,
    /// Additional environment variables of the engines.
    env: BTreeMap<String, EnvValue>,
}

impl Default for VllmTable {
    fn default() -> Self {
        Self {
            program: "vllm".to_owned(),
            max_model_len: None,
            gpu_memory_utilization: None,
            args: Vec::new(),
            env: BTreeMap::new(),
        }
    }
}

/// `[logs]`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct LogsTable {
    /// Size at which a log file is renamed and a new one begins.
    #[serde(with = "byte_size")]
    #[schemars(with = "byte_size::Text")]
    file_size: u64,
    /// Number of files to keep for each engine, with the one that is being written; at least 2.
    files: u32,
    /// A full file that was last written longer ago is removed, except the newest one.
    #[serde(with = "span")]
    #[schemars(with = "span::Text")]
    age: Duration,
}

impl Default for LogsTable {
    fn default() -> Self {
        let LogLimits { file_bytes, files, age } = LogLimits::default();
        Self {
            file_size: file_bytes,
            files,
            age,
        }
    }
}

/// The value of an environment variable: a string, or a number or `true` without quotes.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a string, a number, `true` or `false`")]
enum EnvValue {
    Text(String),
    Whole(i64),
    Decimal(f64),
    Switch(bool),
}

impl EnvValue {
    fn all(env: BTreeMap<String, Self>) -> BTreeMap<String, String> {
        env.into_iter().map(|(name, value)| (name, value.text())).collect()
    }

    fn text(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Whole(number) => number.to_string(),
            Self::Decimal(number) => number.to_string(),
            Self::Switch(is_on) => is_on.to_string(),
        }
    }
}

/// A fraction of a GPU's memory: above 0, at most 1.
#[derive(Debug, Clone, Copy, JsonSchema)]
#[schemars(inline)]
struct MemoryFraction(#[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1))] f64);

impl<'de> Deserialize<'de> for MemoryFraction {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let part = f64::deserialize(deserializer)?;
        if part > 0.0 && part <= 1.0 {
            Ok(Self(part))
        } else {
            let text = format!(
                "{part} is not a fraction of the memory; write a number above 0 and up to 1, such as \
                0.45"
            );
            Err(serde::de::Error::custom(text))
        }
    }
}

/// A required key that a complete profile lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MissingKey(pub(super) &'static str);

impl File {
    /// Fills in the defaults that are not those of a type.
    pub(super) fn resolve(self, name: &str) -> Result<Profile, MissingKey> {
        let model = self.model.ok_or(MissingKey("model"))?;
        Ok(Profile {
            name: name.to_owned(),
            description: self.description.unwrap_or_default(),
            served_model_name: self.served_model_name.unwrap_or_else(|| model.clone()),
            model,
            engine: self.engine,
            connector: self.connector,
            force_connector: self.force_connector,
            device: self.device,
            port_offset: self.port_offset,
            prefill: self.prefill.resolve(PREFILL_PORT),
            decode: self.decode.resolve(DECODE_PORT),
            vllm: VllmProfile {
                program: self.vllm.program,
                max_model_len: self.vllm.max_model_len,
                gpu_memory_utilization: self.vllm.gpu_memory_utilization.map(|part| part.0),
                args: self.vllm.args,
                env: EnvValue::all(self.vllm.env),
            },
            sim: self.sim,
            nixl: self.nixl,
            lmcache: self.lmcache,
            lmcache_mp: self.lmcache_mp,
            proxy: self.proxy,
            proxy_port_is_exact: false,
            deadlines: self.deadlines,
            restart: self.restart,
            logs: self.logs.resolve(),
        })
    }
}

impl RoleTable {
    fn resolve(self, port: u16) -> RoleProfile {
        RoleProfile {
            count: self.count,
            port: self.port.unwrap_or(port),
            tensor_parallel: self.tensor_parallel,
            gpus: self.gpus,
            gpu_memory_utilization: self.gpu_memory_utilization.map(|part| part.0),
            args: self.args,
            env: EnvValue::all(self.env),
        }
    }
}

impl LogsTable {
    fn resolve(self) -> LogLimits {
        LogLimits {
            file_bytes: self.file_size.max(1),
            files: self.files.max(2),
            age: self.age,
        }
    }
}
