//! `xpyd proxy`: only the proxy, over engines that xpyd did not start, with the flags of LMCache's reference proxy.
//!
//! It assumes that the engines are ready, because it does not supervise them.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::checks;
use super::engine_key;
use super::planning;
use super::proxy_options::{self, ProxyOptions};
use super::usage::Switch;
use crate::app;
use crate::byte_size;
use crate::connector::{Connector, ConnectorKind, FirstToken, LmCache, LmCacheMp, Nixl};
use crate::discovery::{self, Source};
use crate::fleet::{
    Endpoint, EngineId, EngineState, EngineView, FleetStage, FleetView, Incarnation, Load, Receiver, Role,
};
use crate::own_log::OwnLog;
use crate::proxy::{Notifications, Parts, Proxy, Settings};
use crate::proxy_config::{ProxyConfig, RequestDeadlines};
use crate::report::{ExitStatus, Failure};
use crate::signals::StopSignals;
use crate::ui::Printer;

/// How long requests in flight can continue after the first signal.
const DRAIN_DEADLINE: Duration = Duration::from_mins(1);

/// Serve the OpenAI API over prefill and decode engines that are already running.
///
/// Lists are comma-separated. One host with many ports, many hosts with one port, and lists of equal length form pairs.
/// One host with one port and a number of engines means consecutive ports.
#[derive(Debug, Clone, clap::Args)]
pub struct Arguments {
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    /// Port to listen on.
    #[arg(long, default_value_t = 9100)]
    pub port: u16,
    /// Engines that come and go: a file in llm-d's format (`file:endpoints.yaml`), or host names that stand for all their
    /// addresses (`dns:prefill=HOST:PORT,decode=HOST:PORT`). A new engine gets requests once a canary has worked through
    /// it; one that leaves finishes its requests.
    #[arg(long, value_name = "SOURCE", conflicts_with_all = ["prefiller_host", "prefiller_port", "num_prefillers",
        "decoder_host", "decoder_port", "num_decoders"])]
    pub discover: Option<Source>,
    /// Hosts of the prefill engines.
    #[arg(long, value_delimiter = ',', default_value = "localhost")]
    pub prefiller_host: Vec<String>,
    /// HTTP ports of the prefill engines.
    #[arg(long, value_delimiter = ',', default_value = "8100")]
    pub prefiller_port: Vec<u16>,
    /// Number of prefill engines, if it does not follow from the lists.
    #[arg(long)]
    pub num_prefillers: Option<usize>,
    /// Hosts of the decode engines.
    #[arg(long, value_delimiter = ',', default_value = "localhost")]
    pub decoder_host: Vec<String>,
    /// HTTP ports of the decode engines.
    #[arg(long, value_delimiter = ',', default_value = "8200")]
    pub decoder_port: Vec<u16>,
    /// Number of decode engines, if it does not follow from the lists.
    #[arg(long)]
    pub num_decoders: Option<usize>,
    /// LMCache: init ports of a decode engine, one per tensor-parallel rank. Further decode engines on the same host use
    /// the next ports.
    #[arg(long, value_delimiter = ',', default_value = "8300")]
    pub decoder_init_port: Vec<u16>,
    /// LMCache: allocation ports of a decode engine, as above.
    #[arg(long, value_delimiter = ',', default_value = "8400")]
    pub decoder_alloc_port: Vec<u16>,
    /// LMCache: address on which to receive the prefill engines' notifications.
    #[arg(long, default_value = "127.0.0.1")]
    pub proxy_host: String,
    /// LMCache: port on which to receive the prefill engines' notifications.
    #[arg(long, default_value_t = 8500)]
    pub proxy_port: u16,
    /// LMCache: notifications per prefill, if not one per rank. Models with MLA send one.
    #[arg(long)]
    pub notifications: Option<u16>,
    /// How KV moves between the engines.
    #[arg(long, value_enum, default_value_t = ConnectorKind::LmCache)]
    pub connector: ConnectorKind,
    /// LMCache: the engine that generates the first token.
    #[arg(long, value_enum, default_value_t = FirstToken::Decoder)]
    pub first_token: FirstToken,
    /// Send the requests of a session to the same engines.
    #[arg(long, env = "CLIENT_BOUND", action = clap::ArgAction::Set, default_value = "false", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub client_bound: Switch,
    /// Name of the header with a request's session.
    #[arg(long, env = "CLIENT_BOUND_KEY", default_value = "session-id")]
    pub client_bound_key: String,
    /// Largest body of a request, such as `256MiB`.
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "64MiB")]
    pub max_body: usize,
    /// Most requests in the proxy at once.
    #[arg(long, default_value_t = 4096)]
    pub max_in_flight: usize,
    /// Time limit for a prefill.
    #[arg(long, value_parser = crate::span::parse, default_value = "5m")]
    pub prefill_deadline: Duration,
    /// Time limit for the KV to arrive after a prefill.
    #[arg(long, value_parser = crate::span::parse, default_value = "90s")]
    pub handoff_deadline: Duration,
    /// How long a decode engine can send nothing. An answer that is not streamed is silent until its end.
    #[arg(long, value_parser = crate::span::parse, default_value = "10m")]
    pub decode_idle_deadline: Duration,
    /// NIXL: the `kv_lease_duration` of the engines (vLLM's default is 30s). An answer that begins later than this after
    /// the start of its prefill can come from blocks of another request: the proxy discards it, and tries the request
    /// again.
    #[arg(long, value_parser = crate::span::parse)]
    pub kv_lease: Option<Duration>,
    #[command(flatten)]
    options: ProxyOptions,
    /// Set one key of the profile's `[proxy]` table, such as `routing.attempts=2`; can be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// Parses a number of bytes.
