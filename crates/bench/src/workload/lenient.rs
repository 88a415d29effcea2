//! A lenient JSON reader for files of Python tools: `NaN`, infinities, lone surrogates, and control characters in
//! strings. Pure.

use std::fmt::Write as _;

use serde_json::Value;

/// Parses JSON. In non-strict JSON, `NaN` and infinities become null and a lone surrogate becomes U+FFFD.
pub(super) fn from_str(text: &str) -> serde_json::Result<Value> {
    serde_json::from_str(text).or_else(|_| serde_json::from_str(&strict(text)))
}

/// The text as strict JSON. Other errors remain.
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

/// Copies the escape at the start of a text, a surrogate pair as a whole. Returns its length.
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
        // The backslash and the next character, which can be a quote.
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
    fn json_of_python_tools_is_read() {
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
        fn strict_json_is_unchanged(text in "[a-z\"\\\\0-9\u{0}-\u{20}é😀]{0,20}") {
            let written = json!({"text": text, "number": 1.5}).to_string();
            prop_assert_eq!(strict(&written), written);
        }

        #[test]
        fn any_text_is_parsed_or_rejected(text in "[\\\\u\"dD8f0NaInfity-]{0,24}") {
            drop(from_str(&text));
        }
    }
}
