//! What answers say that they used. The prompt was read by the prefill engine, so its count of cached tokens is the one that
//! a single engine would give; the decode engine's count says instead whether the KV came from elsewhere.
//!
//! vLLM 0.32.0 with `--enable-prompt-tokens-details`, which xpyd gives to its engines: a decode engine counts what it found
//! in its own cache plus what its connector loaded. With LMCache that is every token but the last one, with NIXL every token:
//! the connector leaves `remote_prefill_cached_tokens` out of the decode leg, because vLLM would repeat it as its own count.
//! A load that failed counts 0, unless the engine had the beginning of the prompt in its own cache: then vLLM does not
//! correct the count. Without the option, and in a stream without `include_usage`, nothing is proven.

use bytes::Bytes;
use serde::Deserialize;

use super::document::{Document, Step, edit_at};
use super::sse;

/// Where the details of the prompt stand in an answer, or in the event of a stream that tells the usage.
const DETAILS: &[u8] = b"\"prompt_tokens_details\":";

/// What the prefill engine used for a request.
#[derive(Debug)]
pub(crate) struct PrefillUsage {
    /// The members of its `prompt_tokens_details` that have a value, as JSON text.
    details: Vec<(String, String)>,
}

/// Most tokens that a decode engine computes where LMCache hands over whole chunks only: its default chunk.
const CHUNK: u64 = 256;

/// What the decode engine's usage proves about the hand-off.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Proof {
    /// Nothing: it does not say, or its count fits both.
    #[default]
    None,
    /// It did not compute the prompt.
    Received,
    /// It computed the prompt, or most of it.
    Computed,
}

/// The part of `usage` that counts here.
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
    /// What it proves, where it is a decode engine's.
    fn proof(&self) -> Proof {
        let cached = self
            .prompt_tokens_details
            .as_ref()
            .and_then(|details| details.cached_tokens);
        // The only token of a prompt is computed wherever its KV is.
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
    /// What a prefill engine's whole answer says.
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

    /// A whole answer of the decode engine as the client shall see it, and what it proves. `None` if it tells no details.
    pub(crate) fn correct(&self, answer: &[u8]) -> Option<(String, Proof)> {
        if !has_details(answer) {
            return None;
        }
        let mut proof = Proof::None;
        let corrected = edit_at(std::str::from_utf8(answer).ok()?, &[Step::Key("usage")], |usage| {
            proof = serde_json::from_str::<Usage>(usage).ok()?.proof();
            edit_at(usage, &[Step::Key("prompt_tokens_details")], |details| {
                self.details(details)
            })
        });
        corrected.map(|answer| (answer, proof))
    }

    /// The same of whole events of its stream.
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

    /// The decode engine's details with the prefill engine's values. What only one of them tells stays as it is.
    fn details(&self, details: &str) -> Option<String> {
        let own = Document::parse_text(details).ok()?;
        let told = self.details.iter().filter(|(key, _)| own.given(key).is_some());
        let edits: Vec<_> = told.map(|(key, value)| (key.as_str(), Some(value.as_str()))).collect();
        Some(own.apply(&edits))
    }
}

/// Whether an answer tells details of the prompt. Text cannot look so, because it has its quotes escaped; most answers and
/// events are done with here.
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
    fn the_client_sees_the_prefill_engines_cache_and_every_other_byte_unchanged() {
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
    fn a_hand_off_is_proven_only_by_a_count_of_almost_the_whole_prompt() {
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
