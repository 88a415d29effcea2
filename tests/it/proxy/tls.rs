//! TLS of the proxy: responses, versions, failed handshakes, and invalid certificate files.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

use nix::sys::signal::Signal;
use rcgen::{CertificateParams, CertifiedKey, KeyPair, date_time_ymd, generate_simple_self_signed};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, ProtocolVersion, RootCertStore, StreamOwned};
use tokio_rustls::rustls::{SupportedProtocolVersion, version};

use super::raw_client::{ENDLESS, Engines, ask, client, complete, is_closed, proxy, read_to, small_buffer_client};
use crate::support::{MODEL, TestEnv, wait_for};

/// The files that [`certify`] writes.
const FILES: [&str; 4] = ["--tls-cert", "cert.pem", "--tls-key", "key.pem"];

/// Creates a certificate for `localhost` in the test environment, and returns its key.
fn certify(env: &TestEnv) -> String {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).expect("a name");
    let key = signing_key.serialize_pem();
    std::fs::write(env.path().join("cert.pem"), cert.pem()).expect("a file");
    std::fs::write(env.path().join("key.pem"), &key).expect("a file");
    key
}

/// A TLS client on this connection that trusts only the certificate of the test environment.
fn tls_client_over(stream: TcpStream, env: &TestEnv, version: &'static SupportedProtocolVersion) -> Client {
    let mut roots = RootCertStore::empty();
    let cert = CertificateDer::from_pem_file(env.path().join("cert.pem")).expect("a certificate");
    roots.add(cert).expect("a certificate");
    let mut config = ClientConfig::builder_with_protocol_versions(&[version])
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let name = ServerName::try_from("localhost").expect("a name");
    let session = ClientConnection::new(Arc::new(config), name).expect("a session");
    StreamOwned::new(session, stream)
}

type Client = StreamOwned<ClientConnection, TcpStream>;

fn tls_client(env: &TestEnv) -> Client {
    tls_client_over(client(env), env, &version::TLS13)
}

/// Sends a request on its own connection, and returns the whole response.
fn exchange(env: &TestEnv, head: &str, body: &str) -> String {
    let mut client = tls_client(env);
    let length = body.len();
    write!(
        client,
        "{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .expect("a request is taken");
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("an answer to its end");
    answer
}

fn generate(env: &TestEnv, stream: bool) -> String {
    let body = serde_json::json!({"model": MODEL, "prompt": "one two", "max_tokens": 3, "stream": stream});
    exchange(env, "POST /v1/completions", &body.to_string())
}

/// Checks that no file below the folder except `key.pem` contains the text, and returns the number of checked files.
fn assert_in_no_file(folder: &Path, text: &str) -> usize {
    let mut files = 0;
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            files += assert_in_no_file(&path, text);
        } else if path.file_name().is_some_and(|name| name != "key.pem")
            && let Ok(content) = std::fs::read(&path)
        {
            let holds = String::from_utf8_lossy(&content).contains(text);
            assert!(!holds, "{} holds the key", path.display());
            files += 1;
        }
    }
    files
}

