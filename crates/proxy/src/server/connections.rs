//! Client connections: how many can be open, and which are closed for new ones.
//!
//! A connection is quiet while no request is in flight on it: it has sent no request header yet, or is idle between
//! two requests. At the limit, the connection that has been quiet for longest is closed. A few connections beyond the
//! limit form a reserve for health checks and metrics only. `ConnectionTable` is pure; the rest is the lock around it
//! and what a connection's task holds.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::overload::{Limit, Overload};

/// How long a new connection is protected from being closed: its first request header can still be on its way.
const GRACE: Duration = Duration::from_secs(1);

/// The same in the reserve, whose connections send a short header at once.
const RESERVE_GRACE: Duration = Duration::from_millis(100);

/// Maximum time between two checks of a full table.
const FULL_PAUSE: Duration = Duration::from_millis(100);

/// Which requests a connection can send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConnectionClass {
    /// All requests.
    Regular,
    /// Only health checks and metrics, because this limit is reached.
    Reserve(Limit),
}

impl ConnectionClass {
    fn index(self) -> usize {
        usize::from(self != Self::Regular)
    }

    fn grace(self) -> Duration {
        match self {
            Self::Regular => GRACE,
            Self::Reserve(_) => RESERVE_GRACE,
        }
    }
}

/// How many connections can be open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capacity {
    /// For all requests.
    pub(crate) regular: usize,
    /// Beyond these, for health checks and metrics only.
    pub(crate) reserve: usize,
    /// From one client address.
    pub(crate) per_address: Option<usize>,
}

#[derive(Debug)]
struct OpenConnection {
    address: IpAddr,
    class: ConnectionClass,
    /// From when on the quiet connection can be closed for another one.
    quiet_from: Option<Instant>,
    /// Told to end, but still open.
    leaving: bool,
    end: CancellationToken,
}

/// The open connections of one class.
#[derive(Debug, Default)]
struct ConnectionGroup {
    open: usize,
    leaving: usize,
    quiet: BTreeSet<(Instant, u64)>,
}

/// All open connections.
#[derive(Debug)]
struct ConnectionTable {
    capacity: Capacity,
    last: u64,
    entries: HashMap<u64, OpenConnection>,
    groups: [ConnectionGroup; 2],
    addresses: HashMap<IpAddr, usize>,
}

/// The decision about a new connection.
#[derive(Debug, PartialEq, Eq)]
enum ConnectionAdmission {
    Open {
        id: u64,
        class: ConnectionClass,
        gave_way: bool,
    },
    /// No room now.
    Full,
    /// Its address has too many connections.
    Refused,
}

impl ConnectionTable {
    fn new(capacity: Capacity) -> Self {
        Self {
            capacity,
            last: 0,
            entries: HashMap::new(),
            groups: Default::default(),
            addresses: HashMap::new(),
        }
    }

    fn admit(&mut self, address: IpAddr, end: &CancellationToken, now: Instant) -> ConnectionAdmission {
        let address = network(address);
        let has = self.addresses.get(&address).copied().unwrap_or(0);
        let has_too_many = self.capacity.per_address.is_some_and(|most| has >= most);
        let classes = if has_too_many {
            &[ConnectionClass::Reserve(Limit::PerAddress)][..]
        } else {
            &[ConnectionClass::Regular, ConnectionClass::Reserve(Limit::Connections)]
        };
        for class in classes {
            let gave_way = if self.has_room(*class) {
                false
            } else if self.make_room(*class, now) {
                true
            } else {
                continue;
            };
            let id = self.open(address, *class, end.clone());
            let class = *class;
            return ConnectionAdmission::Open { id, class, gave_way };
        }
        if has_too_many {
            ConnectionAdmission::Refused
        } else {
            ConnectionAdmission::Full
        }
    }

    fn has_room(&self, class: ConnectionClass) -> bool {
        let group = &self.groups[class.index()];
        let most = match class {
            ConnectionClass::Regular => self.capacity.regular,
            ConnectionClass::Reserve(_) => self.capacity.reserve,
        };
        group.open - group.leaving < most
    }

    /// Ends the connection that has been quiet for longest. Few can be ending at a time, so that descriptors suffice.
    fn make_room(&mut self, class: ConnectionClass, now: Instant) -> bool {
        let group = &mut self.groups[class.index()];
        if group.leaving >= self.capacity.reserve {
            return false;
        }
        let Some((_, id)) = group.quiet.first().filter(|(from, _)| *from <= now).copied() else {
            return false;
        };
        group.quiet.pop_first();
        group.leaving += 1;
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.leaving = true;
            entry.end.cancel();
        }
        true
    }

    fn open(&mut self, address: IpAddr, class: ConnectionClass, end: CancellationToken) -> u64 {
        self.last += 1;
        let id = self.last;
        if self.capacity.per_address.is_some() {
            *self.addresses.entry(address).or_default() += 1;
        }
        self.groups[class.index()].open += 1;
        let entry = OpenConnection {
            address,
            class,
            quiet_from: None,
            leaving: false,
            end,
        };
        self.entries.insert(id, entry);
        id
    }

    /// Sets from when on a quiet connection can be closed, or that it is not quiet.
    fn set_quiet(&mut self, id: u64, quiet_from: Option<Instant>) {
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        let group = &mut self.groups[entry.class.index()];
        if let Some(before) = std::mem::replace(&mut entry.quiet_from, quiet_from) {
            group.quiet.remove(&(before, id));
        }
        if let Some(from) = quiet_from
            && !entry.leaving
        {
            group.quiet.insert((from, id));
        }
    }

    fn close(&mut self, id: u64) {
        self.set_quiet(id, None);
        let Some(entry) = self.entries.remove(&id) else {
            return;
        };
        let group = &mut self.groups[entry.class.index()];
        group.open -= 1;
        group.leaving -= usize::from(entry.leaving);
        if let Some(count) = self.addresses.get_mut(&entry.address) {
            *count -= 1;
            if *count == 0 {
                self.addresses.remove(&entry.address);
            }
        }
    }
}

