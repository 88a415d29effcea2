//! The fleet's vocabulary: engines, roles, states, and the immutable view that readers get.
//!
//! A [`FleetView`] has one writer: the supervisor's driver, or `discovery` for `xpyd proxy --discover`. It replaces the whole view
//! through a `watch` channel. Other parts write only [`Load`], a counter that lives as long as one incarnation of an engine.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::Instant;

/// The most engines that one role can have.
pub const MAX_ENGINES_PER_ROLE: u16 = 64;

/// The shim's log in the run's folder. The shim locks it as long as engines run, because they can outlive xpyd.
pub const SHIM_LOG: &str = "shim.log";

/// The role of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Computes the KV cache of the prompt.
    Prefill,
    /// Receives the KV cache and generates the tokens.
    Decode,
}

impl Role {
    /// The stem of an engine's name: `prefiller` or `decoder`, as in LMCache's example.
    pub fn engine_stem(self) -> &'static str {
        match self {
            Self::Prefill => "prefiller",
            Self::Decode => "decoder",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        })
    }
}

/// The name of one engine in a run: `prefiller1`, `decoder2`. Numbers start at 1.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EngineId(Arc<str>);

impl EngineId {
    /// The id of the engine with 0-based `index` in its role.
    pub fn new(role: Role, index: usize) -> Self {
        Self(format!("{}{}", role.engine_stem(), index + 1).into())
    }

    /// An id with this name, for engines that xpyd did not name.
    pub fn named(name: &str) -> Self {
        Self(name.into())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for EngineId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(&self.0)
    }
}

/// The nth start of an engine, from 1. Events that carry an older one are stale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Incarnation(pub u32);

impl Incarnation {
    /// The first start.
    pub const FIRST: Self = Self(1);
}

impl fmt::Display for Incarnation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// What a user can request of one engine while the others serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineVerb {
    /// Drain the engine, stop it, and start it again.
    Restart,
    /// Drain the engine and stop it.
    Drain,
}

impl EngineVerb {
    /// Its name in commands and in paths of the control API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Restart => "restart",
            Self::Drain => "drain",
        }
    }
}

impl fmt::Display for EngineVerb {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// How much of an engine's output is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLimits {
    /// Size at which a file is full, in bytes; it still takes the rest of its last line.
    pub file_bytes: u64,
    /// Files kept, the one being written included; at least 2.
    pub files: u32,
    /// A full file that was last written longer ago than this is removed, the newest one excepted.
    pub age: Duration,
}

impl Default for LogLimits {
    /// One GiB an engine, of the last week.
    fn default() -> Self {
        Self {
            file_bytes: 256 << 20,
            files: 4,
            age: Duration::from_hours(7 * 24),
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// It exited with this code. vLLM exits with 0 after a crash as well, so 0 does not mean success.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

impl fmt::Display for Exit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(formatter, "exited with code {code}"),
            Self::Signal(number) => match Signal::try_from(*number) {
                Ok(signal) => write!(formatter, "was killed by {signal}"),
                Err(_) => write!(formatter, "was killed by signal {number}"),
            },
        }
    }
}

impl Exit {
    /// Whether SIGHUP, SIGINT or SIGTERM ended it. Then its log does not explain the exit.
    pub fn was_asked_for(self) -> bool {
        matches!(self, Self::Signal(1 | 2 | 15))
    }
}

/// Whether a restart can help, by the cause of the failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Retry {
    /// The failure comes again until the user changes something.
    Never,
    /// A race that is rarely lost twice: one restart.
    Once,
    /// The failure is temporary, or its cause is unknown.
    #[default]
    Yes,
}

