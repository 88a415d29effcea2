//! JSON as Python's `json.dump` writes it by default, so that the files of both clients can be compared as text.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, Serializer};

/// Writes a value as Python's `json.dump` does by default: one line, without a line end.
pub fn render(value: &Value) -> String {
    String::from_utf8(write(value)).expect("what is not ASCII is escaped")
}

/// Serializes a value; its map keys must be strings.
pub(crate) fn write(value: &impl Serialize) -> Vec<u8> {
    let mut text = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut text, Python);
    value
        .serialize(&mut serializer)
        .expect("it is JSON, and memory takes it");
    text
}

/// Separators `", "` and `": "`, numbers as in `repr`, and only ASCII.
struct Python;

impl Formatter for Python {
    fn write_f64<W: ?Sized + Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(repr(value).as_bytes())
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.begin_array_value(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        // Only 0x20 to 0x7e are not escaped: Python also escapes the delete character.
        let mut rest = fragment;
        while let Some(place) = rest.find(|character| !matches!(character, ' '..='~')) {
            writer.write_all(&rest.as_bytes()[..place])?;
            let mut behind = rest[place..].chars();
            for unit in behind.next().unwrap_or_default().encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
            rest = behind.as_str();
        }
        writer.write_all(rest.as_bytes())
    }
}

/// A number as Python's `repr`: the shortest exact digits, with an exponent below 1e-4 and from 1e16.
pub fn repr(value: f64) -> String {
    let magnitude = value.abs();
    if value.is_nan() {
        return "nan".to_owned();
    }
    if magnitude.is_infinite() || magnitude == 0.0 || (1e-4..1e16).contains(&magnitude) {
        return format!("{value:?}");
    }
    let text = format!("{value:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let (sign, exponent) = exponent
        .strip_prefix('-')
        .map_or(('+', exponent), |exponent| ('-', exponent));
    format!("{digits}e{sign}{exponent:0>2}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The expected texts are the output of Python 3.11.
    #[test]
    fn values_are_written_as_python_writes_them() {
        let value = json!({"a": [1, 2.0, null, true], "b": {}, "c": [], "é\"\\\n\u{7f}😀": 5e-5});
        assert_eq!(
            render(&value),
            r#"{"a": [1, 2.0, null, true], "b": {}, "c": [], "\u00e9\"\\\n\u007f\ud83d\ude00": 5e-05}"#
        );
        for (value, text) in [
            (0.0001, "0.0001"),
            (0.000_012_345, "1.2345e-05"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e100, "1.5e+100"),
            (-0.5, "-0.5"),
            (f64::INFINITY, "inf"),
            (0.1 + 0.2, "0.30000000000000004"),
        ] {
            assert_eq!(repr(value), text);
        }
    }
}
