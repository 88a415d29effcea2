//! Log probabilities of prompt tokens: a function of the prompt only.

use serde_json::{Value, json};

use crate::engine_core::sequence::TokenLogprob;
use crate::engine_core::tokens::{KvState, decode};

/// The log probabilities of all tokens except the first, which has no predecessor.
pub(super) fn of(prompt: &[u32], alternatives: u32) -> Vec<Option<TokenLogprob>> {
    let mut state = KvState::default();
    let of = prompt.iter().map(|token| {
        let logprob = (state.length() > 0).then(|| {
            let draw = state.draw(0);
            let top = (1..=alternatives).map(|rank| draw.alternative(rank));
            TokenLogprob {
                token: *token,
                logprob: draw.logprob(),
                top: std::iter::once((*token, draw.logprob())).chain(top).collect(),
            }
        });
        state.compute(*token);
        logprob
    });
    of.collect()
}

/// The log probabilities as in vLLM's answers.
pub(super) fn to_json(prompt: &[u32], alternatives: u32) -> Value {
    let to_json = |entry: &TokenLogprob| -> Value {
        let ranked = entry.top.iter().enumerate().map(|(rank, (token, logprob))| {
            let described = json!({"logprob": logprob, "rank": rank + 1, "decoded_token": decode(&[*token])});
            (token.to_string(), described)
        });
        ranked.collect()
    };
    of(prompt, alternatives)
        .iter()
        .map(|entry| entry.as_ref().map(to_json))
        .collect()
}
