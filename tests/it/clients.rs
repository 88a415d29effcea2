//! Connections of clients: stopped, slow, half-open, idle and too many ones, on a proxy over engines that answer at once.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::Stdio;
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::support::{DEADLINE, Place, Run, Unsupervised, get, wait_for};

/// A stream that ends when its reader leaves.
pub(crate) const ENDLESS: &[&str] = &["--null-events", "4000000000"];

/// Both engines of a proxy.
pub(crate) struct Engines {
    _both: [Unsupervised; 2],
}

impl Engines {
    pub(crate) fn start(place: &Place, more: &[&str]) -> Self {
        let both = [7100, 7200].map(|base| {
            let port = (base + place.offset).to_string();
            let arguments = [&["sim", "null", "--null", "--port", &port][..], more].concat();
            let mut command = place.command(&arguments);
            let engine = Unsupervised::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
            wait_for("an engine", || {
                connect(base + place.offset).map_err(|error| error.to_string())
            });
            engine
        });
        Self { _both: both }
    }
}

fn arguments(place: &Place, more: &[&str]) -> Vec<String> {
    let [prefill, decode, own] = [7100, 7200, 9100].map(|base: u16| (base + place.offset).to_string());
    let fixed = [
        "proxy",
        "--connector",
        "nixl",
        "--prefiller-host",
        "127.0.0.1",
        "--prefiller-port",
        &prefill,
    ]
    .into_iter()
    .chain(["--decoder-host", "127.0.0.1", "--decoder-port", &decode, "--port", &own]);
    fixed.chain(more.iter().copied()).map(str::to_owned).collect()
}

pub(crate) fn proxy<'place>(place: &'place Place, more: &[&str]) -> Run<'place> {
    let arguments = arguments(place, more);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut run = Run::start(place, &arguments);
    run.wait_for_line("serving 1 prefill");
    run
}

pub(crate) fn connect(port: u16) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(DEADLINE))?;
    Ok(stream)
}

pub(crate) fn client(place: &Place) -> TcpStream {
    connect(place.proxy_port()).expect("the proxy listens")
}

/// A client whose kernel holds little for it.
pub(crate) fn narrow_client(place: &Place) -> TcpStream {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let stream = runtime.block_on(async {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.set_recv_buffer_size(8192).expect("an option");
        let stream = socket.connect(SocketAddr::from((Ipv4Addr::LOCALHOST, place.proxy_port())));
        stream.await.expect("the proxy listens").into_std().expect("a socket")
    });
    stream.set_nonblocking(false).expect("an option");
    stream.set_read_timeout(Some(DEADLINE)).expect("an option");
    stream
}

pub(crate) fn ask(client: &mut impl Write, stream: bool) {
    let body = format!(r#"{{"model":"null","prompt":"x","stream":{stream}}}"#);
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    client.write_all((head + &body).as_bytes()).expect("a request is taken");
}

/// Reads until what was read contains `text`.
pub(crate) fn read_to(client: &mut impl Read, text: &str) -> String {
    let mut read = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let count = client.read(&mut chunk).expect("more of the answer");
        assert!(count > 0, "no `{text}` in {}", String::from_utf8_lossy(&read));
        read.extend_from_slice(&chunk[..count]);
        let whole = String::from_utf8_lossy(&read);
        if whole.contains(text) {
            return whole.into_owned();
        }
    }
}

