//! NIXL pull (`NixlConnector` of vLLM 0.32): the prefill engine keeps the KV under a lease and answers with the
//! parameters that the decode engine pulls with.
//!
//! Bodies and keys: vLLM 0.32.0 `nixl/pull_scheduler.py`, and behaviour seen on real engines (vLLM on CPU, NIXL 1.5.1).

use std::collections::BTreeMap;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::json;
use serde_json::value::RawValue;

use super::{Handoff, HandoffError, Launch, LaunchContext, answer_params};
use crate::fleet::Role;

/// The options of NIXL pull. There are none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Nixl {}

impl Nixl {
    pub(super) fn launch(&self, context: &LaunchContext<'_>) -> Launch {
        let mut config = json!({
            "kv_connector": "NixlConnector",
            "kv_role": match context.role { Role::Prefill => "kv_producer", Role::Decode => "kv_consumer" },
            "kv_buffer_device": context.device.as_str(),
            // Both roles read it: the decode engine renews the lease, at an interval that follows from the lease's length.
            "kv_connector_extra_config": {"kv_lease_duration": context.kv_lease.as_secs()},
        });
        if context.role == Role::Decode {
            // By default the engine recomputes a lost transfer, and the client still gets its answer. `fail` makes it a
            // 500 and another attempt.
            config["kv_load_failure_policy"] = json!(if context.strict { "fail" } else { "recompute" });
        }
        let mut env = vec![("VLLM_NIXL_SIDE_CHANNEL_HOST".into(), context.host.to_owned())];
        if let Some(port) = context.side_channel_port {
            env.push(("VLLM_NIXL_SIDE_CHANNEL_PORT".into(), port.to_string()));
        }
        Launch {
            kv_transfer_config: config,
            env,
            ..Launch::default()
        }
    }

    pub(super) fn prefill_params(&self) -> String {
        json!({
            "do_remote_decode": true,
            "do_remote_prefill": false,
            "remote_engine_id": null,
            "remote_block_ids": null,
            "remote_host": null,
            "remote_port": null,
        })
        .to_string()
    }

    /// Checks every key: vLLM's scheduler crashes on a hand-off without block ids, and on one without a remote host as
    /// soon as its client disconnects.
    pub(super) fn read_handoff(&self, prefill_answer: &[u8]) -> Result<Handoff, HandoffError> {
        let raw = answer_params(prefill_answer)?.ok_or(HandoffError::Missing)?;
        let params: Params<'_> = serde_json::from_str(raw.get()).map_err(|_| HandoffError::NotJson)?;
        let check = |ok: bool, key: &'static str| if ok { Ok(()) } else { Err(HandoffError::Malformed(key)) };
        check(read(&params, "do_remote_prefill") == Some(true), "do_remote_prefill")?;
        for key in ["remote_engine_id", "remote_request_id", "remote_host"] {
            check(read(&params, key).is_some_and(|text: String| !text.is_empty()), key)?;
        }
        let port: Option<u16> = read(&params, "remote_port");
        check(port.is_some_and(|port| port > 0), "remote_port")?;
        let ranks: Option<u64> = read(&params, "tp_size");
        check(ranks.is_some_and(|ranks| ranks > 0), "tp_size")?;
        let groups: Option<Vec<Vec<IgnoredAny>>> = read(&params, "remote_block_ids");
        let has_blocks = groups.is_some_and(|groups| groups.iter().any(|group| !group.is_empty()));
        check(has_blocks, "remote_block_ids")?;
        let mode: Option<String> = read(&params, "transfer_mode");
        match mode.as_deref() {
            None | Some("pull") => {
                let sent = without_cached_tokens(&params);
                Ok(Handoff::Pull(sent.unwrap_or(raw)))
            }
            Some(other) => Err(HandoffError::Mode(other.to_owned())),
        }
    }
}

/// The values of a hand-off's keys as JSON text, so that long lists of block ids are not parsed.
type Params<'answer> = BTreeMap<&'answer str, &'answer RawValue>;

/// The prefill engine's number of cached tokens, which vLLM 0.32 sends so that the decode engine repeats it in its usage.
const CACHED_TOKENS: &str = "remote_prefill_cached_tokens";

/// The parameters without [`CACHED_TOKENS`], so that the decode engine's usage shows what it received itself. `None` if
/// the key is absent.
fn without_cached_tokens(params: &Params<'_>) -> Option<Box<RawValue>> {
    let mut params = params.clone();
    params.remove(CACHED_TOKENS)?;
    serde_json::value::to_raw_value(&params).ok()
}

/// The value of a key, if it exists and has this type.
fn read<'answer, T: Deserialize<'answer>>(params: &Params<'answer>, key: &str) -> Option<T> {
    serde_json::from_str(params.get(key)?.get()).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn answer(change: impl FnOnce(&mut Value)) -> Vec<u8> {
        let mut params = json!({"do_remote_prefill": true, "do_remote_decode": false, "remote_block_ids": [[1, 2]],
            "remote_engine_id": "e", "remote_request_id": "cmpl-1-0-ab", "remote_host": "127.0.0.1", "remote_port": 5600,
            "tp_size": 1, "transfer_mode": "pull"});
        change(&mut params);
        json!({"id": "cmpl-1", "kv_transfer_params": params})
            .to_string()
            .into_bytes()
    }

    #[test]
    fn a_complete_handoff_keeps_the_engines_own_bytes() {
        let body =
            br#"{"kv_transfer_params": {"do_remote_prefill": true,  "remote_block_ids":[[1]],"remote_engine_id":"e",
            "remote_request_id":"r","remote_host":"h","remote_port":1,"tp_size":1,"new_key":1.50}}"#;
        let Ok(Handoff::Pull(raw)) = Nixl {}.read_handoff(body) else {
            panic!("a hand-off")
        };
        assert!(raw.get().contains(r#""new_key":1.50"#) && raw.get().contains("true,  "));
    }

    #[test]
    fn cached_token_count_is_removed_from_the_decode_leg() {
        let with = answer(|params| params["remote_prefill_cached_tokens"] = json!(16));
        let Ok(Handoff::Pull(raw)) = (Nixl {}).read_handoff(&with) else {
            panic!("a hand-off")
        };
        let without: Value = serde_json::from_slice(&answer(|_| {})).expect("JSON");
        let sent: Value = serde_json::from_str(raw.get()).expect("JSON");
        assert_eq!(sent, without["kv_transfer_params"]);
    }

    #[test]
    fn a_handoff_that_would_kill_the_decode_engine_is_refused() {
        for key in [
            "remote_block_ids",
            "remote_engine_id",
            "remote_request_id",
            "remote_host",
            "remote_port",
            "tp_size",
        ] {
            let body = answer(|params| {
                params.as_object_mut().expect("object").remove(key);
            });
            assert_eq!(
                Nixl {}.read_handoff(&body).expect_err(key),
                HandoffError::Malformed(key)
            );
        }
        let empty = answer(|params| params["remote_block_ids"] = json!([[]]));
        assert_eq!(
            Nixl {}.read_handoff(&empty).expect_err("empty"),
            HandoffError::Malformed("remote_block_ids")
        );
        let push = answer(|params| params["transfer_mode"] = json!("push"));
        assert_eq!(
            Nixl {}.read_handoff(&push).expect_err("push"),
            HandoffError::Mode("push".into())
        );
        assert_eq!(
            Nixl {}
                .read_handoff(br#"{"kv_transfer_params":null}"#)
                .expect_err("null"),
            HandoffError::Missing
        );
    }
}
