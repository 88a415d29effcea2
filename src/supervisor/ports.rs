//! Reserves every port of the plan from before the first spawn until the last process is gone, and names the process that has a
//! port already.
//!
//! A port is held by a socket that is bound with `SO_REUSEADDR` and never listens. While it is held, the engine itself
//! (uvicorn, ZeroMQ and torch all set `SO_REUSEADDR`) can bind and listen, a probe for a free port without that option
//! skips it, the kernel does not give it out as an ephemeral port, and connects are refused. Another run of xpyd could
//! bind it the same way, so a name in the abstract socket namespace, which has the same scope as the ports, locks each port.
//! The kernel releases both when xpyd dies.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixDatagram;

use tokio::net::TcpSocket;

use crate::fleet::EngineId;
use crate::plan::EngineSpec;

/// The reserved ports of a plan. Dropping this releases them.
#[derive(Debug, Default)]
pub struct Reservations {
    held: Vec<(Option<TcpSocket>, UnixDatagram)>,
}

/// A port of the plan is taken.
#[derive(Debug, thiserror::Error)]
#[error("port {port} ({purpose} of {engine}) is taken{}", taken_by(holder.as_ref()))]
pub struct PortConflict {
    /// The port.
    pub port: u16,
    /// What the plan uses it for.
    pub purpose: String,
    /// The engine that wants it.
    pub engine: EngineId,
    /// The process that has it, if it is known.
    pub holder: Option<Holder>,
    /// The error of `bind`.
    #[source]
    pub source: io::Error,
}

fn taken_by(holder: Option<&Holder>) -> String {
    holder.map_or_else(String::new, |holder| format!(" by {holder}"))
}

/// The holder of a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// A process that listens on it, or has a connection from it.
    Process {
        /// Process id.
        pid: u32,
        /// Name, 15 characters at most.
        name: String,
    },
    /// A process of this user, whose details this user is not allowed to read.
    User(String),
    /// A process that has bound it and does not listen; the kernel lists no such sockets.
    Unseen,
    /// Another run of xpyd has reserved it.
    OtherRun,
    /// Another engine of the same plan.
    Engine(EngineId),
}

impl fmt::Display for Holder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { pid, name } => write!(formatter, "process {pid} (`{name}`)"),
            Self::User(name) => write!(formatter, "a process of user `{name}`"),
            Self::Unseen => formatter.write_str("a program that has bound it without listening"),
            Self::OtherRun => formatter.write_str("another run of xpyd"),
            Self::Engine(engine) => write!(formatter, "{engine}"),
        }
    }
}

/// Reserves every port of the engines on this node, or none.
pub fn reserve(engines: &[EngineSpec]) -> Result<Reservations, PortConflict> {
    let mut reservations = Reservations::default();
    let mut taken: BTreeMap<u16, &EngineId> = BTreeMap::new();
    for engine in of_this_node(engines) {
        for wanted in &engine.ports {
            let conflict = |holder, source| PortConflict {
                port: wanted.port,
                purpose: wanted.purpose.clone(),
                engine: engine.id.clone(),
                holder,
                source,
            };
            if let Some(other) = taken.insert(wanted.port, &engine.id) {
                let source = io::ErrorKind::AddrInUse.into();
                return Err(conflict(Some(Holder::Engine(other.clone())), source));
            }
            let lock = lock(wanted.port).map_err(|source| {
                let other_run = source.kind() == io::ErrorKind::AddrInUse;
                conflict(other_run.then_some(Holder::OtherRun), source)
            })?;
            let socket = bind(&engine.endpoint.host, wanted.port).map_err(|source| {
                let taken = source.kind() == io::ErrorKind::AddrInUse;
                conflict(taken.then(|| holder(wanted.port).unwrap_or(Holder::Unseen)), source)
            })?;
            reservations.held.push((Some(socket), lock));
        }
    }
    Ok(reservations)
}

/// Reserves the ports of engines that run already: where an engine listens, only the lock between runs.
pub fn reserve_running(engines: &[EngineSpec]) -> Reservations {
    let mut reservations = Reservations::default();
    for engine in of_this_node(engines) {
        for used in &engine.ports {
            if let Ok(lock) = lock(used.port) {
                let socket = bind(&engine.endpoint.host, used.port).ok();
                reservations.held.push((socket, lock));
            }
        }
    }
    reservations
}

/// The agents reserve the ports of the others.
pub(super) fn of_this_node(engines: &[EngineSpec]) -> impl Iterator<Item = &EngineSpec> {
    engines.iter().filter(|engine| engine.node.is_none())
}

impl Reservations {
    /// Adds the reservations of `others`.
    pub(super) fn add(&mut self, others: Self) {
        self.held.extend(others.held);
    }

