//! Clients that write raw bytes, and `xpyd proxy` over simulated engines that answer at once.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::Stdio;

use crate::support::{DEADLINE, Run, TestEnv, Unsupervised, wait_for};

/// A stream that ends only when the client disconnects.
pub(crate) const ENDLESS: &[&str] = &["--null-events", "4000000000"];

/// The prefill and the decode engine of a proxy.
pub(crate) struct Engines {
    _both: [Unsupervised; 2],
}

impl Engines {
    pub(crate) fn start(env: &TestEnv, more: &[&str]) -> Self {
        let both = [7100, 7200].map(|base| {
            let port = (base + env.offset).to_string();
            let arguments = [&["sim", "null", "--null", "--port", &port][..], more].concat();
            let mut command = env.command(&arguments);
            let engine = Unsupervised::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
            wait_for("an engine", || {
                connect(base + env.offset).map_err(|error| error.to_string())
            });
            engine
        });
        Self { _both: both }
    }
}

pub(crate) fn arguments(env: &TestEnv, more: &[&str]) -> Vec<String> {
    let [prefill, decode, own] = [7100, 7200, 9100].map(|base: u16| (base + env.offset).to_string());
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

pub(crate) fn proxy<'env>(env: &'env TestEnv, more: &[&str]) -> Run<'env> {
    let arguments = arguments(env, more);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut run = Run::start(env, &arguments);
    run.wait_for_line("serving 1 prefill");
    run
}

pub(crate) fn connect(port: u16) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(DEADLINE))?;
    Ok(stream)
}

pub(crate) fn client(env: &TestEnv) -> TcpStream {
    connect(env.proxy_port()).expect("the proxy listens")
}

/// A client with a small receive buffer.
pub(crate) fn small_buffer_client(env: &TestEnv) -> TcpStream {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let stream = runtime.block_on(async {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.set_recv_buffer_size(8192).expect("an option");
        let stream = socket.connect(SocketAddr::from((Ipv4Addr::LOCALHOST, env.proxy_port())));
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

/// Reads until the data contains `text`.
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

/// Sends a request and reads its whole response. The connection stays open.
pub(crate) fn complete(client: &mut (impl Read + Write)) {
    ask(client, false);
    let answer = read_to(client, r#""completion_tokens":3}}"#);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// Waits for data or the end, and returns whether the other side has closed the connection.
pub(crate) fn is_closed(client: &mut TcpStream) -> bool {
    match client.read(&mut [0; 64]) {
        Ok(count) => count == 0,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
            true
        }
    }
}
