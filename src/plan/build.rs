//! Builds the plan. PURE: the same profile and machine give the same plan.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::connector::{CachePorts, Connector, Launch, LaunchContext};
use crate::engine::{EngineKind, ServeSpec};
use crate::fleet::{Endpoint, EngineId, Receiver, Role};
use crate::machine::{self, Machine};
use crate::profile::{Profile, RoleProfile};
use crate::proxy_config::RequestDeadlines;
use crate::slurm::Node;

use super::{
    EngineFile, EngineSpec, Liveness, Plan, PortUse, ProxyPlan, choose_connector, engine_options, fetch, gpus, nodes,
    reserved,
};

/// A reason why no plan can be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// LMCache was asked for, but it returns wrong text or does not work here. Holds the reason.
    #[error("connector `lmcache` is not safe here: {0}")]
    UnsafeConnector(String),
    /// A port is above 65535.
    #[error("{purpose} of {owner} would need port {port}, which is above 65535")]
    PortTooHigh {
        /// The engine, or `proxy`.
        owner: String,
        /// The purpose of the port.
        purpose: String,
        /// The port number that would be needed.
        port: u32,
    },
    /// Two parts of the plan need the same port.
    #[error("port {port} is used twice: {first} and {second}")]
    PortTwice {
        /// The port number.
        port: u16,
        /// The first owner and its purpose.
        first: String,
        /// The second owner and its purpose.
        second: String,
    },
    /// A new engine of a running fleet needs more GPUs than are free.
    #[error("{engine} needs {needed} GPU{}, but {free} of this machine are free", if *needed == 1 { "" } else { "s" })]
    NoGpuLeft {
        /// The name of the engine.
        engine: String,
        /// Number of GPUs that the engine needs.
        needed: usize,
        /// Number of GPUs that no engine of the fleet uses.
        free: usize,
    },
    /// An engine needs more GPUs than any node of the allocation has.
    #[error("{engine} needs {needed} GPUs, but no node of this allocation has more than {largest}")]
    LargerThanNode {
        /// The name of the engine.
        engine: String,
        /// Number of GPUs that the engine needs.
        needed: usize,
        /// The most GPUs of one node.
        largest: usize,
    },
    /// The profile gives an engine GPUs of several nodes.
    #[error("{engine} has GPUs of several nodes, but an engine runs on one node")]
    SpansNodes {
        /// The name of the engine.
        engine: String,
    },
    /// LMCache pushes from rank to rank, so both roles need the same number of ranks.
    #[error("connector `lmcache` needs the same tensor_parallel on both roles, not {prefill} and {decode}")]
    UnequalRanks {
        /// `tensor_parallel` of the prefill engines.
        prefill: u16,
        /// `tensor_parallel` of the decode engines.
        decode: u16,
    },
}

impl PlanError {
    /// What the user can do about the error.
    pub fn hint(&self) -> String {
        match self {
            Self::UnsafeConnector(_) => {
                "use `--connector nixl`, or `--set force_connector=true` if you know that your build is patched"
                    .to_owned()
            }
            Self::PortTooHigh { .. } | Self::PortTwice { .. } => {
                "change a port of the profile, for example `--set decode.port=7600`, or `--set port_offset=…`"
                    .to_owned()
            }
            Self::LargerThanNode { .. } => {
                "lower `tensor_parallel`, or use nodes with more GPUs; xpyd starts no engine over several nodes"
                    .to_owned()
            }
            Self::SpansNodes { .. } => "`xpyd plan` lists the GPUs of each node; change `gpus` of the role".to_owned(),
            Self::NoGpuLeft { .. } => "`nvidia-smi` shows which process uses which GPU".to_owned(),
            Self::UnequalRanks { .. } => "set the same value for both roles, or use `--connector nixl`".to_owned(),
        }
    }
}

