//! A small HTTP client over raw sockets that sends any bytes and reads any response.

use std::io::ErrorKind;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// A response, complete or not.
#[derive(Debug, Default)]
pub(crate) struct Response {
    pub(crate) status: u16,
    /// The status line and the headers, in lower case.
    pub(crate) head: String,
    /// The body without its framing.
    pub(crate) body: Vec<u8>,
    /// Whether the body reached its announced end.
    pub(crate) is_complete: bool,
}

/// Why there is no response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    Refused,
    /// The connection ended before the response headers.
    NoAnswer(ErrorKind),
    Deadline,
}

impl Response {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn has_header(&self, name: &str) -> bool {
        self.header(name).is_some()
    }

    /// The value of a header, whose name is given in lower case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines();
        lines.find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
    }

    /// The first response in these bytes, if its head is complete, and the number of bytes that it takes.
    pub(crate) fn parse(bytes: &[u8]) -> Option<(Self, usize)> {
        let end = find(bytes, b"\r\n\r\n")? + 4;
        let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
        let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or(0);
        let mut response = Self {
            status,
            head,
            ..Self::default()
        };
        let rest = &bytes[end..];
        let has_no_body = matches!(status, 100..=199 | 204 | 304);
        let (body, taken, is_complete) = if has_no_body {
            (Vec::new(), 0, true)
        } else if response
            .header("transfer-encoding")
            .is_some_and(|value| value.ends_with("chunked"))
        {
            unchunk(rest)
        } else if let Some(length) = response.header("content-length").and_then(|value| value.parse().ok()) {
            let taken = rest.len().min(length);
            (rest[..taken].to_vec(), taken, taken == length)
        } else {
            (rest.to_vec(), rest.len(), true)
        };
        response.body = body;
        response.is_complete = is_complete;
        Some((response, end + taken))
    }
}

/// A chunked body, the number of its bytes, and whether it has its last chunk.
fn unchunk(bytes: &[u8]) -> (Vec<u8>, usize, bool) {
    let mut body = Vec::new();
    let mut at = 0;
    while let Some(line) = find(&bytes[at..], b"\r\n") {
        let size = String::from_utf8_lossy(&bytes[at..at + line]);
        let Ok(size) = usize::from_str_radix(size.trim(), 16) else {
            break;
        };
        let begin = at + line + 2;
        let end = begin.saturating_add(size);
        if bytes.len() < end + 2 {
            body.extend_from_slice(&bytes[begin..bytes.len().min(end)]);
            return (body, bytes.len(), false);
        }
        body.extend_from_slice(&bytes[begin..end]);
        at = end + 2;
        if size == 0 {
            return (body, at, true);
        }
    }
    (body, bytes.len(), false)
}

pub(crate) fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, wanted)
}

pub(crate) async fn connect(port: u16) -> Result<TcpStream, Failure> {
    match TcpStream::connect(("127.0.0.1", port)).await {
        Ok(stream) => {
            // A small write that waits for an acknowledgement would only slow the attack.
            let _ = stream.set_nodelay(true);
            Ok(stream)
        }
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Err(Failure::Refused),
        Err(error) => Err(Failure::NoAnswer(error.kind())),
    }
}

/// Sends a request that asks for the connection's end, and reads the response to its end.
pub(crate) async fn exchange(port: u16, request: &[u8], deadline: Duration) -> Result<Response, Failure> {
    timeout(deadline, exchange_without_deadline(port, request))
        .await
        .unwrap_or(Err(Failure::Deadline))
}

async fn exchange_without_deadline(port: u16, request: &[u8]) -> Result<Response, Failure> {
    let mut stream = connect(port).await?;
    let (mut reader, mut writer) = stream.split();
    let mut received = Vec::new();
    // A server can reject a request before it is sent completely, so both directions run concurrently.
    let send = async {
        let _ = writer.write_all(request).await;
        std::future::pending::<()>().await;
    };
    let result = tokio::select! {
        () = send => unreachable!("sending never ends"),
        result = reader.read_to_end(&mut received) => result,
    };
    let kind = result.err().map_or(ErrorKind::UnexpectedEof, |error| error.kind());
    match Response::parse(&received) {
        Some((response, _)) => Ok(response),
        None => Err(Failure::NoAnswer(kind)),
    }
}

/// A `GET` with its status, or the failure.
pub(crate) async fn get(port: u16, path: &str, deadline: Duration) -> Result<Response, Failure> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    exchange(port, request.as_bytes(), deadline).await
}

/// A complete `POST` of JSON, which asks for the connection's end.
pub(crate) fn post(path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// The sum of the samples of a metric. `None` without such a page or metric.
pub(crate) async fn metric(port: u16, name: &str, deadline: Duration) -> Option<f64> {
    let page = get(port, "/metrics", deadline).await.ok()?.text();
    let samples = page.lines().filter(|line| {
        let rest = line.strip_prefix(name);
        rest.is_some_and(|rest| rest.starts_with([' ', '{']))
    });
    let values: Option<Vec<f64>> = samples.map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
    values
        .filter(|values| !values.is_empty())
        .map(|values| values.iter().sum())
}
