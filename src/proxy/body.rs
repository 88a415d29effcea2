//! Surgery on a client's JSON body: named top-level keys change, every other byte stays as the client wrote it.
//!
//! Nothing is re-serialized, so the order of keys, the spelling of numbers, whitespace and unknown fields reach the
//! engine unchanged. Knows JSON; knows no field of the OpenAI API except those that a client may never set.

use std::fmt;
use std::ops::Range;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// Fields that steer how KV moves. From a client they could kill an engine, let it connect anywhere, or fetch another
/// client's KV, so they never reach one.
const FORBIDDEN: [&str; 2] = ["kv_transfer_params", "ec_transfer_params"];

/// vLLM's object of extra arguments, in which the forbidden fields could hide.
const EXTRA_ARGUMENTS: &str = "vllm_xargs";

/// Why a body cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum BodyError {
    /// Not text.
    #[error("it is not UTF-8")]
    NotUtf8(#[source] std::str::Utf8Error),
    /// Not JSON, or JSON but not an object.
    #[error("it is not a JSON object")]
    NotObject(#[source] serde_json::Error),
}

/// A JSON object, and where its members are.
#[derive(Debug)]
pub(super) struct Document<'body> {
    text: &'body str,
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    /// Unescaped.
    key: String,
    /// From the key's opening quote to the value's end.
    whole: Range<usize>,
    value: Range<usize>,
}

/// A change of one key: its new value as JSON text, or `None` to remove it.
pub(super) type Edit<'edit> = (&'edit str, Option<&'edit str>);

impl<'body> Document<'body> {
    /// Reads the members of the object that `body` must be.
    pub(super) fn parse(body: &'body [u8]) -> Result<Self, BodyError> {
        Self::parse_text(std::str::from_utf8(body).map_err(BodyError::NotUtf8)?)
    }

    /// The same of text.
    pub(super) fn parse_text(text: &'body str) -> Result<Self, BodyError> {
        let Entries(entries) = serde_json::from_str(text).map_err(BodyError::NotObject)?;
        let mut members = Vec::with_capacity(entries.len());
        let mut cursor = text.find('{').unwrap_or_default() + 1;
        for (key, raw) in entries {
            // Between two members there is nothing but whitespace and a comma, so the next quote opens the key.
            let start = cursor + text[cursor..].find('"').unwrap_or_default();
            let value = raw.get().as_ptr().addr() - text.as_ptr().addr();
            let end = value + raw.get().len();
            members.push(Member {
                key,
                whole: start..end,
                value: value..end,
            });
            cursor = end;
        }
        Ok(Self { text, members })
    }

