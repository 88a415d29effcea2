//! `xpyd proxy`: the proxy alone, over engines that it did not start, with the flags of LMCache's reference proxy.
//!
//! Engines are taken to be ready: nothing here watches them.

use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::checks;
use super::engine_key;
use super::request::{self, ServiceArguments};
use super::usage::Switch;
use crate::connector::{Connector, FirstToken, LmCache, LmCacheMp, Nixl};
use crate::fleet::{
    Endpoint, EngineId, EngineState, EngineView, FleetStage, FleetView, Incarnation, Load, Receiver, Role,
};
use crate::own_log::OwnLog;
use crate::profile::parse_bytes;
use crate::proxy::{Notifications, Parts, Proxy, Settings};
use crate::report::{ExitStatus, Failure};
use crate::service::Service;
use crate::signals::StopSignals;
use crate::ui::Printer;

/// How long requests in flight may go on after the first signal.
const DRAIN_DEADLINE: Duration = Duration::from_mins(1);

/// How KV moves between the engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ConnectorName {
    /// NIXL: the decode engine pulls.
    Nixl,
    /// LMCache's PD backend: the prefill engine pushes and notifies this proxy.
    Lmcache,
    /// As `nixl`, between engines that have LMCache's cache servers as well.
    LmcacheMp,
}

/// Who makes the first token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FirstTokenName {
    /// The decode engine, from the client's own request.
    Decoder,
    /// The prefill engine; its decoders must run with `skip_last_n_tokens: 1`.
    Prefiller,
}

/// Serve the OpenAI API over prefill and decode engines that are already running.
///
/// Lists are comma-separated. One host with many ports, many hosts with one port, and lists of equal length pair up; one
/// host with one port and a number of engines means consecutive ports.
#[derive(Debug, Clone, clap::Args)]
pub struct Arguments {
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    /// Port to listen on.
    #[arg(long, default_value_t = 9100)]
    pub port: u16,
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
    /// LMCache: handshake ports of a decode engine, one per tensor-parallel rank. Further decode engines on the same
    /// host use the ports that follow.
    #[arg(long, value_delimiter = ',', default_value = "8300")]
    pub decoder_init_port: Vec<u16>,
    /// LMCache: allocation ports of a decode engine, as above.
    #[arg(long, value_delimiter = ',', default_value = "8400")]
    pub decoder_alloc_port: Vec<u16>,
    /// LMCache: address on which to take the prefill engines' notifications.
    #[arg(long, default_value = "127.0.0.1")]
    pub proxy_host: String,
    /// LMCache: port on which to take the prefill engines' notifications.
    #[arg(long, default_value_t = 8500)]
    pub proxy_port: u16,
    /// LMCache: notifications per prefill, if not one per rank. MLA models send a single one.
    #[arg(long)]
    pub notifications: Option<u16>,
    /// How KV moves between the engines.
    #[arg(long, value_enum, default_value_t = ConnectorName::Lmcache)]
    pub connector: ConnectorName,
    /// LMCache: who makes the first token.
    #[arg(long, value_enum, default_value_t = FirstTokenName::Decoder)]
    pub first_token: FirstTokenName,
    /// Keep the requests of a session on the same engines.
    #[arg(long, env = "CLIENT_BOUND", action = clap::ArgAction::Set, default_value = "false", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub client_bound: Switch,
    /// The header that names a request's session.
    #[arg(long, env = "CLIENT_BOUND_KEY", default_value = "session-id")]
    pub client_bound_key: String,
    /// Largest body of a request, such as `256MiB`.
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "64MiB")]
    pub max_body: usize,
    /// Most requests in the proxy at once.
    #[arg(long, default_value_t = 4096)]
    pub max_in_flight: usize,
    /// How long a prefill may take.
    #[arg(long, value_parser = crate::span::parse, default_value = "5m")]
    pub prefill_deadline: Duration,
    /// How long the KV may take to arrive after a prefill.
    #[arg(long, value_parser = crate::span::parse, default_value = "90s")]
    pub handoff_deadline: Duration,
    /// How long a decode engine may be silent. Answers that are not streamed are silent until their end.
    #[arg(long, value_parser = crate::span::parse, default_value = "10m")]
    pub decode_idle_deadline: Duration,
    /// NIXL: the `kv_lease_duration` of the engines, vLLM's own being 30s. An answer that begins later than this after its
    /// prefill began may come from blocks of another request: it is not passed on, and the request is tried again.
    #[arg(long, value_parser = crate::span::parse)]
    pub kv_lease: Option<Duration>,
    #[command(flatten)]
    service: ServiceArguments,
    /// Changes how clients are served, with the keys of a profile's `[proxy]` table: `routing.attempts=2`; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// A number of bytes as profiles write it.
fn size(text: &str) -> Result<usize, String> {
    let bytes = parse_bytes(text).and_then(|bytes| usize::try_from(bytes).ok());
    bytes.ok_or_else(|| "write for example `256MiB` or `1GiB`".to_owned())
}

