//! The configuration of the proxy: the `[proxy]` table of a profile with its defaults. Profile, plan, proxy and
//! `xpyd proxy --set` use the same types, so each option is defined once.

use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The `[proxy]` table of a profile. Every key has a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ProxyConfig {
    /// Address to listen on.
    pub host: String,
    /// Port to listen on; 0 lets the kernel choose one.
    pub port: u16,
    /// Whether requests with the same value of the session header use the same engines.
    pub bind_sessions: bool,
    /// The name of the session header. It has no effect without `bind_sessions`.
    pub session_header: String,
    /// Largest request body, in bytes.
    #[serde(with = "crate::byte_size")]
    #[schemars(with = "crate::byte_size::Text")]
    pub max_body: usize,
    /// Most requests in the proxy at once; one more is answered 503.
    pub max_in_flight: usize,
    /// Which engines a request goes to.
    pub routing: Routing,
    /// Limits on requests that wait for an engine.
    pub admission: Admission,
    /// Limits on clients' connections, and TLS.
    pub clients: Clients,
    /// When a KV transfer counts as failed.
    pub handoff: Handoff,
    /// API keys of clients.
    pub guard: Guard,
    /// The log with one line per request.
    pub access_log: AccessLog,
    /// What `/metrics` returns.
    pub metrics: Metrics,
    /// Export of traces.
    pub traces: Traces,
    /// Rules for web pages of other origins.
    #[serde(skip_serializing_if = "is_default")]
    pub cors: Cors,
    /// Keep-alive comments in streams.
    #[serde(skip_serializing_if = "is_default")]
    pub streams: Streams,
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".to_owned(),
            port: 9100,
            bind_sessions: false,
            session_header: "session-id".to_owned(),
            max_body: 64 << 20,
            max_in_flight: 4096,
            routing: Routing::default(),
            admission: Admission::default(),
            clients: Clients::default(),
            handoff: Handoff::default(),
            guard: Guard::default(),
            access_log: AccessLog::default(),
            metrics: Metrics::default(),
            traces: Traces::default(),
            cors: Cors::default(),
            streams: Streams::default(),
        }
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Time limits of the parts of one request. They come from a profile's `[deadlines]`, or from the flags of `xpyd proxy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RequestDeadlines {
    /// For one prefill leg, from its first byte out to its whole answer.
    pub prefill: Duration,
    /// For the KV to arrive, from the prefill's answer on.
    pub handoff: Duration,
    /// For the first byte of the decode leg, and then between two reads. An answer that is not streamed is one read, so this
    /// bounds its whole generation.
    pub decode_idle: Duration,
    /// How long a prefill engine keeps KV for a decode engine; `None` if it is not known, or KV is pushed.
    pub kv_lease: Option<Duration>,
}

/// Rules for web pages of other origins, with the options and defaults of vLLM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Cors {
    /// Origins whose pages can use the API; `*` is every origin. None by default.
    pub allowed_origins: Vec<String>,
    /// Methods that these pages can use; `*` is all.
    pub allowed_methods: Vec<String>,
    /// Headers that these pages can send; `*` is all.
    pub allowed_headers: Vec<String>,
    /// Whether these pages can send cookies and other credentials.
    pub allow_credentials: bool,
}

impl Default for Cors {
    fn default() -> Self {
        Self {
            allowed_origins: Vec::new(),
            allowed_methods: vec!["*".to_owned()],
            allowed_headers: vec!["*".to_owned()],
            allow_credentials: false,
        }
    }
}

/// Keep-alive comments in streams.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Streams {
    /// After this much silence, a streamed generation gets a comment, also while it waits or prefills; 0: never. Load
    /// balancers cut silent connections, most of them after one minute.
    #[serde(with = "crate::span")]
    #[schemars(with = "crate::span::Text")]
    pub keep_alive: Duration,
}

/// When a KV transfer counts as failed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Handoff {
    /// Whether a decode engine fails a request whose KV did not arrive, so that the proxy tries another pair, instead of
    /// computing the prompt while streams wait.
    pub strict: bool,
}

