//! Joins the answers of prefill and decode engine into one.
//!
//! Pure. A whole answer continues the prefill engine's; events have the format of vLLM 0.33.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::body::document::{Document, PathStep, edit_at};
use crate::body::serving_mode::GenerationKind;
use crate::body::sse;

/// The member of an event with a choice that stands for the hand-off.
const NO_PARAMS: &str = r#","kv_transfer_params":null"#;

/// The prefill engine's answer with the first token.
#[derive(Debug, Deserialize)]
pub(crate) struct FirstAnswer<'answer> {
    #[serde(borrow)]
    id: &'answer RawValue,
    #[serde(borrow)]
    created: &'answer RawValue,
    #[serde(borrow)]
    model: &'answer RawValue,
    pub(crate) choices: Vec<FirstChoice>,
    #[serde(default)]
    pub(crate) usage: Value,
    #[serde(borrow)]
    pub(crate) system_fingerprint: Option<&'answer RawValue>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct FirstChoice {
    text: Option<String>,
    message: Option<FirstMessage>,
    pub(crate) finish_reason: Option<String>,
    #[serde(default)]
    pub(crate) stop_reason: Value,
}

#[derive(Debug, Deserialize)]
struct FirstMessage {
    content: Option<String>,
    reasoning: Option<Value>,
    tool_calls: Option<Vec<Value>>,
}

impl FirstChoice {
    /// The first token's text, unless a parser of the engine turned it into something else.
    pub(crate) fn text(self) -> Option<String> {
        match self.message {
            None => self.text,
            Some(message) => {
                let is_plain = message.reasoning.is_none() && message.tool_calls.is_none_or(|calls| calls.is_empty());
                message.content.filter(|_| is_plain)
            }
        }
    }
}

/// The decode engine's answer, or one event of it.
#[derive(Debug, Deserialize)]
struct Rest<'answer> {
    #[serde(borrow)]
    choices: Vec<RestChoice<'answer>>,
    #[serde(borrow)]
    usage: Option<&'answer RawValue>,
    #[serde(borrow)]
    system_fingerprint: Option<&'answer RawValue>,
}

#[derive(Debug, Deserialize)]
struct RestChoice<'answer> {
    text: String,
    #[serde(borrow)]
    finish_reason: Option<&'answer RawValue>,
    #[serde(borrow)]
    stop_reason: Option<&'answer RawValue>,
}

#[derive(Debug, Deserialize)]
struct Counts {
    prompt_tokens: u64,
    completion_tokens: u64,
}

impl RestChoice<'_> {
    /// Finish and stop reason, if the choice has ended.
    fn ending(&self) -> Option<(&str, &str)> {
        let finish = self.finish_reason?.get();
        Some((finish, self.stop_reason.map_or("null", RawValue::get)))
    }
}

/// Turns the decode engine's events into the client's.
#[derive(Debug)]
pub(crate) struct EventRewriter {
    kind: GenerationKind,
    /// JSON texts that all events of an answer share.
    id: String,
    created: String,
    model: String,
}

