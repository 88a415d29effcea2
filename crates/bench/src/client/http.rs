//! HTTP access to one server: its addresses, its connections, and the headers of every request.
//!
//! All requests to a server go through here, measured or not, so that all have the same headers. Proxies from the
//! environment are not used, because they would change the measurement.

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

use crate::{BenchError, CONNECT_TIMEOUT};
use xpyd_base::http1::{Connection, Framing, Pool, Tls};

/// Most bytes of an answer, and of one event of a stream: far more than any server sends on purpose.
pub(crate) const MAX_BYTES: usize = 64 << 20;

/// Most idle connections of one thread: as many as a burst leaves, because the next burst can use each of them.
const MAX_IDLE: usize = 1 << 16;

/// A server, with its idle connections.
#[derive(Debug)]
pub(crate) struct Server {
    base: String,
    host: String,
    port: u16,
    tls: Option<Tls>,
    headers: HeaderMap,
    /// Its addresses, resolved once, as in vLLM's client.
    addresses: OnceCell<Addresses>,
    /// Idle connections by runtime: a connection belongs to the runtime that opened it.
    pool: Pool<tokio::runtime::Id>,
}

/// The addresses of one name. A service on several machines can have one for each.
#[derive(Debug)]
struct Addresses {
    all: Vec<(SocketAddr, AtomicBool)>,
    /// The next address to use.
    turn: AtomicUsize,
}

/// The address that a new connection uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Address {
    /// Each in turn, as in vLLM's client, so that all machines behind a name get their share.
    Next,
    /// The first, so that queries before and after a run reach the same machine.
    First,
}

/// A connection after an attempt to write a request on it.
pub(crate) struct SentRequest {
    pub(crate) connection: Connection,
    /// How long connecting took; zero for an idle connection.
    pub(crate) connected: Duration,
    /// On failure, the number of bytes that had been written.
    pub(crate) outcome: Result<(), (usize, io::Error)>,
}

/// A complete answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    /// The body. Longer than the limit only if the server sent more.
    pub(crate) body: Vec<u8>,
}

/// `base_url` followed by `path`.
pub(crate) fn url(base_url: &str, path: &str) -> Result<Url, BenchError> {
    let url = Url::parse(&format!("{}{path}", base_url.trim_end_matches('/')));
    let is_usable = |url: &Url| matches!(url.scheme(), "http" | "https") && url.has_host();
    let usable = url.ok().filter(is_usable);
    usable.ok_or_else(|| BenchError::BaseUrl(base_url.to_owned()))
}

