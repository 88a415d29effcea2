//! NIXL pull: blocks under a lease on the prefill side, a side channel that serves them, and the client of the decode
//! side. Real engines move the bytes by NIXL; here they go over the side channel.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};

use crate::engine_core::timing::Preset;
use crate::kv::blocks::{BLOCK_TOKENS, BlockPool, Blocks, records};
use crate::kv::messages::{AgentMetadata, HandshakePayload, SideChannelRequest};
use crate::kv::params::PullParams;
use crate::kv::zmq::{Client, Server, ZmqRequest};
use crate::log::{Log, Process};
use crate::metrics::Metrics;
use xpyd_base::zmtp::{PeerError, SocketType};

/// Time limit of the first connection to a side channel.
const FIRST_CONTACT_DEADLINE: Duration = Duration::from_secs(5);
/// Time limit of later connections: a refusal is seen at once.
const CONNECT_DEADLINE: Duration = Duration::from_millis(50);

/// Leased blocks that wait for a decode engine. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Leases {
    table: Arc<Mutex<LeaseTable>>,
    changed: Arc<Notify>,
    duration: Duration,
    metrics: Arc<Metrics>,
    log: Log,
}

#[derive(Debug, Default)]
struct LeaseTable {
    held: HashMap<String, (Blocks, Instant)>,
}

impl Leases {
    pub(crate) fn new(duration: Duration, metrics: Arc<Metrics>, log: Log) -> Self {
        Self {
            table: Arc::default(),
            changed: Arc::new(Notify::new()),
            duration,
            metrics,
            log,
        }
    }

    /// Keeps blocks until a decode engine pulls them by this id.
    pub(crate) fn hold(&self, request_id: &str, blocks: Blocks) {
        let expiry = Instant::now() + self.duration;
        self.lock().held.insert(request_id.to_owned(), (blocks, expiry));
        self.changed.notify_one();
    }

    /// Frees pulled or released blocks.
    fn release(&self, request_id: &str) {
        if self.lock().held.remove(request_id).is_none() {
            self.metrics.late_notifications.add(1);
            let message = format!("Potentially invalid KV blocks for unrecognized request {request_id}");
            self.log.line(Process::Worker, "ERROR", "base_worker.py:3060", &message);
        }
    }

