//! The prefill side of LMCache PD: a handshake at the first contact with a decode engine, then allocate, write and
//! notify, one transfer after the other.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::{Config, key};
use crate::engine_core::timing::Preset;
use crate::fault::{EveryNth, Fault};
use crate::kv::messages::LmcacheMessage;
use crate::kv::params::{DisaggSpec, Tag};
use crate::kv::zmq::Client;
use crate::log::{Log, Process};
use crate::options::{Options, STEP_DEADLINE};
use xpyd_base::zmtp::{PeerError, SocketType};

/// Most queued transfers per decode engine.
const QUEUE: usize = 1024;
/// Time limit of a message of a live peer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);
/// Time for which a lost peer is retried.
const RECONNECT_DEADLINE: Duration = Duration::from_secs(20);

/// The prefill side of one engine.
#[derive(Debug)]
pub(crate) struct Sender {
    config: Config,
    model: String,
    world_size: usize,
    preset: Preset,
    log: Log,
    /// Peers by `receiver_host` + init port, as in LMCache: another spelling is another peer.
    peers: HashMap<String, mpsc::Sender<Transfer>>,
    notifications: mpsc::Sender<Notice>,
    faults: Faults,
    local_id: String,
}

/// The faults of transfers.
#[derive(Debug)]
pub(crate) struct Faults {
    failures: EveryNth,
    drops: EveryNth,
    repeats: EveryNth,
    delays: EveryNth,
    delay: Duration,
}

impl Faults {
    /// The faults of the options.
    pub(crate) fn of(options: &Options) -> Self {
        let every = |pick: fn(&Fault) -> Option<u64>| EveryNth::new(options.fault(pick));
        Self {
            failures: every(|fault| match fault {
                Fault::FailTransfer(nth) => Some(*nth),
                _ => None,
            }),
            drops: every(|fault| match fault {
                Fault::DropNotification(nth) => Some(*nth),
                _ => None,
            }),
            repeats: every(|fault| match fault {
                Fault::RepeatNotification(nth) => Some(*nth),
                _ => None,
            }),
            delays: every(|fault| match fault {
                Fault::DelayNotification(_, nth) => Some(*nth),
                _ => None,
            }),
            delay: options
                .fault(|fault| match fault {
                    Fault::DelayNotification(time, _) => Some(*time),
                    _ => None,
                })
                .unwrap_or_default(),
        }
    }
}

/// A notification and its send time.
#[derive(Debug)]
struct Notice {
    req_id: String,
    due: Instant,
}

/// The KV of one prompt to transfer.
#[derive(Debug)]
struct Transfer {
    req_id: String,
    hashes: Vec<u64>,
    tag: Tag,
    chunks: Vec<Bytes>,
    last_chunk_tokens: usize,
    tokens: usize,
    fails: bool,
    /// Number of notifications to send.
    notices: usize,
    delay: Duration,
}

/// Why a peer cannot be reached. In either case the worker never returns.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    /// A list of ports is shorter than the ranks.
    #[error("IndexError: list index out of range")]
    TooFewPorts,
    /// No answer.
    #[error("no handshake with `{0}`")]
    Unreachable(String, #[source] PeerError),
    /// An invalid answer.
    #[error("`{0}` does not answer the handshake")]
    NoAnswer(String),
}

impl Sender {
    /// Starts the notifier in `tasks`.
    pub(crate) fn start(
        config: Config,
        model: &str,
        world_size: usize,
        timing: (Preset, Log),
        faults: Faults,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let (notifications, queue) = mpsc::channel(QUEUE);
        let address = format!("{}:{}", config.proxy.0, config.proxy.1);
        let (preset, log) = timing;
        tasks.spawn(notify(address, queue, log.clone()));
        Self {
            config,
            model: model.to_owned(),
            world_size,
            preset,
            log,
            peers: HashMap::new(),
            notifications,
            faults,
            local_id: uuid::Uuid::new_v4().simple().to_string(),
        }
    }

    /// Whether requests without a receiver are accepted (sync mode).
    pub(crate) fn tolerates_plain_requests(&self) -> bool {
        self.config.sync
    }

