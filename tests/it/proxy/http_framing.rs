//! Invalid and ambiguous HTTP/1.1 requests as raw bytes: the statuses of the responses, and whether the connection closes.
//! Where RFC 9112 leaves a choice, the proxy behaves like nginx.

use std::io::{ErrorKind, Read, Write};

use super::raw_client::{Engines, client, proxy, read_to};
use crate::support::TestEnv;

const BODY: &str = r#"{"model":"m","prompt":"p"}"#;

/// A second request, which must get no response if the end of the first one is ambiguous.
const SECOND: &str = "GET /second HTTP/1.1\r\nHost: x\r\n\r\n";

/// The statuses of all responses, and then `close` if the proxy closes the connection.
///
/// A last valid request shows what happened, so that the test never waits for a response that does not come.
fn statuses(env: &TestEnv, sent: &[u8]) -> String {
    let mut client = client(env);
    // The proxy can close the connection before the rest is written.
    drop(client.write_all(sent));
    drop(client.write_all(b"GET /last HTTP/1.1\r\nHost: x\r\n\r\n"));
    let mut read = Vec::new();
    let mut chunk = [0; 4096];
    let is_closed = loop {
        match client.read(&mut chunk) {
            Ok(0) => break true,
            Ok(count) => read.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => break true,
            Err(error) => panic!("{error} after {}", String::from_utf8_lossy(&read)),
        }
        if String::from_utf8_lossy(&read).contains("/last") {
            break false;
        }
    };
    let text = String::from_utf8_lossy(&read);
    let mut found: Vec<&str> = text
        .match_indices("HTTP/1.")
        .filter_map(|(at, _)| text.get(at + 9..at + 12))
        .filter(|status| status.bytes().all(|byte| byte.is_ascii_digit()))
        .collect();
    if is_closed {
        found.push("close");
    } else {
        found.pop();
    }
    found.join(" ")
}

fn post(headers: &str, body: &str) -> String {
    format!("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{headers}\r\n{body}{SECOND}")
}

fn chunked(body: &str) -> String {
    post("Transfer-Encoding: chunked\r\n", body)
}

fn get(rest: &str) -> String {
    format!("GET /health HTTP/1.1\r\n{rest}\r\n")
}

