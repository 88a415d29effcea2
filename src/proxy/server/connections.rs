//! The connections of clients: how many may be open, and which of them give way to a new one.
//!
//! A connection is quiet while no request is in flight on it: it has not sent a head yet, or it is idle between two requests.
//! At the limit the one that has been quiet for longest is closed. A few connections beyond the limit form a reserve, which is
//! only for health checks and metrics. `Table` is PURE; the rest is the lock around it and what a connection's task holds.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::proxy::overload::{Limit, Overload};

/// How long a new connection is quiet before it may be closed for another: its first head may still be on its way.
const GRACE: Duration = Duration::from_secs(1);

/// The same in the reserve, whose connections send a short head at once.
const RESERVE_GRACE: Duration = Duration::from_millis(100);

/// How long to wait until the next look at a full table.
const FULL_PAUSE: Duration = Duration::from_millis(100);

/// What a connection is open for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// Every request.
    Regular,
    /// Health checks and metrics alone. This limit is the reason.
    Reserve(Limit),
}

impl Class {
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

/// How many connections may be open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capacity {
    /// For every request.
    pub(crate) regular: usize,
    /// For health checks and metrics, beyond these.
    pub(crate) reserve: usize,
    /// From one client address.
    pub(crate) per_address: Option<usize>,
}

#[derive(Debug)]
struct Entry {
    address: IpAddr,
    class: Class,
    /// From when on it may be closed for another, while it is quiet.
    quiet_from: Option<Instant>,
    /// It was told to end, and has not yet.
    leaving: bool,
    end: CancellationToken,
}

/// The open connections of one class.
#[derive(Debug, Default)]
struct Group {
    open: usize,
    leaving: usize,
    quiet: BTreeSet<(Instant, u64)>,
}

/// All open connections.
#[derive(Debug)]
struct Table {
    capacity: Capacity,
    last: u64,
    entries: HashMap<u64, Entry>,
    groups: [Group; 2],
    addresses: HashMap<IpAddr, usize>,
}

/// What becomes of a new connection.
#[derive(Debug, PartialEq, Eq)]
enum Admission {
    Open {
        id: u64,
        class: Class,
        gave_way: bool,
    },
    /// There is no room for it now.
    Full,
    /// Its address has too many of them.
    Refused,
}

impl Table {
    fn new(capacity: Capacity) -> Self {
        Self {
            capacity,
            last: 0,
            entries: HashMap::new(),
            groups: Default::default(),
            addresses: HashMap::new(),
        }
    }

    fn admit(&mut self, address: IpAddr, end: &CancellationToken, now: Instant) -> Admission {
        let address = network(address);
        let has = self.addresses.get(&address).copied().unwrap_or(0);
        let has_too_many = self.capacity.per_address.is_some_and(|most| has >= most);
        let classes = if has_too_many {
            &[Class::Reserve(Limit::PerAddress)][..]
        } else {
            &[Class::Regular, Class::Reserve(Limit::Connections)]
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
            return Admission::Open { id, class, gave_way };
        }
        if has_too_many {
            Admission::Refused
        } else {
            Admission::Full
        }
    }

    fn has_room(&self, class: Class) -> bool {
        let group = &self.groups[class.index()];
        let most = match class {
            Class::Regular => self.capacity.regular,
            Class::Reserve(_) => self.capacity.reserve,
        };
        group.open - group.leaving < most
    }

    /// Tells the connection that has been quiet for longest to end. Few may be on their way out, so that descriptors suffice.
    fn make_room(&mut self, class: Class, now: Instant) -> bool {
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

    fn open(&mut self, address: IpAddr, class: Class, end: CancellationToken) -> u64 {
        self.last += 1;
        let id = self.last;
        if self.capacity.per_address.is_some() {
            *self.addresses.entry(address).or_default() += 1;
        }
        self.groups[class.index()].open += 1;
        let entry = Entry {
            address,
            class,
            quiet_from: None,
            leaving: false,
            end,
        };
        self.entries.insert(id, entry);
        id
    }

    /// The connection is quiet, and may be closed for another from then on; or it is no longer.
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

/// What counts as one client address: of IPv6, the network that a client chooses its addresses from.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into(),
        address @ IpAddr::V4(_) => address,
    }
}

/// The connections of all threads. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Connections(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    table: Mutex<Table>,
    freed: Notify,
    overload: Overload,
}

impl Connections {
    pub(crate) fn new(capacity: Capacity, overload: Overload) -> Self {
        Self(Arc::new(Shared {
            table: Mutex::new(Table::new(capacity)),
            freed: Notify::new(),
            overload,
        }))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a new connection, once there is room for it; `None` if its address has too many. It ends with `stop` at
    /// the latest.
    pub(crate) async fn admit(&self, address: IpAddr, stop: &CancellationToken) -> Option<Place> {
        let end = stop.child_token();
        loop {
            let admission = self.table().admit(address, &end, Instant::now());
            match admission {
                Admission::Open { id, class, gave_way } => {
                    if gave_way {
                        self.0.overload.reached(Limit::GaveWay);
                    }
                    self.0.overload.opened();
                    return Some(Place {
                        connections: self.clone(),
                        id,
                        class,
                        end,
                        activity: Arc::default(),
                        // What its client has sent before is read first.
                        settled: (false, 0),
                    });
                }
                Admission::Refused => {
                    self.0.overload.reached(Limit::PerAddress);
                    return None;
                }
                // Whether it was freed or not, the next look tells.
                Admission::Full => drop(tokio::time::timeout(FULL_PAUSE, self.0.freed.notified()).await),
            }
        }
    }

    /// Closes the connection that has been quiet for longest, if there is one, to have its descriptor.
    pub(crate) fn make_room(&self) -> bool {
        let made = self.table().make_room(Class::Regular, Instant::now());
        if made {
            self.0.overload.reached(Limit::GaveWay);
        }
        made
    }
}

/// What happens on a connection, as its stream and its requests note it.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    /// Requests so far.
    requests: AtomicU64,
    /// Requests that have their whole answer.
    answered: AtomicU64,
    /// The client takes no more bytes of what there is for it.
    blocked: AtomicBool,
}