    /// Makes the handshake with an unknown receiver. Waits up to the time limit of a worker's step.
    pub(crate) async fn meet(&mut self, spec: &DisaggSpec, tasks: &mut JoinSet<()>) -> Result<(), HandshakeError> {
        let first = spec.receiver_init_port.first().ok_or(HandshakeError::TooFewPorts)?;
        let receiver_id = format!("{}{first}", spec.receiver_host);
        if self.peers.contains_key(&receiver_id) {
            return Ok(());
        }
        for rank in 0..self.world_size {
            let port = spec.receiver_init_port.get(rank).ok_or(HandshakeError::TooFewPorts)?;
            spec.receiver_alloc_port.get(rank).ok_or(HandshakeError::TooFewPorts)?;
            handshake(format!("{}:{port}", spec.receiver_host), &self.local_id).await?;
        }
        tokio::time::sleep(self.preset.handshake()).await;
        let (queue, transfers) = mpsc::channel(QUEUE);
        let peer = Peer {
            addresses: spec.receiver_alloc_port[..self.world_size]
                .iter()
                .map(|port| format!("{}:{port}", spec.receiver_host))
                .collect(),
            identity: format!("{}-to-{receiver_id}", self.local_id),
            model: self.model.clone(),
            allocation_timeout: self.config.allocation_timeout,
            chunk_size: self.config.chunk_size as u64,
            preset: self.preset,
            log: self.log.clone(),
            notifications: self.notifications.clone(),
        };
        tasks.spawn(peer.run(transfers));
        self.peers.insert(receiver_id, queue);
        Ok(())
    }

    /// Queues the KV of a prompt for a known receiver.
    pub(crate) fn push(&mut self, spec: &DisaggSpec, tag: &str, prompt: &[u32], records: &[u64]) {
        let receiver_id = spec
            .receiver_init_port
            .first()
            .map(|first| format!("{}{first}", spec.receiver_host));
        let Some(peer) = receiver_id.and_then(|id| self.peers.get(&id)) else {
            return;
        };
        let chunks = records
            .chunks(self.config.chunk_size)
            .map(|chunk| chunk.iter().flat_map(|record| record.to_le_bytes()).collect())
            .collect();
        let transfer = Transfer {
            req_id: spec.req_id.clone(),
            hashes: self.config.chunk_hashes(prompt),
            tag: tag.to_owned(),
            chunks,
            last_chunk_tokens: (prompt.len() - 1) % self.config.chunk_size + 1,
            tokens: prompt.len(),
            fails: self.faults.failures.hits(),
            notices: match (self.faults.drops.hits(), self.faults.repeats.hits()) {
                (true, _) => 0,
                (false, true) => 2,
                (false, false) => 1,
            },
            delay: if self.faults.delays.hits() {
                self.faults.delay
            } else {
                Duration::ZERO
            },
        };
        if peer.try_send(transfer).is_err() {
            self.log
                .error("pd_backend_async.py:1003", "Async transfer queue is full");
        }
    }
}

async fn handshake(address: String, local_id: &str) -> Result<(), HandshakeError> {
    let exchange = async {
        let mut socket = Client::connect(SocketType::Req, &address, "", STEP_DEADLINE).await?;
        let first = LmcacheMessage::NixlInitRequest {
            local_meta_bytes: local_id.as_bytes().to_vec(),
        };
        let answer = socket.ask(&first.to_bytes()).await?;
        let Some(LmcacheMessage::NixlInitResponse { remote_agent_name, .. }) = LmcacheMessage::from_bytes(&answer)
        else {
            return Ok(false);
        };
        let second = LmcacheMessage::NixlMemRegRequest {
            remote_agent_name,
            local_id: local_id.to_owned(),
            local_xfer_dlist_bytes: Vec::new(),
        };
        let answer = socket.ask(&second.to_bytes()).await?;
        let is_met = matches!(
            LmcacheMessage::from_bytes(&answer),
            Some(LmcacheMessage::NixlMemRegResponse { .. })
        );
        Ok(is_met)
    };
    match exchange.await {
        Ok(true) => Ok(()),
        Ok(false) => Err(HandshakeError::NoAnswer(address)),
        Err(error) => Err(HandshakeError::Unreachable(address, error)),
    }
}

/// The transfers to one receiver, in order.
struct Peer {
    addresses: Vec<String>,
    identity: String,
    model: String,
    allocation_timeout: Duration,
    chunk_size: u64,
    preset: Preset,
    log: Log,
    notifications: mpsc::Sender<Notice>,
}

/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
enum TransferError {
    #[error("NIXL_ERR_REMOTE_DISCONNECT")]
    Disconnected,
    #[error("allocation timed out")]
    Allocation,
}

impl Peer {
    async fn run(self, mut transfers: mpsc::Receiver<Transfer>) {
        let mut connections: Option<Vec<Client>> = None;
        while let Some(transfer) = transfers.recv().await {
            let result = self.transfer(&mut connections, &transfer).await;
            if let Err(error) = result {
                // A restarted receiver has the same address, but no longer knows this sender.
                connections = None;
                let message = format!(
                    "Async transfer task failed: {error}, [ABORT] req_id={}",
                    transfer.req_id
                );
                self.log
                    .line(Process::Worker, "ERROR", "pd_backend_async.py:985", &message);
            }
        }
    }

