//! Flags of `xpyd bench`: what is asked.

use clap::{Args, ValueEnum};
use serde::Deserialize;

use crate::bench::{Random, RangeRatio, Workload};

/// Flags that say what is asked.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Workload")]
pub struct Data {
    /// What prompts are made of.
    #[arg(long, value_enum, default_value_t = DatasetName::Random)]
    pub dataset_name: DatasetName,
    /// Mean length of a prompt, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 1024)]
    pub random_input_len: u32,
    /// Mean length of an answer, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub random_output_len: u32,
    /// Spread of the lengths: uniform in mean * (1 ± ratio). A number, or `{"input": …, "output": …}`.
    #[arg(long, value_name = "RATIO", value_parser = range_ratio, default_value = "0.0")]
    pub random_range_ratio: RangeRatio,
    /// Length of a prefix that all prompts share, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub random_prefix_len: u32,
    /// Prompts are made of token ids below this. The default is Llama 3's.
    #[arg(long, value_name = "TOKENS", default_value_t = 128_000)]
    pub vocab_size: u32,
    /// How many requests.
    #[arg(long, value_name = "COUNT", default_value_t = 1000)]
    pub num_prompts: usize,
    /// Seed of prompts, lengths and arrivals.
    ///
    /// The same seed makes the same prompts, whose KV a server may still hold from the last run: its numbers are then
    /// those of a cache.
    #[arg(long, default_value_t = 0)]
    pub seed: u32,
}

/// What prompts are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DatasetName {
    /// Synthetic ones.
    Random,
}

impl Data {
    /// The workload that they ask for.
    pub(super) fn workload(&self) -> Workload {
        match self.dataset_name {
            DatasetName::Random => Workload::Random(Random {
                input_length: self.random_input_len,
                output_length: self.random_output_len,
                range_ratio: self.random_range_ratio,
                prefix_length: self.random_prefix_len,
                vocabulary_size: self.vocab_size,
                prompt_count: self.num_prompts,
                seed: self.seed,
            }),
        }
    }
}

fn range_ratio(text: &str) -> Result<RangeRatio, String> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Ratios {
        input: f64,
        output: f64,
    }
    if let Ok(both) = text.parse() {
        return Ok(RangeRatio {
            input: both,
            output: both,
        });
    }
    match serde_json::from_str(text) {
        Ok(Ratios { input, output }) => Ok(RangeRatio { input, output }),
        Err(error) => Err(format!(
            "neither a number nor `{{\"input\": …, \"output\": …}}`: {error}"
        )),
    }
}
