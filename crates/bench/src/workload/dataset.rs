//! The list of datasets and their common parts: shuffling, oversampling, file reading and errors.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::burstgpt::BurstGpt;
use super::custom::Custom;
use super::lenient;
use super::prefix_repetition::PrefixRepetition;
use super::random::Random;
use super::sessions::Sessions;
use super::sharegpt::ShareGpt;
use super::timed_trace::TimedTrace;
use super::{WorkItem, WorkloadError};
use crate::rng::numpy::LegacyGenerator;
use crate::rng::python;
use crate::tokenizer::{Tokenizer, TokenizerError};

/// A dataset and the number of requests to make.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// The dataset.
    pub source: Source,
    /// Number of requests; 0 means all of a custom dataset and is an error for others.
    pub prompt_count: usize,
    /// Seed of all random draws.
    pub seed: u32,
    /// Whether to shuffle the entries.
    pub shuffle: bool,
    /// Whether to repeat entries if there are too few.
    pub oversample: bool,
}

/// A dataset with its settings, by its name in vLLM.
#[derive(Debug, Clone, PartialEq)]
pub enum Source {
    /// `random`.
    Random(Random),
    /// `prefix_repetition`.
    PrefixRepetition(PrefixRepetition),
    /// `sharegpt`.
    ShareGpt(ShareGpt),
    /// `custom`.
    Custom(Custom),
    /// `burstgpt`.
    BurstGpt(BurstGpt),
    /// `timed_trace`.
    TimedTrace(TimedTrace),
    /// `sessions`; vLLM's client does not have it.
    Sessions(Sessions),
}

/// The requests of a dataset.
#[derive(Debug, Default)]
pub struct MadeRequests {
    /// The requests in the order of their release.
    pub items: Vec<WorkItem>,
    /// Remarks for the user, one sentence each.
    pub remarks: Vec<String>,
    /// The state of numpy's global generator if the dataset drew from it: the arrivals continue from there.
    pub(crate) generator: Option<Box<LegacyGenerator>>,
}

/// Progress callback: gets the number of finished prompts and the total. An error stops the work.
pub type Progress<'a> = &'a dyn Fn(usize, usize) -> Result<(), Stopped>;

/// The prompts are no longer needed.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("making the prompts was cancelled")]
pub struct Stopped;

/// Why a dataset cannot make its requests.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// The dataset needs a file, and none is given.
    #[error("the dataset `{0}` needs a file: set `--dataset-path`")]
    NoPath(&'static str),
    /// The dataset needs a tokenizer.
    #[error("the dataset `{dataset}` needs a tokenizer: {reason}")]
    NoTokenizer {
        /// The dataset.
        dataset: &'static str,
        /// Why the tokenizer is missing.
        reason: String,
    },
    /// The file cannot be read.
    #[error("cannot read the dataset {}: {reason}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A line or an entry is invalid.
    #[error("{}, {place}: {what}", path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// `line 3`, `entry 3`; both from 1.
        place: String,
        /// What is wrong.
        what: String,
    },
    /// No entry of the file can be used.
    #[error("{} has no usable request: {reason}", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// The condition that no entry meets.
        reason: &'static str,
    },
    /// Fewer prompts than prefixes.
    #[error("{count} prompts cannot share {prefixes} prefixes: there must be at least one for each")]
    Prefixes {
        /// Number of prompts.
        count: usize,
        /// Number of prefixes.
        prefixes: usize,
    },
    /// Invalid settings.
    #[error(transparent)]
    Settings(#[from] WorkloadError),
    /// The prompts are no longer needed.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// The tokenizer fails.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

impl Source {
    /// Its name on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Random(_) => "random",
            Self::PrefixRepetition(_) => "prefix_repetition",
            Self::ShareGpt(_) => "sharegpt",
            Self::Custom(_) => "custom",
            Self::BurstGpt(_) => "burstgpt",
            Self::TimedTrace(_) => "timed_trace",
            Self::Sessions(_) => "sessions",
        }
    }
}

impl Dataset {
    /// Makes the requests. `tokenizer` has the reason if there is none; `progress` gets the number of finished prompts
    /// and the total.
    ///
    /// # Errors
    /// When the file is missing or malformed, the settings make no requests, or the dataset needs a tokenizer.
    pub fn make(
        &self,
        tokenizer: Result<&Tokenizer, &str>,
        progress: Progress<'_>,
    ) -> Result<MadeRequests, DatasetError> {
        let needed = || {
            tokenizer.map_err(|reason| DatasetError::NoTokenizer {
                dataset: self.source.name(),
                reason: reason.to_owned(),
            })
        };
        let takes_all = matches!(self.source, Source::Custom(_) | Source::Sessions(_));
        if self.prompt_count == 0 && !takes_all {
            return Err(WorkloadError::NoPrompts.into());
        }
        match &self.source {
            Source::Random(random) => match tokenizer {
                Ok(tokenizer) => random.texts(tokenizer, progress),
                Err(_) => Ok(MadeRequests {
                    items: random.items()?,
                    ..MadeRequests::default()
                }),
            },
            Source::PrefixRepetition(prefixes) => prefixes.make(self, needed()?, progress),
            Source::ShareGpt(sharegpt) => sharegpt.make(self, needed()?, progress),
            Source::Custom(custom) => custom.make(self, tokenizer.ok(), progress),
            Source::BurstGpt(burstgpt) => burstgpt.make(self, needed()?, progress),
            Source::TimedTrace(trace) => trace.make(self, needed()?, progress),
            Source::Sessions(sessions) => sessions.make(self, tokenizer.ok()),
        }
    }

