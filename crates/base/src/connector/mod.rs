//! Connectors: how KV moves from a prefill engine to a decode engine.
//!
//! A connector defines two things: what an engine needs at its launch ([`Connector::launch`]), and what the two legs of a
//! request carry ([`Connector::prefill_params`], [`Connector::read_handoff`], [`Connector::decode_flow`]). It is a closed
//! enum with one file per adapter. An unknown connector is an error, never a default.

mod kind;
pub mod lmcache;
pub mod lmcache_mp;
pub mod nixl;

use std::path::{Path, PathBuf};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::fleet::{Endpoint, Receiver, Role};

pub use kind::{ConnectorChoice, ConnectorKind};
pub use lmcache::{FirstToken, LmCache};
pub use lmcache_mp::{CachePorts, LmCacheMp};
pub use nixl::Nixl;

/// A connector with its options.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "name", rename_all = "lowercase")]
pub enum Connector {
    /// vLLM's `NixlConnector`: the decode engine pulls from the prefill engine.
    Nixl(Nixl),
    /// `LMCacheConnectorV1` with LMCache's PD backend: the prefill engine pushes, then notifies the proxy.
    #[serde(rename = "lmcache")]
    LmCache(LmCache),
    /// `MultiConnector` of NIXL pull and `LMCacheMPConnector`: NIXL moves KV from prefill to decode, LMCache caches it.
    #[serde(rename = "lmcache-mp")]
    LmCacheMp(LmCacheMp),
}

/// The device on which engines compute and keep their KV.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// NVIDIA GPUs, one or more per engine.
    #[default]
    Cuda,
    /// vLLM's CPU backend.
    Cpu,
}

impl Device {
    /// The name that vLLM and LMCache use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::Cpu => "cpu",
        }
    }
}

/// The facts about an engine from which its connector makes launch arguments.
#[derive(Debug)]
pub struct LaunchContext<'plan> {
    /// The engine's role.
    pub role: Role,
    /// Its number within the role, from 0.
    pub index: usize,
    /// The device with its KV.
    pub device: Device,
    /// The host on which its side channels listen.
    pub host: &'plan str,
    /// The port of the NIXL side channel, if this connector has one.
    pub side_channel_port: Option<u16>,
    /// Its LMCache receiver, if it is a decode engine of that connector.
    pub receiver: Option<&'plan Receiver>,
    /// The ports of its cache server, if this connector has one.
    pub cache: Option<CachePorts>,
    /// The address on which the proxy receives LMCache's notifications.
    pub notify: Option<(&'plan str, u16)>,
    /// Longest prompt plus answer, in tokens, if the profile sets it.
    pub max_model_len: Option<u32>,
    /// NIXL: how long a prefill engine keeps KV for a decode engine.
    pub kv_lease: Duration,
    /// LMCache: how long a decode engine waits for its worker to report which KV has arrived.
    pub lookup_deadline: Duration,
    /// Whether a decode engine must fail a request whose KV did not arrive.
    pub strict: bool,
    /// The run's folder, for variables with the path of a rendered file.
    pub run_dir: &'plan Path,
}

/// The arguments, variables and files that a connector adds to an engine's launch.
#[derive(Debug, Default)]
pub struct Launch {
    /// The value of `--kv-transfer-config`.
    pub kv_transfer_config: serde_json::Value,
    /// Additional arguments.
    pub arguments: Vec<String>,
    /// Environment variables.
    pub env: Vec<(String, String)>,
    /// A file to write: path relative to the run's folder, and content.
    pub file: Option<(PathBuf, String)>,
    /// The content of that file without the receiver's ports, if every start of an engine needs new ones.
    /// [`with_receiver_ports`] fills them in.
    pub receiver_template: Option<String>,
    /// A server that the engine needs.
    pub sidecar: Option<Sidecar>,
}

/// A server for one engine. It starts before the engine, and the engine ends with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sidecar {
    /// The name of its program, in the folder of the engine's program.
    pub program: &'static str,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// The port on which it listens when it is ready.
    pub port: u16,
}

