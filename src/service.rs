//! How clients are served, as the user wants it: one vocabulary for a profile's `[proxy]` table, the plan, the proxy and
//! `xpyd proxy --set`, so that an option is spelled once.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// All of it. Every option has a default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Service {
    /// Which engines a request goes to.
    pub routing: Routing,
    /// Who waits until an engine has room.
    pub admission: Admission,
    /// What clients' connections are held to.
    pub clients: Clients,
    /// What a hand-off must be.
    pub handoff: Handoff,
    /// Who is let in.
    pub guard: Guard,
    /// What is written down of requests.
    pub access_log: AccessLog,
    /// What `/metrics` tells.
    pub metrics: Metrics,
    /// Where traces go.
    pub traces: Traces,
    /// What web pages of other origins may do.
    #[serde(skip_serializing_if = "is_default")]
    pub cors: Cors,
    /// How streams are kept open.
    #[serde(skip_serializing_if = "is_default")]
    pub streams: Streams,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// What web pages of other origins may do, by vLLM's options and with their defaults.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cors {
    /// Origins whose pages may ask; `*` is all of them. None by default.
    pub allowed_origins: Vec<String>,
    /// Methods that they may use; `*` is all of them.
    pub allowed_methods: Vec<String>,
    /// Headers that they may send; `*` is all of them.
    pub allowed_headers: Vec<String>,
    /// Whether they may send cookies and the like.
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

/// How streams are kept open.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Streams {
    /// A streamed generation that has been silent for so long gets a comment, also while it waits and prefills; 0: none. Load
    /// balancers cut connections that are silent, most of them after a minute.
    #[serde(serialize_with = "write_span", deserialize_with = "read_span")]
    pub keep_alive: Duration,
}

/// What a hand-off must be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Handoff {
    /// A decode engine whose KV did not arrive fails the request, which is tried again, instead of computing the prompt
    /// itself while streams wait for it.
    pub strict: bool,
}

/// Where traces go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Traces {
    /// A collector of OTLP over HTTP, such as `http://localhost:4318/v1/traces`; absent: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otlp_endpoint: Option<String>,
    /// How many of a hundred requests that are in no trace yet begin one.
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

/// What `/metrics` tells.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// Whether the engines' own metrics are in it, too, as they always are in `/metrics?engines`.
    pub merge: bool,
}

/// What is written down of requests: never what they say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AccessLog {
    /// The file, with one JSON object a line, such as `/dev/stdout`; absent: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// A larger file is renamed to `FILE.1`, and begun anew.
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

/// Who is let in. The keys themselves are in no profile: they come from a file, or from `XPYD_API_KEY`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Guard {
    /// A file with one API key a line, of which clients must bear one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key_file: Option<PathBuf>,
    /// Whether engines see the key that a client bears, although xpyd has checked it.
    pub pass_key_through: bool,
}

/// Which engines a request goes to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Routing {
    /// How a prefill engine is chosen.
    pub prefill_policy: Policy,
    /// How a decode engine is chosen.
    pub decode_policy: Policy,
    /// Prompts with fewer tokens that the decode engine does not know are answered by it alone; 0 hands every prompt over.
    pub prefill_threshold: u64,
    /// Pairs of engines that one request may be tried with, the first one included, as long as its client has got nothing.
    pub attempts: u32,
    /// What happens to requests while no prefill engine serves.
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

/// What happens to requests while no prefill engine serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WithoutPrefill {
    /// They are answered 503.
    Fail,
    /// Decode engines answer alone, at the cost of the streams that they serve.
    Aggregate,
}

/// How an engine of a role is chosen. A session stays on its engines under each of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// One after the other. With equal numbers of engines the pairs stay together, as LMCache's reference proxy has it.
    RoundRobin,
    /// The one whose requests have the fewest tokens.
    LeastTokens,
    /// The one that has read most of the prompt's beginning before, unless it is much fuller than another.
    Prefix,
    /// Always the same one for the same beginning of a prompt.
    ConsistentHash,
}

/// Who waits until an engine has room.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Admission {
    /// Requests that may wait; one more is answered 429.
    pub max_queued: usize,
    /// How long one may wait until it is answered 503.
    #[serde(serialize_with = "write_span", deserialize_with = "read_span")]
    pub queue_deadline: Duration,
    /// Tokens of prompts and answers on a decode engine at once. Absent: what the engine says it has KV blocks for, no limit if
    /// it says nothing; 0: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_tokens: Option<u64>,
    /// LMCache: tokens that a decode engine's receive buffer holds; 0: no limit.
    pub buffer_tokens: u64,
    /// Bytes of all request bodies that are being read, wait, or are served; one that has no room is answered 503. Bodies
    /// above 1 MiB and smaller ones get three quarters of it each at most. 0: no limit.
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

/// What clients' connections are held to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Clients {
    /// Connections at once. At the limit the one that is without a request for longest gives way to a new one; where none is,
    /// requests on new ones are answered 503, health checks and metrics excepted. About half of the descriptors that
    /// the process may open is the most.
    pub max_connections: usize,
    /// Connections at once of one client address, or of one /64 network of IPv6. Absent: no limit of their own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_per_address: Option<usize>,
    /// How long a new connection may take until it has sent the head of its first request.
    #[serde(serialize_with = "write_span", deserialize_with = "read_span")]
    pub head_deadline: Duration,
    /// How long a connection may take after an answer until it has sent the next request's head.
    #[serde(serialize_with = "write_span", deserialize_with = "read_span")]
    pub idle_deadline: Duration,
    /// Threads that serve clients. Absent: one per eight cores, eight at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// A file with a certificate in PEM, and with those that vouch for it after it: TLS is spoken. Absent: plain HTTP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_cert: Option<PathBuf>,
    /// The file with its private key; present where `tls_cert` is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<PathBuf>,
}

impl Clients {
    /// What clients' URLs begin with.
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
            // Longer than the clients in use keep idle connections (Go and reqwest: 90 s), so that they leave first and no
            // request meets a closing connection.
            idle_deadline: Duration::from_mins(2),
            threads: None,
            tls_cert: None,
            tls_key: None,
        }
    }
}

fn write_span<S: Serializer>(span: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_duration(*span))
}

/// A time as people write it: `30s`.
fn read_span<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    crate::span::parse(&text).map_err(serde::de::Error::custom)
}

impl Service {
    /// The options that `KEY=VALUE` texts change, such as `routing.attempts=2`; later ones win.
    ///
    /// # Errors
    /// A sentence that names the text.
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
                inner = entry.as_table_mut().ok_or_else(|| wrong("it is no table"))?;
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

    fn from(texts: &[&str]) -> Result<Service, String> {
        let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
        Service::from_overrides(&texts)
    }

    #[test]
    fn options_are_changed_by_their_path_and_the_last_one_wins() {
        assert_eq!(from(&[]), Ok(Service::default()));
        let service = from(&["routing.attempts=5", "routing.attempts=2"]).expect("known options");
        assert_eq!(service.routing.attempts, 2);
        let service = from(&[
            "routing.decode_policy=least-tokens",
            "admission.queue_deadline=1m",
            "admission.decode_tokens=0",
        ])
        .expect("known options");
        assert_eq!(service.routing.decode_policy, Policy::LeastTokens);
        assert_eq!(service.admission.queue_deadline, Duration::from_mins(1));
        assert_eq!(service.admission.decode_tokens, Some(0));
    }

    #[test]
    fn unknown_options_and_values_of_another_kind_are_named() {
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
