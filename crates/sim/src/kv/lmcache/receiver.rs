//! The decode side of LMCache PD: a bounded buffer per rank. Prefill engines allocate and write pages, and only the
//! decode of the same prompt frees them.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::{Config, key};
use crate::engine_core::tokens::mix;
use crate::kv::blocks::records;
use crate::kv::messages::LmcacheMessage;
use crate::kv::zmq::{Server, ZmqRequest};
use crate::metrics::Metrics;
use xpyd_base::zmtp::SocketType;

/// The ranks of a receiver.
#[derive(Debug, Clone)]
pub(crate) struct Receiver {
    config: Arc<Config>,
    model: Arc<str>,
    skip_last_tokens: usize,
    ranks: Arc<[Rank]>,
}

/// One rank's buffer.
#[derive(Debug)]
struct Rank {
    metrics: Arc<Metrics>,
    buffer: Mutex<Buffer>,
    freed: Notify,
    /// Serializes allocations in the order of requests.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Buffer {
    free: VecDeque<i64>,
    /// Received and expected pages. A key can be expected several times: entries are counted, not overwritten.
    entries: HashMap<String, VecDeque<KvPage>>,
    /// Identities of senders after their handshake with this process.
    senders: HashSet<String>,
}

#[derive(Debug)]
struct KvPage {
    index: i64,
    /// `None` until the bytes have arrived.
    bytes: Option<Bytes>,
}

/// The ports of a receiver in rank order.
#[derive(Debug, Clone, Default)]
pub(crate) struct ReceiverPorts {
    pub(crate) init: Vec<u16>,
    pub(crate) alloc: Vec<u16>,
}

impl Receiver {
    /// Binds the ports of all ranks and serves them in `tasks`. `bytes_per_token` is the KV of all ranks.
    pub(crate) async fn start(
        config: &Config,
        model: &str,
        skip_last_tokens: usize,
        world: (usize, u64, Arc<Metrics>),
        tasks: &mut JoinSet<()>,
    ) -> io::Result<(Self, ReceiverPorts)> {
        let (world_size, bytes_per_token, metrics) = world;
        let chunk_bytes = config.chunk_size as u64 * bytes_per_token / world_size as u64;
        let pages = i64::try_from(config.buffer_size / chunk_bytes).unwrap_or(i64::MAX);
        let receiver = Self {
            config: Arc::new(config.clone()),
            model: model.into(),
            skip_last_tokens,
            ranks: (0..world_size)
                .map(|_| Rank {
                    metrics: Arc::clone(&metrics),
                    buffer: Mutex::new(Buffer {
                        free: (0..pages).collect(),
                        entries: HashMap::new(),
                        senders: HashSet::new(),
                    }),
                    freed: Notify::new(),
                    turn: tokio::sync::Mutex::new(()),
                })
                .collect(),
        };
        let mut bound = ReceiverPorts::default();
        // A rank without a port cannot start; LMCache indexes the lists by rank.
        for rank in 0..world_size {
            let (Some(init), Some(alloc)) = (config.init_ports.get(rank), config.alloc_ports.get(rank)) else {
                return Err(io::Error::other("list index out of range"));
            };
            let init_socket = Server::bind(SocketType::Rep, &config.peer_host, *init).await?;
            bound.init.push(init_socket.port()?);
            // LMCache binds this one to all interfaces.
            let alloc_socket = Server::bind(SocketType::Router, "0.0.0.0", *alloc).await?;
            bound.alloc.push(alloc_socket.port()?);
            let ranks = Arc::clone(&receiver.ranks);
            tasks.spawn(init_socket.serve(move |question| {
                let answer = ranks[rank].shake_hands(rank, &question.payload);
                std::future::ready(answer)
            }));
            let ranks = Arc::clone(&receiver.ranks);
            tasks.spawn(alloc_socket.serve(move |question| {
                let ranks = Arc::clone(&ranks);
                async move { ranks[rank].answer(question).await }
            }));
        }
        Ok((receiver, bound))
    }

    /// Takes the records of the longest prefix of chunks of a prompt that every rank has, and frees their pages. At
    /// least one token is left to compute.
    pub(crate) fn retrieve(&self, prompt: &[u32], tag: &str) -> Vec<u64> {
        let looked_up = &prompt[..prompt.len().saturating_sub(self.skip_last_tokens)];
        let mut loaded = Vec::new();
        for (position, hash) in self.config.chunk_hashes(looked_up).into_iter().enumerate() {
            let tokens = self
                .config
                .chunk_size
                .min(looked_up.len() - position * self.config.chunk_size);
            let Some(mut chunk) = self.take_chunk(hash, tag) else {
                break;
            };
            // Bytes that never arrived are garbage, not a miss.
            chunk.resize(tokens, mix(hash, 0));
            loaded.extend(chunk);
        }
        loaded.truncate(prompt.len() - 1);
        loaded
    }

