//! Connections of clients: stalled, slow, half-open, idle, and more than the descriptor limit.

use std::io::{ErrorKind, Read, Write};
use std::process::Stdio;
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::raw_client::{
    ENDLESS, Engines, arguments, ask, client, complete, connect, is_closed, proxy, read_to, small_buffer_client,
};
use crate::support::{TestEnv, Unsupervised, get, wait_for};

fn wait_until_in_flight(env: &TestEnv, count: u32) {
    wait_for("the requests in flight", || {
        let metrics = get(env.proxy_port(), "/metrics");
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
fn a_stalled_client_is_disconnected_after_the_deadline() {
    let env = TestEnv::new();
    let _engines = Engines::start(&env, ENDLESS);
    let _proxy = proxy(&env, &["--decode-idle-deadline", "1s"]);
    let mut stopped = small_buffer_client(&env);
    ask(&mut stopped, true);
    read_to(&mut stopped, "data: ");
    wait_until_in_flight(&env, 0);
}

#[test]
fn a_slow_client_keeps_being_served() {
    let env = TestEnv::new();
    let _engines = Engines::start(&env, ENDLESS);
    let _proxy = proxy(&env, &["--decode-idle-deadline", "6s"]);
    let mut slow = small_buffer_client(&env);
    ask(&mut slow, true);
    read_to(&mut slow, "data: ");
    let (_never, pause) = mpsc::channel::<()>();
    let mut chunk = [0; 16384];
    // The pauses add up to far more than the deadline.
    for _ in 0..16 {
        assert!(slow.read(&mut chunk).expect("the stream continues") > 0);
        assert!(
            pause.recv_timeout(Duration::from_millis(500)).is_err(),
            "nothing is sent"
        );
    }
    // More than all buffers between engine and client can hold.
    let mut left: usize = 32 << 20;
    while left > 0 {
        let count = slow.read(&mut chunk).expect("the stream continues");
        assert!(count > 0, "the stream was cut with {left} bytes to go");
        left = left.saturating_sub(count);
    }
    drop(slow);
    wait_until_in_flight(&env, 0);
}

#[test]
fn unfinished_headers_and_idle_connections_time_out() {
    let env = TestEnv::new();
    let _engines = Engines::start(&env, &[]);
    let _proxy = proxy(&env, &["--set", "clients.idle_deadline=4s"]);
    let mut half = client(&env);
    half.write_all(b"POST /v1/completions HTTP/1.1\r\nhos")
        .expect("the connection is open");
    assert!(is_closed(&mut half));
    let mut idle = client(&env);
    complete(&mut idle);
    complete(&mut idle);
    assert!(is_closed(&mut idle));
}

#[test]
fn shutdown_closes_idle_connections_and_finishes_responses() {
    let env = TestEnv::new();
    let _engines = Engines::start(&env, &["--null-events", "40", "--null-interval", "100ms"]);
    let proxy = proxy(&env, &["--set", "clients.threads=2"]);
    let mut idle = [client(&env), client(&env), client(&env)];
    idle.iter_mut().for_each(complete);
    let fresh = client(&env);
    let mut streaming = client(&env);
    ask(&mut streaming, true);
    let begun = read_to(&mut streaming, "data: ");
    assert!(!begun.contains("[DONE]"), "the stream is over before the stop");
    proxy.signal(Signal::SIGTERM);
    for mut connection in idle.into_iter().chain([fresh]) {
        assert!(is_closed(&mut connection));
    }
    let refused = wait_for("the end of the listener", || match connect(env.proxy_port()) {
        Ok(_) => Err("a client was accepted".to_owned()),
        Err(error) => Ok(error.kind()),
    });
    assert_eq!(refused, ErrorKind::ConnectionRefused);
    read_to(&mut streaming, "data: [DONE]\n\n");
    let (code, text) = proxy.end();
    assert_eq!(code, 0, "{text}");
}

#[test]
fn running_out_of_descriptors_breaks_nothing() {
    let env = TestEnv::new();
    let _engines = Engines::start(&env, &[]);
    let arguments = arguments(&env, &[]);
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "ulimit -n 160; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_xpyd")]);
    command.args(&arguments).current_dir(env.path()).stdin(Stdio::null());
    let _proxy = Unsupervised::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
    wait_for("the proxy", || {
        connect(env.proxy_port()).map_err(|error| error.to_string())
    });
    let mut clients = Vec::new();
    for _ in 0..200 {
        let mut client = client(&env);
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
    complete(&mut client(&env));
}
