//! One HTTP/1.1 connection to a server: sends a request, reads the answer's head, then its body as it comes.
//!
//! It is driven by the request that uses it and by nothing else, so that no byte has to wake another task. The proxy and the
//! benchmark are clients over it. Knows HTTP; knows no engine and no route.

mod framing;
mod pool;
mod receipt;
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

pub(crate) use self::framing::Framing;
use self::framing::{Step, nonsense, says};
pub(crate) use self::pool::Pool;
pub(crate) use self::receipt::Receipt;
use self::receipt::Receiver;
use self::tls::Below;
pub(crate) use self::tls::Tls;

/// Largest head of an answer.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// Most headers of an answer.
const MAX_HEADERS: usize = 100;

/// Room for a read at first, and for as long as little comes: streams are many and their events small.
const LEAST_ROOM: usize = 4 << 10;

/// Room for a read while as much comes.
const MOST_ROOM: usize = 64 << 10;

/// An open connection.
#[derive(Debug)]
pub(crate) struct Wire {
    stream: Stream,
    /// Read and not yet given out.
    read: BytesMut,
    /// Room that is made for the next read.
    room: usize,
}

/// What carries the bytes. A receiver tells when what is read had come, where somebody wants to know.
#[derive(Debug)]
enum Stream {
    Plain(TcpStream, Option<Receiver>),
    Tls(Box<TlsStream<Below>>),
}

/// The head of an answer.
pub(crate) struct Head {
    pub(crate) parts: Parts,
    pub(crate) framing: Framing,
    /// Whether the connection takes another request afterwards.
    pub(crate) keeps_alive: bool,
}

impl Wire {
    pub(crate) async fn connect(address: impl ToSocketAddrs) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self::over(Stream::Plain(stream, None)))
    }

    /// The same, which knows when its bytes came; with a server of this name where `tls` is wanted.
    ///
    /// # Errors
    /// When there is no connection, or no certificate that is trusted.
    pub(crate) async fn connect_timed(address: impl ToSocketAddrs, tls: Option<&Tls>, host: &str) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let receiver = Some(Receiver::new(&stream));
        Ok(Self::over(match tls {
            None => Stream::Plain(stream, receiver),
            Some(tls) => Stream::Tls(Box::new(tls.over(Below::new(stream, receiver), host).await?)),
        }))
    }

    fn over(stream: Stream) -> Self {
        Self {
            stream,
            read: BytesMut::new(),
            room: LEAST_ROOM,
        }
    }

    /// When the bytes of the last read came. `None` unless the connection is timed and has read.
    pub(crate) fn receipt(&self) -> Option<Receipt> {
        let receiver = match &self.stream {
            Stream::Plain(_, receiver) => receiver,
            Stream::Tls(stream) => &stream.get_ref().0.receiver,
        };
        receiver.as_ref().and_then(Receiver::last)
    }

    /// Whether the engine has neither closed the idle connection nor said anything unasked.
    pub(crate) fn is_quiet(&self) -> bool {
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
    /// With how many bytes had been taken before.
    pub(crate) async fn send(&mut self, head: &[u8], body: &[u8]) -> Result<(), (usize, io::Error)> {
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

    /// Reads the head of the answer to a request with this method.
    ///
    /// # Errors
    /// When the connection breaks or ends before, or the head is none.
    pub(crate) async fn head(&mut self, method: &Method) -> io::Result<Head> {
        let mut parsed = 0;
        loop {
            // Only an end of line can complete a head, so one that comes byte by byte is not parsed for each of them.
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
                return Err(nonsense("its head has no end"));
            }
            parsed = self.read.len();
            if poll_fn(|context| self.poll_read(context)).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// The next piece of the answer's body; `None` at its end.
    pub(crate) fn poll_body(
        &mut self,
        framing: &mut Framing,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Bytes>>> {
        loop {
            match framing.take(&mut self.read) {
                Ok(Step::Data(bytes)) => return Poll::Ready(Some(Ok(bytes))),
                Ok(Step::End) => return Poll::Ready(None),
                Ok(Step::More) => {}
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
            match ready!(self.poll_read(context)) {
                Ok(0) if framing.ends_with_connection() => return Poll::Ready(None),
                Ok(0) => return Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into()))),
                Ok(_) => {}
                // Many servers end a TLS connection without saying so; a body that has a length is missed all the same.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && framing.ends_with_connection() => {
                    return Poll::Ready(None);
                }
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
    }

    /// Whether the answer's body has come to its end, as far as can be told from what was read.
    pub(crate) fn has_ended(&mut self, framing: &mut Framing) -> bool {
        framing.end(&mut self.read)
    }

    fn poll_read(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if let Stream::Plain(stream, Some(receiver)) = &mut self.stream {
            return receiver.poll_read(stream, &mut self.read, context);
        }
        // What is left of earlier room is used up first: a buffer whose events are still on their way cannot be reused.
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

/// How many descriptors this process may open, after it has asked for as many as `wanted`.
pub(crate) fn descriptors(wanted: u64) -> u64 {
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

/// Takes an answer's head out of what was read, once it is whole.
fn parse(read: &mut BytesMut, method: &Method) -> io::Result<Option<Head>> {
    let mut room = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Response::new(&mut room);
    let length = match parsed.parse(read) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
    };
    let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok());
    let status = status.ok_or_else(|| nonsense("its status is none"))?;
    if status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(nonsense("it changes the protocol"));
    }
    let is_old = parsed.version == Some(0);
    let start = read.as_ptr().addr();
    let mut named = Vec::with_capacity(parsed.headers.len());
    for header in parsed.headers.iter() {
        let name = HeaderName::from_bytes(header.name.as_bytes()).map_err(|_| nonsense("a header has no name"))?;
        let value = header.value.as_ptr().addr().saturating_sub(start);
        named.push((name, value, header.value.len()));
    }
    let bytes = read.split_to(length).freeze();
    let mut headers = HeaderMap::with_capacity(named.len());
    for (name, from, length) in named {
        // The value of an empty header may lie anywhere.
        let value = if length == 0 {
            Bytes::new()
        } else {
            bytes.slice(from..from + length)
        };
        let value = HeaderValue::from_maybe_shared(value).map_err(|_| nonsense("a header has no value"))?;
        headers.append(name, value);
    }
    let (framing, is_clear) = Framing::of(method, status, &headers)?;
    let keeps_alive = is_clear && !is_old && !says(&headers, &header::CONNECTION, "close");
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
    fn a_head_is_read_when_it_is_whole_and_no_further() {
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
    fn a_connection_that_ends_or_cannot_be_trusted_is_not_used_again() {
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
    fn what_is_no_answer_is_an_error() {
        for text in [
            "SSH-2.0-OpenSSH\r\n",
            "HTTP/1.1 101 Switching Protocols\r\n\r\n",
            "HTTP/2.0 200\r\n\r\n",
        ] {
            assert!(parsed(text).is_err(), "{text}");
        }
    }
}
