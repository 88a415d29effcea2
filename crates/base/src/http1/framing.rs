//! The body framing of an HTTP/1.1 answer (RFC 9112 §6): where its bytes are, and where it ends.
//!
//! Pure: works on bytes that were read and reads none.

use std::io;

use axum::http::header::{self, HeaderName};
use axum::http::{HeaderMap, Method, StatusCode};
use bytes::{Buf as _, Bytes, BytesMut};
use memchr::memchr;

/// Maximum length of a line between chunks: a size with its extensions, or a trailer.
const MAX_LINE_BYTES: usize = 4 << 10;

/// The part of a body that is still to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// This many bytes.
    Length(u64),
    /// Chunks, each with its size.
    Chunked(ChunkPart),
    /// Everything until the connection ends.
    ToClose,
    /// Nothing: the body has ended.
    Ended,
}

/// The next part of a chunked body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkPart {
    /// The line with a chunk's size.
    Size,
    /// This many bytes of a chunk.
    Data(u64),
    /// The line end after a chunk.
    DataEnd,
    /// Trailers, up to an empty line. They are dropped.
    Trailers,
}

/// The next step of reading a body.
#[derive(Debug, PartialEq, Eq)]
pub enum BodyStep {
    /// A piece of the body.
    Data(Bytes),
    /// More must be read.
    More,
    /// The end of the body.
    End,
}

/// The error of an answer that breaks the protocol.
pub(crate) fn protocol_error(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Whether a list header contains this word.
pub(crate) fn header_contains(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .any(|found| found.trim().eq_ignore_ascii_case(word))
}

impl Framing {
    /// The framing by an answer's header, and whether the connection can be used again after it.
    ///
    /// # Errors
    /// When the header gives no clear length of the body.
    pub fn of(method: &Method, status: StatusCode, headers: &HeaderMap) -> io::Result<(Self, bool)> {
        if *method == Method::HEAD || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
            return Ok((Self::Ended, true));
        }
        let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
        let length = lengths.next();
        if headers.contains_key(header::TRANSFER_ENCODING) {
            let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
            let is_chunked = codings
                .next()
                .is_some_and(|coding| coding.as_bytes().eq_ignore_ascii_case(b"chunked"));
            if !is_chunked || codings.next().is_some() {
                return Err(protocol_error(
                    "unsupported transfer coding: only `chunked` is supported",
                ));
            }
            return Ok((Self::Chunked(ChunkPart::Size), length.is_none()));
        }
        let Some(length) = length else {
            return Ok((Self::ToClose, false));
        };
        if lengths.any(|other| other != length) {
            return Err(protocol_error("conflicting `Content-Length` headers"));
        }
        let length = number(length.as_bytes(), 10).ok_or_else(|| protocol_error("invalid `Content-Length`"))?;
        Ok((Self::Length(length), true))
    }

    /// Takes the next step out of the bytes that were read.
    ///
    /// # Errors
    /// When the body breaks its framing.
    pub fn take(&mut self, read: &mut BytesMut) -> io::Result<BodyStep> {
        loop {
            match self {
                Self::Ended => return Ok(BodyStep::End),
                Self::Length(0) => *self = Self::Ended,
                Self::ToClose | Self::Length(_) | Self::Chunked(ChunkPart::Data(_)) if read.is_empty() => {
                    return Ok(BodyStep::More);
                }
                Self::ToClose => return Ok(BodyStep::Data(read.split().freeze())),
                Self::Length(left) => return Ok(BodyStep::Data(up_to(left, read))),
                Self::Chunked(ChunkPart::Data(left)) => {
                    let data = up_to(left, read);
                    if *left == 0 {
                        *self = Self::Chunked(ChunkPart::DataEnd);
                    }
                    return Ok(BodyStep::Data(data));
                }
                Self::Chunked(part) => {
                    let Some(line) = line(read)? else {
                        return Ok(BodyStep::More);
                    };
                    *part = match part {
                        ChunkPart::Size => {
                            match chunk_size(&line).ok_or_else(|| protocol_error("invalid chunk size"))? {
                                0 => ChunkPart::Trailers,
                                size => ChunkPart::Data(size),
                            }
                        }
                        ChunkPart::DataEnd if line.is_empty() => ChunkPart::Size,
                        ChunkPart::Trailers if line.is_empty() => {
                            *self = Self::Ended;
                            continue;
                        }
                        ChunkPart::Trailers => ChunkPart::Trailers,
                        ChunkPart::DataEnd | ChunkPart::Data(_) => {
                            return Err(protocol_error("chunk data exceeds the chunk size"));
                        }
                    };
                }
            }
        }
    }

    /// Takes the end of the body out of the bytes that were read, if nothing comes before it. Returns whether the
    /// body has ended. Broken framing is left to the next step.
    pub fn end(&mut self, read: &mut BytesMut) -> bool {
        match self {
            Self::Length(0) => *self = Self::Ended,
            // The last chunk has a line of its own and an empty one. Trailers are left to the next step.
            Self::Chunked(ChunkPart::DataEnd) if read.starts_with(b"\r\n0\r\n\r\n") => {
                read.advance(7);
                *self = Self::Ended;
            }
            Self::Chunked(ChunkPart::Size) if read.starts_with(b"0\r\n\r\n") => {
                read.advance(5);
                *self = Self::Ended;
            }
            _ => {}
        }
        matches!(self, Self::Ended)
    }

    /// Whether the body ends with the connection.
    pub fn ends_with_connection(self) -> bool {
        matches!(self, Self::ToClose | Self::Ended | Self::Length(0))
    }
}

