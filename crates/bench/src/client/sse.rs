//! A decoder of server-sent events from a byte stream with arbitrary read boundaries. It does not interpret the events.

use memchr::memchr2;

/// Splits a stream into the names and data of its events, by the WHATWG rules: lines end in LF, CR or CRLF, an empty
/// line ends an event, several `data` fields are joined with LF, comments and other fields are skipped. An unnamed
/// event has an empty name.
#[derive(Debug)]
pub(crate) struct SseDecoder {
    /// The beginning of the current line, from an earlier read.
    line: Vec<u8>,
    /// Data of the current event. `None` until its first `data` field.
    data: Option<Vec<u8>>,
    /// Name of the current event.
    name: Vec<u8>,
    /// The last byte was CR: a following LF belongs to the same line end.
    after_carriage_return: bool,
    limit: usize,
}

/// An event is larger than the limit, in bytes.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("an event of the stream exceeds the limit of {} MiB", .0 >> 20)]
pub(crate) struct EventTooLarge(usize);

impl SseDecoder {
    /// `limit` bounds the memory: the largest line, and the largest data of one event, in bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            line: Vec::new(),
            data: None,
            name: Vec::new(),
            after_carriage_return: false,
            limit,
        }
    }

    /// Decodes the next bytes and calls `on_event` with name and data of every event that they complete.
    pub(crate) fn feed(
        &mut self,
        mut bytes: &[u8],
        mut on_event: impl FnMut(&[u8], &[u8]),
    ) -> Result<(), EventTooLarge> {
        while !bytes.is_empty() {
            if std::mem::take(&mut self.after_carriage_return) && bytes[0] == b'\n' {
                bytes = &bytes[1..];
                continue;
            }
            let Some(end) = memchr2(b'\n', b'\r', bytes) else {
                return self.keep(bytes);
            };
            // Nearly every event is a single line in one read, with its empty line: it needs no copy.
            if self.line.is_empty()
                && self.data.is_none()
                && self.name.is_empty()
                && end <= self.limit
                && bytes[end..].starts_with(b"\n\n")
                && let Some(value) = field(&bytes[..end], b"data")
            {
                on_event(b"", value);
                bytes = &bytes[end + 2..];
                continue;
            }
            self.after_carriage_return = bytes[end] == b'\r';
            if end > self.limit {
                return Err(EventTooLarge(self.limit));
            }
            if self.line.is_empty() {
                self.end_line(&bytes[..end], &mut on_event)?;
            } else {
                self.keep(&bytes[..end])?;
                let line = std::mem::take(&mut self.line);
                self.end_line(&line, &mut on_event)?;
            }
            bytes = &bytes[end + 1..];
        }
        Ok(())
    }

    /// Ends the stream. Some servers leave out the last empty line, so an unfinished event counts.
    pub(crate) fn finish(mut self, mut on_event: impl FnMut(&[u8], &[u8])) -> Result<(), EventTooLarge> {
        let line = std::mem::take(&mut self.line);
        self.end_line(&line, &mut on_event)?;
        self.end_line(b"", &mut on_event)
    }

    fn keep(&mut self, bytes: &[u8]) -> Result<(), EventTooLarge> {
        if self.line.len() + bytes.len() > self.limit {
            return Err(EventTooLarge(self.limit));
        }
        self.line.extend_from_slice(bytes);
        Ok(())
    }

    fn end_line(&mut self, line: &[u8], on_event: &mut impl FnMut(&[u8], &[u8])) -> Result<(), EventTooLarge> {
        if line.is_empty() {
            let name = std::mem::take(&mut self.name);
            if let Some(data) = self.data.take() {
                on_event(&name, &data);
            }
            return Ok(());
        }
        if let Some(name) = field(line, b"event") {
            self.name = name.to_vec();
        }
        let Some(value) = field(line, b"data") else {
            return Ok(());
        };
        let data = match &mut self.data {
            Some(data) => {
                data.push(b'\n');
                data
            }
            None => self.data.insert(Vec::new()),
        };
        if data.len() + value.len() > self.limit {
            return Err(EventTooLarge(self.limit));
        }
        data.extend_from_slice(value);
        Ok(())
    }
}

