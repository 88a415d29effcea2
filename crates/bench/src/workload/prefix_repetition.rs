//! The dataset `prefix_repetition`: a few prefixes, each shared by many prompts.

use super::exact_length::{exact_prompt, length_remark};
use super::{Dataset, DatasetError, MadeRequests, Progress, Prompt, WorkItem, WorkloadError};
use crate::rng::numpy::LegacyGenerator;
use crate::tokenizer::{Tokenizer, TokenizerError};

/// Settings; lengths are in tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct PrefixRepetition {
    /// Length of a prefix.
    pub prefix_length: u32,
    /// Length of the suffix.
    pub suffix_length: u32,
    /// Number of prefixes. Each has the same number of prompts; the remainder is not sent.
    pub prefix_count: usize,
    /// Length of an answer.
    pub output_length: u32,
}

impl PrefixRepetition {
    /// vLLM's `PrefixRepetitionRandomDataset`. It draws from numpy's global generator, which the arrivals continue.
    pub(super) fn make(
        &self,
        dataset: &Dataset,
        tokenizer: &Tokenizer,
        progress: Progress<'_>,
    ) -> Result<MadeRequests, DatasetError> {
        if self.output_length == 0 {
            return Err(WorkloadError::NoOutput.into());
        }
        if self.prefix_length + self.suffix_length == 0 {
            return Err(WorkloadError::EmptyPrompt.into());
        }
        let per_prefix = dataset.prompt_count.checked_div(self.prefix_count).unwrap_or(0);
        if per_prefix == 0 {
            return Err(DatasetError::Prefixes {
                count: dataset.prompt_count,
                prefixes: self.prefix_count,
            });
        }
        let mut generator = LegacyGenerator::new(dataset.seed);
        let vocabulary_size = tokenizer.vocabulary_size();
        let mut excess = 0;
        let mut exact = |length: u32| -> Result<Vec<u32>, TokenizerError> {
            let mut draw = || generator.below(vocabulary_size);
            let ids: Vec<u32> = (0..length).map(|_| draw()).collect();
            let prompt = exact_prompt(tokenizer, &ids, ids.len(), draw)?;
            excess += prompt.excess();
            Ok(prompt.ids)
        };
        let mut items = Vec::new();
        for _ in 0..self.prefix_count {
            let prefix = exact(self.prefix_length)?;
            for _ in 0..per_prefix {
                let ids = [prefix.as_slice(), &exact(self.suffix_length)?].concat();
                let prompt = Prompt::text(tokenizer.decode(&ids)?, ids.len());
                items.push(WorkItem::new(prompt, self.output_length));
                progress(items.len(), per_prefix * self.prefix_count)?;
            }
        }
        Ok(MadeRequests {
            items: dataset.shuffled(items),
            remarks: length_remark(excess).into_iter().collect(),
            generator: Some(Box::new(generator)),
        })
    }
}
