//! Connectors: how KV moves from a prefill engine to a decode engine.
//!
//! A connector answers two kinds of questions: what an engine needs at its launch ([`Connector::launch`]), and what the
//! two legs of a request carry ([`Connector::prefill_params`], [`Connector::read_handoff`], [`Connector::decode_flow`]).
//! It is a closed enum with one file per adapter; an unknown connector is an error, never a default.

pub mod lmcache;
pub mod lmcache_mp;
pub mod nixl;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde_json::value::RawValue;

use crate::fleet::{Endpoint, Receiver, Role};

pub use lmcache::{FirstToken, LmCache};
pub use lmcache_mp::{CachePorts, LmCacheMp};
pub use nixl::Nixl;

/// How KV moves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "name", rename_all = "lowercase")]
pub enum Connector {
    /// vLLM's `NixlConnector`: the decode engine pulls from the prefill engine.
    Nixl(Nixl),
    /// `LMCacheConnectorV1` with LMCache's PD backend: the prefill engine pushes, then notifies the proxy.
    #[serde(rename = "lmcache")]
    LmCache(LmCache),
    /// `MultiConnector` of NIXL pull and `LMCacheMPConnector`: NIXL hands over, LMCache keeps.
    #[serde(rename = "lmcache-mp")]
    LmCacheMp(LmCacheMp),
}

/// Where an engine's KV lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// NVIDIA GPUs.
    Cuda,
    /// vLLM's CPU backend.
    Cpu,
}

impl Device {
    /// As vLLM and LMCache spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::Cpu => "cpu",
        }
    }
}

/// What is known of an engine when its connector is asked for launch arguments.
#[derive(Debug)]
pub struct LaunchContext<'plan> {
    /// The engine's role.
    pub role: Role,
    /// Its 0-based number within the role.
    pub index: usize,
    /// Where its KV lives.
    pub device: Device,
    /// Host that its side channels bind to and advertise.
    pub host: &'plan str,
    /// Port of the NIXL side channel, if this connector has one.
    pub side_channel_port: Option<u16>,
    /// Its LMCache receiver, if it is a decode engine of that connector.
    pub receiver: Option<&'plan Receiver>,
    /// The ports of its cache server, if this connector has one.
    pub cache: Option<CachePorts>,
    /// Where the proxy takes LMCache's notifications.
    pub notify: Option<(&'plan str, u16)>,
    /// Longest prompt plus answer, in tokens, if the profile says so.
    pub max_model_len: Option<u32>,
    /// NIXL: how long a prefill engine keeps KV for a decode engine.
    pub kv_lease: Duration,
    /// LMCache: how long a decode engine waits for its worker to say which KV has come.
    pub lookup_deadline: Duration,
    /// Whether a decode engine must fail where KV did not arrive.
    pub strict: bool,
    /// The run's folder, for variables that name a rendered file.
    pub run_dir: &'plan Path,
}

/// What a connector adds to an engine's launch.
#[derive(Debug, Default)]
pub struct Launch {
    /// The value of `--kv-transfer-config`.
    pub kv_transfer_config: serde_json::Value,
    /// More arguments.
    pub arguments: Vec<String>,
    /// Variables.
    pub env: Vec<(String, String)>,
    /// A file to write into the run's folder: path relative to it, and content.
    pub file: Option<(PathBuf, String)>,
    /// The content of that file with the receiver's ports left open, where every start of an engine needs new ones:
    /// [`with_receiver_ports`] closes it.
    pub receiver_template: Option<String>,
    /// A server that the engine cannot do without.
    pub sidecar: Option<Sidecar>,
}

/// A server of one engine's own, which is there before it starts, and without which it ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sidecar {
    /// The name of its program, which is beside the engine's.
    pub program: &'static str,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// The port on which it listens once the engine may start.
    pub port: u16,
}

/// The content of a decode engine's file from [`Launch::receiver_template`].
pub fn with_receiver_ports(template: &str, receiver: &Receiver) -> String {
    lmcache::with_ports(template, receiver)
}

/// What the prefill leg gave for the decode leg of the same request. Not `Clone`: KV can be fetched once, for exactly
/// the prompt that it was made of. Used twice, vLLM answers 200 with another prompt's text.
#[derive(Debug)]
pub enum Handoff {
    /// Parameters that the decode engine pulls with, in the prefill engine's own bytes.
    Pull(Box<RawValue>),
    /// The KV was pushed to the decode engine, which finds it by the prompt.
    Pushed,
    /// As `Pushed`, and the first token is known.
    PushedWithFirstToken(u32),
}

/// How the decode leg is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodeFlow {
    /// The client's own body, plus the hand-off's parameters if it has any.
    Original,
    /// LMCache's reference flow: prompt tokens plus the first token, one token less to generate.
    TokenSplice,
}

