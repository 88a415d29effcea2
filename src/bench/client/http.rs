//! A server as the benchmark reaches it: its addresses, its connections, and the head that every request to it bears.
//!
//! Whatever is asked of a server goes through here, measured or not, so that all of it bears the same headers. No proxy of the
//! environment stands between: nothing may shape what is measured.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderMap, HeaderValue, USER_AGENT};
use reqwest::{Method, StatusCode, Url};
use tokio::net::lookup_host;
use tokio::sync::OnceCell;
use tokio::time::{Instant, timeout};

use crate::bench::{BenchError, CONNECT_TIMEOUT};
use crate::wire::{Framing, Pool, Tls, Wire};

/// The most bytes that are read of an answer, and of one event of a stream: far more than any server means to send.
pub(in crate::bench) const MAX_BYTES: usize = 64 << 20;

/// Most idle connections of one thread. As many as a burst has left: each may be wanted again by the next one.
const MAX_IDLE: usize = 1 << 16;

/// A server.
#[derive(Debug)]
pub(in crate::bench) struct Server {
    base: String,
    host: String,
    port: u16,
    tls: Option<Tls>,
    headers: HeaderMap,
    /// Where it is, once a request has asked. vLLM's client keeps the answer as well.
    addresses: OnceCell<Addresses>,
    /// Idle connections, by the runtime that they belong to.
    pool: Pool<tokio::runtime::Id>,
}

/// The addresses of one name: a service of several machines may have one for each.
#[derive(Debug)]
struct Addresses {
    all: Vec<(SocketAddr, AtomicBool)>,
    /// The one whose turn it is.
    turn: AtomicUsize,
}

/// Which address of a name a new connection takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::bench) enum Address {
    /// Each in turn, as vLLM's client does, so that all machines behind a name get their share.
    Next,
    /// The first, so that what is asked before and after a run is asked of the same machine.
    First,
}

/// A connection on which a request has been written, or not.
pub(in crate::bench) struct Sent {
    pub(in crate::bench) wire: Wire,
    /// How long the connection took; nothing for one that was idle.
    pub(in crate::bench) connected: Duration,
    /// How many bytes had been written when it failed.
    pub(in crate::bench) outcome: Result<(), (usize, io::Error)>,
}

/// A whole answer.
#[derive(Debug)]
pub(in crate::bench) struct Reply {
    pub(in crate::bench) status: StatusCode,
    /// More than the limit only if there is more.
    pub(in crate::bench) body: Vec<u8>,
}

/// `base_url` followed by `path`.
pub(in crate::bench) fn url(base_url: &str, path: &str) -> Result<Url, BenchError> {
    let url = Url::parse(&format!("{}{path}", base_url.trim_end_matches('/')));
    let is_usable = |url: &Url| matches!(url.scheme(), "http" | "https") && url.has_host();
    let usable = url.ok().filter(is_usable);
    usable.ok_or_else(|| BenchError::BaseUrl(base_url.to_owned()))
}

/// Takes the user and the password out of a URL and makes them the header that stands for them, so that they are in every
/// request and in no result. Nothing for a URL without.
pub fn credentials(base_url: &str) -> Option<(String, HeaderValue)> {
    let mut url = Url::parse(base_url).ok()?;
    let is_named = !url.username().is_empty() || url.password().is_some();
    // Whoever asks everything else knows how a URL's user is written.
    let http = reqwest::Client::builder()
        .no_proxy()
        .build()
        .ok()
        .filter(|_| is_named)?;
    let mut request = http.get(url.clone()).build().ok()?;
    let header = request.headers_mut().remove(AUTHORIZATION)?;
    url.set_username("").ok()?;
    url.set_password(None).ok()?;
    Some((url.to_string(), header))
}

impl Server {
    /// A server at a URL without a path of its own, asked with these headers.
    ///
    /// # Errors
    /// When that is no URL, or nobody can be trusted.
    pub(in crate::bench) fn new(base_url: &str, headers: &HeaderMap, is_insecure: bool) -> Result<Self, BenchError> {
        let url = url(base_url, "/")?;
        let tls = match url.scheme() {
            "https" => Some(Tls::new(is_insecure).map_err(|error| BenchError::Trust(io::Error::other(error)))?),
            _ => None,
        };
        Ok(Self {
            base: base_url.trim_end_matches('/').to_owned(),
            host: url.host_str().unwrap_or_default().trim_matches(['[', ']']).to_owned(),
            port: url.port_or_known_default().unwrap_or(80),
            tls,
            headers: headers.clone(),
            addresses: OnceCell::new(),
            pool: Pool::new(MAX_IDLE),
        })
    }

