//! What each request asks for: prompt, length of the answer, and what else is its own; a file per dataset below.
//!
//! A dataset makes [`Order`]s, the client writes them. Knows no wire format beyond how a prompt is written in JSON.

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
pub use self::dataset::{Dataset, DatasetError, Product, Progress, Source, Stopped};
pub use self::prefix_repetition::PrefixRepetition;
pub(in crate::bench) use self::prompt::scramble;
pub use self::prompt::{Message, Prompt, Running};
pub use self::random::{Random, RangeRatio};
pub use self::sessions::{Sessions, Turns};
pub use self::sharegpt::ShareGpt;
pub use self::timed_trace::TimedTrace;
use crate::bench::rng::numpy::LegacyGenerator;

/// Which requests are made.
#[derive(Debug, Clone)]
pub enum Workload {
    /// Synthetic prompts of token ids, which need no tokenizer; made when the run begins.
    Random(Random),
    /// A dataset that is still to be made into requests, because that takes a tokenizer, files or a server.
    Planned(Dataset),
    /// Requests that a dataset has made.
    Made(Made),
}

/// Requests that are there already.
#[derive(Debug, Clone)]
pub struct Made {
    /// In the order of their release.
    pub orders: Arc<[Order]>,
    /// Seed that they were made with, and that of the arrivals.
    pub seed: u32,
    /// Where numpy's global generator stands, if the dataset drew from it.
    generator: Option<Box<LegacyGenerator>>,
}

/// One request to make.
#[derive(Debug, Clone, PartialEq)]
pub struct Order {
    /// The prompt.
    pub prompt: Prompt,
    /// Tokens to generate.
    pub output_length: u32,
    /// Headers of this request alone, beside those of the run.
    pub headers: HeaderMap,
    /// When it is released, since the start of the run, if the dataset says so; else the arrivals do.
    pub release: Option<Duration>,
    /// Its place in a session of several turns.
    pub turn: Option<Turn>,
    /// What it asks for in place of the run's model.
    pub model: Option<Arc<str>>,
}

/// A request's place in a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// The session, from 0.
    pub session: usize,
    /// The turn in it, from 0.
    pub number: usize,
    /// Between the answer of the turn before and this one's release. Without meaning for the first turn.
    pub think_time: Duration,
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
    /// A dataset was not made into requests.
    #[error("the dataset has not been made into requests")]
    NotMade,
}

impl Workload {
    /// Seed of the prompts and of the arrivals.
    pub fn seed(&self) -> u32 {
        match self {
            Self::Random(random) => random.seed,
            Self::Planned(dataset) => dataset.seed,
            Self::Made(made) => made.seed,
        }
    }

    /// Whether the dataset says when each request is released.
    pub fn is_self_timed(&self) -> bool {
        match self {
            Self::Random(_) => false,
            Self::Planned(dataset) => matches!(&dataset.source, Source::TimedTrace(trace) if trace.self_timed),
            Self::Made(made) => made.orders.iter().all(|order| order.release.is_some()),
        }
    }

    /// Whether requests follow the answers of others, whose texts they need.
    pub fn has_turns(&self) -> bool {
        matches!(self, Self::Made(made) if made.orders.iter().any(|order| order.turn.is_some()))
    }

    /// The dataset that is still to be made; none if its requests are there.
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
            Self::Made(_) => None,
        }
    }

    /// What numpy's global generator is for the arrivals, after the dataset.
    pub(super) fn generator(&self) -> LegacyGenerator {
        let own = match self {
            Self::Made(made) => made.generator.as_deref().cloned(),
            Self::Random(_) | Self::Planned(_) => None,
        };
        own.unwrap_or_else(|| LegacyGenerator::new(self.seed()))
    }

    /// How many requests there will be at most, before they are made.
    ///
    /// # Errors
    /// When the settings make none.
    pub fn count(&self) -> Result<usize, WorkloadError> {
        match self {
            Self::Random(random) => random.check().map(|()| random.prompt_count),
            Self::Planned(dataset) => Ok(dataset.prompt_count.max(1)),
            Self::Made(made) if made.orders.is_empty() => Err(WorkloadError::NoPrompts),
            Self::Made(made) => Ok(made.orders.len()),
        }
    }

    /// The requests, in the order of their release.
    ///
    /// # Errors
    /// When the settings allow an empty prompt or answer, or make no sense.
    pub fn orders(&self) -> Result<Arc<[Order]>, WorkloadError> {
        match self {
            Self::Random(random) => Ok(random.orders()?.into()),
            Self::Planned(_) => Err(WorkloadError::NotMade),
            Self::Made(made) if made.orders.is_empty() => Err(WorkloadError::NoPrompts),
            Self::Made(made) => Ok(made.orders.clone()),
        }
    }
}

impl Made {
    /// What a dataset has made with `seed`.
    pub fn new(product: Product, seed: u32) -> Self {
        Self {
            orders: product.orders.into(),
            seed,
            generator: product.generator,
        }
    }
}

impl Order {
    /// A request with nothing of its own but prompt and length.
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
