//! Edits named top-level keys of a client's JSON body and leaves every other byte as the client wrote it.
//!
//! Nothing is serialized again, so the engine gets the order of keys, the spelling of numbers, whitespace and unknown
//! fields unchanged. This module knows JSON. Of the OpenAI API it knows only the fields that a client must never set.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// Fields that steer how KV moves. From a client they could crash an engine, make it connect anywhere, or fetch
/// another client's KV. They never reach an engine.
const FORBIDDEN: [&str; 2] = ["kv_transfer_params", "ec_transfer_params"];

/// vLLM's object of extra arguments, which could hide the forbidden fields.
const EXTRA_ARGUMENTS: &str = "vllm_xargs";

/// Maximum number of members of an object. vLLM 0.32 knows about a hundred fields of a request.
const MAX_MEMBERS: usize = 1024;

/// Maximum nesting of objects and lists. Engines refuse such bodies anyway: Python's JSON reader reads at most 994
/// levels, pydantic's 201 (seen on Python 3.11).
const MAX_DEPTH: usize = 1000;

/// Why the proxy cannot use a body.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    /// The body is not UTF-8 text.
    #[error("it is not UTF-8")]
    NotUtf8(#[source] std::str::Utf8Error),
    /// The body is not JSON, or not a JSON object.
    #[error("it is not a JSON object")]
    NotObject(#[source] serde_json::Error),
    /// The object has more than `MAX_MEMBERS` members.
    #[error("it has more than {} members, which is the limit", MAX_MEMBERS)]
    TooManyMembers,
    /// Objects and lists are nested deeper than `MAX_DEPTH`.
    #[error("it is nested deeper than {} levels, which is the limit", MAX_DEPTH)]
    TooDeep,
    /// The object that could hide forbidden fields cannot be parsed.
    #[error("`{EXTRA_ARGUMENTS}` cannot be read")]
    ExtraArguments(#[source] Box<BodyError>),
}

/// A JSON object and the positions of its members.
#[derive(Debug)]
pub(crate) struct Document<'body> {
    text: &'body str,
    /// In the order of the text, with duplicates.
    members: Vec<Member<'body>>,
    /// The index of each key's member. Of duplicates the last one counts, as in the engines.
    by_key: HashMap<Cow<'body, str>, usize>,
    /// The extra arguments without the forbidden fields, if the client sent any of those.
    clean_extra: Option<String>,
}

#[derive(Debug)]
struct Member<'body> {
    /// The key without escapes.
    key: Cow<'body, str>,
    /// From the key's opening quote to the end of the value.
    whole: Range<usize>,
    value: Range<usize>,
}

/// An edit of one key: its new value as JSON text, or `None` to remove it.
pub(crate) type Edit<'edit> = (&'edit str, Option<&'edit str>);

impl<'body> Document<'body> {
    /// Parses the object that a client's `body` must be.
    pub(crate) fn parse(body: &'body [u8]) -> Result<Self, BodyError> {
        let mut document = Self::parse_text(std::str::from_utf8(body).map_err(BodyError::NotUtf8)?)?;
        if let Some(extra) = document.get(EXTRA_ARGUMENTS) {
            let clean = without_forbidden(extra);
            document.clean_extra = clean.map_err(|error| BodyError::ExtraArguments(Box::new(error)))?;
        }
        Ok(document)
    }

    /// Parses the members of an object in linear time and bounded memory.
    pub(crate) fn parse_text(text: &'body str) -> Result<Self, BodyError> {
        if is_too_deep(text.as_bytes()) {
            return Err(BodyError::TooDeep);
        }
        let mut entries = Vec::new();
        let mut reader = serde_json::Deserializer::from_str(text);
        let read = Entries(&mut entries).deserialize(&mut reader);
        if entries.len() > MAX_MEMBERS {
            return Err(BodyError::TooManyMembers);
        }
        read.and_then(|()| reader.end()).map_err(BodyError::NotObject)?;
        let mut members = Vec::with_capacity(entries.len());
        let mut by_key = HashMap::with_capacity(entries.len());
        let mut cursor = text.find('{').unwrap_or_default() + 1;
        for (index, (Key(key), raw)) in entries.into_iter().enumerate() {
            // Only whitespace and a comma stand between two members, so the next quote opens the key.
            let start = cursor + text[cursor..].find('"').unwrap_or_default();
            let value = raw.get().as_ptr().addr() - text.as_ptr().addr();
            let end = value + raw.get().len();
            by_key.insert(key.clone(), index);
            members.push(Member {
                key,
                whole: start..end,
                value: value..end,
            });
            cursor = end;
        }
        Ok(Self {
            text,
            members,
            by_key,
            clean_extra: None,
        })
    }

