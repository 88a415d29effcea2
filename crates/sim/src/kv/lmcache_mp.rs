//! LMCache MP: a cache server for the KV of whole chunks of prompts, and the client in an engine.
//!
//! Arguments, ports and log lines are those of `lmcache server` 0.5.6; the protocol on its socket is private to the
//! simulation.

use std::sync::{Arc, Mutex, PoisonError};

use axum::Json;
use axum::routing::get;
use lru::LruCache;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::time::{Duration, timeout};

use crate::SimError;
use crate::engine_core::tokens::mix;
use crate::kv::zmq::{Client, Server, ZmqRequest};
use crate::log::{Log, LogTarget};
use xpyd_base::zmtp::SocketType;

/// Bytes of KV per token: those of Llama 3.1 8B.
const TOKEN_BYTES: f64 = 131_072.0;

/// Time limit of one request. LMCache has 300 s, during which the engine's worker is blocked.
const EXCHANGE_DEADLINE: Duration = Duration::from_secs(5);

/// The settings of a cache server.
#[derive(Debug, Clone)]
pub struct CacheServer {
    /// Address for engines.
    pub requests: (String, u16),
    /// Address of its status page.
    pub http: (String, u16),
    /// Memory in GiB.
    pub l1_gibibytes: f64,
    /// Tokens per chunk; incomplete chunks are not stored.
    pub chunk_tokens: usize,
}

/// A request of an engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum CacheRequest {
    /// Checks that the server answers.
    Ping,
    /// Looks up the records of the beginning of a prompt under this salt.
    Lookup(u64, Vec<u32>),
    /// Stores the records of this prompt.
    Store(u64, Vec<u32>, Vec<u64>),
}

impl CacheServer {
    /// Serves until the process is asked to stop.
    ///
    /// # Errors
    /// When an address is taken or the memory is too small.
    pub async fn run(self, log: LogTarget) -> Result<(), SimError> {
        let log = Log::new(log);
        let served = self.serve(&log).await;
        if let Err(error) = &served {
            let message = xpyd_base::report::one_line(error);
            log.raw(&format!(
                "Traceback (most recent call last):\nRuntimeError: {message}\n"
            ));
        }
        served
    }

    async fn serve(self, log: &Log) -> Result<(), SimError> {
        let capacity = self.l1_gibibytes * f64::from(1 << 30) / TOKEN_BYTES / self.chunk_tokens as f64;
        if capacity < 1.0 {
            return Err(SimError::CacheSize(self.l1_gibibytes));
        }
        let address = |(host, port): &(String, u16)| format!("{host}:{port}");
        let http = TcpListener::bind(address(&self.http))
            .await
            .map_err(|source| SimError::Bind {
                address: address(&self.http),
                source,
            })?;
        let (host, port) = &self.requests;
        let socket = Server::bind(SocketType::Router, host, *port).await;
        let socket = socket.map_err(|source| SimError::Cache(address(&self.requests), source))?;
        let time = jiff::Zoned::now().strftime("%Y-%m-%d %H:%M:%S,%3f");
        log.raw(&format!(
            "[{time}] LMCache INFO: LMCache zmq cache server is running on {}\n",
            address(&self.requests)
        ));
        let health = axum::Router::new().route("/healthcheck", get(|| async { Json("healthy") }));
        let kept = ChunkStore {
            chunks: LruCache::unbounded(),
            capacity,
            chunk_tokens: self.chunk_tokens,
        };
        tokio::select! {
            served = async { axum::serve(http, health).await } => {
                served.map_err(|error| SimError::System("serve the cache server's health", error))
            }
            () = kept.answer(socket) => Ok(()),
        }
    }
}

/// The records of chunks by a hash of all tokens up to the end of the chunk.
struct ChunkStore {
    chunks: LruCache<u64, Vec<u64>>,
    /// Capacity in chunks.
    capacity: f64,
    chunk_tokens: usize,
}

impl ChunkStore {
    async fn answer(self, socket: Server) {
        let kept = Arc::new(Mutex::new(self));
        let answer = move |question: ZmqRequest| {
            let kept = Arc::clone(&kept);
            async move {
                let request = rmp_serde::from_slice(&question.payload).ok()?;
                let records = kept.lock().unwrap_or_else(PoisonError::into_inner).handle(request);
                let records = rmp_serde::to_vec(&records).expect("numbers have no type that msgpack lacks");
                Some(vec![records.into()])
            }
        };
        socket.one_at_a_time().serve(answer).await;
    }