/// The content of a decode engine's file from [`Launch::receiver_template`].
pub fn with_receiver_ports(template: &str, receiver: &Receiver) -> String {
    lmcache::with_ports(template, receiver)
}

/// The result of the prefill leg that the decode leg of the same request needs. Not `Clone`: KV can be fetched once, and
/// only for its own prompt. Used twice, vLLM answers 200 with another prompt's text.
#[derive(Debug)]
pub enum Handoff {
    /// Parameters with which the decode engine pulls, in the prefill engine's own bytes.
    Pull(Box<RawValue>),
    /// The prefill engine has pushed the KV to the decode engine, which finds it by the prompt.
    Pushed,
    /// As `Pushed`, with the first token.
    PushedWithFirstToken(u32),
}

/// How the request of the decode leg is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodeFlow {
    /// The client's own body, plus the parameters of the hand-off if there are any.
    Original,
    /// LMCache's reference flow: the prompt's tokens plus the first token, and one token less to generate.
    TokenSplice,
}

/// Why a prefill engine's answer has no usable hand-off.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HandoffError {
    /// The answer is not a JSON object.
    #[error("the prefill answer is not a JSON object")]
    NotJson,
    /// The field `kv_transfer_params` is absent or null.
    #[error("the prefill answer has no `kv_transfer_params`")]
    Missing,
    /// A key of `kv_transfer_params` is absent or of the wrong type. It would kill the decode engine.
    #[error("`kv_transfer_params.{0}` of the prefill answer is missing or malformed")]
    Malformed(&'static str),
    /// The prefill engine runs in a mode that the decode leg does not expect.
    #[error("the prefill engine hands over in mode `{0}`, which this connector does not support")]
    Mode(String),
}

/// Why two engines cannot form a pair.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PairError {
    /// LMCache: the decode engine has no receiver.
    #[error("the decode engine has no LMCache receiver")]
    NoReceiver,
    /// LMCache: every rank of the prefill engine needs one port of each kind. With fewer, the engine hangs forever.
    #[error("the prefill engine has {ranks} ranks, the receiver {init} init and {alloc} alloc ports")]
    Ports {
        /// Ranks of the prefill engine.
        ranks: usize,
        /// Handshake ports of the receiver.
        init: usize,
        /// Allocation ports of the receiver.
        alloc: usize,
    },
}

/// The unit of a counter of transferred KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransferUnit {
    /// Bytes.
    Bytes,
    /// Prompt tokens.
    Tokens,
}

/// A counter of a decode engine that grows when KV arrives from a prefill engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransferCounter {
    /// Its Prometheus name, without `_total`, which only some versions append.
    pub name: &'static str,
    /// The label pair that the sample must have, as in the exposition format: `source="external_kv_transfer"`.
    pub label: Option<&'static str>,
    /// The unit that it counts.
    pub unit: TransferUnit,
}

/// The KV bytes that NIXL has read in finished transfers.
const NIXL_BYTES: TransferCounter = TransferCounter {
    name: "vllm:nixl_bytes_transferred_sum",
    label: None,
    unit: TransferUnit::Bytes,
};
/// Prompt tokens whose KV came through any connector.
const EXTERNAL_HITS: TransferCounter = TransferCounter {
    name: "vllm:external_prefix_cache_hits",
    label: None,
    unit: TransferUnit::Tokens,
};
/// The same, in newer versions.
const EXTERNAL_SOURCE: TransferCounter = TransferCounter {
    name: "vllm:prompt_tokens_by_source",
    label: Some("source=\"external_kv_transfer\""),
    unit: TransferUnit::Tokens,
};

impl Connector {
    /// The connector without its options.
    pub fn kind(&self) -> ConnectorKind {
        match self {
            Self::Nixl(_) => ConnectorKind::Nixl,
            Self::LmCache(_) => ConnectorKind::LmCache,
            Self::LmCacheMp(_) => ConnectorKind::LmCacheMp,
        }
    }

