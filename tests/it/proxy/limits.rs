//! The proxy at its limits of file descriptors, client connections, and connections per address: it blames no engine, answers
//! health checks, and sends `retry-after` to clients.

use std::io::Write;
use std::net::TcpStream;

use rustix::process::{Pid, Resource, Rlimit, prlimit};

use super::raw_client::{ENDLESS, Engines, ask, client, complete, is_closed, proxy, read_to};
use crate::support::{Run, TestEnv, get, wait_for};

/// The number of open file descriptors of a process.
fn open_descriptors(pid: i32) -> u64 {
    let all = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("a process");
    all.count() as u64
}

fn limit_descriptors(run: &Run<'_>, current: u64) {
    let pid = Pid::from_raw(run.pid()).expect("a pid");
    let limit = Rlimit {
        current: Some(current),
        maximum: Some(1024),
    };
    prlimit(Some(pid), Resource::Nofile, limit).expect("a lower limit");
}

/// The response to a request that is refused for lack of resources.
fn assert_refused(client: &mut TcpStream, code: &str) {
    ask(client, false);
    let answer = read_to(client, "}}");
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(answer.to_ascii_lowercase().contains("retry-after: 1\r\n"), "{answer}");
    assert!(answer.contains(&format!("\"code\":\"{code}\"")), "{answer}");
}

fn health(env: &TestEnv) -> String {
    let mut checker = client(env);
    let request = "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    checker.write_all(request.as_bytes()).expect("the connection is open");
    read_to(&mut checker, "\r\n\r\n")
}

/// Starts an endless stream.
fn open_stream(env: &TestEnv) -> TcpStream {
    let mut streaming = client(env);
    ask(&mut streaming, true);
    read_to(&mut streaming, "data: ");
    streaming
}

fn limit_was_reached(env: &TestEnv, limit: &str) -> bool {
    let metrics = get(env.proxy_port(), "/metrics");
    let line = format!("xpyd_limit_reached_total{{limit=\"{limit}\"}} ");
    metrics.lines().any(|found| found.starts_with(&line))
}

#[test]
fn without_descriptors_idle_engine_connections_close_first() {
    let env = TestEnv::new();
    let _engines = Engines::start(&env, ENDLESS);
    let proxy = proxy(&env, &["--set", "clients.threads=1"]);
    let mut waiting: Vec<TcpStream> = (0..8).map(|_| client(&env)).collect();
    for client in &mut waiting {
        let request = "GET /health HTTP/1.1\r\nHost: x\r\n\r\n";
        client.write_all(request.as_bytes()).expect("the connection is open");
        read_to(client, "\r\n\r\n");
    }
    // Its connection to the prefill engine is idle during the decode leg.
    let _streaming = open_stream(&env);
    let full = open_descriptors(proxy.pid());
    limit_descriptors(&proxy, full);
    // Every stream keeps a connection to the decode engine. The number of descriptors that probes use varies, so one of the first
    // clients finds no idle connection to close.
    let is_refused = |client: &mut TcpStream| {
        ask(client, true);
        let answer = read_to(client, "\r\n\r\n");
        answer.starts_with("HTTP/1.1 503")
    };
    let first = waiting.iter_mut().position(is_refused).expect("a limit");
    assert!(first > 0, "the idle connection to the prefill engine was not closed");
    let mut third = waiting.pop().expect("more clients than descriptors");
    limit_descriptors(&proxy, full.saturating_sub(4));
    // More often than the breaker tolerates.
    for _ in 0..5 {
        assert_refused(&mut third, "out_of_descriptors");
    }
    limit_descriptors(&proxy, 1024);
    ask(&mut third, true);
    let answer = read_to(&mut third, "data: ");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(limit_was_reached(&env, "descriptors_connect"));
}

#[test]
fn a_connection_without_a_request_times_out_early() {
    let env = TestEnv::new();
    let _engines = Engines::start(&env, &[]);
    let mut proxy = proxy(&env, &["--set", "clients.head_deadline=3s"]);
    let mut idle = client(&env);
    complete(&mut idle);
    let mut silent = client(&env);
    let mut half = client(&env);
    half.write_all(b"GET /health HTTP/1.1\r\nHos")
        .expect("the connection is open");
    assert!(is_closed(&mut silent) && is_closed(&mut half));
    complete(&mut idle);
    assert!(limit_was_reached(&env, "head_deadline"));
    proxy.kill();
}

#[test]
fn at_the_limit_the_longest_idle_connection_closes() {
    let env = TestEnv::new();
    let _engines = Engines::start(&env, &[]);
    let _proxy = proxy(&env, &["--set", "clients.max_connections=2"]);
    let (mut first, mut second) = (client(&env), client(&env));
    complete(&mut first);
    complete(&mut second);
    let mut third = client(&env);
    complete(&mut third);
    assert!(is_closed(&mut first));
    complete(&mut second);
    complete(&mut third);
}

#[test]
fn health_and_metrics_work_at_the_connection_limit() {
    let env = TestEnv::new();
    let _engines = Engines::start(&env, ENDLESS);
    let _proxy = proxy(&env, &["--set", "clients.max_connections=2"]);
    let both = [open_stream(&env), open_stream(&env)];
    assert!(health(&env).starts_with("HTTP/1.1 200"));
    let mut third = client(&env);
    assert_refused(&mut third, "too_many_connections");
    assert!(is_closed(&mut third));
    assert!(limit_was_reached(&env, "max_connections"));
    drop(both);
    wait_for("room for a client", || {
        let mut client = client(&env);
        ask(&mut client, true);
        let answer = read_to(&mut client, "\r\n\r\n");
        if answer.starts_with("HTTP/1.1 200") {
            Ok(())
        } else {
            Err(answer)
        }
    });
}

#[test]
fn slow_connections_do_not_block_health_checks() {
    let env = TestEnv::new();
    let _engines = Engines::start(&env, &[]);
    let _proxy = proxy(&env, &["--set", "clients.max_connections=6"]);
    let mut held: Vec<TcpStream> = (0..200).map(|_| client(&env)).collect();
    for (index, slow) in held.iter_mut().enumerate() {
        let sent: &[u8] = match index % 3 {
            0 => b"GET /health HTTP/1.1\r\nHos",
            1 => b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{",
            _ => b"",
        };
        // The closed connections can be gone by now.
        drop(slow.write_all(sent));
    }
    assert!(health(&env).starts_with("HTTP/1.1 200"));
    assert!(get(env.proxy_port(), "/metrics").contains("xpyd_client_connections"));
}

#[test]
fn the_limit_per_address_is_enforced() {
    let env = TestEnv::new();
    let _engines = Engines::start(&env, &[]);
    let _proxy = proxy(&env, &["--set", "clients.max_per_address=1"]);
    let mut first = client(&env);
    complete(&mut first);
    let mut second = client(&env);
    assert_refused(&mut second, "too_many_connections");
    assert!(health(&env).starts_with("HTTP/1.1 200"));
    complete(&mut first);
    assert!(limit_was_reached(&env, "max_per_address"));
}
