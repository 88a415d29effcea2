//! LMCache MP (`MultiConnector` of vLLM over `NixlConnector` and `LMCacheMPConnector`): NIXL moves KV from prefill to
//! decode. Each engine has its own cache server, from which it loads shared prefixes.
//!
//! The legs of a request are those of NIXL pull. Configuration: LMCache 0.5.6 `lmcache_mp_connector.py` and
//! `multiprocess/config.py`, vLLM 0.32.0 `multi_connector.py`, and behaviour seen on a real engine.

use serde::Serialize;
use serde_json::json;

use super::{Device, Launch, LaunchContext, Nixl, Sidecar};

/// Only its own engine uses a cache server.
const SERVER_HOST: &str = "127.0.0.1";

/// The options of LMCache MP.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LmCacheMp {
    /// The connector that moves KV from prefill to decode.
    pub nixl: Nixl,
    /// The memory of each cache server, in bytes.
    pub l1_bytes: u64,
}

/// The ports of an engine's cache server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CachePorts {
    /// The port for its engine.
    pub requests: u16,
    /// The HTTP port with state and metrics.
    pub http: u16,
}

impl LmCacheMp {
    pub(super) fn launch(&self, context: &LaunchContext<'_>) -> Launch {
        let mut launch = self.nixl.launch(context);
        let Some(cache) = context.cache else {
            return launch;
        };
        let nixl = launch.kv_transfer_config.take();
        let mut config = json!({
            "kv_connector": "MultiConnector",
            "kv_role": nixl["kv_role"],
            "kv_connector_extra_config": {"connectors": [
                // The first connector that has a prompt's KV loads it. A hand-off must be loaded by NIXL.
                nixl,
                {
                    "kv_connector": "LMCacheMPConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {
                        "lmcache.mp.host": format!("tcp://{SERVER_HOST}"),
                        "lmcache.mp.port": cache.requests,
                    },
                },
            ]},
        });
        // The scheduler only reads the outer policy.
        if let Some(policy) = nixl.get("kv_load_failure_policy") {
            config["kv_load_failure_policy"] = policy.clone();
        }
        launch.kv_transfer_config = config;
        launch.sidecar = Some(self.cache_server(context, cache));
        launch
    }

    fn cache_server(&self, context: &LaunchContext<'_>, cache: CachePorts) -> Sidecar {
        let name = format!("{}{}", context.role.engine_stem(), context.index + 1);
        let gibibytes = self.l1_bytes as f64 / f64::from(1 << 30);
        let mut arguments = vec!["server".to_owned()];
        let mut flag = |name: &str, value: String| arguments.extend([format!("--{name}"), value]);
        flag("host", SERVER_HOST.to_owned());
        flag("port", cache.requests.to_string());
        flag("http-host", SERVER_HOST.to_owned());
        flag("http-port", cache.http.to_string());
        // LMCache's unit is 2^30 bytes.
        flag("l1-size-gb", gibibytes.to_string());
        flag("eviction-policy", "LRU".to_owned());
        flag("chunk-size", "256".to_owned());
        flag("instance-id", name);
        if context.device == Device::Cpu {
            // By default the server moves KV itself, with CUDA; an engine on a CPU moves its own.
            flag("supported-transfer-mode", "auto".to_owned());
        }
        Sidecar {
            program: "lmcache",
            arguments,
            port: cache.requests,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::fleet::Role;

    #[test]
    fn nixl_comes_first_in_both_roles() {
        let connector = LmCacheMp {
            nixl: Nixl {},
            l1_bytes: 3 << 29,
        };
        let launch = |role, strict| {
            connector.launch(&LaunchContext {
                role,
                index: 1,
                device: Device::Cuda,
                host: "127.0.0.1",
                side_channel_port: Some(5701),
                receiver: None,
                cache: Some(CachePorts {
                    requests: 6558,
                    http: 8093,
                }),
                notify: None,
                max_model_len: None,
                kv_lease: std::time::Duration::from_mins(16),
                lookup_deadline: std::time::Duration::from_mins(3),
                strict,
                run_dir: Path::new("/run"),
            })
        };
        for (role, strict, kv_role, policy) in [
            (Role::Prefill, false, "kv_producer", None),
            (Role::Decode, false, "kv_consumer", Some("recompute")),
            (Role::Decode, true, "kv_consumer", Some("fail")),
        ] {
            let config = launch(role, strict).kv_transfer_config;
            let parts = &config["kv_connector_extra_config"]["connectors"];
            for whole in [&config, &parts[0]] {
                assert_eq!(whole["kv_role"], kv_role);
                assert_eq!(
                    whole.get("kv_load_failure_policy").and_then(|policy| policy.as_str()),
                    policy
                );
            }
            let names = [&config, &parts[0], &parts[1]].map(|part| part["kv_connector"].clone());
            assert_eq!(names, ["MultiConnector", "NixlConnector", "LMCacheMPConnector"]);
        }
        let sidecar = launch(Role::Decode, false).sidecar.expect("a cache server");
        assert_eq!((sidecar.program, sidecar.port), ("lmcache", 6558));
        let words = sidecar.arguments.join(" ");
        assert_eq!(
            words,
            "server --host 127.0.0.1 --port 6558 --http-host 127.0.0.1 --http-port 8093 --l1-size-gb 1.5 \
             --eviction-policy LRU --chunk-size 256 --instance-id decoder2"
        );
    }
}
