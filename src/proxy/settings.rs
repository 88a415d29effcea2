//! How a proxy behaves, and the secrets and open handles that its caller gives it.

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
    /// The model that canaries request.
    pub served_model_name: String,
    /// Header whose value binds a session to its engines. `None` binds nothing.
    pub session_header: Option<String>,
    /// Notifications to wait for after each prefill. `None` means one per tensor-parallel rank.
    pub notifications: Option<u16>,
    /// Deadline of one prefill leg, from its first byte out to its whole answer.
    pub prefill_deadline: Duration,
    /// Deadline of the KV transfer, from the prefill engine's answer.
    pub handoff_deadline: Duration,
    /// Deadline of the decode leg to its first byte, and then between two reads. An answer that is not streamed is
    /// one read, so this bounds its whole generation.
    pub decode_idle_deadline: Duration,
    /// How long a prefill engine keeps KV for a decode engine. `None` if that is unknown, or KV is pushed.
    pub kv_lease: Option<Duration>,
    /// Whether `/health` asks the engines, because no supervisor watches them.
    pub asks_engines: bool,
    /// Maximum size of a request body, in bytes.
    pub max_body_bytes: usize,
    /// Maximum requests in the proxy. It answers further ones 503.
    pub max_in_flight: usize,
    /// Secrets and open handles.
    pub parts: Parts,
    /// The options of the proxy.
    pub service: Service,
}

/// Secrets and open handles. They are not part of the plan, because xpyd writes the plan to a file.
#[derive(Debug, Clone, Default)]
pub struct Parts {
    /// The keys that clients can use.
    pub client_keys: ClientKeys,
    /// The proxy's certificate. `None` means plain HTTP.
    pub tls: Option<Tls>,
    /// The key that the engines require.
    pub engine_key: Option<EngineKey>,
    /// The access log, if it is on.
    pub access_log: Option<AccessLog>,
    /// The exporter of traces, if it is on.
    pub traces: Option<Traces>,
}
