//! The dataset `random`: prompts of consecutive token ids, sent as ids or as the text that a tokenizer makes of them.

use super::exact_length::{ExactPrompt, exact_prompt, exact_prompts, length_remark};
use super::prompt::wrap;
use super::{DatasetError, MadeRequests, Progress, Prompt, Running, WorkItem, WorkloadError};
use crate::rng::numpy::Generator;
use crate::tokenizer::Tokenizer;

/// Prompts of consecutive token ids with a random first one.
#[derive(Debug, Clone, PartialEq)]
pub struct Random {
    /// Mean length of a prompt without its prefix, in tokens.
    pub input_length: u32,
    /// Mean length of an answer, in tokens.
    pub output_length: u32,
    /// The range of lengths.
    pub range_ratio: RangeRatio,
    /// Length of the prefix that all prompts share, in tokens.
    pub prefix_length: u32,
    /// Upper bound of token ids, exclusive.
    pub vocabulary_size: u32,
    /// Number of requests.
    pub prompt_count: usize,
    /// Seed of prompts, lengths and arrivals. numpy's legacy generator takes 32 bits.
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

impl Random {
    /// Keeps all sums and products of lengths within 32 bits.
    pub(super) const MAX_LENGTH: u32 = 1 << 28;

    /// The requests of vLLM's `RandomDataset`, as token ids: the same draws in the same order from numpy's default
    /// generator.
    ///
    /// vLLM sends text, so it decodes the ids and encodes the text again. Here ids are sent, so none changes, and no
    /// special token is reserved, because a server adds none to ids.
    pub(super) fn items(&self) -> Result<Vec<WorkItem>, WorkloadError> {
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
        let items = (0_u64..).zip(inputs).zip(outputs).zip(offsets);
        Ok(items
            .map(|(((index, length), output_length), offset)| {
                let running = Running {
                    prefix: prefix.clone(),
                    first: wrap(u64::from(offset) + index, vocabulary_size),
                    length,
                    vocabulary_size,
                };
                WorkItem::new(Prompt::Running(running), output_length)
            })
            .collect())
    }

    /// The prompts of vLLM's `RandomDataset`, as text with the requested number of tokens.
    pub(super) fn texts(&self, tokenizer: &Tokenizer, progress: Progress<'_>) -> Result<MadeRequests, DatasetError> {
        self.check()?;
        let mut generator = Generator::new(self.seed);
        let added = u32::try_from(tokenizer.added_to_text()).unwrap_or(u32::MAX);
        let input_length = self.input_length.saturating_sub(added);
        let (shortest_input, longest_input) = spread(input_length, self.range_ratio.input);
        let (shortest_output, longest_output) = spread(self.output_length, self.range_ratio.output);
        if self.prefix_length + shortest_input == 0 {
            return Err(WorkloadError::EmptyPrompt.into());
        }
        let vocabulary_size = tokenizer.vocabulary_size();
        let allowed: Vec<u32> = (0..vocabulary_size).filter(|&id| !tokenizer.is_special(id)).collect();
        if allowed.is_empty() {
            return Err(WorkloadError::NoVocabulary.into());
        }
        let mut draws = |count: usize, low: u32, highest: u32| -> Vec<u32> {
            (0..count).map(|_| generator.integer(low, highest)).collect()
        };
        let inputs = draws(self.prompt_count, shortest_input, longest_input);
        let outputs = draws(self.prompt_count, shortest_output.max(1), longest_output.max(1));
        let offsets = draws(self.prompt_count, 0, vocabulary_size - 1);
        let highest = u32::try_from(allowed.len() - 1).unwrap_or(u32::MAX);
        let places = draws(self.prefix_length as usize, 0, highest);
        let prefix: Vec<u32> = places.into_iter().map(|place| allowed[place as usize]).collect();
        let mut draw = || generator.integer(0, vocabulary_size - 1);
        let prefix = if prefix.is_empty() {
            prefix
        } else {
            exact_prompt(tokenizer, &prefix, prefix.len(), &mut draw)?.ids
        };

        let begin = |index: usize| -> Vec<u32> {
            let first = offsets[index] as usize + index;
            let running = (first..first + inputs[index] as usize).map(|place| allowed[place % allowed.len()]);
            prefix.iter().copied().chain(running).collect()
        };
        let target = |index: usize| self.prefix_length as usize + inputs[index] as usize;
        let prompts = exact_prompts(tokenizer, self.prompt_count, begin, target, draw, progress)?;
        let remarks = length_remark(prompts.iter().map(ExactPrompt::excess).sum());
        let items = prompts.into_iter().zip(outputs);
        Ok(MadeRequests {
            items: items
                .map(|(prompt, output_length)| {
                    WorkItem::new(Prompt::text(prompt.text, prompt.ids.len()), output_length)
                })
                .collect(),
            remarks: remarks.into_iter().collect(),
            generator: None,
        })
    }