    /// Shuffles as vLLM does: with Python's generator and the seed.
    pub(super) fn shuffled<T>(&self, mut entries: Vec<T>) -> Vec<T> {
        if self.shuffle {
            python::Random::new(self.seed.into()).shuffle(&mut entries);
        }
        entries
    }

    /// Repeats random requests, drawn by Python's generator with the seed, until there are `count`.
    pub(super) fn oversampled(&self, mut items: Vec<WorkItem>, count: usize) -> Vec<WorkItem> {
        let original = items.len();
        if self.oversample && original > 0 {
            let mut random = python::Random::new(self.seed.into());
            while items.len() < count {
                items.push(items[random.below(original)].clone());
            }
        }
        items
    }
}

/// Reads the file of a dataset.
pub(super) fn read(path: &Path) -> Result<String, DatasetError> {
    let text = std::fs::read_to_string(path).map_err(|error| DatasetError::Read {
        path: path.to_owned(),
        reason: match error.kind() {
            std::io::ErrorKind::NotFound => "no such file".to_owned(),
            _ => error.to_string(),
        },
    })?;
    // Windows tools write a byte order mark.
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// One JSON object of a file, with its position for messages.
pub(super) struct Entry<'a> {
    pub(super) path: &'a Path,
    pub(super) place: String,
    pub(super) fields: Map<String, Value>,
}

/// The JSON objects of a JSONL file, at least one. Empty lines are skipped.
pub(super) fn json_lines<'a>(path: &'a Path, text: &str) -> Result<Vec<Entry<'a>>, DatasetError> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let entries: Result<Vec<_>, _> = lines
        .map(|(index, line)| {
            let place = format!("line {}", index + 1);
            match lenient::from_str(line) {
                Ok(Value::Object(fields)) => Ok(Entry { path, place, fields }),
                Ok(_) => Err(entry_error(path, place, "not a JSON object")),
                Err(error) => Err(entry_error(
                    path,
                    place,
                    format_args!("not JSON: {}", at_column(&error)),
                )),
            }
        })
        .collect();
    let entries = entries?;
    if entries.is_empty() {
        return Err(DatasetError::Empty {
            path: path.to_owned(),
            reason: "the file has no entries",
        });
    }
    Ok(entries)
}

/// The error without its line, which is always 1 here.
fn at_column(error: &serde_json::Error) -> String {
    error.to_string().replace(" at line 1 column", " at column")
}

pub(super) fn entry_error(path: &Path, place: String, what: impl Display) -> DatasetError {
    DatasetError::Entry {
        path: path.to_owned(),
        place,
        what: what.to_string(),
    }
}

impl Entry<'_> {
    pub(super) fn error(&self, what: impl Display) -> DatasetError {
        entry_error(self.path, self.place.clone(), what)
    }

    /// A required field.
    pub(super) fn field(&self, name: &str, flag: Option<&str>) -> Result<&Value, DatasetError> {
        let missing = || {
            let names: Vec<String> = self.fields.keys().map(|name| format!("`{name}`")).collect();
            let flag = flag
                .map(|flag| format!("; `{flag}` names another field"))
                .unwrap_or_default();
            self.error(format_args!("no field `{name}` among {}{flag}", names.join(", ")))
        };
        match self.fields.get(name) {
            Some(Value::Null) => Err(self.error(format_args!("the field `{name}` is null"))),
            found => found.ok_or_else(missing),
        }
    }

    /// A length in tokens, read like Python's `int`.
    pub(super) fn length(&self, name: &str, flag: Option<&str>) -> Result<u32, DatasetError> {
        let value = self.field(name, flag)?;
        let number = value.as_f64().or_else(|| value.as_str()?.trim().parse().ok());
        number
            .and_then(whole_tokens)
            .ok_or_else(|| self.error(format_args!("the field `{name}` is {value}, not a number of tokens")))
    }
}

/// The whole part of a length; `None` if it is out of range.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the range is checked just before"
)]
pub(super) fn whole_tokens(number: f64) -> Option<u32> {
    (0.0..=f64::from(Random::MAX_LENGTH))
        .contains(&number)
        .then_some(number as u32)
}

#[cfg(test)]
mod tests;