/// The state of one engine. The head of `supervisor::state` draws the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineState {
    /// Not started yet.
    Planned,
    /// Its process runs; `/health` has not answered 200 yet.
    Starting,
    /// `/health` answered 200; no canary has verified its hand-offs yet.
    Healthy,
    /// Canaries verified its hand-offs; it serves clients.
    Ready,
    /// Gets no new request; those in flight continue.
    Draining,
    /// Got SIGTERM; its process tree is not empty yet.
    Stopping,
    /// Stopped on request; its process tree is empty.
    Stopped,
    /// Failed, and starts again later, unless the diagnosis shows a cause that would come again.
    Backoff,
    /// Failed, and does not start again.
    Failed,
}

impl EngineState {
    /// Whether an engine in this state gets clients' requests.
    pub fn serves(self) -> bool {
        matches!(self, Self::Ready)
    }

    /// Whether an engine in this state can have a process.
    pub fn is_alive(self) -> bool {
        match self {
            Self::Starting | Self::Healthy | Self::Ready | Self::Draining | Self::Stopping => true,
            Self::Planned | Self::Stopped | Self::Backoff | Self::Failed => false,
        }
    }
}

impl fmt::Display for EngineState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Planned => "planned",
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Backoff => "backoff",
            Self::Failed => "failed",
        })
    }
}

/// The time left of an engine's start, from its last successful start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TimeLeft {
    /// No estimate is possible.
    #[default]
    Unknown,
    /// About this long; more than zero.
    About(Duration),
    /// The start takes longer than the last one.
    Longer,
}

/// The stage of the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FleetStage {
    /// Engines are starting.
    Starting,
    /// Every engine is healthy; canaries verify each pair.
    Verifying,
    /// Clients are served. Single engines can have failed since.
    Ready,
    /// xpyd ends and keeps its engines: accepted connections are served, new ones wait for the next xpyd.
    Leaving,
    /// New requests are rejected; those in flight continue up to a deadline.
    Draining,
    /// Engines are being stopped.
    Stopping,
    /// No engine's process is left, or the leftovers were reported.
    Stopped,
}

impl fmt::Display for FleetStage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Starting => "starting",
            Self::Verifying => "verifying",
            Self::Ready => "ready",
            Self::Leaving => "leaving",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        })
    }
}

impl FleetStage {
    /// Whether clients are served in this stage.
    pub fn serves(self) -> bool {
        matches!(self, Self::Ready | Self::Leaving)
    }
}

/// The addresses of an engine: HTTP, and that at which its connector receives KV.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// Host name or address, without brackets.
    pub host: String,
    /// Port of the OpenAI API.
    pub port: u16,
    /// The tensor-parallel size, at least 1. It is also the number of LMCache notifications of one prefill.
    pub tensor_parallel: u16,
    /// The ports to which prefill engines push KV; `None` unless the connector pushes.
    pub receiver: Option<Receiver>,
}

impl Endpoint {
    /// `host:port`, with brackets around an IPv6 address.
    pub fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

/// The LMCache side channel of a decode engine: one port of each kind per tensor-parallel rank.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receiver {
    /// Host that prefill engines connect to. LMCache knows peers by the string host + init port.
    pub host: String,
    /// Handshake ports, in rank order.
    pub init_ports: Vec<u16>,
    /// Allocation ports, in rank order.
    pub alloc_ports: Vec<u16>,
}

/// One engine in a view.
#[derive(Debug, Clone)]
pub struct EngineView {
    /// Its name.
    pub id: EngineId,
    /// Its role.
    pub role: Role,
    /// The number of this start.
    pub incarnation: Incarnation,
    /// Its state.
    pub state: EngineState,
    /// Its addresses.
    pub endpoint: Endpoint,
    /// Its leader's process id, once started.
    pub pid: Option<u32>,
    /// Why it failed, in one line; until it serves again.
    pub reason: Option<String>,
    /// When it starts again, in [`EngineState::Backoff`]; `None` while the diagnosis runs.
    pub restart_at: Option<Instant>,
    /// Requests in flight on this incarnation.
    pub load: Arc<Load>,
}

