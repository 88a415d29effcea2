//! The dataset `sharegpt`: the first question of each conversation, with the length of its answer.

use std::path::PathBuf;

use serde_json::Value;

use super::dataset::{entry_error, read};
use super::lenient;
use super::{Dataset, DatasetError, MadeRequests, Progress, Prompt, WorkItem};
use crate::tokenizer::Tokenizer;

/// A JSON file of conversations in the format of `ShareGPT`.
#[derive(Debug, Clone, PartialEq)]
pub struct ShareGpt {
    /// The file.
    pub path: PathBuf,
    /// Length of every answer in tokens; by default as in the file.
    pub output_length: Option<u32>,
}

/// vLLM's limits: at least 4 tokens each, prompts up to 1024, and at most 2048 in total.
const SHORTEST: u64 = 4;
const LONGEST_PROMPT: u64 = 1024;
const LONGEST_TOTAL: u64 = 2048;

impl ShareGpt {
    /// vLLM's `ShareGPTDataset`.
    pub(super) fn make(
        &self,
        dataset: &Dataset,
        tokenizer: &Tokenizer,
        progress: Progress<'_>,
    ) -> Result<MadeRequests, DatasetError> {
        let entries = lenient::from_str(&read(&self.path)?).map_err(|error| DatasetError::Read {
            path: self.path.clone(),
            reason: format!("not JSON: {error}"),
        })?;
        let Value::Array(entries) = entries else {
            return Err(DatasetError::Read {
                path: self.path.clone(),
                reason: "not a JSON list of conversations".to_owned(),
            });
        };
        let conversations = entries.iter().enumerate().filter_map(|(index, entry)| {
            let turns = entry.get("conversations")?.as_array()?;
            (turns.len() >= 2).then_some((index, turns))
        });
        let mut items = Vec::new();
        for (index, turns) in dataset.shuffled(conversations.collect()) {
            if items.len() >= dataset.prompt_count {
                break;
            }
            let value = |turn: usize| {
                let place = format!("entry {}", index + 1);
                let text = turns[turn].get("value").and_then(Value::as_str);
                text.ok_or_else(|| {
                    entry_error(&self.path, place, format_args!("turn {} has no text `value`", turn + 1))
                })
            };
            let (prompt, answer) = (value(0)?, value(1)?);
            let prompt_length = tokenizer.count(prompt)?;
            let output_length = match self.output_length {
                Some(length) => u64::from(length),
                None => tokenizer.count(answer)?,
            };
            let is_too_short = prompt_length < SHORTEST || self.output_length.is_none() && output_length < SHORTEST;
            if is_too_short || prompt_length > LONGEST_PROMPT || prompt_length + output_length > LONGEST_TOTAL {
                continue;
            }
            let prompt = Prompt::Text {
                text: prompt.into(),
                token_count: prompt_length,
            };
            items.push(WorkItem::new(prompt, u32::try_from(output_length).unwrap_or(u32::MAX)));
            progress(items.len(), dataset.prompt_count)?;
        }
        if items.is_empty() {
            return Err(DatasetError::Empty {
                path: self.path.clone(),
                reason: "no conversation has two turns, at least 4 tokens each, a prompt of at most 1024 and 2048 in all",
            });
        }
        Ok(MadeRequests {
            items: dataset.oversampled(items, dataset.prompt_count),
            ..MadeRequests::default()
        })
    }
}