/// Builds the plan of a run in the folder `run_dir` (absolute, or a placeholder for printing).
///
/// # Errors
/// When the profile asks for something that can never work. Whether this machine can run the plan is checked by
/// `preflight`.
pub fn build(profile: &Profile, machine: &Machine, run_dir: &Path) -> Result<Plan, PlanError> {
    let (connector, connector_reason) = choose_connector::connector(profile, machine)?;
    let (prefill_ranks, decode_ranks) = (profile.prefill.tensor_parallel, profile.decode.tensor_parallel);
    if connector.notifies() && prefill_ranks != decode_ranks {
        return Err(PlanError::UnequalRanks {
            prefill: prefill_ranks,
            decode: decode_ranks,
        });
    }
    gpus::check_sizes(profile, machine)?;
    let mut builder = Builder::new(profile, machine, &connector, run_dir, gpus::for_all(profile, machine));
    let mut engines = Vec::new();
    for role in [Role::Prefill, Role::Decode] {
        for index in 0..usize::from(builder.role(role).count) {
            engines.push(builder.engine(role, index, engines.len())?);
        }
    }
    let version = machine
        .engine
        .vllm_version()
        .filter(|_| profile.engine == EngineKind::Vllm);
    let mut plan = Plan {
        profile: profile.name.clone(),
        engine: profile.engine,
        vllm: version.map(str::to_owned),
        model: profile.model.clone(),
        fetch: builder.fetch,
        served_model_name: profile.served_model_name.clone(),
        proxy: proxy(profile, machine, &connector)?,
        notes: notes(profile, &connector),
        objections: reserved::objections(profile, &connector),
        names_gpus: !profile.prefill.gpus.is_empty() && !profile.decode.gpus.is_empty(),
        connector,
        connector_reason,
        engines,
        restart: profile.restart.clone(),
        keep: profile.deadlines.keep,
        run_dir: run_dir.to_owned(),
    };
    plan.notes.extend(gpus::notes(&plan, machine));
    check_ports(&plan)?;
    Ok(plan)
}

/// Builds engines one after the other.
pub(super) struct Builder<'input> {
    profile: &'input Profile,
    machine: &'input Machine,
    connector: &'input Connector,
    run_dir: &'input Path,
    /// The GPUs of each engine; empty for engines that use none.
    gpus: VecDeque<Vec<u32>>,
    /// The model, if xpyd downloads it before the engines start.
    fetch: Option<fetch::ModelFetch>,
}

/// The place, endpoint and ports of one engine.
struct Addresses {
    node: Option<Node>,
    gpus: Vec<u32>,
    endpoint: Endpoint,
    ports: Vec<PortUse>,
    side_channel_port: Option<u16>,
    cache: Option<CachePorts>,
}

/// The ports of one engine, collected one after the other.
struct Ports<'id> {
    owner: &'id EngineId,
    offset: u16,
    taken: Vec<PortUse>,
}

impl Ports<'_> {
    /// Takes the port `base + add`.
    fn take(&mut self, purpose: &str, base: u16, add: usize) -> Result<u16, PlanError> {
        let number = u32::from(base) + u32::from(self.offset) + u32::try_from(add).unwrap_or(u32::MAX / 2);
        let port = u16::try_from(number).map_err(|_| PlanError::PortTooHigh {
            owner: self.owner.to_string(),
            purpose: purpose.to_owned(),
            port: number,
        })?;
        self.taken.push(PortUse {
            port,
            purpose: purpose.to_owned(),
        });
        Ok(port)
    }
}

impl<'input> Builder<'input> {
    pub(super) fn new(
        profile: &'input Profile,
        machine: &'input Machine,
        connector: &'input Connector,
        run_dir: &'input Path,
        gpus: VecDeque<Vec<u32>>,
    ) -> Self {
        Self {
            profile,
            machine,
            connector,
            run_dir,
            gpus,
            fetch: fetch::model(profile, machine),
        }
    }

    fn role(&self, role: Role) -> &RoleProfile {
        match role {
            Role::Prefill => &self.profile.prefill,
            Role::Decode => &self.profile.decode,
        }
    }

