//! The effect of a request's `kv_transfer_params` on an engine. Pure.
//!
//! vLLM hardly checks this object, so most mistakes in it kill the engine. Each case here was seen on real engines
//! (vLLM 0.32, `NixlConnector`; LMCache 0.5.6, async PD).

use serde::Deserialize;
use serde_json::{Map, Value};

/// The KV transfer of a sequence.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Transfer {
    /// No transfer.
    None,
    /// NIXL: the KV is leased to a decode engine.
    Hold,
    /// NIXL: the KV is pulled from a prefill engine.
    Pull(PullParams),
    /// NIXL, one of the required addresses is missing: the request is never scheduled.
    Park,
    /// NIXL, the block ids are missing: the scheduler fails an assertion.
    Fatal,
    /// LMCache: the KV is pushed to a decode engine.
    Push(DisaggSpec, FirstToken, Tag),
    /// LMCache: a request without hand-off on a sender, whose worker fails.
    PushNowhere,
    /// LMCache: the KV that other engines pushed under this tag is looked up.
    Retrieve(Tag),
}

/// Whether the answer has the id of the first token, for LMCache's reference proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FirstToken {
    Told,
    Untold,
}

/// The source of a pull.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PullParams {
    pub(crate) engine_id: String,
    pub(crate) request_id: String,
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) blocks: Vec<u32>,
    /// `remote_prefill_cached_tokens`: what `usage` reports, unchecked.
    pub(crate) cached_tokens: Option<usize>,
}

/// LMCache's `disagg_spec`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct DisaggSpec {
    pub(crate) req_id: String,
    pub(crate) receiver_host: String,
    pub(crate) receiver_init_port: Vec<u16>,
    pub(crate) receiver_alloc_port: Vec<u16>,
}

/// The connector that reads the parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConnectorKind {
    None,
    Nixl,
    LmcacheSender,
    LmcacheReceiver,
}

/// The transfer that a connector derives from the parameters.
pub(crate) fn read(kind: ConnectorKind, params: Option<&Map<String, Value>>) -> Transfer {
    match kind {
        ConnectorKind::None => Transfer::None,
        ConnectorKind::Nixl => params.map_or(Transfer::None, read_nixl),
        ConnectorKind::LmcacheSender => params
            .and_then(|params| {
                let spec = DisaggSpec::deserialize(params.get("disagg_spec")?).ok()?;
                // LMCache only checks that the key exists.
                let first = if params.contains_key("ret_first_tok") {
                    FirstToken::Told
                } else {
                    FirstToken::Untold
                };
                Some(Transfer::Push(spec, first, tag(Some(params))))
            })
            .unwrap_or(Transfer::PushNowhere),
        ConnectorKind::LmcacheReceiver => Transfer::Retrieve(tag(params)),
    }
}

/// The tags as `@name%value`, as LMCache appends them to its keys; empty without tags.
pub(crate) type Tag = String;

fn tag(params: Option<&Map<String, Value>>) -> Tag {
    let tags = params.into_iter().flatten().filter_map(|(key, value)| {
        let name = key.strip_prefix("lmcache.tag.")?;
        Some(format!("@{name}%{}", value.as_str()?))
    });
    tags.collect()
}

fn read_nixl(params: &Map<String, Value>) -> Transfer {
    let flag = |key: &str| params.get(key).and_then(Value::as_bool).unwrap_or(false);
    if flag("do_remote_prefill") {
        let Some(blocks) = block_ids(params) else {
            return Transfer::Fatal;
        };
        return pull_params(params, blocks).map_or(Transfer::Park, Transfer::Pull);
    }
    // Alone it is a plain prefill; with the other fields it requests a hand-off.
    if flag("do_remote_decode") && params.len() > 1 {
        return Transfer::Hold;
    }
    Transfer::None
}

/// The block ids of the first non-empty group.
fn block_ids(params: &Map<String, Value>) -> Option<Vec<u32>> {
    params
        .get("remote_block_ids")?
        .as_array()?
        .iter()
        .filter_map(|group| Vec::<u32>::deserialize(group).ok())
        .find(|group| !group.is_empty())
}

fn pull_params(params: &Map<String, Value>, blocks: Vec<u32>) -> Option<PullParams> {
    let text = |key: &str| params.get(key)?.as_str().map(str::to_owned);
    Some(PullParams {
        engine_id: text("remote_engine_id")?,
        request_id: text("remote_request_id")?,
        host: text("remote_host")?,
        port: params.get("remote_port")?.as_u64()?.try_into().ok()?,
        blocks,
        cached_tokens: params
            .get("remote_prefill_cached_tokens")
            .and_then(Value::as_u64)
            .and_then(|count| usize::try_from(count).ok()),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn nixl(value: &Value) -> Transfer {
        read(ConnectorKind::Nixl, value.as_object())
    }

    #[test]
    fn incomplete_pull_parameters_are_fatal_or_stall() {
        assert_eq!(nixl(&json!({"do_remote_prefill": true})), Transfer::Fatal);
        let complete = json!({"do_remote_prefill": true, "remote_block_ids": [[1]], "remote_engine_id": "e",
            "remote_request_id": "r", "remote_host": "h", "remote_port": 5600});
        assert!(matches!(nixl(&complete), Transfer::Pull(_)));
        for key in ["remote_host", "remote_port", "remote_engine_id", "remote_request_id"] {
            let mut without = complete.clone();
            without.as_object_mut().unwrap().remove(key);
            assert_eq!(nixl(&without), Transfer::Park, "{key}");
        }
        let mut off = complete;
        off["do_remote_prefill"] = json!(false);
        assert_eq!(nixl(&off), Transfer::None);
    }

    #[test]
    fn invalid_parameters_kill_only_lmcache_senders() {
        for params in [json!({}), json!({"foo": 1}), json!({"do_remote_decode": true})] {
            assert_eq!(nixl(&params), Transfer::None, "{params}");
            assert_eq!(
                read(ConnectorKind::LmcacheSender, params.as_object()),
                Transfer::PushNowhere
            );
        }
        let retrieve = |params: &Value| read(ConnectorKind::LmcacheReceiver, params.as_object());
        assert_eq!(retrieve(&Value::Null), Transfer::Retrieve(String::new()));
        let tagged = json!({"lmcache.tag.a": "1", "lmcache.other": "x", "lmcache.tag.b": "2"});
        assert_eq!(retrieve(&tagged), Transfer::Retrieve("@a%1@b%2".to_owned()));
    }
}
