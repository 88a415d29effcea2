//! The load generator: raw HTTP/1.1 over keep-alive connections, with prepared bytes, and answers parsed only as far as
//! checks need.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Most streams that connect at the same time. More would overflow a listener's queue, which the kernel answers with a
/// reset.
const CONNECTING: usize = 64;

/// Time limit of an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// The kind of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RequestKind {
    /// Bytes of the prompt.
    pub(crate) prompt: usize,
    pub(crate) stream: bool,
}

impl RequestKind {
    fn bytes(self) -> Vec<u8> {
        let prompt = "word ".repeat(self.prompt.div_ceil(5));
        let body = format!(
            r#"{{"model":"null","prompt":"{prompt}","max_tokens":16,"temperature":0,"stream":{}}}"#,
            self.stream
        );
        let head = "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\naccept: */*\r\n";
        format!("{head}content-length: {}\r\n\r\n{body}", body.len()).into_bytes()
    }
}

/// The result of a phase.
#[derive(Debug, Default, Clone)]
pub(crate) struct PhaseResult {
    pub(crate) requests: u64,
    pub(crate) wall: Duration,
    /// Times of complete answers or delays of events, in nanoseconds, sorted.
    pub(crate) times: Vec<u64>,
    pub(crate) errors: Vec<String>,
}

impl PhaseResult {
    /// The quantile of this share, in microseconds.
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let last = self.times.len().saturating_sub(1);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an index of the list"
        )]
        let index = (last as f64 * share).round() as usize;
        self.times.get(index).map_or(f64::NAN, |nanos| *nanos as f64 / 1e3)
    }

    fn merge(&mut self, other: Self) {
        self.requests += other.requests;
        self.times.extend(other.times);
        self.errors.extend(other.errors);
    }
}

