//! Durations as users write them. Bounded, so that adding one to a clock does not overflow.

use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize as _, Deserializer, Serializer};

/// The longest, and what the word for "no limit" means: ten years.
pub const LONGEST: Duration = Duration::from_hours(10 * 365 * 24);

/// The word for "no limit".
const NO_LIMIT: &str = "never";

/// `90s`, `1m 30s`, `2h`, or `never` for no limit.
///
/// # Errors
/// A message with the accepted syntax.
pub fn parse(text: &str) -> Result<Duration, String> {
    if text.trim() == NO_LIMIT {
        return Ok(LONGEST);
    }
    let span = humantime::parse_duration(text)
        .map_err(|error| format!("invalid duration `{text}`: {error}; write for example \"90s\" or \"5m\""))?;
    if span > LONGEST {
        return Err(format!(
            "duration `{text}` is longer than ten years; \"{NO_LIMIT}\" is no limit"
        ));
    }
    Ok(span)
}

/// For `#[serde(with = "crate::span")]`: writes what [`parse`] reads.
///
/// # Errors
/// Those of the serializer.
pub fn serialize<S: Serializer>(span: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_duration(*span))
}

/// For `#[serde(with = "crate::span")]` and `#[serde(deserialize_with = "crate::span::deserialize")]`.
///
/// # Errors
/// Those of [`parse`].
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse(&text).map_err(serde::de::Error::custom)
}

/// As [`deserialize`], for a key that can be absent. It needs `#[serde(default)]` beside it.
///
/// # Errors
/// Those of [`parse`].
pub fn deserialize_some<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    deserialize(deserializer).map(Some)
}

/// The JSON Schema of a duration in a profile, for `#[schemars(with = "crate::span::Text")]`.
#[derive(Debug)]
pub struct Text;

impl JsonSchema for Text {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "duration".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"title": "duration", "type": "string", "examples": ["90s", "1m 30s", "never"]})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_bounded() {
        assert_eq!(parse("1m 30s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse("never"), Ok(LONGEST));
        assert_eq!(parse("87600h"), Ok(LONGEST));
        for (wrong, why) in [
            ("87601h", "never"),
            ("18446744073709551615s", "never"),
            ("18446744073709551616s", "invalid duration"),
            ("-1s", "invalid duration"),
            ("5", "5m"),
            ("", "90s"),
        ] {
            assert!(parse(wrong).unwrap_err().contains(why), "{wrong}");
        }
    }
}
