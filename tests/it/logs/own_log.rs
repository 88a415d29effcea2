//! xpyd's own log: its size is bounded whatever clients send, and it never delays a request.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::process::Stdio;

use nix::sys::signal::Signal;

use crate::support::{TestEnv, Unsupervised, get, wait_for};

/// Requests an unknown path of two kilobytes `count` times over one connection, and reads all responses.
fn flood(port: u16, count: usize) {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("a connection");
    let mut answers = stream.try_clone().expect("a second descriptor");
    let path = "x".repeat(2000);
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let mut text = String::new();
            answers.read_to_string(&mut text).expect("answers");
            text.matches("HTTP/1.1 404").count()
        });
        for number in 1..=count {
            let close = if number == count { "connection: close\r\n" } else { "" };
            let request = format!("GET /{path} HTTP/1.1\r\nhost: x\r\n{close}\r\n");
            stream.write_all(request.as_bytes()).expect("sent");
        }
        assert_eq!(reader.join().expect("answers"), count);
    });
}

#[test]
fn refused_requests_are_logged_shortened_and_limited() {
    const COUNT: usize = 4000;
    let env = TestEnv::new();
    let mut run = env.up(&[]);
    run.wait_until_ready();
    flood(env.proxy_port(), COUNT);
    let log = wait_for("the count of omitted lines", || {
        let log = env.log("proxy.log");
        if log.contains("more lines of this kind were left out kind=\"unknown_route\"") {
            Ok(log)
        } else {
            Err(format!("{} bytes of log", log.len()))
        }
    });
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("request failed")).collect();
    assert!((1..COUNT / 2).contains(&lines.len()), "{} lines", lines.len());
    assert!(
        lines.iter().all(|line| line.len() < 1500 && line.contains("xxx…")),
        "{}",
        lines[0]
    );
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0);
}

#[test]
fn xpyd_proxy_logs_to_stderr_without_blocking() {
    let env = TestEnv::new();
    let port = env.proxy_port().to_string();
    let mut command = env.command(&["proxy", "--connector", "nixl", "--port", &port]);
    let mut proxy = Unsupervised::start(command.stderr(Stdio::piped()));
    let mut lines = BufReader::new(proxy.stderr()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("serving 1 prefill")));
    // More than the pipe holds. Nothing reads the pipe.
    flood(env.proxy_port(), 300);
    assert!(get(env.proxy_port(), "/metrics").contains("xpyd"));
    let line = lines.find(|line| line.contains("request failed")).expect("a line");
    assert!(line.contains("unknown_route"), "{line}");
}
