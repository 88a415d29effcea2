//! Receive timestamps of the kernel: a busy or sleeping reader reads late, and that must not count as the server's
//! time.
//!
//! Linux stamps a TCP segment as it arrives, and returns the stamp with the bytes (`SO_TIMESTAMPNS`). If several
//! segments were waiting, it is the stamp of the last one. Without a stamp, the time of the read counts.

use std::io::{self, ErrorKind, IoSliceMut};
use std::os::fd::AsRawFd;
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::BytesMut;
use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};
use nix::sys::time::TimeSpec;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::Instant;

/// The buffer of one read. Streams are many and their events small.
const ROOM: usize = 4 << 10;

/// When bytes arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RxTimestamp {
    /// When the last of them reached this machine.
    pub at: Instant,
    /// How long they waited to be read. `None` if the kernel gives no stamp: then `at` is the time of the read.
    pub waited: Option<Duration>,
}

impl RxTimestamp {
    /// The timestamp of bytes without a stamp.
    pub fn now() -> Self {
        Self {
            at: Instant::now(),
            waited: None,
        }
    }
}

/// Reads a stream and records when its bytes arrived.
#[derive(Debug)]
pub(super) struct TimestampingReader {
    room: Box<[u8; ROOM]>,
    control: Vec<u8>,
    /// When the stream was last known to be empty. Bytes that are read later arrived later.
    emptied: Instant,
    last: Option<RxTimestamp>,
}

impl TimestampingReader {
    pub(super) fn new(stream: &TcpStream) -> Self {
        // A kernel that cannot stamp is no reason to fail.
        let _ = setsockopt(stream, sockopt::ReceiveTimestampns, &true);
        Self {
            room: Box::new([0; ROOM]),
            control: cmsg_space!(TimeSpec),
            emptied: Instant::now(),
            last: None,
        }
    }

    pub(super) fn last(&self) -> Option<RxTimestamp> {
        self.last
    }

    pub(super) fn poll_read(
        &mut self,
        stream: &TcpStream,
        into: &mut BytesMut,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(stream.poll_read_ready(context))?;
            let mut read = None;
            let tried = stream.try_io(Interest::READABLE, || {
                let (count, stamp) = receive(stream, &mut self.room[..], &mut self.control)?;
                read = Some((count, stamp));
                // A read that did not fill the buffer has emptied the stream. With `WouldBlock`, tokio waits for the
                // kernel to wake it instead of trying again: half of all system calls.
                if 0 < count && count < ROOM {
                    return Err(ErrorKind::WouldBlock.into());
                }
                Ok(())
            });
            match (read, tried) {
                (Some((count, stamp)), _) => {
                    self.note(stamp, count < ROOM);
                    into.extend_from_slice(&self.room[..count]);
                    return Poll::Ready(Ok(count));
                }
                (None, Err(error)) if error.kind() != ErrorKind::WouldBlock => return Poll::Ready(Err(error)),
                (None, _) => {}
            }
        }
    }

    fn note(&mut self, stamp: Option<Duration>, emptied: bool) {
        let now = Instant::now();
        // The stamp is wall-clock time. Only its age counts, so a wrong clock does no harm; a clock that jumps in
        // between is bounded by `emptied`.
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let waited = stamp.map(|stamp| clock.saturating_sub(stamp).min(now - self.emptied));
        self.last = Some(RxTimestamp {
            at: now - waited.unwrap_or_default(),
            waited,
        });
        if emptied {
            self.emptied = now;
        }
    }
}

/// One read, with the stamp of its last segment since the epoch.
fn receive(stream: &TcpStream, room: &mut [u8], control: &mut [u8]) -> io::Result<(usize, Option<Duration>)> {
    let mut slices = [IoSliceMut::new(room)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(control), MsgFlags::empty())?;
    let stamp = message.cmsgs().ok().and_then(|mut messages| {
        messages.find_map(|message| match message {
            ControlMessageOwned::ScmTimestampns(stamp) => Some(Duration::from(stamp)),
            _ => None,
        })
    });
    Ok((message.bytes, stamp))
}
