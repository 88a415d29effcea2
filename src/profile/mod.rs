//! Profiles: what the user wants, in TOML, before any fact about the machine is known.
//!
//! A profile is a stack of layers (a shipped profile, the user's file, `--set` overrides, flags). Each layer is checked on
//! its own, so that an error points at the line where it was written; then the layers are merged, later ones winning, and
//! [`Profile`] gets the defaults of `file`.

mod adopt;
mod file;
mod keys;
mod layers;
mod ranges;

use std::collections::BTreeMap;
use std::time::Duration;

use crate::connector::FirstToken;
use crate::engine::{EngineKind, arguments};
use crate::fleet::LogLimits;
use crate::service::Service;

pub use file::parse_bytes;
pub use layers::{Override, ProfileError, load, load_with, resolved, shipped, shipped_names, text};

/// What the user wants, complete and checked. Nothing in it depends on the machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// Name of a shipped profile, or the path of the user's file.
    pub name: String,
    /// One sentence for `xpyd profiles list`.
    pub description: String,
    /// Model path or Hugging Face repository.
    pub model: String,
    /// Name under which clients ask for it.
    pub served_model_name: String,
    /// The program that serves it.
    pub engine: EngineKind,
    /// How KV moves, or `auto`.
    pub connector: ConnectorChoice,
    /// Take a connector that the plan would refuse.
    pub force_connector: bool,
    /// Where the engines compute.
    pub device: DeviceChoice,
    /// Added to every port of the profile, so that several fleets fit on one machine.
    pub port_offset: u16,
    /// The prefill engines.
    pub prefill: RoleProfile,
    /// The decode engines.
    pub decode: RoleProfile,
    /// What is special to vLLM.
    pub vllm: VllmProfile,
    /// What is special to the simulated engine.
    pub sim: SimProfile,
    /// What is special to NIXL.
    pub nixl: NixlProfile,
    /// What is special to LMCache.
    pub lmcache: LmCacheProfile,
    /// What is special to LMCache MP.
    pub lmcache_mp: LmCacheMpProfile,
    /// The proxy.
    pub proxy: ProxyProfile,
    /// How long things may take.
    pub deadlines: Deadlines,
    /// Which engines that ended are started again.
    pub restart: RestartPolicy,
    /// How much of each engine's output is kept.
    pub logs: LogLimits,
}

/// How KV moves, as the user asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConnectorChoice {
    /// LMCache where the installed versions make it safe, else NIXL.
    Auto,
    /// NIXL pull.
    Nixl,
    /// LMCache PD.
    LmCache,
    /// NIXL pull, and a cache server for each engine.
    #[serde(rename = "lmcache-mp")]
    LmCacheMp,
}

/// Where engines compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// NVIDIA GPUs, one or more per engine.
    Cuda,
    /// vLLM's CPU backend; no GPU is looked for.
    Cpu,
}

/// The engines of one role.
#[derive(Debug, Clone, PartialEq)]
pub struct RoleProfile {
    /// How many, at least 1.
    pub count: u16,
    /// HTTP port of the first; the nth listens on `port + n - 1`.
    pub port: u16,
    /// GPUs, and ranks, per engine.
    pub tensor_parallel: u16,
    /// GPU indices for all engines of the role, in order; empty lets the plan choose.
    pub gpus: Vec<u32>,
    /// The part of each GPU's memory that an engine may use, 0 to 1; that of `vllm` when absent.
    pub gpu_memory_utilization: Option<f64>,
    /// More arguments to the engine.
    pub args: Vec<String>,
    /// More variables.
    pub env: BTreeMap<String, String>,
}

/// Over how many ranks an engine is spread, each of which has a GPU of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranks {
    /// Tensor-parallel ones.
    pub tensor: u16,
    /// Pipeline stages.
    pub pipeline: u16,
    /// Context-parallel ones of a prefill.
    pub context: u16,
    /// Data-parallel ones: each is a whole engine of its own.
    pub data: u16,
}

impl Ranks {
    /// All of them, as vLLM counts (`config/parallel.py`).
    pub fn total(self) -> usize {
        let all = [self.tensor, self.pipeline, self.context, self.data];
        all.iter().map(|&ranks| usize::from(ranks)).product()
    }
}

impl Profile {
    /// The ranks of each engine of a role. What the profile has no key for is read from the arguments.
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

    /// The value of an option among the arguments; those of the role come after those of all engines.
    pub fn argument<'profile>(&'profile self, role: &'profile RoleProfile, name: &str) -> Option<&'profile str> {
        arguments::value(&role.args, name).or_else(|| arguments::value(&self.vllm.args, name))
    }
}

/// What is special to vLLM, for engines of both roles.
#[derive(Debug, Clone, PartialEq)]
pub struct VllmProfile {
    /// The `vllm` program: a name on PATH or a path.
    pub program: String,
    /// Longest prompt plus answer, in tokens; the model's own limit when absent.
    pub max_model_len: Option<u32>,
    /// The part of each GPU's memory that an engine may use, 0 to 1; vLLM's own default when absent.
    pub gpu_memory_utilization: Option<f64>,
    /// More arguments.
    pub args: Vec<String>,
    /// More variables.
    pub env: BTreeMap<String, String>,
}

