//! Refuses requests whose header two HTTP implementations can read differently (RFC 9112 §3.2, §6.3), as nginx and
//! envoy do.
//!
//! hyper ignores a `Content-Length` beside a `Transfer-Encoding` and hides it from the service, so this module checks
//! request headers before hyper reads them. `check` and `ChunkScanner` are pure. `StrictStream` follows where each
//! request begins. It replaces a refused header by its own one, which the proxy answers with the reason. It copies no
//! body.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::http::{HeaderMap, StatusCode};
use bytes::{Buf, Bytes};
use memchr::memchr_iter;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Maximum size of a request header.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// Maximum number of headers, the same as hyper's.
const MAX_HEADERS: usize = 100;

/// A header of up to this many bytes is parsed on every read, so that a client without HTTP is refused at once. A
/// longer one is parsed only where it could have ended.
const EAGER_BYTES: usize = 1 << 10;

/// Maximum number of bytes in a body or a chunk, the same as nginx's.
const MAX_LENGTH: u64 = i64::MAX.unsigned_abs();

/// The header that marks a replaced request. A client that sends it is refused as well.
const REFUSED: &str = "x-xpyd-refused";

/// Why a request header is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadRefusal {
    /// Two lengths, or a length together with chunks.
    Framing,
    /// A transfer coding other than `chunked`.
    Coding,
    /// No host, two hosts, or an invalid host.
    Host,
    /// An expectation other than `100-continue`.
    Expectation,
    /// Not HTTP/1.0 or HTTP/1.1.
    Version,
    /// The request line exceeds the size limit.
    Line,
    /// The request header exceeds the size limit.
    Head,
}

impl HeadRefusal {
    const ALL: [Self; 7] = [
        Self::Framing,
        Self::Coding,
        Self::Host,
        Self::Expectation,
        Self::Version,
        Self::Line,
        Self::Head,
    ];

    /// The refusal that a replaced request carries.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let code = headers.get(REFUSED)?.as_bytes();
        Self::ALL.into_iter().find(|refusal| refusal.code().as_bytes() == code)
    }

    pub(crate) fn status(self) -> StatusCode {
        match self {
            Self::Framing | Self::Host => StatusCode::BAD_REQUEST,
            Self::Coding => StatusCode::NOT_IMPLEMENTED,
            Self::Expectation => StatusCode::EXPECTATION_FAILED,
            Self::Version => StatusCode::HTTP_VERSION_NOT_SUPPORTED,
            Self::Line => StatusCode::URI_TOO_LONG,
            Self::Head => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        }
    }

    /// The error code. It is stable, because clients can match on it.
    pub(crate) fn code(self) -> &'static str {
        match self {
            Self::Framing => "ambiguous_length",
            Self::Coding => "unsupported_transfer_coding",
            Self::Host => "invalid_host",
            Self::Expectation => "unsupported_expectation",
            Self::Version => "unsupported_http_version",
            Self::Line => "url_too_long",
            Self::Head => "headers_too_large",
        }
    }

    pub(crate) fn message(self) -> &'static str {
        match self {
            Self::Framing => {
                "the length of the request's body is ambiguous: send one `Content-Length`, or one `Transfer-Encoding: chunked`"
            }
            Self::Coding => "the only supported transfer coding is `chunked`",
            Self::Host => "a request must have one `Host` header that names a host",
            Self::Expectation => "the only supported expectation is `100-continue`",
            Self::Version => "xpyd speaks HTTP/1.1 and HTTP/1.0",
            Self::Line => "the request line exceeds 64 KiB",
            Self::Head => "the request header exceeds 64 KiB",
        }
    }

    /// The header that replaces the refused one.
    fn head(self) -> Bytes {
        format!(
            "GET / HTTP/1.1\r\nconnection: close\r\n{REFUSED}: {}\r\n\r\n",
            self.code()
        )
        .into()
    }
}