/// A whole request on a connection that stays open.
pub(crate) fn complete(client: &mut (impl Read + Write)) {
    ask(client, false);
    let answer = read_to(client, r#""completion_tokens":3}}"#);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// Whether the other side has closed the connection, once it says anything at all.
pub(crate) fn is_closed(client: &mut TcpStream) -> bool {
    match client.read(&mut [0; 64]) {
        Ok(count) => count == 0,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
            true
        }
    }
}

fn wait_until_in_flight(place: &Place, count: u32) {
    wait_for("the requests in flight", || {
        let metrics = get(place.proxy_port(), "/metrics");
        let wanted = [
            format!("xpyd_requests_in_flight {count}\n"),
            format!("xpyd_engine_requests_in_flight{{engine=\"decoder1\",role=\"decode\"}} {count}\n"),
        ];
        if wanted.iter().all(|line| metrics.contains(line)) {
            Ok(())
        } else {
            Err(metrics)
        }
    });
}

#[test]
fn a_client_that_stops_reading_loses_its_place_after_the_deadline() {
    let place = Place::new();
    let _engines = Engines::start(&place, ENDLESS);
    let _proxy = proxy(&place, &["--decode-idle-deadline", "1s"]);
    let mut stopped = narrow_client(&place);
    ask(&mut stopped, true);
    read_to(&mut stopped, "data: ");
    wait_until_in_flight(&place, 0);
}

#[test]
fn a_client_that_reads_slowly_is_served_on() {
    let place = Place::new();
    let _engines = Engines::start(&place, ENDLESS);
    let _proxy = proxy(&place, &["--decode-idle-deadline", "6s"]);
    let mut slow = narrow_client(&place);
    ask(&mut slow, true);
    read_to(&mut slow, "data: ");
    let (_never, pause) = mpsc::channel::<()>();
    let mut chunk = [0; 16384];
    // Together far more than the deadline.
    for _ in 0..16 {
        assert!(slow.read(&mut chunk).expect("the stream goes on") > 0);
        assert!(pause.recv_timeout(Duration::from_millis(500)).is_err(), "nobody sends");
    }
    // More than any buffer between engine and client can have held.
    let mut left: usize = 32 << 20;
    while left > 0 {
        let count = slow.read(&mut chunk).expect("the stream goes on");
        assert!(count > 0, "the stream was cut with {left} bytes to go");
        left = left.saturating_sub(count);
    }
    drop(slow);
    wait_until_in_flight(&place, 0);
}

#[test]
fn a_head_that_never_ends_is_cut_off_and_so_is_an_idle_connection() {
    let place = Place::new();
    let _engines = Engines::start(&place, &[]);
    let _proxy = proxy(&place, &["--set", "clients.idle_deadline=4s"]);
    let mut half = client(&place);
    half.write_all(b"POST /v1/completions HTTP/1.1\r\nhos")
        .expect("it is open");
    assert!(is_closed(&mut half));
    let mut idle = client(&place);
    complete(&mut idle);
    complete(&mut idle);
    assert!(is_closed(&mut idle));
}

#[test]
fn a_proxy_that_stops_ends_idle_connections_at_once_and_answers_in_full() {
    let place = Place::new();
    let _engines = Engines::start(&place, &["--null-events", "40", "--null-interval", "100ms"]);
    let proxy = proxy(&place, &["--set", "clients.threads=2"]);
    let mut idle = [client(&place), client(&place), client(&place)];
    idle.iter_mut().for_each(complete);
    let fresh = client(&place);
    let mut streaming = client(&place);
    ask(&mut streaming, true);
    let begun = read_to(&mut streaming, "data: ");
    assert!(!begun.contains("[DONE]"), "the stream is over before the stop");
    proxy.signal(Signal::SIGTERM);
    for mut connection in idle.into_iter().chain([fresh]) {
        assert!(is_closed(&mut connection));
    }
    let refused = wait_for("the end of the listener", || match connect(place.proxy_port()) {
        Ok(_) => Err("a client was accepted".to_owned()),
        Err(error) => Ok(error.kind()),
    });
    assert_eq!(refused, ErrorKind::ConnectionRefused);
    read_to(&mut streaming, "data: [DONE]\n\n");
    let (code, text) = proxy.end();
    assert_eq!(code, 0, "{text}");
}

#[test]
fn few_descriptors_break_nothing() {
    let place = Place::new();
    let _engines = Engines::start(&place, &[]);
    let arguments = arguments(&place, &[]);
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "ulimit -n 160; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_xpyd")]);
    command.args(&arguments).current_dir(place.path()).stdin(Stdio::null());
    let _proxy = Unsupervised::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
    wait_for("the proxy", || {
        connect(place.proxy_port()).map_err(|error| error.to_string())
    });
    let mut clients = Vec::new();
    for _ in 0..200 {
        let mut client = client(&place);
        ask(&mut client, false);
        clients.push(client);
    }
    let mut served = 0;
    for mut client in clients {
        let answer = read_to(&mut client, "}}");
        let is_served = answer.starts_with("HTTP/1.1 200");
        assert!(is_served || answer.starts_with("HTTP/1.1 503"), "{answer}");
        served += usize::from(is_served);
    }
    assert!(served > 0);
    complete(&mut client(&place));
}