    /// The name in profiles and on the command line.
    pub fn name(&self) -> &'static str {
        self.kind().name()
    }

    /// The arguments, variables and files that the connector adds to an engine's launch.
    pub fn launch(&self, context: &LaunchContext<'_>) -> Launch {
        match self {
            Self::Nixl(nixl) => nixl.launch(context),
            Self::LmCache(lmcache) => lmcache.launch(context),
            Self::LmCacheMp(lmcache) => lmcache.launch(context),
        }
    }

    /// The value of `kv_transfer_params` on the prefill leg, as JSON text.
    ///
    /// `request_id` must be unique over all proxies and restarts. `decoder` is the engine of the decode leg.
    pub fn prefill_params(&self, request_id: &str, decoder: &Endpoint) -> String {
        match self {
            Self::Nixl(nixl) | Self::LmCacheMp(LmCacheMp { nixl, .. }) => nixl.prefill_params(),
            Self::LmCache(lmcache) => lmcache.prefill_params(request_id, decoder),
        }
    }

    /// The value of `kv_transfer_params` on the decode leg if the hand-off itself has none, as JSON text.
    pub fn decode_params(&self, request_id: &str) -> Option<String> {
        match self {
            Self::Nixl(_) | Self::LmCacheMp(_) => None,
            Self::LmCache(lmcache) => Some(lmcache.decode_params(request_id)),
        }
    }

    /// Checks that `prefill` can hand over to `decode`. A wrong pair can block the prefill engine forever.
    ///
    /// # Errors
    /// The mismatch between the two engines.
    pub fn check_pair(&self, prefill: &Endpoint, decode: &Endpoint) -> Result<(), PairError> {
        match self {
            Self::Nixl(_) | Self::LmCacheMp(_) => Ok(()),
            Self::LmCache(lmcache) => lmcache.check_pair(prefill, decode),
        }
    }

    /// The decode engine's counters that prove a KV transfer, the strongest proof first (names of vLLM 0.32.0).
    pub fn transfer_counters(&self) -> &'static [TransferCounter] {
        match self {
            Self::Nixl(_) => &[NIXL_BYTES, EXTERNAL_SOURCE, EXTERNAL_HITS],
            Self::LmCache(_) => &[EXTERNAL_SOURCE, EXTERNAL_HITS],
            // The other counters also grow with KV from the engine's own cache server.
            Self::LmCacheMp(_) => &[NIXL_BYTES],
        }
    }

    /// Whether a hand-off is complete only after LMCache's notifications, one per rank.
    pub fn notifies(&self) -> bool {
        match self {
            Self::Nixl(_) | Self::LmCacheMp(_) => false,
            Self::LmCache(_) => true,
        }
    }

    /// Reads the hand-off from the prefill engine's whole answer.
    ///
    /// # Errors
    /// When the answer has no hand-off, or one that must not reach a decode engine.
    pub fn read_handoff(&self, prefill_answer: &[u8]) -> Result<Handoff, HandoffError> {
        match self {
            Self::Nixl(nixl) | Self::LmCacheMp(LmCacheMp { nixl, .. }) => nixl.read_handoff(prefill_answer),
            Self::LmCache(lmcache) => lmcache.read_handoff(prefill_answer),
        }
    }

    /// How the request of the decode leg is made.
    pub fn decode_flow(&self) -> DecodeFlow {
        match self {
            Self::LmCache(LmCache {
                first_token: FirstToken::Prefiller,
                ..
            }) => DecodeFlow::TokenSplice,
            Self::Nixl(_) | Self::LmCache(_) | Self::LmCacheMp(_) => DecodeFlow::Original,
        }
    }
}

/// The `kv_transfer_params` of an answer, in their own bytes. `None` if absent or null.
fn answer_params(prefill_answer: &[u8]) -> Result<Option<Box<RawValue>>, HandoffError> {
    #[derive(serde::Deserialize)]
    struct Answer {
        kv_transfer_params: Option<Box<RawValue>>,
    }
    serde_json::from_slice::<Answer>(prefill_answer)
        .map(|answer| answer.kv_transfer_params)
        .map_err(|_| HandoffError::NotJson)
}
