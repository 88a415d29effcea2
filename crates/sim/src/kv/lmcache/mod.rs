//! LMCache PD in async mode, as in `LMCacheConnectorV1`: its configuration file, the keys of chunks, and the two sides.

pub(crate) mod receiver;
pub(crate) mod sender;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_yaml_ng::Value;

use crate::engine_core::tokens::mix;

/// The settings that a simulated engine uses from LMCache's file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Config {
    pub(crate) chunk_size: usize,
    /// `None` if PD is off: nothing is transferred.
    pub(crate) role: Option<Role>,
    pub(crate) buffer_size: u64,
    pub(crate) peer_host: String,
    pub(crate) init_ports: Vec<u16>,
    pub(crate) alloc_ports: Vec<u16>,
    pub(crate) proxy: (String, u16),
    /// Time limit of an allocation; LMCache's default is unlimited.
    pub(crate) allocation_timeout: Duration,
    /// Sync mode accepts requests without a receiver.
    pub(crate) sync: bool,
    /// Salt of chunk keys: it must be equal on both engines.
    pub(crate) hash_salt: u64,
    /// Unknown keys, which LMCache drops.
    pub(crate) unknown: Vec<String>,
}

/// `pd_role`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Sender,
    Receiver,
}

/// Why LMCache cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read `{0}`")]
    Read(PathBuf, #[source] std::io::Error),
    /// The file is not a YAML mapping.
    #[error("`{0}` is not a YAML mapping")]
    Yaml(PathBuf, #[source] serde_yaml_ng::Error),
    /// A value that PD needs is missing or invalid.
    #[error("`{0}` is required for PD and missing or malformed")]
    Missing(&'static str),
}

/// The known keys of LMCache 0.5.6 (`lmcache/v1/config.py`). Any other is dropped with a warning, including the old
/// `nixl_*` and `enable_xpyd` names.
const KNOWN: &[&str] = &[
    "chunk_size",
    "local_cpu",
    "max_local_cpu_size",
    "local_disk",
    "max_local_disk_size",
    "remote_url",
    "remote_serde",
    "save_decode_cache",
    "save_unfull_chunk",
    "cache_policy",
    "enable_pd",
    "pd_role",
    "pd_buffer_size",
    "pd_buffer_device",
    "pd_peer_host",
    "pd_peer_init_port",
    "pd_peer_alloc_port",
    "pd_peer_query_port",
    "pd_proxy_host",
    "pd_proxy_port",
    "pd_allocation_timeout_sec",
    "lookup_timeout_ms",
    "pd_shutdown_timeout_sec",
    "pd_condition_poll_interval_sec",
    "pd_max_prefill_len",
    "pd_backend_mode",
    "pd_skip_proxy_notification",
    "pd_bidirectional",
    "transfer_channel",
    "nixl_backends",
    "nixl_buffer_size",
    "nixl_buffer_device",
    "pre_caching_hash_algorithm",
    "enable_p2p",
    "extra_config",
];

impl Config {
    /// Reads the file in `LMCACHE_CONFIG_FILE`. Without one, PD is off.
    pub(crate) fn load(file: Option<&Path>, hash_seed: Option<&str>) -> Result<Self, ConfigError> {
        let Some(file) = file else {
            return Self::parse(&serde_yaml_ng::Mapping::new(), hash_seed);
        };
        let text = fs_err::read_to_string(file).map_err(|error| ConfigError::Read(file.to_owned(), error))?;
        let values = serde_yaml_ng::from_str(&text).map_err(|error| ConfigError::Yaml(file.to_owned(), error))?;
        Self::parse(&values, hash_seed)
    }

    fn parse(values: &serde_yaml_ng::Mapping, hash_seed: Option<&str>) -> Result<Self, ConfigError> {
        let unknown = values
            .keys()
            .filter_map(Value::as_str)
            .filter(|key| !KNOWN.contains(key))
            .map(str::to_owned)
            .collect();
        let text = |key: &str| values.get(key).and_then(Value::as_str);
        let enabled = values.get("enable_pd").and_then(Value::as_bool).unwrap_or(false);
        let role = match (enabled, text("pd_role")) {
            (false, _) => None,
            (true, Some("sender")) => Some(Role::Sender),
            (true, Some("receiver")) => Some(Role::Receiver),
            (true, _) => return Err(ConfigError::Missing("pd_role")),
        };
        let mut config = Self {
            chunk_size: whole(values, "chunk_size")
                .and_then(|size| usize::try_from(size).ok())
                .filter(|size| *size > 0)
                .unwrap_or(256),
            role,
            buffer_size: 0,
            peer_host: text("pd_peer_host").unwrap_or_default().to_owned(),
            init_ports: ports(values, "pd_peer_init_port"),
            alloc_ports: ports(values, "pd_peer_alloc_port"),
            proxy: (text("pd_proxy_host").unwrap_or_default().to_owned(), 0),
            allocation_timeout: values
                .get("pd_allocation_timeout_sec")
                .and_then(Value::as_f64)
                .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
                .unwrap_or(FOR_EVER),
            sync: text("pd_backend_mode") == Some("sync"),
            hash_salt: hash_salt(text("pre_caching_hash_algorithm"), hash_seed),
            unknown,
        };
        let Some(role) = role else {
            return Ok(config);
        };
        config.buffer_size = whole(values, "pd_buffer_size").ok_or(ConfigError::Missing("pd_buffer_size"))?;
        text("pd_buffer_device").ok_or(ConfigError::Missing("pd_buffer_device"))?;
        match role {
            Role::Sender => {
                text("pd_proxy_host").ok_or(ConfigError::Missing("pd_proxy_host"))?;
                config.proxy.1 = whole(values, "pd_proxy_port")
                    .and_then(|port| u16::try_from(port).ok())
                    .ok_or(ConfigError::Missing("pd_proxy_port"))?;
            }
            Role::Receiver => {
                text("pd_peer_host").ok_or(ConfigError::Missing("pd_peer_host"))?;
                if config.init_ports.is_empty() {
                    return Err(ConfigError::Missing("pd_peer_init_port"));
                }
                if config.alloc_ports.is_empty() {
                    return Err(ConfigError::Missing("pd_peer_alloc_port"));
                }
            }
        }
        Ok(config)
    }

    /// The keys of the chunks of a prompt: each hash covers all tokens up to the end of its chunk.
    pub(crate) fn chunk_hashes(&self, tokens: &[u32]) -> Vec<u64> {
        let mut hash = self.hash_salt;
        tokens
            .chunks(self.chunk_size)
            .map(|chunk| {
                hash = chunk.iter().fold(hash, |hash, token| mix(hash, u64::from(*token)));
                hash
            })
            .collect()
    }
}

/// Longer than any run, but within the range of clocks.
const FOR_EVER: Duration = Duration::from_hours(365 * 24);

/// `model@world_size@worker_id@chunk_hash@dtype` and the request's tags, as LMCache writes it.
pub(crate) fn key(model: &str, world_size: usize, rank: usize, hash: u64, tag: &str) -> String {
    format!("{model}@{world_size}@{rank}@{hash:x}@bfloat16{tag}")
}

fn whole(values: &serde_yaml_ng::Mapping, key: &str) -> Option<u64> {
    let value = values.get(key)?;
    value.as_u64().or_else(|| {
        // Sizes are often written as `1e9`.
        let float = value.as_f64().filter(|float| *float >= 0.0)?;
        format!("{float:.0}").parse().ok()
    })
}

/// A list of ports; LMCache also accepts a single number.
fn ports(values: &serde_yaml_ng::Mapping, key: &str) -> Vec<u16> {
    let Some(value) = values.get(key) else {
        return Vec::new();
    };
    Vec::deserialize(value)
        .or_else(|_| u16::deserialize(value).map(|port| vec![port]))
        .unwrap_or_default()
}

/// Python's hash differs between processes unless `PYTHONHASHSEED` is set.
fn hash_salt(algorithm: Option<&str>, seed: Option<&str>) -> u64 {
    match (algorithm, seed) {
        (Some("sha256_cbor"), _) => 1,
        (_, Some(seed)) if seed != "random" => seed.bytes().fold(2, |hash, byte| mix(hash, u64::from(byte))),
        _ => rand::random(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(yaml: &str) -> Result<Config, ConfigError> {
        Config::parse(&serde_yaml_ng::from_str(yaml).unwrap(), None)
    }

    const DECODE: &str = include_str!("../../../../../configs/lmcache-decode.yaml");
    const PREFILL: &str = include_str!("../../../../../configs/lmcache-prefill.yaml");

    #[test]
    fn the_shipped_files_are_understood_to_the_last_key() {
        let decode = DECODE
            .replace("{{host}}", "127.0.0.1")
            .replace("{{init_ports}}", "[7300, 7301]")
            .replace("{{alloc_ports}}", "[7400, 7401]")
            .replace("{{buffer_bytes}}", "2147483648")
            .replace("{{device}}", "cuda");
        let decode = parse(&decode).unwrap();
        assert_eq!(decode.role, Some(Role::Receiver));
        assert_eq!(
            (decode.init_ports, decode.alloc_ports),
            (vec![7300, 7301], vec![7400, 7401])
        );
        let prefill = PREFILL
            .replace("{{notify_host}}", "127.0.0.1")
            .replace("{{notify_port}}", "7500")
            .replace("{{buffer_bytes}}", "1073741824")
            .replace("{{device}}", "cuda");
        let prefill = parse(&prefill).unwrap();
        assert_eq!((prefill.role, prefill.proxy.1), (Some(Role::Sender), 7500));
        assert_eq!(prefill.allocation_timeout, Duration::from_mins(1));
        assert!(prefill.unknown.is_empty() && decode.unknown.is_empty());
        assert_eq!(prefill.hash_salt, decode.hash_salt);
    }

    #[test]
    fn the_old_names_are_dropped_so_that_pd_stays_off() {
        let old =
            parse("enable_xpyd: true\nnixl_role: sender\nnixl_proxy_host: localhost\nnixl_proxy_port: 7500").unwrap();
        assert_eq!(old.role, None);
        assert_eq!(old.unknown.len(), 4);
    }

    #[test]
    fn pd_without_what_it_needs_does_not_start() {
        let error =
            parse("enable_pd: true\npd_role: receiver\npd_buffer_size: 1e9\npd_buffer_device: cpu\npd_peer_host: h");
        assert_eq!(
            error.expect_err("no ports").to_string(),
            "`pd_peer_init_port` is required for PD and missing or malformed"
        );
    }

    #[test]
    fn engines_agree_on_keys_by_algorithm_or_by_seed_only() {
        assert_eq!(
            hash_salt(Some("sha256_cbor"), None),
            hash_salt(Some("sha256_cbor"), Some("3"))
        );
        assert_eq!(hash_salt(None, Some("0")), hash_salt(None, Some("0")));
        assert_ne!(hash_salt(None, None), hash_salt(None, None));
    }
}
