//! LMCache's notifications: a ZeroMQ PULL socket, and whoever waits for a request's KV to have arrived.
//!
//! Wire format (LMCache 0.5.6 `pd_backend_async.py`): one frame, a msgpack map with `type` = `ProxyNotif` and `req_id`;
//! every rank that stores KV sends one. Knows nothing of HTTP or of what a request is.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::watch;
use tokio::task::JoinSet;
use zeromq::{PullSocket, Socket, SocketRecv};

/// How long to wait after an error of the socket itself, so that a lasting one does not spin.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(20);

/// Why the socket could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    /// The address cannot be bound.
    #[error("cannot take LMCache notifications on `{address}`")]
    Bind {
        /// Host and port.
        address: String,
        /// Why.
        #[source]
        source: zeromq::ZmqError,
    },
    /// The socket was bound, but to no TCP port.
    #[error("notifications need a TCP port, `{0}` has none")]
    NoPort(String),
}

/// The open socket and the loop that reads it. Dropping it ends the loop.
#[derive(Debug)]
pub struct Notifications {
    port: u16,
    waiters: Arc<Waiters>,
    _reader: JoinSet<()>,
}

#[derive(Debug, Default)]
struct Waiters {
    waiting: Mutex<HashMap<String, watch::Sender<u16>>>,
    late: AtomicU64,
    malformed: AtomicU64,
}

#[derive(Deserialize)]
struct ProxyNotif {
    r#type: String,
    req_id: String,
}

impl Notifications {
    /// Binds the socket and starts to read it. Port 0 takes any free one.
    pub async fn bind(host: &str, port: u16) -> Result<Self, NotifyError> {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let address = if bare.contains(':') {
            format!("tcp://[{bare}]:{port}")
        } else {
            format!("tcp://{bare}:{port}")
        };
        let mut socket = PullSocket::new();
        let endpoint = socket.bind(&address).await.map_err(|source| NotifyError::Bind {
            address: address.clone(),
            source,
        })?;
        let zeromq::Endpoint::Tcp(_, port) = endpoint else {
            return Err(NotifyError::NoPort(address));
        };
        let waiters = Arc::new(Waiters::default());
        let mut reader = JoinSet::new();
        reader.spawn(read(socket, Arc::clone(&waiters)));
        Ok(Self {
            port,
            waiters,
            _reader: reader,
        })
    }

    /// The port that the socket is bound to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Starts to count the notifications of one request. Must be called before its prefill leg is sent, because they
    /// can come before that leg's answer.
    pub(super) fn expect(&self, request_id: &str, count: u16) -> Arrival {
        let (sender, received) = watch::channel(0);
        self.waiters.lock().insert(request_id.to_owned(), sender);
        Arrival {
            request_id: request_id.to_owned(),
            count,
            received,
            waiters: Arc::clone(&self.waiters),
        }
    }

    /// Notifications that nobody waited for any more.
    pub(super) fn late(&self) -> u64 {
        self.waiters.late.load(Ordering::Relaxed)
    }

    /// Messages that were no notification.
    pub(super) fn malformed(&self) -> u64 {
        self.waiters.malformed.load(Ordering::Relaxed)
    }
}

/// Reads the socket for ever. Nothing that a peer sends ends it.
async fn read(mut socket: PullSocket, waiters: Arc<Waiters>) {
    loop {
        match socket.recv().await {
            Ok(message) => waiters.take(message.get(0).map(AsRef::as_ref).unwrap_or_default()),
            Err(error) => {
                waiters.malformed.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(%error, "a peer of the notification socket failed");
                tokio::time::sleep(PAUSE_AFTER_ERROR).await;
            }
        }
    }
}

impl Waiters {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, watch::Sender<u16>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, frame: &[u8]) {
        let Ok(ProxyNotif { r#type, req_id }) = rmp_serde::from_slice(frame) else {
            self.malformed.fetch_add(1, Ordering::Relaxed);
            return;
        };
        if r#type != "ProxyNotif" {
            self.malformed.fetch_add(1, Ordering::Relaxed);
            return;
        }
        match self.lock().get(&req_id) {
            Some(received) => received.send_modify(|count| *count = count.saturating_add(1)),
            None => {
                self.late.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// The wait for one request's notifications. Dropping it ends the wait; later ones are counted as late.
#[derive(Debug)]
pub(super) struct Arrival {
    request_id: String,
    count: u16,
    received: watch::Receiver<u16>,
    waiters: Arc<Waiters>,
}

impl Arrival {
    /// Returns once all have come. Safe to cancel and to call again.
    pub(super) async fn complete(&mut self) {
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
    use tokio::io::AsyncWriteExt;
    use zeromq::{PushSocket, SocketSend};

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
        notifications.waiters.take(&notification("7f3a"));
        assert!(futures_util::FutureExt::now_or_never(arrival.complete()).is_none());
        notifications.waiters.take(&notification("other"));
        notifications.waiters.take(&notification("7f3a"));
        arrival.complete().await;
        drop(arrival);
        notifications.waiters.take(&notification("7f3a"));
        assert_eq!((notifications.late(), notifications.malformed()), (2, 0));
        assert!(notifications.waiters.lock().is_empty());
    }

    #[tokio::test]
    async fn garbage_never_ends_the_loop() {
        let notifications = Notifications::bind("127.0.0.1", 0).await.expect("bound");
        let address = format!("127.0.0.1:{}", notifications.port());
        let mut arrival = notifications.expect("a", 1);
        // Bytes that are not even ZeroMQ, from a port scanner for instance.
        let mut scanner = tokio::net::TcpStream::connect(&address).await.expect("connected");
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
        // A peer that dies in the middle must not take the others along.
        let mut dying = PushSocket::new();
        dying.connect(&format!("tcp://{address}")).await.expect("connected");
        dying.send(b"\x01".to_vec().into()).await.expect("sent");
        drop(dying);
        peer.send(notification("a").into()).await.expect("sent");
        tokio::time::timeout(Duration::from_secs(20), arrival.complete())
            .await
            .expect("the notification after the garbage");
        assert!(notifications.malformed() >= 4, "{}", notifications.malformed());
    }
}