    async fn transfer(&self, connections: &mut Option<Vec<Client>>, transfer: &Transfer) -> Result<(), TransferError> {
        if connections.is_none() {
            let mut fresh = Vec::with_capacity(self.addresses.len());
            for address in &self.addresses {
                fresh.push(self.connect(address).await?);
            }
            *connections = Some(fresh);
        }
        let connections = connections.as_mut().ok_or(TransferError::Disconnected)?;
        let mut reserved = Vec::with_capacity(connections.len());
        for (rank, connection) in connections.iter_mut().enumerate() {
            reserved.push(self.allocate(connection, rank, transfer).await?);
        }
        sleep_until(Instant::now() + self.preset.transfer(transfer.tokens)).await;
        if transfer.fails {
            for (connection, (keys, _)) in connections.iter_mut().zip(reserved) {
                let req_id = transfer.req_id.clone();
                let cancel = LmcacheMessage::CancelNotif { req_id, keys };
                exchange(connection, &cancel, ANSWER_DEADLINE).await?;
            }
            return Err(TransferError::Disconnected);
        }
        for (connection, (keys, pages)) in connections.iter_mut().zip(reserved) {
            let chunks = transfer
                .chunks
                .iter()
                .map(|chunk| serde_bytes::ByteBuf::from(chunk.to_vec()))
                .collect();
            let write = LmcacheMessage::XpydWrite { keys, pages, chunks };
            match exchange(connection, &write, ANSWER_DEADLINE).await? {
                LmcacheMessage::XpydWritten { accepted: true } => {}
                _ => return Err(TransferError::Disconnected),
            }
            for _ in 0..transfer.notices {
                let notice = Notice {
                    req_id: transfer.req_id.clone(),
                    due: Instant::now() + transfer.delay,
                };
                drop(self.notifications.send(notice).await);
            }
        }
        Ok(())
    }

    /// The allocation socket of one rank.
    async fn connect(&self, address: &str) -> Result<Client, TransferError> {
        let connected = Client::connect(SocketType::Dealer, address, &self.identity, RECONNECT_DEADLINE).await;
        connected.map_err(|_| TransferError::Disconnected)
    }

    async fn allocate(
        &self,
        connection: &mut Client,
        rank: usize,
        transfer: &Transfer,
    ) -> Result<(Vec<String>, Vec<i64>), TransferError> {
        let world_size = self.addresses.len();
        let keys: Vec<String> = transfer
            .hashes
            .iter()
            .map(|hash| key(&self.model, world_size, rank, *hash, &transfer.tag))
            .collect();
        let request = LmcacheMessage::AllocRequest {
            keys: keys.clone(),
            fmt: 1,
            // The layers and width of the model's KV do not matter here.
            shape: vec![2, 32, self.chunk_size, 1024],
            dtype: "bfloat16".to_owned(),
            last_chunk_toks: transfer.last_chunk_tokens as u64,
            req_id: transfer.req_id.clone(),
            is_last_batch: true,
            total_chunks: keys.len() as u64,
        };
        match exchange(connection, &request, self.allocation_timeout).await? {
            LmcacheMessage::AllocResponse { remote_indexes, .. }
                if remote_indexes.len() == keys.len() && !remote_indexes.contains(&-1) =>
            {
                Ok((keys, remote_indexes))
            }
            _ => Err(TransferError::Disconnected),
        }
    }
}

async fn exchange(
    connection: &mut Client,
    message: &LmcacheMessage,
    limit: Duration,
) -> Result<LmcacheMessage, TransferError> {
    let answer = timeout(limit, connection.ask(&message.to_bytes())).await;
    let answer = answer.map_err(|_| TransferError::Allocation)?;
    answer
        .ok()
        .and_then(|answer| LmcacheMessage::from_bytes(&answer))
        .ok_or(TransferError::Disconnected)
}

/// Sends the proxy one message per transfer and rank, each over its own connection. LMCache's libzmq notices at once
/// that a proxy is gone and connects to the next one.
async fn notify(address: String, mut queue: mpsc::Receiver<Notice>, log: Log) {
    let mut sending = JoinSet::new();
    while let Some(notice) = queue.recv().await {
        if notice.due > Instant::now() {
            let (address, log) = (address.clone(), log.clone());
            sending.spawn(async move { notice.send(&address, &log).await });
        } else {
            notice.send(&address, &log).await;
        }
        while sending.try_join_next().is_some() {}
    }
}

impl Notice {
    async fn send(self, address: &str, log: &Log) {
        sleep_until(self.due).await;
        let message = LmcacheMessage::ProxyNotif { req_id: self.req_id }.to_bytes();
        let sent = async {
            let socket = Client::connect(SocketType::Push, address, "", RECONNECT_DEADLINE).await?;
            socket.tell(&message).await
        };
        if sent.await.is_err() {
            log.line(
                Process::Worker,
                "WARNING",
                "pd_backend_async.py:671",
                "the proxy takes no notification",
            );
        }
    }
}
