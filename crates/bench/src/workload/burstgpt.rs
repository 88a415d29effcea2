//! The dataset `burstgpt`: lengths from a table of real requests, with prompts of consecutive token ids.

use std::path::PathBuf;

use super::dataset::{entry_error, read, whole_tokens};
use super::prompt::wrap;
use super::{Dataset, DatasetError, MadeRequests, Progress, Prompt, WorkItem};
use crate::rng::numpy::LegacyGenerator;
use crate::tokenizer::Tokenizer;

/// A CSV file in the format of `BurstGPT`.
#[derive(Debug, Clone, PartialEq)]
pub struct BurstGpt {
    /// The file.
    pub path: PathBuf,
}

/// The columns in use.
const MODEL: &str = "Model";
const ASKED: &str = "Request tokens";
const ANSWERED: &str = "Response tokens";

impl BurstGpt {
    /// vLLM's `BurstGPTDataset`: answered rows of GPT-4, sampled as pandas does.
    pub(super) fn make(
        &self,
        dataset: &Dataset,
        tokenizer: &Tokenizer,
        progress: Progress<'_>,
    ) -> Result<MadeRequests, DatasetError> {
        let rows = self.rows()?;
        let count = dataset.prompt_count;
        let mut generator = LegacyGenerator::new(dataset.seed);
        let drawn: Vec<usize> = if count <= rows.len() {
            generator.permutation(rows.len()).into_iter().take(count).collect()
        } else {
            let highest = u32::try_from(rows.len()).unwrap_or(u32::MAX);
            (0..count).map(|_| generator.below(highest) as usize).collect()
        };
        let size = tokenizer.vocabulary_size();
        let mut items = Vec::with_capacity(count);
        for (index, row) in (0_u64..).zip(drawn) {
            let (asked, answered) = rows[row];
            let ids = (index..index + u64::from(asked)).map(|id| wrap(id, size));
            let text = tokenizer.decode(&ids.collect::<Vec<_>>())?;
            items.push(WorkItem::new(Prompt::text(text, asked as usize), answered));
            progress(items.len(), count)?;
        }
        Ok(MadeRequests {
            items,
            ..MadeRequests::default()
        })
    }

    /// Prompt and answer tokens of each usable row.
    fn rows(&self) -> Result<Vec<(u32, u32)>, DatasetError> {
        let text = read(&self.path)?;
        let mut lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
        let names: Vec<&str> = lines
            .next()
            .map(|(_, line)| line.split(',').map(str::trim).collect())
            .unwrap_or_default();
        let column = |wanted: &str| {
            let place = names.iter().position(|name| *name == wanted);
            let what = || format!("no column `{wanted}` among `{}`", names.join(","));
            place.ok_or_else(|| entry_error(&self.path, "line 1".to_owned(), what()))
        };
        let (model, asked, answered) = (column(MODEL)?, column(ASKED)?, column(ANSWERED)?);
        let mut rows = Vec::new();
        for (number, line) in lines {
            let cells: Vec<&str> = line.split(',').map(str::trim).collect();
            let cell = |place: usize| {
                let what = || format!("{} columns instead of {}", cells.len(), names.len());
                let cell = cells.get(place).copied();
                cell.ok_or_else(|| entry_error(&self.path, format!("line {number}"), what()))
            };
            if cell(model)? != "GPT-4" {
                continue;
            }
            let length = |place: usize| {
                let text = cell(place)?;
                let what = || format!("the column `{}` has `{text}`, not a number of tokens", names[place]);
                let length = text.parse().ok().and_then(whole_tokens);
                length.ok_or_else(|| entry_error(&self.path, format!("line {number}"), what()))
            };
            let row = (length(asked)?, length(answered)?);
            if row.1 > 0 {
                rows.push(row);
            }
        }
        if rows.is_empty() {
            return Err(DatasetError::Empty {
                path: self.path.clone(),
                reason: "no row of the model `GPT-4` has an answer",
            });
        }
        Ok(rows)
    }
}
