//! Refuses requests whose head two HTTP implementations can read in two ways (RFC 9112 §3.2, §6.3), as nginx and envoy do.
//!
//! hyper ignores a `Content-Length` beside a `Transfer-Encoding` and hides it from the service, so heads are checked before
//! hyper reads them. `check` and `Chunks` are PURE; `Strict` follows where each request begins, and replaces the head of one
//! that is refused by a head of its own, which the proxy answers with the reason. It copies no body.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::http::{HeaderMap, StatusCode};
use bytes::{Buf, Bytes};
use memchr::memchr_iter;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Longest head that is waited for.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// Most headers, as hyper has it.
const MAX_HEADERS: usize = 100;

/// A head of up to so many bytes is parsed with every read, so that what is no HTTP is refused at once; a longer one only
/// where it may have ended.
const EAGER_BYTES: usize = 1 << 10;

/// Largest number of bytes in a body or a chunk; the same as nginx's.
const MAX_LENGTH: u64 = i64::MAX.unsigned_abs();

/// The header of a head that stands for a refused one. A client that sends it is refused as well.
const REFUSED: &str = "x-xpyd-refused";

/// Why a head is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Two lengths, or a length beside chunks.
    Framing,
    /// A transfer coding other than `chunked`.
    Coding,
    /// No host, two, or one that is none.
    Host,
    /// An expectation other than `100-continue`.
    Expectation,
    /// Not HTTP/1.0 or HTTP/1.1.
    Version,
    /// A request line that does not end.
    Line,
    /// A head that does not end.
    Head,
}

impl Refusal {
    const ALL: [Self; 7] = [
        Self::Framing,
        Self::Coding,
        Self::Host,
        Self::Expectation,
        Self::Version,
        Self::Line,
        Self::Head,
    ];

    /// The refusal that a request stands for.
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

    /// Stable: clients may match on it.
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
            Self::Coding => "the only transfer coding that xpyd reads is `chunked`",
            Self::Host => "a request needs one `Host` header with a host",
            Self::Expectation => "the only expectation that xpyd meets is `100-continue`",
            Self::Version => "xpyd speaks HTTP/1.1 and HTTP/1.0",
            Self::Line => "the request line is longer than 64 KiB",
            Self::Head => "the request's head is longer than 64 KiB",
        }
    }

    /// A head that hyper reads in place of the refused one.
    fn head(self) -> Bytes {
        format!(
            "GET / HTTP/1.1\r\nconnection: close\r\n{REFUSED}: {}\r\n\r\n",
            self.code()
        )
        .into()
    }
}

/// What bytes that begin with a head are.
#[derive(Debug, PartialEq, Eq)]
enum Checked {
    /// A head of so many bytes, and how its body is framed.
    Head(usize, Framing),
    /// The beginning of a head.
    Partial,
    Refused(Refusal),
    /// Something that hyper refuses.
    Malformed,
}

/// What follows a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    Length(u64),
    Chunked,
}

fn check(bytes: &[u8]) -> Checked {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => judge(&request, length),
        Ok(httparse::Status::Partial) => Checked::Partial,
        Err(httparse::Error::Version) => Checked::Refused(Refusal::Version),
        Err(_) => Checked::Malformed,
    }
}