    /// Frees blocks whose lease has expired. Runs forever.
    pub(crate) async fn expire(self) {
        loop {
            let changed = self.changed.notified();
            let next = self.lock().held.values().map(|(_, expiry)| *expiry).min();
            match next {
                None => changed.await,
                Some(expiry) => sleep_until(expiry).await,
            }
            let now = Instant::now();
            let mut table = self.lock();
            let over: Vec<String> = table
                .held
                .iter()
                .filter(|(_, (_, expiry))| *expiry <= now)
                .map(|(request_id, _)| request_id.clone())
                .collect();
            for request_id in over {
                table.held.remove(&request_id);
                self.metrics.expired_requests.add(1);
                let message = format!(
                    "Releasing expired KV blocks for request {request_id} which were retrieved by 0 remote worker(s)"
                );
                self.log
                    .line(Process::Worker, "WARNING", "base_worker.py:3032", &message);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, LeaseTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The side channel of a prefill engine.
pub(crate) struct SideChannel {
    pub(crate) engine_id: String,
    pub(crate) model: String,
    pub(crate) pool: BlockPool,
    pub(crate) leases: Leases,
}

impl SideChannel {
    /// Serves forever.
    pub(crate) async fn serve(self, socket: Server) {
        let (started, channel) = (Instant::now(), Arc::new(self));
        let answer = move |question: ZmqRequest| {
            let channel = Arc::clone(&channel);
            async move { channel.answer(&question.payload, started) }
        };
        // vLLM uses one thread.
        socket.one_at_a_time().serve(answer).await;
    }

    /// vLLM logs unknown messages and does not answer.
    fn answer(&self, payload: &[u8], started: Instant) -> Option<Vec<Bytes>> {
        Some(match SideChannelRequest::from_bytes(payload)? {
            SideChannelRequest::GetMeta(_, _) => {
                let time = rmp_serde::to_vec(&started.elapsed().as_secs_f64())
                    .expect("a number has no type that msgpack lacks");
                vec![self.metadata(), time.into()]
            }
            SideChannelRequest::Read {
                engine_id,
                request_id: _,
                blocks,
            } => vec![self.read(&engine_id, &blocks)],
            SideChannelRequest::Done(notification) => {
                let request_id = notification
                    .rsplit_once(':')
                    .map_or(notification.as_str(), |(id, _)| id);
                self.leases.release(request_id);
                vec![Bytes::new()]
            }
        })
    }

    /// The bytes of the blocks, even if another request has them now; empty if the read fails. Real engines do not
    /// check the lease here either, so a late read succeeds.
    fn read(&self, engine_id: &str, blocks: &[u32]) -> Bytes {
        if engine_id != self.engine_id {
            return Bytes::new();
        }
        self.pool.read(blocks).unwrap_or_default()
    }

    fn metadata(&self) -> Bytes {
        let agent = AgentMetadata {
            engine_id: self.engine_id.clone(),
            opaque: b"xpyd".to_vec(),
            kv_caches_base_addr: Vec::new(),
            device_id: 0,
            num_blocks: u32::try_from(self.pool.total()).unwrap_or(u32::MAX),
            block_lens: Vec::new(),
            kv_cache_layout: "LBHNC".to_owned(),
            block_size: u32::try_from(BLOCK_TOKENS).unwrap_or(u32::MAX),
            attn_backend_name: "XPYD_SIM".to_owned(),
        };
        let payload = HandshakePayload {
            compatibility_hash: compatibility_hash(&self.model),
            agent_metadata_bytes: rmp_serde::to_vec_named(&agent).expect("metadata has no type that msgpack lacks"),
        };
        rmp_serde::to_vec_named(&payload)
            .expect("a payload has no type that msgpack lacks")
            .into()
    }
}

/// Equal on compatible engines. vLLM hashes its version, the model name and more.
fn compatibility_hash(model: &str) -> String {
    let hash = model
        .bytes()
        .fold(0, |hash, byte| crate::engine_core::tokens::mix(hash, u64::from(byte)));
    format!("xpyd-sim-{hash:016x}")
}

/// Why a pull failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PullError {
    #[error("NIXL handshake failed")]
    Handshake,
    #[error("compatibility hash or engine id differ")]
    Incompatible,
    #[error("NIXL_ERR_REMOTE_DISCONNECT")]
    Disconnected,
}

/// A connection of a decode engine to the side channel of a prefill engine.
pub(crate) struct Peer {
    socket: Client,
}

impl Peer {
    /// Connects; the first time it also exchanges metadata.
    pub(crate) async fn reach(params: &PullParams, model: &str, met: bool, preset: &Preset) -> Result<Self, PullError> {
        let deadline = if met { CONNECT_DEADLINE } else { FIRST_CONTACT_DEADLINE };
        let address = format!("{}:{}", params.host, params.port);
        let socket = Client::connect(SocketType::Req, &address, "", deadline).await;
        let mut peer = Self {
            socket: socket.map_err(|_| {
                if met {
                    PullError::Disconnected
                } else {
                    PullError::Handshake
                }
            })?,
        };
        if !met {
            let answer = peer.ask(&SideChannelRequest::GetMeta(0, 0)).await?;
            let payload: HandshakePayload = rmp_serde::from_slice(&answer).map_err(|_| PullError::Handshake)?;
            let agent: AgentMetadata =
                rmp_serde::from_slice(&payload.agent_metadata_bytes).map_err(|_| PullError::Handshake)?;
            if payload.compatibility_hash != compatibility_hash(model) || agent.engine_id != params.engine_id {
                return Err(PullError::Incompatible);
            }
            sleep(preset.handshake()).await;
        }
        Ok(peer)
    }

    /// Pulls the records of `tokens` tokens and notifies the prefill engine to free them.
    pub(crate) async fn fetch(
        mut self,
        params: &PullParams,
        tokens: usize,
        preset: &Preset,
    ) -> Result<Vec<u64>, PullError> {
        let due = Instant::now() + preset.transfer(tokens);
        let request = SideChannelRequest::Read {
            engine_id: params.engine_id.clone(),
            request_id: params.request_id.clone(),
            blocks: params.blocks.clone(),
        };
        let bytes = self.ask(&request).await?;
        let fetched: Vec<u64> = records(&bytes).take(tokens).collect();
        if fetched.len() < tokens {
            return Err(PullError::Disconnected);
        }
        sleep_until(due).await;
        self.done(params).await?;
        Ok(fetched)
    }

    /// Notifies the prefill engine to free its blocks.
    pub(crate) async fn done(&mut self, params: &PullParams) -> Result<(), PullError> {
        let notification = format!("{}:1", params.request_id);
        self.ask(&SideChannelRequest::Done(notification)).await.map(drop)
    }

    async fn ask(&mut self, request: &SideChannelRequest) -> Result<Vec<u8>, PullError> {
        let answer = tokio::time::timeout(FIRST_CONTACT_DEADLINE, self.socket.ask(&request.to_bytes())).await;
        answer
            .unwrap_or(Err(PeerError::Slow(FIRST_CONTACT_DEADLINE)))
            .map_err(|_| PullError::Disconnected)
    }
}
