//! The messages on the side channels: LMCache's PD messages, vLLM's NIXL handshake, and private frames with the KV of
//! simulated engines.
//!
//! LMCache's messages are msgpack maps whose first key `type` names the message (LMCache 0.5.6, `pd_backend_async.py`
//! and `nixl_channel.py`). The handshake is that of vLLM 0.32 (`nixl/base_scheduler.py`, `nixl/metadata.py`). Private
//! frames begin with `Xpyd` or `xpyd`: real engines move KV by NIXL and never see them.

use serde::{Deserialize, Serialize};

/// A message of LMCache's PD backend, with the fields in LMCache's order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub(crate) enum LmcacheMessage {
    /// To the proxy, one per rank: the KV of this request has arrived.
    ProxyNotif {
        /// As in the request's `disagg_spec`.
        req_id: String,
    },
    /// To the receiver: a transfer failed; free its pages. Answered with an empty `AllocResponse`.
    CancelNotif {
        /// As in the request's `disagg_spec`.
        req_id: String,
        /// The reserved keys.
        keys: Vec<String>,
    },
    /// To the receiver: reserve a page per chunk.
    AllocRequest {
        /// One key per chunk, in prompt order.
        keys: Vec<String>,
        /// Memory format; 1 is `KV_2LTD`.
        fmt: i64,
        /// Shape of a full chunk.
        shape: Vec<u64>,
        /// Element type, as torch names it.
        dtype: String,
        /// Tokens of the last chunk.
        last_chunk_toks: u64,
        /// As in the request's `disagg_spec`.
        #[serde(default)]
        req_id: String,
        /// Whether more chunks follow in another message.
        #[serde(default)]
        is_last_batch: bool,
        /// Chunks of the whole request.
        #[serde(default)]
        total_chunks: u64,
    },
    /// From the receiver: the pages, or -1 for none.
    AllocResponse {
        /// A page per chunk.
        remote_indexes: Vec<i64>,
        /// Chunks that the receiver has; sync mode only.
        #[serde(default)]
        already_sent_indexes: Vec<i64>,
    },
    /// First message of a pair: the sender's agent.
    NixlInitRequest {
        /// The agent's metadata.
        #[serde(with = "serde_bytes")]
        local_meta_bytes: Vec<u8>,
    },
    /// The receiver's agent, and the name under which it knows the sender's.
    NixlInitResponse {
        /// The sender's name at the receiver.
        #[serde(with = "serde_bytes")]
        remote_agent_name: Vec<u8>,
        /// The agent's metadata.
        #[serde(with = "serde_bytes")]
        remote_meta_bytes: Vec<u8>,
    },
    /// Second message of a pair: the sender's memory.
    NixlMemRegRequest {
        /// The name just received.
        #[serde(with = "serde_bytes")]
        remote_agent_name: Vec<u8>,
        /// The sender's id, as in the identity of its allocation socket.
        local_id: String,
        /// Its descriptors.
        #[serde(with = "serde_bytes")]
        local_xfer_dlist_bytes: Vec<u8>,
    },
    /// The receiver's memory.
    NixlMemRegResponse {
        /// Its descriptors.
        #[serde(with = "serde_bytes")]
        remote_xfer_dlist_bytes: Vec<u8>,
    },
    /// Private: the bytes that a real sender writes into the receiver's pages by NIXL, on the allocation socket.
    XpydWrite {
        /// The keys that were allocated.
        keys: Vec<String>,
        /// Their pages.
        pages: Vec<i64>,
        /// The KV of each chunk.
        chunks: Vec<serde_bytes::ByteBuf>,
    },
    /// Private: the write is complete.
    XpydWritten {
        /// False when the receiver knows no such sender or page.
        accepted: bool,
    },
}

impl LmcacheMessage {
    /// As msgpack.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        rmp_serde::to_vec_named(self).expect("a message has no type that msgpack lacks")
    }

    /// Parses msgpack; `None` for other messages.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        rmp_serde::from_slice(bytes).ok()
    }
}

/// The first element of a frame to a NIXL side channel: the type of the frame.
const GET_META: &[u8] = b"get_meta_msg";
const READ: &[u8] = b"xpyd_read";
const DONE: &[u8] = b"xpyd_done";

