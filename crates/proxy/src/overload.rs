//! The proxy's own limits: counts and logs each time that one is reached. No engine is blamed for it.
//!
//! This module knows neither connections nor requests.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use tokio::time::Instant;

/// Minimum time between two log lines about the same limit, because clients decide how often it is reached.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// A limit of the proxy itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    /// No file descriptor was free to connect to an engine.
    ConnectDescriptors,
    /// No file descriptor was free to accept a client.
    AcceptDescriptors,
    /// A new connection sent no complete request header within the deadline.
    FirstHead,
    /// A quiet connection was closed to make room for a new one.
    GaveWay,
    /// A request came on a connection beyond the limit.
    Connections,
    /// A client address has too many connections.
    PerAddress,
}

impl Limit {
    const COUNT: usize = 6;

    /// Its label in the metrics.
    fn label(self) -> &'static str {
        match self {
            Self::ConnectDescriptors => "descriptors_connect",
            Self::AcceptDescriptors => "descriptors_accept",
            Self::FirstHead => "head_deadline",
            Self::GaveWay => "gave_way",
            Self::Connections => "max_connections",
            Self::PerAddress => "max_per_address",
        }
    }

    /// The text for the log and for a client's error.
    pub(crate) fn message(self) -> &'static str {
        match self {
            Self::ConnectDescriptors => {
                "no file descriptor is free to connect to an engine: raise `ulimit -n` or lower `clients.max_connections`"
            }
            Self::AcceptDescriptors => {
                "no file descriptor is free to accept a client: raise `ulimit -n` or lower `clients.max_connections`"
            }
            Self::FirstHead => "a client sent no request within `clients.head_deadline`",
            Self::GaveWay => "a connection without a request was closed, because `clients.max_connections` is reached",
            Self::Connections => "all client connections are in use: `clients.max_connections` is reached",
            Self::PerAddress => "a client address has more connections than `clients.max_per_address` allows",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    limit: &'static str,
}

/// Counts and logs the limits that were reached. Clones share the counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Overload(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    reached: Family<Labels, Counter>,
    connections: Gauge,
    lines: Mutex<[LimitLog; Limit::COUNT]>,
}

/// The log state of one limit.
#[derive(Debug, Default)]
struct LimitLog {
    last: Option<Instant>,
    /// How often the limit was reached since the last line.
    times: u64,
}

impl LimitLog {
    /// Counts one more. Returns the number to log if a line is due.
    fn add(&mut self, now: Instant) -> Option<u64> {
        self.times += 1;
        if self.last.is_some_and(|last| now - last < LOG_INTERVAL) {
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.times))
    }
}

impl Overload {
    /// The counters, for the registry.
    pub(crate) fn counters(&self) -> impl prometheus_client::registry::Metric + use<> {
        self.0.reached.clone()
    }

    /// The number of open client connections, for the registry.
    pub(crate) fn connections(&self) -> impl prometheus_client::registry::Metric + use<> {
        self.0.connections.clone()
    }

    pub(crate) fn opened(&self) {
        self.0.connections.inc();
    }

    pub(crate) fn closed(&self) {
        self.0.connections.dec();
    }

    /// Records that a limit was reached.
    pub(crate) fn reached(&self, limit: Limit) {
        self.0.reached.get_or_create(&Labels { limit: limit.label() }).inc();
        let mut lines = self.0.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let times = lines[limit as usize].add(Instant::now());
        drop(lines);
        if let Some(times) = times {
            tracing::warn!(limit = limit.label(), times, "{}", limit.message());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_logged_once_per_interval() {
        let start = Instant::now();
        let mut line = LimitLog::default();
        assert_eq!(line.add(start), Some(1));
        for _ in 0..1000 {
            assert_eq!(line.add(start + LOG_INTERVAL / 2), None);
        }
        assert_eq!(line.add(start + LOG_INTERVAL), Some(1001));
    }
}