fn size(text: &str) -> Result<usize, String> {
    let bytes = byte_size::parse(text).and_then(|bytes| usize::try_from(bytes).ok());
    bytes.ok_or_else(|| "write for example `256MiB` or `1GiB`".to_owned())
}

/// Why the flags do not describe a fleet. Every variant names the flags.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FlagError {
    /// Two lists of different length.
    #[error(
        "`--{stem}-host` has {hosts} entries and `--{stem}-port` {ports}: both need the same number of entries, or \
         one of them a single entry"
    )]
    Lengths {
        /// `prefiller` or `decoder`.
        stem: &'static str,
        /// Number of entries of the host list.
        hosts: usize,
        /// Number of entries of the port list.
        ports: usize,
    },
    /// A number that contradicts the lists.
    #[error("`--num-{stem}s` is {number}, but `--{stem}-host` and `--{stem}-port` name {found}")]
    Number {
        /// `prefiller` or `decoder`.
        stem: &'static str,
        /// The given number.
        number: usize,
        /// Number of engines in the lists.
        found: usize,
    },
    /// A number of 0 engines.
    #[error("`--num-{stem}s` must be at least 1")]
    None {
        /// `prefiller` or `decoder`.
        stem: &'static str,
    },
    /// Different numbers of init and allocation ports.
    #[error(
        "`--decoder-init-port` has {init} entries and `--decoder-alloc-port` {alloc}: both need one per tensor-parallel rank"
    )]
    Ranks {
        /// Number of entries of the list of init ports.
        init: usize,
        /// Number of entries of the list of allocation ports.
        alloc: usize,
    },
    /// A consecutive port would be above 65535.
    #[error("`--{flag}` would need a port above 65535")]
    Overflow {
        /// The flag, without dashes.
        flag: String,
    },
}