/// A request to the NIXL side channel of a prefill engine: a msgpack array that begins with its name in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SideChannelRequest {
    /// vLLM's `get_meta_msg`: pipeline and tensor parallel rank.
    GetMeta(u32, u32),
    /// Private: read these blocks of this engine for this request.
    Read {
        /// As in the hand-off's parameters.
        engine_id: String,
        /// As in the hand-off's parameters.
        request_id: String,
        /// Blocks of the first KV cache group.
        blocks: Vec<u32>,
    },
    /// Private stand-in for the NIXL notification: `{request_id}:{consumers}`.
    Done(String),
}

impl SideChannelRequest {
    /// As msgpack.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let bytes = serde_bytes::Bytes::new;
        match self {
            Self::GetMeta(pipeline, tensor) => rmp_serde::to_vec(&(bytes(GET_META), pipeline, tensor)),
            Self::Read {
                engine_id,
                request_id,
                blocks,
            } => rmp_serde::to_vec(&(bytes(READ), engine_id, request_id, blocks)),
            Self::Done(notification) => rmp_serde::to_vec(&(bytes(DONE), notification)),
        }
        .expect("a request has no type that msgpack lacks")
    }

    /// Parses msgpack; `None` for other requests.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        type Name = serde_bytes::ByteBuf;
        if let Ok((name, pipeline, tensor)) = rmp_serde::from_slice::<(Name, u32, u32)>(bytes) {
            return (name == GET_META).then_some(Self::GetMeta(pipeline, tensor));
        }
        if let Ok((name, engine_id, request_id, blocks)) =
            rmp_serde::from_slice::<(Name, String, String, Vec<u32>)>(bytes)
        {
            return (name == READ).then_some(Self::Read {
                engine_id,
                request_id,
                blocks,
            });
        }
        let (name, notification) = rmp_serde::from_slice::<(Name, String)>(bytes).ok()?;
        (name == DONE).then_some(Self::Done(notification))
    }
}

/// The answer to `get_meta_msg`: a compatibility hash and the agent's metadata.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HandshakePayload {
    /// Equal on compatible engines: a hash of version, model, dtype and more.
    pub(crate) compatibility_hash: String,
    /// An [`AgentMetadata`] as msgpack.
    #[serde(with = "serde_bytes")]
    pub(crate) agent_metadata_bytes: Vec<u8>,
}

