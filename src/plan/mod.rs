//! The plan: everything about a run, decided before anything runs.
//!
//! A [`Plan`] is a value with every port, GPU, argument, variable and file of the run. Two functions of this module change
//! it later: [`grow()`] adds engines for `xpyd scale`, and [`respawn()`] moves a restarted LMCache receiver to new ports.

mod build;
mod choose_connector;
mod engine_options;
mod fetch;
mod gpus;
mod grow;
mod nodes;
mod placement;
mod redact;
mod reserved;
mod respawn;
mod start_key;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::connector::Connector;
use crate::engine::{EngineKind, vllm};
use crate::fleet::{Endpoint, EngineId, LogLimits, Role};
use crate::proxy_config::{ProxyConfig, RequestDeadlines};
use crate::slurm::Node;

pub use build::{PlanError, build};
pub use fetch::{ModelFetch, revision, shared_env};
pub use gpus::memory_share;
pub use grow::{Growth, grow};
pub use redact::{redacted_argv, redacted_env, without_secrets};
pub use reserved::ReservedOption;
pub use respawn::{fresh_ports_needed, respawn};
pub use start_key::start_key;

pub use crate::profile::{RestartPolicy, RestartWhen};

/// All decisions about one run.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// The name or path of the profile.
    pub profile: String,
    /// The program that serves the model.
    pub engine: EngineKind,
    /// The version of vLLM, if it is known and serves the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vllm: Option<String>,
    /// The model, as given to the engines.
    pub model: String,
    /// The model that xpyd downloads before any engine starts, unless it is cached; `None` if engines download it
    /// themselves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fetch: Option<ModelFetch>,
    /// The model name that clients use.
    pub served_model_name: String,
    /// How KV moves from prefill to decode.
    pub connector: Connector,
    /// The reason for this connector, in one sentence.
    pub connector_reason: String,
    /// The engines: prefill first, then decode, each role in number order.
    pub engines: Vec<EngineSpec>,
    /// The proxy, with its configuration.
    pub proxy: ProxyPlan,
    /// The rules for restarting engines that failed.
    pub restart: RestartPolicy,
    /// How long engines wait for the next xpyd if this one disappears; `None`: the default of how the run was started.
    pub keep: Option<Duration>,
    /// The folder of the run, with logs, rendered files and the `spawn.json` of each engine.
    pub run_dir: PathBuf,
    /// Notes for the user that do not stop the run.
    pub notes: Vec<String>,
    /// Whether the profile names the GPUs of all engines.
    #[serde(skip)]
    pub names_gpus: bool,
    /// Options and variables in the profile that xpyd sets itself.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub objections: Vec<ReservedOption>,
}

/// One engine, ready to be spawned. An xpyd that attaches later reads it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineSpec {
    /// The engine's name.
    pub id: EngineId,
    /// The engine's role.
    pub role: Role,
    /// The node on which it runs; `None` for this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Node>,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Variables on top of xpyd's own environment.
    pub env: BTreeMap<String, String>,
    /// Indices of its GPUs in rank order; MIG slices have numbers of their own. Empty on a CPU and with the simulated
    /// engine.
    pub gpus: Vec<u32>,
    /// UUIDs of its GPUs, `GPU-…` or `MIG-…`; empty if NVML did not report them.
    #[serde(default)]
    pub gpu_uuids: Vec<String>,
    /// The address of its HTTP server, and its number of ranks.
    pub endpoint: Endpoint,
    /// Every port on which it listens, the HTTP port included.
    pub ports: Vec<PortUse>,
    /// The path that answers 200 when the engine is ready: `/health`.
    pub ready_path: String,
    /// Time limit from spawn to ready.
    pub ready_deadline: Duration,
    /// Time limit for a start that writes no log, uses no CPU and reads nothing.
    pub start_stall: Duration,
    /// Time from SIGTERM until xpyd kills its process tree.
    pub stop_grace: Duration,
    /// Its log file, relative to the run's folder: `prefiller1.log`.
    pub log_file: PathBuf,
    /// Limits on its log files.
    pub log_limits: LogLimits,
    /// How to detect that it hangs.
    pub liveness: Liveness,
    /// The file that the engine reads when it starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<EngineFile>,
}

/// How to detect that an engine hangs: it has running requests, but no counter grows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Liveness {
    /// The path of its Prometheus metrics.
    pub path: String,
    /// Name of the sample with the number of running requests.
    pub running: String,
    /// Names of the counters that grow with progress.
    pub counters: Vec<String>,
    /// The time without progress after which the engine hangs.
    pub stall: Duration,
    /// Name of the sample that counts KV leases that expired unused.
    #[serde(default)]
    pub expired_leases: String,
    /// Name of the sample that counts reads of KV after its lease.
    #[serde(default)]
    pub late_reads: String,
}