/// Splits user and password off a URL and returns them as a header, so that they are in every request and in no result.
/// `None` for a URL without.
pub fn credentials(base_url: &str) -> Option<(String, HeaderValue)> {
    let mut url = Url::parse(base_url).ok()?;
    let is_named = !url.username().is_empty() || url.password().is_some();
    // reqwest knows how to encode the user of a URL.
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
    /// The server at a URL without a path, with these headers for every request.
    ///
    /// # Errors
    /// When the URL is invalid or TLS cannot be set up.
    pub(crate) fn new(base_url: &str, headers: &HeaderMap, is_insecure: bool) -> Result<Self, BenchError> {
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
    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// The request head without its end and without the headers that differ between requests.
    ///
    /// # Errors
    /// When the path makes the URL invalid.
    pub(crate) fn head(&self, method: &Method, path: &str) -> Result<Vec<u8>, BenchError> {
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
    /// When no connection can be opened.
    pub(crate) async fn send(&self, head: &[u8], body: &[u8], address: Address) -> io::Result<SentRequest> {
        let runtime = tokio::runtime::Handle::current().id();
        let started = Instant::now();
        loop {
            let idle = self.pool.take(&runtime);
            let is_new = idle.is_none();
            let mut connection = match idle {
                Some(connection) => connection,
                None => self.connect(address).await?,
            };
            let connected = if is_new { started.elapsed() } else { Duration::ZERO };
            match connection.send(head, body).await {
                // The idle connection was closed in this moment: try the next one.
                Err((0, _)) if !is_new => {}
                outcome => {
                    return Ok(SentRequest {
                        connection,
                        connected,
                        outcome,
                    });
                }
            }
        }
    }

    /// Keeps a connection for another request if its answer has been read completely.
    pub(crate) fn keep(&self, connection: Connection, framing: Framing, keeps_alive: bool) {
        if keeps_alive && framing == Framing::Ended {
            self.pool.keep(tokio::runtime::Handle::current().id(), connection);
        }
    }

    /// Sends an unmeasured request and reads the answer up to `limit`.
    ///
    /// # Errors
    /// When no answer arrives in time.
    pub(crate) async fn ask(
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
        let SentRequest {
            mut connection,
            outcome,
            ..
        } = self.send(head, body, Address::First).await?;
        outcome.map_err(|(_, error)| describe(error))?;
        let head = connection.head(method).await.map_err(describe)?;
        let mut framing = head.framing;
        let body = whole(&mut connection, &mut framing, limit).await.map_err(describe)?;
        self.keep(connection, framing, head.keeps_alive);
        Ok(Reply {
            status: head.parts.status,
            body,
        })
    }

    async fn connect(&self, address: Address) -> io::Result<Connection> {
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
        for (address, is_reachable) in addresses.in_order(address) {
            let connected = Connection::connect_timed(*address, self.tls.as_ref(), &self.host);
            let connected = timeout(patience, connected).await;
            let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            is_reachable.store(connected.is_ok(), Ordering::Relaxed);
            match connected {
                Ok(connection) => return Ok(connection),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }
}

impl Addresses {
    /// All addresses in the order in which to try them: those whose last attempt failed come last.
    fn in_order(&self, address: Address) -> impl Iterator<Item = &(SocketAddr, AtomicBool)> {
        let first = match address {
            Address::Next => self.turn.fetch_add(1, Ordering::Relaxed) % self.all.len().max(1),
            Address::First => 0,
        };
        let rotated = self.all[first..].iter().chain(&self.all[..first]);
        let (well, ill): (Vec<_>, Vec<_>) = rotated.partition(|(_, is_reachable)| is_reachable.load(Ordering::Relaxed));
        well.into_iter().chain(ill)
    }
}

/// Reads a body up to `limit` bytes. The result is longer than `limit` only if the body is.
pub(crate) async fn whole(connection: &mut Connection, framing: &mut Framing, limit: usize) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    while body.len() <= limit
        && let Some(piece) = poll_fn(|context| connection.poll_body(framing, context)).await
    {
        body.extend_from_slice(&piece?);
    }
    Ok(body)
}

/// Appends headers to a request head.
pub(crate) fn put_headers(head: &mut Vec<u8>, headers: &HeaderMap) {
    for (name, value) in headers {
        put_header(head, name.as_str(), value.as_bytes());
    }
}

fn put_header(head: &mut Vec<u8>, name: &str, value: &[u8]) {
    for part in [name.as_bytes(), b": ", value, b"\r\n"] {
        head.extend_from_slice(part);
    }
}

/// Adds a message to connection errors for which the system has none.
pub(crate) fn describe(error: io::Error) -> io::Error {
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
    fn a_base_url_is_joined_with_the_path() {
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
    fn given_headers_replace_the_default_ones() {
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
    fn the_user_of_a_url_becomes_a_header() {
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
    fn addresses_rotate_and_failed_ones_come_last() {
        let all = [1, 2, 3].map(|last| (SocketAddr::from(([127, 0, 0, last], 80)), AtomicBool::new(true)));
        let addresses = Addresses {
            all: all.into(),
            turn: AtomicUsize::new(0),
        };
        let order = |address| {
            let order = addresses.in_order(address);
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