    /// The value of `key` as JSON text. Of duplicates the last one counts, as it does for the engines.
    pub(super) fn get(&self, key: &str) -> Option<&'body str> {
        self.members
            .iter()
            .rev()
            .find(|member| member.key == key)
            .map(|member| &self.text[member.value.clone()])
    }

    /// The value of `key`, unless it is absent or null.
    pub(super) fn given(&self, key: &str) -> Option<&'body str> {
        self.get(key).filter(|value| *value != "null")
    }

    /// All keys, unescaped, in order.
    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(|member| member.key.as_str())
    }

    /// The body with `edits` applied and without the fields that no client may set. An edit may set one of those.
    ///
    /// A key that is there keeps its place; a new one comes last; of duplicates the first stays; what is removed takes
    /// the whitespace before it along.
    pub(super) fn edited(&self, edits: &[Edit<'_>]) -> Vec<u8> {
        let extra = self.get(EXTRA_ARGUMENTS).and_then(without_forbidden);
        let mut all: Vec<Edit<'_>> = edits.to_vec();
        all.extend(
            FORBIDDEN
                .iter()
                .filter(|key| !edits.iter().any(|(edited, _)| edited == *key))
                .map(|key| (*key, None)),
        );
        all.extend(extra.as_deref().map(|extra| (EXTRA_ARGUMENTS, Some(extra))));
        self.apply(&all).into_bytes()
    }

    /// The text with `edits` applied and nothing else, for what no client wrote.
    pub(super) fn apply(&self, edits: &[Edit<'_>]) -> String {
        let growth: usize = edits
            .iter()
            .map(|(key, value)| key.len() + value.map_or(0, str::len) + 4)
            .sum();
        let mut out = String::with_capacity(self.text.len() + growth);
        let mut set = vec![false; edits.len()];
        let mut cursor = self.text.find('{').unwrap_or_default() + 1;
        let mut empty = true;
        out.push_str(&self.text[..cursor]);
        for member in &self.members {
            let separator = &self.text[cursor..member.whole.start];
            cursor = member.whole.end;
            let edit = edits.iter().position(|(key, _)| *key == member.key);
            let replacement = match edit {
                None => None,
                Some(index) => match edits[index].1 {
                    Some(value) if !std::mem::replace(&mut set[index], true) => Some(value),
                    Some(_) | None => continue,
                },
            };
            match separator.split_once(',') {
                Some((before, after)) if empty => out.extend([before, after]),
                _ => out.push_str(separator),
            }
            empty = false;
            match replacement {
                None => out.push_str(&self.text[member.whole.clone()]),
                Some(value) => out.extend([&self.text[member.whole.start..member.value.start], value]),
            }
        }
        for ((key, value), set) in edits.iter().zip(set) {
            if let (Some(value), false) = (value, set) {
                out.extend([if empty { "\"" } else { ",\"" }, key, "\":", value]);
                empty = false;
            }
        }
        out.push_str(&self.text[cursor..]);
        out
    }
}

/// One step on the way to a value within a JSON text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The value of an object's key; of duplicates the last one.
    Key(&'static str),
    /// The first element of a list.
    First,
}

/// The JSON text with another value at the end of `path`: what `new` makes of the one that is there. `None` if there is none,
/// or `new` wants no other.
pub(super) fn edit_at(text: &str, path: &[Step], new: impl FnOnce(&str) -> Option<String>) -> Option<String> {
    match path {
        [] => new(text),
        [Step::Key(key), rest @ ..] => {
            let document = Document::parse_text(text).ok()?;
            let value = edit_at(document.get(key)?, rest, new)?;
            Some(document.apply(&[(key, Some(&value))]))
        }
        [Step::First, rest @ ..] => {
            let elements: Vec<&RawValue> = serde_json::from_str(text).ok()?;
            let first = elements.first()?.get();
            let start = first.as_ptr().addr() - text.as_ptr().addr();
            let value = edit_at(first, rest, new)?;
            Some([&text[..start], &value, &text[start + first.len()..]].concat())
        }
    }
}

/// The object `text` without the forbidden fields, or `None` if it has none of them or is no object.
fn without_forbidden(text: &str) -> Option<String> {
    let document = Document::parse_text(text).ok()?;
    document
        .keys()
        .any(|key| FORBIDDEN.contains(&key))
        .then(|| document.apply(&FORBIDDEN.map(|key| (key, None))))
}

/// Members of an object in order, duplicates included.
struct Entries<'body>(Vec<(String, &'body RawValue)>);

