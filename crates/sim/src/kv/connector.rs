//! Builds the connector of `--kv-transfer-config`: its sockets, its tasks, and its part in the core.

use std::sync::Arc;

use tokio::task::JoinSet;

use crate::SimError;
use crate::engine_core::scheduler::Connector;
use crate::kv::blocks::BlockPool;
use crate::kv::lmcache::receiver::{Receiver, ReceiverPorts};
use crate::kv::lmcache::sender::{Faults, Sender};
use crate::kv::lmcache::{Config, Role};
use crate::kv::lmcache_mp::CacheClient;
use crate::kv::nixl::{Leases, SideChannel};
use crate::kv::params::ConnectorKind;
use crate::kv::zmq::Server;
use crate::log::{Log, Process};
use crate::metrics::Metrics;
use crate::options::{KvRole, KvTransferConfig, Options};
use xpyd_base::zmtp::SocketType;

/// A connector and its addresses.
#[derive(Debug)]
pub(crate) struct ConnectorHandle {
    pub(crate) connector: Connector,
    pub(crate) kind: ConnectorKind,
    pub(crate) engine_id: String,
    pub(crate) lmcache_ports: ReceiverPorts,
    pub(crate) cache: Option<CacheClient>,
}

impl ConnectorHandle {
    fn new(connector: Connector, kind: ConnectorKind, engine_id: String) -> Self {
        Self {
            connector,
            kind,
            engine_id,
            lmcache_ports: ReceiverPorts::default(),
            cache: None,
        }
    }

    /// Builds the connector. Its tasks run in `background`.
    pub(crate) async fn make(
        options: &Options,
        log: &Log,
        metrics: &Arc<Metrics>,
        pool: &BlockPool,
        background: &mut JoinSet<()>,
    ) -> Result<Self, SimError> {
        let Some(config) = &options.kv_transfer else {
            return Ok(Self::new(Connector::None, ConnectorKind::None, String::new()));
        };
        let engine_id = config
            .engine_id
            .clone()
            .unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
        let children = config.children();
        if let Some(nixl) = children.iter().find(|child| child.is_nixl()) {
            let leases = Leases::new(nixl.lease(), Arc::clone(metrics), log.clone());
            let mut first = None;
            for rank in 0..options.data_parallel_size {
                let (socket, port) = side_channel(options, rank).await?;
                first.get_or_insert(port);
                let channel = SideChannel {
                    engine_id: engine_id.clone(),
                    model: options.model.clone(),
                    pool: pool.clone(),
                    leases: leases.clone(),
                };
                background.spawn(channel.serve(socket));
            }
            background.spawn(leases.clone().expire());
            let connector = Connector::Nixl {
                leases,
                engine_id: engine_id.clone(),
                host: options.side_channel.0.clone(),
                port: first.unwrap_or_default(),
                policy: config.kv_load_failure_policy,
            };
            let mut connected = Self::new(connector, ConnectorKind::Nixl, engine_id);
            for child in children.iter().filter(|child| !child.is_nixl()) {
                let address = child.cache_server();
                let address = address.ok_or_else(|| SimError::Connector(child.kv_connector.clone()))?;
                connected.cache = Some(CacheClient::connect(address).await?);
            }
            return Ok(connected);
        }
        if config.is_lmcache() {
            return lmcache(options, config, (log, metrics), engine_id, background).await;
        }
        Err(SimError::Connector(config.kv_connector.clone()))
    }
}

/// The side channel of a data-parallel rank: vLLM adds the rank to the port.
async fn side_channel(options: &Options, rank: u16) -> Result<(Server, u16), SimError> {
    let (host, port) = &options.side_channel;
    // Port 0 lets the system choose.
    let port = if *port == 0 { 0 } else { port.saturating_add(rank) };
    let bound = async {
        let socket = Server::bind(SocketType::Router, host, port).await?;
        let port = socket.port()?;
        Ok((socket, port))
    };
    bound.await.map_err(|source| SimError::SideChannel {
        address: format!("{host}:{port}"),
        source,
    })
}

async fn lmcache(
    options: &Options,
    transfer: &KvTransferConfig,
    (log, metrics): (&Log, &Arc<Metrics>),
    engine_id: String,
    background: &mut JoinSet<()>,
) -> Result<ConnectorHandle, SimError> {
    let config = Config::load(
        options.lmcache_config_file.as_deref(),
        options.python_hash_seed.as_deref(),
    )
    .map_err(SimError::Lmcache)?;
    let warn = |message: &str| log.line(Process::Worker, "WARNING", "config_base.py:195", message);
    for key in &config.unknown {
        warn(&format!("Unknown configuration key: {key}"));
    }
    let world_size = usize::from(options.tensor_parallel_size);
    match (config.role, transfer.kv_role) {
        (Some(Role::Sender), KvRole::KvProducer | KvRole::KvBoth) => {
            let timing = (options.preset, log.clone());
            let sender = Sender::start(
                config,
                &options.model,
                world_size,
                timing,
                Faults::of(options),
                background,
            );
            let connector = Connector::Sender(Box::new(sender));
            Ok(ConnectorHandle::new(connector, ConnectorKind::LmcacheSender, engine_id))
        }
        (Some(Role::Receiver), KvRole::KvConsumer | KvRole::KvBoth) => {
            let skip = transfer.kv_connector_extra_config.skip_last_n_tokens;
            let world = (world_size, options.preset.kv_bytes_per_token, Arc::clone(metrics));
            match Receiver::start(&config, &options.model, skip, world, background).await {
                Ok((receiver, ports)) => {
                    let connector = Connector::Receiver(receiver);
                    let mut connected = ConnectorHandle::new(connector, ConnectorKind::LmcacheReceiver, engine_id);
                    connected.lmcache_ports = ports;
                    Ok(connected)
                }
                Err(error) => {
                    // LMCache continues without it: requests succeed, and nothing is transferred.
                    let message = format!("LMCache initialization failed, running in degraded mode: {error}");
                    log.line(Process::Worker, "ERROR", "vllm_v1_adapter.py:1393", &message);
                    Ok(ConnectorHandle::new(Connector::None, ConnectorKind::None, engine_id))
                }
            }
        }
        (role, kv_role) => {
            let message = format!("PD transfers nothing with pd_role {role:?} and kv_role {kv_role:?}");
            warn(&message);
            Ok(ConnectorHandle::new(Connector::None, ConnectorKind::None, engine_id))
        }
    }
}