/// A port of the plan, and its purpose.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PortUse {
    /// The port number.
    pub port: u16,
    /// The purpose, for people: `http`, `nixl side channel`, `lmcache init, rank 0`.
    pub purpose: String,
}

/// The proxy, ready to be started.
#[derive(Debug, Clone, Serialize)]
pub struct ProxyPlan {
    /// The proxy's configuration, with the port on which it listens.
    #[serde(flatten)]
    pub config: ProxyConfig,
    /// Address on which the proxy receives LMCache's notifications; `None` for other connectors.
    pub notify: Option<(String, u16)>,
    /// Number of notifications per prefill; `None` means one per tensor-parallel rank.
    pub notifications: Option<u16>,
    /// How long requests in flight can continue after the first Ctrl+C.
    pub drain_deadline: Duration,
    /// Time limits of one request.
    pub deadlines: RequestDeadlines,
}

impl Plan {
    /// The files to write into the run's folder, in the order of the engines.
    pub fn files(&self) -> impl Iterator<Item = &EngineFile> {
        self.engines.iter().filter_map(|engine| engine.file.as_ref())
    }
}

/// A file to write into the run's folder before its engine starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineFile {
    /// Path relative to the run's folder.
    pub path: PathBuf,
    /// The whole content.
    pub content: String,
    /// The content without the ports of the engine's receiver, for [`respawn()`]; `None` if it names none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
}

/// Two engines have different API keys, so no request can pass through both.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} and {} have no API key in common, but each request needs both engines", engines.0, engines.1)]
pub struct NoCommonKey {
    /// The names of the two engines.
    pub engines: (EngineId, EngineId),
}

impl Plan {
    /// The engines of one role, in number order.
    pub fn engines_of(&self, role: Role) -> impl Iterator<Item = &EngineSpec> {
        self.engines.iter().filter(move |engine| engine.role == role)
    }

    /// Every port of the run with its owner, in port order. The proxy's ports are included.
    pub fn ports(&self) -> Vec<(u16, String)> {
        self.ports_of(|_| true)
    }

    /// The same, without engines on other nodes.
    pub fn ports_here(&self) -> Vec<(u16, String)> {
        self.ports_of(|engine| engine.node.is_none())
    }

    fn ports_of(&self, counts: impl Fn(&EngineSpec) -> bool) -> Vec<(u16, String)> {
        let mut ports = vec![(self.proxy.config.port, "proxy http".to_owned())];
        ports.extend(
            self.proxy
                .notify
                .iter()
                .map(|(_, port)| (*port, "proxy lmcache notifications".to_owned())),
        );
        for engine in self.engines.iter().filter(|engine| counts(engine)) {
            ports.extend(
                engine
                    .ports
                    .iter()
                    .map(|using| (using.port, format!("{} {}", engine.id, using.purpose))),
            );
        }
        ports.sort();
        ports
    }

    /// An API key that every engine with a key accepts. `inherited` is the value of the engines' variable in xpyd's own
    /// environment, which engines inherit.
    ///
    /// # Errors
    /// When two engines have no key in common.
    pub fn engine_key<'plan>(&'plan self, inherited: Option<&'plan str>) -> Result<Option<&'plan str>, NoCommonKey> {
        let keys = self.engines.iter().map(|engine| {
            let own = engine.env.get(vllm::API_KEY_VARIABLE).map(String::as_str);
            (&engine.id, vllm::api_keys(&engine.argv, own.or(inherited)))
        });
        let mut common: Option<(&EngineId, Vec<&str>)> = None;
        for (id, keys) in keys.filter(|(_, keys)| !keys.is_empty()) {
            common = match common {
                None => Some((id, keys)),
                Some((first, mut common)) => {
                    common.retain(|key| keys.contains(key));
                    if common.is_empty() {
                        return Err(NoCommonKey {
                            engines: (first.clone(), id.clone()),
                        });
                    }
                    Some((first, common))
                }
            };
        }
        Ok(common.and_then(|(_, keys)| keys.first().copied()))
    }

    /// Roles with an engine that accepts requests without a key, unless the user has set an empty key for it.
    pub fn roles_without_key(&self, inherited: Option<&str>) -> Vec<Role> {
        let is_open = |engine: &&EngineSpec| {
            let own = engine.env.get(vllm::API_KEY_VARIABLE).map(String::as_str);
            own.is_none() && vllm::api_keys(&engine.argv, inherited).is_empty()
        };
        let roles = [Role::Prefill, Role::Decode].into_iter();
        roles
            .filter(|role| self.engines_of(*role).any(|engine| is_open(&engine)))
            .collect()
    }

    /// Number of GPUs that the plan needs.
    pub fn gpus_needed(&self) -> usize {
        self.engines.iter().map(|engine| engine.gpus.len()).sum()
    }
}