impl<'de> Deserialize<'de> for Entries<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Entries<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn edit(body: &str, edits: &[Edit<'_>]) -> String {
        let document = Document::parse(body.as_bytes()).expect("an object");
        String::from_utf8(document.edited(edits)).expect("text")
    }

    #[test]
    fn only_the_named_keys_change() {
        let body = "{ \"model\" :\"m\",\n \"max_tokens\": 1e2 , \"seed\":12345678901234567890, \"x\\u0041\":{\"b\":1,\"a\":1.50}}\n";
        assert_eq!(edit(body, &[]), body);
        assert_eq!(
            edit(body, &[("max_tokens", Some("1")), ("stream", Some("false"))]),
            "{ \"model\" :\"m\",\n \"max_tokens\": 1 , \"seed\":12345678901234567890, \"x\\u0041\":{\"b\":1,\"a\":1.50},\"stream\":false}\n"
        );
        assert_eq!(
            edit(body, &[("model", None), ("xA", None)]),
            "{\n \"max_tokens\": 1e2 , \"seed\":12345678901234567890}\n"
        );
        assert_eq!(edit("{}", &[("n", Some("1")), ("m", Some("2"))]), r#"{"n":1,"m":2}"#);
        assert_eq!(edit(r#"{"n":1}"#, &[("n", None)]), "{}");
    }

    #[test]
    fn of_duplicates_the_last_is_read_and_one_is_left_when_set() {
        let body = r#"{"n":1,"a":0,"n":2}"#;
        assert_eq!(Document::parse(body.as_bytes()).expect("object").get("n"), Some("2"));
        assert_eq!(edit(body, &[("n", Some("7"))]), r#"{"n":7,"a":0}"#);
        assert_eq!(edit(body, &[("n", None)]), r#"{"a":0}"#);
    }

    #[test]
    fn a_value_deep_within_changes_alone() {
        let path = [Step::Key("choices"), Step::First, Step::Key("text")];
        let text =
            "{ \"choices\" :[ {\"index\":0, \"text\": \"a\\u00e9\" ,\"x\":1.50}, {\"text\":\"z\"}],\n\"usage\":null}";
        let changed = edit_at(text, &path, |old| Some(format!("[{old}]"))).expect("it is there");
        assert_eq!(changed, text.replacen("\"a\\u00e9\"", "[\"a\\u00e9\"]", 1));
        assert_eq!(edit_at(text, &path, |_| None), None);
        for path in [
            &[Step::Key("usage"), Step::Key("a")][..],
            &[Step::First],
            &[Step::Key("none")],
        ] {
            assert_eq!(edit_at(text, path, |_| Some("1".into())), None, "{path:?}");
        }
    }

    #[test]
    fn a_client_cannot_smuggle_transfer_parameters_in() {
        let body = r#"{"kv_transfer_params":{"do_remote_prefill":true},"prompt":"x","kv_transfer_p\u0061rams":1,
            "vllm_xargs":{"top":1.0,"kv_transfer_params":{"remote_host":"evil"}},"ec_transfer_params":{}}"#;
        let out = edit(body, &[]);
        assert!(!out.contains("transfer"), "{out}");
        assert!(out.contains(r#""vllm_xargs":{"top":1.0}"#), "{out}");
        let own = edit(body, &[("kv_transfer_params", Some("{\"own\":1}"))]);
        let value: Value = serde_json::from_str(&own).expect("JSON");
        assert_eq!(value["kv_transfer_params"], serde_json::json!({"own": 1}));
        assert_eq!(own.matches("transfer_params").count(), 1, "{own}");
    }

    #[test]
    fn depth_is_the_engines_to_refuse() {
        let deep = format!("{{\"a\":{}{},\"n\":2}}", "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(edit(&deep, &[("n", Some("1"))]), deep.replace("\"n\":2", "\"n\":1"));
    }

    #[test]
    fn what_is_no_object_is_refused_with_the_place() {
        let message = |body: &[u8]| crate::report::one_line(&Document::parse(body).expect_err("no object"));
        assert!(
            message(b"{\"a\": }").contains("line 1 column 7"),
            "{}",
            message(b"{\"a\": }")
        );
        for body in [
            &b""[..],
            b"[1]",
            b"\"x\"",
            b"{\"a\":1",
            b"{\"a\":1}x",
            b"{\"a\":1,}",
            b"{\"\xff\":1}",
        ] {
            assert!(!message(body).is_empty());
        }
    }

    /// JSON objects as clients might write them: any spacing, escapes and duplicate keys.
    fn objects() -> impl Strategy<Value = String> {
        let space = prop_oneof![Just(""), Just(" "), Just("\n\t")];
        let key = prop_oneof![
            Just("\"a\"".to_owned()),
            Just("\"b\"".to_owned()),
            Just("\"\\u0061\"".to_owned()),
            "\"[a-z,:}{ ]{0,4}\"",
        ];
        let value = prop_oneof![
            Just("1.0e+0".to_owned()),
            Just("null".to_owned()),
            Just("[1, {\"a\":[\"b\"]}]".to_owned()),
            "\"[a-z,:}{ ]{0,6}\"",
        ];
        proptest::collection::vec((key, value, space.clone(), space), 0..6).prop_map(|members| {
            let members: Vec<String> = members
                .into_iter()
                .map(|(key, value, before, after)| format!("{before}{key}{after}:{before}{value}{after}"))
                .collect();
            format!("{{{}}}", members.join(","))
        })
    }

    /// Any JSON value as text, with the spellings that a writer of its own would not keep.
    fn values() -> impl Strategy<Value = String> {
        let leaf = prop_oneof![
            Just("null".to_owned()),
            Just("-0".to_owned()),
            Just("1.50e+00".to_owned()),
            Just("123456789012345678901234567890".to_owned()),
            Just("1e999".to_owned()),
            Just("\"\\u00e9\\/\\ud83c\\udf0a\\\"}{,:\"".to_owned()),
            Just("\"\\ud800\"".to_owned()),
            any::<String>().prop_map(|text| Value::from(text).to_string()),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            let member = (keys(), inner.clone()).prop_map(|(key, value)| format!("{key} :{value}"));
            prop_oneof![
                proptest::collection::vec(inner, 0..4).prop_map(|all| format!("[ {}\t]", all.join(" ,"))),
                proptest::collection::vec(member, 0..4).prop_map(|all| format!("{{{}\n}}", all.join(","))),
            ]
        })
    }

    /// Keys as text: few, so that they meet, and forbidden ones in several spellings.
    fn keys() -> impl Strategy<Value = String> {
        prop_oneof![
            Just("\"a\"".to_owned()),
            Just("\"\\u0061\"".to_owned()),
            Just("\"kv_transfer_params\"".to_owned()),
            Just("\"kv_transfer\\u005fparams\"".to_owned()),
            Just("\"ec_transfer_params\"".to_owned()),
            any::<String>().prop_map(|text| Value::from(text).to_string()),
        ]
    }

    fn key_of(text: &str) -> String {
        serde_json::from_str(text).expect("a key")
    }

    proptest! {
        #[test]
        fn whatever_is_edited_every_other_member_keeps_its_bytes(
            members in proptest::collection::vec((keys(), "[ \n\t\r]{0,2}", values(), "[ \n\t\r]{0,2}"), 0..8),
            edited in proptest::collection::vec((0_usize..8, proptest::option::of(values())), 0..4),
        ) {
            let texts: Vec<String> = members.iter().map(|(key, before, value, _)| format!("{key}{before}:{before}{value}")).collect();
            let spaced: Vec<String> = members.iter().zip(&texts).map(|((_, _, _, after), text)| format!("{after}{text}{after}")).collect();
            let body = format!("{{{}}}", spaced.join(","));
            let mut edits: Vec<(String, Option<String>)> = Vec::new();
            for (place, value) in edited {
                let key = members.get(place).map_or("new".to_owned(), |(key, ..)| key_of(key));
                let is_plain = key.chars().all(|character| character.is_ascii_alphanumeric());
                if is_plain && edits.iter().all(|(other, _)| *other != key) {
                    edits.push((key, value));
                }
            }
            let mut due = Vec::new();
            let mut set = Vec::new();
            for ((key, before, ..), text) in members.iter().zip(&texts) {
                let name = key_of(key);
                match edits.iter().find(|(edited, _)| *edited == name) {
                    _ if FORBIDDEN.contains(&name.as_str()) => {}
                    None => due.push(text.clone()),
                    Some((_, Some(value))) if !set.contains(&name) => {
                        due.push(format!("{key}{before}:{before}{value}"));
                        set.push(name);
                    }
                    Some(_) => {}
                }
            }
            let new = edits.iter().filter(|(key, _)| !set.contains(key));
            due.extend(new.filter_map(|(key, value)| Some(format!("\"{key}\":{}", value.as_deref()?))));
            let edits: Vec<Edit<'_>> = edits.iter().map(|(key, value)| (key.as_str(), value.as_deref())).collect();
            let out = edit(&body, &edits);
            let left = Document::parse_text(&out).expect("still an object");
            let left: Vec<&str> = left.members.iter().map(|member| &out[member.whole.clone()]).collect();
            prop_assert_eq!(left, due);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in any::<Vec<u8>>(), cut in 0_usize..200, body in objects()) {
            let mut broken = body.into_bytes();
            broken.truncate(cut);
            for bytes in [bytes, broken] {
                if let Ok(document) = Document::parse(&bytes) {
                    prop_assert!(serde_json::from_slice::<serde_json::Map<String, Value>>(&document.edited(&[])).is_ok());
                }
            }
        }

        #[test]
        fn edits_equal_edits_of_the_parsed_value(body in objects(), remove_a: bool, set_b: bool) {
            let mut edits: Vec<Edit<'_>> = Vec::new();
            let mut expected: serde_json::Map<String, Value> = serde_json::from_str(&body).expect("an object");
            if remove_a {
                edits.push(("a", None));
                expected.remove("a");
            }
            if set_b {
                edits.push(("b", Some("[7]")));
                expected.insert("b".into(), serde_json::json!([7]));
            }
            let out = edit(&body, &edits);
            let actual: serde_json::Map<String, Value> = serde_json::from_str(&out).expect("still an object");
            prop_assert_eq!(actual, expected);
        }

        #[test]
        fn a_body_without_edits_comes_back_byte_for_byte(body in objects()) {
            prop_assert_eq!(edit(&body, &[]), body);
        }
    }
}