/// The unit that counts as one client address: of IPv6 the /64 network, within which clients choose addresses.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into(),
        address @ IpAddr::V4(_) => address,
    }
}

/// The connections of all threads. Clones share the table.
#[derive(Debug, Clone)]
pub(crate) struct Connections(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    table: Mutex<ConnectionTable>,
    freed: Notify,
    overload: Overload,
}

impl Connections {
    pub(crate) fn new(capacity: Capacity, overload: Overload) -> Self {
        Self(Arc::new(Inner {
            table: Mutex::new(ConnectionTable::new(capacity)),
            freed: Notify::new(),
            overload,
        }))
    }

    fn table(&self) -> MutexGuard<'_, ConnectionTable> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot for a new connection, once there is room. `None` if its address has too many connections. The
    /// connection ends with `stop` at the latest.
    pub(crate) async fn admit(&self, address: IpAddr, stop: &CancellationToken) -> Option<ConnectionSlot> {
        let end = stop.child_token();
        loop {
            let admission = self.table().admit(address, &end, Instant::now());
            match admission {
                ConnectionAdmission::Open { id, class, gave_way } => {
                    if gave_way {
                        self.0.overload.reached(Limit::GaveWay);
                    }
                    self.0.overload.opened();
                    return Some(ConnectionSlot {
                        connections: self.clone(),
                        id,
                        class,
                        end,
                        activity: Arc::default(),
                        // The bytes that the client has already sent are read first.
                        reported: (false, 0),
                    });
                }
                ConnectionAdmission::Refused => {
                    self.0.overload.reached(Limit::PerAddress);
                    return None;
                }
                // The next check shows whether a slot is free.
                ConnectionAdmission::Full => drop(tokio::time::timeout(FULL_PAUSE, self.0.freed.notified()).await),
            }
        }
    }

    /// Closes the connection that has been quiet for longest, if there is one, to free its descriptor.
    pub(crate) fn make_room(&self) -> bool {
        let made = self.table().make_room(ConnectionClass::Regular, Instant::now());
        if made {
            self.0.overload.reached(Limit::GaveWay);
        }
        made
    }
}

/// The activity of a connection, as its stream and its requests report it.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    /// Requests so far.
    requests: AtomicU64,
    /// Requests that have their whole answer.
    answered: AtomicU64,
    /// The client takes no more bytes now.
    blocked: AtomicBool,
}

impl Activity {
    /// Begins a request, which ends when the returned value is dropped.
    pub(crate) fn begin(self: &Arc<Self>) -> InFlight {
        self.requests.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(self))
    }

    pub(crate) fn set_blocked(&self, blocked: bool) {
        self.blocked.store(blocked, Ordering::Relaxed);
    }

    /// Whether a request has come yet.
    pub(crate) fn has_begun(&self) -> bool {
        self.requests.load(Ordering::Relaxed) > 0
    }

    /// Whether closing the connection breaks no request.
    pub(crate) fn is_quiet(&self) -> bool {
        let requests = self.requests.load(Ordering::Relaxed);
        requests == self.answered.load(Ordering::Relaxed) && !self.blocked.load(Ordering::Relaxed)
    }
}

/// A request in flight.
#[derive(Debug)]
pub(crate) struct InFlight(Arc<Activity>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.answered.fetch_add(1, Ordering::Relaxed);
    }
}

/// The slot of one connection, held by its task.
#[derive(Debug)]
pub(crate) struct ConnectionSlot {
    connections: Connections,
    id: u64,
    pub(crate) class: ConnectionClass,
    /// Cancelled when the connection must end as soon as no request is in flight.
    pub(crate) end: CancellationToken,
    pub(crate) activity: Arc<Activity>,
    /// The last report to the table: whether the connection is quiet, and the number of its requests.
    reported: (bool, u64),
}

impl ConnectionSlot {
    /// Reports changes since the last call to the table.
    pub(crate) fn report_activity(&mut self) {
        let now = (self.activity.is_quiet(), self.activity.requests.load(Ordering::Relaxed));
        if self.reported != now {
            self.reported = now;
            let (is_quiet, requests) = now;
            let grace = if requests == 0 {
                self.class.grace()
            } else {
                Duration::ZERO
            };
            let quiet_from = is_quiet.then(|| Instant::now() + grace);
            self.connections.table().set_quiet(self.id, quiet_from);
        }
    }