    /// The value of `key` as JSON text. Of duplicates the last one counts, as in the engines.
    pub(crate) fn get(&self, key: &str) -> Option<&'body str> {
        self.by_key
            .get(key)
            .map(|index| &self.text[self.members[*index].value.clone()])
    }

    /// The value of `key`, unless it is absent or null.
    pub(crate) fn given(&self, key: &str) -> Option<&'body str> {
        self.get(key).filter(|value| *value != "null")
    }

    /// Each key once, unescaped, with its value as JSON text, in the order of the text.
    pub(crate) fn members(&self) -> impl Iterator<Item = (&str, &'body str)> {
        let last = self.members.iter().enumerate().filter(|member| self.is_last(*member));
        last.map(|(_, member)| (&*member.key, &self.text[member.value.clone()]))
    }

    /// Whether no later member has the same key.
    fn is_last(&self, (index, member): (usize, &Member<'body>)) -> bool {
        self.by_key.get(&member.key) == Some(&index)
    }

    /// The body with `edits` applied and without the fields that a client must not set. An edit can set one of those.
    ///
    /// An edited key keeps its place and a new key comes last. A removed member takes the whitespace before it along.
    /// Of duplicates only the last is left, so the engine reads what the proxy has read.
    pub(crate) fn edited(&self, edits: &[Edit<'_>]) -> Vec<u8> {
        let mut all: Vec<Edit<'_>> = edits.to_vec();
        all.extend(
            FORBIDDEN
                .iter()
                .filter(|key| !edits.iter().any(|(edited, _)| edited == *key))
                .map(|key| (*key, None)),
        );
        all.extend(self.clean_extra.as_deref().map(|extra| (EXTRA_ARGUMENTS, Some(extra))));
        self.apply(&all).into_bytes()
    }

    /// The text with only `edits` applied, for text that xpyd or an engine wrote.
    pub(crate) fn apply(&self, edits: &[Edit<'_>]) -> String {
        let growth: usize = edits
            .iter()
            .map(|(key, value)| key.len() + value.map_or(0, str::len) + 4)
            .sum();
        let mut out = String::with_capacity(self.text.len() + growth);
        let mut cursor = self.text.find('{').unwrap_or_default() + 1;
        let mut empty = true;
        out.push_str(&self.text[..cursor]);
        for (index, member) in self.members.iter().enumerate() {
            let separator = &self.text[cursor..member.whole.start];
            cursor = member.whole.end;
            let edit = edits.iter().find(|(key, _)| *key == member.key);
            if matches!(edit, Some((_, None))) || !self.is_last((index, member)) {
                continue;
            }
            match separator.split_once(',') {
                Some((before, after)) if empty => out.extend([before, after]),
                _ => out.push_str(separator),
            }
            empty = false;
            match edit {
                Some((_, Some(value))) => out.extend([&self.text[member.whole.start..member.value.start], value]),
                _ => out.push_str(&self.text[member.whole.clone()]),
            }
        }
        for (key, value) in edits {
            if let (Some(value), false) = (value, self.by_key.contains_key(*key)) {
                out.extend([if empty { "\"" } else { ",\"" }, key, "\":", value]);
                empty = false;
            }
        }
        out.push_str(&self.text[cursor..]);
        out
    }
}

/// One step of the path to a value within a JSON text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PathStep {
    /// The value of an object's key. Of duplicates the last one counts.
    Key(&'static str),
    /// The first element of a list.
    First,
}

/// The JSON text with the value at `path` replaced by `new(value)`. `None` if there is no such value, or `new`
/// returns `None`.
pub(crate) fn edit_at(text: &str, path: &[PathStep], new: impl FnOnce(&str) -> Option<String>) -> Option<String> {
    match path {
        [] => new(text),
        [PathStep::Key(key), rest @ ..] => {
            let document = Document::parse_text(text).ok()?;
            let value = edit_at(document.get(key)?, rest, new)?;
            Some(document.apply(&[(key, Some(&value))]))
        }
        [PathStep::First, rest @ ..] => {
            let FirstElement(first) = serde_json::from_str(text).ok()?;
            let first = first?.get();
            let start = first.as_ptr().addr() - text.as_ptr().addr();
            let value = edit_at(first, rest, new)?;
            Some([&text[..start], &value, &text[start + first.len()..]].concat())
        }
    }
}

/// The object `text` without the forbidden fields. `None` if it contains none of them or is not an object.
fn without_forbidden(text: &str) -> Result<Option<String>, BodyError> {
    if !text.starts_with('{') {
        return Ok(None);
    }
    let document = Document::parse_text(text)?;
    let is_clean = FORBIDDEN.iter().all(|key| document.get(key).is_none());
    Ok((!is_clean).then(|| document.apply(&FORBIDDEN.map(|key| (key, None)))))
}

/// Whether well-formed JSON nests objects and lists deeper than the limit.
fn is_too_deep(text: &[u8]) -> bool {
    // Few texts have more brackets than allowed levels, and counting brackets is fast.
    if memchr::memchr2_iter(b'[', b'{', text).nth(MAX_DEPTH).is_none() {
        return false;
    }
    let (mut depth, mut at) = (0_usize, 0);
    while let Some(byte) = text.get(at) {
        match byte {
            b'[' | b'{' if depth == MAX_DEPTH => return true,
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            b'"' => at = end_of_string(text, at + 1),
            _ => {}
        }
        at += 1;
    }
    false
}

/// The index of the quote that ends the string from `at` on, or the length of the text if no quote follows.
pub(crate) fn end_of_string(text: &[u8], mut at: usize) -> usize {
    while let Some(found) = text.get(at..).and_then(|rest| memchr::memchr2(b'"', b'\\', rest)) {
        at += found;
        if text[at] == b'"' {
            return at;
        }
        at += 2;
    }
    text.len()
}

/// A key, copied only if it contains escapes.
#[derive(serde::Deserialize)]
struct Key<'body>(#[serde(borrow)] Cow<'body, str>);

/// Reads the members of an object in order, with duplicates, up to one more than the limit.
struct Entries<'read, 'body>(&'read mut Vec<(Key<'body>, &'body RawValue)>);

impl<'de> DeserializeSeed<'de> for Entries<'_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_, 'de> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(entry) = map.next_entry()? {
            self.0.push(entry);
            if self.0.len() > MAX_MEMBERS {
                return Err(A::Error::custom("too many members"));
            }
        }
        Ok(())
    }
}