    pub(super) fn check(&self) -> Result<(), WorkloadError> {
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

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::fixtures::{fixture, numbers, rows};

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

    fn running(item: &WorkItem) -> &Running {
        match &item.prompt {
            Prompt::Running(running) => running,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn prompts_equal_those_of_vllms_random_dataset() {
        for row in rows(fixture!("random_dataset.txt")) {
            let [parameters, inputs, outputs, firsts, prefix] = row[..] else {
                panic!("{row:?}")
            };
            let [seed, input, output, .., prefix_length, vocabulary, count] = numbers::<f64>(parameters)[..] else {
                panic!("{row:?}")
            };
            let [_, _, _, input_ratio, output_ratio, ..] = numbers::<f64>(parameters)[..] else {
                panic!("{row:?}")
            };
            let whole_tokens = |value: f64| format!("{value}").parse::<u32>().unwrap();
            let workload = Random {
                input_length: whole_tokens(input),
                output_length: whole_tokens(output),
                range_ratio: RangeRatio {
                    input: input_ratio,
                    output: output_ratio,
                },
                prefix_length: whole_tokens(prefix_length),
                vocabulary_size: whole_tokens(vocabulary),
                prompt_count: whole_tokens(count) as usize,
                seed: whole_tokens(seed),
            };
            let items = workload.items().unwrap();
            let prefix = numbers::<u32>(prefix);
            for (item, expected) in items.iter().zip(numbers::<u32>(inputs)) {
                let ids: Vec<u32> = running(item).ids().collect();
                assert_eq!(ids[..prefix.len()], prefix);
                assert_eq!(ids.len(), prefix.len() + expected as usize);
                let steps = ids[prefix.len()..].windows(2);
                assert!(
                    steps
                        .into_iter()
                        .all(|pair| pair[1] == (pair[0] + 1) % workload.vocabulary_size)
                );
            }
            let first_ids: Vec<u32> = items.iter().map(|item| running(item).first).collect();
            assert_eq!(first_ids, numbers::<u32>(firsts));
            let output_lengths: Vec<u32> = items.iter().map(|item| item.output_length).collect();
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
        let items = small.items().unwrap();
        assert_eq!(
            serde_json::to_string(&items[0].prompt.as_completion()).unwrap(),
            "[0,0,0,0]"
        );
    }

    #[test]
    fn chat_prompts_have_one_word_per_id_and_no_common_prefix() {
        let items = random().items().unwrap();
        let texts: Vec<String> = items
            .iter()
            .map(|item| {
                let messages = serde_json::to_value(item.prompt.as_chat()).unwrap();
                messages[0]["content"][0]["text"].as_str().unwrap().to_owned()
            })
            .collect();
        assert!(texts.iter().all(|text| text.split(' ').count() == 7500));
        let beginnings: HashSet<Vec<&str>> = texts.iter().map(|text| text.split(' ').take(16).collect()).collect();
        assert_eq!(beginnings.len(), items.len());
    }

    #[test]
    fn invalid_settings_are_rejected() {
        let refused = |random: Random| random.items().unwrap_err();
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
            for item in workload.items().unwrap() {
                prop_assert!(running(&item).ids().all(|id| id < vocabulary_size));
                prop_assert_eq!(running(&item).ids().count() as u64, item.prompt.token_count());
                let (shortest, longest) = spread(input_length, input);
                prop_assert!((shortest..=longest).contains(&running(&item).length));
                prop_assert!((1..=output_length * 2).contains(&item.output_length));
            }
        }
    }
}