/// The keys of vLLM's `NixlAgentMetadata` that matter for a simulated engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AgentMetadata {
    /// The engine's id.
    pub(crate) engine_id: String,
    /// Opaque.
    #[serde(rename = "agent_metadata", with = "serde_bytes")]
    pub(crate) opaque: Vec<u8>,
    /// Addresses of the KV caches; none here.
    pub(crate) kv_caches_base_addr: Vec<u64>,
    /// The GPU.
    pub(crate) device_id: u32,
    /// Blocks of the KV cache.
    pub(crate) num_blocks: u32,
    /// Bytes per block and region.
    pub(crate) block_lens: Vec<u64>,
    /// Layout name.
    pub(crate) kv_cache_layout: String,
    /// Tokens per block.
    pub(crate) block_size: u32,
    /// Attention backend.
    pub(crate) attn_backend_name: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        use std::fmt::Write as _;
        bytes.iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").unwrap();
            text
        })
    }

    /// Created with msgspec from LMCache 0.5.6's own classes.
    fn vectors() -> Vec<(LmcacheMessage, &'static str)> {
        let key = "m@1@0@1f@half".to_owned();
        vec![
            (
                LmcacheMessage::ProxyNotif { req_id: "7f3a".into() },
                "82a474797065aa50726f78794e6f746966a67265715f6964a437663361",
            ),
            (
                LmcacheMessage::AllocRequest {
                    keys: vec![key],
                    fmt: 1,
                    shape: vec![2, 2, 256, 64],
                    dtype: "bfloat16".into(),
                    last_chunk_toks: 9,
                    req_id: "7f3a".into(),
                    is_last_batch: true,
                    total_chunks: 1,
                },
                "89a474797065ac416c6c6f6352657175657374a46b65797391ad6d403140304031664068616c66a3666d7401a57368617065940202cd010040\
                 a56474797065a862666c6f61743136af6c6173745f6368756e6b5f746f6b7309a67265715f6964a437663361ad69735f6c6173745f62617463\
                 68c3ac746f74616c5f6368756e6b7301",
            ),
            (
                LmcacheMessage::AllocResponse {
                    remote_indexes: vec![5],
                    already_sent_indexes: vec![],
                },
                "83a474797065ad416c6c6f63526573706f6e7365ae72656d6f74655f696e64657865739105b4616c72656164795f73656e745f696e6465786573\
                 90",
            ),
            (
                LmcacheMessage::NixlInitRequest {
                    local_meta_bytes: vec![1, 2],
                },
                "82a474797065af4e69786c496e697452657175657374b06c6f63616c5f6d6574615f6279746573c4020102",
            ),
            (
                LmcacheMessage::NixlInitResponse {
                    remote_agent_name: b"ag".to_vec(),
                    remote_meta_bytes: vec![3],
                },
                "83a474797065b04e69786c496e6974526573706f6e7365b172656d6f74655f6167656e745f6e616d65c4026167b172656d6f74655f6d6574615f\
                 6279746573c40103",
            ),
            (
                LmcacheMessage::NixlMemRegRequest {
                    remote_agent_name: b"ag".to_vec(),
                    local_id: "id".into(),
                    local_xfer_dlist_bytes: vec![4],
                },
                "84a474797065b14e69786c4d656d52656752657175657374b172656d6f74655f6167656e745f6e616d65c4026167a86c6f63616c5f6964a269\
                 64b66c6f63616c5f786665725f646c6973745f6279746573c40104",
            ),
            (
                LmcacheMessage::NixlMemRegResponse {
                    remote_xfer_dlist_bytes: vec![5],
                },
                "82a474797065b24e69786c4d656d526567526573706f6e7365b772656d6f74655f786665725f646c6973745f6279746573c40105",
            ),
        ]
    }

    #[test]
    fn messages_are_byte_for_byte_what_lmcache_sends() {
        for (message, expected) in vectors() {
            let bytes = message.to_bytes();
            assert_eq!(hex(&bytes), expected, "{message:?}");
            assert_eq!(LmcacheMessage::from_bytes(&bytes), Some(message));
        }
    }

    #[test]
    fn a_sync_senders_allocation_lacks_three_fields_and_is_read() {
        let sync = "86a474797065ac416c6c6f6352657175657374a46b65797391ad6d403140304031664068616c66a3666d7401a57368617065940202cd0100\
                    40a56474797065a862666c6f61743136af6c6173745f6368756e6b5f746f6b7309";
        let bytes: Vec<u8> = (0..sync.len() / 2)
            .map(|at| u8::from_str_radix(&sync[at * 2..at * 2 + 2], 16).unwrap())
            .collect();
        let Some(LmcacheMessage::AllocRequest { req_id, keys, .. }) = LmcacheMessage::from_bytes(&bytes) else {
            panic!("an allocation")
        };
        assert_eq!((req_id.as_str(), keys.len()), ("", 1));
    }

    #[test]
    fn the_metadata_request_is_byte_for_byte_what_vllm_sends() {
        let request = SideChannelRequest::GetMeta(0, 1);
        assert_eq!(hex(&request.to_bytes()), "93c40c6765745f6d6574615f6d73670001");
    }

    #[test]
    fn side_channel_requests_are_read_back() {
        let requests = [
            SideChannelRequest::GetMeta(0, 3),
            SideChannelRequest::Read {
                engine_id: "e".into(),
                request_id: "cmpl-1".into(),
                blocks: vec![1, 70_000],
            },
            SideChannelRequest::Done("cmpl-1:1".into()),
        ];
        for request in requests {
            assert_eq!(SideChannelRequest::from_bytes(&request.to_bytes()), Some(request));
        }
        assert_eq!(SideChannelRequest::from_bytes(b"\x92\x01\x02"), None);
    }
}
