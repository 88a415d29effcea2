//! An HTTP/1.1 client connection: sends a request, reads the answer's header, then its body as it comes.
//!
//! Only the request that uses it polls it, so that no byte wakes another task. The proxy and the benchmark use it.
//! This module knows HTTP, but no engine and no route.

mod framing;
mod pool;
mod rx_timestamp;
mod tls;

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::http::header::{self, HeaderName, HeaderValue};
use axum::http::response::Parts;
use axum::http::{HeaderMap, Method, Response, StatusCode};
use bytes::{Buf, Bytes, BytesMut};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpStream, ToSocketAddrs};
use tokio_rustls::client::TlsStream;
use tokio_util::io::poll_read_buf;

pub use self::framing::Framing;
use self::framing::{BodyStep, header_contains, protocol_error};
pub use self::pool::Pool;
pub use self::rx_timestamp::RxTimestamp;
use self::rx_timestamp::TimestampingReader;
use self::tls::TimedTcpStream;
pub use self::tls::Tls;

/// Maximum size of an answer's header.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// Maximum number of headers of an answer.
const MAX_HEADERS: usize = 100;

/// Read buffer while little comes: streams are many and their events small.
const LEAST_ROOM: usize = 4 << 10;

/// Maximum read buffer while much comes.
const MOST_ROOM: usize = 64 << 10;

/// An open connection.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    /// Bytes that were read and not taken yet.
    read: BytesMut,
    /// The size of the next read buffer.
    room: usize,
}

/// The byte stream. The reader, if there is one, records when the bytes arrived.
#[derive(Debug)]
enum Stream {
    Plain(TcpStream, Option<TimestampingReader>),
    Tls(Box<TlsStream<TimedTcpStream>>),
}

/// The header of an answer.
#[derive(Debug)]
pub struct Head {
    /// Status and headers.
    pub parts: Parts,
    /// How the end of the body is known.
    pub framing: Framing,
    /// Whether the connection can take another request afterwards.
    pub keeps_alive: bool,
}

impl Connection {
    /// Connects in plain text, without receive times.
    ///
    /// # Errors
    /// When the connection fails.
    pub async fn connect(address: impl ToSocketAddrs) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self::over(Stream::Plain(stream, None)))
    }

    /// Connects and records when bytes arrive; with `tls`, to a server of this name.
    ///
    /// # Errors
    /// When the connection fails, or the certificate is not trusted.
    pub async fn connect_timed(address: impl ToSocketAddrs, tls: Option<&Tls>, host: &str) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let reader = Some(TimestampingReader::new(&stream));
        Ok(Self::over(match tls {
            None => Stream::Plain(stream, reader),
            Some(tls) => Stream::Tls(Box::new(tls.over(TimedTcpStream::new(stream, reader), host).await?)),
        }))
    }

    fn over(stream: Stream) -> Self {
        Self {
            stream,
            read: BytesMut::new(),
            room: LEAST_ROOM,
        }
    }

    /// When the bytes of the last read arrived. `None` unless the connection is timed and has read.
    pub fn rx_timestamp(&self) -> Option<RxTimestamp> {
        let reader = match &self.stream {
            Stream::Plain(_, reader) => reader,
            Stream::Tls(stream) => &stream.get_ref().0.reader,
        };
        reader.as_ref().and_then(TimestampingReader::last)
    }

    /// Whether the server has neither closed the idle connection nor sent anything.
    pub fn is_idle(&self) -> bool {
        let stream = match &self.stream {
            Stream::Plain(stream, _) => stream,
            Stream::Tls(stream) => &stream.get_ref().0.stream,
        };
        let heard = stream.try_read(&mut [0]);
        self.read.is_empty() && heard.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Sends a request.
    ///
    /// # Errors
    /// The number of bytes sent before, and the error.
    pub async fn send(&mut self, head: &[u8], body: &[u8]) -> Result<(), (usize, io::Error)> {
        let mut request = head.chain(body);
        let whole = request.remaining();
        while request.has_remaining() {
            let written = match &mut self.stream {
                Stream::Plain(stream, _) => stream.write_buf(&mut request).await,
                Stream::Tls(stream) => stream.write_buf(&mut request).await,
            };
            if let Err(error) = written {
                return Err((whole - request.remaining(), error));
            }
        }
        match &mut self.stream {
            Stream::Plain(..) => Ok(()),
            Stream::Tls(stream) => stream.flush().await.map_err(|error| (whole, error)),
        }
    }

    /// Reads the header of the answer to a request with this method.
    ///
    /// # Errors
    /// When the connection breaks or ends before it, or the header is invalid.
    pub async fn head(&mut self, method: &Method) -> io::Result<Head> {
        let mut parsed = 0;
        loop {
            // Only a line end can complete a header, so one that comes byte by byte is not parsed for each byte.
            if parsed == 0 || memchr::memchr(b'\n', &self.read[parsed..]).is_some() {
                match parse(&mut self.read, method)? {
                    Some(head) if head.parts.status.is_informational() => {
                        parsed = 0;
                        continue;
                    }
                    Some(head) => return Ok(head),
                    None => {}
                }
            }
            if self.read.len() > MAX_HEAD_BYTES {
                return Err(protocol_error("response header exceeds 64 KiB"));
            }
            parsed = self.read.len();
            if poll_fn(|context| self.poll_read(context)).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// The next piece of the answer's body. `None` at its end.
    pub fn poll_body(&mut self, framing: &mut Framing, context: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        loop {
            match framing.take(&mut self.read) {
                Ok(BodyStep::Data(bytes)) => return Poll::Ready(Some(Ok(bytes))),
                Ok(BodyStep::End) => return Poll::Ready(None),
                Ok(BodyStep::More) => {}
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
            match ready!(self.poll_read(context)) {
                Ok(0) if framing.ends_with_connection() => return Poll::Ready(None),
                Ok(0) => return Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into()))),
                Ok(_) => {}
                // Many servers end a TLS connection without a close notification. A truncated body with a length is
                // still noticed.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && framing.ends_with_connection() => {
                    return Poll::Ready(None);
                }
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
    }

    /// Whether the answer's body has ended, judged by the bytes read so far.
    pub fn has_ended(&mut self, framing: &mut Framing) -> bool {
        framing.end(&mut self.read)
    }

    fn poll_read(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if let Stream::Plain(stream, Some(reader)) = &mut self.stream {
            return reader.poll_read(stream, &mut self.read, context);
        }
        // The rest of the buffer is used up first: a buffer whose events are still in use cannot be reused.
        if self.read.capacity() - self.read.len() < self.room / 4 {
            self.read.reserve(self.room);
        }
        let offered = self.read.capacity() - self.read.len();
        let count = ready!(match &mut self.stream {
            Stream::Plain(stream, _) => poll_read_buf(Pin::new(stream), context, &mut self.read),
            Stream::Tls(stream) => poll_read_buf(Pin::new(stream), context, &mut self.read),
        })?;
        self.room = if count == offered {
            (self.room * 2).min(MOST_ROOM)
        } else {
            LEAST_ROOM
        };
        Poll::Ready(Ok(count))
    }
}

/// The number of descriptors that this process can open, after it has tried to raise its limit to `wanted`.
pub fn descriptors(wanted: u64) -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return wanted;
    };
    let wanted = hard.min(wanted);
    if soft < wanted && setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).is_ok() {
        wanted
    } else {
        soft
    }
}

