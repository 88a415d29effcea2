//! How a proxy behaves, and what it gets open or secret from its caller.

use std::time::Duration;

use super::server::auth::{ClientKeys, EngineKey};
use super::server::tls::Tls;
use super::telemetry::access_log::AccessLog;
use super::telemetry::traces::Traces;
use crate::connector::Connector;
use crate::service::Service;

/// How a proxy behaves.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How KV moves between the engines.
    pub connector: Connector,
    /// The model that canaries ask for.
    pub served_model_name: String,
    /// Header whose value binds a session to its engines; `None` binds nothing.
    pub session_header: Option<String>,
    /// Notifications to wait for per prefill; `None` means one per tensor-parallel rank.
    pub notifications: Option<u16>,
    /// How long one prefill leg may take, from its first byte out to its whole answer.
    pub prefill_deadline: Duration,
    /// How long the KV may take to arrive after the prefill's answer.
    pub handoff_deadline: Duration,
    /// How long the decode leg may take to its first byte, and then between two reads. An answer that is not streamed
    /// is one read, so this bounds its whole generation.
    pub decode_idle_deadline: Duration,
    /// How long a prefill engine keeps KV for a decode engine; `None` if it is not known, or KV is pushed.
    pub kv_lease: Option<Duration>,
    /// Whether the proxy asks engines whether they are well when it is asked, because nobody watches them.
    pub asks_engines: bool,
    /// Largest body of a client's request, in bytes.
    pub max_body_bytes: usize,
    /// Most requests in the proxy at once; one more is answered 503.
    pub max_in_flight: usize,
    /// What is written down nowhere.
    pub parts: Parts,
    /// How clients are served.
    pub service: Service,
}

/// What a proxy needs and no plan, which is written down, holds: secrets, and what is open.
#[derive(Debug, Clone, Default)]
pub struct Parts {
    /// The keys of which clients must bear one.
    pub client_keys: ClientKeys,
    /// What clients are shown; absent: plain HTTP is spoken.
    pub tls: Option<Tls>,
    /// The key that the engines want.
    pub engine_key: Option<EngineKey>,
    /// Where requests are written down.
    pub access_log: Option<AccessLog>,
    /// Where traces go.
    pub traces: Option<Traces>,
}
