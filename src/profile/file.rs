//! The TOML structure of a profile file, and its default values.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Deserializer};

use super::{
    Deadlines, LmCacheMpProfile, LmCacheProfile, NixlProfile, Profile, RestartPolicy, RoleProfile, SimProfile,
    VllmProfile,
};
use crate::connector::{ConnectorChoice, Device};
use crate::engine::EngineKind;
use crate::fleet::LogLimits;
use crate::proxy_config::ProxyConfig;
use crate::{byte_size, span};

/// A profile file. Each layer can leave out any key; [`File::resolve`] checks that the merged result is complete.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    /// Only `layers` reads it.
    #[serde(rename = "extends")]
    _extends: Option<String>,
    description: Option<String>,
    model: Option<String>,
    served_model_name: Option<String>,
    engine: Option<EngineKind>,
    connector: Option<ConnectorChoice>,
    force_connector: Option<bool>,
    device: Option<Device>,
    port_offset: Option<u16>,
    #[serde(default)]
    prefill: RoleTable,
    #[serde(default)]
    decode: RoleTable,
    #[serde(default)]
    vllm: VllmTable,
    #[serde(default)]
    sim: SimProfile,
    #[serde(default)]
    nixl: NixlProfile,
    #[serde(default)]
    lmcache: LmCacheProfile,
    #[serde(default)]
    lmcache_mp: LmCacheMpProfile,
    #[serde(default)]
    proxy: ProxyConfig,
    #[serde(default)]
    deadlines: Deadlines,
    #[serde(default)]
    restart: RestartPolicy,
    #[serde(default)]
    logs: LogsTable,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RoleTable {
    count: Option<u16>,
    port: Option<u16>,
    tensor_parallel: Option<u16>,
    #[serde(default)]
    gpus: Vec<u32>,
    gpu_memory_utilization: Option<MemoryFraction>,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: BTreeMap<String, EnvValue>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct VllmTable {
    program: Option<String>,
    max_model_len: Option<u32>,
    gpu_memory_utilization: Option<MemoryFraction>,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: BTreeMap<String, EnvValue>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct LogsTable {
    file_size: Option<ByteSize>,
    files: Option<u32>,
    age: Option<Span>,
}

/// The value of an environment variable: a string, or a number or `true` without quotes.
#[derive(Debug, Deserialize)]
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

/// A duration such as `"30s"` or `"1m 30s"`.
#[derive(Debug, Clone, Copy)]
struct Span(Duration);

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        span::deserialize(deserializer).map(Self)
    }
}

/// A fraction of a GPU's memory: above 0, at most 1.
#[derive(Debug, Clone, Copy)]
struct MemoryFraction(f64);

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

/// A number of bytes such as `"2GiB"` or `"512MiB"`.
#[derive(Debug, Clone, Copy)]
struct ByteSize(u64);

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        byte_size::deserialize(deserializer).map(Self)
    }
}

/// A required key that a complete profile lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MissingKey(pub(super) &'static str);

impl File {
    /// Fills in the defaults. The ports are those of LMCache's `disagg_prefill/xpyd` example.
    pub(super) fn resolve(self, name: &str) -> Result<Profile, MissingKey> {
        let model = self.model.ok_or(MissingKey("model"))?;
        Ok(Profile {
            name: name.to_owned(),
            description: self.description.unwrap_or_default(),
            served_model_name: self.served_model_name.unwrap_or_else(|| model.clone()),
            model,
            engine: self.engine.unwrap_or(EngineKind::Vllm),
            connector: self.connector.unwrap_or(ConnectorChoice::Auto),
            force_connector: self.force_connector.unwrap_or(false),
            device: self.device.unwrap_or(Device::Cuda),
            port_offset: self.port_offset.unwrap_or(0),
            prefill: self.prefill.resolve(7100),
            decode: self.decode.resolve(7200),
            vllm: VllmProfile {
                program: self.vllm.program.unwrap_or_else(|| "vllm".to_owned()),
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
            count: self.count.unwrap_or(1),
            port: self.port.unwrap_or(port),
            tensor_parallel: self.tensor_parallel.unwrap_or(1),
            gpus: self.gpus,
            gpu_memory_utilization: self.gpu_memory_utilization.map(|part| part.0),
            args: self.args,
            env: EnvValue::all(self.env),
        }
    }
}

impl LogsTable {
    fn resolve(self) -> LogLimits {
        let default = LogLimits::default();
        LogLimits {
            file_bytes: self.file_size.map_or(default.file_bytes, |bytes| bytes.0.max(1)),
            files: self.files.unwrap_or(default.files).max(2),
            age: self.age.map_or(default.age, |span| span.0),
        }
    }
}
