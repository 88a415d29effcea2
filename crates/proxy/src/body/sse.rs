//! Server-sent events as vLLM sends them: cuts a byte stream into whole events and reads their data.
//!
//! This module knows the framing, not the meaning of the data.

use bytes::{Bytes, BytesMut};

/// Maximum size of an unfinished event that is held back. A larger event is forwarded in parts.
const MAX_HELD_BYTES: usize = 8 << 20;

/// Bytes of an event before its data: its name and id.
const MAX_FIELDS_BYTES: usize = 1 << 10;

/// Cuts network chunks into whole events, so that a broken stream never ends within an event.
#[derive(Debug, Default)]
pub(crate) struct Events {
    partial: BytesMut,
    /// Whether `partial` ends with a line end, so that another line end would end the event.
    ends_line: bool,
    /// Whether the unfinished event has data, once a part of it was forwarded.
    forwarded: Option<bool>,
    done: bool,
}

impl Events {
    /// The whole events that `chunk` completes, if any. It copies nothing if chunks end with an event, and reads each
    /// byte once.
    pub(crate) fn push(&mut self, mut chunk: Bytes) -> Bytes {
        let end = end_of_last_event(&chunk, self.ends_line);
        if end > 0 {
            self.forwarded = None;
        }
        let rest = chunk.split_off(end);
        self.ends_line = ends_line(&rest, chunk.is_empty() && self.ends_line);
        let mut whole = chunk;
        if !whole.is_empty() && !self.partial.is_empty() {
            self.partial.extend_from_slice(&whole);
            whole = std::mem::take(&mut self.partial).freeze();
        }
        self.partial.extend_from_slice(&rest);
        if whole.is_empty() && self.partial.len() > MAX_HELD_BYTES {
            self.ends_line = false;
            self.forwarded = Some(self.is_within_data());
            whole = std::mem::take(&mut self.partial).freeze();
        }
        // A comment after the end marker is not data.
        if let Some(last) = given(&whole).next_back() {
            self.done = last == b"[DONE]";
        }
        whole
    }

    /// Whether the unfinished event has data, judged by its beginning.
    pub(crate) fn is_within_data(&self) -> bool {
        if let Some(has_data) = self.forwarded {
            return has_data;
        }
        let beginning = &self.partial[..self.partial.len().min(MAX_FIELDS_BYTES)];
        given(beginning).next().is_some()
    }

    /// Whether the last event so far was the end marker.
    pub(crate) fn is_done(&self) -> bool {
        self.done
    }
}

/// The end of the last event in `bytes`, including its blank line; 0 if no event ends. `after_line`: a line ends
/// before `bytes`.
fn end_of_last_event(bytes: &[u8], after_line: bool) -> usize {
    if bytes.ends_with(b"\n\n") {
        return bytes.len();
    }
    let mut newline_before = None;
    for (index, byte) in bytes.iter().enumerate().rev() {
        match (byte, newline_before) {
            (b'\n', Some(end)) => return end,
            (b'\n', None) => newline_before = Some(index + 1),
            (b'\r', _) => {}
            _ => newline_before = None,
        }
    }
    newline_before.filter(|_| after_line).unwrap_or(0)
}

/// Whether `bytes` end with a line end. `before`: whether a line ends before them.
fn ends_line(bytes: &[u8], before: bool) -> bool {
    match bytes.iter().rfind(|byte| **byte != b'\r') {
        Some(last) => *last == b'\n',
        None => before,
    }
}

/// Each event of whole events with its start position, including its blank line.
pub(crate) fn each(events: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let rest = events.get(start..).filter(|rest| !rest.is_empty())?;
        let end = end_of_first_event(rest);
        let found = (start, &rest[..end]);
        start += end;
        Some(found)
    })
}

/// The end of the first event in `bytes`, including its blank line; the length of `bytes` if no event ends.
fn end_of_first_event(bytes: &[u8]) -> usize {
    for end in memchr::memchr_iter(b'\n', bytes) {
        let rest = &bytes[end + 1..];
        let blank = rest.strip_prefix(b"\r").unwrap_or(rest);
        if blank.first() == Some(&b'\n') {
            return bytes.len() - blank.len() + 1;
        }
    }
    bytes.len()
}

/// The `data` of each event in `events`, which vLLM always writes on one line.
pub(crate) fn data(events: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    events
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.strip_prefix(b"data:"))
        .map(<[u8]>::trim_ascii)
}

/// The `data` that is not empty. Comments and events without data only keep a connection open.
pub(crate) fn given(events: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    data(events).filter(|data| !data.is_empty())
}

