//! The receiving end of one ZeroMQ connection: ZMTP 3 with the NULL mechanism, as a PULL socket that takes small messages.
//!
//! Own code, because the `zeromq` crate allocates whatever length a peer claims, and this port may be open to strangers.
//! A peer costs one buffer of [`MAX_FRAME_BYTES`], and neither a slow nor a wrong one holds up any other. The protocol is
//! that of <https://rfc.zeromq.org/spec/23/>, with the heartbeats of libzmq.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::time::timeout;

/// Longest frame that is read. LMCache's notifications have about 60 bytes.
pub(super) const MAX_FRAME_BYTES: usize = 4096;

/// How long a peer may take for its part of the handshake. libzmq allows 30 s.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// How long the rest of a frame may take, and a reply. Between frames a peer may be silent for as long as it likes.
const FRAME_DEADLINE: Duration = Duration::from_secs(10);

/// Signature, version 3.0, mechanism NULL, no server, filler.
const GREETING: [u8; 64] = {
    let mut greeting = [0; 64];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    (greeting[12], greeting[13], greeting[14], greeting[15]) = (b'N', b'U', b'L', b'L');
    greeting
};

/// The command that ends our side of the handshake.
const READY: &[u8] = b"\x04\x1a\x05READY\x0bSocket-Type\x00\x00\x00\x04PULL";

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// Why a connection was ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum PeerError {
    #[error("it does not speak ZMTP 3 with the NULL mechanism")]
    Greeting,
    #[error("it is no PUSH socket")]
    SocketType,
    #[error("it sent a frame with flags {0:#04x}")]
    Flags(u8),
    #[error("it announced a frame of {0} bytes, and {MAX_FRAME_BYTES} is the limit")]
    TooLong(u64),
    #[error("it did not finish what it had begun to send within {}", humantime::format_duration(*.0))]
    Slow(Duration),
    #[error("the connection broke")]
    Broken(#[from] io::Error),
}

/// Reads messages until the peer closes the connection. `take` gets the first frame of each.
pub(super) async fn receive<S>(stream: S, mut take: impl FnMut(&[u8])) -> Result<(), PeerError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut peer = Peer {
        stream: BufReader::with_capacity(1024, stream),
        body: Vec::new(),
    };
    within(HANDSHAKE_DEADLINE, peer.shake_hands()).await?;
    let mut is_first_frame = true;
    let mut message = Vec::new();
    while let Some(flags) = peer.frame().await? {
        if flags & COMMAND != 0 {
            peer.obey().await?;
            continue;
        }
        if is_first_frame {
            std::mem::swap(&mut message, &mut peer.body);
        }
        is_first_frame = flags & MORE == 0;
        if is_first_frame {
            take(&message);
        }
    }
    Ok(())
}

async fn within<T>(deadline: Duration, step: impl Future<Output = Result<T, PeerError>>) -> Result<T, PeerError> {
    timeout(deadline, step).await.unwrap_or(Err(PeerError::Slow(deadline)))
}

struct Peer<S> {
    stream: BufReader<S>,
    /// The frame that was read last.
    body: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Peer<S> {
    async fn shake_hands(&mut self) -> Result<(), PeerError> {
        self.stream.write_all(&GREETING).await?;
        // Peers send the signature alone at first, and whoever speaks something else may send less than a greeting.
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
        self.stream.write_all(READY).await?;
        let flags = self.frame().await?.ok_or(PeerError::Greeting)?;
        let is_push = flags == COMMAND && property(&self.body, b"Socket-Type") == Some(b"PUSH");
        if is_push { Ok(()) } else { Err(PeerError::SocketType) }
    }

    /// Reads one frame into `body` and returns its flags; `None` once the peer has closed the connection.
    async fn frame(&mut self) -> Result<Option<u8>, PeerError> {
        let flags = match self.stream.read_u8().await {
            Ok(flags) => flags,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        within(FRAME_DEADLINE, self.rest_of_frame(flags)).await?;
        // The length of a long frame is a matter of its framing only.
        Ok(Some(flags & !LONG))
    }

    async fn rest_of_frame(&mut self, flags: u8) -> Result<(), PeerError> {
        if flags & !(MORE | LONG | COMMAND) != 0 {
            return Err(PeerError::Flags(flags));
        }
        let length = if flags & LONG == 0 {
            self.stream.read_u8().await?.into()
        } else {
            self.stream.read_u64().await?
        };
        let length = match usize::try_from(length) {
            Ok(length) if length <= MAX_FRAME_BYTES => length,
            _ => return Err(PeerError::TooLong(length)),
        };
        self.body.resize(length, 0);
        self.stream.read_exact(&mut self.body).await?;
        Ok(())
    }

    /// Answers a command. Only a heartbeat wants an answer; what it carries behind its time to live comes back.
    async fn obey(&mut self) -> Result<(), PeerError> {
        let Some([_, _, context @ ..]) = self.body.strip_prefix(b"\x04PING") else {
            return Ok(());
        };
        let context = &context[..context.len().min(16)];
        let mut pong = vec![COMMAND, 0];
        pong.extend(b"\x04PONG");
        pong.extend(context);
        pong[1] = u8::try_from(pong.len() - 2).unwrap_or(u8::MAX);
        let reply = async { Ok(self.stream.write_all(&pong).await?) };
        within(FRAME_DEADLINE, reply).await
    }
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

    /// What is taken of these bytes, how that ended, and what the peer got back after the handshake.
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
        assert_eq!(replies, [READY, b"\x04\x09\x04PONGctxt"].concat());
    }

    #[tokio::test]
    async fn a_length_is_judged_before_anything_is_allocated_for_it() {
        for length in [MAX_FRAME_BYTES as u64 + 1, 1 << 40, u64::MAX] {
            for flags in [LONG, LONG | MORE, LONG | COMMAND] {
                let mut bytes = hello("PUSH");
                bytes.push(flags);
                bytes.extend(length.to_be_bytes());
                let (taken, outcome, _) = received(&bytes).await;
                assert!(
                    matches!(outcome, Err(PeerError::TooLong(told)) if told == length),
                    "{outcome:?}"
                );
                assert!(taken.is_empty());
            }
        }
        // Before the handshake is over, too.
        let bytes = [&GREETING[..], b"\x06", &(1_u64 << 40).to_be_bytes()].concat();
        let (_, outcome, _) = received(&bytes).await;
        assert!(matches!(outcome, Err(PeerError::TooLong(_))), "{outcome:?}");
    }

    #[tokio::test]
    async fn whoever_is_no_push_socket_is_let_go() {
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
        ] {
            let (taken, outcome, _) = received(&bytes).await;
            assert!(outcome.is_err() && taken.is_empty(), "{bytes:?}: {outcome:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_finish_is_let_go_and_who_is_silent_is_not() {
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
        tokio::time::advance(FRAME_DEADLINE).await;
        assert!(reading.is_woken() && reading.poll().is_ready());
    }
}