/// The first element of a list, if the list is not empty.
struct FirstElement<'text>(Option<&'text RawValue>);

impl<'de> Deserialize<'de> for FirstElement<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = FirstElement<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let first = list.next_element()?;
                while list.next_element::<&RawValue>()?.is_some() {}
                Ok(FirstElement(first))
            }
        }
        deserializer.deserialize_seq(List)
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
    fn only_the_last_duplicate_reaches_an_engine() {
        let body = r#"{"n":1,"a":0, "\u006e":2}"#;
        assert_eq!(Document::parse(body.as_bytes()).expect("object").get("n"), Some("2"));
        assert_eq!(edit(body, &[]), r#"{"a":0, "\u006e":2}"#);
        assert_eq!(edit(body, &[("n", Some("7"))]), r#"{"a":0, "\u006e":7}"#);
        assert_eq!(edit(body, &[("n", None)]), r#"{"a":0}"#);
        let body = r#"{"vllm_xargs":{"kv_transfer_params":{"remote_host":"evil"}},"vllm_xargs":{"a":1}}"#;
        assert_eq!(edit(body, &[]), r#"{"vllm_xargs":{"a":1}}"#);
    }

    #[test]
    fn errors_name_the_limits_of_members_and_depth() {
        let members = |count: usize| {
            let members: Vec<String> = (0..count).map(|number| format!("\"k{number}\":0")).collect();
            format!("{{{}}}", members.join(","))
        };
        let nested = |depth: usize| format!("{{\"a\":{}0{}}}", "[".repeat(depth - 1), "]".repeat(depth - 1));
        let message =
            |body: &str| xpyd_base::report::one_line(&Document::parse(body.as_bytes()).expect_err("over a limit"));
        for body in [
            members(MAX_MEMBERS),
            nested(MAX_DEPTH),
            // Brackets within a string are text.
            format!("{{\"a\":\"{}\",\"b\":\"\\\\\"}}", "\\\"[{".repeat(2 * MAX_DEPTH)),
            // Many brackets, but few levels.
            format!("{{\"a\":[{}0]}}", "[{}],".repeat(2 * MAX_DEPTH)),
        ] {
            assert_eq!(edit(&body, &[]), body);
        }
        assert!(message(&members(MAX_MEMBERS + 1)).contains("more than 1024 members"));
        assert!(message(&nested(MAX_DEPTH + 1)).contains("deeper than 1000 levels"));
        // Parsing stops at the limit, before the syntax error.
        assert!(message(&format!("{}:", members(2000))).contains("more than 1024 members"));
        assert!(message(&"[".repeat(1_000_000)).contains("deeper than 1000 levels"));
        let extra = message(&format!("{{\"vllm_xargs\":{}}}", members(MAX_MEMBERS + 1)));
        assert!(extra.contains("`vllm_xargs`") && extra.contains("1024"), "{extra}");
    }

    #[test]
    fn unreadable_extra_arguments_are_refused() {
        // Python reads such a key; Rust cannot represent it as text.
        let body = r#"{"vllm_xargs":{"kv_transfer_params":{},"\ud800":1}}"#;
        assert!(matches!(
            Document::parse(body.as_bytes()),
            Err(BodyError::ExtraArguments(_))
        ));
        for body in [
            r#"{"vllm_xargs":null}"#,
            r#"{"vllm_xargs":[1]}"#,
            r#"{"vllm_xargs":"{"}"#,
        ] {
            assert_eq!(edit(body, &[]), body);
        }
    }

    #[test]
    fn a_value_deep_within_changes_alone() {
        let path = [PathStep::Key("choices"), PathStep::First, PathStep::Key("text")];
        let text =
            "{ \"choices\" :[ {\"index\":0, \"text\": \"a\\u00e9\" ,\"x\":1.50}, {\"text\":\"z\"}],\n\"usage\":null}";
        let changed = edit_at(text, &path, |old| Some(format!("[{old}]"))).expect("it is there");
        assert_eq!(changed, text.replacen("\"a\\u00e9\"", "[\"a\\u00e9\"]", 1));
        assert_eq!(edit_at(text, &path, |_| None), None);
        for path in [
            &[PathStep::Key("usage"), PathStep::Key("a")][..],
            &[PathStep::First],
            &[PathStep::Key("none")],
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
        assert_eq!(own.matches("rams\":").count(), 1, "{own}");
    }

    #[test]
    fn non_objects_are_refused_with_their_position() {
        let message = |body: &[u8]| xpyd_base::report::one_line(&Document::parse(body).expect_err("no object"));
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

    /// JSON objects as clients could write them, with any spacing, escapes and duplicate keys.
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

    /// Any JSON value as text, in spellings that a JSON writer would normalize.
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

    /// A few keys, so that they repeat, and forbidden ones in several spellings.
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
        fn edits_leave_other_members_unchanged(
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
            let names: Vec<String> = members.iter().map(|(key, ..)| key_of(key)).collect();
            for (place, ((key, before, ..), text)) in members.iter().zip(&texts).enumerate() {
                let name = &names[place];
                match edits.iter().find(|(edited, _)| edited == name) {
                    _ if FORBIDDEN.contains(&name.as_str()) || names[place + 1..].contains(name) => {}
                    None => due.push(text.clone()),
                    Some((_, Some(value))) => due.push(format!("{key}{before}:{before}{value}")),
                    Some((_, None)) => {}
                }
            }
            let new = edits.iter().filter(|(key, _)| !names.contains(key));
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
        fn an_unedited_body_is_unchanged(body in objects()) {
            let document = Document::parse_text(&body).expect("an object");
            prop_assume!(document.by_key.len() == document.members.len());
            prop_assert_eq!(edit(&body, &[]), body);
        }
    }
}
