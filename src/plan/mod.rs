//! The plan: everything about a run, decided before anything runs.
//!
//! A [`Plan`] is a value with every port, GPU, argument, variable and file of the run. Two functions of this module change it
//! later: [`grow()`] adds engines for `xpyd scale`, and [`respawn()`] moves an LMCache receiver that starts again to new ports.

mod adopt;
mod build;
mod choose;
mod fetch;
mod gpus;
mod grow;
mod owned;
mod place;
mod redact;
mod respawn;
mod start_key;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::connector::Connector;
use crate::engine::{EngineKind, vllm};
use crate::fleet::{Endpoint, EngineId, LogLimits, Role};
use crate::service::Service;

pub use build::{PlanError, build};
pub use fetch::{ModelFetch, revision, shared_env};
pub use gpus::memory_share;
pub use grow::{Growth, grow};
pub use owned::Objection;
pub use redact::{redacted_argv, redacted_env, without_secrets};
pub use respawn::{fresh_ports_needed, respawn};
pub use start_key::start_key;

pub use crate::profile::{RestartPolicy, RestartWhen};

/// Everything decided about one run.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// The profile it was built from, by name or path.
    pub profile: String,
    /// The program that serves the model.
    pub engine: EngineKind,
    /// The version of vLLM, where it is known and serves the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vllm: Option<String>,
    /// The model, as given to the engines.
    pub model: String,
    /// What xpyd fetches before any engine starts, unless it is cached; `None` leaves that to the engines.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fetch: Option<ModelFetch>,
    /// The name clients use for it.
    pub served_model_name: String,
    /// How KV moves from prefill to decode.
    pub connector: Connector,
    /// Why that connector, in one sentence.
    pub connector_reason: String,
    /// Prefill engines first, each role in number order.
    pub engines: Vec<EngineSpec>,
    /// The proxy.
    pub proxy: ProxySpec,
    /// Which engines that ended are started again.
    pub restart: RestartPolicy,
    /// How long engines wait for the next xpyd should this one disappear; `None` leaves it to how the run was started.
    pub keep: Option<Duration>,
    /// The folder of the run: logs, rendered files, `spawn.json`s.
    pub run_dir: PathBuf,
    /// Things the user should know that do not stop the run.
    pub notes: Vec<String>,
    /// Whether the profile names the GPUs of all engines.
    #[serde(skip)]
    pub names_gpus: bool,
    /// What the profile gives engines although xpyd decides it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub objections: Vec<Objection>,
}

/// One engine, ready to be spawned. Whoever attaches to it reads this again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineSpec {
    /// Its name.
    pub id: EngineId,
    /// What it does.
    pub role: Role,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Variables set on top of xpyd's own environment.
    pub env: BTreeMap<String, String>,
    /// Indices of its GPUs, in rank order, with numbers of their own for MIG slices; empty on a CPU or with the simulated
    /// engine.
    pub gpus: Vec<u32>,
    /// Their UUIDs, `GPU-…` or `MIG-…`; empty where NVML did not tell them.
    #[serde(default)]
    pub gpu_uuids: Vec<String>,
    /// How to reach it.
    pub endpoint: Endpoint,
    /// Every port it will listen on, with what for, the HTTP port included.
    pub ports: Vec<PortUse>,
    /// The path whose 200 means that it is up: `/health`.
    pub ready_path: String,
    /// How long it may take from its spawn until it is healthy.
    pub ready_deadline: Duration,
    /// For how long a start may do nothing at all: log, compute or read.
    pub start_stall: Duration,
    /// How long it may take to leave after SIGTERM before its tree is killed.
    pub stop_grace: Duration,
    /// Its log file, relative to the run's folder: `prefiller1.log`.
    pub log_file: PathBuf,
    /// How much of its output is kept.
    pub log_limits: LogLimits,
    /// How to tell that it hangs.
    pub liveness: Liveness,
    /// The file that it reads when it starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<EngineFile>,
}

/// How to tell that an engine hangs: it has running requests, and none of its counters grows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Liveness {
    /// The path of its Prometheus metrics.
    pub path: String,
    /// The sample that counts running requests.
    pub running: String,
    /// Samples that count what it has done.
    pub counters: Vec<String>,
    /// For how long nothing may grow.
    pub stall: Duration,
    /// The sample that counts KV leases that ended unused.
    #[serde(default)]
    pub expired_leases: String,
    /// The sample that counts reads of KV after its lease.
    #[serde(default)]
    pub late_reads: String,
}

/// A port of the plan and what listens on it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PortUse {
    /// The port.
    pub port: u16,
    /// For people: `http`, `nixl side channel`, `lmcache init, rank 0`.
    pub purpose: String,
}

/// The proxy's part of the plan.
#[derive(Debug, Clone, Serialize)]
pub struct ProxySpec {
    /// Address to listen on.
    pub host: String,
    /// Port to listen on.
    pub port: u16,
    /// Where LMCache's prefill engines send their notifications, if the connector has any.
    pub notify: Option<(String, u16)>,
    /// Header whose value binds a session to its engines; `None` binds nothing.
    pub session_header: Option<String>,
    /// Notifications to wait for per prefill; `None` means one per tensor-parallel rank.
    pub notifications: Option<u16>,
    /// How long requests in flight may go on after the first Ctrl+C.
    pub drain_deadline: Duration,
    /// How long one prefill leg may take, from its first byte out to its whole answer.
    pub prefill_deadline: Duration,
    /// How long the KV may take to arrive after the prefill's answer.
    pub handoff_deadline: Duration,
    /// How long the decode leg may take to its first byte, and then between two reads.
    pub decode_idle_deadline: Duration,
    /// How long a prefill engine keeps KV for a decode engine; `None` where KV is pushed.
    pub kv_lease: Option<Duration>,
    /// Largest body of a client's request, in bytes.
    pub max_body_bytes: usize,
    /// Most requests in the proxy at once; one more is answered 503.
    pub max_in_flight: usize,
    /// How clients are served.
    pub service: Service,
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
    /// Relative to the run's folder.
    pub path: PathBuf,
    /// The whole content.
    pub content: String,
    /// The content without the ports of the engine's receiver, for [`respawn()`]; `None` if it names none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
}

/// Two engines whose API keys differ: no request could go through both.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} and {} have no API key in common, and a request must be let in by both", engines.0, engines.1)]
pub struct NoCommonKey {
    /// The two.
    pub engines: (EngineId, EngineId),
}

impl Plan {
    /// The engines of one role, in number order.
    pub fn engines_of(&self, role: Role) -> impl Iterator<Item = &EngineSpec> {
        self.engines.iter().filter(move |engine| engine.role == role)
    }

    /// Every port of the run with its owner, the proxy's included, in port order.
    pub fn ports(&self) -> Vec<(u16, String)> {
        let mut ports = vec![(self.proxy.port, "proxy http".to_owned())];
        ports.extend(
            self.proxy
                .notify
                .iter()
                .map(|(_, port)| (*port, "proxy lmcache notifications".to_owned())),
        );
        for engine in &self.engines {
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

    /// A key that lets a request in at every engine that wants one; `inherited` is the engines' variable in xpyd's own
    /// environment, which they get too.
    ///
    /// # Errors
    /// The two engines that have no key in common.
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

    /// Roles whose engines take requests from everyone, and were not told to by an empty key.
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

    /// GPUs that the plan needs.
    pub fn gpus_needed(&self) -> usize {
        self.engines.iter().map(|engine| engine.gpus.len()).sum()
    }
}