fn judge(request: &httparse::Request<'_, '_>, length: usize) -> Checked {
    let (mut host, mut coding, mut body) = (None, None, None);
    for header in request.headers.iter() {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        let (slot, refusal) = if is("host") {
            (&mut host, Refusal::Host)
        } else if is("transfer-encoding") {
            (&mut coding, Refusal::Framing)
        } else if is("content-length") {
            (&mut body, Refusal::Framing)
        } else {
            if is("expect") && !header.value.eq_ignore_ascii_case(b"100-continue") {
                return Checked::Refused(Refusal::Expectation);
            }
            continue;
        };
        if slot.replace(header.value).is_some() {
            return Checked::Refused(refusal);
        }
    }
    let is_old = request.version == Some(0);
    if !host.map_or(is_old, is_host) {
        return Checked::Refused(Refusal::Host);
    }
    match (coding, body) {
        (Some(_), Some(_)) => Checked::Refused(Refusal::Framing),
        // HTTP/1.0 knows no transfer codings.
        (Some(_), None) if is_old => Checked::Malformed,
        (Some(coding), None) if coding.eq_ignore_ascii_case(b"chunked") => Checked::Head(length, Framing::Chunked),
        (Some(_), None) => Checked::Refused(Refusal::Coding),
        (None, Some(digits)) => number(digits).map_or(Checked::Refused(Refusal::Framing), |bytes| {
            Checked::Head(length, Framing::Length(bytes))
        }),
        (None, None) => Checked::Head(length, Framing::Length(0)),
    }
}

/// Whether a value names a host, and no user with it.
fn is_host(value: &[u8]) -> bool {
    let is_allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=:[]".contains(byte);
    !value.is_empty() && value.iter().all(is_allowed)
}

fn number(digits: &[u8]) -> Option<u64> {
    let is_plain = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    let number = std::str::from_utf8(digits).ok().filter(|_| is_plain)?.parse().ok()?;
    (number <= MAX_LENGTH).then_some(number)
}

/// The part of a chunked body that comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// A chunk's size, and whether a digit of it has come.
    Size(u64, bool),
    Extension(u64),
    SizeEnd(u64),
    Data(u64),
    DataReturn,
    DataEnd,
    /// The beginning of a trailer, or of the end.
    TrailerStart,
    Trailer,
    TrailerEnd,
    End,
}

/// Where a chunked body is, and where it ends. Lines end in CR LF and in nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Chunks(Part);

/// What was found in bytes of a chunked body.
#[derive(Debug, PartialEq, Eq)]
enum Scanned {
    /// The body goes on after them.
    More,
    /// The body ends after so many bytes.
    Ended(usize),
    /// So many bytes are well-formed, and the next one is not.
    Malformed(usize),
}

impl Chunks {
    const fn new() -> Self {
        Self(Part::Size(0, false))
    }

    fn scan(&mut self, bytes: &[u8]) -> Scanned {
        let mut at = 0;
        while let Some(byte) = bytes.get(at).copied() {
            if let Part::Data(left) = &mut self.0 {
                let taken = (bytes.len() - at).min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= taken as u64;
                at += taken;
                if *left == 0 {
                    self.0 = Part::DataReturn;
                }
                continue;
            }
            if (self.0, byte) == (Part::End, b'\n') {
                return Scanned::Ended(at + 1);
            }
            let Some(next) = self.0.after(byte) else {
                return Scanned::Malformed(at);
            };
            self.0 = next;
            at += 1;
        }
        Scanned::More
    }
}

impl Part {
    /// The part that follows a byte of a line, unless the byte does not belong there.
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

/// What a connection's next bytes are.
#[derive(Debug)]
enum State {
    /// A head, of which so many bytes were searched for its end.
    Head(usize),
    Body(u64),
    Chunked(Chunks),
    /// Something that hyper ends the connection for.
    Malformed,
    /// Nothing that is read: a head was refused.
    Refused,
    /// A chunked body has broken its framing.
    Broken,
}

/// A client's connection whose requests hyper can trust.
#[derive(Debug)]
pub(crate) struct Strict<Stream> {
    stream: Stream,
    state: State,
    /// The beginning of a head that is not whole yet.
    held: Vec<u8>,
    /// What hyper gets before anything else is read.
    next: Bytes,
}

impl<Stream> Strict<Stream> {
    pub(crate) fn new(stream: Stream) -> Self {
        Self {
            stream,
            state: State::Head(0),
            held: Vec::new(),
            next: Bytes::new(),
        }
    }

