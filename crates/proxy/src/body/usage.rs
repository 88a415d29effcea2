//! Reads and corrects the `usage` of answers. The prefill engine read the prompt, so its count of cached tokens is
//! the one that a single engine would report. The decode engine's count shows whether the KV came from the prefill
//! engine.
//!
//! vLLM 0.32.0 with `--enable-prompt-tokens-details`, which xpyd gives to its engines: a decode engine counts the
//! tokens in its own cache plus those that its connector loaded. With LMCache that is every token but the last, with
//! NIXL every token: the connector leaves `remote_prefill_cached_tokens` out of the decode leg, because vLLM would
//! report it as its own count. A failed load counts 0, unless the engine had the beginning of the prompt in its own
//! cache: then vLLM does not correct the count. Without the option, and in a stream without `include_usage`, the
//! usage proves nothing.

use bytes::Bytes;
use serde::Deserialize;

use super::document::{Document, PathStep, edit_at};
use super::sse;

/// The key of the prompt's details in an answer, or in the stream event that holds the usage.
const DETAILS: &[u8] = b"\"prompt_tokens_details\":";

/// The usage of the prefill engine for one request.
#[derive(Debug)]
pub(crate) struct PrefillUsage {
    /// The members of its `prompt_tokens_details` that have a value, as JSON text.
    details: Vec<(String, String)>,
}

/// Maximum tokens that a decode engine computes because LMCache hands over whole chunks only: its default chunk size.
const CHUNK: u64 = 256;

/// What the decode engine's usage proves about the hand-off.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Proof {
    /// Nothing: it reports no count, or the count fits both cases.
    #[default]
    None,
    /// It did not compute the prompt.
    Received,
    /// It computed most or all of the prompt.
    Computed,
}

/// The part of `usage` that this module reads.
#[derive(Debug, Default, Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: u64,
    prompt_tokens_details: Option<Details>,
}

#[derive(Debug, Deserialize)]
struct Details {
    cached_tokens: Option<u64>,
}

impl Usage {
    /// What the usage of a decode engine proves.
    fn proof(&self) -> Proof {
        let cached = self
            .prompt_tokens_details
            .as_ref()
            .and_then(|details| details.cached_tokens);
        // The engine always computes the only token of a prompt, wherever the KV is.
        let Some(cached) = cached.filter(|_| self.prompt_tokens > 1) else {
            return Proof::None;
        };
        match self.prompt_tokens.saturating_sub(cached) {
            _ if cached == 0 => Proof::Computed,
            0 | 1 => Proof::Received,
            computed if computed <= CHUNK => Proof::None,
            _ => Proof::Computed,
        }
    }
}

