//! How the body of an HTTP/1.1 answer is framed (RFC 9112 §6): where its bytes are, and where it ends.
//!
//! PURE: works on what was read and reads nothing.

use std::io;

use axum::http::header::{self, HeaderName};
use axum::http::{HeaderMap, Method, StatusCode};
use bytes::{Buf as _, Bytes, BytesMut};
use memchr::memchr;

/// Longest line between chunks: a size with its extensions, or a trailer.
const MAX_LINE_BYTES: usize = 4 << 10;

/// What is still to come of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    /// So many bytes.
    Length(u64),
    /// Chunks, each with its size.
    Chunked(Part),
    /// Everything until the connection ends.
    ToClose,
    /// Nothing.
    Ended,
}

/// The part of a chunked body that comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// The line with a chunk's size.
    Size,
    /// So many bytes of a chunk.
    Data(u64),
    /// The end of line after a chunk.
    DataEnd,
    /// Trailers, up to an empty line. They are dropped.
    Trailers,
}

/// What the bytes that were read hold.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// A piece of the body.
    Data(Bytes),
    /// Nothing yet: more has to be read.
    More,
    /// The end of the body.
    End,
}

/// The error of an answer that breaks the protocol.
pub(crate) fn nonsense(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Whether a header that is a list holds this word.
pub(crate) fn says(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .any(|found| found.trim().eq_ignore_ascii_case(word))
}

impl Framing {
    /// The framing that an answer's head tells, and whether the connection may be used again after it.
    ///
    /// # Errors
    /// When the head says how long the body is in a way that nobody can follow.
    pub(crate) fn of(method: &Method, status: StatusCode, headers: &HeaderMap) -> io::Result<(Self, bool)> {
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
                return Err(nonsense("its transfer coding is not `chunked`"));
            }
            return Ok((Self::Chunked(Part::Size), length.is_none()));
        }
        let Some(length) = length else {
            return Ok((Self::ToClose, false));
        };
        if lengths.any(|other| other != length) {
            return Err(nonsense("it has two lengths"));
        }
        let length = number(length.as_bytes(), 10).ok_or_else(|| nonsense("its length is no number"))?;
        Ok((Self::Length(length), true))
    }

    /// Takes the next step out of what was read.
    ///
    /// # Errors
    /// When the body breaks its framing.
    pub(crate) fn take(&mut self, read: &mut BytesMut) -> io::Result<Step> {
        loop {
            match self {
                Self::Ended => return Ok(Step::End),
                Self::Length(0) => *self = Self::Ended,
                Self::ToClose | Self::Length(_) | Self::Chunked(Part::Data(_)) if read.is_empty() => {
                    return Ok(Step::More);
                }
                Self::ToClose => return Ok(Step::Data(read.split().freeze())),
                Self::Length(left) => return Ok(Step::Data(up_to(left, read))),
                Self::Chunked(Part::Data(left)) => {
                    let data = up_to(left, read);
                    if *left == 0 {
                        *self = Self::Chunked(Part::DataEnd);
                    }
                    return Ok(Step::Data(data));
                }
                Self::Chunked(part) => {
                    let Some(line) = line(read)? else {
                        return Ok(Step::More);
                    };
                    *part = match part {
                        Part::Size => match chunk_size(&line).ok_or_else(|| nonsense("the size of a chunk is none"))? {
                            0 => Part::Trailers,
                            size => Part::Data(size),
                        },
                        Part::DataEnd if line.is_empty() => Part::Size,
                        Part::Trailers if line.is_empty() => {
                            *self = Self::Ended;
                            continue;
                        }
                        Part::Trailers => Part::Trailers,
                        Part::DataEnd | Part::Data(_) => return Err(nonsense("a chunk is longer than its size")),
                    };
                }
            }
        }
    }

    /// Takes what ends the body out of what was read, if that is all there is before its end. Whether the body has ended. What
    /// breaks the framing is left to the next step.
    pub(crate) fn end(&mut self, read: &mut BytesMut) -> bool {
        match self {
            Self::Length(0) => *self = Self::Ended,
            // The last chunk has a line of its own and an empty one. Trailers are left to the next step.
            Self::Chunked(Part::DataEnd) if read.starts_with(b"\r\n0\r\n\r\n") => {
                read.advance(7);
                *self = Self::Ended;
            }
            Self::Chunked(Part::Size) if read.starts_with(b"0\r\n\r\n") => {
                read.advance(5);
                *self = Self::Ended;
            }
            _ => {}
        }
        matches!(self, Self::Ended)
    }

    /// The connection has ended: whether the body has, too.
    pub(crate) fn ends_with_connection(self) -> bool {
        matches!(self, Self::ToClose | Self::Ended | Self::Length(0))
    }
}

/// The bytes that were read, up to so many, which are counted off.
fn up_to(left: &mut u64, read: &mut BytesMut) -> Bytes {
    let count = usize::try_from(*left).unwrap_or(usize::MAX).min(read.len());
    *left -= count as u64;
    read.split_to(count).freeze()
}

/// The next line, without its end.
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
        None if read.len() > MAX_LINE_BYTES => Err(nonsense("a line between chunks has no end")),
        None => Ok(None),
    }
}

fn chunk_size(line: &[u8]) -> Option<u64> {
    let size = line.split(|byte| *byte == b';').next().unwrap_or_default();
    number(size.trim_ascii(), 16)
}

/// A number of nothing but digits: what Rust parses beyond that, such as a sign, is an error here.
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
                    Step::Data(data) => out.extend_from_slice(&data),
                    Step::More => break,
                    Step::End => return Ok((out, true)),
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
        assert_eq!(of(&[(CODING, "Chunked")]), Ok((Framing::Chunked(Part::Size), true)));
        // Whoever sends both may have been tricked into it: nothing that follows is trusted.
        let both = of(&[(CODING, "chunked"), (LENGTH, "3")]);
        assert_eq!(both, Ok((Framing::Chunked(Part::Size), false)));
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
            (part(Part::DataEnd), "\r\n0\r\n\r\nx", true, "x"),
            (part(Part::Size), "0\r\n\r\n", true, ""),
            (part(Part::DataEnd), "\r\n0\r\n\r", false, "\r\n0\r\n\r"),
            (part(Part::DataEnd), "\r\n1\r\nx", false, "\r\n1\r\nx"),
            (
                part(Part::Size),
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
            body(Framing::Chunked(Part::Size), &[text]),
            Ok((b"Wikipedia in chunks.".to_vec(), true))
        );
    }

    #[test]
    fn what_breaks_its_framing_is_an_error_and_what_breaks_off_has_not_ended() {
        let chunked = Framing::Chunked(Part::Size);
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
                (Framing::Chunked(Part::Size), sent)
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
