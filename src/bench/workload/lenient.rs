//! JSON as Python's tools write and read it: with `NaN` and infinities, with halves of surrogate pairs, and with control
//! characters in texts. Pure.

use std::fmt::Write as _;

use serde_json::Value;

/// Reads a JSON text. Where it is not strict, `NaN` and infinities are null and half a surrogate pair is U+FFFD.
pub(super) fn from_str(text: &str) -> serde_json::Result<Value> {
    serde_json::from_str(text).or_else(|_| serde_json::from_str(&strict(text)))
}

/// The same text as strict JSON. What is wrong in another way stays wrong.
fn strict(text: &str) -> String {
    const WORDS: [&str; 3] = ["NaN", "Infinity", "-Infinity"];
    let mut strict = String::with_capacity(text.len());
    let mut rest = text;
    let mut is_in_text = false;
    while let Some(first) = rest.chars().next() {
        let word = WORDS.into_iter().find(|word| !is_in_text && rest.starts_with(word));
        let length = match (word, first) {
            (Some(word), _) => {
                strict.push_str("null");
                word.len()
            }
            (None, '\\') if is_in_text => escape(rest, &mut strict),
            (None, '\0'..='\x1f') if is_in_text => {
                let _ = write!(strict, "\\u{:04x}", u32::from(first));
                1
            }
            (None, _) => {
                is_in_text ^= first == '"';
                strict.push(first);
                first.len_utf8()
            }
        };
        rest = &rest[length..];
    }
    strict
}

/// Copies the escape that a text begins with, a pair of surrogates as a whole. Gives its length.
fn escape(rest: &str, strict: &mut String) -> usize {
    let unit = |text: &str| {
        let digits = text.strip_prefix("\\u")?.get(..4)?;
        u16::from_str_radix(digits, 16).ok()
    };
    let copied = match (unit(rest), rest.get(6..).and_then(unit)) {
        (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => &rest[..12],
        (Some(0xd800..=0xdfff), _) => {
            strict.push_str("\\ufffd");
            return 6;
        }
        (Some(_), _) => &rest[..6],
        // The backslash and the character after it, which may be a quote.
        (None, _) => rest.char_indices().nth(2).map_or(rest, |(end, _)| &rest[..end]),
    };
    strict.push_str(copied);
    copied.len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn what_pythons_tools_write_is_read() {
        for (text, value) in [
            (
                r#"{"a":NaN,"b":[-Infinity,Infinity]}"#,
                json!({"a": null, "b": [null, null]}),
            ),
            (r#"{"a":"a \ud83d b"}"#, json!({"a": "a \u{fffd} b"})),
            (r#"["\ude00\ud83d\ude00\ud83d\u0041"]"#, json!(["\u{fffd}😀\u{fffd}A"])),
            (r#"["\\ud83d NaN \"NaN", NaN]"#, json!(["\\ud83d NaN \"NaN", null])),
            ("[\"a\tb\", NaN]", json!(["a\tb", null])),
        ] {
            assert_eq!(from_str(text).unwrap(), value, "{text}");
        }
        for wrong in ["{\"a\":nan}", "{\"a\":'b'}", "{\"a\":\"\\u12\"}", "{", "\"\\", "\"\\é"] {
            assert!(from_str(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn what_is_strict_stays_as_it_is(text in "[a-z\"\\\\0-9\u{0}-\u{20}é😀]{0,20}") {
            let written = json!({"text": text, "number": 1.5}).to_string();
            prop_assert_eq!(strict(&written), written);
        }

        #[test]
        fn anything_is_read_or_refused(text in "[\\\\u\"dD8f0NaInfity-]{0,24}") {
            drop(from_str(&text));
        }
    }
}
