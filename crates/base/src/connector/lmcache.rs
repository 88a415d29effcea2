//! LMCache PD (`LMCacheConnectorV1` of vLLM with LMCache 0.5.6's PD backend): the prefill engine pushes KV to the decode
//! engine named in its request, then every rank sends the proxy one notification over ZeroMQ.
//!
//! Wire formats: LMCache 0.5.6 `pd_backend_async.py` and `vllm_v1_adapter.py`, and behaviour seen on real engines.

use serde::Serialize;
use serde_json::json;

use super::{Handoff, HandoffError, Launch, LaunchContext, PairError, answer_params};
use crate::fleet::{Endpoint, Receiver, Role};

/// LMCache's configuration templates, one per role. `{{name}}` is replaced by a value of the plan.
const PREFILL_TEMPLATE: &str = include_str!("../../../../configs/lmcache-prefill.yaml");
const DECODE_TEMPLATE: &str = include_str!("../../../../configs/lmcache-decode.yaml");

/// The options of LMCache PD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LmCache {
    /// The engine that generates the first token that the client sees.
    pub first_token: FirstToken,
    /// The send buffer of a prefill engine, in bytes.
    pub prefill_buffer_bytes: u64,
    /// The receive buffer of a decode engine, in bytes. Nothing is evicted from it: only a decode frees it.
    pub decode_buffer_bytes: u64,
}

/// The engine that generates the first token that the client sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, serde::Deserialize, schemars::JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum FirstToken {
    /// The decode engine, from the client's own request: exact in every respect, one more decode step
    Decoder,
    /// The prefill engine, as LMCache's reference proxy does: one step sooner, only completions and chat without extras;
    /// its decode engines must run with `skip_last_n_tokens: 1`
    Prefiller,
}

/// The key of a hand-off's tag. LMCache takes everything after `lmcache.tag.` as the tag's name.
const TAG: &str = "lmcache.tag.handoff";

impl LmCache {
    pub(super) fn launch(&self, context: &LaunchContext<'_>) -> Launch {
        let (kv_role, rpc_stem, template, buffer) = match context.role {
            Role::Prefill => ("kv_producer", "producer", PREFILL_TEMPLATE, self.prefill_buffer_bytes),
            Role::Decode => ("kv_consumer", "consumer", DECODE_TEMPLATE, self.decode_buffer_bytes),
        };
        let mut extra = json!({
            "discard_partial_chunks": false,
            // The name of a socket, not a port: it must differ between the engines of a host.
            "lmcache_rpc_port": format!("{rpc_stem}{}", context.index + 1),
        });
        if context.role == Role::Decode && self.first_token == FirstToken::Prefiller {
            // The decode leg then has one token more than was transferred.
            extra["skip_last_n_tokens"] = json!(1);
        }
        let mut arguments = Vec::new();
        if context.role == Role::Prefill {
            // LMCache transfers only what one scheduler step prefills: a prompt that needs two steps is silently lost.
            arguments.push("--no-enable-chunked-prefill".to_owned());
            if let Some(tokens) = context.max_model_len {
                arguments.extend(["--max-num-batched-tokens".to_owned(), tokens.to_string()]);
            }
        }
        let file = format!("lmcache-{}{}.yaml", context.role.engine_stem(), context.index + 1);
        let (notify_host, notify_port) = context.notify.unwrap_or(("127.0.0.1", 0));
        let content = template
            .replace("{{notify_host}}", notify_host)
            .replace("{{notify_port}}", &notify_port.to_string())
            .replace("{{host}}", context.host)
            .replace("{{buffer_bytes}}", &buffer.to_string())
            .replace(
                "{{lookup_timeout_ms}}",
                &context.lookup_deadline.as_millis().to_string(),
            )
            .replace("{{device}}", context.device.as_str());
        let (content, receiver_template) = match context.receiver {
            // A prefill engine never connects again to a decode engine that it knew and that has ended.
            Some(receiver) => (with_ports(&content, receiver), Some(content)),
            None => (content, None),
        };
        Launch {
            kv_transfer_config: json!({
                "kv_connector": "LMCacheConnectorV1",
                "kv_role": kv_role,
                "kv_connector_extra_config": extra,
            }),
            arguments,
            env: vec![
                (
                    "LMCACHE_CONFIG_FILE".into(),
                    context.run_dir.join(&file).display().to_string(),
                ),
                // Chunk keys are hashes, which both engines must compute with the same seed.
                ("PYTHONHASHSEED".into(), "0".into()),
            ],
            file: Some((file.into(), content)),
            receiver_template,
            sidecar: None,
        }
    }

