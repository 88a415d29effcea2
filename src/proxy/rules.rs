//! What happens to a request: handed from prefill to decode, spliced, or answered by a decode engine alone.
//!
//! Pure. A request goes to a decode engine alone when its answer could not be exactly that of one engine otherwise.

use super::body::Document;
use crate::connector::DecodeFlow;

/// The two routes that generate text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

impl Kind {
    /// The route.
    pub(super) fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }

    /// Where the prompt is.
    pub(super) fn prompt_field(self) -> &'static str {
        match self {
            Self::Completions => "prompt",
            Self::Chat => "messages",
        }
    }
}

/// What happens to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Course {
    /// Prefill leg, hand-off, then the client's own body to the decode engine.
    Handoff,
    /// Prefill leg, hand-off, then prompt tokens plus first token to the decode engine.
    Splice(SpliceRequest),
    /// A decode engine alone, and why.
    Bypass(&'static str),
}

/// What a splice must know of the request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SpliceRequest {
    /// Tokens to generate; `None` is as many as fit, which only chat can ask for.
    pub(super) limit: Option<u64>,
    /// Whether the client wants events.
    pub(super) stream: bool,
    /// Whether its last event shall be the usage.
    pub(super) include_usage: bool,
}

/// Decides.
pub(super) fn course(kind: Kind, document: &Document<'_>, flow: DecodeFlow) -> Course {
    if let Some(reason) = bypass_reason(kind, document) {
        return Course::Bypass(reason);
    }
    match flow {
        DecodeFlow::Original => Course::Handoff,
        DecodeFlow::TokenSplice => match splice_request(kind, document) {
            Ok(request) => Course::Splice(request),
            Err(reason) => Course::Bypass(reason),
        },
    }
}