/// Takes an answer's header out of the bytes that were read, once it is complete.
fn parse(read: &mut BytesMut, method: &Method) -> io::Result<Option<Head>> {
    let mut room = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Response::new(&mut room);
    let length = match parsed.parse(read) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
    };
    let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok());
    let status = status.ok_or_else(|| protocol_error("invalid status code"))?;
    if status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(protocol_error("unexpected switch of protocols (status 101)"));
    }
    let is_old = parsed.version == Some(0);
    let start = read.as_ptr().addr();
    let mut named = Vec::with_capacity(parsed.headers.len());
    for header in parsed.headers.iter() {
        let name = HeaderName::from_bytes(header.name.as_bytes()).map_err(|_| protocol_error("invalid header name"))?;
        let value = header.value.as_ptr().addr().saturating_sub(start);
        named.push((name, value, header.value.len()));
    }
    let bytes = read.split_to(length).freeze();
    let mut headers = HeaderMap::with_capacity(named.len());
    for (name, from, length) in named {
        // The value of an empty header can point anywhere.
        let value = if length == 0 {
            Bytes::new()
        } else {
            bytes.slice(from..from + length)
        };
        let value = HeaderValue::from_maybe_shared(value).map_err(|_| protocol_error("invalid header value"))?;
        headers.append(name, value);
    }
    let (framing, is_clear) = Framing::of(method, status, &headers)?;
    let keeps_alive = is_clear && !is_old && !header_contains(&headers, &header::CONNECTION, "close");
    let mut response = Response::new(());
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    let (parts, ()) = response.into_parts();
    Ok(Some(Head {
        parts,
        framing,
        keeps_alive,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &'static str) -> io::Result<Option<(Head, BytesMut)>> {
        let mut read = BytesMut::from(text);
        Ok(parse(&mut read, &Method::POST)?.map(|head| (head, read)))
    }

    #[test]
    fn a_whole_head_is_read_and_nothing_after_it() {
        let text = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Empty:\r\nX-Two: a\r\nx-two: b\r\n\r\n{}";
        let (head, rest) = parsed(text).expect("a head").expect("a whole one");
        assert_eq!((head.framing, head.keeps_alive), (Framing::Length(2), true));
        assert_eq!(head.parts.headers["x-empty"], "");
        let two: Vec<_> = head
            .parts
            .headers
            .get_all("x-two")
            .iter()
            .map(HeaderValue::as_bytes)
            .collect();
        assert_eq!((two, &rest[..]), (vec![&b"a"[..], b"b"], &b"{}"[..]));
        let whole = text.len() - 2;
        for end in 0..whole {
            assert!(parsed(&text[..end]).expect("a beginning").is_none(), "{}", &text[..end]);
        }
    }

    #[test]
    fn an_untrusted_connection_is_not_reused() {
        for (text, keeps_alive) in [
            (
                "HTTP/1.1 200 OK\r\nconnection: Keep-Alive\r\ncontent-length: 0\r\n\r\n",
                true,
            ),
            (
                "HTTP/1.1 200 OK\r\nconnection: x, Close\r\ncontent-length: 0\r\n\r\n",
                false,
            ),
            ("HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n", false),
            ("HTTP/1.1 200 OK\r\n\r\n", false),
        ] {
            let (head, _) = parsed(text).expect("a head").expect("a whole one");
            assert_eq!(head.keeps_alive, keeps_alive, "{text}");
        }
    }

    #[test]
    fn non_http_answers_are_errors() {
        for text in [
            "SSH-2.0-OpenSSH\r\n",
            "HTTP/1.1 101 Switching Protocols\r\n\r\n",
            "HTTP/2.0 200\r\n\r\n",
        ] {
            assert!(parsed(text).is_err(), "{text}");
        }
    }
}
