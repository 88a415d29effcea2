//! A pool of idle connections.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};

use super::Connection;

/// How long an idle connection is kept. vLLM's server closes after 5 s; closing first avoids sending into the close.
const IDLE_CONNECTION: Duration = Duration::from_secs(4);

/// Idle connections by `Key`: the server, and the runtime that its bytes would wake.
#[derive(Debug)]
pub struct Pool<Key> {
    idle: Mutex<HashMap<Key, Vec<Idle>>>,
    /// Maximum connections per key.
    most: usize,
}

#[derive(Debug)]
struct Idle {
    connection: Connection,
    since: Instant,
}

impl<Key: Hash + Eq> Pool<Key> {
    /// Keeps at most this many connections per key.
    pub fn new(most: usize) -> Self {
        Self {
            idle: Mutex::default(),
            most,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Vec<Idle>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the connection that was used last, which is the least likely to be closed.
    pub fn take(&self, key: &Key) -> Option<Connection> {
        let mut all = self.lock();
        let idle = all.get_mut(key)?;
        while let Some(Idle { connection, since }) = idle.pop() {
            if since.elapsed() < IDLE_CONNECTION && connection.is_idle() {
                return Some(connection);
            }
        }
        None
    }

    /// Keeps a connection whose answer has been read to its end.
    pub fn keep(&self, key: Key, connection: Connection) {
        let mut all = self.lock();
        let idle = all.entry(key).or_default();
        if idle.len() < self.most && connection.is_idle() {
            let since = Instant::now();
            idle.push(Idle { connection, since });
        }
    }

    /// Closes all idle connections. Returns whether there was one.
    pub fn clear(&self) -> bool {
        let idle = std::mem::take(&mut *self.lock());
        idle.values().any(|idle| !idle.is_empty())
    }

    /// Closes connections that have been idle for too long, for as long as it runs.
    pub async fn close_idle(&self) {
        let mut turns = tokio::time::interval(IDLE_CONNECTION / 4);
        turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            turns.tick().await;
            self.lock().retain(|_, idle| {
                idle.retain(|idle| idle.since.elapsed() < IDLE_CONNECTION);
                !idle.is_empty()
            });
        }
    }
}
