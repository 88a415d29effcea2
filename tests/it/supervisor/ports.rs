//! Ports: reserved before the start, reported with their holder if taken, and used only by the engine itself.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};

use crate::support::{MODEL, TestEnv, completion, wait_for};

fn listen(port: u16) -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("a free port")
}

#[test]
fn the_holder_of_the_proxy_port_is_named() {
    for base in [9100, 7500] {
        let env = TestEnv::new();
        let _holder = listen(base + env.offset);
        let (code, text) = env.up(&["--profile", "1p1d"]).end();
        assert_eq!(code, 3, "{text}");
        let named = format!(":{}, in use by process {}", base + env.offset, std::process::id());
        assert!(text.contains(&named), "{text}");
        assert_eq!(env.processes(), []);
    }
}

#[test]
fn each_data_parallel_rank_reserves_its_side_channel() {
    let env = TestEnv::new();
    let two_ranks = "vllm.args=[\"--data-parallel-size\", \"2\"]";
    let arguments = ["--profile", "1p1d", "--connector", "nixl", "--set", two_ranks];
    let holder = listen(5601 + env.offset);
    let (code, text) = env.up(&arguments).end();
    assert_eq!(code, 3, "{text}");
    let named = format!(
        "port {} (nixl side channel, rank 1 of prefiller1) is taken by process {}",
        5601 + env.offset,
        std::process::id()
    );
    assert!(text.contains(&named), "{text}");
    drop(holder);

    let mut run = env.up(&arguments);
    run.wait_until_ready();
    for port in [5600, 5601, 5700, 5701] {
        let connected = std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port + env.offset));
        assert!(connected.is_ok(), "{port}: {connected:?}");
    }
    completion(env.proxy_port(), MODEL, "one two three");
    run.signal(nix::sys::signal::Signal::SIGTERM);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    env.assert_no_listener();
}

#[test]
fn a_foreign_program_on_an_engine_port_is_named() {
    let env = TestEnv::new();
    let mut run = env.up(&["--profile", "1p1d", "--set", "sim.faults=[\"slow-start=60s\"]"]);
    run.wait_for_line("logs in");
    // An engine binds its port before it starts workers.
    wait_for("workers", || {
        let processes = env.processes();
        let workers = processes.iter().filter(|(_, command)| command.contains("VLLM::Worker"));
        if workers.count() == 2 {
            Ok(())
        } else {
            Err(format!("{processes:#?}"))
        }
    });
    // The standard library sets SO_REUSEADDR, so the reservation does not block this listener, and the engine listens late.
    let port = 7200 + env.offset;
    let usurper = listen(port);
    std::thread::spawn(move || {
        for connection in usurper.incoming() {
            let mut connection = connection.expect("a connection");
            let mut request = [0; 1024];
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
            // The client can be gone by now.
            drop(connection.read(&mut request).and_then(|_| connection.write_all(answer)));
        }
    });
    let (code, text) = run.end();
    // The program still listens after the run, and xpyd reports it.
    assert_eq!(code, 7, "{text}");
    let named = format!(
        "decoder1 does not listen on port {port} (http): process {}",
        std::process::id()
    );
    assert!(text.contains(&named), "{text}");
    assert!(!text.contains("ready: every pair"), "{text}");
    assert_eq!(env.processes(), []);
}
