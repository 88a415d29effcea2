//! Tests of refused headers and chunks, and that hyper gets everything else byte for byte, however it is cut.

use std::collections::VecDeque;

use proptest::prelude::*;
use tokio::io::AsyncReadExt;

use super::*;

fn refusal(head: &str) -> Option<HeadRefusal> {
    match check(head.as_bytes()) {
        HeadCheck::Refused(refusal) => Some(refusal),
        HeadCheck::Head(..) => None,
        other => panic!("{head:?}: {other:?}"),
    }
}

fn post(headers: &str) -> String {
    format!("POST / HTTP/1.1\r\nHost: x\r\n{headers}\r\n")
}

#[test]
fn ambiguous_lengths_are_refused() {
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
        assert_eq!(refusal(&post(headers)), Some(HeadRefusal::Framing), "{headers}");
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
        assert_eq!(refusal(&post(&headers)), Some(HeadRefusal::Coding), "{coding}");
    }
    for headers in ["", "Content-Length: 007\r\n", "tRaNsFer-encoding:\tChunked \r\n"] {
        assert_eq!(refusal(&post(headers)), None, "{headers}");
    }
}

#[test]
fn hosts_expectations_and_versions_are_checked() {
    let get = |rest: &str| refusal(&format!("GET / HTTP/1.{rest}\r\n\r\n"));
    for (rest, expected) in [
        ("1", Some(HeadRefusal::Host)),
        ("0", None),
        ("1\r\nHost: a\r\nHost: a", Some(HeadRefusal::Host)),
        ("0\r\nHost: a\r\nHost: a", Some(HeadRefusal::Host)),
        ("1\r\nHost:", Some(HeadRefusal::Host)),
        ("1\r\nHost: a b", Some(HeadRefusal::Host)),
        ("1\r\nHost: u@a", Some(HeadRefusal::Host)),
        ("1\r\nHost: a/b", Some(HeadRefusal::Host)),
        ("1\r\nHost: [::1]:8000", None),
        ("1\r\nHost: my_host.example:80", None),
        ("1\r\nHost: a\r\nExpect: foo", Some(HeadRefusal::Expectation)),
        ("1\r\nHost: a\r\nExpect: 100-Continue", None),
        ("2\r\nHost: a", Some(HeadRefusal::Version)),
    ] {
        assert_eq!(get(rest), expected, "{rest}");
    }
    assert_eq!(
        check(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        HeadCheck::Refused(HeadRefusal::Version)
    );
    assert_eq!(check(b"GET /health\r\n"), HeadCheck::Malformed);
}

#[test]
fn chunks_end_at_their_size_or_break_at_the_wrong_byte() {
    for (body, expected) in [
        ("3\r\nabc\r\n0\r\n\r\nGET", ChunkScan::Ended(13)),
        ("3;a=b\r\nabc\r\n0;x\r\n\r\n", ChunkScan::Ended(19)),
        ("3 \r\nabc\r\n0\r\nT: t\r\n\r\n", ChunkScan::Ended(20)),
        ("3\r\nabc\r\n0\r\n", ChunkScan::More),
        ("3\nabc", ChunkScan::Malformed(1)),
        ("3;\nabc", ChunkScan::Malformed(2)),
        ("0x3\r\n", ChunkScan::Malformed(1)),
        ("-3\r\n", ChunkScan::Malformed(0)),
        ("\r\n", ChunkScan::Malformed(0)),
        ("2\r\nabc\r\n", ChunkScan::Malformed(5)),
        ("ffffffffffffffff\r\n", ChunkScan::Malformed(15)),
        ("0\r\n\n", ChunkScan::Malformed(3)),
        ("0\r\nT: t\n\r\n", ChunkScan::Malformed(7)),
    ] {
        assert_eq!(ChunkScanner::new().scan(body.as_bytes()), expected, "{body}");
    }
}

/// A stream whose reads return these pieces, then its end.
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

/// The bytes that hyper reads if they come in these pieces.
fn read(pieces: &[&[u8]]) -> (Vec<u8>, Option<io::ErrorKind>) {
    let pieces = pieces
        .iter()
        .filter(|piece| !piece.is_empty())
        .map(|piece| piece.to_vec());
    let mut strict = StrictStream::new(Pieces(pieces.collect()));
    let mut all = Vec::new();
    let read = async {
        // The refused header is the last thing hyper reads, and the connection stays open.
        while !matches!(strict.state, StreamState::Refused) || !strict.next.is_empty() {
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
    fn good_requests_pass_unchanged_and_a_bad_head_is_replaced(
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
            expected.extend_from_slice(&HeadRefusal::Framing.head());
        }
        prop_assert_eq!(String::from_utf8_lossy(&got), String::from_utf8_lossy(&expected));
        prop_assert_eq!(failed, None);
    }
}

#[test]
fn a_broken_chunk_fails_the_body() {
    let head = post("Transfer-Encoding: chunked\r\n");
    let body = b"3\r\nabc\n0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n";
    let (got, failed) = read(&[head.as_bytes(), body]);
    assert_eq!(got, [head.as_bytes(), b"3\r\nabc"].concat());
    assert_eq!(failed, Some(io::ErrorKind::InvalidData));
}

#[test]
fn non_http_is_left_to_hyper() {
    for sent in [&b"\x16\x03\x01\x02\x00\x01"[..], b"GET / HTTP/1.1\r\nHo"] {
        assert_eq!(read(&[sent]), (sent.to_vec(), None));
    }
}

#[test]
fn a_head_over_the_limit_is_refused() {
    let line = "GET /".to_owned() + &"b".repeat(MAX_HEAD_BYTES);
    let head = "GET / HTTP/1.1\r\nHost: x\r\na: ".to_owned() + &"b".repeat(MAX_HEAD_BYTES);
    for (sent, refusal) in [(line, HeadRefusal::Line), (head, HeadRefusal::Head)] {
        let (got, failed) = read(&sent.as_bytes().chunks(8192).collect::<Vec<_>>());
        assert_eq!(
            (String::from_utf8_lossy(&got), failed),
            (String::from_utf8_lossy(&refusal.head()), None)
        );
    }
}
