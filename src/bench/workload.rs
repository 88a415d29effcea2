//! What each request asks for: prompt and length of the answer, a pure function of the settings and the seed.
//!
//! Knows no wire format beyond how a prompt is written in JSON.

use serde::{Serialize, Serializer};

use super::numpy::Generator;

/// Which requests are made.
#[derive(Debug, Clone, PartialEq)]
pub enum Workload {
    /// Synthetic prompts, vLLM's `--dataset-name random`.
    Random(Random),
}

/// Prompts of running token ids that start at a random one.
#[derive(Debug, Clone, PartialEq)]
pub struct Random {
    /// Mean length of a prompt without its prefix, in tokens.
    pub input_length: u32,
    /// Mean length of an answer, in tokens.
    pub output_length: u32,
    /// How far lengths spread.
    pub range_ratio: RangeRatio,
    /// Length of the prefix that all prompts share, in tokens.
    pub prefix_length: u32,
    /// Ids are drawn from 0 up to this, exclusive.
    pub vocabulary_size: u32,
    /// How many requests.
    pub prompt_count: usize,
    /// Seed of prompts and lengths, and of the arrivals. numpy's legacy generator takes 32 bits.
    pub seed: u32,
}

/// Lengths are uniform in `[mean * (1 - ratio), mean * (1 + ratio)]`. Each ratio is in `[0, 1)`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RangeRatio {
    /// For prompts.
    pub input: f64,
    /// For answers.
    pub output: f64,
}

/// One request to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// The prompt.
    pub prompt: Prompt,
    /// Tokens to generate.
    pub output_length: u32,
}

/// A prompt, stored as how to make it: a thousand of 7500 ids need no memory until they are sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    prefix: std::sync::Arc<[u32]>,
    first: u32,
    length: u32,
    vocabulary_size: u32,
}

/// Why the settings make no workload.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WorkloadError {
    /// Nothing to send.
    #[error("the number of prompts must be at least 1")]
    NoPrompts,
    /// An empty answer cannot be timed.
    #[error("the output length must be at least 1 token")]
    NoOutput,
    /// The shortest prompt that the settings allow has no token.
    #[error("the shortest possible prompt is empty: raise the input or prefix length, or lower the range ratio")]
    EmptyPrompt,
    /// A ratio outside `[0, 1)`.
    #[error("a range ratio must be at least 0 and less than 1")]
    RangeRatio,
    /// No ids to draw from.
    #[error("the vocabulary size must be at least 1")]
    NoVocabulary,
    /// Longer than any model takes.
    #[error("a length of more than {} tokens", Random::MAX_LENGTH)]
    TooLong,
}

impl Workload {
    /// Seed of the prompts and of the arrivals.
    pub fn seed(&self) -> u32 {
        match self {
            Self::Random(random) => random.seed,
        }
    }

    /// The requests, in the order of their release.
    ///
    /// # Errors
    /// When the settings allow an empty prompt or answer, or make no sense.
    pub fn orders(&self) -> Result<Vec<Order>, WorkloadError> {
        match self {
            Self::Random(random) => random.orders(),
        }
    }
}

impl Random {
    /// Keeps every sum and product of lengths far inside 32 bits.
    const MAX_LENGTH: u32 = 1 << 28;

    /// The draws of vLLM's `RandomDataset`, in its order, from numpy's default generator.
    ///
    /// vLLM then decodes the ids and encodes the text again, because it sends text; ids are sent here as they are, so
    /// nothing is lost on the way, and no special token is reserved, because a server adds none to ids.
    fn orders(&self) -> Result<Vec<Order>, WorkloadError> {
        self.check()?;
        let mut generator = Generator::new(self.seed);
        let (shortest_input, longest_input) = spread(self.input_length, self.range_ratio.input);
        let (shortest_output, longest_output) = spread(self.output_length, self.range_ratio.output);
        if self.prefix_length + shortest_input == 0 {
            return Err(WorkloadError::EmptyPrompt);
        }
        let mut draws = |count: usize, low: u32, highest: u32| -> Vec<u32> {
            (0..count).map(|_| generator.integer(low, highest)).collect()
        };
        let inputs = draws(self.prompt_count, shortest_input, longest_input);
        let outputs = draws(self.prompt_count, shortest_output.max(1), longest_output.max(1));
        let offsets = draws(self.prompt_count, 0, self.vocabulary_size - 1);
        let prefix: std::sync::Arc<[u32]> = draws(self.prefix_length as usize, 0, self.vocabulary_size - 1).into();

        let vocabulary_size = self.vocabulary_size;
        let orders = (0_u64..).zip(inputs).zip(outputs).zip(offsets);
        Ok(orders
            .map(|(((index, length), output_length), offset)| Order {
                prompt: Prompt {
                    prefix: prefix.clone(),
                    first: wrap(u64::from(offset) + index, vocabulary_size),
                    length,
                    vocabulary_size,
                },
                output_length,
            })
            .collect())
    }