    /// Reserves `count` more free ports that these reservations never held before.
    pub(super) fn take_free(&mut self, host: &str, count: usize) -> io::Result<Vec<u16>> {
        let mut ports = Vec::new();
        for _ in 0..count {
            let (socket, address) = socket(host, 0)?;
            // Without SO_REUSEADDR, so that the kernel picks no port that another reservation holds.
            socket.bind(address)?;
            socket.set_reuseaddr(true)?;
            let port = socket.local_addr()?.port();
            self.held.push((Some(socket), lock(port)?));
            ports.push(port);
        }
        Ok(ports)
    }
}

/// The lock between runs of xpyd.
fn lock(port: u16) -> io::Result<UnixDatagram> {
    let name = std::os::unix::net::SocketAddr::from_abstract_name(format!("xpyd/port/{port}"))?;
    UnixDatagram::bind_addr(&name)
}

/// Binds without listening. Fails if any process listens on the port, on whatever address.
fn bind(host: &str, port: u16) -> io::Result<TcpSocket> {
    let (socket, address) = socket(host, port)?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// A socket, and every address of its family with this port.
fn socket(host: &str, port: u16) -> io::Result<(TcpSocket, SocketAddr)> {
    Ok(if host.contains(':') {
        (TcpSocket::new_v6()?, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))
    } else {
        (TcpSocket::new_v4()?, SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))
    })
}

/// Whether no process listens on the port. A reservation does not count.
pub(super) fn is_free(host: &str, port: u16) -> bool {
    bind(host, port).is_ok()
}

/// The holder of `port`: the process, or its user where this user is not allowed to inspect it.
pub fn holder(port: u16) -> Option<Holder> {
    let socket = sockets_on(port).into_iter().max_by_key(|socket| socket.listens)?;
    let Some(&pid) = holders(&socket).first() else {
        let user = nix::unistd::User::from_uid(socket.user.into()).ok().flatten();
        return Some(Holder::User(
            user.map_or_else(|| socket.user.to_string(), |user| user.name),
        ));
    };
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(Holder::Process {
        pid,
        name: name.trim_end().to_owned(),
    })
}

/// The first port of the engine on which another process listens, as a line for the user. The engine's own processes descend
/// from `leader` or are in its session. A port on which no process listens does not count: not every engine opens all of them.
///
/// A reservation cannot keep out a program that sets `SO_REUSEADDR` as well and listens first; the engine then fails to
/// listen, while that program can answer in its place.
pub(super) fn taken_by_other(engine: &EngineSpec, leader: u32) -> Option<String> {
    if engine.node.is_some() {
        // Its agent has reserved them, and looked before.
        return None;
    }
    engine.ports.iter().find_map(|used| {
        let mut listening = sockets_on(used.port)
            .into_iter()
            .filter(|socket| socket.listens)
            .peekable();
        listening.peek()?;
        if listening.any(|socket| holders(&socket).iter().any(|pid| belongs(*pid, leader))) {
            return None;
        }
        let holder = holder(used.port)?;
        Some(format!(
            "does not listen on port {} ({}): {holder} does",
            used.port, used.purpose
        ))
    })
}

/// Whether a process is in the session of `leader`, or descends from it.
pub fn belongs(pid: u32, leader: u32) -> bool {
    let mut ancestor = Some(pid);
    while let Some(pid) = ancestor.filter(|pid| *pid > 1) {
        let Some((parent, session)) = parent_and_session(pid) else {
            return false;
        };
        if pid == leader || session == leader {
            return true;
        }
        ancestor = Some(parent);
    }
    false
}

/// Two fields of `/proc/PID/stat`. The name before them can contain any character.
fn parent_and_session(pid: u32) -> Option<(u32, u32)> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(1);
    Some((fields.next()?.parse().ok()?, fields.nth(1)?.parse().ok()?))
}

/// The processes that have the socket open, of those that this user is allowed to inspect.
fn holders(socket: &SocketUse) -> Vec<u32> {
    let wanted = format!("socket:[{}]", socket.inode);
    let holds = |pid: &u32| {
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten()
            .flatten();
        descriptors
            .filter_map(|entry| std::fs::read_link(entry.path()).ok())
            .any(|target| target.as_os_str() == wanted.as_str())
    };
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|process| process.file_name().to_str()?.parse().ok());
    pids.filter(holds).collect()
}

/// The sockets of both families that have `port`.
fn sockets_on(port: u16) -> Vec<SocketUse> {
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| std::fs::read_to_string(table).ok())
        .flat_map(|table| {
            table
                .lines()
                .filter_map(|line| socket_on(line, port))
                .collect::<Vec<_>>()
        })
        .collect()
}

/// A socket that has a port.
#[derive(Debug, PartialEq, Eq)]
struct SocketUse {
    listens: bool,
    user: u32,
    inode: u64,
}

