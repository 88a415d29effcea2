//! The datasets by name, and what all of them share: shuffling, making up the number, and how a bad file is told.

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
use super::{Order, WorkloadError};
use crate::bench::rng::numpy::LegacyGenerator;
use crate::bench::rng::python;
use crate::bench::tokenizer::{Tokenizer, TokenizerError};

/// What prompts are made of, and how many.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// Which dataset.
    pub source: Source,
    /// How many requests; 0 is all of a custom dataset, and an error elsewhere.
    pub prompt_count: usize,
    /// Seed of everything that is drawn.
    pub seed: u32,
    /// Whether entries are taken in a random order.
    pub shuffle: bool,
    /// Whether entries are used again if there are too few.
    pub oversample: bool,
}

/// A dataset by its name in vLLM.
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
    /// `sessions`, which vLLM's client does not have.
    Sessions(Sessions),
}

/// What a dataset gives.
#[derive(Debug, Default)]
pub struct Product {
    /// The requests, in the order of their release.
    pub orders: Vec<Order>,
    /// What the user should know of them, a sentence each.
    pub remarks: Vec<String>,
    /// Where numpy's global generator stands after the dataset drew from it, if it did: arrivals go on from there.
    pub(in crate::bench) generator: Option<Box<LegacyGenerator>>,
}

/// Told how many of how many prompts are made; says whether to go on.
pub type Progress<'a> = &'a dyn Fn(usize, usize) -> Result<(), Stopped>;

/// Nobody waits for the prompts any more.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the prompts are not wanted any more")]
pub struct Stopped;

/// Why a dataset gives no requests.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// It is a file, and none is named.
    #[error("the dataset `{0}` is a file: `--dataset-path` names it")]
    NoPath(&'static str),
    /// Its prompts are made by the tokenizer.
    #[error("the dataset `{dataset}` needs a tokenizer: {reason}")]
    NoTokenizer {
        /// The dataset.
        dataset: &'static str,
        /// Why there is none.
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
    /// A line, or an entry, is not what it should be.
    #[error("{}, {place}: {what}", path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// `line 3`, `entry 3`; both from 1.
        place: String,
        /// What is wrong.
        what: String,
    },
    /// Nothing of the file can be used.
    #[error("{} gives no request: {reason}", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        reason: &'static str,
    },
    /// Fewer prompts than prefixes.
    #[error("{count} prompts cannot share {prefixes} prefixes: there must be at least one for each")]
    Prefixes {
        /// How many prompts.
        count: usize,
        /// How many prefixes.
        prefixes: usize,
    },
    /// Settings that make no prompts.
    #[error(transparent)]
    Settings(#[from] WorkloadError),
    /// Nobody waits for it any more.
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
    /// Makes the requests. `without` says why there is no tokenizer, where there is none; `progress` is told how many of how
    /// many prompts are made.
    ///
    /// # Errors
    /// When the file is missing or malformed, the settings make no requests, or the dataset needs a tokenizer.
    pub fn make(&self, tokenizer: Result<&Tokenizer, &str>, progress: Progress<'_>) -> Result<Product, DatasetError> {
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
                Err(_) => Ok(Product {
                    orders: random.orders()?,
                    ..Product::default()
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

    /// Shuffles as vLLM does: by Python's generator, seeded anew.
    pub(super) fn shuffled<T>(&self, mut entries: Vec<T>) -> Vec<T> {
        if self.shuffle {
            python::Random::new(self.seed.into()).shuffle(&mut entries);
        }
        entries
    }

    /// Repeats requests, drawn by Python's generator seeded anew, until there are as many as asked for.
    pub(super) fn oversampled(&self, mut orders: Vec<Order>, count: usize) -> Vec<Order> {
        let original = orders.len();
        if self.oversample && original > 0 {
            let mut random = python::Random::new(self.seed.into());
            while orders.len() < count {
                orders.push(orders[random.below(original)].clone());
            }
        }
        orders
    }
}

/// A dataset's text.
pub(super) fn read(path: &Path) -> Result<String, DatasetError> {
    let text = std::fs::read_to_string(path).map_err(|error| DatasetError::Read {
        path: path.to_owned(),
        reason: match error.kind() {
            std::io::ErrorKind::NotFound => "there is no such file".to_owned(),
            _ => error.to_string(),
        },
    })?;
    // Windows' tools put a mark of the encoding before everything else.
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// One JSON object of a file, with its place for messages.
pub(super) struct Entry<'a> {
    pub(super) path: &'a Path,
    pub(super) place: String,
    pub(super) fields: Map<String, Value>,
}

/// The JSON objects of a file that has one a line, at least one. Empty lines are passed over.
pub(super) fn json_lines<'a>(path: &'a Path, text: &str) -> Result<Vec<Entry<'a>>, DatasetError> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let entries: Result<Vec<_>, _> = lines
        .map(|(index, line)| {
            let place = format!("line {}", index + 1);
            match lenient::from_str(line) {
                Ok(Value::Object(fields)) => Ok(Entry { path, place, fields }),
                Ok(_) => Err(wrong(path, place, "not a JSON object")),
                Err(error) => Err(wrong(path, place, format_args!("not JSON: {}", at_column(&error)))),
            }
        })
        .collect();
    let entries = entries?;
    if entries.is_empty() {
        return Err(DatasetError::Empty {
            path: path.to_owned(),
            reason: "it has no line",
        });
    }
    Ok(entries)
}

/// The error without its line, which is always the first here.
fn at_column(error: &serde_json::Error) -> String {
    error.to_string().replace(" at line 1 column", " at column")
}

pub(super) fn wrong(path: &Path, place: String, what: impl Display) -> DatasetError {
    DatasetError::Entry {
        path: path.to_owned(),
        place,
        what: what.to_string(),
    }
}

impl Entry<'_> {
    pub(super) fn wrong(&self, what: impl Display) -> DatasetError {
        wrong(self.path, self.place.clone(), what)
    }

    /// A field that must be there.
    pub(super) fn field(&self, name: &str, flag: Option<&str>) -> Result<&Value, DatasetError> {
        let missing = || {
            let names: Vec<String> = self.fields.keys().map(|name| format!("`{name}`")).collect();
            let flag = flag
                .map(|flag| format!("; `{flag}` names another field"))
                .unwrap_or_default();
            self.wrong(format_args!("no field `{name}` among {}{flag}", names.join(", ")))
        };
        match self.fields.get(name) {
            Some(Value::Null) => Err(self.wrong(format_args!("the field `{name}` is null"))),
            found => found.ok_or_else(missing),
        }
    }

    /// A length in tokens, as Python's `int` reads it.
    pub(super) fn length(&self, name: &str, flag: Option<&str>) -> Result<u32, DatasetError> {
        let value = self.field(name, flag)?;
        let number = value.as_f64().or_else(|| value.as_str()?.trim().parse().ok());
        number
            .and_then(whole)
            .ok_or_else(|| self.wrong(format_args!("the field `{name}` is {value}, not a number of tokens")))
    }
}

/// The whole part of a length.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the range is checked just before"
)]
pub(super) fn whole(number: f64) -> Option<u32> {
    (0.0..=f64::from(Random::MAX_LENGTH))
        .contains(&number)
        .then_some(number as u32)
}

#[cfg(test)]
mod tests;