/// The engines in the flags: prefill engines, then decode engines.
///
/// # Errors
/// When lists cannot be paired, or a port would be above 65535.
pub fn endpoints(arguments: &Arguments) -> Result<(Vec<Endpoint>, Vec<Endpoint>), FlagError> {
    let prefill = pairs(
        "prefiller",
        &arguments.prefiller_host,
        &arguments.prefiller_port,
        arguments.num_prefillers,
    )?;
    let decode = pairs(
        "decoder",
        &arguments.decoder_host,
        &arguments.decoder_port,
        arguments.num_decoders,
    )?;
    let lmcache = arguments.connector == ConnectorKind::LmCache;
    let (init, alloc) = (&arguments.decoder_init_port, &arguments.decoder_alloc_port);
    if lmcache && (init.len() != alloc.len() || init.is_empty()) {
        return Err(FlagError::Ranks {
            init: init.len(),
            alloc: alloc.len(),
        });
    }
    let ranks = if lmcache { init.len() } else { 1 };
    let endpoint = |(host, port): &(String, u16), receiver| Endpoint {
        host: host.clone(),
        port: *port,
        tensor_parallel: u16::try_from(ranks).unwrap_or(u16::MAX),
        receiver,
    };
    let mut decoders = Vec::with_capacity(decode.len());
    for (index, pair) in decode.iter().enumerate() {
        // Engines on different hosts can use the same port numbers.
        let neighbours = decode[..index].iter().filter(|(host, _)| *host == pair.0).count();
        let receiver = if lmcache {
            Some(Receiver {
                host: pair.0.clone(),
                init_ports: shifted(init, neighbours * ranks, "decoder-init-port")?,
                alloc_ports: shifted(alloc, neighbours * ranks, "decoder-alloc-port")?,
            })
        } else {
            None
        };
        decoders.push(endpoint(pair, receiver));
    }
    Ok((prefill.iter().map(|pair| endpoint(pair, None)).collect(), decoders))
}

/// Pairs of host and port, by the rules of the reference proxy.
fn pairs(
    stem: &'static str,
    hosts: &[String],
    ports: &[u16],
    number: Option<usize>,
) -> Result<Vec<(String, u16)>, FlagError> {
    let host = |text: &String| text.trim().trim_start_matches('[').trim_end_matches(']').to_owned();
    if number == Some(0) {
        return Err(FlagError::None { stem });
    }
    let found: Vec<(String, u16)> = match (hosts, ports) {
        ([only], [first]) => (0..number.unwrap_or(1))
            .map(|index| Ok((host(only), shifted(&[*first], index, &format!("{stem}-port"))?[0])))
            .collect::<Result<_, FlagError>>()?,
        ([only], ports) => ports.iter().map(|port| (host(only), *port)).collect(),
        (hosts, [only]) => hosts.iter().map(|text| (host(text), *only)).collect(),
        (hosts, ports) if hosts.len() == ports.len() => hosts.iter().map(host).zip(ports.iter().copied()).collect(),
        (hosts, ports) => {
            return Err(FlagError::Lengths {
                stem,
                hosts: hosts.len(),
                ports: ports.len(),
            });
        }
    };
    match number {
        Some(number) if number != found.len() => Err(FlagError::Number {
            stem,
            number,
            found: found.len(),
        }),
        _ => Ok(found),
    }
}

fn shifted(ports: &[u16], by: usize, flag: &str) -> Result<Vec<u16>, FlagError> {
    let shift = |port: &u16| u16::try_from(by).ok().and_then(|by| port.checked_add(by));
    ports
        .iter()
        .map(shift)
        .collect::<Option<_>>()
        .ok_or_else(|| FlagError::Overflow { flag: flag.to_owned() })
}