    /// Builds one engine. `index` is unique within the role, `number` within the fleet.
    pub(super) fn engine(&mut self, role: Role, index: usize, number: usize) -> Result<EngineSpec, PlanError> {
        let id = EngineId::new(role, index);
        let gpus = self.gpus.pop_front().unwrap_or_default();
        let home = nodes::home(self.machine, &id, index, &gpus)?;
        let mut ports = Ports {
            owner: &id,
            offset: self.profile.port_offset,
            taken: Vec::new(),
        };
        let http = ports.take("http", self.role(role).port, index)?;
        let (mut side_channel_port, mut cache, mut receiver) = (None, None, None);
        match self.connector {
            Connector::Nixl(_) => side_channel_port = self.side_channels(role, index, &mut ports)?,
            Connector::LmCacheMp(_) => {
                side_channel_port = self.side_channels(role, index, &mut ports)?;
                let base = &self.profile.lmcache_mp;
                cache = Some(CachePorts {
                    requests: ports.take("cache server", base.port, number)?,
                    http: ports.take("cache server http", base.http_port, number)?,
                });
            }
            Connector::LmCache(_) if role == Role::Decode => {
                receiver = Some(self.receiver(index, &home.address, &mut ports)?);
            }
            Connector::LmCache(_) => {}
        }
        let mut ports = ports.taken;
        ports.extend(self.named_in_arguments(role));
        let endpoint = Endpoint {
            host: home.address,
            port: http,
            tensor_parallel: self.role(role).tensor_parallel,
            receiver,
        };
        Ok(self.spec(
            id,
            role,
            (index, number),
            Addresses {
                node: home.node,
                gpus,
                endpoint,
                ports,
                side_channel_port,
                cache,
            },
        ))
    }

    /// Takes the ports of an engine's side channels, and returns the first one.
    fn side_channels(&self, role: Role, index: usize, ports: &mut Ports<'_>) -> Result<Option<u16>, PlanError> {
        let base = match role {
            Role::Prefill => self.profile.nixl.prefill_side_channel_port,
            Role::Decode => self.profile.nixl.decode_side_channel_port,
        };
        // vLLM 0.32 listens on the port it is given plus the data-parallel rank, once for all tensor-parallel ranks.
        let ranks = usize::from(self.profile.ranks(self.role(role)).data);
        let mut first = None;
        for rank in 0..ranks {
            let purpose = match ranks {
                1 => "nixl side channel".to_owned(),
                _ => format!("nixl side channel, rank {rank}"),
            };
            let port = ports.take(&purpose, base, index * ranks + rank)?;
            first.get_or_insert(port);
        }
        Ok(first)
    }

    /// Takes the ports of a decode engine's LMCache receiver.
    fn receiver(&self, index: usize, host: &str, ports: &mut Ports<'_>) -> Result<Receiver, PlanError> {
        let ranks = usize::from(self.profile.decode.tensor_parallel);
        let mut block = |purpose: &str, base: u16| -> Result<Vec<u16>, PlanError> {
            (0..ranks)
                .map(|rank| ports.take(&format!("{purpose}, rank {rank}"), base, index * ranks + rank))
                .collect()
        };
        Ok(Receiver {
            host: host.to_owned(),
            init_ports: block("lmcache init", self.profile.lmcache.init_port)?,
            alloc_ports: block("lmcache alloc", self.profile.lmcache.alloc_port)?,
        })
    }

