//! Heads and chunks that are refused, and that everything else reaches hyper byte for byte, however it is cut.

use std::collections::VecDeque;

use proptest::prelude::*;
use tokio::io::AsyncReadExt;

use super::*;

fn refusal(head: &str) -> Option<Refusal> {
    match check(head.as_bytes()) {
        Checked::Refused(refusal) => Some(refusal),
        Checked::Head(..) => None,
        other => panic!("{head:?}: {other:?}"),
    }
}

fn post(headers: &str) -> String {
    format!("POST / HTTP/1.1\r\nHost: x\r\n{headers}\r\n")
}

#[test]
fn lengths_that_can_be_read_in_two_ways_are_refused() {
    for headers in [
        "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\ncontent-length: 3\r\n",
        "Content-Length: 3\r\nContent-Length: 3\r\n",
        "Transfer-Encoding: cow\r\nTransfer-Encoding: chunked\r\n",
        "Content-Length: +3\r\n",
        "Content-Length: 3, 3\r\n",
        "Content-Length:\r\n",
        "Content-Length: 9223372036854775808\r\n",
    ] {
        assert_eq!(refusal(&post(headers)), Some(Refusal::Framing), "{headers}");
    }
    for coding in [
        "gzip, chunked",
        "chunked, chunked",
        "identity",
        "identity, chunked",
        "",
        "xchunked",
    ] {
        let headers = format!("Transfer-Encoding: {coding}\r\n");
        assert_eq!(refusal(&post(&headers)), Some(Refusal::Coding), "{coding}");
    }
    for headers in ["", "Content-Length: 007\r\n", "tRaNsFer-encoding:\tChunked \r\n"] {
        assert_eq!(refusal(&post(headers)), None, "{headers}");
    }
}