/// The value of the named field, without the one space that can follow the colon.
fn field<'line>(line: &'line [u8], name: &[u8]) -> Option<&'line [u8]> {
    let value = line.strip_prefix(name)?;
    if value.is_empty() {
        return Some(value);
    }
    let value = value.strip_prefix(b":")?;
    Some(value.strip_prefix(b" ").unwrap_or(value))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: usize = 64;

    fn decode<'a>(reads: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<String>, EventTooLarge> {
        let mut events = Vec::new();
        let mut keep = |name: &[u8], data: &[u8]| {
            let mark = if name.is_empty() { "" } else { "!" };
            events.push([&String::from_utf8_lossy(name), mark, &String::from_utf8_lossy(data)].concat());
        };
        let mut decoder = SseDecoder::new(LIMIT);
        for read in reads {
            decoder.feed(read, &mut keep)?;
        }
        decoder.finish(&mut keep)?;
        Ok(events)
    }

    #[test]
    fn only_names_and_data_are_read() {
        let stream =
            b": ping\n\nevent: x\ndata: {\"a\":1}\nid: 4\n\ndata:two\ndata: lines\n\n\n\ndatabase: no\n\ndata\n\n";
        assert_eq!(decode([&stream[..]]).unwrap(), ["x!{\"a\":1}", "two\nlines", ""]);
    }

    #[test]
    fn a_name_belongs_to_one_event() {
        let stream = b"event: error\ndata: {}\n\ndata: 1\n\nevent: ping\n\ndata: 2\n\n";
        assert_eq!(decode([&stream[..]]).unwrap(), ["error!{}", "1", "2"]);
    }

    #[test]
    fn a_last_event_without_its_empty_line_counts() {
        for stream in [&b"data: 1\n\ndata: [DONE]\n"[..], b"data: 1\n\ndata: [DONE]"] {
            assert_eq!(decode([stream]).unwrap(), ["1", "[DONE]"]);
        }
    }

    #[test]
    fn an_event_beyond_the_limit_is_an_error() {
        let one_line = format!("data: {}\n\n", "x".repeat(LIMIT + 1));
        assert_eq!(decode([one_line.as_bytes()]), Err(EventTooLarge(LIMIT)));
        assert_eq!(decode(one_line.as_bytes().chunks(3)), Err(EventTooLarge(LIMIT)));
        let many_lines = "data: 1234567890\n".repeat(10);
        assert_eq!(decode(many_lines.as_bytes().chunks(7)), Err(EventTooLarge(LIMIT)));
    }

    fn line() -> impl Strategy<Value = String> {
        prop_oneof![
            "data: ?[a-zé{}\"]{0,9}",
            "event: ?[a-z]{0,4}",
            Just(String::new()),
            Just(": ping".to_owned()),
            "[a-z]{1,6}: [a-z]{0,6}",
        ]
    }

    proptest! {
        #[test]
        fn read_boundaries_and_line_ends_do_not_change_events(
            lines in prop::collection::vec(line(), 0..30),
            line_end in prop::sample::select(vec!["\n", "\r", "\r\n"]),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        ) {
            let whole = [lines.join("\n").as_str(), "\n"].concat();
            let stream = [lines.join(line_end).as_str(), line_end].concat();
            let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
            places.extend([0, stream.len()]);
            places.sort_unstable();
            let reads = places.windows(2).map(|pair| &stream.as_bytes()[pair[0]..pair[1]]);
            // Some of these streams exceed the small limit; they must do so wherever they are split.
            let expected = decode([whole.as_bytes()]);
            prop_assert_eq!(decode(reads), expected);
        }
    }
}