/// Why an answer of a prefill engine is no hand-off.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HandoffError {
    /// The answer is not a JSON object.
    #[error("the prefill answer is not a JSON object")]
    NotJson,
    /// The field `kv_transfer_params` is absent or null.
    #[error("the prefill answer has no `kv_transfer_params`")]
    Missing,
    /// A key of `kv_transfer_params` is absent or of the wrong kind. Sent on, it would kill the decode engine.
    #[error("`kv_transfer_params.{0}` of the prefill answer is missing or malformed")]
    Malformed(&'static str),
    /// The prefill engine runs in another mode than the decode leg expects.
    #[error("the prefill engine hands over in mode `{0}`, which this connector does not speak")]
    Mode(String),
}

/// Why two engines cannot hand over.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PairError {
    /// LMCache: the decode engine has no receiver.
    #[error("the decode engine has no LMCache receiver")]
    NoReceiver,
    /// LMCache: every rank of the prefill engine needs one port of each kind. With fewer, the engine hangs for good.
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

/// What a counter of transferred KV counts.
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
    /// The label pair that the sample must have, as in the exposition: `source="external_kv_transfer"`.
    pub label: Option<&'static str>,
    /// What it counts.
    pub unit: TransferUnit,
}

/// The KV bytes that NIXL has read, from finished transfers only.
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
/// The same, as newer versions count it.
const EXTERNAL_SOURCE: TransferCounter = TransferCounter {
    name: "vllm:prompt_tokens_by_source",
    label: Some("source=\"external_kv_transfer\""),
    unit: TransferUnit::Tokens,
};

impl Connector {
    /// Its name in profiles and on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Nixl(_) => "nixl",
            Self::LmCache(_) => "lmcache",
            Self::LmCacheMp(_) => "lmcache-mp",
        }
    }

    /// What the connector adds to the launch of an engine.
    pub fn launch(&self, context: &LaunchContext<'_>) -> Launch {
        match self {
            Self::Nixl(nixl) => nixl.launch(context),
            Self::LmCache(lmcache) => lmcache.launch(context),
            Self::LmCacheMp(lmcache) => lmcache.launch(context),
        }
    }

    /// The value of `kv_transfer_params` on the prefill leg, as JSON text.
    ///
    /// `request_id` must be unique over all proxies and restarts. `decoder` is the engine that will decode.
    pub fn prefill_params(&self, request_id: &str, decoder: &Endpoint) -> String {
        match self {
            Self::Nixl(nixl) | Self::LmCacheMp(LmCacheMp { nixl, .. }) => nixl.prefill_params(),
            Self::LmCache(lmcache) => lmcache.prefill_params(request_id, decoder),
        }
    }

    /// The value of `kv_transfer_params` on the decode leg where the hand-off itself gives none, as JSON text.
    pub fn decode_params(&self, request_id: &str) -> Option<String> {
        match self {
            Self::Nixl(_) | Self::LmCacheMp(_) => None,
            Self::LmCache(lmcache) => Some(lmcache.decode_params(request_id)),
        }
    }

    /// Whether `prefill` may be told to hand over to `decode`. A wrong pair can wedge the prefill engine for good.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check_pair(&self, prefill: &Endpoint, decode: &Endpoint) -> Result<(), PairError> {
        match self {
            Self::Nixl(_) | Self::LmCacheMp(_) => Ok(()),
            Self::LmCache(lmcache) => lmcache.check_pair(prefill, decode),
        }
    }

    /// The decode engine's counters that prove that KV moved, the strongest proof first (names of vLLM 0.32.0).
    pub fn transfer_counters(&self) -> &'static [TransferCounter] {
        match self {
            Self::Nixl(_) => &[NIXL_BYTES, EXTERNAL_SOURCE, EXTERNAL_HITS],
            Self::LmCache(_) => &[EXTERNAL_SOURCE, EXTERNAL_HITS],
            // The others grow with what comes from the engine's own cache server, too.
            Self::LmCacheMp(_) => &[NIXL_BYTES],
        }
    }

    /// Whether a hand-off is complete only when LMCache's notifications have come, one per rank.
    pub fn notifies(&self) -> bool {
        match self {
            Self::Nixl(_) | Self::LmCacheMp(_) => false,
            Self::LmCache(_) => true,
        }
    }

    /// Reads the hand-off out of the prefill engine's whole answer.
    ///
    /// # Errors
    /// When the answer holds none, or one that must not reach a decode engine.
    pub fn read_handoff(&self, prefill_answer: &[u8]) -> Result<Handoff, HandoffError> {
        match self {
            Self::Nixl(nixl) | Self::LmCacheMp(LmCacheMp { nixl, .. }) => nixl.read_handoff(prefill_answer),
            Self::LmCache(lmcache) => lmcache.read_handoff(prefill_answer),
        }
    }

    /// How the decode leg is made.
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

/// The `kv_transfer_params` of an answer, in its own bytes. `None` when absent or null.
fn answer_params(prefill_answer: &[u8]) -> Result<Option<Box<RawValue>>, HandoffError> {
    #[derive(serde::Deserialize)]
    struct Answer {
        kv_transfer_params: Option<Box<RawValue>>,
    }
    serde_json::from_slice::<Answer>(prefill_answer)
        .map(|answer| answer.kv_transfer_params)
        .map_err(|_| HandoffError::NotJson)
}
