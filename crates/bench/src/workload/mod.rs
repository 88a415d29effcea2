//! The requests of a run: prompt, answer length and request-specific settings. One file per dataset.
//!
//! A dataset makes [`WorkItem`]s, and the client sends them. Only the JSON form of prompts is known here.

mod burstgpt;
mod custom;
mod dataset;
mod exact_length;
mod lenient;
mod prefix_repetition;
mod prompt;
mod random;
mod sessions;
mod sharegpt;
mod timed_trace;

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::HeaderMap;

pub use self::burstgpt::BurstGpt;
pub use self::custom::Custom;
pub use self::dataset::{Dataset, DatasetError, MadeRequests, Progress, Source, Stopped};
pub use self::prefix_repetition::PrefixRepetition;
pub(crate) use self::prompt::scramble;
pub use self::prompt::{Message, Prompt, Running};
pub use self::random::{Random, RangeRatio};
pub use self::sessions::{Sessions, Turns};
pub use self::sharegpt::ShareGpt;
pub use self::timed_trace::TimedTrace;
use crate::rng::numpy::LegacyGenerator;

/// The requests of a run.
#[derive(Debug, Clone)]
pub enum Workload {
    /// Synthetic prompts of token ids. They need no tokenizer and are made when the run starts.
    Random(Random),
    /// A dataset whose requests are not made yet, because that needs a tokenizer, files or a server.
    Planned(Dataset),
    /// Requests that a dataset has made.
    Prepared(Prepared),
}

/// Requests that a dataset has made.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The requests in the order of their release.
    pub items: Arc<[WorkItem]>,
    /// Seed of the requests and of the arrivals.
    pub seed: u32,
    /// The state of numpy's global generator, if the dataset drew from it.
    generator: Option<Box<LegacyGenerator>>,
}

/// One request to send.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkItem {
    /// The prompt.
    pub prompt: Prompt,
    /// Tokens to generate.
    pub output_length: u32,
    /// Headers of this request in addition to those of the run.
    pub headers: HeaderMap,
    /// Release time since the start of the run, if the dataset has one; else the arrivals decide.
    pub release: Option<Duration>,
    /// Its turn in a session.
    pub turn: Option<Turn>,
    /// The model to use instead of the run's.
    pub model: Option<Arc<str>>,
}

/// The turn of a request in a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// Session number, from 0.
    pub session: usize,
    /// Turn number in the session, from 0.
    pub number: usize,
    /// Pause between the previous answer and this turn. Unused for the first turn.
    pub think_time: Duration,
}

/// Why the workload settings are invalid.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WorkloadError {
    /// No prompts.
    #[error("the number of prompts must be at least 1")]
    NoPrompts,
    /// No output tokens: an empty answer cannot be timed.
    #[error("the output length must be at least 1 token")]
    NoOutput,
    /// The shortest possible prompt has no token.
    #[error("the shortest possible prompt is empty: raise the input or prefix length, or lower the range ratio")]
    EmptyPrompt,
    /// A ratio outside `[0, 1)`.
    #[error("a range ratio must be at least 0 and less than 1")]
    RangeRatio,
    /// An empty vocabulary.
    #[error("the vocabulary size must be at least 1")]
    NoVocabulary,
    /// A length beyond any model.
    #[error("a length exceeds {} tokens", Random::MAX_LENGTH)]
    TooLong,
    /// The dataset has not made its requests.
    #[error("the requests of the dataset have not been made")]
    NotPrepared,
}

impl Workload {
    /// Seed of the prompts and of the arrivals.
    pub fn seed(&self) -> u32 {
        match self {
            Self::Random(random) => random.seed,
            Self::Planned(dataset) => dataset.seed,
            Self::Prepared(made) => made.seed,
        }
    }

    /// Whether the dataset defines release times.
    pub fn is_self_timed(&self) -> bool {
        match self {
            Self::Random(_) => false,
            Self::Planned(dataset) => matches!(&dataset.source, Source::TimedTrace(trace) if trace.self_timed),
            Self::Prepared(made) => made.items.iter().all(|item| item.release.is_some()),
        }
    }

    /// Whether requests need the texts of earlier answers.
    pub fn has_turns(&self) -> bool {
        matches!(self, Self::Prepared(made) if made.items.iter().any(|item| item.turn.is_some()))
    }

    /// The dataset whose requests are not made yet.
    pub fn dataset(&self) -> Option<Dataset> {
        match self {
            Self::Random(random) => Some(Dataset {
                prompt_count: random.prompt_count,
                seed: random.seed,
                source: Source::Random(random.clone()),
                shuffle: true,
                oversample: true,
            }),
            Self::Planned(dataset) => Some(dataset.clone()),
            Self::Prepared(_) => None,
        }
    }

    /// The state of numpy's global generator for the arrivals, after the dataset.
    pub(super) fn generator(&self) -> LegacyGenerator {
        let own = match self {
            Self::Prepared(made) => made.generator.as_deref().cloned(),
            Self::Random(_) | Self::Planned(_) => None,
        };
        own.unwrap_or_else(|| LegacyGenerator::new(self.seed()))
    }

    /// The number of requests before they are made, at most.
    ///
    /// # Errors
    /// When the settings are invalid.
    pub fn count(&self) -> Result<usize, WorkloadError> {
        match self {
            Self::Random(random) => random.check().map(|()| random.prompt_count),
            Self::Planned(dataset) => Ok(dataset.prompt_count.max(1)),
            Self::Prepared(made) if made.items.is_empty() => Err(WorkloadError::NoPrompts),
            Self::Prepared(made) => Ok(made.items.len()),
        }
    }

    /// The requests in the order of their release.
    ///
    /// # Errors
    /// When the settings are invalid or allow an empty prompt or answer.
    pub fn items(&self) -> Result<Arc<[WorkItem]>, WorkloadError> {
        match self {
            Self::Random(random) => Ok(random.items()?.into()),
            Self::Planned(_) => Err(WorkloadError::NotPrepared),
            Self::Prepared(made) if made.items.is_empty() => Err(WorkloadError::NoPrompts),
            Self::Prepared(made) => Ok(made.items.clone()),
        }
    }
}

impl Prepared {
    /// The requests that a dataset made with `seed`.
    pub fn new(product: MadeRequests, seed: u32) -> Self {
        Self {
            items: product.items.into(),
            seed,
            generator: product.generator,
        }
    }
}

impl WorkItem {
    /// A request with only a prompt and a length.
    pub fn new(prompt: Prompt, output_length: u32) -> Self {
        Self {
            prompt,
            output_length,
            headers: HeaderMap::new(),
            release: None,
            turn: None,
            model: None,
        }
    }
}
