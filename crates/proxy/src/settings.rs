//! How a proxy behaves, and the secrets and open handles that its caller gives it.

use super::server::auth::{ClientKeys, EngineKey};
use super::server::tls::Tls;
use super::telemetry::access_log::AccessLog;
use super::telemetry::traces::Traces;
use xpyd_base::connector::Connector;
use xpyd_base::proxy_config::{ProxyConfig, RequestDeadlines};

/// How a proxy behaves.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How KV moves between the engines.
    pub connector: Connector,
    /// The model that canaries request.
    pub served_model_name: String,
    /// Notifications to wait for after each prefill. `None` means one per tensor-parallel rank.
    pub notifications: Option<u16>,
    /// Deadlines of one request.
    pub deadlines: RequestDeadlines,
    /// Whether `/health` asks the engines, because no supervisor watches them.
    pub asks_engines: bool,
    /// Secrets and open handles.
    pub parts: Parts,
    /// The `[proxy]` table of a profile.
    pub config: ProxyConfig,
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
