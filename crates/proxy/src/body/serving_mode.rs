//! Decides how a generation is served: prefill and decode on two engines, with or without the prefill engine's first
//! token, or on one decode engine.
//!
//! Pure. A decode engine answers alone when two engines could not give exactly the answer of one. The rule of each
//! field stands in `field_table`, from which docs/matrix.md is generated.

use super::document::Document;
use super::field_table;
use xpyd_base::connector::DecodeFlow;

/// The two routes that generate text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GenerationKind {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

impl GenerationKind {
    /// The path of the route.
    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }

    /// The field that holds the prompt.
    pub(crate) fn prompt_field(self) -> &'static str {
        match self {
            Self::Completions => "prompt",
            Self::Chat => "messages",
        }
    }
}

/// How the engines serve a generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ServingMode {
    /// Prefill leg, hand-off, then the client's own body to the decode engine.
    Handoff,
    /// Prefill leg, hand-off, then prompt tokens plus first token to the decode engine.
    FirstToken(FirstTokenRequest),
    /// A decode engine answers alone. Holds the field or reason.
    DecodeOnly(&'static str),
}

/// What the first-token path must know of the request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FirstTokenRequest {
    /// Tokens to generate. `None`, which only a chat can request, fills the context.
    pub(crate) limit: Option<u64>,
    /// Whether the client wants a stream.
    pub(crate) stream: bool,
    /// Whether the last event of the stream must hold the usage.
    pub(crate) include_usage: bool,
}

/// Decides how to serve a request with these fields.
pub(crate) fn serving_mode(kind: GenerationKind, document: &Document<'_>, flow: DecodeFlow) -> ServingMode {
    let mut no_first_token = None;
    for (key, value) in document.members() {
        let value = Some(value).filter(|value| *value != "null");
        let field = field_table::find(kind, key);
        if let Some(field) = field.filter(|field| !field.handoff.serves(value)) {
            return ServingMode::DecodeOnly(field.name);
        }
        // Some rules read the whole value, so they run only if the prefill engine can make the first token.
        if flow == DecodeFlow::TokenSplice && no_first_token.is_none() {
            no_first_token = match field {
                Some(field) if !field.first_token.serves(value) => Some(field.name),
                None if value.is_some() => Some("a field that no rule names"),
                Some(_) | None => None,
            };
        }
    }
    if document.given(kind.prompt_field()).is_none() {
        return ServingMode::DecodeOnly(kind.prompt_field());
    }
    match (flow, no_first_token) {
        (DecodeFlow::Original, _) => ServingMode::Handoff,
        (DecodeFlow::TokenSplice, Some(reason)) => ServingMode::DecodeOnly(reason),
        (DecodeFlow::TokenSplice, None) => first_token_request(kind, document),
    }
}

/// Why a field can require a single decode engine.
pub(crate) fn reason_for(kind: GenerationKind, field: &str) -> &'static str {
    field_table::find(kind, field).map_or("", |field| field.why)
}

/// The parameters of a request whose fields the first-token path can serve.
fn first_token_request(kind: GenerationKind, document: &Document<'_>) -> ServingMode {
    let stream = document.given("stream") == Some("true");
    let options = document.given("stream_options");
    if options.is_some() && !stream {
        return ServingMode::DecodeOnly("stream_options");
    }
    let limit = match kind {
        // vLLM 0.32 treats null as absent, which means 16.
        GenerationKind::Completions => document.given("max_tokens").unwrap_or("16"),
        GenerationKind::Chat => document
            .given("max_completion_tokens")
            .or(document.given("max_tokens"))
            .unwrap_or("null"),
    };
    ServingMode::FirstToken(FirstTokenRequest {
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

/// The value of `include_usage` in stream options that hold nothing else.
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

/// Whether each message is only a role and a text. Images and tool calls cannot be expressed as token ids.
pub(crate) fn is_plain_chat(messages: &str) -> bool {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Message {
        #[serde(rename = "role")]
        _role: AnyText,
        #[serde(rename = "content")]
        _content: AnyText,
    }
    // The message type has no size, so a list of any length takes no memory.
    serde_json::from_str::<Vec<Message>>(messages).is_ok()
}

/// A text that is checked and dropped.
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