#[test]
fn hosts_expectations_and_versions_are_checked() {
    let get = |rest: &str| refusal(&format!("GET / HTTP/1.{rest}\r\n\r\n"));
    for (rest, expected) in [
        ("1", Some(Refusal::Host)),
        ("0", None),
        ("1\r\nHost: a\r\nHost: a", Some(Refusal::Host)),
        ("0\r\nHost: a\r\nHost: a", Some(Refusal::Host)),
        ("1\r\nHost:", Some(Refusal::Host)),
        ("1\r\nHost: a b", Some(Refusal::Host)),
        ("1\r\nHost: u@a", Some(Refusal::Host)),
        ("1\r\nHost: a/b", Some(Refusal::Host)),
        ("1\r\nHost: [::1]:8000", None),
        ("1\r\nHost: my_host.example:80", None),
        ("1\r\nHost: a\r\nExpect: foo", Some(Refusal::Expectation)),
        ("1\r\nHost: a\r\nExpect: 100-Continue", None),
        ("2\r\nHost: a", Some(Refusal::Version)),
    ] {
        assert_eq!(get(rest), expected, "{rest}");
    }
    assert_eq!(
        check(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        Checked::Refused(Refusal::Version)
    );
    assert_eq!(check(b"GET /health\r\n"), Checked::Malformed);
}

#[test]
fn chunks_end_where_they_say_and_break_at_the_first_wrong_byte() {
    for (body, expected) in [
        ("3\r\nabc\r\n0\r\n\r\nGET", Scanned::Ended(13)),
        ("3;a=b\r\nabc\r\n0;x\r\n\r\n", Scanned::Ended(19)),
        ("3 \r\nabc\r\n0\r\nT: t\r\n\r\n", Scanned::Ended(20)),
        ("3\r\nabc\r\n0\r\n", Scanned::More),
        ("3\nabc", Scanned::Malformed(1)),
        ("3;\nabc", Scanned::Malformed(2)),
        ("0x3\r\n", Scanned::Malformed(1)),
        ("-3\r\n", Scanned::Malformed(0)),
        ("\r\n", Scanned::Malformed(0)),
        ("2\r\nabc\r\n", Scanned::Malformed(5)),
        ("ffffffffffffffff\r\n", Scanned::Malformed(15)),
        ("0\r\n\n", Scanned::Malformed(3)),
        ("0\r\nT: t\n\r\n", Scanned::Malformed(7)),
    ] {
        assert_eq!(Chunks::new().scan(body.as_bytes()), expected, "{body}");
    }
}

/// A stream whose reads give these pieces, and then its end.
struct Pieces(VecDeque<Vec<u8>>);

impl AsyncRead for Pieces {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(mut piece) = self.0.pop_front() {
            let rest = piece.split_off(piece.len().min(buffer.remaining()));
            buffer.put_slice(&piece);
            if !rest.is_empty() {
                self.0.push_front(rest);
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// What hyper reads of bytes that come in these pieces.
fn read(pieces: &[&[u8]]) -> (Vec<u8>, Option<io::ErrorKind>) {
    let pieces = pieces
        .iter()
        .filter(|piece| !piece.is_empty())
        .map(|piece| piece.to_vec());
    let mut strict = Strict::new(Pieces(pieces.collect()));
    let mut all = Vec::new();
    let read = async {
        // A refused head is the last thing to be read, and leaves the connection open.
        while !matches!(strict.state, State::Refused) || !strict.next.is_empty() {
            let mut room = [0; 4096];
            match strict.read(&mut room).await {
                Ok(0) => return None,
                Ok(count) => all.extend_from_slice(&room[..count]),
                Err(error) => return Some(error.kind()),
            }
        }
        None
    };
    let failed = tokio_test::block_on(read);
    (all, failed)
}

const GOOD: &str = "POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello\r\nPOST /b HTTP/1.1\r\nHost: x\r\n\
    Transfer-Encoding: chunked\r\n\r\n3;e\r\nabc\r\n0\r\nT: t\r\n\r\nGET /c HTTP/1.1\r\nHost: x\r\n\r\n";

proptest! {
    #[test]
    fn good_requests_pass_byte_for_byte_and_a_bad_head_after_them_is_replaced(
        mut cuts in proptest::collection::vec(0..400_usize, 0..6),
        is_bad in any::<bool>(),
    ) {
        let bad = "POST /d HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /e";
        let sent = if is_bad { GOOD.to_owned() + bad } else { GOOD.to_owned() };
        cuts.sort_unstable();
        let mut pieces = Vec::new();
        let mut from = 0;
        for cut in cuts.into_iter().chain([sent.len()]) {
            let cut = cut.min(sent.len());
            pieces.push(&sent.as_bytes()[from..cut]);
            from = cut;
        }
        let (got, failed) = read(&pieces);
        let mut expected = GOOD.as_bytes().to_vec();
        if is_bad {
            expected.extend_from_slice(&Refusal::Framing.head());
        }
        prop_assert_eq!(String::from_utf8_lossy(&got), String::from_utf8_lossy(&expected));
        prop_assert_eq!(failed, None);
    }
}

#[test]
fn a_broken_chunk_ends_the_body_with_an_error_and_nothing_after_it_is_read() {
    let head = post("Transfer-Encoding: chunked\r\n");
    let body = b"3\r\nabc\n0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n";
    let (got, failed) = read(&[head.as_bytes(), body]);
    assert_eq!(got, [head.as_bytes(), b"3\r\nabc"].concat());
    assert_eq!(failed, Some(io::ErrorKind::InvalidData));
}

#[test]
fn what_is_no_http_is_left_to_hyper() {
    for sent in [&b"\x16\x03\x01\x02\x00\x01"[..], b"GET / HTTP/1.1\r\nHo"] {
        assert_eq!(read(&[sent]), (sent.to_vec(), None));
    }
}

#[test]
fn a_head_without_end_is_refused() {
    let line = "GET /".to_owned() + &"b".repeat(MAX_HEAD_BYTES);
    let head = "GET / HTTP/1.1\r\nHost: x\r\na: ".to_owned() + &"b".repeat(MAX_HEAD_BYTES);
    for (sent, refusal) in [(line, Refusal::Line), (head, Refusal::Head)] {
        let (got, failed) = read(&sent.as_bytes().chunks(8192).collect::<Vec<_>>());
        assert_eq!(
            (String::from_utf8_lossy(&got), failed),
            (String::from_utf8_lossy(&refusal.head()), None)
        );
    }
}