/// Serves until a signal; a second signal ends requests in flight.
pub async fn run(arguments: Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    let usage = |error: FlagError| {
        Failure::new(ExitStatus::Usage, error).hint("`xpyd proxy --help` explains the lists of hosts and ports")
    };
    let (prefill, decode) = match &arguments.discover {
        None => endpoints(&arguments).map_err(usage)?,
        Some(_) if arguments.connector == ConnectorKind::LmCache => return Err(lmcache_needs_ports()),
        Some(_) => Default::default(),
    };
    let config = config(&arguments)?;
    let _log = OwnLog::to_standard_error().map_err(anyhow::Error::from)?;
    let scheme = config.clients.scheme();
    let parts = Parts {
        engine_key: engine_key::checked(engine_key::inherited().as_deref())?,
        ..proxy_options::open_parts(&config)?
    };
    for finding in checks::of_proxy(&config) {
        printer.status(planning::line(&finding));
    }
    let settings = settings(&arguments, config, parts);
    let mut signals = StopSignals::listen().map_err(anyhow::Error::from)?;
    let notifications = match arguments.connector {
        ConnectorKind::Nixl | ConnectorKind::LmCacheMp => None,
        ConnectorKind::LmCache => Some(
            Notifications::bind(&arguments.proxy_host, arguments.proxy_port)
                .await
                .map_err(|error| {
                    Failure::new(ExitStatus::Failure, error)
                        .hint("choose another address with `--proxy-host` and `--proxy-port`")
                })?,
        ),
    };
    let listener = TcpListener::bind((arguments.host.as_str(), arguments.port))
        .await
        .map_err(|error| {
            let error =
                anyhow::Error::new(error).context(format!("cannot listen on `{}:{}`", arguments.host, arguments.port));
            Failure::new(ExitStatus::Failure, error).hint("choose another address with `--host` and `--port`")
        })?;
    let address = listener.local_addr().map_err(anyhow::Error::from)?;
    printer.status(match &arguments.discover {
        None => format!(
            "serving {} prefill and {} decode engines on {scheme}://{address}",
            prefill.len(),
            decode.len()
        ),
        Some(source) => format!("serving the engines of {source} on {scheme}://{address}"),
    });
    if let Some(notifications) = &notifications {
        printer.status(format_args!(
            "receiving notifications on {}:{}",
            arguments.proxy_host,
            notifications.port()
        ));
    }
    // The sender is kept open: a closed channel would mean that the fleet has ended.
    let (fleet, view) = watch::channel(Arc::new(fleet(prefill, decode)));
    let proxy = Proxy::new(settings, view, notifications);
    let following = async {
        match arguments.discover {
            Some(source) => {
                let verify = |pairs| app::verify_pairs(&proxy, pairs);
                discovery::follow(source, fleet.clone(), verify, |line| printer.status(line)).await;
            }
            None => warn_of_unhealthy_engines(&proxy, printer).await,
        }
        std::future::pending::<()>().await;
    };
    serve(&proxy, listener, following, &mut signals, printer).await
}

/// Serves clients beside this work, until a signal. Then finishes their requests.
async fn serve(
    proxy: &Proxy,
    listener: TcpListener,
    following: impl Future<Output = ()>,
    signals: &mut StopSignals,
    printer: Printer,
) -> Result<ExitStatus, Failure> {
    let stop = CancellationToken::new();
    let mut serving = std::pin::pin!(proxy.clone().serve(listener, stop.clone()));
    tokio::select! {
        () = following => {}
        ended = &mut serving => return ended.map(|()| ExitStatus::Success).map_err(|error| anyhow::Error::from(error).into()),
        _ = signals.next() => stop.cancel(),
    }
    printer.status(format_args!(
        "finishing {} requests; a second signal ends them",
        proxy.in_flight()
    ));
    tokio::select! {
        ended = &mut serving => ended.map(|()| ExitStatus::Success).map_err(|error| anyhow::Error::from(error).into()),
        _ = signals.next() => Ok(ExitStatus::Forced),
        () = tokio::time::sleep(DRAIN_DEADLINE) => {
            Err(Failure::message(ExitStatus::Failure, format!("{} requests did not end in time", proxy.in_flight())))
        }
    }
}

fn lmcache_needs_ports() -> Failure {
    let problem = "`--discover` does not work with `--connector lmcache`: the file has no ports of LMCache's receivers";
    Failure::message(ExitStatus::Usage, problem.to_owned()).hint("use `--connector nixl` or `--connector lmcache-mp`")
}