/// Takes up to `left` bytes out of those that were read, and subtracts them.
fn up_to(left: &mut u64, read: &mut BytesMut) -> Bytes {
    let count = usize::try_from(*left).unwrap_or(usize::MAX).min(read.len());
    *left -= count as u64;
    read.split_to(count).freeze()
}

/// The next line, without its line end.
fn line(read: &mut BytesMut) -> io::Result<Option<BytesMut>> {
    match memchr(b'\n', read) {
        Some(end) => {
            let mut line = read.split_to(end + 1);
            line.truncate(end);
            if line.ends_with(b"\r") {
                line.truncate(end - 1);
            }
            Ok(Some(line))
        }
        None if read.len() > MAX_LINE_BYTES => Err(protocol_error("chunk header exceeds 4 KiB")),
        None => Ok(None),
    }
}

fn chunk_size(line: &[u8]) -> Option<u64> {
    let size = line.split(|byte| *byte == b';').next().unwrap_or_default();
    number(size.trim_ascii(), 16)
}

/// Parses a number of digits only. Rust would also accept a sign.
fn number(digits: &[u8], radix: u32) -> Option<u64> {
    let is_plain = digits.iter().all(|digit| char::from(*digit).is_digit(radix));
    let digits = std::str::from_utf8(digits).ok().filter(|_| is_plain)?;
    u64::from_str_radix(digits, radix).ok()
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn headers(pairs: &[(HeaderName, &'static str)]) -> HeaderMap {
        let pairs = pairs.iter().cloned();
        pairs
            .map(|(name, value)| (name, HeaderValue::from_static(value)))
            .collect()
    }

    fn of(pairs: &[(HeaderName, &'static str)]) -> Result<(Framing, bool), String> {
        Framing::of(&Method::POST, StatusCode::OK, &headers(pairs)).map_err(|error| error.to_string())
    }

    /// The body and whether it has ended, of bytes that come in these pieces.
    fn body(mut framing: Framing, pieces: &[&[u8]]) -> Result<(Vec<u8>, bool), String> {
        let (mut read, mut out) = (BytesMut::new(), Vec::new());
        for piece in pieces {
            read.extend_from_slice(piece);
            loop {
                match framing.take(&mut read).map_err(|error| error.to_string())? {
                    BodyStep::Data(data) => out.extend_from_slice(&data),
                    BodyStep::More => break,
                    BodyStep::End => return Ok((out, true)),
                }
            }
        }
        Ok((out, framing.ends_with_connection()))
    }

    #[test]
    fn the_head_says_how_the_body_is_framed() {
        use header::{CONTENT_LENGTH as LENGTH, TRANSFER_ENCODING as CODING};
        assert_eq!(of(&[]), Ok((Framing::ToClose, false)));
        assert_eq!(of(&[(LENGTH, "12")]), Ok((Framing::Length(12), true)));
        assert_eq!(of(&[(LENGTH, "12"), (LENGTH, "12")]), Ok((Framing::Length(12), true)));
        assert_eq!(
            of(&[(CODING, "Chunked")]),
            Ok((Framing::Chunked(ChunkPart::Size), true))
        );
        // A server that sends both could have been tricked into it: nothing that follows is trusted.
        let both = of(&[(CODING, "chunked"), (LENGTH, "3")]);
        assert_eq!(both, Ok((Framing::Chunked(ChunkPart::Size), false)));
        for wrong in [
            &[(LENGTH, "+1")][..],
            &[(LENGTH, "")],
            &[(LENGTH, "99999999999999999999")],
            &[(LENGTH, "1"), (LENGTH, "2")],
            &[(CODING, "gzip, chunked")],
            &[(CODING, "chunked"), (CODING, "chunked")],
        ] {
            assert!(of(wrong).is_err(), "{wrong:?}");
        }
        let length = headers(&[(LENGTH, "12")]);
        let head = Framing::of(&Method::HEAD, StatusCode::OK, &length);
        assert_eq!(head.expect("no body"), (Framing::Ended, true));
    }

    #[test]
    fn the_end_is_seen_where_it_has_been_read() {
        let end = |mut framing: Framing, text: &str| {
            let mut read = BytesMut::from(text);
            (framing.end(&mut read), String::from_utf8(read.to_vec()).expect("text"))
        };
        let part = Framing::Chunked;
        for (framing, text, is_over, left) in [
            (Framing::Length(0), "x", true, "x"),
            (Framing::Ended, "x", true, "x"),
            (Framing::Length(1), "", false, ""),
            (Framing::ToClose, "", false, ""),
            (part(ChunkPart::DataEnd), "\r\n0\r\n\r\nx", true, "x"),
            (part(ChunkPart::Size), "0\r\n\r\n", true, ""),
            (part(ChunkPart::DataEnd), "\r\n0\r\n\r", false, "\r\n0\r\n\r"),
            (part(ChunkPart::DataEnd), "\r\n1\r\nx", false, "\r\n1\r\nx"),
            (
                part(ChunkPart::Size),
                "0\r\nx-sum: 1\r\n\r\n",
                false,
                "0\r\nx-sum: 1\r\n\r\n",
            ),
        ] {
            assert_eq!(end(framing, text), (is_over, left.to_owned()), "{framing:?} {text:?}");
        }
    }

    #[test]
    fn chunks_may_have_extensions_and_trailers() {
        let text = b"4;name=\"x\"\r\nWiki\r\n6 \r\npedia \r\n0A\nin chunks.\r\n0\r\nx-checksum: 1\r\n\r\n";
        assert_eq!(
            body(Framing::Chunked(ChunkPart::Size), &[text]),
            Ok((b"Wikipedia in chunks.".to_vec(), true))
        );
    }

    #[test]
    fn broken_framing_fails_and_a_cut_body_has_not_ended() {
        let chunked = Framing::Chunked(ChunkPart::Size);
        for wrong in [
            &b"x\r\n"[..],
            b"\r\n",
            b"-1\r\n",
            b"3\r\nabcd\r\n",
            b"11111111111111111\r\n",
            &[b'1'; 5000],
        ] {
            assert!(body(chunked, &[wrong]).is_err(), "{}", String::from_utf8_lossy(wrong));
        }
        for short in [&b"5\r\nab"[..], b"5\r\nabcde\r\n", b"0\r\n", b""] {
            assert!(!body(chunked, &[short]).expect("well-framed so far").1);
        }
        assert_eq!(body(Framing::Length(5), &[b"abc"]), Ok((b"abc".to_vec(), false)));
        assert_eq!(body(Framing::ToClose, &[b"abc"]), Ok((b"abc".to_vec(), true)));
    }

    proptest! {
        #[test]
        fn any_way_of_arriving_gives_the_same_body(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..6),
            cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..12),
            chunked: bool,
        ) {
            let expected = chunks.concat();
            let (framing, sent) = if chunked {
                let mut sent = Vec::new();
                for chunk in &chunks {
                    sent.extend(format!("{:x}\r\n", chunk.len()).into_bytes());
                    sent.extend_from_slice(chunk);
                    sent.extend(b"\r\n");
                }
                sent.extend(b"0\r\n\r\n");
                (Framing::Chunked(ChunkPart::Size), sent)
            } else {
                (Framing::Length(expected.len() as u64), expected.clone())
            };
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(sent.len() + 1)).collect();
            cuts.extend([0, sent.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &sent[pair[0]..pair[1]]).collect();
            prop_assert_eq!(body(framing, &pieces), Ok((expected, true)));
        }
    }
}