#[cfg(any(test, feature = "testing"))]
impl EngineView {
    /// A ready engine without load at `127.0.0.1:1`, in its first incarnation, for unit tests.
    pub fn fixture(role: Role, index: usize) -> Self {
        Self {
            id: EngineId::new(role, index),
            role,
            incarnation: Incarnation::FIRST,
            state: EngineState::Ready,
            endpoint: Endpoint {
                host: "127.0.0.1".to_owned(),
                port: 1,
                tensor_parallel: 1,
                receiver: None,
            },
            pid: None,
            reason: None,
            restart_at: None,
            load: Arc::new(Load::default()),
        }
    }
}

/// An immutable snapshot of the fleet.
#[derive(Debug, Clone)]
pub struct FleetView {
    /// Grows by one with every published view.
    pub generation: u64,
    /// The stage of the fleet.
    pub stage: FleetStage,
    /// All engines, prefill first, each role in number order. Shared, because every request in flight holds its own.
    pub engines: Vec<Arc<EngineView>>,
}

impl FleetView {
    /// The engines of `role` that serve clients, in number order.
    pub fn serving(&self, role: Role) -> impl Iterator<Item = &Arc<EngineView>> {
        self.engines
            .iter()
            .filter(move |engine| engine.role == role && engine.state.serves())
    }

    /// The engine of this name.
    pub fn engine(&self, id: &EngineId) -> Option<&Arc<EngineView>> {
        self.engines.iter().find(|engine| engine.id == *id)
    }
}

/// The load of one incarnation: requests in flight, and KV that it keeps for other engines. Once it is closed it accepts no more
/// requests, so a proxy with an old view cannot send one after a drain began.
#[derive(Debug, Default)]
pub struct Load {
    /// Requests in flight in the low 32 bits, kept hand-offs above, [`CLOSED`] as the highest bit.
    state: AtomicU64,
    /// Wakes the waiters for the close. Every request in flight is one, so nothing else must wake them.
    closed: Notify,
    /// Wakes the waiters for the last request.
    idle: Notify,
    kv_expired: AtomicU64,
    kv_late: AtomicU64,
}

/// A prefill engine's counters of KV that outlived its lease.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct OutlivedKv {
    /// Leases that expired before a decode engine read the KV.
    pub expired: u64,
    /// Reads that finished after the lease: the blocks can have belonged to another request already.
    pub late: u64,
}

const CLOSED: u64 = 1 << 63;

/// One kept hand-off. The bits below have room for 2^32 requests.
const KEPT: u64 = 1 << 32;

impl Load {
    /// Counts one more request until the guard is dropped; `None` if the load is closed.
    pub fn try_enter(self: &Arc<Self>) -> Option<LoadGuard> {
        self.state
            .try_update(Ordering::AcqRel, Ordering::Acquire, |state| {
                if state & CLOSED == 0 { Some(state + 1) } else { None }
            })
            .ok()
            .map(|_| LoadGuard(Arc::clone(self)))
    }

    /// Counts KV that another engine has yet to fetch, until the guard is dropped. The engine computes nothing for it, so it is no
    /// request in flight; but the KV is lost if the engine stops.
    pub fn keep(self: &Arc<Self>) -> KeptGuard {
        self.state.fetch_add(KEPT, Ordering::AcqRel);
        KeptGuard(Arc::clone(self))
    }

    /// Rejects new requests. Requests in flight continue.
    pub fn close(&self) {
        self.state.fetch_or(CLOSED, Ordering::AcqRel);
        self.closed.notify_waiters();
    }

    /// Whether [`Load::close`] was called.
    pub fn is_closed(&self) -> bool {
        self.state.load(Ordering::Acquire) & CLOSED != 0
    }

    /// Stores the engine's counters of KV that outlived its lease. Returns the previous ones.
    pub fn note_outlived_kv(&self, now: OutlivedKv) -> OutlivedKv {
        OutlivedKv {
            expired: self.kv_expired.swap(now.expired, Ordering::Relaxed),
            late: self.kv_late.swap(now.late, Ordering::Relaxed),
        }
    }