    /// The URL of a path, for messages.
    pub(in crate::bench) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// The head of a request, without what differs from one to the next, and without its end.
    ///
    /// # Errors
    /// When the path makes no URL.
    pub(in crate::bench) fn head(&self, method: &Method, path: &str) -> Result<Vec<u8>, BenchError> {
        let url = url(&self.base, path)?;
        let query = url.query().map(|query| format!("?{query}")).unwrap_or_default();
        let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
        let host = format!("{}{port}", url.host_str().unwrap_or_default());
        let mut head = format!("{method} {}{query} HTTP/1.1\r\n", url.path()).into_bytes();
        let mut own = vec![
            (HOST, host.as_str()),
            (ACCEPT, "*/*"),
            (USER_AGENT, concat!("xpyd/", env!("CARGO_PKG_VERSION"))),
        ];
        if *method == Method::POST {
            own.push((CONTENT_TYPE, "application/json"));
        }
        for (name, value) in own {
            if !self.headers.contains_key(&name) {
                put_header(&mut head, name.as_str(), value.as_bytes());
            }
        }
        put_headers(&mut head, &self.headers);
        Ok(head)
    }

    /// Writes a request on an idle connection, or on a new one.
    ///
    /// # Errors
    /// When there is no connection.
    pub(in crate::bench) async fn send(&self, head: &[u8], body: &[u8], address: Address) -> io::Result<Sent> {
        let home = tokio::runtime::Handle::current().id();
        let started = Instant::now();
        loop {
            let idle = self.pool.take(&home);
            let is_new = idle.is_none();
            let mut wire = match idle {
                Some(wire) => wire,
                None => self.connect(address).await?,
            };
            let connected = if is_new { started.elapsed() } else { Duration::ZERO };
            match wire.send(head, body).await {
                // It closed the very moment that it was taken.
                Err((0, _)) if !is_new => {}
                outcome => {
                    return Ok(Sent {
                        wire,
                        connected,
                        outcome,
                    });
                }
            }
        }
    }

    /// Keeps a connection for another request, if its answer has been read to the end.
    pub(in crate::bench) fn keep(&self, wire: Wire, framing: Framing, keeps_alive: bool) {
        if keeps_alive && framing == Framing::Ended {
            self.pool.keep(tokio::runtime::Handle::current().id(), wire);
        }
    }

    /// Asks something that is not measured, and reads the answer up to `limit`.
    ///
    /// # Errors
    /// When there is no answer in time.
    pub(in crate::bench) async fn ask(
        &self,
        method: &Method,
        path: &str,
        body: Option<&[u8]>,
        limit: usize,
        patience: Duration,
    ) -> io::Result<Reply> {
        let mut head = self.head(method, path).map_err(io::Error::other)?;
        if let Some(body) = body {
            put_header(&mut head, "content-length", body.len().to_string().as_bytes());
        }
        head.extend_from_slice(b"\r\n");
        let asked = timeout(patience, self.answer(method, &head, body.unwrap_or_default(), limit));
        asked.await.unwrap_or_else(|_| {
            let text = format!("no answer within {} s", patience.as_secs_f64());
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        })
    }

    async fn answer(&self, method: &Method, head: &[u8], body: &[u8], limit: usize) -> io::Result<Reply> {
        let Sent { mut wire, outcome, .. } = self.send(head, body, Address::First).await?;
        outcome.map_err(|(_, error)| said(error))?;
        let head = wire.head(method).await.map_err(said)?;
        let mut framing = head.framing;
        let body = whole(&mut wire, &mut framing, limit).await.map_err(said)?;
        self.keep(wire, framing, head.keeps_alive);
        Ok(Reply {
            status: head.parts.status,
            body,
        })
    }