/// What the bytes at the beginning of a request are.
#[derive(Debug, PartialEq, Eq)]
enum HeadCheck {
    /// A whole header: its length, and how the body is framed.
    Head(usize, Framing),
    /// The beginning of a header.
    Partial,
    Refused(HeadRefusal),
    /// Bytes that hyper refuses itself.
    Malformed,
}

/// The framing of the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    Length(u64),
    Chunked,
}

fn check(bytes: &[u8]) -> HeadCheck {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => check_request(&request, length),
        Ok(httparse::Status::Partial) => HeadCheck::Partial,
        Err(httparse::Error::Version) => HeadCheck::Refused(HeadRefusal::Version),
        Err(_) => HeadCheck::Malformed,
    }
}

fn check_request(request: &httparse::Request<'_, '_>, length: usize) -> HeadCheck {
    let (mut host, mut coding, mut body) = (None, None, None);
    for header in request.headers.iter() {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        let (slot, refusal) = if is("host") {
            (&mut host, HeadRefusal::Host)
        } else if is("transfer-encoding") {
            (&mut coding, HeadRefusal::Framing)
        } else if is("content-length") {
            (&mut body, HeadRefusal::Framing)
        } else {
            if is("expect") && !header.value.eq_ignore_ascii_case(b"100-continue") {
                return HeadCheck::Refused(HeadRefusal::Expectation);
            }
            continue;
        };
        if slot.replace(header.value).is_some() {
            return HeadCheck::Refused(refusal);
        }
    }
    let is_old = request.version == Some(0);
    if !host.map_or(is_old, is_host) {
        return HeadCheck::Refused(HeadRefusal::Host);
    }
    match (coding, body) {
        (Some(_), Some(_)) => HeadCheck::Refused(HeadRefusal::Framing),
        // HTTP/1.0 has no transfer codings.
        (Some(_), None) if is_old => HeadCheck::Malformed,
        (Some(coding), None) if coding.eq_ignore_ascii_case(b"chunked") => HeadCheck::Head(length, Framing::Chunked),
        (Some(_), None) => HeadCheck::Refused(HeadRefusal::Coding),
        (None, Some(digits)) => number(digits).map_or(HeadCheck::Refused(HeadRefusal::Framing), |bytes| {
            HeadCheck::Head(length, Framing::Length(bytes))
        }),
        (None, None) => HeadCheck::Head(length, Framing::Length(0)),
    }
}

/// Whether a value names a host without a user.
fn is_host(value: &[u8]) -> bool {
    let is_allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=:[]".contains(byte);
    !value.is_empty() && value.iter().all(is_allowed)
}

fn number(digits: &[u8]) -> Option<u64> {
    let is_plain = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    let number = std::str::from_utf8(digits).ok().filter(|_| is_plain)?.parse().ok()?;
    (number <= MAX_LENGTH).then_some(number)
}

/// The next part of a chunked body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ChunkPart {
    /// A chunk's size, and whether it has a digit yet.
    Size(u64, bool),
    Extension(u64),
    SizeEnd(u64),
    Data(u64),
    DataReturn,
    DataEnd,
    /// The beginning of a trailer, or of the final line.
    TrailerStart,
    Trailer,
    TrailerEnd,
    End,
}

/// Scans a chunked body for its end. Lines must end in CR LF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ChunkScanner(ChunkPart);

/// The result of scanning bytes of a chunked body.
#[derive(Debug, PartialEq, Eq)]
enum ChunkScan {
    /// The body continues after the bytes.
    More,
    /// The body ends after this many bytes.
    Ended(usize),
    /// This many bytes are well-formed, and the next byte is not.
    Malformed(usize),
}

impl ChunkScanner {
    const fn new() -> Self {
        Self(ChunkPart::Size(0, false))
    }

