//! The reference server: it paces its answers to the microsecond and records when it wrote each event.
//!
//! One thread with one epoll loop in a separate process. The kernel timestamps arriving requests; this program
//! timestamps events right before it writes them, all on the monotonic clock. `GET /truth` returns and clears the
//! record.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{self, IoSliceMut, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{Backlog, ControlMessageOwned, MsgFlags, listen, recvmsg, setsockopt, sockopt};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::time::Instant;

use crate::ground_truth::{Counts, GroundTruth, Request};

/// Time before an event at which the loop stops sleeping: the lateness of a wake-up.
const SPIN: Duration = Duration::from_micros(60);

const LISTENER: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

/// The shape of every answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    /// From the request to the first event.
    pub(crate) first: Duration,
    /// Between two events.
    pub(crate) next: Duration,
}

/// One connection, and the answer on it.
struct Connection {
    stream: TcpStream,
    read: Vec<u8>,
    answer: Option<Answer>,
    /// Distinguishes a connection from earlier ones in the same slot.
    generation: u64,
}

struct Answer {
    id: String,
    arrived: Instant,
    left: u32,
    /// Write time of each event since the arrival of the request.
    written: Vec<Duration>,
    lateness: Duration,
}

struct Server {
    pace: Pace,
    epoll: Epoll,
    timer: TimerFd,
    listener: TcpListener,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    generation: u64,
    due: BinaryHeap<Reverse<(Instant, usize, u64)>>,
    ground_truth: GroundTruth,
    counts: Counts,
    /// An event that is not the last.
    event: String,
}

/// Serves until its process is ended.
pub(crate) fn serve(port: u16, pace: Pace) -> io::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    listen(&listener, Backlog::new(4096)?)?;
    listener.set_nonblocking(true)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK)?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
    let edge = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
    epoll.add(&timer, EpollEvent::new(edge, TIMER))?;
    let mut server = Server {
        pace,
        epoll,
        timer,
        listener,
        connections: Vec::new(),
        free: Vec::new(),
        generation: 0,
        due: BinaryHeap::new(),
        ground_truth: GroundTruth::default(),
        counts: Counts::default(),
        event: event("null"),
    };
    let mut events = vec![EpollEvent::empty(); 512];
    loop {
        server.write_what_is_due();
        let sleep = server.sleep()?;
        let count = server.epoll.wait(&mut events, sleep).or_else(|error| match error {
            nix::errno::Errno::EINTR => Ok(0),
            error => Err(error),
        })?;
        for event in &events[..count] {
            match event.data() {
                LISTENER => server.accept()?,
                TIMER => {}
                place => server.hear(usize::try_from(place).unwrap_or(usize::MAX)),
            }
        }
    }
}

impl Server {
    /// Time to wait for requests: until shortly before the next event, for which the loop spins.
    fn sleep(&self) -> io::Result<EpollTimeout> {
        let Some(Reverse((due, ..))) = self.due.peek() else {
            return Ok(EpollTimeout::NONE);
        };
        let left = due.saturating_duration_since(Instant::now() + SPIN);
        if left.is_zero() {
            return Ok(EpollTimeout::ZERO);
        }
        let expiration = Expiration::OneShot(left.into());
        self.timer.set(expiration, TimerSetTimeFlags::empty())?;
        Ok(EpollTimeout::NONE)
    }