/// The prefill engine's answer without its transfer parameters.
pub(crate) fn without_params(answer: &str) -> String {
    let params = [PathStep::Key("kv_transfer_params")];
    edit_at(answer, &params, |_| Some("null".to_owned())).unwrap_or_else(|| answer.to_owned())
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

impl EventRewriter {
    pub(crate) fn new(kind: GenerationKind, first: &FirstAnswer<'_>) -> Self {
        Self {
            kind,
            id: first.id.get().to_owned(),
            created: first.created.get().to_owned(),
            model: first.model.get().to_owned(),
        }
    }

    /// One event in the format of vLLM 0.33. `rest` follows the choices.
    fn event(&self, choices: &str, rest: &str) -> String {
        let Self {
            kind,
            id,
            created,
            model,
        } = self;
        let object = match kind {
            GenerationKind::Completions => "text_completion",
            GenerationKind::Chat => "chat.completion.chunk",
        };
        sse::event(&format!(
            r#"{{"id":{id},"object":"{object}","created":{created},"model":{model},"choices":[{choices}]{rest}}}"#
        ))
    }

    /// The first event of a chat. A completion has none.
    fn role(&self) -> String {
        let choice = r#"{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}"#;
        match self.kind {
            GenerationKind::Completions => String::new(),
            GenerationKind::Chat => self.event(choice, r#","prompt_token_ids":null,"prompt_text":null"#),
        }
    }

    /// A choice with a piece of text, and its finish and stop reason if it ends.
    fn choice(&self, text: &str, ending: Option<(&str, &str)>) -> String {
        let text = quoted(text);
        let (finish, stop) = ending.unwrap_or(("null", "null"));
        match self.kind {
            GenerationKind::Completions => format!(
                r#"{{"index":0,"text":{text},"logprobs":null,"finish_reason":{finish},"stop_reason":{stop},"prompt_token_ids":null,"token_ids":null}}"#
            ),
            GenerationKind::Chat => {
                let stop = ending.map_or_else(String::new, |(_, stop)| format!(r#""stop_reason":{stop},"#));
                format!(
                    r#"{{"index":0,"delta":{{"content":{text}}},"logprobs":null,"finish_reason":{finish},{stop}"token_ids":null}}"#
                )
            }
        }
    }

    /// The beginning of a stream: the first token, after the role if it is a chat.
    pub(crate) fn first_events(&self, text: &str) -> String {
        self.role() + &self.event(&self.choice(text, None), NO_PARAMS)
    }

    /// A whole stream of one token.
    pub(crate) fn only_events(
        &self,
        text: &str,
        (finish, stop): &(String, String),
        usage: Option<&str>,
        fingerprint: Option<&RawValue>,
    ) -> String {
        let choice = self.choice(text, Some((finish, stop)));
        let fingerprint = fingerprint_member(fingerprint);
        let end = match usage {
            None => self.event(&choice, &(NO_PARAMS.to_owned() + &fingerprint)),
            Some(usage) => {
                let usage = format!(r#","usage":{usage}{fingerprint}"#);
                self.event(&choice, NO_PARAMS) + &self.event("", &usage)
            }
        };
        self.role() + &end + &sse::event("[DONE]")
    }

    /// The decode engine's usage for the client: the engine counted the first token as part of the prompt.
    fn usage(usage: &str) -> Option<String> {
        let counts: Counts = serde_json::from_str(usage).ok()?;
        let (prompt, completion) = (counts.prompt_tokens.checked_sub(1)?, counts.completion_tokens + 1);
        let (prompt, completion) = (prompt.to_string(), completion.to_string());
        let edits = [
            ("prompt_tokens", Some(prompt.as_str())),
            ("completion_tokens", Some(completion.as_str())),
        ];
        Some(Document::parse_text(usage).ok()?.apply(&edits))
    }

    /// The prefill engine's answer with `text`, continued by the decode engine's.
    pub(crate) fn whole(&self, answer: &[u8], text: &str, decoded: &[u8]) -> Option<String> {
        let rest: Rest<'_> = serde_json::from_slice(decoded).ok()?;
        let choice = rest.choices.first()?;
        let counts: Counts = serde_json::from_str(rest.usage?.get()).ok()?;
        let path: &[PathStep] = match self.kind {
            GenerationKind::Completions => &[PathStep::Key("text")],
            GenerationKind::Chat => &[PathStep::Key("message"), PathStep::Key("content")],
        };
        let (finish, stop) = choice.ending().unwrap_or(("null", "null"));
        let answer = std::str::from_utf8(answer).ok()?;
        let joined = edit_at(answer, &[PathStep::Key("choices"), PathStep::First], |first| {
            let text = quoted(&(text.to_owned() + &choice.text));
            let joined = edit_at(first, path, |_| Some(text))?;
            let edits = [("finish_reason", Some(finish)), ("stop_reason", Some(stop))];
            Some(Document::parse_text(&joined).ok()?.apply(&edits))
        })?;
        let counted = edit_at(&joined, &[PathStep::Key("usage")], |usage| {
            let first: Counts = serde_json::from_str(usage).ok()?;
            let made = counts.completion_tokens + 1;
            let (made, total) = (made.to_string(), (first.prompt_tokens + made).to_string());
            let edits = [
                ("completion_tokens", Some(made.as_str())),
                ("total_tokens", Some(total.as_str())),
            ];
            Some(Document::parse_text(usage).ok()?.apply(&edits))
        })?;
        Some(without_params(&counted))
    }

    /// The document with the id and the time of the prefill engine's answer.
    fn signed(&self, document: &Document<'_>) -> String {
        document.apply(&[("id", Some(&self.id)), ("created", Some(&self.created))])
    }

    /// Whole events of the decode engine, rewritten for the client. Anything but a completion chunk, such as an error
    /// or the end marker, stays unchanged.
    pub(crate) fn rewrite(&mut self, events: &Bytes) -> Bytes {
        let mut out = String::with_capacity(events.len());
        for (_, event) in sse::each(events) {
            let rewritten = sse::data(event)
                .next()
                .and_then(|data| self.chunk(std::str::from_utf8(data).ok()?));
            match rewritten {
                Some(chunk) => out.push_str(&chunk),
                None => out.push_str(&String::from_utf8_lossy(event)),
            }
        }
        out.into()
    }

    /// Rewrites one chunk of the decode engine.
    fn chunk(&self, data: &str) -> Option<String> {
        let rest: Rest<'_> = serde_json::from_str(data).ok()?;
        if self.kind == GenerationKind::Completions {
            let signed = self.signed(&Document::parse_text(data).ok()?);
            let counted = edit_at(&signed, &[PathStep::Key("usage")], Self::usage);
            return Some(sse::event(&counted.unwrap_or(signed)));
        }
        let usage = rest.usage.and_then(|usage| Self::usage(usage.get()));
        let usage = usage.map_or_else(String::new, |usage| format!(r#","usage":{usage}"#));
        let (choice, params) = match rest.choices.first() {
            Some(choice) => (self.choice(&choice.text, choice.ending()), NO_PARAMS),
            None => (String::new(), ""),
        };
        let rest = [params, &usage, &fingerprint_member(rest.system_fingerprint)].concat();
        Some(self.event(&choice, &rest))
    }
}

/// The `system_fingerprint` member that engines can send with their last event.
fn fingerprint_member(fingerprint: Option<&RawValue>) -> String {
    fingerprint.map_or_else(String::new, |fingerprint| {
        format!(r#","system_fingerprint":{}"#, fingerprint.get())
    })
}

/// A usage as vLLM writes it in a stream: members without a value are left out.
pub(crate) fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(members) => {
            let given = members.iter().filter(|(_, value)| !value.is_null());
            given.map(|(key, value)| (key.clone(), without_nulls(value))).collect()
        }
        other => other.clone(),
    }
}