/// The requests, and the expected statuses.
#[expect(clippy::too_many_lines, reason = "a table reads best in one piece")]
fn table() -> Vec<(&'static str, String, &'static str)> {
    let length = BODY.len();
    let exact = format!("Content-Length: {length}\r\n");
    let chunk = format!("{length:x}\r\n{BODY}\r\n0\r\n\r\n");
    let coding = |value: &str| post(&format!("Transfer-Encoding:{value}\r\n"), &chunk);
    let sized = |value: &str| post(&format!("Content-Length:{value}\r\n"), BODY);
    let first_chunk = |line: &str| chunked(&format!("{line}{BODY}\r\n0\r\n\r\n"));
    let mut table = vec![
        // Content-Length.
        ("one length", post(&exact, BODY), "200 404"),
        (
            "leading zeros",
            sized(&format!(" 000000000000000000000000{length}")),
            "200 404",
        ),
        ("two equal lengths", post(&exact.repeat(2), BODY), "400 close"),
        ("a list of lengths", sized(&format!(" {length}, {length}")), "400 close"),
        ("a sign", sized(&format!(" +{length}")), "400 close"),
        ("a hexadecimal length", sized(" 0x10"), "400 close"),
        ("an empty length", sized(""), "400 close"),
        ("2^63", sized(" 9223372036854775808"), "400 close"),
        ("2^64", sized(" 18446744073709551616"), "400 close"),
        (
            "a space before the colon",
            post(&format!("Content-Length : {length}\r\n"), BODY),
            "400 close",
        ),
        // Content-Length with Transfer-Encoding.
        (
            "length, coding",
            post("Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", &chunk),
            "400 close",
        ),
        (
            "coding, length",
            post("Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", &chunk),
            "400 close",
        ),
        // Transfer codings.
        ("chunked", coding(" chunked"), "200 404"),
        ("Chunked after a tab", coding("\tChunked"), "200 404"),
        ("a vertical tab", coding(" chunked\x0b"), "400 close"),
        ("an unknown coding", coding(" xchunked"), "501 close"),
        ("identity", coding(" identity"), "501 close"),
        ("identity, chunked", coding(" identity, chunked"), "501 close"),
        ("gzip, chunked", coding(" gzip, chunked"), "501 close"),
        ("chunked, chunked", coding(" chunked, chunked"), "501 close"),
        ("a parameter", coding(" chunked;q=1"), "501 close"),
        ("no coding", coding(""), "501 close"),
        ("a list that begins with nothing", coding(" ,chunked"), "501 close"),
        ("a folded line", coding("\r\n chunked"), "400 close"),
        (
            "two lines",
            coding(" chunked\r\nTransfer-Encoding: chunked"),
            "400 close",
        ),
        (
            "cow and chunked",
            coding(" cow\r\nTransfer-Encoding: chunked"),
            "400 close",
        ),
        (
            "chunks in HTTP/1.0",
            coding(" chunked").replacen("1.1", "1.0", 1),
            "400 close",
        ),
        // Chunks.
        ("an extension", first_chunk(&format!("{length:x};a=b\r\n")), "200 404"),
        (
            "a space after the size",
            first_chunk(&format!("{length:x} \r\n")),
            "200 404",
        ),
        (
            "a trailer",
            chunked(&format!("{length:x}\r\n{BODY}\r\n0\r\nContent-Length: 5\r\n\r\n")),
            "200 404",
        ),
        ("LF after the size", first_chunk(&format!("{length:x}\n")), "400 close"),
        (
            "LF after an extension",
            first_chunk(&format!("{length:x};\n")),
            "400 close",
        ),
        (
            "a quoted end of line",
            first_chunk(&format!("{length:x};a=\"\r\n\"\r\n")),
            "400 close",
        ),
        (
            "0x before the size",
            first_chunk(&format!("0x{length:x}\r\n")),
            "400 close",
        ),
        ("a negative size", first_chunk(&format!("-{length:x}\r\n")), "400 close"),
        ("a size of 2^64", first_chunk("10000000000000000\r\n"), "400 close"),
        ("a size of 2^64-1", first_chunk("ffffffffffffffff\r\n"), "400 close"),
        (
            "more data than the size",
            first_chunk(&format!("{:x}\r\n", length - 3)),
            "400 close",
        ),
        (
            "no end of line after data",
            chunked(&format!("{length:x}\r\n{BODY}0\r\n\r\n")),
            "400 close",
        ),
        // Request line and headers.
        ("no Host", get(""), "400 close"),
        ("two Hosts", get("Host: a\r\nHost: b\r\n"), "400 close"),
        ("an odd Host", get("Host: a b/c@d\r\n"), "400 close"),
        ("an empty Host", get("Host:\r\n"), "400 close"),
        ("HTTP/1.0 without Host", get("").replace("1.1", "1.0"), "200 close"),
        (
            "an absolute form",
            get("Host: x\r\n").replace("/health", "http://other.example/health"),
            "200",
        ),
        ("an unknown expectation", get("Host: x\r\nExpect: foo\r\n"), "417 close"),
        (
            "100-continue",
            post(&format!("{exact}Expect: 100-continue\r\n"), BODY),
            "100 200 404",
        ),
        ("HTTP/1.2", get("Host: x\r\n").replace("1.1", "1.2"), "505 close"),
        ("HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), "505 close"),
        ("HTTP/0.9", "GET /health\r\n".to_owned(), "400 close"),
        ("a folded header", get("Host: x\r\nA: b\r\n c\r\n"), "400 close"),
        ("NUL in a header", get("Host: x\r\nA: b\0c\r\n"), "400 close"),
        ("CR in a header", get("Host: x\r\nA: b\rc\r\n"), "400 close"),
        // Like nginx: RFC 9112 §2.2 allows a recipient to accept a bare LF in a header section.
        ("LF alone", get("Host: x\r\n").replace('\r', ""), "200"),
        (
            "empty lines before",
            format!("\r\n\r\n\r\n{}", get("Host: x\r\n")),
            "200",
        ),
        (
            "TLS",
            "\x16\x03\x01\x02\0\x01\0\x01".to_owned() + &"\0".repeat(500),
            "400 close",
        ),
        (
            "a method in lower case",
            get("Host: x\r\n").replace("GET", "get"),
            "405",
        ),
        ("TRACE", get("Host: x\r\n").replace("GET", "TRACE"), "405"),
        (
            "CONNECT",
            "CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
            "404",
        ),
        (
            "101 headers",
            get(&format!("Host: x\r\n{}", "a: b\r\n".repeat(100))),
            "431 close",
        ),
        (
            "a head of 70 KiB",
            get(&format!("Host: x\r\na: {}\r\n", "b".repeat(70_000))),
            "431 close",
        ),
    ];
    table.push(("a thousand at once", get("Host: x\r\n").repeat(1000), ""));
    table
}

#[test]
fn ambiguous_framing_closes_the_connection() {
    let env = TestEnv::new();
    let _engines = Engines::start(&env, &[]);
    let _proxy = proxy(&env, &[]);
    let mut wrong = Vec::new();
    for (name, sent, expected) in table() {
        let found = statuses(&env, sent.as_bytes());
        let is_right = match name {
            "a thousand at once" => found.split(' ').count() == 1000 && found.split(' ').all(|status| status == "200"),
            _ => found == expected,
        };
        if !is_right {
            wrong.push(format!("{name}: {found:.80}, expected {expected}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn framing_errors_have_openais_shape() {
    let env = TestEnv::new();
    let _engines = Engines::start(&env, &[]);
    let _proxy = proxy(&env, &[]);
    for (sent, code) in [
        (get(""), "invalid_host"),
        (get("Host: x\r\nx-xpyd-refused: invalid_host\r\n"), "invalid_host"),
        (chunked("5\nhello"), "malformed_body"),
    ] {
        let mut client = client(&env);
        client.write_all(sent.as_bytes()).expect("the connection is open");
        let text = read_to(&mut client, "}}");
        assert!(text.contains(&format!("\"code\":\"{code}\"")), "{text}");
    }
}
