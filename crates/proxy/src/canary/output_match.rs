//! Compares two greedy outputs to one prompt: whether they come from the same KV, as far as rounding allows. Pure.
//!
//! A real engine adds in another order when another number of requests shares its step. So a token can change where
//! two were almost equally likely, and with it everything after it. Wrong KV changes which tokens are likely at all.

use std::collections::HashMap;
use std::fmt;

use serde::Deserialize;

/// How many of the likeliest tokens to request at each position.
pub(crate) const ALTERNATIVES: u8 = 5;

/// How much rounding can change a log-probability: a bf16 logit of 20 has steps of 0.125.
const TOLERANCE: f64 = 0.5;

/// A generated text with the log-probabilities of its tokens.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct CanaryAnswer {
    pub(crate) text: String,
    #[serde(default)]
    logprobs: Option<Logprobs>,
}

/// `logprobs` of a completion: one entry per token in each list, with the generated token among the likeliest ones.
#[derive(Debug, Clone, Default, Deserialize)]
struct Logprobs {
    tokens: Vec<String>,
    top_logprobs: Vec<Option<HashMap<String, f64>>>,
}

/// The result of comparing two outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OutputMatch {
    /// The same text, from the same probabilities within rounding.
    Same,
    /// The same first token or tokens, then another token from the same probabilities.
    NumericallyClose,
    /// Another first token, and no probabilities that explain it.
    Unclear,
    /// Rounding cannot explain the difference.
    Different,
}

impl fmt::Display for OutputMatch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Same => "the output equals the decode engine's own",
            Self::NumericallyClose => "the output differs from the decode engine's own within rounding",
            Self::Unclear => "the output differs from the decode engine's own for an unknown reason",
            Self::Different => "the output differs from the decode engine's own",
        })
    }
}

impl CanaryAnswer {
    /// Compares up to the first token that differs: what follows it had another context.
    pub(crate) fn compare(&self, other: &Self) -> OutputMatch {
        let same_text = self.text == other.text;
        let (Some(ours), Some(theirs)) = (&self.logprobs, &other.logprobs) else {
            return if same_text {
                OutputMatch::Same
            } else {
                OutputMatch::Unclear
            };
        };
        for (place, (our, their)) in ours.tokens.iter().zip(&theirs.tokens).enumerate() {
            if !ours.explains(theirs, place) || !theirs.explains(ours, place) {
                return OutputMatch::Different;
            }
            if our != their {
                return if place > 0 {
                    OutputMatch::NumericallyClose
                } else {
                    OutputMatch::Unclear
                };
            }
        }
        if same_text {
            OutputMatch::Same
        } else {
            OutputMatch::Different
        }
    }
}

impl Logprobs {
    /// Whether every token that this side finds likely at a position is about as likely on the other side. A token
    /// that the other side does not name is at most as likely as its least likely named one.
    fn explains(&self, others: &Self, place: usize) -> bool {
        let [ours, theirs] = [self, others].map(|side| side.top_logprobs.get(place).and_then(Option::as_ref));
        let (Some(ours), Some(theirs)) = (ours, theirs) else {
            return false;
        };
        let least = theirs.values().copied().fold(f64::INFINITY, f64::min);
        ours.iter().all(|(token, logprob)| match theirs.get(token) {
            Some(theirs) => (logprob - theirs).abs() <= TOLERANCE,
            None => *logprob <= least + TOLERANCE,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// An output of these tokens, with the alternatives at each position, the generated one first.
    fn answer(places: &[&[(&str, f64)]]) -> CanaryAnswer {
        let tokens: Vec<&str> = places.iter().map(|place| place[0].0).collect();
        let top: Vec<Value> = places
            .iter()
            .map(|place| {
                place
                    .iter()
                    .map(|(token, logprob)| ((*token).to_owned(), json!(logprob)))
                    .collect()
            })
            .collect();
        let logprobs = json!({"tokens": tokens, "top_logprobs": top, "text_offset": []});
        serde_json::from_value(json!({"text": tokens.concat(), "logprobs": logprobs})).expect("an answer")
    }

    #[test]
    fn equal_outputs_match_within_rounding() {
        let ours = answer(&[&[(" a", -0.1), (" z", -4.0)], &[(" b", -0.2), (" z", -3.0)]]);
        let theirs = answer(&[&[(" a", -0.13), (" y", -4.2)], &[(" b", -0.15), (" z", -3.1)]]);
        assert_eq!(ours.compare(&theirs), OutputMatch::Same);
    }

    #[test]
    fn equal_tokens_from_other_probabilities_are_different() {
        let ours = answer(&[&[(" a", -0.1), (" b", -4.0)]]);
        for theirs in [
            answer(&[&[(" a", -3.0), (" b", -4.0)]]),
            answer(&[&[(" a", -0.2), (" b", -1.8)]]),
            answer(&[&[(" a", -0.2), (" c", -1.8)]]),
        ] {
            assert_eq!(ours.compare(&theirs), OutputMatch::Different);
            assert_eq!(theirs.compare(&ours), OutputMatch::Different);
        }
    }

    #[test]
    fn outputs_that_differ_between_equally_likely_tokens_are_close() {
        let ours = answer(&[&[(" a", -0.1)], &[(" b", -0.7), (" c", -0.72)], &[(" x", -0.1)]]);
        let theirs = answer(&[&[(" a", -0.1)], &[(" c", -0.69), (" b", -0.71)], &[(" y", -2.1)]]);
        assert_eq!(ours.compare(&theirs), OutputMatch::NumericallyClose);
        assert_eq!(theirs.compare(&ours), OutputMatch::NumericallyClose);
    }

    #[test]
    fn a_different_first_token_is_unclear_only_if_both_are_likely() {
        let ours = answer(&[&[(" a", -0.7), (" b", -0.72)]]);
        assert_eq!(
            ours.compare(&answer(&[&[(" b", -0.69), (" a", -0.73)]])),
            OutputMatch::Unclear
        );
        assert_eq!(
            ours.compare(&answer(&[&[(" b", -0.1), (" a", -4.0)]])),
            OutputMatch::Different
        );
    }

    #[test]
    fn without_probabilities_only_the_text_counts() {
        let [one, same, other] = ["a b", "a b", "a c"].map(|text| CanaryAnswer {
            text: text.to_owned(),
            logprobs: None,
        });
        assert_eq!(one.compare(&same), OutputMatch::Same);
        assert_eq!(one.compare(&other), OutputMatch::Unclear);
    }

    #[test]
    fn a_longer_output_is_different() {
        let short = answer(&[&[(" a", -0.1)]]);
        let long = answer(&[&[(" a", -0.1)], &[(" b", -0.1)]]);
        assert_eq!(short.compare(&long), OutputMatch::Different);
    }
}