    /// The engine's counters of KV that outlived its lease.
    pub fn outlived_kv(&self) -> OutlivedKv {
        OutlivedKv {
            expired: self.kv_expired.load(Ordering::Relaxed),
            late: self.kv_late.load(Ordering::Relaxed),
        }
    }

    /// The number of requests in flight.
    pub fn in_flight(&self) -> usize {
        usize::try_from(self.state.load(Ordering::Acquire) % KEPT).unwrap_or(usize::MAX)
    }

    /// The number of hand-offs whose KV waits here.
    pub fn kept(&self) -> usize {
        usize::try_from((self.state.load(Ordering::Acquire) & !CLOSED) / KEPT).unwrap_or(usize::MAX)
    }

    /// Whether no request is in flight and no KV is kept.
    pub fn is_idle(&self) -> bool {
        self.state.load(Ordering::Acquire) & !CLOSED == 0
    }

    /// Completes once [`Load::close`] was called: the engine stops, so requests in flight on it should fail over.
    pub async fn closed(&self) {
        loop {
            let changed = self.closed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.is_closed() {
                return;
            }
            changed.await;
        }
    }

    /// Completes once [`Load::is_idle`].
    pub async fn idle(&self) {
        loop {
            let changed = self.idle.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.is_idle() {
                return;
            }
            changed.await;
        }
    }

    fn subtract(&self, count: u64) {
        let before = self.state.fetch_sub(count, Ordering::AcqRel);
        if before & !CLOSED == count {
            self.idle.notify_waiters();
        }
    }
}

/// Counts one request in flight until it is dropped.
#[derive(Debug)]
pub struct LoadGuard(Arc<Load>);

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.0.subtract(1);
    }
}

/// Counts KV that waits on an engine, until it is dropped because the KV was fetched or freed.
#[derive(Debug)]
pub struct KeptGuard(Arc<Load>);

impl Drop for KeptGuard {
    fn drop(&mut self) {
        self.0.subtract(KEPT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_load_rejects_only_new_requests() {
        let load = Arc::new(Load::default());
        let inside = load.try_enter().expect("open");
        load.close();
        assert!(load.try_enter().is_none());
        assert_eq!(load.in_flight(), 1);
        drop(inside);
        assert_eq!(load.in_flight(), 0);
    }

    #[tokio::test]
    async fn the_end_of_a_request_wakes_no_other_request() {
        let load = Arc::new(Load::default());
        let (mine, other) = (load.try_enter().expect("open"), load.try_enter().expect("open"));
        let mut closed = tokio_test::task::spawn(load.closed());
        let mut idle = tokio_test::task::spawn(load.idle());
        assert!(closed.poll().is_pending() && idle.poll().is_pending());
        drop(other);
        assert!(
            !closed.is_woken(),
            "a thousand streams would be woken by each other's ends"
        );
        drop(mine);
        assert!(!closed.is_woken() && idle.is_woken());
        assert!(idle.poll().is_ready());
        load.close();
        assert!(closed.is_woken() && closed.poll().is_ready());
    }

    #[tokio::test]
    async fn kept_kv_is_not_idle_and_no_request() {
        let load = Arc::new(Load::default());
        let request = load.try_enter().expect("open");
        let kept = load.keep();
        load.close();
        let mut idle = tokio_test::task::spawn(load.idle());
        assert!(idle.poll().is_pending());
        drop(request);
        assert_eq!((load.in_flight(), load.kept()), (0, 1));
        assert!(!load.is_idle() && !idle.is_woken() && idle.poll().is_pending());
        drop(kept);
        assert!(idle.is_woken() && idle.poll().is_ready());
    }

    #[test]
    fn ids_are_named_as_in_the_example_scripts() {
        assert_eq!(EngineId::new(Role::Prefill, 0).as_str(), "prefiller1");
        assert_eq!(EngineId::new(Role::Decode, 1).as_str(), "decoder2");
    }
}
