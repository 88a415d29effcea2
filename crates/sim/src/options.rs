//! The options of a simulated engine: vLLM's arguments, its `--kv-transfer-config`, and LMCache's file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::engine_core::timing::Preset;
use crate::fault::{Fault, Phase};
use crate::log::LogTarget;

/// vLLM's default for `VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS`.
pub const STEP_DEADLINE: Duration = Duration::from_mins(5);

/// The options of a simulated engine: first what `vllm serve` reads from its command line and environment, then the
/// options of the simulation.
#[derive(Debug, Clone)]
pub struct Options {
    /// The model as given.
    pub model: String,
    /// Its name in requests.
    pub served_model_name: String,
    /// Address to listen on.
    pub host: String,
    /// Port to listen on; 0 lets the system choose.
    pub port: u16,
    /// Longest prompt plus answer, in tokens.
    pub max_model_len: u32,
    /// Tensor-parallel ranks.
    pub tensor_parallel_size: u16,
    /// Data-parallel ranks. All except the first only listen on their side channels.
    pub data_parallel_size: u16,
    /// The connector, if any.
    pub kv_transfer: Option<KvTransferConfig>,
    /// `VLLM_NIXL_SIDE_CHANNEL_HOST` and `_PORT`.
    pub side_channel: (String, u16),
    /// `LMCACHE_CONFIG_FILE`.
    pub lmcache_config_file: Option<PathBuf>,
    /// `PYTHONHASHSEED`.
    pub python_hash_seed: Option<String>,
    /// Whether a long prompt is prefilled in several steps.
    pub chunked_prefill: bool,
    /// Tokens per scheduler step, if given.
    pub max_num_batched_tokens: Option<u32>,
    /// `VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS`: time limit of a worker's step, after which the core dies.
    pub step_deadline: Duration,
    /// `--api-key` or `VLLM_API_KEY`: a client must send one of these keys. Without keys, every client is accepted.
    pub api_keys: Vec<String>,
    /// Time for running requests after SIGTERM.
    pub shutdown_timeout: Duration,
    /// Whether `usage` has cached tokens.
    pub prompt_tokens_details: bool,
    /// Whether answers have the times of their request.
    pub per_request_metrics: bool,
    /// Whether graphs are captured at the start.
    pub enforce_eager: bool,
    /// The numbers of the timing model.
    pub preset: Preset,
    /// The faults.
    pub faults: Vec<Fault>,
    /// Options of `vllm serve` that were given and have no effect here.
    pub ignored: Vec<String>,
    /// Whether to spawn `EngineCore` and worker processes by executing this program again.
    pub spawn_children: bool,
    /// The process of the engine that this is.
    pub process: ProcessKind,
    /// The log target.
    pub log: LogTarget,
}

/// The kinds of processes of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessKind {
    /// The API server, which the launcher starts.
    ApiServer,
    /// Its child, which has the workers.
    EngineCore,
    /// A child of `EngineCore`.
    Worker,
}

/// vLLM 0.32's `KVTransferConfig`. An unknown key is an error, as there.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvTransferConfig {
    /// `NixlConnector`, `LMCacheConnectorV1`, `MultiConnector`.
    pub kv_connector: String,
    /// The KV role of the engine.
    pub kv_role: KvRole,
    /// The engine's id; generated if absent.
    pub engine_id: Option<String>,
    /// Ignored.
    pub kv_buffer_device: Option<String>,
    /// Ignored.
    pub kv_port: Option<u16>,
    /// The policy of a decode engine if KV does not arrive.
    #[serde(default)]
    pub kv_load_failure_policy: LoadFailurePolicy,
    /// Settings of the connector.
    #[serde(default)]
    pub kv_connector_extra_config: ExtraConfig,
    /// Ignored.
    pub kv_connector_module_path: Option<String>,
    /// Ignored.
    #[serde(default)]
    pub enable_permute_local_kv: bool,
}

/// `kv_role`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvRole {
    /// Prefills.
    KvProducer,
    /// Decodes.
    KvConsumer,
    /// Both.
    KvBoth,
}

/// `kv_load_failure_policy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoadFailurePolicy {
    /// The request fails.
    #[default]
    Fail,
    /// The decode engine computes the prompt.
    Recompute,
}

/// The known keys of `kv_connector_extra_config`; vLLM also passes on others.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct ExtraConfig {
    /// Lease of NIXL's KV in seconds.
    pub kv_lease_duration: Option<f64>,
    /// Tokens at the end of a prompt that LMCache neither looks up nor loads.
    #[serde(default)]
    pub skip_last_n_tokens: usize,
    /// The configurations of the parts of a multi-connector.
    #[serde(default)]
    pub connectors: Vec<KvTransferConfig>,
    /// Host of the cache server: `tcp://localhost`.
    #[serde(rename = "lmcache.mp.host")]
    pub cache_host: Option<String>,
    /// Port of the cache server.
    #[serde(rename = "lmcache.mp.port")]
    pub cache_port: Option<u16>,
}

