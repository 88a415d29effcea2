//! Every field of the generation requests of vLLM 0.32 and 0.33, and for which values two engines answer exactly as
//! one would.
//!
//! Seen on real engines: with several sequences or prompts, one hand-off serves only the first and the others get
//! wrong text. Prompt log-probabilities make the decode engine compute the prompt. When the prefill engine makes the
//! first token, the decode engine takes that token as part of the prompt, so a parameter that looks back at the
//! generated tokens misses it.

use super::serving_mode::{GenerationKind, include_usage, is_plain_chat, is_token_list};

/// The rule of one field.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Field {
    pub(crate) name: &'static str,
    pub(crate) kinds: &'static [GenerationKind],
    /// When prefill and decode engine can share the request.
    pub(crate) handoff: When,
    /// When the prefill engine can also make the first token.
    pub(crate) first_token: When,
    pub(crate) why: &'static str,
}

/// The values, as the client wrote them, that do not require a single engine. Absent and `null` never do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    Always,
    Never,
    Only(&'static [&'static str]),
    /// An integer from 1.
    Count,
    /// One text, or one list of token ids.
    OnePrompt,
    List,
    /// Messages that consist of a role and a text only.
    PlainChat,
    /// An object with `include_usage` only.
    IncludeUsage,
}

impl When {
    pub(crate) fn serves(self, value: Option<&str>) -> bool {
        let Some(value) = value else { return true };
        match self {
            Self::Always => true,
            Self::Never => false,
            Self::Only(values) => values.contains(&value),
            Self::Count => value.parse().is_ok_and(|count: u64| count >= 1),
            Self::OnePrompt => value.starts_with('"') || is_token_list(value),
            Self::List => value.starts_with('['),
            Self::PlainChat => is_plain_chat(value),
            Self::IncludeUsage => include_usage(value).is_some(),
        }
    }
}

/// The rule of a field, if the table has one.
pub(crate) fn find(kind: GenerationKind, name: &str) -> Option<&'static Field> {
    FIELDS
        .iter()
        .find(|field| field.name == name && field.kinds.contains(&kind))
}

const BOTH: &[GenerationKind] = &[GenerationKind::Completions, GenerationKind::Chat];
const COMPLETIONS: &[GenerationKind] = &[GenerationKind::Completions];
const CHAT: &[GenerationKind] = &[GenerationKind::Chat];
const FALSE: When = When::Only(&["false"]);
const TRUE: When = When::Only(&["true"]);
const ZERO: When = When::Only(&["0", "0.0"]);
const ONE: When = When::Only(&["1", "1.0"]);
const EMPTY: When = When::Only(&["[]"]);

const EACH_STEP: &str = "applies to each step separately";
const LOOKS_BACK: &str = "looks back at the answer's tokens";
const SHAPES_PROMPT: &str = "changes the prompt's tokens, and `/tokenize` does not get it";
const SHAPES_ANSWER: &str = "changes the fields that describe the first token";

const fn field(
    name: &'static str,
    kinds: &'static [GenerationKind],
    handoff: When,
    first_token: When,
    why: &'static str,
) -> Field {
    Field {
        name,
        kinds,
        handoff,
        first_token,
        why,
    }
}