/// Names the engines that do not answer now. They may still start, so this is no failure.
async fn warn_of_unhealthy_engines(proxy: &Proxy, printer: Printer) {
    let unhealthy = proxy.unhealthy_engines().await;
    for engine in &unhealthy {
        printer.status(format!(
            "warn  {} at {} does not answer `/health`: requests that need it fail",
            engine.id,
            engine.endpoint.authority()
        ));
    }
}

/// Keys of `[proxy]` that have their own flag here, so `--set` refuses them.
const KEYS_WITH_FLAGS: [(&str, &str); 6] = [
    ("host", "--host"),
    ("port", "--port"),
    ("bind_sessions", "--client-bound"),
    ("session_header", "--client-bound-key"),
    ("max_body", "--max-body"),
    ("max_in_flight", "--max-in-flight"),
];

/// The configuration: defaults, then `--set`, then flags.
fn config(arguments: &Arguments) -> Result<ProxyConfig, Failure> {
    for text in &arguments.set {
        let key = text.split('=').next().unwrap_or_default().trim();
        if let Some((_, flag)) = KEYS_WITH_FLAGS.iter().find(|(name, _)| *name == key) {
            let error = format!("`--set {text}`: `{key}` is set by a flag");
            return Err(Failure::message(ExitStatus::Usage, error).hint(format!("use `{flag}` instead")));
        }
    }
    let mut config = ProxyConfig::from_overrides(&arguments.set).map_err(|error| {
        Failure::message(ExitStatus::Usage, error).hint("`xpyd proxy --help` says where the keys are listed")
    })?;
    config.host.clone_from(&arguments.host);
    config.port = arguments.port;
    config.bind_sessions = arguments.client_bound == Switch(Some(true));
    config.session_header.clone_from(&arguments.client_bound_key);
    config.max_body = arguments.max_body;
    config.max_in_flight = arguments.max_in_flight;
    arguments.options.apply(&mut config);
    Ok(config)
}

fn connector(arguments: &Arguments) -> Connector {
    // The sizes are only used for launches.
    match arguments.connector {
        ConnectorKind::Nixl => Connector::Nixl(Nixl {}),
        ConnectorKind::LmCache => Connector::LmCache(LmCache {
            first_token: arguments.first_token,
            prefill_buffer_bytes: 0,
            decode_buffer_bytes: 0,
        }),
        ConnectorKind::LmCacheMp => Connector::LmCacheMp(LmCacheMp {
            nixl: Nixl {},
            l1_bytes: 0,
        }),
    }
}

fn settings(arguments: &Arguments, config: ProxyConfig, parts: Parts) -> Settings {
    Settings {
        connector: connector(arguments),
        // Only canaries use it, and this proxy runs none.
        served_model_name: String::new(),
        notifications: arguments.notifications,
        deadlines: RequestDeadlines {
            prefill: arguments.prefill_deadline,
            handoff: arguments.handoff_deadline,
            decode_idle: arguments.decode_idle_deadline,
            kv_lease: arguments.kv_lease,
        },
        asks_engines: true,
        parts,
        config,
    }
}

/// A constant view, in which every engine is ready.
fn fleet(prefill: Vec<Endpoint>, decode: Vec<Endpoint>) -> FleetView {
    let views = |role: Role, endpoints: Vec<Endpoint>| {
        endpoints
            .into_iter()
            .enumerate()
            .map(move |(index, endpoint)| EngineView {
                id: EngineId::new(role, index),
                role,
                incarnation: Incarnation::FIRST,
                state: EngineState::Ready,
                endpoint,
                pid: None,
                reason: None,
                restart_at: None,
                load: Arc::new(Load::default()),
            })
            .map(Arc::new)
    };
    FleetView {
        generation: 1,
        stage: FleetStage::Ready,
        engines: views(Role::Prefill, prefill)
            .chain(views(Role::Decode, decode))
            .collect(),
    }
}

#[cfg(test)]
mod tests;