    fn spec(&mut self, id: EngineId, role: Role, (index, number): (usize, usize), addresses: Addresses) -> EngineSpec {
        let Addresses {
            node,
            gpus,
            endpoint,
            ports,
            side_channel_port,
            cache,
        } = addresses;
        let profile = self.profile;
        let of_sim = (profile.engine == EngineKind::Sim).then_some(profile.sim.max_model_len);
        let max_model_len = profile.vllm.max_model_len.or(of_sim);
        let notify_port = profile.lmcache.notify_port.saturating_add(profile.port_offset);
        let mut launch = self.connector.launch(&LaunchContext {
            role,
            index,
            device: profile.device,
            host: &endpoint.host,
            side_channel_port,
            receiver: endpoint.receiver.as_ref(),
            cache,
            notify: Some((nodes::proxy_address(self.machine), notify_port)),
            max_model_len,
            kv_lease: kv_lease(profile),
            lookup_deadline: profile.deadlines.lookup(),
            strict: profile.proxy.handoff.strict,
            run_dir: self.run_dir,
        });
        let file = file(&mut launch);
        let mut gpu_uuids = gpus::uuids(self.machine, &gpus);
        let visible_gpus = gpus::visible(self.machine, &gpus, &gpu_uuids);
        let (program, has_shutdown_timeout) = self.program();
        let args: Vec<String> = profile.vllm.args.iter().chain(&self.role(role).args).cloned().collect();
        let serve = ServeSpec {
            xpyd: &self.machine.xpyd,
            program: &program,
            model: &profile.model,
            served_model_name: &profile.served_model_name,
            endpoint: &endpoint,
            number,
            port_offset: profile.port_offset,
            data_parallel: profile.ranks(self.role(role)).data,
            device: profile.device,
            visible_gpus: &visible_gpus,
            numa_nodes: &gpus::numa_nodes(self.machine, &gpus, &args),
            rdma: self.machine.nodes.this.is_some() && self.machine.system.has_rdma,
            gpu_memory_utilization: gpus::given_share(profile, self.role(role)),
            max_model_len,
            launch: &launch,
            args: &args,
            has_shutdown_timeout,
            ready_deadline: profile.deadlines.ready,
            stall: profile.deadlines.stall,
            stop: profile.deadlines.stop,
            sim: (&profile.sim.preset, &profile.sim.faults),
        };
        let argv = profile.engine.command(&serve);
        let env = self.environment(&serve, role);
        // The profile's own variable wins, and xpyd cannot tell which GPUs it selects. The driver here knows no other node's.
        if env.get("CUDA_VISIBLE_DEVICES") != Some(&visible_gpus) || node.is_some() {
            gpu_uuids.clear();
        }
        EngineSpec {
            log_file: PathBuf::from(format!("{id}.log")),
            id,
            role,
            node,
            argv,
            env,
            gpus,
            gpu_uuids,
            endpoint,
            ports,
            ready_path: profile.engine.ready_path().to_owned(),
            ready_deadline: profile.deadlines.ready,
            start_stall: profile.deadlines.start_stall,
            stop_grace: profile.deadlines.stop,
            liveness: liveness(profile),
            file,
            log_limits: profile.logs,
        }
    }

    /// The ports in the profile's arguments on which vLLM's parallel ranks meet.
    fn named_in_arguments(&self, role: Role) -> impl Iterator<Item = PortUse> {
        let options = [
            ("--master-port", "master port"),
            ("--data-parallel-rpc-port", "data-parallel rpc"),
        ];
        options.into_iter().filter_map(move |(name, purpose)| {
            let value = self.profile.argument(self.role(role), name);
            Some(PortUse {
                port: value?.parse().ok()?,
                purpose: purpose.to_owned(),
            })
        })
    }

    /// The engine's variables: first those of its kind, then of the connector, then the profile's own. Later ones win.
    fn environment(&self, serve: &ServeSpec<'_>, role: Role) -> BTreeMap<String, String> {
        let mut env: BTreeMap<String, String> = self.profile.engine.environment(serve).into_iter().collect();
        env.extend(serve.launch.env.iter().cloned());
        if self.fetch.is_some() {
            // The model is in the cache when engines start. Asking the hub again costs time, and fails without a network.
            env.insert(fetch::OFFLINE.to_owned(), "1".to_owned());
        }
        if self.profile.engine == EngineKind::Vllm {
            env.extend(self.profile.vllm.env.clone());
        }
        env.extend(self.role(role).env.clone());
        env
    }

