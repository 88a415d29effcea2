//! ZMTP 3 with the NULL mechanism: the protocol of ZeroMQ sockets over TCP, one connection at a time.
//!
//! xpyd has its own implementation, because the `zeromq` crate (0.7.0) allocates whatever length a peer claims and
//! takes blocking locks across waits: two simulated engines under load hung forever with every thread in such a lock.
//! A connection costs one buffer, and a slow or wrong peer holds up no other. The protocol is that of
//! <https://rfc.zeromq.org/spec/23/>, with the heartbeats of libzmq.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::time::timeout;

/// Maximum number of frames in a message.
const MAX_FRAMES: usize = 16;

/// The type of a socket, which decides which types it can talk to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketType {
    /// Sends messages and gets no answers.
    Push,
    /// Receives messages.
    Pull,
    /// Sends a request and waits for the answer.
    Req,
    /// Answers requests.
    Rep,
    /// Sends several requests at once.
    Dealer,
    /// Answers peers by their identity.
    Router,
}

impl SocketType {
    /// Its name in a handshake.
    const fn name(self) -> &'static str {
        match self {
            Self::Push => "PUSH",
            Self::Pull => "PULL",
            Self::Req => "REQ",
            Self::Rep => "REP",
            Self::Dealer => "DEALER",
            Self::Router => "ROUTER",
        }
    }

    const fn peers(self) -> &'static [Self] {
        match self {
            Self::Push => &[Self::Pull],
            Self::Pull => &[Self::Push],
            Self::Req => &[Self::Rep, Self::Router],
            Self::Rep => &[Self::Req, Self::Dealer],
            Self::Dealer => &[Self::Rep, Self::Dealer, Self::Router],
            Self::Router => &[Self::Req, Self::Dealer, Self::Router],
        }
    }
}

/// The limits of a peer.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Maximum length of a frame, in bytes.
    pub frame_bytes: usize,
    /// Deadline of the peer's part of the handshake. libzmq allows 30 s.
    pub handshake: Duration,
    /// Deadline of the rest of a frame, and of a reply to a heartbeat. Between frames a peer can be silent forever.
    pub frame: Duration,
}

/// Signature, version 3.0, mechanism NULL, no server, filler.
const GREETING: [u8; 64] = {
    let mut greeting = [0; 64];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    (greeting[12], greeting[13], greeting[14], greeting[15]) = (b'N', b'U', b'L', b'L');
    greeting
};

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// Why a connection was ended.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// Another protocol, an older version, or a mechanism with passwords.
    #[error("the peer does not speak ZMTP 3 with the NULL mechanism")]
    Greeting,
    /// The peer's socket type does not fit.
    #[error("the peer's socket type does not fit a {} socket", .0.name())]
    SocketType(SocketType),
    /// Flag bits that ZMTP does not define.
    #[error("the peer sent a frame with unknown flags {0:#04x}")]
    Flags(u8),
    /// The announced length, checked before anything is allocated for it.
    #[error("the peer announced a frame of {0} bytes; the limit is {1}")]
    TooLong(u64, usize),
    /// More frames than `MAX_FRAMES`.
    #[error("the peer sent a message of more than {MAX_FRAMES} frames")]
    TooManyFrames,
    /// An unfinished handshake or frame.
    #[error("the peer did not complete its message within {}", humantime::format_duration(*.0))]
    Slow(Duration),
    /// The error of the connection.
    #[error("the connection broke")]
    Broken(#[from] io::Error),
}

/// One connection to a peer whose socket type fits.
#[derive(Debug)]
pub struct Connection<S> {
    stream: BufReader<S>,
    limits: Limits,
    /// The identity of the peer; empty if it has none.
    identity: Vec<u8>,
}