/// An answer, whole or streamed, from one connection.
struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    async fn open(port: u16) -> std::io::Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            buffer: Vec::with_capacity(4096),
        })
    }

    async fn fill(&mut self) -> Result<(), String> {
        let read = tokio::time::timeout(PATIENCE, self.stream.read_buf(&mut self.buffer)).await;
        match read {
            Err(_) => Err("no byte within the deadline".into()),
            Ok(Err(error)) => Err(error.to_string()),
            Ok(Ok(0)) => Err("the connection was closed".into()),
            Ok(Ok(_)) => Ok(()),
        }
    }

    /// Removes the headers of an answer from the buffer and returns them in lower case.
    async fn head(&mut self, request: &[u8]) -> Result<String, String> {
        self.buffer.clear();
        self.stream
            .write_all(request)
            .await
            .map_err(|error| error.to_string())?;
        loop {
            if let Some(end) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                let head: Vec<u8> = self.buffer.drain(..end + 4).collect();
                let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
                let good = head.starts_with("http/1.1 200");
                return if good {
                    Ok(head)
                } else {
                    Err(head.lines().next().unwrap_or_default().to_owned())
                };
            }
            self.fill().await?;
        }
    }

    /// A whole answer's body, with its framing where it is chunked.
    async fn whole(&mut self, request: &[u8]) -> Result<(), String> {
        let head = self.head(request).await?;
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
        let length: Option<usize> = length.and_then(|length| length.trim().parse().ok());
        while length.map_or_else(
            || !self.buffer.ends_with(b"0\r\n\r\n"),
            |length| self.buffer.len() < length,
        ) {
            self.fill().await?;
        }
        // The canned text of the decode engine; a router can frame or re-serialize it, but must deliver it.
        if self.buffer.windows(6).any(|window| window == b" a b c") {
            Ok(())
        } else {
            Err(format!("another answer: {}", String::from_utf8_lossy(&self.buffer)))
        }
    }

    /// Reads a stream to its end marker and notes how long each event was on its way.
    ///
    /// The permit to connect is released after the response headers: before, the listener can still have the connection
    /// in its queue.
    async fn events(
        &mut self,
        request: &[u8],
        turn: Option<OwnedSemaphorePermit>,
        times: &mut Vec<u64>,
    ) -> Result<(), String> {
        const SENT: &[u8] = b"\"sent\":";
        self.head(request).await?;
        drop(turn);
        loop {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .as_nanos();
            let mut from = 0;
            while let Some(at) = find(&self.buffer[from..], SENT) {
                let digits = &self.buffer[from + at + SENT.len()..];
                let Some(end) = digits.iter().position(|byte| !byte.is_ascii_digit()) else {
                    break;
                };
                let sent: u128 = std::str::from_utf8(&digits[..end])
                    .unwrap_or_default()
                    .parse()
                    .unwrap_or(now);
                times.push(u64::try_from(now.saturating_sub(sent)).unwrap_or(u64::MAX));
                from += at + SENT.len() + end;
            }
            self.buffer.drain(..from);
            if find(&self.buffer, b"[DONE]").is_some() && self.buffer.ends_with(b"\r\n0\r\n\r\n") {
                return Ok(());
            }
            self.fill().await?;
        }
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// Sends requests without streaming on `connections` connections, until the time is over or `most` were sent.
pub(crate) async fn whole(port: u16, prompt: usize, connections: usize, time: Duration, most: u64) -> PhaseResult {
    let request: Arc<[u8]> = RequestKind { prompt, stream: false }.bytes().into();
    let begun = Instant::now();
    let mut clients = JoinSet::new();
    for _ in 0..connections {
        let request = request.clone();
        clients.spawn(async move {
            let mut outcome = PhaseResult::default();
            let mut connection = match Connection::open(port).await {
                Ok(connection) => connection,
                Err(error) => {
                    outcome.errors.push(error.to_string());
                    return outcome;
                }
            };
            while begun.elapsed() < time && outcome.requests < most.div_ceil(connections as u64) {
                let sent = Instant::now();
                outcome.requests += 1;
                if let Err(error) = connection.whole(&request).await {
                    outcome.errors.push(error);
                    return outcome;
                }
                outcome
                    .times
                    .push(u64::try_from(sent.elapsed().as_nanos()).unwrap_or(u64::MAX));
            }
            outcome
        });
    }
    joined(clients, begun).await
}

/// `count` streams at once, to their ends.
pub(crate) async fn streams(port: u16, prompt: usize, count: usize) -> PhaseResult {
    let request: Arc<[u8]> = RequestKind { prompt, stream: true }.bytes().into();
    let begun = Instant::now();
    let connecting = Arc::new(Semaphore::new(CONNECTING));
    let mut clients = JoinSet::new();
    for _ in 0..count {
        let (request, connecting) = (Arc::clone(&request), Arc::clone(&connecting));
        clients.spawn(async move {
            let mut outcome = PhaseResult {
                requests: 1,
                ..PhaseResult::default()
            };
            let turn = connecting.acquire_owned().await;
            let done = match Connection::open(port).await {
                Ok(mut connection) => connection.events(&request, turn.ok(), &mut outcome.times).await,
                Err(error) => Err(error.to_string()),
            };
            outcome.errors.extend(done.err());
            outcome
        });
    }
    joined(clients, begun).await
}

async fn joined(mut clients: JoinSet<PhaseResult>, begun: Instant) -> PhaseResult {
    let mut all = PhaseResult::default();
    while let Some(one) = clients.join_next().await {
        match one {
            Ok(one) => all.merge(one),
            Err(error) => all.errors.push(error.to_string()),
        }
    }
    all.wall = begun.elapsed();
    all.times.sort_unstable();
    all
}

/// The number of requests that a null engine has received.
pub(crate) async fn seen(port: u16) -> Result<u64, String> {
    let mut connection = Connection::open(port).await.map_err(|error| error.to_string())?;
    connection.head(b"GET /counts HTTP/1.1\r\nhost: bench\r\n\r\n").await?;
    while !connection.buffer.ends_with(b"}") {
        connection.fill().await?;
    }
    let counts: std::collections::BTreeMap<String, u64> =
        serde_json::from_slice(&connection.buffer).map_err(|error| error.to_string())?;
    Ok(counts.values().sum())
}
