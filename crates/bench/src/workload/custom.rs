//! The dataset `custom`: prompts from a JSONL file, with the model's chat template unless it is skipped.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::dataset::{json_lines, read};
use super::{Dataset, DatasetError, MadeRequests, Progress, Prompt, WorkItem};
use crate::tokenizer::Tokenizer;

/// A JSONL file of `{"prompt": …, "output_tokens": …}`.
#[derive(Debug, Clone, PartialEq)]
pub struct Custom {
    /// The file.
    pub path: PathBuf,
    /// Length of every answer in tokens; by default each line's `output_tokens`.
    pub output_length: Option<u32>,
    /// Whether to apply the model's chat template.
    pub chat_template: bool,
    /// Additional variables of the template.
    pub template_settings: Map<String, Value>,
}

impl Custom {
    /// vLLM's `CustomDataset`. Without a tokenizer the prompts are sent unchanged.
    pub(super) fn make(
        &self,
        dataset: &Dataset,
        tokenizer: Option<&Tokenizer>,
        progress: Progress<'_>,
    ) -> Result<MadeRequests, DatasetError> {
        let text = read(&self.path)?;
        let entries = json_lines(&self.path, &text)?;
        let count = match dataset.prompt_count {
            0 => entries.len(),
            count => count,
        };
        let mut items = Vec::new();
        for entry in dataset.shuffled(entries).iter().take(count) {
            let prompt = entry.field("prompt", None)?;
            let prompt = prompt
                .as_str()
                .ok_or_else(|| entry.error(format_args!("the field `prompt` is {prompt}, not a text")))?;
            let output_length = match self.output_length {
                Some(length) => length,
                None => entry.length("output_tokens", Some("--custom-output-len"))?,
            };
            let prompt = match tokenizer {
                Some(tokenizer) => {
                    let text = if self.chat_template {
                        tokenizer.apply_template(prompt, &self.template_settings)?
                    } else {
                        prompt.to_owned()
                    };
                    let token_count = tokenizer.count(&text)?;
                    Prompt::Text {
                        text: text.into(),
                        token_count,
                    }
                }
                None => Prompt::text(prompt, 0),
            };
            items.push(WorkItem::new(prompt, output_length));
            progress(items.len(), count)?;
        }
        Ok(MadeRequests {
            items: dataset.oversampled(items, count),
            ..MadeRequests::default()
        })
    }
}