/// Export of traces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Traces {
    /// URL of an OTLP collector over HTTP, such as `http://localhost:4318/v1/traces`; default: no export.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otlp_endpoint: Option<String>,
    /// Percentage of requests without a trace of their own that begin one.
    pub percent: u8,
}

impl Default for Traces {
    fn default() -> Self {
        Self {
            otlp_endpoint: None,
            percent: 100,
        }
    }
}

/// What `/metrics` returns.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// Whether `/metrics` includes the engines' own metrics, as `/metrics?engines` always does.
    pub merge: bool,
}

/// The log with one line per request, without prompts and answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AccessLog {
    /// The file, with one JSON object per line, such as `/dev/stdout`; default: no log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Size at which the file is renamed to `FILE.1` and a new one begins.
    pub max_bytes: u64,
}

impl Default for AccessLog {
    fn default() -> Self {
        Self {
            file: None,
            max_bytes: 256 << 20,
        }
    }
}

/// API keys of clients. The keys are not part of a profile: they come from a file, or from `XPYD_API_KEY`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Guard {
    /// A file with one API key per line. Clients must send one of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key_file: Option<PathBuf>,
    /// Whether engines get the client's key, in addition to the check by xpyd.
    pub pass_key_through: bool,
}

/// How the proxy chooses the engines of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Routing {
    /// How to choose the prefill engine.
    pub prefill_policy: Policy,
    /// How to choose the decode engine.
    pub decode_policy: Policy,
    /// A decode engine answers alone if fewer tokens of the prompt are new to it; 0: every prompt is prefilled by a
    /// prefill engine.
    pub prefill_threshold: u64,
    /// Number of pairs of engines to try for one request, as long as its client has received nothing.
    pub attempts: u32,
    /// What to do with requests while no prefill engine serves.
    pub without_prefill: WithoutPrefill,
}

impl Default for Routing {
    fn default() -> Self {
        Self {
            prefill_policy: Policy::RoundRobin,
            decode_policy: Policy::RoundRobin,
            prefill_threshold: 0,
            attempts: 3,
            without_prefill: WithoutPrefill::Fail,
        }
    }
}

/// What to do with requests while no prefill engine serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum WithoutPrefill {
    /// Answer 503.
    Fail,
    /// Decode engines answer alone, which slows down their running streams.
    Aggregate,
}

/// How to choose an engine of a role. Sessions stay on their engines under every policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// In turns. With equal numbers of engines the pairs stay together, as in LMCache's reference proxy.
    RoundRobin,
    /// The engine whose requests have the fewest tokens.
    LeastTokens,
    /// The engine that has processed the longest prefix of the prompt, unless it has much more load than another.
    Prefix,
    /// Always the same engine for the same prefix.
    ConsistentHash,
}

/// Limits on requests that wait for an engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Admission {
    /// Number of requests that can wait; one more is answered 429.
    pub max_queued: usize,
    /// How long a request can wait before it is answered 503.
    #[serde(with = "crate::span")]
    #[schemars(with = "crate::span::Text")]
    pub queue_deadline: Duration,
    /// Tokens of prompts and answers on a decode engine at once. Default: the capacity of the engine's KV blocks, or no
    /// limit if it does not report them; 0: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_tokens: Option<u64>,
    /// LMCache: capacity of a decode engine's receive buffer, in tokens; 0: no limit.
    pub buffer_tokens: u64,
    /// Bytes of all request bodies that are read, wait, or are served; a request that does not fit is answered 503. Bodies
    /// above 1 MiB can use three quarters of it, and so can smaller ones. 0: no limit.
    pub body_bytes: u64,
}

impl Default for Admission {
    fn default() -> Self {
        Self {
            max_queued: 1024,
            queue_deadline: Duration::from_secs(30),
            decode_tokens: None,
            buffer_tokens: 0,
            body_bytes: 1 << 30,
        }
    }
}