    /// Records that a limit ended the connection.
    pub(crate) fn reached(&self, limit: Limit) {
        self.connections.0.overload.reached(limit);
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.connections.table().close(self.id);
        self.connections.0.overload.closed();
        self.connections.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOME: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn table(regular: usize, reserve: usize, per_address: Option<usize>) -> ConnectionTable {
        ConnectionTable::new(Capacity {
            regular,
            reserve,
            per_address,
        })
    }

    /// Admits a connection that sends nothing. Returns its number, its class and its token.
    fn admit(table: &mut ConnectionTable, now: Instant) -> Option<(u64, ConnectionClass, CancellationToken)> {
        let end = CancellationToken::new();
        match table.admit(HOME, &end, now) {
            ConnectionAdmission::Open { id, class, .. } => {
                table.set_quiet(id, Some(now + class.grace()));
                Some((id, class, end))
            }
            ConnectionAdmission::Full | ConnectionAdmission::Refused => None,
        }
    }

    #[test]
    fn the_longest_quiet_connection_gives_way() {
        let start = Instant::now();
        let mut table = table(2, 1, None);
        let (first, _, first_end) = admit(&mut table, start).expect("room");
        let (_, _, second_end) = admit(&mut table, start + GRACE / 4).expect("room");
        table.set_quiet(first, None);
        let later = start + GRACE * 2;
        let (third, class, _) = admit(&mut table, later).expect("the second gives way");
        assert_eq!(class, ConnectionClass::Regular);
        assert!(second_end.is_cancelled() && !first_end.is_cancelled());
        // The second has not ended yet, and at most as many can be ending as the reserve has slots.
        table.set_quiet(third, Some(later));
        let (_, class, _) = admit(&mut table, later).expect("the reserve has room");
        assert_eq!(class, ConnectionClass::Reserve(Limit::Connections));
    }

    #[test]
    fn new_connections_are_protected_longer_than_reserve_ones() {
        let start = Instant::now();
        let mut table = table(1, 1, None);
        let (_, _, first) = admit(&mut table, start).expect("room");
        let (_, class, second) = admit(&mut table, start).expect("the reserve");
        assert_eq!(class, ConnectionClass::Reserve(Limit::Connections));
        assert!(admit(&mut table, start).is_none());
        let soon = start + RESERVE_GRACE;
        let (_, class, _) = admit(&mut table, soon).expect("the reserve turns over");
        assert_eq!(class, ConnectionClass::Reserve(Limit::Connections));
        assert!(second.is_cancelled() && !first.is_cancelled());
        assert_eq!(
            admit(&mut table, start + GRACE).expect("the first").1,
            ConnectionClass::Regular
        );
        assert!(first.is_cancelled());
    }

    #[test]
    fn an_unread_connection_does_not_give_way() {
        let start = Instant::now();
        let mut table = table(1, 1, None);
        for _ in 0..2 {
            let admission = table.admit(HOME, &CancellationToken::new(), start);
            assert!(matches!(admission, ConnectionAdmission::Open { gave_way: false, .. }));
        }
        assert!(admit(&mut table, start + GRACE).is_none());
    }

    #[test]
    fn an_address_over_its_limit_gets_only_the_reserve() {
        let start = Instant::now();
        let mut table = table(9, 1, Some(2));
        let (first, ..) = admit(&mut table, start).expect("room");
        admit(&mut table, start).expect("room");
        let (_, class, _) = admit(&mut table, start).expect("the reserve");
        assert_eq!(class, ConnectionClass::Reserve(Limit::PerAddress));
        assert_eq!(
            table.admit(HOME, &CancellationToken::new(), start),
            ConnectionAdmission::Refused
        );
        let other = "192.0.2.1".parse().expect("an address");
        assert!(matches!(
            table.admit(other, &CancellationToken::new(), start),
            ConnectionAdmission::Open {
                class: ConnectionClass::Regular,
                ..
            }
        ));
        table.close(first);
        table.close(first + 2);
        assert_eq!(
            admit(&mut table, start).expect("room again").1,
            ConnectionClass::Regular
        );
    }

    #[test]
    fn closed_connections_are_forgotten() {
        let start = Instant::now();
        let mut table = table(2, 2, Some(4));
        let ids: Vec<u64> = (0..4).map(|_| admit(&mut table, start).expect("room").0).collect();
        table.make_room(ConnectionClass::Regular, start + GRACE);
        for id in ids {
            table.close(id);
        }
        assert!(table.entries.is_empty() && table.addresses.is_empty());
        for group in &table.groups {
            assert!(group.quiet.is_empty());
            assert_eq!((group.open, group.leaving), (0, 0));
        }
    }

    #[test]
    fn addresses_of_one_ipv6_network_are_one_client() {
        let of = |text: &str| network(text.parse().expect("an address"));
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }
}
