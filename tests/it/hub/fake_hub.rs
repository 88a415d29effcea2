//! A small HTTP server in place of Hugging Face. The test scripts its responses, and it records its requests.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

/// One request.
#[derive(Debug, Clone)]
pub(super) struct SeenRequest {
    /// The number of requests before this one.
    pub(super) number: usize,
    pub(super) path: String,
    headers: Vec<(String, String)>,
    is_head: bool,
}

impl SeenRequest {
    /// A header by its lower-case name.
    pub(super) fn header(&self, name: &str) -> Option<&String> {
        self.headers
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value)
    }
}

/// One response.
#[derive(Debug, Clone)]
pub(super) struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    cut_after: Option<usize>,
    delay: Duration,
}

impl Reply {
    pub(super) fn status(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Vec::new(),
            cut_after: None,
            delay: Duration::ZERO,
        }
    }

    pub(super) fn json(text: &str) -> Self {
        let mut reply = Self::status(200);
        reply.body = text.as_bytes().to_vec();
        reply
    }

    /// A file, or the range of it that the request asks for.
    pub(super) fn file(content: &[u8], request: &SeenRequest) -> Self {
        let start = request
            .header("range")
            .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        let Some(start) = start.filter(|start: &usize| *start < content.len()) else {
            let mut reply = Self::status(200);
            reply.body = content.to_vec();
            return reply;
        };
        let range = format!("bytes {start}-{}/{}", content.len() - 1, content.len());
        let mut reply = Self::status(206).header("content-range", &range);
        reply.body = content[start..].to_vec();
        reply
    }

    pub(super) fn header(mut self, name: &str, value: &str) -> Self {
        if !value.is_empty() {
            self.headers.push((name.to_owned(), value.to_owned()));
        }
        self
    }

    /// Closes the connection after this number of bytes of the body.
    pub(super) fn cut_after(mut self, bytes: usize) -> Self {
        self.cut_after = Some(bytes);
        self
    }

    /// Delays the response.
    pub(super) fn after(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    fn write(&self, stream: &mut TcpStream, is_head: bool) -> std::io::Result<()> {
        let mut head = format!(
            "HTTP/1.1 {} x\r\nconnection: close\r\ncontent-length: {}\r\n",
            self.status,
            self.body.len()
        );
        for (name, value) in &self.headers {
            head.extend([name, ": ", value, "\r\n"]);
        }
        stream.write_all(format!("{head}\r\n").as_bytes())?;
        if is_head {
            return Ok(());
        }
        let end = self.cut_after.unwrap_or(self.body.len()).min(self.body.len());
        stream.write_all(&self.body[..end])
    }
}

/// The server. Dropping it stops it.
pub(super) struct FakeHub {
    port: u16,
    seen: Arc<Mutex<Vec<SeenRequest>>>,
    is_over: Arc<AtomicBool>,
    /// Wakes the threads that delay a response.
    ending: Option<mpsc::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl FakeHub {
    pub(super) fn start(script: impl Fn(&SeenRequest) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let is_over = Arc::new(AtomicBool::new(false));
        let (ending, ended) = mpsc::channel::<()>();
        let (all, over) = (Arc::clone(&seen), Arc::clone(&is_over));
        let thread = thread::spawn(move || {
            let (script, ended, all) = (&script, Mutex::new(ended), &all);
            let ended = &ended;
            thread::scope(|scope| {
                for stream in listener.incoming() {
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                    let Ok(stream) = stream else { continue };
                    // A client that closes the connection is not an error.
                    scope.spawn(move || drop(serve(stream, script, all, ended)));
                }
            });
        });
        Self {
            port,
            seen,
            is_over,
            ending: Some(ending),
            thread: Some(thread),
        }
    }

    pub(super) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub(super) fn requests(&self) -> Vec<SeenRequest> {
        self.seen.lock().expect("no panic").clone()
    }

    /// Stops the server, and keeps the address for connections that must fail.
    pub(super) fn stopped(mut self) -> Self {
        self.end();
        self
    }

    fn end(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        drop(self.ending.take());
        // Wakes the accepting thread.
        drop(TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl Drop for FakeHub {
    fn drop(&mut self) {
        self.end();
    }
}

fn serve(
    mut stream: TcpStream,
    script: &(impl Fn(&SeenRequest) -> Reply + Sync),
    all: &Mutex<Vec<SeenRequest>>,
    ended: &Mutex<mpsc::Receiver<()>>,
) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        headers.push((name.to_lowercase(), value.trim().to_owned()));
    }
    let mut words = first.split(' ');
    let is_head = words.next() == Some("HEAD");
    let request = {
        let mut all = all.lock().expect("no panic");
        let request = SeenRequest {
            number: all.len(),
            path: words.next().unwrap_or_default().to_owned(),
            headers,
            is_head,
        };
        all.push(request.clone());
        request
    };
    let reply = script(&request);
    if !reply.delay.is_zero() {
        // The delay ends early when the server stops.
        let _ = ended.lock().expect("no panic").recv_timeout(reply.delay);
    }
    reply.write(&mut stream, request.is_head)
}
