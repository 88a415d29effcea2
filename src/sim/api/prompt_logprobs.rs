//! Probabilities of a prompt's tokens: a function of the prompt alone, because an engine computes it for them.

use serde_json::{Value, json};

use crate::sim::engine_core::sequence::TokenLogprob;
use crate::sim::engine_core::tokens::{KvState, decode};

/// Of every token but the first one, before which there is nothing.
pub(super) fn of(prompt: &[u32], alternatives: u32) -> Vec<Option<TokenLogprob>> {
    let mut state = KvState::default();
    let of = prompt.iter().map(|token| {
        let told = (state.length() > 0).then(|| {
            let draw = state.draw(0);
            let top = (1..=alternatives).map(|rank| draw.alternative(rank));
            TokenLogprob {
                token: *token,
                logprob: draw.logprob(),
                top: std::iter::once((*token, draw.logprob())).chain(top).collect(),
            }
        });
        state.compute(*token);
        told
    });
    of.collect()
}

/// As vLLM's answers tell them.
pub(super) fn tell(prompt: &[u32], alternatives: u32) -> Value {
    let tell = |told: &TokenLogprob| -> Value {
        let ranked = told.top.iter().enumerate().map(|(rank, (token, logprob))| {
            let told = json!({"logprob": logprob, "rank": rank + 1, "decoded_token": decode(&[*token])});
            (token.to_string(), told)
        });
        ranked.collect()
    };
    of(prompt, alternatives)
        .iter()
        .map(|told| told.as_ref().map(tell))
        .collect()
}