impl Activity {
    /// A request begins. It ends when the value is dropped.
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

/// A request that is in flight.
#[derive(Debug)]
pub(crate) struct InFlight(Arc<Activity>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.answered.fetch_add(1, Ordering::Relaxed);
    }
}

/// The place of one connection, held by its task.
#[derive(Debug)]
pub(crate) struct Place {
    connections: Connections,
    id: u64,
    pub(crate) class: Class,
    /// The connection is to end as soon as no request is in flight.
    pub(crate) end: CancellationToken,
    pub(crate) activity: Arc<Activity>,
    /// What the table knows: whether it is quiet, and after how many requests.
    settled: (bool, u64),
}

impl Place {
    /// Tells the table what has changed since the last call.
    pub(crate) fn settle(&mut self) {
        let now = (self.activity.is_quiet(), self.activity.requests.load(Ordering::Relaxed));
        if self.settled != now {
            self.settled = now;
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

    /// A limit ended the connection.
    pub(crate) fn reached(&self, limit: Limit) {
        self.connections.0.overload.reached(limit);
    }
}

impl Drop for Place {
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

    fn table(regular: usize, reserve: usize, per_address: Option<usize>) -> Table {
        Table::new(Capacity {
            regular,
            reserve,
            per_address,
        })
    }

    /// Admits a connection that sends nothing: its number, its class and its token.
    fn admit(table: &mut Table, now: Instant) -> Option<(u64, Class, CancellationToken)> {
        let end = CancellationToken::new();
        match table.admit(HOME, &end, now) {
            Admission::Open { id, class, .. } => {
                table.set_quiet(id, Some(now + class.grace()));
                Some((id, class, end))
            }
            Admission::Full | Admission::Refused => None,
        }
    }

    #[test]
    fn at_the_limit_the_longest_quiet_connection_gives_way_and_never_one_with_a_request() {
        let start = Instant::now();
        let mut table = table(2, 1, None);
        let (first, _, first_end) = admit(&mut table, start).expect("room");
        let (_, _, second_end) = admit(&mut table, start + GRACE / 4).expect("room");
        table.set_quiet(first, None);
        let later = start + GRACE * 2;
        let (third, class, _) = admit(&mut table, later).expect("the second gives way");
        assert_eq!(class, Class::Regular);
        assert!(second_end.is_cancelled() && !first_end.is_cancelled());
        // The second has not ended yet, and no more may be on their way out than the reserve has places.
        table.set_quiet(third, Some(later));
        let (_, class, _) = admit(&mut table, later).expect("the reserve has room");
        assert_eq!(class, Class::Reserve(Limit::Connections));
    }

    #[test]
    fn a_new_connection_does_not_give_way_and_the_reserve_turns_over_faster() {
        let start = Instant::now();
        let mut table = table(1, 1, None);
        let (_, _, first) = admit(&mut table, start).expect("room");
        let (_, class, second) = admit(&mut table, start).expect("the reserve");
        assert_eq!(class, Class::Reserve(Limit::Connections));
        assert!(admit(&mut table, start).is_none());
        let soon = start + RESERVE_GRACE;
        let (_, class, _) = admit(&mut table, soon).expect("the reserve turns over");
        assert_eq!(class, Class::Reserve(Limit::Connections));
        assert!(second.is_cancelled() && !first.is_cancelled());
        assert_eq!(admit(&mut table, start + GRACE).expect("the first").1, Class::Regular);
        assert!(first.is_cancelled());
    }

    #[test]
    fn a_connection_that_nobody_has_read_from_does_not_give_way() {
        let start = Instant::now();
        let mut table = table(1, 1, None);
        for _ in 0..2 {
            let admission = table.admit(HOME, &CancellationToken::new(), start);
            assert!(matches!(admission, Admission::Open { gave_way: false, .. }));
        }
        assert!(admit(&mut table, start + GRACE).is_none());
    }

    #[test]
    fn an_address_with_too_many_connections_only_gets_the_reserve() {
        let start = Instant::now();
        let mut table = table(9, 1, Some(2));
        let (first, ..) = admit(&mut table, start).expect("room");
        admit(&mut table, start).expect("room");
        let (_, class, _) = admit(&mut table, start).expect("the reserve");
        assert_eq!(class, Class::Reserve(Limit::PerAddress));
        assert_eq!(table.admit(HOME, &CancellationToken::new(), start), Admission::Refused);
        let other = "192.0.2.1".parse().expect("an address");
        assert!(matches!(
            table.admit(other, &CancellationToken::new(), start),
            Admission::Open {
                class: Class::Regular,
                ..
            }
        ));
        table.close(first);
        table.close(first + 2);
        assert_eq!(admit(&mut table, start).expect("room again").1, Class::Regular);
    }

    #[test]
    fn what_is_closed_is_forgotten() {
        let start = Instant::now();
        let mut table = table(2, 2, Some(4));
        let ids: Vec<u64> = (0..4).map(|_| admit(&mut table, start).expect("room").0).collect();
        table.make_room(Class::Regular, start + GRACE);
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