    fn handle(&mut self, request: CacheRequest) -> Vec<u64> {
        match request {
            CacheRequest::Ping => Vec::new(),
            CacheRequest::Lookup(salt, prompt) => {
                let found = keys(salt, &prompt, self.chunk_tokens).map_while(|key| self.chunks.get(&key).cloned());
                found.flatten().collect()
            }
            CacheRequest::Store(salt, prompt, records) => {
                let chunks = records.chunks_exact(self.chunk_tokens);
                for (key, chunk) in keys(salt, &prompt, self.chunk_tokens).zip(chunks) {
                    self.chunks.put(key, chunk.to_vec());
                }
                while self.chunks.len() as f64 > self.capacity {
                    self.chunks.pop_lru();
                }
                Vec::new()
            }
        }
    }
}

/// The keys of whole chunks: a hash of the salt and all tokens up to the end of the chunk.
fn keys(salt: u64, prompt: &[u32], chunk_tokens: usize) -> impl Iterator<Item = u64> {
    let chunks = prompt.chunks_exact(chunk_tokens);
    chunks.scan(salt, |hash, chunk| {
        *hash = chunk.iter().fold(*hash, |hash, token| mix(hash, u64::from(*token)));
        Some(*hash)
    })
}

/// The client in an engine. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct CacheClient {
    address: String,
}

impl CacheClient {
    /// Connects to the server at `address`, which must answer.
    pub(crate) async fn connect(address: String) -> Result<Self, SimError> {
        let client = Self { address };
        match client.ask(&CacheRequest::Ping).await {
            Some(_) => Ok(client),
            None => Err(SimError::NoCache(client.address)),
        }
    }

    /// The stored records of the beginning of a prompt; empty if the server is gone.
    pub(crate) async fn look_up(&self, salt: Option<&str>, prompt: &[u32]) -> Vec<u64> {
        let request = CacheRequest::Lookup(number(salt), prompt.to_vec());
        self.ask(&request).await.unwrap_or_default()
    }

    /// Stores the records of a prompt; ignored if the server is gone.
    pub(crate) async fn store(&self, salt: Option<&str>, prompt: &[u32], records: Vec<u64>) {
        let request = CacheRequest::Store(number(salt), prompt.to_vec(), records);
        drop(self.ask(&request).await);
    }

    async fn ask(&self, request: &CacheRequest) -> Option<Vec<u64>> {
        let exchange = async {
            let address = self.address.strip_prefix("tcp://").unwrap_or(&self.address);
            let mut socket = Client::connect(SocketType::Req, address, "", EXCHANGE_DEADLINE)
                .await
                .ok()?;
            let payload = rmp_serde::to_vec(request).expect("numbers have no type that msgpack lacks");
            rmp_serde::from_slice(&socket.ask(&payload).await.ok()?).ok()
        };
        timeout(EXCHANGE_DEADLINE, exchange).await.ok().flatten()
    }
}

/// The number of a salt for keys.
fn number(salt: Option<&str>) -> u64 {
    let bytes = salt.unwrap_or_default().bytes();
    bytes.fold(0, |hash, byte| mix(hash, u64::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(capacity: f64) -> ChunkStore {
        ChunkStore {
            chunks: LruCache::unbounded(),
            capacity,
            chunk_tokens: 2,
        }
    }

    #[test]
    fn common_whole_chunks_are_found() {
        let mut kept = kept(8.0);
        kept.handle(CacheRequest::Store(0, vec![1, 2, 3, 4, 5], vec![10, 20, 30, 40, 50]));
        let mut salted = |salt, prompt: &[u32]| kept.handle(CacheRequest::Lookup(salt, prompt.to_vec()));
        assert_eq!(salted(1, &[1, 2, 3, 4]), [0; 0]);
        let mut found = |prompt: &[u32]| salted(0, prompt);
        assert_eq!(found(&[1, 2, 3, 4, 5, 6]), [10, 20, 30, 40]);
        assert_eq!(found(&[1, 2, 3, 5]), [10, 20]);
        assert_eq!(found(&[1]), [0; 0]);
        assert_eq!(found(&[3, 4]), [0; 0], "KV depends on all that is before it");
    }

    #[test]
    fn the_least_recently_used_chunk_is_evicted() {
        let mut kept = kept(2.0);
        for prompt in [[1, 1], [2, 2], [3, 3]] {
            kept.handle(CacheRequest::Store(0, prompt.to_vec(), vec![7, 7]));
        }
        let mut found = |token| kept.handle(CacheRequest::Lookup(0, vec![token, token])).len();
        assert_eq!([found(1), found(2), found(3)], [0, 2, 2]);
    }
}