async fn within<T>(deadline: Duration, step: impl Future<Output = Result<T, PeerError>>) -> Result<T, PeerError> {
    timeout(deadline, step).await.unwrap_or(Err(PeerError::Slow(deadline)))
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Performs the handshake as a socket of this type.
    ///
    /// # Errors
    /// When the peer speaks another protocol, has another socket type, or is slow.
    pub async fn open(stream: S, kind: SocketType, identity: &[u8], limits: Limits) -> Result<Self, PeerError> {
        let mut connection = Self {
            stream: BufReader::with_capacity(1024, stream),
            limits,
            identity: Vec::new(),
        };
        within(limits.handshake, connection.shake_hands(kind, identity)).await?;
        Ok(connection)
    }

    /// The identity of the peer; empty if it has none.
    pub fn identity(&self) -> &[u8] {
        &self.identity
    }

    async fn shake_hands(&mut self, kind: SocketType, identity: &[u8]) -> Result<(), PeerError> {
        self.stream.write_all(&GREETING).await?;
        // Peers send the signature alone at first, and a peer of another protocol can send less than a greeting.
        let mut signature = [0; 10];
        self.stream.read_exact(&mut signature).await?;
        let mut rest = [0; 54];
        if signature[0] != 0xff || signature[9] & 1 == 0 {
            return Err(PeerError::Greeting);
        }
        self.stream.read_exact(&mut rest).await?;
        if rest[0] < 3 || rest[2..22] != GREETING[12..32] {
            return Err(PeerError::Greeting);
        }
        self.stream.write_all(&ready(kind, identity)).await?;
        let (flags, body) = self.frame().await?.ok_or(PeerError::Greeting)?;
        let name = property(&body, b"Socket-Type").filter(|_| flags == COMMAND);
        if !kind.peers().iter().any(|peer| name == Some(peer.name().as_bytes())) {
            return Err(PeerError::SocketType(kind));
        }
        self.identity = property(&body, b"Identity").unwrap_or_default().to_vec();
        Ok(())
    }

    /// The frames of the next message. `None` once the peer has closed the connection. Not cancel-safe.
    ///
    /// # Errors
    /// When the connection breaks, or the peer breaks the protocol.
    pub async fn receive(&mut self) -> Result<Option<Vec<Vec<u8>>>, PeerError> {
        let mut message = Vec::new();
        while let Some((flags, body)) = self.frame().await? {
            if flags & COMMAND != 0 {
                self.handle_command(&body).await?;
                continue;
            }
            message.push(body);
            if flags & MORE == 0 {
                return Ok(Some(message));
            }
            if message.len() == MAX_FRAMES {
                return Err(PeerError::TooManyFrames);
            }
        }
        Ok(None)
    }

    /// Sends a message of these frames.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn send(&mut self, frames: &[&[u8]]) -> Result<(), PeerError> {
        let mut bytes = Vec::new();
        for (index, frame) in frames.iter().enumerate() {
            let more = if index + 1 < frames.len() { MORE } else { 0 };
            put(&mut bytes, more, frame);
        }
        Ok(self.stream.write_all(&bytes).await?)
    }

    /// Closes the sending side once everything has left.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn finish(mut self) -> Result<(), PeerError> {
        Ok(self.stream.shutdown().await?)
    }

    /// Reads one frame: its flags and its body. `None` once the peer has closed the connection.
    async fn frame(&mut self) -> Result<Option<(u8, Vec<u8>)>, PeerError> {
        let flags = match self.stream.read_u8().await {
            Ok(flags) => flags,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let body = within(self.limits.frame, self.rest_of_frame(flags)).await?;
        // The length flag matters to the framing only.
        Ok(Some((flags & !LONG, body)))
    }

    async fn rest_of_frame(&mut self, flags: u8) -> Result<Vec<u8>, PeerError> {
        if flags & !(MORE | LONG | COMMAND) != 0 {
            return Err(PeerError::Flags(flags));
        }
        let length = if flags & LONG == 0 {
            self.stream.read_u8().await?.into()
        } else {
            self.stream.read_u64().await?
        };
        let limit = self.limits.frame_bytes;
        let mut body = match usize::try_from(length) {
            Ok(length) if length <= limit => vec![0; length],
            _ => return Err(PeerError::TooLong(length, limit)),
        };
        self.stream.read_exact(&mut body).await?;
        Ok(body)
    }

    /// Handles a command. Only a heartbeat needs an answer, which repeats the context after its time to live.
    async fn handle_command(&mut self, command: &[u8]) -> Result<(), PeerError> {
        let Some([_, _, context @ ..]) = command.strip_prefix(b"\x04PING") else {
            return Ok(());
        };
        let mut pong = Vec::new();
        put(
            &mut pong,
            COMMAND,
            &[b"\x04PONG", &context[..context.len().min(16)]].concat(),
        );
        let reply = async { Ok(self.stream.write_all(&pong).await?) };
        within(self.limits.frame, reply).await
    }
}

