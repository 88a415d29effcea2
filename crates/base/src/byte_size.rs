//! Numbers of bytes as people write them: `2GiB`, `512 MiB`, `17`. PURE.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize as _, Deserializer, Serializer};

/// Units with their number of bytes, the largest first.
const UNITS: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// Reads a number of bytes. `None` if the text is not a size, or larger than 64 bits can hold.
pub fn parse(text: &str) -> Option<u64> {
    let digits = text
        .find(|character: char| !character.is_ascii_digit())
        .unwrap_or(text.len());
    let number: u64 = text[..digits].parse().ok()?;
    let unit = match text[digits..].trim() {
        "" => 1,
        unit => UNITS.iter().find(|(name, _)| *name == unit)?.1,
    };
    number.checked_mul(unit)
}

/// Writes a number of bytes so that [`parse`] reads the same number, with the largest unit that divides it.
pub fn format(bytes: u64) -> String {
    let (unit, size) = UNITS
        .into_iter()
        .find(|(_, size)| bytes > 0 && bytes.is_multiple_of(*size))
        .unwrap_or(("B", 1));
    format!("{}{unit}", bytes / size)
}

/// For `#[serde(with = "crate::byte_size")]` on a number of bytes.
///
/// # Errors
/// When the number is too large, which no number of bytes in memory is.
pub fn serialize<S: Serializer, T: Copy + TryInto<u64>>(bytes: &T, serializer: S) -> Result<S::Ok, S::Error> {
    let too_large = |_| serde::ser::Error::custom("a size of more than 64 bits");
    serializer.collect_str(&format((*bytes).try_into().map_err(too_large)?))
}

/// For `#[serde(with = "crate::byte_size")]` and `#[serde(deserialize_with = "crate::byte_size::deserialize")]`.
///
/// # Errors
/// A sentence that says how to write a size.
pub fn deserialize<'de, D: Deserializer<'de>, T: TryFrom<u64>>(deserializer: D) -> Result<T, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse(&text).and_then(|bytes| T::try_from(bytes).ok()).ok_or_else(|| {
        serde::de::Error::custom(format!(
            "invalid size `{text}`; write for example \"2GiB\" or \"512MiB\""
        ))
    })
}

/// The JSON Schema of a size in a profile, for `#[schemars(with = "crate::byte_size::Text")]`.
#[derive(Debug)]
pub struct Text;

impl JsonSchema for Text {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "size".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"title": "size", "type": "string", "pattern": "^[0-9]+ *(B|KiB|MiB|GiB)?$", "examples": ["2GiB", "512MiB"]})
    }
}

#[cfg(test)]
mod tests {
    use super::{format, parse};

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(parse("2GiB"), Some(2 << 30));
        assert_eq!(parse("512 MiB"), Some(512 << 20));
        assert_eq!(parse("17"), Some(17));
        for wrong in ["2GB", "GiB", "-1", "99999999999999999999", "18014398509481984KiB"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn formatted_sizes_are_read_back() {
        for (bytes, text) in [(64 << 20, "64MiB"), (1536, "1536B"), (3 << 10, "3KiB"), (0, "0B")] {
            assert_eq!(format(bytes), text);
            assert_eq!(parse(text), Some(bytes));
        }
    }
}