    async fn connect(&self, address: Address) -> io::Result<Wire> {
        let resolve = async || {
            let found = lookup_host((self.host.as_str(), self.port)).await?;
            Ok::<_, io::Error>(Addresses {
                all: found.map(|address| (address, AtomicBool::new(true))).collect(),
                turn: AtomicUsize::new(0),
            })
        };
        let late = |_| Err(io::ErrorKind::TimedOut.into());
        let addresses = timeout(CONNECT_TIMEOUT, self.addresses.get_or_try_init(resolve));
        let addresses = addresses.await.unwrap_or_else(late)?;
        let patience = CONNECT_TIMEOUT / u32::try_from(addresses.all.len()).unwrap_or(1).max(1);
        let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for (address, is_well) in addresses.in_turn(address) {
            let connected = Wire::connect_timed(*address, self.tls.as_ref(), &self.host);
            let connected = timeout(patience, connected).await;
            let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            is_well.store(connected.is_ok(), Ordering::Relaxed);
            match connected {
                Ok(wire) => return Ok(wire),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }
}

impl Addresses {
    /// All of them, in the order in which they are tried: those that failed last come last.
    fn in_turn(&self, address: Address) -> impl Iterator<Item = &(SocketAddr, AtomicBool)> {
        let first = match address {
            Address::Next => self.turn.fetch_add(1, Ordering::Relaxed) % self.all.len().max(1),
            Address::First => 0,
        };
        let rotated = self.all[first..].iter().chain(&self.all[..first]);
        let (well, ill): (Vec<_>, Vec<_>) = rotated.partition(|(_, is_well)| is_well.load(Ordering::Relaxed));
        well.into_iter().chain(ill)
    }
}

/// The beginning of a body: more than `limit` bytes only if there are more in it.
pub(in crate::bench) async fn whole(wire: &mut Wire, framing: &mut Framing, limit: usize) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    while body.len() <= limit
        && let Some(piece) = poll_fn(|context| wire.poll_body(framing, context)).await
    {
        body.extend_from_slice(&piece?);
    }
    Ok(body)
}

/// Adds headers to a head.
pub(in crate::bench) fn put_headers(head: &mut Vec<u8>, headers: &HeaderMap) {
    for (name, value) in headers {
        put_header(head, name.as_str(), value.as_bytes());
    }
}

fn put_header(head: &mut Vec<u8>, name: &str, value: &[u8]) {
    for part in [name.as_bytes(), b": ", value, b"\r\n"] {
        head.extend_from_slice(part);
    }
}

/// An error of a connection, in words for those that the system has none for.
pub(in crate::bench) fn said(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        io::Error::new(error.kind(), "the server closed the connection")
    } else {
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_url_is_joined_with_the_path_or_refused() {
        assert_eq!(
            url("http://h:1/", "/v1/models").unwrap().as_str(),
            "http://h:1/v1/models"
        );
        assert_eq!(url("https://h", "/x").unwrap().port_or_known_default(), Some(443));
        for refused in ["h:1", "ftp://h:1", "unix:/run/x", ""] {
            assert!(matches!(url(refused, "/"), Err(BenchError::BaseUrl(_))), "{refused}");
        }
    }

    #[test]
    fn a_head_bears_what_is_given_once_and_the_rest_as_usual() {
        let given = [("host", "model.example.com"), ("content-type", "a/b"), ("x-a", "1")];
        let mut headers: HeaderMap = given
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)))
            .collect();
        headers.append("x-a", HeaderValue::from_static("2"));
        let head = |headers: &HeaderMap, method: &Method| {
            let server = Server::new("http://[::1]:9/base", headers, false).unwrap();
            String::from_utf8(server.head(method, "/v1/models?x=1").unwrap()).unwrap()
        };
        let post = head(&headers, &Method::POST);
        assert!(post.starts_with("POST /base/v1/models?x=1 HTTP/1.1\r\n"), "{post}");
        for line in ["host: model.example.com", "content-type: a/b", "x-a: 1", "x-a: 2"] {
            assert_eq!(post.matches(&format!("\r\n{line}\r\n")).count(), 1, "{line} in {post}");
        }
        assert_eq!(
            (post.matches("host:").count(), post.matches("content-type:").count()),
            (1, 1)
        );
        let get = head(&HeaderMap::new(), &Method::GET);
        assert!(
            get.contains("\r\nhost: [::1]:9\r\n") && !get.contains("content-type"),
            "{get}"
        );
    }

    #[test]
    fn the_user_of_a_url_becomes_a_header_and_leaves_the_url() {
        let (url, header) = credentials("http://u:p%40@h:1/v").unwrap();
        assert_eq!(
            (url.as_str(), header.to_str().unwrap()),
            ("http://h:1/v", "Basic dTpwQA==")
        );
        assert!(header.is_sensitive());
        assert_eq!(credentials("http://h:1"), None);
        assert_eq!(credentials("http://u@h").unwrap().1, "Basic dTo=");
    }

    #[test]
    fn addresses_take_turns_and_those_that_failed_come_last() {
        let all = [1, 2, 3].map(|last| (SocketAddr::from(([127, 0, 0, last], 80)), AtomicBool::new(true)));
        let addresses = Addresses {
            all: all.into(),
            turn: AtomicUsize::new(0),
        };
        let order = |address| {
            let order = addresses.in_turn(address);
            order
                .map(|(address, _)| address.to_string().as_bytes()[8] - b'0')
                .collect::<Vec<_>>()
        };
        assert_eq!(order(Address::Next), [1, 2, 3]);
        assert_eq!(order(Address::Next), [2, 3, 1]);
        addresses.all[2].1.store(false, Ordering::Relaxed);
        assert_eq!(order(Address::Next), [1, 2, 3]);
        assert_eq!(
            (order(Address::First), order(Address::First)),
            (vec![1, 2, 3], vec![1, 2, 3])
        );
    }
}
