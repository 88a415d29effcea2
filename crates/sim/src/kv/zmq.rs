//! The ZeroMQ sockets of a simulated engine: servers for many connections, and clients with one.
//!
//! REP and ROUTER sockets answer REQ and DEALER sockets with an empty frame, followed by the content.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use xpyd_base::zmtp::{Connection, Limits, PeerError, SocketType};

/// Limits that allow the KV of any prompt, and a peer that pauses for a while.
const LIMITS: Limits = Limits {
    frame_bytes: 256 << 20,
    handshake: Duration::from_mins(5),
    frame: Duration::from_mins(5),
};

/// The first and the longest pause between connection attempts.
const PAUSES: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// A listening socket.
#[derive(Debug)]
pub(crate) struct Server {
    listener: TcpListener,
    kind: SocketType,
    /// Held from a request until its answer is sent.
    turn: Option<Arc<Mutex<()>>>,
}

/// A request of a peer.
#[derive(Debug)]
pub(crate) struct ZmqRequest {
    /// The identity of the peer, if it has one.
    pub(crate) identity: Vec<u8>,
    pub(crate) payload: Vec<u8>,
}

impl Server {
    /// Port 0 lets the system choose.
    pub(crate) async fn bind(kind: SocketType, host: &str, port: u16) -> io::Result<Self> {
        let listener = TcpListener::bind((host, port)).await?;
        Ok(Self {
            listener,
            kind,
            turn: None,
        })
    }

    /// Serves like a single thread: a peer that does not read its answer blocks all others.
    pub(crate) fn one_at_a_time(self) -> Self {
        Self {
            turn: Some(Arc::default()),
            ..self
        }
    }

    pub(crate) fn port(&self) -> io::Result<u16> {
        Ok(self.listener.local_addr()?.port())
    }

    /// Serves forever: the requests of one connection in sequence, those of several in parallel. `None` sends no
    /// answer.
    pub(crate) async fn serve<A, F>(self, answer: A)
    where
        A: Fn(ZmqRequest) -> F + Clone + Send + 'static,
        F: Future<Output = Option<Vec<Bytes>>> + Send,
    {
        let mut peers = JoinSet::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        let (answer, turn) = (answer.clone(), self.turn.clone());
                        peers.spawn(async move {
                            // A peer that disconnects or uses another protocol is dropped.
                            drop(converse(stream, self.kind, turn, answer).await);
                        });
                    }
                    Err(_) => sleep(PAUSES.0).await,
                },
                Some(_) = peers.join_next() => {}
            }
        }
    }
}

async fn converse<A, F>(
    stream: TcpStream,
    kind: SocketType,
    turn: Option<Arc<Mutex<()>>>,
    answer: A,
) -> Result<(), PeerError>
where
    A: Fn(ZmqRequest) -> F,
    F: Future<Output = Option<Vec<Bytes>>>,
{
    stream.set_nodelay(true)?;
    let mut peer = Connection::open(stream, kind, b"", LIMITS).await?;
    while let Some(frames) = peer.receive().await? {
        let Ok([delimiter, payload]) = <[Vec<u8>; 2]>::try_from(frames) else {
            continue;
        };
        if !delimiter.is_empty() {
            continue;
        }
        let identity = peer.identity().to_vec();
        let _turn = match &turn {
            Some(turn) => Some(turn.lock().await),
            None => None,
        };
        if let Some(answer) = answer(ZmqRequest { identity, payload }).await {
            let frames: Vec<&[u8]> = std::iter::once(&[][..])
                .chain(answer.iter().map(Bytes::as_ref))
                .collect();
            peer.send(&frames).await?;
        }
    }
    Ok(())
}

/// A socket connected to one server.
#[derive(Debug)]
pub(crate) struct Client(Connection<TcpStream>);

impl Client {
    /// Connects to `host:port` and retries while it is refused, until the deadline.
    pub(crate) async fn connect(
        kind: SocketType,
        address: &str,
        identity: &str,
        deadline: Duration,
    ) -> Result<Self, PeerError> {
        let connecting = async {
            let stream = stream_to(address).await?;
            stream.set_nodelay(true)?;
            Connection::open(stream, kind, identity.as_bytes(), LIMITS).await
        };
        let connected = timeout(deadline, connecting).await;
        connected.unwrap_or(Err(PeerError::Slow(deadline))).map(Self)
    }

    /// Waits for the answer and returns its first frame.
    pub(crate) async fn ask(&mut self, payload: &[u8]) -> Result<Vec<u8>, PeerError> {
        self.0.send(&[b"", payload]).await?;
        let frames = self.0.receive().await?.unwrap_or_default();
        let answer = frames.into_iter().nth(1);
        answer.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof).into())
    }

    /// Sends a last message that has no answer.
    pub(crate) async fn tell(mut self, payload: &[u8]) -> Result<(), PeerError> {
        self.0.send(&[payload]).await?;
        self.0.finish().await
    }
}

async fn stream_to(address: &str) -> io::Result<TcpStream> {
    let mut pause = PAUSES.0;
    loop {
        match TcpStream::connect(address).await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => sleep(pause).await,
            result => return result,
        }
        pause = (pause * 2).min(PAUSES.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(20);

    /// A server that echoes requests, except those that ask it to wait.
    async fn echo(peers: &mut JoinSet<()>) -> String {
        let server = Server::bind(SocketType::Router, "127.0.0.1", 0).await.expect("a port");
        let address = format!("127.0.0.1:{}", server.port().expect("bound"));
        peers.spawn(server.serve(|question: ZmqRequest| async move {
            if question.payload == b"wait" {
                std::future::pending::<()>().await;
            }
            Some(vec![question.identity.into(), question.payload.into()])
        }));
        address
    }

    #[tokio::test]
    async fn slow_peers_do_not_block_others() {
        let mut peers = JoinSet::new();
        let address = echo(&mut peers).await;
        let mut silent = Vec::new();
        for _ in 0..20 {
            silent.push(TcpStream::connect(&address).await.expect("a listener"));
        }
        let mut waiting = Client::connect(SocketType::Req, &address, "w", DEADLINE)
            .await
            .expect("a router");
        let mut waiting = tokio_test::task::spawn(waiting.ask(b"wait"));
        assert!(waiting.poll().is_pending());
        let mut asking = Client::connect(SocketType::Dealer, &address, "name", DEADLINE)
            .await
            .expect("a router");
        for _ in 0..3 {
            assert_eq!(asking.ask(b"x").await.expect("an answer"), b"name");
        }
        drop(silent);
        assert_eq!(asking.ask(&[1].repeat(100_000)).await.expect("an answer"), b"name");
    }

    #[tokio::test]
    async fn lost_peers_are_errors_and_late_peers_connect() {
        let mut peers = JoinSet::new();
        let address = echo(&mut peers).await;
        let mut asking = Client::connect(SocketType::Req, &address, "", DEADLINE)
            .await
            .expect("a router");
        peers.shutdown().await;
        assert!(asking.ask(b"wait").await.is_err());
        let port = address
            .rsplit_once(':')
            .and_then(|(_, port)| port.parse().ok())
            .expect("a port");
        let mut meeting = tokio_test::task::spawn(Client::connect(SocketType::Req, &address, "", DEADLINE));
        assert!(meeting.poll().is_pending());
        let again = Server::bind(SocketType::Rep, "127.0.0.1", port)
            .await
            .expect("free again");
        peers.spawn(again.serve(|question: ZmqRequest| async move { Some(vec![question.payload.into()]) }));
        let mut met = meeting.await.expect("a rep socket");
        assert_eq!(met.ask(b"x").await.expect("an answer"), b"x");
    }
}