/// Why the options are invalid.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// `--kv-transfer-config` is invalid.
    #[error("argument --kv-transfer-config: 1 validation error for KVTransferConfig")]
    KvTransferConfig(#[source] serde_json::Error),
    /// Unknown preset.
    #[error("unknown preset `{0}`; known are {known}", known = preset_names())]
    Preset(String),
    /// A `--fault` is unknown or malformed.
    #[error(transparent)]
    Fault(#[from] crate::fault::FaultError),
    /// A variable is not a port.
    #[error("`{0}` is not a port number: `{1}`")]
    Port(&'static str, String),
}

fn preset_names() -> String {
    let names: Vec<&str> = crate::engine_core::timing::PRESETS
        .iter()
        .map(|preset| preset.name)
        .collect();
    names.join(", ")
}

impl KvTransferConfig {
    /// Parses the JSON of the argument.
    ///
    /// # Errors
    /// On an unknown or missing key, or a wrong type.
    pub fn parse(json: &str) -> Result<Self, OptionsError> {
        serde_json::from_str(json).map_err(OptionsError::KvTransferConfig)
    }

    /// Whether it is a NIXL pull connector.
    pub(crate) fn is_nixl(&self) -> bool {
        matches!(self.kv_connector.as_str(), "NixlConnector" | "NixlPullConnector")
    }

    /// The parts of a multi-connector; else this connector.
    pub(crate) fn children(&self) -> &[Self] {
        match self.kv_connector.as_str() {
            "MultiConnector" => &self.kv_connector_extra_config.connectors,
            _ => std::slice::from_ref(self),
        }
    }

    /// The address of the cache server, with LMCache's defaults; `None` for other connectors.
    pub(crate) fn cache_server(&self) -> Option<String> {
        let extra = &self.kv_connector_extra_config;
        (self.kv_connector == "LMCacheMPConnector").then(|| {
            let host = extra.cache_host.as_deref().unwrap_or("tcp://localhost");
            format!("{host}:{}", extra.cache_port.unwrap_or(5555))
        })
    }

    /// Whether it is LMCache's in-process connector.
    pub(crate) fn is_lmcache(&self) -> bool {
        self.kv_connector == "LMCacheConnectorV1"
    }

    /// The lease of KV for a decode engine; vLLM's default is 30 s.
    pub(crate) fn lease(&self) -> Duration {
        self.kv_connector_extra_config
            .kv_lease_duration
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
            .unwrap_or(Duration::from_secs(30))
    }
}

impl Options {
    /// Options of an engine that takes no time, on a port that the system chooses, without connector or child
    /// processes.
    pub fn instant(model: &str) -> Self {
        Self {
            model: model.to_owned(),
            served_model_name: model.to_owned(),
            host: "127.0.0.1".to_owned(),
            port: 0,
            max_model_len: 8192,
            tensor_parallel_size: 1,
            data_parallel_size: 1,
            kv_transfer: None,
            side_channel: ("127.0.0.1".to_owned(), 0),
            lmcache_config_file: None,
            python_hash_seed: None,
            chunked_prefill: true,
            max_num_batched_tokens: None,
            step_deadline: STEP_DEADLINE,
            api_keys: Vec::new(),
            shutdown_timeout: Duration::ZERO,
            prompt_tokens_details: false,
            per_request_metrics: false,
            enforce_eager: true,
            preset: crate::engine_core::timing::INSTANT,
            faults: Vec::new(),
            ignored: Vec::new(),
            spawn_children: false,
            process: ProcessKind::ApiServer,
            log: LogTarget::Nowhere,
        }
    }

    /// Tokens per scheduler step. vLLM raises its default to the model length if prefills are not chunked.
    pub(crate) fn step_tokens(&self) -> u32 {
        let default = if self.chunked_prefill {
            2048
        } else {
            self.max_model_len.max(2048)
        };
        self.max_num_batched_tokens.unwrap_or(default)
    }

    pub(crate) fn ignores_sigterm(&self) -> bool {
        self.faults.contains(&Fault::IgnoreSigterm)
    }

    pub(crate) fn leaves_orphans(&self) -> bool {
        self.faults.contains(&Fault::Orphans)
    }

    pub(crate) fn leaves_stray(&self) -> bool {
        self.faults.contains(&Fault::Stray)
    }

    pub(crate) fn dies_at(&self, phase: Phase) -> bool {
        self.faults.contains(&Fault::DieAt(phase))
    }

    pub(crate) fn freezes_at(&self, phase: Phase) -> bool {
        self.faults.contains(&Fault::FreezeAt(phase))
    }

    /// The file with the log of a failing start.
    pub(crate) fn dies_with_log(&self) -> Option<&Path> {
        self.faults.iter().find_map(|fault| match fault {
            Fault::DieSaying(path) => Some(path.as_path()),
            _ => None,
        })
    }

    pub(crate) fn extra_start(&self) -> Duration {
        self.fault(|fault| match fault {
            Fault::SlowStart(duration) => Some(*duration),
            _ => None,
        })
        .unwrap_or_default()
    }

    /// The value of the first fault that `pick` selects.
    pub(crate) fn fault<T>(&self, pick: impl Fn(&Fault) -> Option<T>) -> Option<T> {
        self.faults.iter().find_map(pick)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_of_the_kv_transfer_config_is_refused_as_vllm_does() {
        let error = KvTransferConfig::parse(r#"{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_rank":0}"#)
            .expect_err("unknown key");
        assert!(xpyd_base::report::one_line(&error).contains("kv_rank"));
        let error = KvTransferConfig::parse(r#"{"kv_connector":"NixlConnector"}"#).expect_err("no role");
        assert!(xpyd_base::report::one_line(&error).contains("kv_role"));
    }

    #[test]
    fn the_defaults_are_vllms() {
        let config = KvTransferConfig::parse(r#"{"kv_connector":"NixlConnector","kv_role":"kv_producer"}"#).unwrap();
        assert_eq!(config.kv_load_failure_policy, LoadFailurePolicy::Fail);
        assert_eq!(config.lease(), Duration::from_secs(30));
    }
}