/// The socket in one line of `/proc/net/tcp` or `tcp6`, if it has `port` and a process has it; inode 0 means that none has.
fn socket_on(line: &str, port: u16) -> Option<SocketUse> {
    const LISTEN: &str = "0A";
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (_, hexadecimal) = fields.get(1)?.rsplit_once(':')?;
    let socket = SocketUse {
        listens: *fields.get(3)? == LISTEN,
        user: fields.get(7)?.parse().ok()?,
        inode: fields.get(9)?.parse().ok()?,
    };
    (u16::from_str_radix(hexadecimal, 16) == Ok(port) && socket.inode != 0).then_some(socket)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::supervisor::state::tests::engine;

    fn wants(port: u16) -> Vec<EngineSpec> {
        let mut spec = engine("decoder1", &[]);
        spec.ports[0].port = port;
        vec![spec]
    }

    fn unused_port() -> u16 {
        TcpListener::bind(("127.0.0.1", 0))
            .unwrap()
            .local_addr()
            .unwrap()
            .port()
    }

    #[test]
    fn only_the_engine_can_listen_on_a_reserved_port() {
        let port = unused_port();
        let _held = reserve(&wants(port)).unwrap();
        let unshared = TcpSocket::new_v4().unwrap();
        assert!(unshared.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).is_err());
        // The standard library sets SO_REUSEADDR, as servers do.
        assert!(TcpListener::bind(("127.0.0.1", port)).is_ok());
    }

    #[test]
    fn a_conflict_names_the_process_that_listens() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let conflict = reserve(&wants(port)).unwrap_err();
        assert!(matches!(conflict.holder, Some(Holder::Process { pid, .. }) if pid == std::process::id()));
        assert!(!is_free("127.0.0.1", port));
    }

    #[test]
    fn a_bound_port_without_listener_is_a_conflict() {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let port = socket.local_addr().unwrap().port();
        let conflict = reserve(&wants(port)).unwrap_err();
        assert_eq!(conflict.holder, Some(Holder::Unseen));
    }

    #[test]
    fn a_listener_outside_the_engines_tree_has_taken_the_port() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let own = std::process::id();
        let engine = &wants(listener.local_addr().unwrap().port())[0];
        assert_eq!(taken_by_other(engine, own), None);
        let (parent, _) = parent_and_session(own).unwrap();
        assert_eq!(taken_by_other(engine, parent), None, "a descendant listens");
        let mut stranger = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let reason = taken_by_other(engine, stranger.id()).unwrap();
        assert!(reason.contains(&format!("process {own}")), "{reason}");
        stranger.kill().unwrap();
        stranger.wait().unwrap();
        drop(listener);
        assert_eq!(taken_by_other(engine, stranger.id()), None, "nobody listens");
    }

    #[test]
    fn a_dual_stack_server_is_a_named_conflict() {
        let Ok(listener) = TcpListener::bind(("::", 0)) else {
            // No IPv6 here.
            return;
        };
        let conflict = reserve(&wants(listener.local_addr().unwrap().port())).unwrap_err();
        assert!(matches!(conflict.holder, Some(Holder::Process { pid, .. }) if pid == std::process::id()));
    }

    #[test]
    fn kernel_socket_tables_are_parsed_for_both_families() {
        let listens = "0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000  0 4711 1 0 100";
        let expected = SocketUse {
            listens: true,
            user: 1000,
            inode: 4711,
        };
        assert_eq!(socket_on(listens, 8080), Some(expected));
        assert_eq!(socket_on(listens, 8081), None);
        let connected =
            "1: 00000000000000000000000001000000:1F90 00000000000000000000000001000000:C350 01 0:0 0:0 0 0 0 7 1";
        assert_eq!(socket_on(connected, 8080).map(|socket| socket.listens), Some(false));
        let over = "2: 0100007F:1F90 0100007F:C350 06 0:0 0:0 0 0 0 0 3";
        assert_eq!(socket_on(over, 8080), None);
        assert_eq!(socket_on("sl local_address rem_address st", 8080), None);
    }

    #[test]
    fn two_runs_cannot_reserve_the_same_port() {
        let port = unused_port();
        let held = reserve(&wants(port)).unwrap();
        assert_eq!(reserve(&wants(port)).unwrap_err().holder, Some(Holder::OtherRun));
        drop(held);
        assert!(reserve(&wants(port)).is_ok());
    }

    #[test]
    fn free_ports_are_distinct_and_reserved() {
        let mut held = Reservations::default();
        let mut ports = held.take_free("127.0.0.1", 50).unwrap();
        ports.extend(held.take_free("127.0.0.1", 50).unwrap());
        for port in &ports {
            let unshared = TcpSocket::new_v4().unwrap();
            assert!(unshared.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, *port))).is_err());
            assert!(TcpListener::bind(("127.0.0.1", *port)).is_ok());
            assert_eq!(reserve(&wants(*port)).unwrap_err().holder, Some(Holder::OtherRun));
        }
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 100);
    }

    #[test]
    fn a_port_of_two_engines_names_the_other_engine() {
        let port = unused_port();
        let mut engines = wants(port);
        engines.extend(wants(port));
        engines[1].id = EngineId::named("decoder2");
        let conflict = reserve(&engines).unwrap_err();
        assert_eq!(
            conflict.to_string(),
            format!("port {port} (http of decoder2) is taken by decoder1")
        );
    }
}
