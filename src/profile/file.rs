//! The shape of a profile file, and the defaults of what it leaves out.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Deserializer};

use super::{
    ConnectorChoice, Deadlines, DeviceChoice, LmCacheMpProfile, LmCacheProfile, NixlProfile, Profile, ProxyProfile,
    RestartPolicy, RestartWhen, RoleProfile, SimProfile, VllmProfile,
};
use crate::connector::FirstToken;
use crate::engine::EngineKind;
use crate::fleet::LogLimits;
use crate::service::{AccessLog, Admission, Clients, Cors, Guard, Handoff, Metrics, Routing, Service, Streams, Traces};
use crate::span;

/// A whole profile file. Every key may be left out of a layer; [`File::resolve`] says what the result must have.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    /// Read by `layers` only.
    #[serde(rename = "extends")]
    _extends: Option<String>,
    description: Option<String>,
    model: Option<String>,
    served_model_name: Option<String>,
    engine: Option<EngineKind>,
    connector: Option<ConnectorChoice>,
    force_connector: Option<bool>,
    device: Option<DeviceChoice>,
    port_offset: Option<u16>,
    #[serde(default)]
    prefill: RoleTable,
    #[serde(default)]
    decode: RoleTable,
    #[serde(default)]
    vllm: VllmTable,
    #[serde(default)]
    sim: SimTable,
    #[serde(default)]
    nixl: NixlTable,
    #[serde(default)]
    lmcache: LmCacheTable,
    #[serde(default)]
    lmcache_mp: LmCacheMpTable,
    #[serde(default)]
    proxy: ProxyTable,
    #[serde(default)]
    deadlines: DeadlinesTable,
    #[serde(default)]
    restart: RestartTable,
    #[serde(default)]
    logs: LogsTable,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RoleTable {
    count: Option<u16>,
    port: Option<u16>,
    tensor_parallel: Option<u16>,
    #[serde(default)]
    gpus: Vec<u32>,
    gpu_memory_utilization: Option<Part>,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: BTreeMap<String, Variable>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct VllmTable {
    program: Option<String>,
    max_model_len: Option<u32>,
    gpu_memory_utilization: Option<Part>,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: BTreeMap<String, Variable>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct SimTable {
    preset: Option<String>,
    max_model_len: Option<u32>,
    #[serde(default)]
    faults: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct NixlTable {
    prefill_side_channel_port: Option<u16>,
    decode_side_channel_port: Option<u16>,
    lease: Option<Span>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct LmCacheTable {
    first_token: Option<FirstToken>,
    init_port: Option<u16>,
    alloc_port: Option<u16>,
    notify_port: Option<u16>,
    prefill_buffer: Option<Bytes>,
    decode_buffer: Option<Bytes>,
    notifications: Option<u16>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct LmCacheMpTable {
    port: Option<u16>,
    http_port: Option<u16>,
    l1_size: Option<Bytes>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ProxyTable {
    host: Option<String>,
    port: Option<u16>,
    bind_sessions: Option<bool>,
    session_header: Option<String>,
    max_body: Option<Bytes>,
    max_in_flight: Option<usize>,
    routing: Routing,
    admission: Admission,
    clients: Clients,
    handoff: Handoff,
    guard: Guard,
    access_log: AccessLog,
    metrics: Metrics,
    traces: Traces,
    cors: Cors,
    streams: Streams,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct DeadlinesTable {
    ready: Option<Span>,
    start_stall: Option<Span>,
    drain: Option<Span>,
    stop: Option<Span>,
    prefill: Option<Span>,
    handoff: Option<Span>,
    decode_idle: Option<Span>,
    stall: Option<Span>,
    keep: Option<Span>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RestartTable {
    policy: Option<RestartWhen>,
    max_restarts: Option<u32>,
    backoff: Option<Span>,
    max_backoff: Option<Span>,
    stable_after: Option<Span>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct LogsTable {
    file_size: Option<Bytes>,
    files: Option<u32>,
    age: Option<Span>,
}

/// The value of a variable: text, or a number or `true` without quotes.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string, a number, `true` or `false`")]
enum Variable {
    Text(String),
    Whole(i64),
    Part(f64),
    Switch(bool),
}

impl Variable {
    fn all(env: BTreeMap<String, Self>) -> BTreeMap<String, String> {
        env.into_iter().map(|(name, value)| (name, value.text())).collect()
    }

    fn text(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Whole(number) => number.to_string(),
            Self::Part(number) => number.to_string(),
            Self::Switch(is_on) => is_on.to_string(),
        }
    }
}

/// A duration as people write it: `"30s"`, `"1m 30s"`.
#[derive(Debug, Clone, Copy)]
struct Span(Duration);

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        span::parse(&text).map(Self).map_err(serde::de::Error::custom)
    }
}

/// A part of a whole: above 0, and 1 at most.
#[derive(Debug, Clone, Copy)]
struct Part(f64);

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let part = f64::deserialize(deserializer)?;
        if part > 0.0 && part <= 1.0 {
            Ok(Self(part))
        } else {
            let text = format!("{part} is not a part of the memory; write a number above 0 and up to 1, as 0.45");
            Err(serde::de::Error::custom(text))
        }
    }
}

/// A number of bytes as people write it: `"2GiB"`, `"512MiB"`.
#[derive(Debug, Clone, Copy)]
struct Bytes(u64);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_bytes(&text).map(Self).ok_or_else(|| {
            serde::de::Error::custom(format!(
                "invalid size `{text}`; write for example \"2GiB\" or \"512MiB\""
            ))
        })
    }
}

/// Reads a number of bytes; `None` for what is none.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let digits = text
        .find(|character: char| !character.is_ascii_digit())
        .unwrap_or(text.len());
    let number: u64 = text[..digits].parse().ok()?;
    let unit = match text[digits..].trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.checked_mul(unit)
}

/// A key that a complete profile must have, and has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MissingKey(pub(super) &'static str);

impl File {
    /// Fills in the defaults. The ports are those of LMCache's `disagg_prefill/xpyd` example.
    pub(super) fn resolve(self, name: &str) -> Result<Profile, MissingKey> {
        let model = self.model.ok_or(MissingKey("model"))?;
        Ok(Profile {
            name: name.to_owned(),
            description: self.description.unwrap_or_default(),
            served_model_name: self.served_model_name.unwrap_or_else(|| model.clone()),
            model,
            engine: self.engine.unwrap_or(EngineKind::Vllm),
            connector: self.connector.unwrap_or(ConnectorChoice::Auto),
            force_connector: self.force_connector.unwrap_or(false),
            device: self.device.unwrap_or(DeviceChoice::Cuda),
            port_offset: self.port_offset.unwrap_or(0),
            prefill: self.prefill.resolve(7100),
            decode: self.decode.resolve(7200),
            vllm: VllmProfile {
                program: self.vllm.program.unwrap_or_else(|| "vllm".to_owned()),
                max_model_len: self.vllm.max_model_len,
                gpu_memory_utilization: self.vllm.gpu_memory_utilization.map(|part| part.0),
                args: self.vllm.args,
                env: Variable::all(self.vllm.env),
            },
            sim: SimProfile {
                preset: self.sim.preset.unwrap_or_else(|| "h100-llama-3.1-8b".to_owned()),
                max_model_len: self.sim.max_model_len.unwrap_or(131_072),
                faults: self.sim.faults,
            },
            nixl: NixlProfile {
                prefill_side_channel_port: self.nixl.prefill_side_channel_port.unwrap_or(5600),
                decode_side_channel_port: self.nixl.decode_side_channel_port.unwrap_or(5700),
                lease: self.nixl.lease.map(|span| span.0),
            },
            lmcache: self.lmcache.resolve(),
            lmcache_mp: self.lmcache_mp.resolve(),
            proxy: self.proxy.resolve(),
            deadlines: self.deadlines.resolve(),
            restart: self.restart.resolve(),
            logs: self.logs.resolve(),
        })
    }
}

impl RoleTable {
    fn resolve(self, port: u16) -> RoleProfile {
        RoleProfile {
            count: self.count.unwrap_or(1),
            port: self.port.unwrap_or(port),
            tensor_parallel: self.tensor_parallel.unwrap_or(1),
            gpus: self.gpus,
            gpu_memory_utilization: self.gpu_memory_utilization.map(|part| part.0),
            args: self.args,
            env: Variable::all(self.env),
        }
    }
}

impl LmCacheTable {
    fn resolve(self) -> LmCacheProfile {
        LmCacheProfile {
            first_token: self.first_token.unwrap_or(FirstToken::Decoder),
            init_port: self.init_port.unwrap_or(7300),
            alloc_port: self.alloc_port.unwrap_or(7400),
            notify_port: self.notify_port.unwrap_or(7500),
            prefill_buffer_bytes: self.prefill_buffer.map_or(1 << 30, |bytes| bytes.0),
            decode_buffer_bytes: self.decode_buffer.map_or(2 << 30, |bytes| bytes.0),
            notifications: self.notifications,
        }
    }
}

impl LmCacheMpTable {
    /// The ports are those of LMCache's guide to disaggregated prefill with cache servers.
    fn resolve(self) -> LmCacheMpProfile {
        LmCacheMpProfile {
            port: self.port.unwrap_or(6555),
            http_port: self.http_port.unwrap_or(8090),
            l1_bytes: self.l1_size.map_or(8 << 30, |bytes| bytes.0),
        }
    }
}

impl ProxyTable {
    fn resolve(self) -> ProxyProfile {
        ProxyProfile {
            host: self.host.unwrap_or_else(|| "127.0.0.1".to_owned()),
            port: self.port.unwrap_or(9100),
            port_is_exact: false,
            bind_sessions: self.bind_sessions.unwrap_or(false),
            session_header: self.session_header.unwrap_or_else(|| "session-id".to_owned()),
            max_body_bytes: self
                .max_body
                .map_or(64 << 20, |bytes| usize::try_from(bytes.0).unwrap_or(usize::MAX)),
            max_in_flight: self.max_in_flight.unwrap_or(4096),
            service: Service {
                routing: self.routing,
                admission: self.admission,
                clients: self.clients,
                handoff: self.handoff,
                guard: self.guard,
                access_log: self.access_log,
                metrics: self.metrics,
                traces: self.traces,
                cors: self.cors,
                streams: self.streams,
            },
        }
    }
}

impl DeadlinesTable {
    fn resolve(self) -> Deadlines {
        let seconds = |span: Option<Span>, default| span.map_or(Duration::from_secs(default), |span| span.0);
        Deadlines {
            ready: seconds(self.ready, 1800),
            // One tick of CPU time is progress, so this is far more than any working start needs.
            start_stall: seconds(self.start_stall, 300),
            drain: seconds(self.drain, 30),
            // vLLM kills its own processes after 5 s, then its API server closes; a loaded machine takes its time.
            stop: seconds(self.stop, 25),
            prefill: seconds(self.prefill, 300),
            handoff: seconds(self.handoff, 90),
            // It also bounds a whole answer that is not streamed.
            decode_idle: seconds(self.decode_idle, 600),
            // Far more than the longest prefill, which counts its prompt's tokens only when it is over.
            stall: seconds(self.stall, 120),
            keep: self.keep.map(|span| span.0),
        }
    }
}

impl RestartTable {
    fn resolve(self) -> RestartPolicy {
        let seconds = |span: Option<Span>, default| span.map_or(Duration::from_secs(default), |span| span.0);
        RestartPolicy {
            policy: self.policy.unwrap_or(RestartWhen::OnFailure),
            max_restarts: self.max_restarts.unwrap_or(5),
            backoff: seconds(self.backoff, 1),
            max_backoff: seconds(self.max_backoff, 60),
            stable_after: seconds(self.stable_after, 300),
        }
    }
}

impl LogsTable {
    fn resolve(self) -> LogLimits {
        let default = LogLimits::default();
        LogLimits {
            file_bytes: self.file_size.map_or(default.file_bytes, |bytes| bytes.0.max(1)),
            files: self.files.unwrap_or(default.files).max(2),
            age: self.age.map_or(default.age, |span| span.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::parse_bytes;

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(parse_bytes("2GiB"), Some(2 << 30));
        assert_eq!(parse_bytes("512 MiB"), Some(512 << 20));
        assert_eq!(parse_bytes("17"), Some(17));
        for wrong in ["2GB", "GiB", "-1", "99999999999999999999", "18014398509481984KiB"] {
            assert_eq!(parse_bytes(wrong), None, "{wrong}");
        }
    }
}