    /// The engine's program, and whether it knows `--shutdown-timeout`.
    fn program(&self) -> (PathBuf, bool) {
        match (self.profile.engine, &self.machine.engine) {
            (EngineKind::Sim, _) => (self.machine.xpyd.clone(), true),
            (
                EngineKind::Vllm,
                machine::Installation::Found {
                    program,
                    has_shutdown_timeout,
                    ..
                },
            ) => (program.clone(), *has_shutdown_timeout),
            (EngineKind::Vllm, machine::Installation::Missing(_) | machine::Installation::NotAsked) => {
                (PathBuf::from(&self.profile.vllm.program), true)
            }
        }
    }
}

/// How long a prefill engine keeps KV for a decode engine.
fn kv_lease(profile: &Profile) -> Duration {
    let lease = profile.nixl.lease.unwrap_or_else(|| profile.deadlines.kv_lease());
    // vLLM reads whole seconds.
    Duration::from_secs(lease.as_secs())
}

/// The file that an engine reads, with the template that leaves the receiver's ports open.
fn file(launch: &mut Launch) -> Option<EngineFile> {
    let (path, content) = launch.file.take()?;
    Some(EngineFile {
        path,
        content,
        template: launch.receiver_template.take(),
    })
}

fn liveness(profile: &Profile) -> Liveness {
    let metrics = profile.engine.progress_metrics();
    Liveness {
        path: metrics.path.to_owned(),
        running: metrics.running.to_owned(),
        counters: metrics.counters.iter().map(|&name| name.to_owned()).collect(),
        stall: profile.deadlines.stall,
        expired_leases: metrics.expired_leases.to_owned(),
        late_reads: metrics.late_reads.to_owned(),
    }
}

fn proxy(profile: &Profile, machine: &Machine, connector: &Connector) -> Result<ProxyPlan, PlanError> {
    let port = |purpose: &str, base: u16| {
        base.checked_add(profile.port_offset)
            .ok_or_else(|| PlanError::PortTooHigh {
                owner: "proxy".to_owned(),
                purpose: purpose.to_owned(),
                port: u32::from(base) + u32::from(profile.port_offset),
            })
    };
    let notify = if connector.notifies() {
        Some((
            nodes::proxy_address(machine).to_owned(),
            port("lmcache notifications", profile.lmcache.notify_port)?,
        ))
    } else {
        None
    };
    let mut config = engine_options::proxy_config(profile);
    if !profile.proxy_port_is_exact {
        config.port = port("http", config.port)?;
    }
    let deadlines = &profile.deadlines;
    Ok(ProxyPlan {
        config,
        notify,
        notifications: profile.lmcache.notifications,
        drain_deadline: deadlines.drain,
        deadlines: RequestDeadlines {
            prefill: deadlines.prefill,
            handoff: deadlines.handoff,
            decode_idle: deadlines.decode_idle,
            kv_lease: (!connector.notifies()).then(|| kv_lease(profile)),
        },
    })
}

/// Notes for the user that do not stop the run.
fn notes(profile: &Profile, connector: &Connector) -> Vec<String> {
    let mut notes = Vec::new();
    if profile.engine == EngineKind::Sim {
        notes.push("simulated engines: generated answers, timing of the preset".to_owned());
    }
    if connector.notifies() && profile.vllm.max_model_len.is_none() && profile.engine == EngineKind::Vllm {
        notes.push(
            "vllm.max_model_len is not set: KV of a prompt that is larger than an LMCache buffer is not \
             transferred"
                .to_owned(),
        );
    }
    let listens_beyond_loopback = !["127.0.0.1", "::1", "localhost"].contains(&profile.proxy.host.as_str());
    if listens_beyond_loopback && profile.proxy.guard.api_key_file.is_none() {
        notes.push(format!(
            "the proxy listens on {}: without `proxy.guard.api_key_file` or XPYD_API_KEY, anyone who reaches it can use it",
            profile.proxy.host
        ));
    }
    notes
}

pub(super) fn check_ports(plan: &Plan) -> Result<(), PlanError> {
    for pair in plan.ports().windows(2) {
        let [(port, first), (next, second)] = pair else {
            continue;
        };
        if port == next {
            return Err(PlanError::PortTwice {
                port: *port,
                first: first.clone(),
                second: second.clone(),
            });
        }
    }
    Ok(())
}
