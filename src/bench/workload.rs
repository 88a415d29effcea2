//! What each request asks for: prompt, length of the answer, and what else is its own; a file per dataset below.
//!
//! A dataset makes [`Order`]s, the client writes them. Knows no wire format beyond how a prompt is written in JSON.

mod prompt;
mod random;

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::HeaderMap;

pub use self::prompt::{Message, Prompt, Running};
pub use self::random::{Random, RangeRatio};

/// Which requests are made.
#[derive(Debug, Clone)]
pub enum Workload {
    /// Synthetic prompts of token ids, which need no tokenizer; made when the run begins.
    Random(Random),
    /// Requests that a dataset has made beforehand, because that takes a tokenizer, files or a server.
    Made(Made),
}

/// Requests that are there already.
#[derive(Debug, Clone)]
pub struct Made {
    /// In the order of their release.
    pub orders: Arc<[Order]>,
    /// Seed that they were made with, and that of the arrivals.
    pub seed: u32,
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
}

impl Workload {
    /// Seed of the prompts and of the arrivals.
    pub fn seed(&self) -> u32 {
        match self {
            Self::Random(random) => random.seed,
            Self::Made(made) => made.seed,
        }
    }

    /// The requests, in the order of their release.
    ///
    /// # Errors
    /// When the settings allow an empty prompt or answer, or make no sense.
    pub fn orders(&self) -> Result<Arc<[Order]>, WorkloadError> {
        match self {
            Self::Random(random) => Ok(random.orders()?.into()),
            Self::Made(made) if made.orders.is_empty() => Err(WorkloadError::NoPrompts),
            Self::Made(made) => Ok(made.orders.clone()),
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