    fn scan(&mut self, bytes: &[u8]) -> ChunkScan {
        let mut at = 0;
        while let Some(byte) = bytes.get(at).copied() {
            if let ChunkPart::Data(left) = &mut self.0 {
                let taken = (bytes.len() - at).min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= taken as u64;
                at += taken;
                if *left == 0 {
                    self.0 = ChunkPart::DataReturn;
                }
                continue;
            }
            if (self.0, byte) == (ChunkPart::End, b'\n') {
                return ChunkScan::Ended(at + 1);
            }
            let Some(next) = self.0.after(byte) else {
                return ChunkScan::Malformed(at);
            };
            self.0 = next;
            at += 1;
        }
        ChunkScan::More
    }
}

impl ChunkPart {
    /// The part that follows a byte of a line. `None` if the byte is not allowed there.
    fn after(self, byte: u8) -> Option<Self> {
        Some(match (self, byte) {
            (Self::Size(size, true), b'\r') => Self::SizeEnd(size),
            (Self::Size(size, true), b' ' | b'\t' | b';') => Self::Extension(size),
            (Self::Size(size, _), byte) => {
                let digit = u64::from(char::from(byte).to_digit(16)?);
                let size = size.checked_mul(16)?.checked_add(digit)?;
                Self::Size(Some(size).filter(|size| *size <= MAX_LENGTH)?, true)
            }
            (Self::Extension(size), b'\r') => Self::SizeEnd(size),
            (Self::SizeEnd(0) | Self::TrailerEnd, b'\n') => Self::TrailerStart,
            (Self::SizeEnd(size), b'\n') => Self::Data(size),
            (Self::DataReturn, b'\r') => Self::DataEnd,
            (Self::DataEnd, b'\n') => Self::Size(0, false),
            (Self::TrailerStart, b'\r') => Self::End,
            (Self::Trailer, b'\r') => Self::TrailerEnd,
            (part @ Self::Extension(_), byte) if byte != b'\n' => part,
            (Self::TrailerStart | Self::Trailer, byte) if byte != b'\n' => Self::Trailer,
            _ => return None,
        })
    }
}

/// What the next bytes of a connection are.
#[derive(Debug)]
enum StreamState {
    /// A request header. The number of bytes already searched for its end.
    Head(usize),
    Body(u64),
    Chunked(ChunkScanner),
    /// Bytes for which hyper ends the connection.
    Malformed,
    /// Bytes that are not read, because the header before them was refused.
    Refused,
    /// A chunked body that has broken its framing.
    Broken,
}

/// A client's connection whose requests hyper can trust.
#[derive(Debug)]
pub(crate) struct StrictStream<Stream> {
    stream: Stream,
    state: StreamState,
    /// The beginning of an incomplete request header.
    held: Vec<u8>,
    /// Bytes that hyper gets before anything else is read.
    next: Bytes,
}

impl<Stream> StrictStream<Stream> {
    pub(crate) fn new(stream: Stream) -> Self {
        Self {
            stream,
            state: StreamState::Head(0),
            held: Vec::new(),
            next: Bytes::new(),
        }
    }

