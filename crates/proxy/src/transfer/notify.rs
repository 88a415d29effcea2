//! LMCache's notifications: a ZeroMQ PULL socket, and the requests that wait for their KV to arrive.
//!
//! Wire format (LMCache 0.5.6 `pd_backend_async.py`): one frame, a msgpack map with `type` = `ProxyNotif` and
//! `req_id`. Every rank that stores KV sends one. This module knows no HTTP.
//!
//! Anyone who reaches the port can send anything, so everything here is bounded: connections, frames (`xpyd_base::zmtp`),
//! log lines.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

use crate::telemetry::metrics::NotificationErrors;
use xpyd_base::zmtp::{Connection, Limits, PeerError, SocketType};

/// Pause after an error of the listening socket, so that a lasting error does not spin.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(20);

/// Maximum number of connections. Every rank of a prefill engine has one.
const MAX_PEERS: usize = 256;

/// Deadline of the peer's part of the handshake. libzmq allows 30 s.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// Deadline of the rest of a frame, and of a reply.
const FRAME_DEADLINE: Duration = Duration::from_secs(10);

/// A notification has about 60 bytes.
const LIMITS: Limits = Limits {
    frame_bytes: 4096,
    handshake: HANDSHAKE_DEADLINE,
    frame: FRAME_DEADLINE,
};

/// Minimum time between two log lines about refused peers.
const LOG_PAUSE: Duration = Duration::from_mins(1);

/// Why the socket cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    /// The address cannot be bound.
    #[error("cannot listen for LMCache notifications on `{address}`")]
    Bind {
        /// Host and port.
        address: String,
        /// The error of the bind.
        #[source]
        source: std::io::Error,
    },
}

/// The open socket and the task that reads it. Dropping it ends the task.
#[derive(Debug)]
pub struct Notifications {
    port: u16,
    waiters: Arc<Waiters>,
    _accepting: JoinSet<()>,
}

#[derive(Debug, Default)]
struct Waiters {
    waiting: Mutex<HashMap<String, watch::Sender<u16>>>,
    /// The number of notifications from all peers.
    taken: AtomicU64,
    late: AtomicU64,
    malformed: AtomicU64,
}

#[derive(Deserialize)]
struct ProxyNotif<'frame> {
    r#type: &'frame str,
    req_id: &'frame str,
}

impl Notifications {
    /// Binds the socket and starts to read it. Port 0 takes any free port.
    pub async fn bind(host: &str, port: u16) -> Result<Self, NotifyError> {
        Self::bind_for(host, port, MAX_PEERS).await
    }

    async fn bind_for(host: &str, port: u16, max_peers: usize) -> Result<Self, NotifyError> {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let failed = |source| NotifyError::Bind {
            address: format!("{host}:{port}"),
            source,
        };
        let listener = TcpListener::bind((bare, port)).await.map_err(failed)?;
        let port = listener.local_addr().map_err(failed)?.port();
        let waiters = Arc::new(Waiters::default());
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, max_peers, Arc::clone(&waiters)));
        Ok(Self {
            port,
            waiters,
            _accepting: accepting,
        })
    }

    /// The port that the socket is bound to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Starts to count the notifications of one request. Must be called before its prefill leg is sent, because
    /// notifications can precede that leg's answer.
    pub(crate) fn expect(&self, request_id: &str, count: u16) -> Arrival {
        let (sender, received) = watch::channel(0);
        self.waiters.lock().insert(request_id.to_owned(), sender);
        Arrival {
            request_id: request_id.to_owned(),
            count,
            received,
            waiters: Arc::clone(&self.waiters),
        }
    }

    /// Notifications that helped no request, since the socket was bound.
    pub(crate) fn errors(&self) -> NotificationErrors {
        NotificationErrors {
            late: self.waiters.late.load(Ordering::Relaxed),
            malformed: self.waiters.malformed.load(Ordering::Relaxed),
        }
    }
}