/// One event with this `data`.
pub(crate) fn event(data: &str) -> String {
    format!("data: {data}\n\n")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_unfinished_event_is_held_back() {
        let mut events = Events::default();
        assert_eq!(
            events.push(Bytes::from_static(b"data: {\"a\":1}\n\ndata: {\"b")),
            "data: {\"a\":1}\n\n"
        );
        assert_eq!(events.push(Bytes::from_static(b"\":2}\n")), "");
        assert_eq!(
            events.push(Bytes::from_static(b"\ndata: [DONE]\n\n")),
            "data: {\"b\":2}\n\ndata: [DONE]\n\n"
        );
        assert!(events.is_done());
    }

    #[test]
    fn data_is_read_with_either_line_end() {
        let bytes = b": comment\r\ndata: {\"a\":1}\r\n\r\nevent: x\ndata:[DONE]\n\n";
        let found: Vec<_> = data(bytes).collect();
        assert_eq!(found, [&b"{\"a\":1}"[..], b"[DONE]"]);
    }

    /// Too slow to finish if each chunk cost as much as the bytes that are already held back.
    #[test]
    fn a_huge_event_may_come_in_tiny_chunks() {
        let mut events = Events::default();
        let piece = Bytes::from_static(b"xx\r\nx\n\rx");
        for _ in 0..MAX_HELD_BYTES / 9 {
            assert_eq!(events.push(piece.clone()), "");
        }
        let whole = events.push(Bytes::from_static(b"\n\nrest"));
        assert_eq!(whole.len(), MAX_HELD_BYTES / 9 * piece.len() + 2);
        assert_eq!(events.push(Bytes::from_static(b"\r\n\r\n")), "rest\r\n\r\n");
    }

    /// Later parts of an event have no field name, and are what its beginning is.
    #[test]
    fn a_forwarded_part_of_an_event_decides_about_the_rest() {
        for (beginning, is_data) in [("data: ", true), (": ", false)] {
            let mut events = Events::default();
            events.push(Bytes::from(format!("{beginning}{}", "x".repeat(MAX_HELD_BYTES - 8))));
            assert!(!events.push(Bytes::from_static(b"yyyyyyyyyy")).is_empty(), "a part");
            events.push(Bytes::from_static(b"zz"));
            assert_eq!(events.is_within_data(), is_data, "{beginning}");
            assert_eq!(events.push(Bytes::from_static(b"\n\ndata: {")), "zz\n\n");
            assert!(events.is_within_data(), "the next event");
        }
    }

    #[test]
    fn keep_alive_events_have_no_data() {
        let silence = b": keep-alive\n\n:\n\ndata:\n\ndata: \t\r\n\r\nretry: 1000\n\nid: 7\nevent: ping\n\n\n\n";
        assert_eq!(given(silence).count(), 0);
        let mut events = Events::default();
        events.push(Bytes::from_static(b"data: [DONE]\n\n"));
        events.push(Bytes::from_static(silence));
        assert!(events.is_done());
        for (beginning, is_data) in [
            ("data: {", true),
            ("event: x\nid: 1\ndata: {", true),
            (": data: x", false),
            ("data: ", false),
        ] {
            let mut events = Events::default();
            events.push(Bytes::from_static(beginning.as_bytes()));
            assert_eq!(events.is_within_data(), is_data, "{beginning}");
        }
    }

    /// The same for bytes that could all belong to the end of an event.
    #[test]
    fn an_event_may_be_held_back_at_its_very_end() {
        let mut events = Events::default();
        assert_eq!(events.push(Bytes::from_static(b"data: x\n")), "");
        for _ in 0..MAX_HELD_BYTES / 8 {
            assert_eq!(events.push(Bytes::from_static(b"\r\r\r\r")), "");
        }
        let whole = events.push(Bytes::from_static(b"\ny"));
        assert_eq!(whole.len(), 8 + MAX_HELD_BYTES / 8 * 4 + 1);
        assert_eq!(events.push(Bytes::from_static(b"\n")), "");
        assert_eq!(events.push(Bytes::from_static(b"\n")), "y\n\n");
    }

    /// Events of any lines, with either line end.
    fn events() -> impl Strategy<Value = String> {
        let line = prop_oneof![
            Just("data: [DONE]".to_owned()),
            Just(": keep-alive".to_owned()),
            Just("event: delta".to_owned()),
            Just("data:".to_owned()),
            "[^\r\n]{0,12}".prop_map(|text| format!("data: {text}")),
        ];
        let end = prop_oneof![Just("\n"), Just("\r\n")];
        let event = (proptest::collection::vec((line, end.clone()), 1..4), end).prop_map(|(lines, end)| {
            let lines: String = lines.into_iter().map(|(line, end)| line + end).collect();
            lines + end
        });
        proptest::collection::vec(event, 1..6).prop_map(|events| events.concat())
    }

    proptest! {
        #[test]
        fn any_chunking_gives_the_same_events(stream in events(), cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..12)) {
            let whole: Vec<&[u8]> = each(stream.as_bytes()).map(|(_, event)| event).collect();
            prop_assert_eq!(whole.concat(), stream.as_bytes());
            let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
            places.extend([0, stream.len()]);
            places.sort_unstable();
            let mut events = Events::default();
            let mut out: Vec<Vec<u8>> = Vec::new();
            for pair in places.windows(2) {
                let completed = events.push(Bytes::copy_from_slice(&stream.as_bytes()[pair[0]..pair[1]]));
                let mut due = 0;
                for (at, event) in each(&completed) {
                    prop_assert_eq!(at, due);
                    due += event.len();
                    out.push(event.to_vec());
                }
            }
            prop_assert_eq!(&out, &whole);
            let told = given(stream.as_bytes()).next_back();
            prop_assert_eq!(events.is_done(), told == Some(&b"[DONE]"[..]));
        }

        #[test]
        fn any_chunking_gives_the_same_bytes_in_whole_events(
            texts in proptest::collection::vec("[ -~]{0,12}", 1..8),
            cuts in proptest::collection::vec(0_usize..200, 0..12),
            crlf: bool,
        ) {
            let end = if crlf { "\r\n\r\n" } else { "\n\n" };
            let stream = texts.iter().fold(String::new(), |stream, text| stream + "data: x" + text + end);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut % (stream.len() + 1)).collect();
            cuts.extend([0, stream.len()]);
            cuts.sort_unstable();
            let mut events = Events::default();
            let mut out = Vec::new();
            for pair in cuts.windows(2) {
                let whole = events.push(Bytes::copy_from_slice(&stream.as_bytes()[pair[0]..pair[1]]));
                prop_assert!(whole.is_empty() || whole.ends_with(end.as_bytes()));
                out.extend_from_slice(&whole);
            }
            prop_assert_eq!(String::from_utf8(out).expect("text"), stream);
        }
    }
}