    /// How many of these bytes hyper can have now, and the refusal of the header after them. The rest must be held
    /// back.
    fn scan(&mut self, bytes: &[u8]) -> (usize, Option<HeadRefusal>) {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            match &mut self.state {
                StreamState::Body(left) => {
                    let taken = rest.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    *left -= taken as u64;
                    at += taken;
                    if *left == 0 {
                        self.state = StreamState::Head(0);
                    }
                }
                StreamState::Chunked(chunks) => match chunks.scan(rest) {
                    ChunkScan::More => at = bytes.len(),
                    ChunkScan::Ended(length) => {
                        at += length;
                        self.state = StreamState::Head(0);
                    }
                    ChunkScan::Malformed(length) => {
                        self.state = StreamState::Broken;
                        return (at + length, None);
                    }
                },
                // Empty lines before a request have no meaning.
                StreamState::Head(0) if matches!(rest[0], b'\r' | b'\n') => at += 1,
                StreamState::Head(searched) => {
                    let may_have_ended = rest.len() <= EAGER_BYTES || may_end(rest, *searched);
                    *searched = rest.len();
                    let checked = if may_have_ended {
                        check(rest)
                    } else {
                        HeadCheck::Partial
                    };
                    match checked {
                        HeadCheck::Head(length, _) if length > MAX_HEAD_BYTES => {
                            return self.refuse(at, too_long(rest));
                        }
                        HeadCheck::Head(length, framing) => {
                            at += length;
                            self.state = match framing {
                                Framing::Length(0) => StreamState::Head(0),
                                Framing::Length(bytes) => StreamState::Body(bytes),
                                Framing::Chunked => StreamState::Chunked(ChunkScanner::new()),
                            };
                        }
                        HeadCheck::Partial if rest.len() < MAX_HEAD_BYTES => return (at, None),
                        HeadCheck::Partial => return self.refuse(at, too_long(rest)),
                        HeadCheck::Refused(refusal) => return self.refuse(at, refusal),
                        HeadCheck::Malformed => self.state = StreamState::Malformed,
                    }
                }
                StreamState::Malformed => at = bytes.len(),
                StreamState::Refused | StreamState::Broken => return (at, None),
            }
        }
        (at, None)
    }

    fn refuse(&mut self, at: usize, refusal: HeadRefusal) -> (usize, Option<HeadRefusal>) {
        self.state = StreamState::Refused;
        (at, Some(refusal))
    }

    /// Processes bytes that were read. Returns how many of them hyper can have at once.
    fn accept(&mut self, read: &[u8]) -> usize {
        if self.held.is_empty() {
            let (passed, refusal) = self.scan(read);
            self.next = refusal.map(HeadRefusal::head).unwrap_or_default();
            if matches!(self.state, StreamState::Head(_)) {
                self.held.extend_from_slice(&read[passed..]);
            }
            return passed;
        }
        let mut held = std::mem::take(&mut self.held);
        held.extend_from_slice(read);
        let (passed, refusal) = self.scan(&held);
        if matches!(self.state, StreamState::Head(_)) {
            self.held = held.split_off(passed);
        }
        held.truncate(passed);
        refusal.inspect(|refusal| held.extend_from_slice(&refusal.head()));
        self.next = held.into();
        0
    }
}

fn too_long(head: &[u8]) -> HeadRefusal {
    if head.contains(&b'\n') {
        HeadRefusal::Head
    } else {
        HeadRefusal::Line
    }
}

/// Whether a header can end after the bytes that were searched before: it ends with an empty line.
fn may_end(head: &[u8], searched: usize) -> bool {
    let from = searched.saturating_sub(3);
    memchr_iter(b'\n', &head[from..]).any(|at| {
        let after = &head[from + at + 1..];
        after.starts_with(b"\n") || after.starts_with(b"\r\n")
    })
}

impl<Stream: AsyncRead + Unpin> AsyncRead for StrictStream<Stream> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if !this.next.is_empty() {
                let count = this.next.len().min(buffer.remaining());
                buffer.put_slice(&this.next[..count]);
                this.next.advance(count);
                return Poll::Ready(Ok(()));
            }
            match this.state {
                // hyper closes the connection after its answer. At the end of the stream it would not send the
                // answer.
                StreamState::Refused => return Poll::Pending,
                StreamState::Broken => {
                    let error = io::Error::new(io::ErrorKind::InvalidData, "invalid chunked coding");
                    return Poll::Ready(Err(error));
                }
                _ => {}
            }
            let before = buffer.filled().len();
            ready!(Pin::new(&mut this.stream).poll_read(context, buffer))?;
            if buffer.filled().len() == before {
                if this.held.is_empty() {
                    return Poll::Ready(Ok(()));
                }
                this.next = std::mem::take(&mut this.held).into();
                this.state = StreamState::Malformed;
                continue;
            }
            let passed = this.accept(&buffer.filled()[before..]);
            buffer.set_filled(before + passed);
            if passed > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<Stream: AsyncWrite + Unpin> AsyncWrite for StrictStream<Stream> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests;
