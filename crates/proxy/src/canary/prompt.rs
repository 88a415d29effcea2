//! The prompts of a canary: a short one that every model can read, and a long one of several blocks and steps. Pure.

use std::fmt::Write as _;
use std::time::Duration;

/// Words of the short prompt: well over two KV blocks of 128 tokens, but short enough for any model's context.
pub(crate) const SHORT_WORDS: usize = 260;

/// Maximum tokens of the long prompt: more than one step of vLLM 0.33, which is 8192 tokens on an H100 or H200 and
/// 2048 on smaller devices (`EngineArgs.get_batch_defaults`).
const LONG_TOKENS: u64 = 8192 + 256;

/// How long the decode engine can take for the long prompt. A slow engine, such as one on a CPU, gets a shorter one.
const LONG_BUDGET: Duration = Duration::from_secs(3);

/// The words of every prompt.
const LIST: [&str; 8] = [
    "tide", "amber", "north", "river", "copper", "lantern", "willow", "stone",
];

/// What the short prompt showed about the engines.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ShortPromptRun {
    /// Its length in tokens, as the decode engine counts them.
    pub(crate) tokens: u64,
    /// How long the decode engine alone took for it.
    pub(crate) took: Duration,
    /// The context length of both engines, in tokens.
    pub(crate) model_length: u64,
}

/// A new prompt, so that no cache can hold its KV.
pub(crate) fn of_words(words: usize) -> String {
    let mut prompt = format!("Canary {}:", uuid::Uuid::new_v4());
    for index in 0..words {
        write!(prompt, " {}", LIST[(index * index + index / 3) % LIST.len()]).expect("writing to a string cannot fail");
    }
    prompt
}

/// Words of the long prompt. `None` if it could not be at least twice as long as the short one.
pub(crate) fn long_words(short: ShortPromptRun, answer_tokens: u64) -> Option<usize> {
    // A tenth stays free: each prompt begins with a random id whose number of tokens varies.
    let room = short.model_length.checked_sub(answer_tokens)? / 10 * 9;
    let in_time = LONG_BUDGET.as_millis() / short.took.as_millis().max(1) * u128::from(short.tokens);
    let tokens = LONG_TOKENS.min(room).min(u64::try_from(in_time).unwrap_or(u64::MAX));
    let words = tokens.checked_mul(SHORT_WORDS as u64)?.checked_div(short.tokens)?;
    let words = usize::try_from(words).ok()?;
    (words >= 2 * SHORT_WORDS).then_some(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(tokens: u64, milliseconds: u64, model_length: u64) -> Option<usize> {
        let short = ShortPromptRun {
            tokens,
            took: Duration::from_millis(milliseconds),
            model_length,
        };
        long_words(short, 8)
    }

    #[test]
    fn the_long_prompt_exceeds_one_engine_step() {
        assert_eq!(words(520, 100, 131_072), Some(4224), "two tokens a word: 8448");
        assert_eq!(words(520, 100, 4008), Some(1800), "nine tenths of what the model reads");
        assert_eq!(
            words(520, 1000, 131_072),
            Some(780),
            "three times as long as the short one"
        );
    }

    #[test]
    fn no_long_prompt_without_room_or_time() {
        assert_eq!(words(520, 2000, 131_072), None, "too slow");
        assert_eq!(words(520, 100, 1000), None, "too small");
        assert_eq!(words(520, 100, 4), None, "no room at all");
        assert_eq!(words(0, 0, u64::MAX), None, "an engine that counts nothing");
    }

    #[test]
    fn no_two_prompts_are_the_same() {
        assert_ne!(of_words(3), of_words(3));
        assert_eq!(of_words(3).split(' ').count(), 2 + 3);
    }
}