impl PrefillUsage {
    /// Reads the usage of a prefill engine's whole answer.
    pub(crate) fn of(answer: &[u8]) -> Self {
        let usage = std::str::from_utf8(answer)
            .ok()
            .filter(|_| has_details(answer))
            .and_then(|text| Document::parse_text(text).ok()?.given("usage"));
        let details = usage.and_then(|usage| {
            let all = Document::parse_text(Document::parse_text(usage).ok()?.given("prompt_tokens_details")?).ok()?;
            let given = all.members().filter(|(_, value)| *value != "null");
            Some(given.map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
        });
        Self {
            details: details.unwrap_or_default(),
        }
    }

    /// What a whole answer of the decode engine proves.
    pub(crate) fn proof_of(answer: &[u8]) -> Proof {
        #[derive(Deserialize)]
        struct Answer {
            usage: Usage,
        }
        if !has_details(answer) {
            return Proof::None;
        }
        serde_json::from_slice::<Answer>(answer).map_or(Proof::None, |answer| answer.usage.proof())
    }

    /// A whole answer of the decode engine with the usage for the client, and what it proves. `None` if it has no
    /// details.
    pub(crate) fn correct(&self, answer: &[u8]) -> Option<(String, Proof)> {
        if !has_details(answer) {
            return None;
        }
        let mut proof = Proof::None;
        let corrected = edit_at(std::str::from_utf8(answer).ok()?, &[PathStep::Key("usage")], |usage| {
            proof = serde_json::from_str::<Usage>(usage).ok()?.proof();
            edit_at(usage, &[PathStep::Key("prompt_tokens_details")], |details| {
                self.details(details)
            })
        });
        corrected.map(|answer| (answer, proof))
    }

    /// Does the same for whole events of its stream.
    pub(crate) fn correct_events(&self, events: &[u8]) -> Option<(Bytes, Proof)> {
        if !has_details(events) {
            return None;
        }
        let mut proof = Proof::None;
        let mut out = Vec::with_capacity(events.len());
        for (_, event) in sse::each(events) {
            let corrected = sse::data(event).next().and_then(|data| {
                let (corrected, proven) = self.correct(data)?;
                proof = proven;
                let start = data.as_ptr().addr() - event.as_ptr().addr();
                Some([&event[..start], corrected.as_bytes(), &event[start + data.len()..]].concat())
            });
            out.extend_from_slice(corrected.as_deref().unwrap_or(event));
        }
        Some((out.into(), proof))
    }

    /// The decode engine's details with the prefill engine's values. Members that only one of them has stay as they
    /// are.
    fn details(&self, details: &str) -> Option<String> {
        let own = Document::parse_text(details).ok()?;
        let known = self.details.iter().filter(|(key, _)| own.given(key).is_some());
        let edits: Vec<_> = known.map(|(key, value)| (key.as_str(), Some(value.as_str()))).collect();
        Some(own.apply(&edits))
    }
}

/// Whether an answer contains details of the prompt. Generated text cannot match, because its quotes are escaped.
/// Most answers and events need no further work.
fn has_details(json: &[u8]) -> bool {
    memchr::memmem::find_iter(json, DETAILS).any(|at| json[at + DETAILS.len()..].trim_ascii_start().starts_with(b"{"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREFILLED: &[u8] = br#"{"usage":{"prompt_tokens":300,"total_tokens":301,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":16,"created_cache_tokens":null}}}"#;

    fn usage(details: &str) -> String {
        format!(
            "{{\"choices\":[{{\"text\":\"\\\"prompt_tokens_details\\\":1\"}}], \"usage\":{{\"prompt_tokens\":300,\"prompt_tokens_details\":{details} }},\"x\":1.50}}"
        )
    }

    #[test]
    fn only_the_cached_tokens_of_an_answer_change() {
        let used = PrefillUsage::of(PREFILLED);
        for (decoded, seen, proof) in [
            (r#"{"cached_tokens":299}"#, r#"{"cached_tokens":16}"#, Proof::Received),
            (
                r#"{ "cached_tokens": 0,"new":[1] }"#,
                r#"{ "cached_tokens": 16,"new":[1] }"#,
                Proof::Computed,
            ),
            (
                r#"{"created_cache_tokens":7}"#,
                r#"{"created_cache_tokens":7}"#,
                Proof::None,
            ),
        ] {
            let corrected = used.correct(usage(decoded).as_bytes()).expect("it tells");
            assert_eq!(corrected, (usage(seen), proof));
        }
        assert_eq!(used.correct(usage("null").as_bytes()), None);
        let silent = PrefillUsage::of(br#"{"usage":{"prompt_tokens_details":null}}"#);
        let own = usage(r#"{"cached_tokens":299}"#);
        assert_eq!(silent.correct(own.as_bytes()).expect("it tells").0, own);
    }

    #[test]
    fn only_the_event_that_tells_the_usage_changes() {
        let text = "data: {\"choices\":[{\"text\":\"\\\"prompt_tokens_details\\\":\"}]}\n\n";
        let events = format!(
            ": x\r\n\r\n{text}data:  {}\r\n\r\ndata: [DONE]\n\n",
            usage(r#"{"cached_tokens":0}"#)
        );
        let (seen, proof) = PrefillUsage::of(PREFILLED)
            .correct_events(events.as_bytes())
            .expect("it tells");
        assert_eq!(seen, events.replace("\"cached_tokens\":0", "\"cached_tokens\":16"));
        assert_eq!(proof, Proof::Computed);
        assert_eq!(PrefillUsage::of(PREFILLED).correct_events(text.as_bytes()), None);
    }

    #[test]
    fn only_a_nearly_full_cached_count_proves_a_handoff() {
        let proof = |cached: u64, prompt: u64| {
            let answer = format!(
                r#"{{"usage":{{"prompt_tokens":{prompt},"prompt_tokens_details":{{"cached_tokens":{cached}}}}}}}"#
            );
            PrefillUsage::proof_of(answer.as_bytes())
        };
        for (cached, prompt, proven) in [
            (300, 300, Proof::Received),
            (299, 300, Proof::Received),
            // All whole chunks of LMCache, or the beginning that the decode engine had itself.
            (256, 300, Proof::None),
            (64, 5000, Proof::Computed),
            (0, 300, Proof::Computed),
            (0, 2, Proof::Computed),
            (0, 1, Proof::None),
        ] {
            assert_eq!(proof(cached, prompt), proven, "{cached} of {prompt}");
        }
    }
}