/// Why the flags describe no fleet. Every variant names the flags.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FlagError {
    /// Two lists that cannot be paired.
    #[error(
        "`--{stem}-host` has {hosts} entries and `--{stem}-port` {ports}: they must be equal in number, or one of them single"
    )]
    Lengths {
        /// `prefiller` or `decoder`.
        stem: &'static str,
        /// Entries of the host list.
        hosts: usize,
        /// Entries of the port list.
        ports: usize,
    },
    /// A number that contradicts the lists.
    #[error("`--num-{stem}s` is {number}, but `--{stem}-host` and `--{stem}-port` name {found}")]
    Number {
        /// `prefiller` or `decoder`.
        stem: &'static str,
        /// The number given.
        number: usize,
        /// Engines named.
        found: usize,
    },
    /// No engine.
    #[error("`--num-{stem}s` must be at least 1")]
    None {
        /// `prefiller` or `decoder`.
        stem: &'static str,
    },
    /// Ports per rank that do not match.
    #[error(
        "`--decoder-init-port` has {init} entries and `--decoder-alloc-port` {alloc}: both need one per tensor-parallel rank"
    )]
    Ranks {
        /// Entries of the list of handshake ports.
        init: usize,
        /// Entries of the list of allocation ports.
        alloc: usize,
    },
    /// Counting up went past the last port.
    #[error("`--{flag}` counts up past 65535")]
    Overflow {
        /// The flag, without dashes.
        flag: String,
    },
}

/// The engines that the flags describe: prefill engines, then decode engines.
///
/// # Errors
/// When lists cannot be paired, or ports run out.
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
    let lmcache = arguments.connector == ConnectorName::Lmcache;
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
        // Hosts can use the same port numbers, engines of one host cannot.
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

/// Hosts and ports paired up by the rules of the reference proxy.
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

/// Serves until a signal; a second one ends what is in flight.
pub async fn run(arguments: Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    let usage = |error: FlagError| {
        Failure::new(ExitStatus::Usage, error).hint("`xpyd proxy --help` says how hosts and ports go together")
    };
    let (prefill, decode) = endpoints(&arguments).map_err(usage)?;
    let mut service = Service::from_overrides(&arguments.set).map_err(|error| {
        Failure::message(ExitStatus::Usage, error).hint("`xpyd proxy --help` says where the keys are")
    })?;
    arguments.service.change(&mut service);
    let _log = OwnLog::to_standard_error().map_err(anyhow::Error::from)?;
    let scheme = service.clients.scheme();
    let parts = Parts {
        engine_key: engine_key::checked(engine_key::inherited().as_deref())?,
        ..request::proxy_parts(&service)?
    };
    for finding in checks::of_service(&service) {
        printer.status(request::line(&finding));
    }
    let settings = settings(&arguments, service, parts);
    let mut signals = StopSignals::listen().map_err(anyhow::Error::from)?;
    let notifications = match arguments.connector {
        ConnectorName::Nixl | ConnectorName::LmcacheMp => None,
        ConnectorName::Lmcache => Some(
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
    printer.status(format_args!(
        "serving {} prefill and {} decode engines on {scheme}://{address}",
        prefill.len(),
        decode.len()
    ));
    if let Some(notifications) = &notifications {
        printer.status(format_args!(
            "taking notifications on {}:{}",
            arguments.proxy_host,
            notifications.port()
        ));
    }
    // The sender is kept: nothing changes, but a closed channel would say that the fleet is gone.
    let (_fleet, view) = watch::channel(Arc::new(fleet(prefill, decode)));
    let proxy = Proxy::new(settings, view, notifications);
    let stop = CancellationToken::new();
    let mut serving = std::pin::pin!(proxy.clone().serve(listener, stop.clone()));
    tokio::select! {
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

fn settings(arguments: &Arguments, service: Service, parts: Parts) -> Settings {
    Settings {
        connector: match arguments.connector {
            ConnectorName::Nixl => Connector::Nixl(Nixl {}),
            ConnectorName::Lmcache => Connector::LmCache(LmCache {
                first_token: match arguments.first_token {
                    FirstTokenName::Decoder => FirstToken::Decoder,
                    FirstTokenName::Prefiller => FirstToken::Prefiller,
                },
                // Only launches use the sizes.
                prefill_buffer_bytes: 0,
                decode_buffer_bytes: 0,
            }),
            ConnectorName::LmcacheMp => Connector::LmCacheMp(LmCacheMp {
                nixl: Nixl {},
                l1_bytes: 0,
            }),
        },
        // Only canaries use it, and these engines get none.
        served_model_name: String::new(),
        session_header: (arguments.client_bound == Switch(Some(true))).then(|| arguments.client_bound_key.clone()),
        notifications: arguments.notifications,
        prefill_deadline: arguments.prefill_deadline,
        handoff_deadline: arguments.handoff_deadline,
        decode_idle_deadline: arguments.decode_idle_deadline,
        kv_lease: arguments.kv_lease,
        asks_engines: true,
        max_body_bytes: arguments.max_body,
        max_in_flight: arguments.max_in_flight,
        parts,
        service,
    }
}

/// A view that never changes, in which every engine is ready.
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