    /// The hand-off's tag, which LMCache makes part of its KV keys. Without a tag, prompts with the same beginning share
    /// pages of the decode engine's buffer from allocation on: before the bytes have arrived, and after the engine that
    /// should write them has died. The result is wrong text without an error. (LMCache 0.5.6: `pd_backend_async.py`,
    /// `utils.py`.)
    pub(super) fn decode_params(&self, request_id: &str) -> String {
        json!({TAG: request_id}).to_string()
    }

    pub(super) fn prefill_params(&self, request_id: &str, decoder: &Endpoint) -> String {
        let receiver = decoder.receiver.as_ref();
        let mut params = json!({
            "disagg_spec": {
                "req_id": request_id,
                "receiver_host": receiver.map_or(decoder.host.as_str(), |receiver| receiver.host.as_str()),
                "receiver_init_port": receiver.map(|receiver| receiver.init_ports.as_slice()).unwrap_or_default(),
                "receiver_alloc_port": receiver.map(|receiver| receiver.alloc_ports.as_slice()).unwrap_or_default(),
            },
        });
        params[TAG] = json!(request_id);
        if self.first_token == FirstToken::Prefiller {
            params["ret_first_tok"] = json!(true);
        }
        params.to_string()
    }

    pub(super) fn check_pair(&self, prefill: &Endpoint, decode: &Endpoint) -> Result<(), PairError> {
        let receiver = decode.receiver.as_ref().ok_or(PairError::NoReceiver)?;
        let ranks = usize::from(prefill.tensor_parallel);
        let (init, alloc) = (receiver.init_ports.len(), receiver.alloc_ports.len());
        if (init, alloc) == (ranks, ranks) {
            Ok(())
        } else {
            Err(PairError::Ports { ranks, init, alloc })
        }
    }

    pub(super) fn read_handoff(&self, prefill_answer: &[u8]) -> Result<Handoff, HandoffError> {
        let params = answer_params(prefill_answer)?;
        if self.first_token == FirstToken::Decoder {
            return Ok(Handoff::Pushed);
        }
        let params = params.ok_or(HandoffError::Missing)?;
        let value: serde_json::Value = serde_json::from_str(params.get()).map_err(|_| HandoffError::NotJson)?;
        value["first_tok"]
            .as_u64()
            .and_then(|token| u32::try_from(token).ok())
            .map(Handoff::PushedWithFirstToken)
            .ok_or(HandoffError::Malformed("first_tok"))
    }
}

/// The configuration file of a decode engine with its receiver's ports.
pub(super) fn with_ports(template: &str, receiver: &Receiver) -> String {
    template
        .replace("{{init_ports}}", &ports(&receiver.init_ports))
        .replace("{{alloc_ports}}", &ports(&receiver.alloc_ports))
}

/// A YAML list of ports in flow style.
fn ports(ports: &[u16]) -> String {
    let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
    format!("[{}]", ports.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(tensor_parallel: u16, ports: Option<(&[u16], &[u16])>) -> Endpoint {
        Endpoint {
            host: "10.0.0.1".into(),
            port: 8000,
            tensor_parallel,
            receiver: ports.map(|(init, alloc)| Receiver {
                host: "10.0.0.2".into(),
                init_ports: init.to_vec(),
                alloc_ports: alloc.to_vec(),
            }),
        }
    }

    fn lmcache(first_token: FirstToken) -> LmCache {
        LmCache {
            first_token,
            prefill_buffer_bytes: 1,
            decode_buffer_bytes: 1,
        }
    }

    #[test]
    fn a_pair_needs_one_port_of_each_kind_per_rank() {
        let check = |ranks, ports| lmcache(FirstToken::Decoder).check_pair(&endpoint(ranks, None), &endpoint(1, ports));
        assert_eq!(check(2, Some((&[1, 2], &[3, 4]))), Ok(()));
        assert_eq!(check(1, None), Err(PairError::NoReceiver));
        for (ranks, init, alloc) in [(2, &[1][..], &[3, 4][..]), (2, &[1, 2], &[3]), (1, &[1, 2], &[3, 4])] {
            assert!(matches!(
                check(ranks, Some((init, alloc))),
                Err(PairError::Ports { .. })
            ));
        }
    }

    #[test]
    fn the_prefill_leg_names_the_decoders_ports() {
        let params = |first_token| -> serde_json::Value {
            let text = lmcache(first_token).prefill_params("r", &endpoint(1, Some((&[7300], &[7400]))));
            serde_json::from_str(&text).expect("JSON")
        };
        let spec = json!({"req_id": "r", "receiver_host": "10.0.0.2", "receiver_init_port": [7300], "receiver_alloc_port": [7400]});
        assert_eq!(
            params(FirstToken::Decoder),
            json!({"disagg_spec": spec, "lmcache.tag.handoff": "r"})
        );
        assert_eq!(
            params(FirstToken::Prefiller),
            json!({"disagg_spec": spec, "lmcache.tag.handoff": "r", "ret_first_tok": true})
        );
    }
}
