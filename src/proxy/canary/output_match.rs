//! Whether two greedy answers to one prompt were made from the same KV, as far as numbers can tell. PURE.
//!
//! A real engine adds in another order when another number of requests shares its step, so a token may change where two
//! were as good as equally likely, and everything after it. Wrong KV changes which tokens are likely at all.

use std::collections::HashMap;
use std::fmt;

use serde::Deserialize;

/// How many of the likeliest tokens to ask for at each place.
pub(crate) const ALTERNATIVES: u8 = 5;

/// How far the order of additions may move the logarithm of a probability: a bf16 logit of 20 has steps of 0.125.
const TOLERANCE: f64 = 0.5;

/// An answer, and what else the engine thought of saying.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct Answer {
    pub(crate) text: String,
    #[serde(default)]
    logprobs: Option<Logprobs>,
}

/// `logprobs` of a completion: one entry per token in each list, the token that was made among the likeliest ones.
#[derive(Debug, Clone, Default, Deserialize)]
struct Logprobs {
    tokens: Vec<String>,
    top_logprobs: Vec<Option<HashMap<String, f64>>>,
}

/// What two answers have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Likeness {
    /// The same text, from the same probabilities but for the order of additions.
    Same,
    /// As `Same` for one token at least, and then other tokens from the same probabilities.
    Drifted,
    /// Other tokens from the start, and nothing that says why.
    Unclear,
    /// No order of additions makes one of the other.
    Different,
}

impl fmt::Display for Likeness {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Same => "the answer is the decode engine's own",
            Self::Drifted => "the answer parts from the decode engine's own where both find the same tokens likely",
            Self::Unclear => "the answer is not the decode engine's own, and nothing says why",
            Self::Different => "the answer is another than the decode engine's own",
        })
    }
}

impl Answer {
    /// Compares as far as the first token that differs: what follows it had another context.
    pub(crate) fn likeness(&self, other: &Self) -> Likeness {
        let same_text = self.text == other.text;
        let (Some(ours), Some(theirs)) = (&self.logprobs, &other.logprobs) else {
            return if same_text { Likeness::Same } else { Likeness::Unclear };
        };
        for (place, (our, their)) in ours.tokens.iter().zip(&theirs.tokens).enumerate() {
            if !ours.explains(theirs, place) || !theirs.explains(ours, place) {
                return Likeness::Different;
            }
            if our != their {
                return if place > 0 {
                    Likeness::Drifted
                } else {
                    Likeness::Unclear
                };
            }
        }
        if same_text { Likeness::Same } else { Likeness::Different }
    }
}

impl Logprobs {
    /// Whether what these call likely at a place is about as likely in the others. A token that those do not name is at
    /// most as likely as the least likely one that they do.
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

    /// An answer of these tokens, with the alternatives at each place, the made one first.
    fn answer(places: &[&[(&str, f64)]]) -> Answer {
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
    fn equal_answers_are_the_same_whatever_the_last_digits_say() {
        let ours = answer(&[&[(" a", -0.1), (" z", -4.0)], &[(" b", -0.2), (" z", -3.0)]]);
        let theirs = answer(&[&[(" a", -0.13), (" y", -4.2)], &[(" b", -0.15), (" z", -3.1)]]);
        assert_eq!(ours.likeness(&theirs), Likeness::Same);
    }

    #[test]
    fn the_same_token_from_other_probabilities_is_different() {
        let ours = answer(&[&[(" a", -0.1), (" b", -4.0)]]);
        for theirs in [
            answer(&[&[(" a", -3.0), (" b", -4.0)]]),
            answer(&[&[(" a", -0.2), (" b", -1.8)]]),
            answer(&[&[(" a", -0.2), (" c", -1.8)]]),
        ] {
            assert_eq!(ours.likeness(&theirs), Likeness::Different);
            assert_eq!(theirs.likeness(&ours), Likeness::Different);
        }
    }

    #[test]
    fn answers_that_part_where_two_tokens_are_equally_likely_have_drifted_whatever_follows() {
        let ours = answer(&[&[(" a", -0.1)], &[(" b", -0.7), (" c", -0.72)], &[(" x", -0.1)]]);
        let theirs = answer(&[&[(" a", -0.1)], &[(" c", -0.69), (" b", -0.71)], &[(" y", -2.1)]]);
        assert_eq!(ours.likeness(&theirs), Likeness::Drifted);
        assert_eq!(theirs.likeness(&ours), Likeness::Drifted);
    }

    #[test]
    fn a_first_token_that_differs_proves_nothing_where_both_are_likely_and_everything_where_not() {
        let ours = answer(&[&[(" a", -0.7), (" b", -0.72)]]);
        assert_eq!(
            ours.likeness(&answer(&[&[(" b", -0.69), (" a", -0.73)]])),
            Likeness::Unclear
        );
        assert_eq!(
            ours.likeness(&answer(&[&[(" b", -0.1), (" a", -4.0)]])),
            Likeness::Different
        );
    }

    #[test]
    fn without_probabilities_only_the_text_counts() {
        let [one, same, other] = ["a b", "a b", "a c"].map(|text| Answer {
            text: text.to_owned(),
            logprobs: None,
        });
        assert_eq!(one.likeness(&same), Likeness::Same);
        assert_eq!(one.likeness(&other), Likeness::Unclear);
    }

    #[test]
    fn an_answer_that_goes_on_is_different() {
        let short = answer(&[&[(" a", -0.1)]]);
        let long = answer(&[&[(" a", -0.1)], &[(" b", -0.1)]]);
        assert_eq!(short.likeness(&long), Likeness::Different);
    }
}
