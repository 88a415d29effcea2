//! The dataset `timed_trace`: a recorded trace of Mooncake or Qwen. Equal hashes in it are equal blocks of KV.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use super::dataset::{Entry, json_lines, read};
use super::{Dataset, DatasetError, MadeRequests, Progress, Prompt, WorkItem};
use crate::rng::python;
use crate::tokenizer::Tokenizer;

/// A JSONL file of times, lengths and block hashes.
#[derive(Debug, Clone, PartialEq)]
pub struct TimedTrace {
    /// The file.
    pub path: PathBuf,
    /// Tokens per hash.
    pub chunk_length: u32,
    /// Seconds per unit of the file's times.
    pub seconds_per_unit: f64,
    /// Name of the time field.
    pub time_field: String,
    /// Name of the prompt length field.
    pub input_field: String,
    /// Name of the answer length field.
    pub output_field: String,
    /// Name of the hash field.
    pub hashes_field: String,
    /// Whether requests are released at the file's times instead of the arrivals.
    pub self_timed: bool,
    /// `PYTHONHASHSEED` of the vLLM client whose prompts are reproduced.
    pub hash_seed: u32,
}

/// The latest time in a trace, in seconds.
const LATEST: f64 = 30.0 * 24.0 * 3600.0;

impl TimedTrace {
    /// vLLM's `TimedTrace`. It seeds each block with Python's `hash` of a text, which depends on `PYTHONHASHSEED`.
    pub(super) fn make(
        &self,
        dataset: &Dataset,
        tokenizer: &Tokenizer,
        progress: Progress<'_>,
    ) -> Result<MadeRequests, DatasetError> {
        let text = read(&self.path)?;
        let entries = json_lines(&self.path, &text)?;
        let ids = tokenizer.plain_ids();
        let mut blocks = HashMap::new();
        let mut items = Vec::new();
        let count = entries.len().min(dataset.prompt_count);
        for entry in entries.iter().take(count) {
            let input_length = entry.length(&self.input_field, Some("--timed-trace-label-input-length"))?;
            let output_length = entry.length(&self.output_field, Some("--timed-trace-label-output-length"))?;
            let prompt = self.prompt(entry, input_length, &ids, &mut blocks)?;
            let release = self.time(entry)?;
            let mut item = WorkItem::new(Prompt::Ids(prompt.into()), output_length);
            item.release = self.self_timed.then_some(release);
            items.push(item);
            progress(items.len(), count)?;
        }
        Ok(MadeRequests {
            items,
            ..MadeRequests::default()
        })
    }

    fn prompt(
        &self,
        entry: &Entry<'_>,
        length: u32,
        ids: &[u32],
        blocks: &mut HashMap<String, Vec<u32>>,
    ) -> Result<Vec<u32>, DatasetError> {
        let hashes = entry.field(&self.hashes_field, Some("--timed-trace-label-hash-ids"))?;
        let not_hashes = || {
            entry.error(format_args!(
                "the field `{}` is not a list of whole numbers",
                self.hashes_field
            ))
        };
        let hashes = hashes.as_array().ok_or_else(not_hashes)?;
        let mut prompt = Vec::new();
        let mut missing = length;
        for hash in hashes {
            if !hash.is_i64() && !hash.is_u64() {
                return Err(not_hashes());
            }
            let size = self.chunk_length.min(missing);
            let block = blocks.entry(format!("{hash}:{size}")).or_insert_with_key(|key| {
                let [_, seed] = crate::rng::numpy::halves(python::hash(key, self.hash_seed));
                python::Random::new(seed.into()).choices(ids, size as usize)
            });
            prompt.extend_from_slice(block);
            missing -= size;
            if missing == 0 {
                break;
            }
        }
        if prompt.is_empty() {
            return Err(entry.error("its prompt is empty: no length, or no hash"));
        }
        Ok(prompt)
    }

    fn time(&self, entry: &Entry<'_>) -> Result<Duration, DatasetError> {
        let value = entry.field(&self.time_field, Some("--timed-trace-label-timestamp"))?;
        let number = value.as_f64().or_else(|| Value::as_str(value)?.trim().parse().ok());
        let seconds = number.map(|number| number * self.seconds_per_unit);
        seconds
            .filter(|seconds| (0.0..=LATEST).contains(seconds))
            .map(Duration::from_secs_f64)
            .ok_or_else(|| {
                entry.error(format_args!(
                    "the field `{}` is {value}, not a time within 30 days; `--timed-trace-sec-multiplier` makes its \
                     unit seconds",
                    self.time_field
                ))
            })
    }
}