    fn accept(&mut self) -> io::Result<()> {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            setsockopt(&stream, sockopt::ReceiveTimestampns, &true)?;
            let place = self.free.pop().unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
            self.epoll
                .add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, place as u64))?;
            self.generation += 1;
            self.connections[place] = Some(Connection {
                stream,
                read: Vec::new(),
                answer: None,
                generation: self.generation,
            });
        }
    }

    fn hear(&mut self, place: usize) {
        let Some(mut connection) = self.connections.get_mut(place).and_then(Option::take) else {
            return;
        };
        if self.hear_from(&mut connection, place).is_ok() {
            self.connections[place] = Some(connection);
        } else {
            self.free.push(place);
        }
    }

    /// Reads available bytes and starts an answer when a request is complete. An error closes the connection.
    fn hear_from(&mut self, connection: &mut Connection, place: usize) -> io::Result<()> {
        let arrived = receive(&connection.stream, &mut connection.read)?;
        let Some(end) = find(&connection.read, b"\r\n\r\n").map(|end| end + 4) else {
            return Ok(());
        };
        let head = String::from_utf8_lossy(&connection.read[..end]).into_owned();
        let field = |name: &str| {
            let lines = head.lines().filter_map(|line| line.split_once(':'));
            lines
                .filter(|(found, _)| found.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.trim().to_owned())
                .next()
        };
        let length = field("content-length")
            .and_then(|length| length.parse().ok())
            .unwrap_or(0);
        if connection.read.len() < end + length {
            return Ok(());
        }
        let body: Vec<u8> = connection.read.drain(..end + length).skip(end).collect();
        if !head.starts_with("POST /v1/completions") {
            return connection.tell(&self.page(&head));
        }
        self.counts.requests += 1;
        connection.stream.write_all(STREAM.as_bytes())?;
        let left = number_after(&body, b"\"max_tokens\":").unwrap_or(1).max(1);
        connection.answer = Some(Answer {
            id: field("x-request-id").unwrap_or_default(),
            arrived,
            left,
            written: Vec::with_capacity(left as usize),
            lateness: Duration::ZERO,
        });
        let first = arrived + self.pace.first;
        self.due.push(Reverse((first, place, connection.generation)));
        Ok(())
    }

    /// Answers requests other than completions.
    fn page(&mut self, head: &str) -> (&'static str, String) {
        let json = |value: Result<String, serde_json::Error>| ("200 OK", value.unwrap_or_default());
        match head.split(' ').nth(1).unwrap_or_default() {
            "/v1/models" => json(Ok(
                r#"{"object":"list","data":[{"id":"null","root":"null"}]}"#.to_owned()
            )),
            "/counts" => json(serde_json::to_string(&self.counts)),
            "/truth" => json(serde_json::to_string(&std::mem::take(&mut self.ground_truth))),
            _ => ("404 Not Found", "{}".to_owned()),
        }
    }

    fn write_what_is_due(&mut self) {
        while let Some(&Reverse((due, place, generation))) = self.due.peek() {
            let now = Instant::now();
            if due > now {
                return;
            }
            self.due.pop();
            let next = due + self.pace.next;
            let Some(connection) = self.connections[place].as_mut() else {
                continue;
            };
            if connection.generation != generation {
                continue;
            }
            let Some(answer) = &mut connection.answer else { continue };
            answer.written.push(now - answer.arrived);
            answer.lateness = answer.lateness.max(now - due);
            answer.left -= 1;
            self.counts.events += 1;
            let end = (answer.left == 0).then(|| end(answer.written.len()));
            let bytes = end.as_ref().unwrap_or(&self.event).as_bytes();
            // A stream needs much less than a socket buffer; a client that does not read is disconnected.
            let written = connection.stream.write_all(bytes);
            if answer.left > 0 && written.is_ok() {
                self.due.push(Reverse((next, place, generation)));
                continue;
            }
            if let Some(answer) = connection.answer.take() {
                self.ground_truth.requests.push(Request {
                    id: answer.id,
                    lateness: answer.lateness.as_secs_f64(),
                    written: answer.written.iter().map(Duration::as_secs_f64).collect(),
                });
            }
            if written.is_err() {
                self.connections[place] = None;
                self.free.push(place);
            }
        }
    }
}

impl Connection {
    fn tell(&mut self, (status, body): &(&str, String)) -> io::Result<()> {
        self.stream.set_nonblocking(false)?;
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        self.stream.write_all(head.as_bytes())?;
        self.stream.write_all(body.as_bytes())?;
        self.stream.set_nonblocking(true)
    }
}

/// Reads once and returns the arrival time of the last byte.
fn receive(stream: &TcpStream, into: &mut Vec<u8>) -> io::Result<Instant> {
    let mut room = [0; 16 << 10];
    let mut control = nix::cmsg_space!(TimeSpec);
    let mut slices = [IoSliceMut::new(&mut room)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::empty())?;
    let (now, clock) = (
        Instant::now(),
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
    );
    let stamp = message.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::ScmTimestampns(stamp) => Some(Duration::from(stamp)),
        _ => None,
    });
    let count = message.bytes;
    if count == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    into.extend_from_slice(&room[..count]);
    Ok(now - stamp.map_or(Duration::ZERO, |stamp| clock.saturating_sub(stamp)))
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, what)
}

fn number_after(bytes: &[u8], what: &[u8]) -> Option<u32> {
    let rest = bytes[find(bytes, what)? + what.len()..].trim_ascii_start();
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()
}

const STREAM: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";

/// An event as vLLM 0.32 writes it.
fn event(finish_reason: &str) -> String {
    chunk(&format!(
        "\"choices\":[{{\"index\":0,\"text\":\" word\",\"logprobs\":null,\"finish_reason\":{finish_reason},\
         \"stop_reason\":null,\"token_ids\":null}}]"
    ))
}

/// The last event, the one with usage, and the end.
fn end(tokens: usize) -> String {
    let usage = format!(
        "\"choices\":[],\"usage\":{{\"prompt_tokens\":64,\"total_tokens\":{},\"completion_tokens\":{tokens}}}",
        64 + tokens
    );
    event("\"length\"") + &chunk(&usage) + "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
}

fn chunk(rest: &str) -> String {
    let data = format!(
        "data: {{\"id\":\"cmpl-00000000000000000000000000000000\",\"object\":\"text_completion\",\"created\":1700000000,\
         \"model\":\"null\",{rest}}}\n\n"
    );
    format!("{:x}\r\n{data}\r\n", data.len())
}