    fn take_chunk(&self, hash: u64, tag: &str) -> Option<Vec<u64>> {
        let keys: Vec<String> = (0..self.ranks.len())
            .map(|rank| key(&self.model, self.ranks.len(), rank, hash, tag))
            .collect();
        let complete = self
            .ranks
            .iter()
            .zip(&keys)
            .all(|(rank, key)| rank.lock().entries.contains_key(key));
        if !complete {
            return None;
        }
        let mut whole: Option<Vec<u64>> = None;
        for (rank, key) in self.ranks.iter().zip(&keys) {
            let bytes = rank.take(key).unwrap_or_default();
            let shard: Vec<u64> = records(&bytes).collect();
            whole = Some(match whole {
                None => shard,
                // All ranks have the same records here, so a different one was mixed up in the transfer.
                Some(first) if first == shard => first,
                Some(first) => first.iter().map(|record| mix(*record, 1)).collect(),
            });
        }
        whole
    }
}

impl Rank {
    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, key: &str) -> Option<Bytes> {
        self.free(key, |_| Some(0))
    }

    /// Frees a page whose bytes never arrived.
    fn cancel(&self, key: &str) {
        self.free(key, |pages| pages.iter().position(|page| page.bytes.is_none()));
    }

    /// Frees the page that `choose` selects and returns its bytes.
    fn free(&self, key: &str, choose: impl FnOnce(&VecDeque<KvPage>) -> Option<usize>) -> Option<Bytes> {
        let mut buffer = self.lock();
        let pages = buffer.entries.get_mut(key)?;
        let page = choose(pages).and_then(|place| pages.remove(place))?;
        if pages.is_empty() {
            buffer.entries.remove(key);
        }
        buffer.free.push_back(page.index);
        drop(buffer);
        self.metrics.buffered_pages.subtract(1);
        self.freed.notify_one();
        page.bytes
    }

    /// Allocates a page for every key, or returns `None` if too few are free. Keys count from now on, before their
    /// bytes arrive.
    fn allocate(&self, keys: &[String]) -> Option<Vec<i64>> {
        let mut buffer = self.lock();
        if buffer.free.len() < keys.len() {
            return None;
        }
        let pages: Vec<i64> = buffer.free.drain(..keys.len()).collect();
        for (key, index) in keys.iter().zip(&pages) {
            let page = KvPage {
                index: *index,
                bytes: None,
            };
            buffer.entries.entry(key.clone()).or_default().push_back(page);
        }
        self.metrics.buffered_pages.add(keys.len());
        Some(pages)
    }

    fn write(&self, keys: &[String], pages: &[i64], chunks: Vec<serde_bytes::ByteBuf>) -> bool {
        let mut buffer = self.lock();
        let mut accepted = keys.len() == chunks.len();
        for ((key, index), bytes) in keys.iter().zip(pages).zip(chunks) {
            let page = buffer
                .entries
                .get_mut(key)
                .and_then(|pages| pages.iter_mut().find(|page| page.index == *index));
            match page {
                Some(page) => page.bytes = Some(Bytes::from(bytes.into_vec())),
                None => accepted = false,
            }
        }
        accepted
    }

    /// Allocates a page for every key, after earlier requests.
    async fn wait_for_pages(&self, keys: &[String]) -> Vec<i64> {
        let _turn = self.turn.lock().await;
        loop {
            let freed = self.freed.notified();
            if let Some(pages) = self.allocate(keys) {
                return pages;
            }
            freed.await;
        }
    }

    /// Answers only the two messages of a handshake.
    fn shake_hands(&self, rank: usize, payload: &[u8]) -> Option<Vec<Bytes>> {
        let answer = match LmcacheMessage::from_bytes(payload)? {
            LmcacheMessage::NixlInitRequest { local_meta_bytes } => LmcacheMessage::NixlInitResponse {
                remote_agent_name: local_meta_bytes,
                remote_meta_bytes: format!("xpyd-receiver-{rank}").into_bytes(),
            },
            LmcacheMessage::NixlMemRegRequest { local_id, .. } => {
                self.lock().senders.insert(local_id);
                LmcacheMessage::NixlMemRegResponse {
                    remote_xfer_dlist_bytes: Vec::new(),
                }
            }
            _ => return None,
        };
        Some(vec![answer.to_bytes().into()])
    }

    /// Answers allocations when their pages are free, and accepts writes.
    async fn answer(&self, question: ZmqRequest) -> Option<Vec<Bytes>> {
        // The identity is "{sender}-to-{receiver}".
        let known = std::str::from_utf8(&question.identity)
            .ok()
            .and_then(|identity| identity.split_once("-to-"))
            .is_some_and(|(sender, _)| self.lock().senders.contains(sender));
        let answer = match LmcacheMessage::from_bytes(&question.payload)? {
            LmcacheMessage::AllocRequest {
                keys,
                req_id,
                total_chunks,
                ..
            } => {
                let is_refused = !known || (!req_id.is_empty() && total_chunks == 0);
                allocated(if is_refused {
                    vec![-1; keys.len().max(1)]
                } else {
                    self.wait_for_pages(&keys).await
                })
            }
            LmcacheMessage::CancelNotif { keys, .. } => {
                for key in &keys {
                    self.cancel(key);
                }
                allocated(Vec::new())
            }
            LmcacheMessage::XpydWrite { keys, pages, chunks } => LmcacheMessage::XpydWritten {
                accepted: known && self.write(&keys, &pages, chunks),
            },
            _ => return None,
        };
        Some(vec![answer.to_bytes().into()])
    }
}

fn allocated(remote_indexes: Vec<i64>) -> LmcacheMessage {
    LmcacheMessage::AllocResponse {
        remote_indexes,
        already_sent_indexes: Vec::new(),
    }
}