/// All rules. A field without a rule belongs to a later vLLM: the request is handed over, and the decode engine makes
/// the first token.
#[rustfmt::skip]
pub(crate) const FIELDS: &[Field] = &[
    field("prompt", COMPLETIONS, When::OnePrompt, When::OnePrompt, "a hand-off is for one prompt"),
    field("messages", CHAT, When::List, When::PlainChat, "images and tool calls have no token ids"),
    field("model", BOTH, When::Always, When::Always, "both legs name it"),
    field("n", BOTH, When::Only(&["1"]), When::Only(&["1"]), "KV can be fetched only once"),
    field("use_beam_search", BOTH, FALSE, FALSE, "beams start from the prompt again and again"),
    field("length_penalty", BOTH, When::Always, ONE, "applies to beams"),
    field("echo", BOTH, FALSE, FALSE, "the prompt is part of the answer"),
    field("prompt_logprobs", BOTH, When::Never, When::Never, "the decode engine would have to compute the prompt"),
    field("prompt_embeds", COMPLETIONS, When::Never, When::Never, "KV is matched by token ids"),
    field("truncate_prompt_tokens", BOTH, When::Never, When::Never, "vLLM cuts by the tokens to generate, which differ between the legs"),
    field("truncation_side", BOTH, When::Always, When::Never, SHAPES_PROMPT),
    field("max_tokens", BOTH, When::Count, When::Count, "the engine refuses an invalid one, before any prefill"),
    field("max_completion_tokens", CHAT, When::Count, When::Count, "the engine refuses an invalid one, before any prefill"),
    field("min_tokens", BOTH, When::Always, When::Only(&["0"]), LOOKS_BACK),
    field("stop", BOTH, When::Always, EMPTY, LOOKS_BACK),
    field("stop_token_ids", BOTH, When::Always, EMPTY, LOOKS_BACK),
    field("include_stop_str_in_output", BOTH, When::Always, FALSE, LOOKS_BACK),
    field("ignore_eos", BOTH, When::Always, When::Only(&["true", "false"]), EACH_STEP),
    field("temperature", BOTH, When::Always, When::Always, EACH_STEP),
    field("top_p", BOTH, When::Always, When::Always, EACH_STEP),
    field("top_k", BOTH, When::Always, When::Always, EACH_STEP),
    field("min_p", BOTH, When::Always, When::Always, EACH_STEP),
    field("seed", BOTH, When::Always, When::Never, "the decode engine would sample as for a first token"),
    field("presence_penalty", BOTH, When::Always, ZERO, LOOKS_BACK),
    field("frequency_penalty", BOTH, When::Always, ZERO, LOOKS_BACK),
    field("repetition_penalty", BOTH, When::Always, ONE, LOOKS_BACK),
    field("repetition_detection", BOTH, When::Always, When::Never, LOOKS_BACK),
    field("bad_words", BOTH, When::Always, EMPTY, LOOKS_BACK),
    field("logit_bias", BOTH, When::Always, When::Never, "it can make the first token a special token"),
    field("allowed_token_ids", BOTH, When::Always, When::Never, "the same"),
    field("watermarking", BOTH, When::Always, FALSE, LOOKS_BACK),
    field("logprobs", COMPLETIONS, When::Always, When::Never, SHAPES_ANSWER),
    field("logprobs", CHAT, When::Always, FALSE, SHAPES_ANSWER),
    field("top_logprobs", CHAT, When::Always, When::Only(&["0"]), SHAPES_ANSWER),
    field("logprob_token_ids", BOTH, When::Always, When::Never, SHAPES_ANSWER),
    field("return_tokens_as_token_ids", BOTH, When::Always, FALSE, SHAPES_ANSWER),
    field("return_token_ids", BOTH, When::Always, FALSE, SHAPES_ANSWER),
    field("return_token_offsets", BOTH, When::Always, When::Never, SHAPES_ANSWER),
    field("return_weight_versions", BOTH, When::Always, When::Never, SHAPES_ANSWER),
    field("return_mm_kwargs", BOTH, When::Always, When::Never, SHAPES_ANSWER),
    field("routed_experts_prompt_start", BOTH, When::Always, When::Never, SHAPES_ANSWER),
    field("return_prompt_text", CHAT, When::Always, FALSE, SHAPES_ANSWER),
    field("response_format", BOTH, When::Always, When::Never, "the grammar begins with the answer"),
    field("structured_outputs", BOTH, When::Always, When::Never, "the grammar begins with the answer"),
    field("tools", CHAT, When::Always, When::Never, "the parser begins with the answer"),
    field("tool_choice", CHAT, When::Always, When::Only(&["\"none\""]), "the parser begins with the answer"),
    field("parallel_tool_calls", CHAT, When::Always, TRUE, "applies to tools"),
    field("reasoning_effort", CHAT, When::Always, When::Never, SHAPES_PROMPT),
    field("include_reasoning", CHAT, When::Always, TRUE, SHAPES_ANSWER),
    field("thinking_token_budget", BOTH, When::Always, When::Never, LOOKS_BACK),
    field("chat_template", CHAT, When::Always, When::Never, SHAPES_PROMPT),
    field("chat_template_kwargs", CHAT, When::Always, When::Never, SHAPES_PROMPT),
    field("add_generation_prompt", CHAT, When::Always, TRUE, SHAPES_PROMPT),
    field("continue_final_message", CHAT, When::Always, FALSE, SHAPES_PROMPT),
    field("media_io_kwargs", CHAT, When::Always, When::Never, SHAPES_PROMPT),
    field("mm_processor_kwargs", CHAT, When::Always, When::Never, SHAPES_PROMPT),
    field("mm_payload", BOTH, When::Always, When::Never, SHAPES_PROMPT),
    field("documents", CHAT, When::Always, When::Never, SHAPES_PROMPT),
    field("add_special_tokens", BOTH, When::Always, When::Never, SHAPES_PROMPT),
    field("suffix", COMPLETIONS, When::Always, When::Never, "vLLM refuses it"),
    field("skip_special_tokens", BOTH, When::Always, TRUE, "the first token can be special"),
    field("spaces_between_special_tokens", BOTH, When::Always, TRUE, "the first token can be special"),
    field("stream", BOTH, When::Always, When::Only(&["true", "false"]), "an event per token"),
    field("stream_options", BOTH, When::Always, When::IncludeUsage, "counts of each event would differ by the first token"),
    field("stream_interval", BOTH, When::Always, When::Only(&["1"]), "the first token is an event of its own"),
    field("cache_salt", BOTH, When::Always, When::Never, "LMCache's keys depend on it"),
    field("priority", BOTH, When::Always, When::Only(&["0"]), "applies to each leg separately"),
    field("user", BOTH, When::Always, When::Always, "engines ignore it"),
    field("request_id", BOTH, When::Always, When::Always, "the proxy's own id replaces it, also in the answer"),
    field("session_id", BOTH, When::Always, When::Always, "applies to each leg separately"),
    field("vllm_xargs", BOTH, When::Always, When::Never, "its meaning is unknown; transfer parameters are removed"),
    field("kv_transfer_params", BOTH, When::Always, When::Always, "removed: it could crash an engine or fetch another client's text"),
    field("ec_transfer_params", BOTH, When::Always, When::Always, "removed"),
];