/// A connection, from its handshake on.
struct Peer {
    /// The sequence number of its last notification among all peers; 0 before the first.
    last: Arc<AtomicU64>,
    task: AbortHandle,
}

/// Accepts connections until it is dropped. A peer cannot end it.
async fn accept(listener: TcpListener, max_peers: usize, waiters: Arc<Waiters>) {
    let mut tasks = JoinSet::new();
    let mut peers: Vec<Peer> = Vec::new();
    let mut refusals = RefusalLog::default();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    peers.retain(|peer| !peer.task.is_finished());
                    make_room(&mut peers, max_peers);
                    let last = Arc::new(AtomicU64::new(0));
                    let task = tasks.spawn(listen_to(stream, Arc::clone(&waiters), Arc::clone(&last)));
                    peers.push(Peer { last, task });
                }
                Err(error) => {
                    refusals.add(&error);
                    tokio::time::sleep(PAUSE_AFTER_ERROR).await;
                }
            },
            Some(ended) = tasks.join_next() => if let Ok(Err(error)) = ended {
                waiters.malformed.fetch_add(1, Ordering::Relaxed);
                refusals.add(&error);
            },
        }
    }
}

/// At the limit, closes the connection that has been without a notification for longest. An engine connects again.
fn make_room(peers: &mut Vec<Peer>, max_peers: usize) {
    if peers.len() < max_peers {
        return;
    }
    let longest = peers
        .iter()
        .enumerate()
        .min_by_key(|(_, peer)| peer.last.load(Ordering::Relaxed));
    if let Some((index, _)) = longest {
        peers.remove(index).task.abort();
    }
}