/// Appends a frame.
fn put(bytes: &mut Vec<u8>, flags: u8, body: &[u8]) {
    if let Ok(length) = u8::try_from(body.len()) {
        bytes.extend([flags, length]);
    } else {
        bytes.push(flags | LONG);
        bytes.extend((body.len() as u64).to_be_bytes());
    }
    bytes.extend(body);
}

/// The command that ends our side of the handshake.
fn ready(kind: SocketType, identity: &[u8]) -> Vec<u8> {
    let mut body = b"\x05READY".to_vec();
    for (name, value) in [("Socket-Type", kind.name().as_bytes()), ("Identity", identity)] {
        // Only sockets that get answers have an identity.
        if !value.is_empty() {
            body.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
            body.extend(name.as_bytes());
            body.extend(u32::try_from(value.len()).unwrap_or(u32::MAX).to_be_bytes());
            body.extend(value);
        }
    }
    let mut bytes = Vec::new();
    put(&mut bytes, COMMAND, &body);
    bytes
}

/// A property of a READY command.
fn property<'body>(body: &'body [u8], wanted: &[u8]) -> Option<&'body [u8]> {
    let mut rest = body.strip_prefix(b"\x05READY")?;
    while let Some((&length, after)) = rest.split_first() {
        let (name, after) = after.split_at_checked(length.into())?;
        let (length, after) = after.split_first_chunk::<4>()?;
        let (value, after) = after.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
        if name.eq_ignore_ascii_case(wanted) {
            return Some(value);
        }
        rest = after;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a PUSH socket of libzmq 4.3 sends before its first message.
    fn hello(socket_type: &str) -> Vec<u8> {
        let mut bytes = GREETING.to_vec();
        bytes[11] = 1;
        let mut ready = b"\x05READY\x0bSocket-Type\0\0\0".to_vec();
        ready.push(u8::try_from(socket_type.len()).expect("short"));
        ready.extend(socket_type.as_bytes());
        ready.extend(b"\x08Identity\0\0\0\0");
        bytes.extend([COMMAND, u8::try_from(ready.len()).expect("short")]);
        bytes.extend(ready);
        bytes
    }

    const LIMITS: Limits = Limits {
        frame_bytes: 4096,
        handshake: Duration::from_secs(10),
        frame: Duration::from_secs(10),
    };

    /// Reads messages until the peer closes the connection. `take` gets the first frame of each.
    async fn receive<S>(stream: S, mut take: impl FnMut(&[u8])) -> Result<(), PeerError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut connection = Connection::open(stream, SocketType::Pull, b"", LIMITS).await?;
        while let Some(message) = connection.receive().await? {
            take(&message[0]);
        }
        Ok(())
    }

    /// The messages of these bytes, how the connection ended, and what the peer got back after the handshake.
    async fn received(bytes: &[u8]) -> (Vec<Vec<u8>>, Result<(), PeerError>, Vec<u8>) {
        let (mut peer, own) = tokio::io::duplex(1 << 20);
        peer.write_all(bytes).await.expect("room");
        peer.shutdown().await.expect("open");
        let mut taken = Vec::new();
        let outcome = receive(own, |message| taken.push(message.to_vec())).await;
        let mut replies = Vec::new();
        peer.read_to_end(&mut replies).await.expect("open");
        (taken, outcome, replies.split_off(GREETING.len().min(replies.len())))
    }

    #[tokio::test]
    async fn messages_come_whole_and_heartbeats_are_answered() {
        let mut bytes = hello("PUSH");
        bytes.extend(b"\x00\x03one");
        bytes.extend(b"\x04\x0b\x04PING\x00\x64ctxt");
        // A message of three frames, with a command between them.
        bytes.extend(b"\x01\x03two\x04\x03\x02XX\x01\x04rest\x00\x00");
        bytes.extend(b"\x02\0\0\0\0\0\0\0\x05three");
        let (taken, outcome, replies) = received(&bytes).await;
        assert!(outcome.is_ok(), "{outcome:?}");
        assert_eq!(taken, [&b"one"[..], b"two", b"three"]);
        assert_eq!(
            replies,
            [&ready(SocketType::Pull, b"")[..], b"\x04\x09\x04PONGctxt"].concat()
        );
    }

    #[tokio::test]
    async fn a_length_is_checked_before_allocation() {
        for length in [LIMITS.frame_bytes as u64 + 1, 1 << 40, u64::MAX] {
            for flags in [LONG, LONG | MORE, LONG | COMMAND] {
                let mut bytes = hello("PUSH");
                bytes.push(flags);
                bytes.extend(length.to_be_bytes());
                let (taken, outcome, _) = received(&bytes).await;
                assert!(
                    matches!(outcome, Err(PeerError::TooLong(told, 4096)) if told == length),
                    "{outcome:?}"
                );
                assert!(taken.is_empty());
            }
        }
        // Before the handshake ends, too.
        let bytes = [&GREETING[..], b"\x06", &(1_u64 << 40).to_be_bytes()].concat();
        let (_, outcome, _) = received(&bytes).await;
        assert!(matches!(outcome, Err(PeerError::TooLong(..))), "{outcome:?}");
    }

    #[tokio::test]
    async fn only_push_sockets_are_accepted() {
        let with = |change: fn(&mut Vec<u8>)| {
            let mut bytes = hello("PUSH");
            change(&mut bytes);
            bytes
        };
        for bytes in [
            b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(),
            hello("PULL"),
            hello("DEALER"),
            with(|bytes| bytes[10] = 1),
            with(|bytes| bytes[12..17].copy_from_slice(b"PLAIN")),
            with(|bytes| bytes.truncate(40)),
            with(|bytes| bytes[64] = 0),
            with(|bytes| bytes.extend(b"\x08\x01x")),
            with(|bytes| bytes.extend(b"\x00\x05half")),
            [&GREETING[..], b"\x04\x0b\x05READY\xff\0\0\0\xff"].concat(),
            with(|bytes| bytes.extend(b"\x01\x01x".repeat(MAX_FRAMES))),
        ] {
            let (taken, outcome, _) = received(&bytes).await;
            assert!(outcome.is_err() && taken.is_empty(), "{bytes:?}: {outcome:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn unfinished_frames_time_out_and_silence_does_not() {
        for begun in [&b"\xff"[..], &GREETING, b""] {
            let (mut peer, own) = tokio::io::duplex(1 << 16);
            peer.write_all(begun).await.expect("room");
            let outcome = receive(own, |_| {}).await;
            assert!(matches!(outcome, Err(PeerError::Slow(_))), "{outcome:?}");
        }
        let (mut peer, own) = tokio::io::duplex(1 << 16);
        peer.write_all(&hello("PUSH")).await.expect("room");
        let mut reading = tokio_test::task::spawn(receive(own, |_| {}));
        assert!(reading.poll().is_pending());
        tokio::time::advance(Duration::from_hours(24)).await;
        assert!(reading.poll().is_pending());
        peer.write_all(b"\x00\x05half").await.expect("room");
        assert!(reading.poll().is_pending());
        tokio::time::advance(LIMITS.frame).await;
        assert!(reading.is_woken() && reading.poll().is_ready());
    }

    #[tokio::test]
    async fn both_ends_exchange_messages_of_any_length() {
        let limits = Limits {
            frame_bytes: 1 << 20,
            ..LIMITS
        };
        let (one, other) = tokio::io::duplex(1 << 12);
        let (asking, answering) = tokio::join!(
            Connection::open(one, SocketType::Dealer, b"me", limits),
            Connection::open(other, SocketType::Router, b"", limits)
        );
        let (mut asking, mut answering) = (asking.expect("a router"), answering.expect("a dealer"));
        assert_eq!((asking.identity(), answering.identity()), (&b""[..], &b"me"[..]));
        for length in [0, 1, 255, 256, 1 << 20] {
            let body = vec![7; length];
            let frames = [&b""[..], &body];
            let (sent, received) = tokio::join!(asking.send(&frames), answering.receive());
            sent.expect("room");
            assert_eq!(received.expect("a message"), Some(vec![Vec::new(), body]));
        }
        asking.finish().await.expect("open");
        assert_eq!(answering.receive().await.expect("an end"), None);
    }
}
