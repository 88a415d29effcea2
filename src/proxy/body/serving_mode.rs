//! What happens to a request: handed from prefill to decode, spliced, or answered by a decode engine alone.
//!
//! Pure. A request goes to a decode engine alone when its answer could not be exactly that of one engine otherwise. Which
//! fields do that stands in `fields`, and in docs/matrix.md, which is made of it.

use super::document::Document;
use super::field_table;
use crate::connector::DecodeFlow;

/// The two routes that generate text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

impl Kind {
    /// The route.
    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }

    /// Where the prompt is.
    pub(crate) fn prompt_field(self) -> &'static str {
        match self {
            Self::Completions => "prompt",
            Self::Chat => "messages",
        }
    }
}

/// What happens to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Course {
    /// Prefill leg, hand-off, then the client's own body to the decode engine.
    Handoff,
    /// Prefill leg, hand-off, then prompt tokens plus first token to the decode engine.
    Splice(SpliceRequest),
    /// A decode engine alone, and why.
    Bypass(&'static str),
}

/// What a splice must know of the request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SpliceRequest {
    /// Tokens to generate; `None` is as many as fit, which only chat can ask for.
    pub(crate) limit: Option<u64>,
    /// Whether the client wants events.
    pub(crate) stream: bool,
    /// Whether its last event shall be the usage.
    pub(crate) include_usage: bool,
}

/// Decides.
pub(crate) fn course(kind: Kind, document: &Document<'_>, flow: DecodeFlow) -> Course {
    let mut unspliced = None;
    for (key, value) in document.members() {
        let value = Some(value).filter(|value| *value != "null");
        let field = field_table::find(kind, key);
        if let Some(field) = field.filter(|field| !field.handoff.serves(value)) {
            return Course::Bypass(field.name);
        }
        // Some of these rules read the whole value, so they are only asked where a splice is possible.
        if flow == DecodeFlow::TokenSplice && unspliced.is_none() {
            unspliced = match field {
                Some(field) if !field.splice.serves(value) => Some(field.name),
                None if value.is_some() => Some("a field that no rule names"),
                Some(_) | None => None,
            };
        }
    }
    if document.given(kind.prompt_field()).is_none() {
        return Course::Bypass(kind.prompt_field());
    }
    match (flow, unspliced) {
        (DecodeFlow::Original, _) => Course::Handoff,
        (DecodeFlow::TokenSplice, Some(reason)) => Course::Bypass(reason),
        (DecodeFlow::TokenSplice, None) => splice_request(kind, document),
    }
}

/// Why a field can send a request to a decode engine alone.
pub(crate) fn why(kind: Kind, field: &str) -> &'static str {
    field_table::find(kind, field).map_or("", |field| field.why)
}

/// What a splice must know of a request whose fields it serves.
fn splice_request(kind: Kind, document: &Document<'_>) -> Course {
    let stream = document.given("stream") == Some("true");
    let options = document.given("stream_options");
    if options.is_some() && !stream {
        return Course::Bypass("stream_options");
    }
    let limit = match kind {
        // vLLM 0.32 takes null for absent, which means 16.
        Kind::Completions => document.given("max_tokens").unwrap_or("16"),
        Kind::Chat => document
            .given("max_completion_tokens")
            .or(document.given("max_tokens"))
            .unwrap_or("null"),
    };
    Course::Splice(SpliceRequest {
        limit: limit.parse().ok(),
        stream,
        include_usage: options.and_then(include_usage).unwrap_or(false),
    })
}

/// Whether a JSON value is a list of token ids.
pub(crate) fn is_token_list(value: &str) -> bool {
    value
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .is_some_and(|inside| {
            inside.bytes().any(|byte| byte.is_ascii_digit())
                && inside
                    .bytes()
                    .all(|byte| byte.is_ascii_digit() || byte == b',' || byte.is_ascii_whitespace())
        })
}

/// `include_usage` of stream options that hold nothing else.
pub(crate) fn include_usage(options: &str) -> Option<bool> {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Options {
        #[serde(default)]
        include_usage: bool,
    }
    serde_json::from_str::<Options>(options)
        .ok()
        .map(|options| options.include_usage)
}

/// Whether every message is a role and text: images and tool calls would not survive as token ids.
pub(crate) fn is_plain_chat(messages: &str) -> bool {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Message {
        #[serde(rename = "role")]
        _role: AnyText,
        #[serde(rename = "content")]
        _content: AnyText,
    }
    // Messages of no size: a list of any length takes no memory.
    serde_json::from_str::<Vec<Message>>(messages).is_ok()
}

/// A text that is read and not kept.
struct AnyText;

impl<'de> serde::Deserialize<'de> for AnyText {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl serde::de::Visitor<'_> for Text {
            type Value = AnyText;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("a text")
            }

            fn visit_str<E>(self, _: &str) -> Result<AnyText, E> {
                Ok(AnyText)
            }
        }
        deserializer.deserialize_str(Text)
    }
}

#[cfg(test)]
mod tests;