    fn check(&self) -> Result<(), WorkloadError> {
        let lengths = [self.input_length, self.output_length, self.prefix_length];
        let ratios = [self.range_ratio.input, self.range_ratio.output];
        if self.prompt_count == 0 {
            Err(WorkloadError::NoPrompts)
        } else if self.output_length == 0 {
            Err(WorkloadError::NoOutput)
        } else if self.vocabulary_size == 0 {
            Err(WorkloadError::NoVocabulary)
        } else if lengths.iter().any(|&length| length > Self::MAX_LENGTH) {
            Err(WorkloadError::TooLong)
        } else if ratios.iter().any(|ratio| !(0.0..1.0).contains(ratio)) {
            Err(WorkloadError::RangeRatio)
        } else {
            Ok(())
        }
    }
}

/// The shortest and longest length around `mean`.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the mean is at most MAX_LENGTH and the ratio in [0, 1)"
)]
fn spread(mean: u32, ratio: f64) -> (u32, u32) {
    let mean = f64::from(mean);
    (
        (mean * (1.0 - ratio)).floor() as u32,
        (mean * (1.0 + ratio)).ceil() as u32,
    )
}

/// `value % size`.
#[expect(clippy::cast_possible_truncation, reason = "a remainder is smaller than its divisor")]
fn wrap(value: u64, size: u32) -> u32 {
    (value % u64::from(size)) as u32
}

impl Prompt {
    /// How many ids it has.
    pub fn token_count(&self) -> u64 {
        self.prefix.len() as u64 + u64::from(self.length)
    }

    fn ids(&self) -> impl Iterator<Item = u32> {
        let running =
            (0..self.length).map(|index| wrap(u64::from(self.first) + u64::from(index), self.vocabulary_size));
        self.prefix.iter().copied().chain(running)
    }

    /// As text, for chat: one word per id, which is about one token each. What it really counts only the server knows.
    ///
    /// The words are few and short, so that every tokenizer has them whole; which one stands for an id is scrambled, so
    /// that prompts that start at different ids share no prefix.
    pub fn text(&self) -> String {
        let words: Vec<&str> = self
            .ids()
            .map(|id| WORDS[scramble(id) as usize % WORDS.len()])
            .collect();
        words.join(" ")
    }
}

/// `MurmurHash3`'s last step: every bit of the id changes about half of the bits.
fn scramble(id: u32) -> u32 {
    let mixed = (id ^ id >> 16).wrapping_mul(0x85eb_ca6b);
    let mixed = (mixed ^ mixed >> 13).wrapping_mul(0xc2b2_ae35);
    mixed ^ mixed >> 16
}

impl Serialize for Prompt {
    /// A list of token ids, which `/v1/completions` of vLLM takes in place of text.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.ids())
    }
}