/// What is special to the simulated engine.
#[derive(Debug, Clone, PartialEq)]
pub struct SimProfile {
    /// The timing preset.
    pub preset: String,
    /// Longest prompt plus answer, in tokens, when `vllm.max_model_len` is absent.
    pub max_model_len: u32,
    /// Faults of every engine, as `xpyd sim --fault` takes them.
    pub faults: Vec<String>,
}

/// What is special to NIXL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NixlProfile {
    /// Side channel port of the first prefill engine; one per engine.
    pub prefill_side_channel_port: u16,
    /// Side channel port of the first decode engine; one per engine.
    pub decode_side_channel_port: u16,
    /// How long a prefill engine keeps KV for a decode engine; [`Deadlines::kv_lease`] when absent, and never shorter.
    pub lease: Option<Duration>,
}

/// What is special to LMCache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LmCacheProfile {
    /// Who makes the first token.
    pub first_token: FirstToken,
    /// First init port; one per decode engine and rank.
    pub init_port: u16,
    /// First allocation port; one per decode engine and rank.
    pub alloc_port: u16,
    /// Where the proxy takes notifications.
    pub notify_port: u16,
    /// Send buffer of a prefill engine, in bytes.
    pub prefill_buffer_bytes: u64,
    /// Receive buffer of a decode engine, in bytes.
    pub decode_buffer_bytes: u64,
    /// Notifications per prefill; absent means one per rank. Models with MLA send one.
    pub notifications: Option<u16>,
}

/// What is special to LMCache MP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LmCacheMpProfile {
    /// Request port of the first engine's cache server; one per engine.
    pub port: u16,
    /// HTTP port of the first engine's cache server; one per engine.
    pub http_port: u16,
    /// The memory of each cache server, in bytes.
    pub l1_bytes: u64,
}

/// The proxy, as the user wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyProfile {
    /// Address to listen on.
    pub host: String,
    /// Port to listen on.
    pub port: u16,
    /// Whether the port is meant as it is: `port_offset` does not move it.
    pub port_is_exact: bool,
    /// Whether requests that share the session header's value share their engines.
    pub bind_sessions: bool,
    /// The session header.
    pub session_header: String,
    /// Largest request body, in bytes.
    pub max_body_bytes: usize,
    /// Most requests at once.
    pub max_in_flight: usize,
    /// How clients are served.
    pub service: Service,
}

/// How long things may take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deadlines {
    /// From an engine's spawn to its `/health`.
    pub ready: Duration,
    /// For a start that logs nothing, computes nothing and reads nothing. Not 0.
    pub start_stall: Duration,
    /// For requests in flight after the first Ctrl+C.
    pub drain: Duration,
    /// From SIGTERM to SIGKILL of an engine that served.
    pub stop: Duration,
    /// One prefill leg.
    pub prefill: Duration,
    /// From the prefill's answer to the KV's arrival.
    pub handoff: Duration,
    /// Between two reads of a decode leg.
    pub decode_idle: Duration,
    /// For an engine with running requests that makes no token.
    pub stall: Duration,
    /// For engines whose xpyd was killed, until the next one attaches; zero ends them with it. `None` leaves it to how the
    /// run was started.
    pub keep: Option<Duration>,
}

/// How long a hung engine can stay alive after `stall`: one more look at its metrics, and the report of what it was doing.
const TO_END_A_HANG: Duration = Duration::from_mins(1);

impl Deadlines {
    /// The shortest lease on KV under which no decode engine can read blocks that are no longer its own: it outlives
    /// both legs of a request, whatever stands still meanwhile.
    ///
    /// vLLM 0.32 renews a lease by heartbeats of the decode engine, every sixth of it, to two thirds of it. A decode
    /// engine that stops at the worst moment leaves half of it, and that half outlives the time until xpyd ends the
    /// engine.
    pub fn kv_lease(&self) -> Duration {
        let both_legs = self.prefill + self.decode_idle + TO_END_A_HANG;
        let lease = both_legs.max((self.stall + TO_END_A_HANG) * 2);
        // vLLM counts in whole seconds.
        Duration::from_secs(lease.as_secs() + u64::from(lease.subsec_nanos() > 0))
    }

    /// How long LMCache's scheduler half waits for its worker half. A worker that stands still for longer is ended as hung, so
    /// a prompt is not computed again because a busy machine was late.
    pub fn lookup(&self) -> Duration {
        self.stall + TO_END_A_HANG
    }
}

/// Which engines that ended unasked are started again, and when. It holds once an engine has been ready; a failure
/// before the fleet is ready ends the run.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct RestartPolicy {
    /// After which failures.
    pub policy: RestartWhen,
    /// Restarts in a row, without a stable time in between, after which an engine is given up.
    pub max_restarts: u32,
    /// The wait before the first restart; each further one in a row waits twice as long, and up to a quarter more.
    pub backoff: Duration,
    /// The longest wait, before the quarter.
    pub max_backoff: Duration,
    /// An engine that was ready for so long is stable: its restarts are counted anew.
    pub stable_after: Duration,
}

/// After which failures an engine is started again. Every exit that nobody asked for is one, whatever its code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartWhen {
    /// After none.
    Never,
    /// After those that may not come back; a wrong flag would.
    OnFailure,
    /// After all.
    Always,
}

#[cfg(test)]
mod tests;