async fn listen_to(stream: TcpStream, waiters: Arc<Waiters>, last: Arc<AtomicU64>) -> Result<(), PeerError> {
    let mut peer = Connection::open(stream, SocketType::Pull, b"", LIMITS).await?;
    while let Some(message) = peer.receive().await? {
        if waiters.handle(&message[0]) {
            last.store(waiters.taken.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Log lines about refused peers: one at once, then one for all that follow within `LOG_PAUSE`.
#[derive(Default)]
struct RefusalLog {
    count: u64,
    next: Option<Instant>,
}

impl RefusalLog {
    fn add(&mut self, error: &dyn std::error::Error) {
        self.count += 1;
        let now = Instant::now();
        if self.next.is_some_and(|next| now < next) {
            return;
        }
        self.next = Some(now + LOG_PAUSE);
        let (count, error) = (std::mem::take(&mut self.count), xpyd_base::report::one_line(error));
        tracing::warn!(
            count,
            error,
            "connections to the notification port were closed; the last error"
        );
    }
}

impl Waiters {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, watch::Sender<u16>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Handles a message. Returns whether it was a notification.
    fn handle(&self, frame: &[u8]) -> bool {
        let Some(request_id) = request_id(frame) else {
            self.malformed.fetch_add(1, Ordering::Relaxed);
            return false;
        };
        match self.lock().get(request_id) {
            Some(received) => received.send_modify(|count| *count = count.saturating_add(1)),
            None => {
                self.late.fetch_add(1, Ordering::Relaxed);
            }
        }
        true
    }
}

/// The request id of a notification. Parsing allocates nothing for the lengths that a message claims.
fn request_id(frame: &[u8]) -> Option<&str> {
    let ProxyNotif { r#type, req_id } = rmp_serde::from_slice(frame).ok()?;
    (r#type == "ProxyNotif").then_some(req_id)
}

/// Waits for one request's notifications. Dropping it ends the wait; later notifications count as late.
#[derive(Debug)]
pub(crate) struct Arrival {
    request_id: String,
    count: u16,
    received: watch::Receiver<u16>,
    waiters: Arc<Waiters>,
}

impl Arrival {
    /// Returns once all have come. Cancel-safe, and can be called again.
    pub(crate) async fn complete(&mut self) {
        let count = self.count;
        // The sender lives in the map until this value is dropped, so the channel cannot close.
        if self.received.wait_for(|received| *received >= count).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        self.waiters.lock().remove(&self.request_id);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use zeromq::{PushSocket, Socket as _, SocketSend as _};

    use super::*;

    /// As msgspec encodes `ProxyNotif`; the bytes were taken from LMCache.
    fn notification(request_id: &str) -> Vec<u8> {
        let mut bytes = b"\x82\xa4type\xaaProxyNotif\xa6req_id".to_vec();
        bytes.push(0xa0 | u8::try_from(request_id.len()).expect("a short id"));
        bytes.extend(request_id.as_bytes());
        bytes
    }

    #[tokio::test]
    async fn a_wait_ends_when_every_rank_has_notified() {
        let notifications = Notifications::bind("127.0.0.1", 0).await.expect("bound");
        let mut arrival = notifications.expect("7f3a", 2);
        notifications.waiters.handle(&notification("7f3a"));
        assert!(futures_util::FutureExt::now_or_never(arrival.complete()).is_none());
        notifications.waiters.handle(&notification("other"));
        notifications.waiters.handle(&notification("7f3a"));
        arrival.complete().await;
        drop(arrival);
        notifications.waiters.handle(&notification("7f3a"));
        let NotificationErrors { late, malformed } = notifications.errors();
        assert_eq!((late, malformed), (2, 0));
        assert!(notifications.waiters.lock().is_empty());
    }

    #[tokio::test]
    async fn garbage_never_ends_the_loop() {
        let notifications = Notifications::bind("127.0.0.1", 0).await.expect("bound");
        let address = format!("127.0.0.1:{}", notifications.port());
        let mut arrival = notifications.expect("a", 1);
        // Bytes that are not even ZeroMQ, for instance from a port scanner.
        let mut scanner = TcpStream::connect(&address).await.expect("connected");
        scanner.write_all(b"GET / HTTP/1.1\r\n\r\n").await.expect("written");
        drop(scanner);
        let mut peer = PushSocket::new();
        peer.connect(&format!("tcp://{address}")).await.expect("connected");
        for bytes in [
            &b""[..],
            b"\xff\xff",
            b"\x93\x01\x02\x03",
            b"\x82\xa4type\xabCancelNotif\xa6req_id\xa1a",
        ] {
            peer.send(bytes.to_vec().into()).await.expect("sent");
        }
        // A peer that breaks off must not affect the others.
        let mut dying = PushSocket::new();
        dying.connect(&format!("tcp://{address}")).await.expect("connected");
        dying.send(b"\x01".to_vec().into()).await.expect("sent");
        drop(dying);
        peer.send(notification("a").into()).await.expect("sent");
        tokio::time::timeout(Duration::from_secs(20), arrival.complete())
            .await
            .expect("the notification after the garbage");
        let malformed = notifications.errors().malformed;
        assert!(malformed >= 4, "{malformed}");
    }

    #[tokio::test]
    async fn silent_connections_give_way_to_notifying_ones() {
        let notifications = Notifications::bind_for("127.0.0.1", 0, 4).await.expect("bound");
        let address = format!("127.0.0.1:{}", notifications.port());
        let mut engine = PushSocket::new();
        engine.connect(&format!("tcp://{address}")).await.expect("connected");
        let mut first = notifications.expect("first", 1);
        engine.send(notification("first").into()).await.expect("sent");
        first.complete().await;
        let mut crowd = Vec::new();
        for _ in 0..24 {
            crowd.push(TcpStream::connect(&address).await.expect("connected"));
        }
        // The oldest connections were closed, at most after our greeting.
        for stream in crowd.iter_mut().take(20) {
            let mut greeting = Vec::new();
            // A reset means the same as an end.
            drop(stream.read_to_end(&mut greeting).await);
            assert!(greeting.len() <= 64);
        }
        let mut arrival = notifications.expect("second", 1);
        engine.send(notification("second").into()).await.expect("sent");
        arrival.complete().await;
    }
}