const WORDS: [&str; 64] = [
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he",
    "his", "but", "at", "are", "this", "have", "from", "or", "had", "an", "they", "which", "one", "you", "were", "all",
    "her", "she", "there", "would", "their", "we", "him", "been", "has", "when", "who", "will", "no", "more", "if",
    "out", "so", "up", "said", "what", "its", "about", "than", "into", "them", "can", "only", "other", "time", "new",
    "some",
];

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::bench::vectors::{numbers, rows};

    fn random() -> Random {
        Random {
            input_length: 7500,
            output_length: 200,
            range_ratio: RangeRatio::default(),
            prefix_length: 0,
            vocabulary_size: 128_000,
            prompt_count: 30,
            seed: 0,
        }
    }

    #[test]
    fn prompts_equal_those_of_vllms_random_dataset() {
        for row in rows(include_str!("vectors/random_dataset.txt")) {
            let [parameters, inputs, outputs, firsts, prefix] = row[..] else {
                panic!("{row:?}")
            };
            let [seed, input, output, .., prefix_length, vocabulary, count] = numbers::<f64>(parameters)[..] else {
                panic!("{row:?}")
            };
            let [_, _, _, input_ratio, output_ratio, ..] = numbers::<f64>(parameters)[..] else {
                panic!("{row:?}")
            };
            let whole = |value: f64| format!("{value}").parse::<u32>().unwrap();
            let workload = Random {
                input_length: whole(input),
                output_length: whole(output),
                range_ratio: RangeRatio {
                    input: input_ratio,
                    output: output_ratio,
                },
                prefix_length: whole(prefix_length),
                vocabulary_size: whole(vocabulary),
                prompt_count: whole(count) as usize,
                seed: whole(seed),
            };
            let orders = workload.orders().unwrap();
            let prefix = numbers::<u32>(prefix);
            for (order, expected) in orders.iter().zip(numbers::<u32>(inputs)) {
                let ids: Vec<u32> = order.prompt.ids().collect();
                assert_eq!(ids[..prefix.len()], prefix);
                assert_eq!(ids.len(), prefix.len() + expected as usize);
                let steps = ids[prefix.len()..].windows(2);
                assert!(
                    steps
                        .into_iter()
                        .all(|pair| pair[1] == (pair[0] + 1) % workload.vocabulary_size)
                );
            }
            let first_ids: Vec<u32> = orders.iter().map(|order| order.prompt.first).collect();
            assert_eq!(first_ids, numbers::<u32>(firsts));
            let output_lengths: Vec<u32> = orders.iter().map(|order| order.output_length).collect();
            assert_eq!(output_lengths, numbers::<u32>(outputs));
        }
    }

    #[test]
    fn a_prompt_is_written_as_its_ids() {
        let small = Random {
            input_length: 3,
            vocabulary_size: 1,
            prompt_count: 1,
            prefix_length: 1,
            ..random()
        };
        let orders = small.orders().unwrap();
        assert_eq!(serde_json::to_string(&orders[0].prompt).unwrap(), "[0,0,0,0]");
    }

    #[test]
    fn chat_prompts_have_a_word_per_id_and_do_not_share_their_beginning() {
        let orders = random().orders().unwrap();
        let texts: Vec<String> = orders.iter().map(|order| order.prompt.text()).collect();
        assert!(texts.iter().all(|text| text.split(' ').count() == 7500));
        let beginnings: HashSet<Vec<&str>> = texts.iter().map(|text| text.split(' ').take(16).collect()).collect();
        assert_eq!(beginnings.len(), orders.len());
    }

    #[test]
    fn settings_that_make_no_workload_are_refused() {
        let refused = |random: Random| random.orders().unwrap_err();
        assert_eq!(
            refused(Random {
                prompt_count: 0,
                ..random()
            }),
            WorkloadError::NoPrompts
        );
        assert_eq!(
            refused(Random {
                output_length: 0,
                ..random()
            }),
            WorkloadError::NoOutput
        );
        assert_eq!(
            refused(Random {
                vocabulary_size: 0,
                ..random()
            }),
            WorkloadError::NoVocabulary
        );
        assert_eq!(
            refused(Random {
                input_length: 0,
                ..random()
            }),
            WorkloadError::EmptyPrompt
        );
        assert_eq!(
            refused(Random {
                input_length: u32::MAX,
                ..random()
            }),
            WorkloadError::TooLong
        );
        for ratio in [1.0, -0.1, f64::NAN] {
            let range_ratio = RangeRatio {
                input: ratio,
                output: 0.0,
            };
            assert_eq!(
                refused(Random {
                    range_ratio,
                    ..random()
                }),
                WorkloadError::RangeRatio
            );
        }
    }

    proptest! {
        #[test]
        fn ids_and_lengths_stay_in_their_ranges(
            seed: u32, input_length in 1_u32..300, output_length in 1_u32..50, input in 0.0_f64..0.9,
            output in 0.0_f64..0.99, prefix_length in 1_u32..8, vocabulary_size in 1_u32..5000,
        ) {
            let range_ratio = RangeRatio { input, output };
            let workload = Random {
                input_length, output_length, range_ratio, prefix_length, vocabulary_size, prompt_count: 6, seed,
            };
            for order in workload.orders().unwrap() {
                prop_assert!(order.prompt.ids().all(|id| id < vocabulary_size));
                prop_assert_eq!(order.prompt.ids().count() as u64, order.prompt.token_count());
                let (shortest, longest) = spread(input_length, input);
                prop_assert!((shortest..=longest).contains(&order.prompt.length));
                prop_assert!((1..=output_length * 2).contains(&order.output_length));
            }
        }
    }
}