#[test]
fn a_fleet_serves_tls_and_logs_no_private_key() {
    let env = TestEnv::new();
    let key = certify(&env);
    let mut run = env.up(&[&["--profile", "1p1d"][..], &FILES].concat());
    let url = format!("https://127.0.0.1:{}", env.proxy_port());
    run.wait_until_ready();
    run.wait_for_line(&format!("{url}/v1 "));

    let whole = generate(&env, false);
    assert!(
        whole.starts_with("HTTP/1.1 200") && whole.contains(r#""completion_tokens":3"#),
        "{whole}"
    );
    let streamed = generate(&env, true);
    assert!(streamed.starts_with("HTTP/1.1 200"), "{streamed}");
    assert!(
        streamed.contains("text/event-stream") && streamed.contains("data: [DONE]\n\n"),
        "{streamed}"
    );

    let shown = env.run(&["status", "--json"]).stdout;
    let status: serde_json::Value = serde_json::from_slice(&shown).expect("JSON");
    assert_eq!(status["run"]["proxy_url"], url.as_str());
    let planned = env
        .run(&[&["plan", "--engine", "sim", "--profile", "1p1d"][..], &FILES].concat())
        .stdout;
    let planned = String::from_utf8_lossy(&planned).into_owned();
    assert!(planned.contains("proxy      https://"), "{planned}");
    let bench = env.run(&["bench"]);
    let error = String::from_utf8_lossy(&bench.stderr).into_owned();
    assert_eq!(bench.status.code(), Some(2), "{error}");
    assert!(
        error.contains(&url) && error.contains("`--insecure` to trust any"),
        "{error}"
    );

    run.signal(Signal::SIGINT);
    let (code, printed) = run.end();
    assert_eq!(code, 0, "{printed}");
    let secret = key.lines().nth(1).expect("a line of the key");
    assert!(env.log("plan.json").contains("key.pem"), "the plan names the file");
    assert!(assert_in_no_file(env.path(), secret) > 0, "no file was checked");
    let said = printed + &planned + &error + &String::from_utf8_lossy(&shown);
    assert!(!said.contains(secret), "{said}");
}

#[test]
fn tls_1_2_and_1_3_work_with_http_1_only() {
    let env = TestEnv::new();
    certify(&env);
    let _engines = Engines::start(&env, &[]);
    let mut proxy = proxy(&env, &FILES);
    assert!(
        proxy.seen.join("\n").contains(" on https://127.0.0.1:"),
        "{:?}",
        proxy.seen
    );
    for (wanted, version) in [
        (&version::TLS12, ProtocolVersion::TLSv1_2),
        (&version::TLS13, ProtocolVersion::TLSv1_3),
    ] {
        let mut client = tls_client_over(client(&env), &env, wanted);
        complete(&mut client);
        complete(&mut client);
        assert_eq!(client.conn.protocol_version(), Some(version));
        assert_eq!(client.conn.alpn_protocol(), Some(&b"http/1.1"[..]));
    }
    proxy.kill();
}

#[test]
fn unfinished_handshakes_and_plain_http_are_disconnected() {
    let env = TestEnv::new();
    certify(&env);
    let _engines = Engines::start(&env, &[]);
    let deadline = ["--set", "clients.idle_deadline=3s"];
    let _proxy = proxy(&env, &[&FILES[..], &deadline].concat());
    let mut silent = client(&env);
    let mut half = client(&env);
    // The header of a TLS record that announces a ClientHello of 512 bytes.
    half.write_all(b"\x16\x03\x01\x02\x00\x01")
        .expect("the connection is open");
    let mut plain = client(&env);
    ask(&mut plain, false);
    complete(&mut tls_client(&env));
    assert!(is_closed(&mut silent) && is_closed(&mut half));
    let mut answer = Vec::new();
    // Data that the proxy has not read can end the connection with a reset.
    drop(plain.read_to_end(&mut answer));
    assert!(!String::from_utf8_lossy(&answer).contains("HTTP"), "{answer:?}");
    assert!(is_closed(&mut plain));
}

#[test]
fn a_stalled_tls_client_is_disconnected() {
    let env = TestEnv::new();
    certify(&env);
    let _engines = Engines::start(&env, ENDLESS);
    let deadline = ["--decode-idle-deadline", "1s"];
    let _proxy = proxy(&env, &[&FILES[..], &deadline].concat());
    let mut stopped = tls_client_over(small_buffer_client(&env), &env, &version::TLS13);
    ask(&mut stopped, true);
    read_to(&mut stopped, "data: ");
    wait_for("the end of the request", || {
        let metrics = exchange(&env, "GET /metrics", "");
        let is_so = metrics.contains("\nxpyd_requests_in_flight 0\n");
        if is_so { Ok(()) } else { Err(metrics) }
    });
}

#[test]
fn unusable_tls_files_are_refused_before_the_start() {
    let env = TestEnv::new();
    certify(&env);
    let write = |name: &str, content: &str| std::fs::write(env.path().join(name), content).expect("a file");
    write("other.pem", &KeyPair::generate().expect("a key").serialize_pem());
    write("empty.pem", "");
    write(
        "broken.pem",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    );
    let cases: [(&[&str], [&str; 2]); 8] = [
        (&["--tls-cert", "cert.pem"], ["`tls_cert`", "`tls_key` is not set"]),
        (&["--tls-key", "key.pem"], ["`tls_key`", "`tls_cert` is not set"]),
        (
            &["--tls-cert", "nowhere", "--tls-key", "key.pem"],
            ["`tls_cert`", "`nowhere`"],
        ),
        (
            &["--tls-cert", "cert.pem", "--tls-key", "nowhere"],
            ["`tls_key`", "`nowhere`"],
        ),
        (
            &["--tls-cert", "empty.pem", "--tls-key", "key.pem"],
            ["`tls_cert`", "`empty.pem`"],
        ),
        (
            &["--tls-cert", "cert.pem", "--tls-key", "empty.pem"],
            ["`tls_key`", "`empty.pem`"],
        ),
        (
            &["--tls-cert", "cert.pem", "--tls-key", "other.pem"],
            ["`other.pem` is not the key of", "`cert.pem`"],
        ),
        (
            &["--tls-cert", "broken.pem", "--tls-key", "key.pem"],
            ["`tls_cert`", "`broken.pem`"],
        ),
    ];
    for verb in [&["up", "--engine", "sim"][..], &["proxy", "--connector", "nixl"]] {
        for (flags, expected) in &cases {
            let output = env.run(&[verb, flags].concat());
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(2), "{flags:?}: {error}");
            assert!(
                expected.iter().all(|part| error.contains(part)) && error.contains("hint:"),
                "{flags:?}: {error}"
            );
        }
    }
    assert!(!env.path().join("logs").exists(), "a run has begun");
}

#[test]
fn an_expired_certificate_is_reported() {
    let env = TestEnv::new();
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(["localhost".to_owned()]).expect("a name");
    params.not_before = date_time_ymd(2019, 1, 1);
    params.not_after = date_time_ymd(2020, 2, 3);
    let cert = params.self_signed(&key).expect("a certificate");
    std::fs::write(env.path().join("cert.pem"), cert.pem()).expect("a file");
    std::fs::write(env.path().join("key.pem"), key.serialize_pem()).expect("a file");
    let warning = "`tls_cert`: the certificate in `cert.pem` expired on 2020-02-03";
    let plan = env.run(&[&["plan", "--engine", "sim", "--profile", "1p1d"], FILES.as_slice()].concat());
    let printed = String::from_utf8_lossy(&plan.stdout)
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    assert!(printed.contains(warning), "{printed}");
    let _engines = Engines::start(&env, &[]);
    let proxy = proxy(&env, &FILES);
    let printed = proxy.seen.join("\n");
    assert!(printed.contains(warning), "{printed}");
}