/// Limits on clients' connections, and TLS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Clients {
    /// Number of connections. At the limit, a new connection replaces the one that has been without a request for longest.
    /// If all have requests, requests on new connections are answered 503, except health checks and metrics. The limit is
    /// at most about half of the file descriptors that the process can open.
    pub max_connections: usize,
    /// Number of connections of one client address, or of one /64 network of IPv6. Default: no separate limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_per_address: Option<usize>,
    /// Time from accepting a connection until the header of its first request is complete.
    #[serde(with = "crate::span")]
    #[schemars(with = "crate::span::Text")]
    pub head_deadline: Duration,
    /// Time from an answer until the header of the next request on the connection is complete.
    #[serde(with = "crate::span")]
    #[schemars(with = "crate::span::Text")]
    pub idle_deadline: Duration,
    /// Number of threads that serve clients. Default: one per eight cores, at most eight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// A file with a PEM certificate, followed by its chain. It enables TLS. Default: plain HTTP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_cert: Option<PathBuf>,
    /// The file with its private key. Required with `tls_cert`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<PathBuf>,
}

impl Clients {
    /// The scheme of the proxy's URLs.
    pub fn scheme(&self) -> &'static str {
        if self.tls_cert.is_some() { "https" } else { "http" }
    }
}

impl Default for Clients {
    fn default() -> Self {
        Self {
            max_connections: 16_384,
            max_per_address: None,
            head_deadline: Duration::from_secs(10),
            // Longer than common clients keep idle connections (Go and reqwest: 90 s), so that clients close first and no
            // request meets a closing connection.
            idle_deadline: Duration::from_mins(2),
            threads: None,
            tls_cert: None,
            tls_key: None,
        }
    }
}

impl ProxyConfig {
    /// The header that binds a session to its engines; `None` if sessions are not bound.
    pub fn bound_session_header(&self) -> Option<&str> {
        self.bind_sessions.then_some(&self.session_header)
    }

    /// The configuration with the options that `KEY=VALUE` texts set, such as `routing.attempts=2`. Later ones win.
    ///
    /// # Errors
    /// A sentence that names the wrong text.
    pub fn from_overrides(texts: &[String]) -> Result<Self, String> {
        let mut table = toml::Table::new();
        for text in texts {
            let wrong = |why: &str| format!("`--set {text}`: {why}");
            let (key, value) = text.split_once('=').ok_or_else(|| wrong("expected KEY=VALUE"))?;
            let value = value
                .parse::<toml::Value>()
                .unwrap_or_else(|_| toml::Value::String(value.to_owned()));
            let mut parts: Vec<&str> = key.trim().split('.').collect();
            let last = parts.pop().unwrap_or_default();
            let mut inner = &mut table;
            for part in parts {
                let entry = inner
                    .entry(part)
                    .or_insert_with(|| toml::Value::Table(toml::Table::new()));
                inner = entry.as_table_mut().ok_or_else(|| wrong("it is not a table"))?;
            }
            inner.insert(last.to_owned(), value);
        }
        table
            .try_into()
            .map_err(|error: toml::de::Error| format!("`--set`: {}", error.message()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(texts: &[&str]) -> Result<ProxyConfig, String> {
        let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
        ProxyConfig::from_overrides(&texts)
    }

    #[test]
    fn later_options_win() {
        assert_eq!(from(&[]), Ok(ProxyConfig::default()));
        let config = from(&["routing.attempts=5", "routing.attempts=2"]).expect("known options");
        assert_eq!(config.routing.attempts, 2);
        let config = from(&[
            "routing.decode_policy=least-tokens",
            "admission.queue_deadline=1m",
            "admission.decode_tokens=0",
        ])
        .expect("known options");
        assert_eq!(config.routing.decode_policy, Policy::LeastTokens);
        assert_eq!(config.admission.queue_deadline, Duration::from_mins(1));
        assert_eq!(config.admission.decode_tokens, Some(0));
    }

    #[test]
    fn unknown_options_and_wrong_types_are_named() {
        for (text, told) in [
            ("routing.atempts=5", "unknown field `atempts`"),
            ("routing=5", "invalid type"),
            ("routing.attempts=many", "invalid type"),
            ("routing.prefill_policy=random", "unknown variant `random`"),
            ("admission.queue_deadline=soon", "`soon`"),
            ("routing", "expected KEY=VALUE"),
        ] {
            let error = from(&[text]).expect_err(text);
            assert!(error.contains(told), "{error}");
        }
    }
}
