//! LMCache MP: a cache server that keeps the KV of whole chunks of prompts, and an engine's side of it.
//!
//! Arguments, ports and log lines are those of `lmcache server` 0.5.6; what goes over its socket is the simulation's own.

use std::sync::{Arc, Mutex, PoisonError};

use axum::Json;
use axum::routing::get;
use lru::LruCache;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::time::{Duration, timeout};

use crate::sim::SimError;
use crate::sim::engine_core::tokens::mix;
use crate::sim::kv::zmq::{Client, Question, Server};
use crate::sim::log::{Log, LogTarget};
use crate::zmtp::SocketType;

/// What one token's KV takes: that of Llama 3.1 8B.
const TOKEN_BYTES: f64 = 131_072.0;

/// How long one exchange may take. With LMCache it is 300 s, in which the engine's worker does nothing else.
const EXCHANGE_DEADLINE: Duration = Duration::from_secs(5);

/// A cache server, as its command line describes it.
#[derive(Debug, Clone)]
pub struct CacheServer {
    /// Where it takes an engine's requests.
    pub requests: (String, u16),
    /// Where it tells people how it is.
    pub http: (String, u16),
    /// Its memory, in units of 2^30 bytes.
    pub l1_gibibytes: f64,
    /// Tokens of a chunk: less is not kept.
    pub chunk_tokens: usize,
}

/// What an engine asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum CacheRequest {
    /// Whether it is there.
    Ping,
    /// The records that a prompt begins with, under this salt.
    Lookup(u64, Vec<u32>),
    /// Keep the records of this prompt.
    Store(u64, Vec<u32>, Vec<u64>),
}

impl CacheServer {
    /// Serves until the process is told to end.
    ///
    /// # Errors
    /// When an address is taken, or the memory holds nothing.
    pub async fn run(self, log: LogTarget) -> Result<(), SimError> {
        let log = Log::new(log);
        let served = self.serve(&log).await;
        if let Err(error) = &served {
            let message = crate::report::one_line(error);
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
        let kept = Kept {
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

/// The records of chunks, by a hash of all tokens up to the chunk's end.
struct Kept {
    chunks: LruCache<u64, Vec<u64>>,
    /// How many chunks fit.
    capacity: f64,
    chunk_tokens: usize,
}

impl Kept {
    async fn answer(self, socket: Server) {
        let kept = Arc::new(Mutex::new(self));
        let answer = move |question: Question| {
            let kept = Arc::clone(&kept);
            async move {
                let request = rmp_serde::from_slice(&question.payload).ok()?;
                let records = kept.lock().unwrap_or_else(PoisonError::into_inner).carry_out(request);
                let records = rmp_serde::to_vec(&records).expect("numbers have no type that msgpack lacks");
                Some(vec![records.into()])
            }
        };
        socket.in_turn().serve(answer).await;
    }

    fn carry_out(&mut self, request: CacheRequest) -> Vec<u64> {
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

/// A key for each whole chunk, which stands for the salt and all tokens up to its end.
fn keys(salt: u64, prompt: &[u32], chunk_tokens: usize) -> impl Iterator<Item = u64> {
    let chunks = prompt.chunks_exact(chunk_tokens);
    chunks.scan(salt, |hash, chunk| {
        *hash = chunk.iter().fold(*hash, |hash, token| mix(hash, u64::from(*token)));
        Some(*hash)
    })
}

/// An engine's side. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct CacheClient {
    address: String,
}

impl CacheClient {
    /// The server at `address`, which must be there.
    pub(crate) async fn connect(address: String) -> Result<Self, SimError> {
        let client = Self { address };
        match client.ask(&CacheRequest::Ping).await {
            Some(_) => Ok(client),
            None => Err(SimError::NoCache(client.address)),
        }
    }

    /// The records that the prompt begins with; none if the server is gone.
    pub(crate) async fn look_up(&self, salt: Option<&str>, prompt: &[u32]) -> Vec<u64> {
        let request = CacheRequest::Lookup(number(salt), prompt.to_vec());
        self.ask(&request).await.unwrap_or_default()
    }

    /// Keeps the records of a prompt. Lost if the server is gone.
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

/// A salt as it goes into keys.
fn number(salt: Option<&str>) -> u64 {
    let bytes = salt.unwrap_or_default().bytes();
    bytes.fold(0, |hash, byte| mix(hash, u64::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(capacity: f64) -> Kept {
        Kept {
            chunks: LruCache::unbounded(),
            capacity,
            chunk_tokens: 2,
        }
    }

    #[test]
    fn whole_chunks_of_what_prompts_have_in_common_are_found() {
        let mut kept = kept(8.0);
        kept.carry_out(CacheRequest::Store(0, vec![1, 2, 3, 4, 5], vec![10, 20, 30, 40, 50]));
        let mut salted = |salt, prompt: &[u32]| kept.carry_out(CacheRequest::Lookup(salt, prompt.to_vec()));
        assert_eq!(salted(1, &[1, 2, 3, 4]), [0; 0]);
        let mut found = |prompt: &[u32]| salted(0, prompt);
        assert_eq!(found(&[1, 2, 3, 4, 5, 6]), [10, 20, 30, 40]);
        assert_eq!(found(&[1, 2, 3, 5]), [10, 20]);
        assert_eq!(found(&[1]), [0; 0]);
        assert_eq!(found(&[3, 4]), [0; 0], "KV depends on all that is before it");
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first() {
        let mut kept = kept(2.0);
        for prompt in [[1, 1], [2, 2], [3, 3]] {
            kept.carry_out(CacheRequest::Store(0, prompt.to_vec(), vec![7, 7]));
        }
        let mut found = |token| kept.carry_out(CacheRequest::Lookup(0, vec![token, token])).len();
        assert_eq!([found(1), found(2), found(3)], [0, 2, 2]);
    }
}