    /// How many of these bytes hyper may have now, and the refusal of the head after them. Others are to be held.
    fn scan(&mut self, bytes: &[u8]) -> (usize, Option<Refusal>) {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            match &mut self.state {
                State::Body(left) => {
                    let taken = rest.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    *left -= taken as u64;
                    at += taken;
                    if *left == 0 {
                        self.state = State::Head(0);
                    }
                }
                State::Chunked(chunks) => match chunks.scan(rest) {
                    Scanned::More => at = bytes.len(),
                    Scanned::Ended(length) => {
                        at += length;
                        self.state = State::Head(0);
                    }
                    Scanned::Malformed(length) => {
                        self.state = State::Broken;
                        return (at + length, None);
                    }
                },
                // Empty lines before a head have no meaning.
                State::Head(0) if matches!(rest[0], b'\r' | b'\n') => at += 1,
                State::Head(searched) => {
                    let may_have_ended = rest.len() <= EAGER_BYTES || may_end(rest, *searched);
                    *searched = rest.len();
                    let checked = if may_have_ended { check(rest) } else { Checked::Partial };
                    match checked {
                        Checked::Head(length, _) if length > MAX_HEAD_BYTES => return self.refuse(at, too_long(rest)),
                        Checked::Head(length, framing) => {
                            at += length;
                            self.state = match framing {
                                Framing::Length(0) => State::Head(0),
                                Framing::Length(bytes) => State::Body(bytes),
                                Framing::Chunked => State::Chunked(Chunks::new()),
                            };
                        }
                        Checked::Partial if rest.len() < MAX_HEAD_BYTES => return (at, None),
                        Checked::Partial => return self.refuse(at, too_long(rest)),
                        Checked::Refused(refusal) => return self.refuse(at, refusal),
                        Checked::Malformed => self.state = State::Malformed,
                    }
                }
                State::Malformed => at = bytes.len(),
                State::Refused | State::Broken => return (at, None),
            }
        }
        (at, None)
    }

    fn refuse(&mut self, at: usize, refusal: Refusal) -> (usize, Option<Refusal>) {
        self.state = State::Refused;
        (at, Some(refusal))
    }

    /// Takes in what was read: how much of it hyper may have at once.
    fn take_in(&mut self, read: &[u8]) -> usize {
        if self.held.is_empty() {
            let (passed, refusal) = self.scan(read);
            self.next = refusal.map(Refusal::head).unwrap_or_default();
            if matches!(self.state, State::Head(_)) {
                self.held.extend_from_slice(&read[passed..]);
            }
            return passed;
        }
        let mut held = std::mem::take(&mut self.held);
        held.extend_from_slice(read);
        let (passed, refusal) = self.scan(&held);
        if matches!(self.state, State::Head(_)) {
            self.held = held.split_off(passed);
        }
        held.truncate(passed);
        refusal.inspect(|refusal| held.extend_from_slice(&refusal.head()));
        self.next = held.into();
        0
    }
}

fn too_long(head: &[u8]) -> Refusal {
    if head.contains(&b'\n') {
        Refusal::Head
    } else {
        Refusal::Line
    }
}

/// Whether a head may end after the bytes that were searched before: it ends in an empty line.
fn may_end(head: &[u8], searched: usize) -> bool {
    let from = searched.saturating_sub(3);
    memchr_iter(b'\n', &head[from..]).any(|at| {
        let after = &head[from + at + 1..];
        after.starts_with(b"\n") || after.starts_with(b"\r\n")
    })
}

impl<Stream: AsyncRead + Unpin> AsyncRead for Strict<Stream> {
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
                // hyper closes the connection after its answer. An end of the stream would keep it from sending that.
                State::Refused => return Poll::Pending,
                State::Broken => {
                    let error = io::Error::new(io::ErrorKind::InvalidData, "a chunk breaks the chunked coding");
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
                this.state = State::Malformed;
                continue;
            }
            let passed = this.take_in(&buffer.filled()[before..]);
            buffer.set_filled(before + passed);
            if passed > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<Stream: AsyncWrite + Unpin> AsyncWrite for Strict<Stream> {
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