/// Why no connector can hand this request over. What was seen on real engines: with several sequences or prompts one
/// hand-off serves the first only and the others get wrong text; prompt logprobs make the decode engine recompute.
fn bypass_reason(kind: Kind, document: &Document<'_>) -> Option<&'static str> {
    let differs = |key: &str, harmless: &[&str]| document.given(key).is_some_and(|value| !harmless.contains(&value));
    if differs("n", &["1"]) {
        return Some("n");
    }
    if differs("best_of", &["1"]) {
        return Some("best_of");
    }
    if differs("use_beam_search", &["false"]) {
        return Some("use_beam_search");
    }
    if differs("echo", &["false"]) {
        return Some("echo");
    }
    if differs("prompt_logprobs", &[]) {
        return Some("prompt_logprobs");
    }
    if differs("prompt_embeds", &[]) {
        return Some("prompt_embeds");
    }
    // Left to the decode engine to refuse: a prefill with a limit of 1 would succeed and its KV be stranded.
    for key in ["max_tokens", "max_completion_tokens"] {
        if document
            .given(key)
            .is_some_and(|value| !value.parse().is_ok_and(|tokens: u64| tokens >= 1))
        {
            return Some("max_tokens");
        }
    }
    let prompt = document.given(kind.prompt_field());
    match kind {
        Kind::Completions if !prompt.is_some_and(|prompt| prompt.starts_with('"') || is_token_list(prompt)) => {
            Some("prompt")
        }
        Kind::Chat if !prompt.is_some_and(|messages| messages.starts_with('[')) => Some("messages"),
        Kind::Completions | Kind::Chat => None,
    }
}

/// Whether a JSON value is a list of token ids.
pub(super) fn is_token_list(value: &str) -> bool {
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

/// Fields that mean the same for a prompt that is one token longer, whatever their value.
const SPLICEABLE: [&str; 13] = [
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stream",
    "stream_options",
    "ignore_eos",
    "user",
];

/// Values that leave a field without effect. Penalties, stop strings, logprobs, grammars and seeds look back at tokens
/// that the decode engine would take for the prompt.
const WITHOUT_EFFECT: [(&str, &str); 8] = [
    ("n", "1"),
    ("best_of", "1"),
    ("presence_penalty", "0"),
    ("presence_penalty", "0.0"),
    ("frequency_penalty", "0"),
    ("frequency_penalty", "0.0"),
    ("repetition_penalty", "1"),
    ("repetition_penalty", "1.0"),
];

/// Reads what a splice needs, or says which field it cannot do exactly.
fn splice_request(kind: Kind, document: &Document<'_>) -> Result<SpliceRequest, &'static str> {
    for key in document.keys() {
        let value = document.get(key).unwrap_or("null");
        let harmless =
            SPLICEABLE.contains(&key) || matches!(value, "null" | "false") || WITHOUT_EFFECT.contains(&(key, value));
        if !harmless {
            return Err("field that a splice cannot do");
        }
    }
    let stream = match document.given("stream") {
        None | Some("false") => false,
        Some("true") => true,
        Some(_) => return Err("stream"),
    };
    let include_usage = match document.given("stream_options") {
        None => false,
        Some(options) => include_usage(options).ok_or("stream_options")?,
    };
    if document.given("stream_options").is_some() && !stream {
        return Err("stream_options");
    }
    let limit = match kind {
        // vLLM 0.32 takes null for absent, which means 16.
        Kind::Completions => document.given("max_tokens").unwrap_or("16"),
        Kind::Chat => {
            if document
                .get("messages")
                .is_some_and(|messages| !is_plain_chat(messages))
            {
                return Err("messages");
            }
            document
                .given("max_completion_tokens")
                .or(document.given("max_tokens"))
                .unwrap_or("null")
        }
    };
    Ok(SpliceRequest {
        limit: limit.parse().ok(),
        stream,
        include_usage,
    })
}

/// `include_usage` of stream options that hold nothing else.
fn include_usage(options: &str) -> Option<bool> {
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
fn is_plain_chat(messages: &str) -> bool {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Message {
        #[serde(rename = "role")]
        _role: String,
        #[serde(rename = "content")]
        _content: String,
    }
    serde_json::from_str::<Vec<Message>>(messages).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decide(kind: Kind, body: &str, flow: DecodeFlow) -> Course {
        course(kind, &Document::parse(body.as_bytes()).expect("an object"), flow)
    }

    #[test]
    fn requests_that_a_handoff_would_answer_wrongly_go_to_a_decode_engine_alone() {
        let handoff = [
            r#"{"prompt":"x"}"#,
            r#"{"prompt":[1, 2]}"#,
            r#"{"prompt":"x","n":1,"echo":false,"best_of":null,"prompt_logprobs":null,"max_tokens":1}"#,
            r#"{"prompt":"x","logprobs":3,"stop":["a"],"min_tokens":2,"seed":1}"#,
        ];
        for body in handoff {
            assert_eq!(
                decide(Kind::Completions, body, DecodeFlow::Original),
                Course::Handoff,
                "{body}"
            );
        }
        let bypass = [
            (r#"{"prompt":"x","n":2}"#, "n"),
            (r#"{"prompt":"x","n":"2"}"#, "n"),
            (r#"{"prompt":"x","n":1,"n":3}"#, "n"),
            (r#"{"prompt":"x","best_of":2}"#, "best_of"),
            (r#"{"prompt":"x","use_beam_search":true}"#, "use_beam_search"),
            (r#"{"prompt":"x","echo":true}"#, "echo"),
            (r#"{"prompt":"x","echo":true,"logprobs":1}"#, "echo"),
            (r#"{"prompt":"x","prompt_logprobs":0}"#, "prompt_logprobs"),
            (r#"{"prompt":["x"]}"#, "prompt"),
            (r#"{"prompt":[[1],[2]]}"#, "prompt"),
            (r#"{"prompt":[]}"#, "prompt"),
            (r#"{"prompt":"x","max_tokens":0}"#, "max_tokens"),
            (r#"{"prompt":"x","max_tokens":"7"}"#, "max_tokens"),
            (r#"{"model":"m"}"#, "prompt"),
        ];
        for (body, reason) in bypass {
            for flow in [DecodeFlow::Original, DecodeFlow::TokenSplice] {
                assert_eq!(decide(Kind::Completions, body, flow), Course::Bypass(reason), "{body}");
            }
        }
        let chat = r#"{"messages":[{"role":"user","content":"x"}],"tools":[{}],"max_completion_tokens":5}"#;
        assert_eq!(decide(Kind::Chat, chat, DecodeFlow::Original), Course::Handoff);
        assert_eq!(
            decide(Kind::Chat, r#"{"messages":"x"}"#, DecodeFlow::Original),
            Course::Bypass("messages")
        );
    }

    #[test]
    fn a_splice_takes_only_what_it_can_do_exactly() {
        let request = |limit, stream, include_usage| {
            Course::Splice(SpliceRequest {
                limit,
                stream,
                include_usage,
            })
        };
        let splices = [
            (Kind::Completions, r#"{"prompt":"x"}"#, request(Some(16), false, false)),
            (
                Kind::Completions,
                r#"{"prompt":"x","max_tokens":null}"#,
                request(Some(16), false, false),
            ),
            // What `vllm bench serve` sends.
            (
                Kind::Completions,
                r#"{"model":"m","prompt":"x","temperature":0.0,"repetition_penalty":1.0,"max_tokens":200,"logprobs":null,
                    "stream":true,"stream_options":{"include_usage":true},"ignore_eos":true}"#,
                request(Some(200), true, true),
            ),
            (
                Kind::Chat,
                r#"{"messages":[{"role":"user","content":"x"}],"max_tokens":9,"max_completion_tokens":5,"tools":null}"#,
                request(Some(5), false, false),
            ),
            (
                Kind::Chat,
                r#"{"messages":[{"role":"user","content":"x"}]}"#,
                request(None, false, false),
            ),
        ];
        for (kind, body, expected) in splices {
            assert_eq!(decide(kind, body, DecodeFlow::TokenSplice), expected, "{body}");
        }
        for extra in [
            r#""logprobs":1"#,
            r#""stop":"a""#,
            r#""stop_token_ids":[1]"#,
            r#""seed":1"#,
            r#""min_tokens":2"#,
            r#""presence_penalty":0.5"#,
            r#""response_format":{"type":"json_object"}"#,
            r#""tools":[]"#,
            r#""logit_bias":{"1":1}"#,
            r#""return_token_ids":true"#,
            r#""suffix":"b""#,
            r#""some_new_field":1"#,
            r#""stream":"true""#,
            r#""stream":true,"stream_options":{"continuous_usage_stats":true}"#,
            r#""stream_options":{"include_usage":true}"#,
        ] {
            let body = format!(r#"{{"prompt":"x",{extra}}}"#);
            let decided = decide(Kind::Completions, &body, DecodeFlow::TokenSplice);
            assert!(matches!(decided, Course::Bypass(_)), "{body}");
        }
        for messages in [
            r#"[{"role":"user","content":[{"type":"image_url"}]}]"#,
            r#"[{"role":"assistant","content":"x","tool_calls":[]}]"#,
        ] {
            let body = format!(r#"{{"messages":{messages}}}"#);
            let decided = decide(Kind::Chat, &body, DecodeFlow::TokenSplice);
            assert_eq!(decided, Course::Bypass("messages"), "{body}");
        }
    }
}
