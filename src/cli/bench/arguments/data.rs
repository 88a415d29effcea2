//! Flags of `xpyd bench`: the workload.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use reqwest::header::HeaderName;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::BackendName;
use crate::bench::{
    BurstGpt, Custom, Dataset, DatasetError, PrefixRepetition, Random, RangeRatio, Sessions, ShareGpt, Source,
    TimedTrace, Turns, Workload,
};
use crate::report::{ExitStatus, Failure};

/// The workload flags.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Workload")]
pub struct Data {
    /// The dataset of the prompts.
    #[arg(long, value_enum, value_name = "NAME", default_value_t = DatasetName::Random)]
    pub dataset_name: DatasetName,
    /// The file of the dataset.
    #[arg(long, value_name = "FILE")]
    pub dataset_path: Option<PathBuf>,
    /// Number of requests; 0 means all of `custom` or `sessions`.
    #[arg(long, value_name = "COUNT", default_value_t = 1000)]
    pub num_prompts: usize,
    /// Seed of prompts, lengths and arrivals.
    ///
    /// The same seed makes the same prompts. If the server still has their KV in its cache, the numbers are those of
    /// the cache.
    #[arg(long, default_value_t = 0)]
    pub seed: u32,
    /// Length of a prompt in tokens, for any dataset.
    #[arg(long, value_name = "TOKENS")]
    pub input_len: Option<u32>,
    /// Length of an answer in tokens, for any dataset.
    #[arg(long, value_name = "TOKENS")]
    pub output_len: Option<u32>,
    /// Keeps the entries of a dataset in their order.
    #[arg(long)]
    pub disable_shuffle: bool,
    /// Sends fewer requests if a dataset has too few, instead of repeating some.
    #[arg(long)]
    pub no_oversample: bool,
    /// The tokenizer: a folder, a `tokenizer.json`, or a repository in Hugging Face's cache [default: the model's].
    #[arg(long, value_name = "NAME")]
    pub tokenizer: Option<String>,
    /// How to load the tokenizer; every mode reads `tokenizer.json`.
    #[arg(long, value_enum, value_name = "MODE", default_value_t = TokenizerMode::Auto)]
    pub tokenizer_mode: TokenizerMode,
    /// Uses no tokenizer: prompts are token ids, or words for a chat.
    #[arg(long)]
    pub skip_tokenizer_init: bool,
    /// Accepted without effect: xpyd runs no code of a model.
    #[arg(long)]
    pub trust_remote_code: bool,
    /// Upper bound of token ids in prompts without a tokenizer. The default is Llama 3's.
    #[arg(long, value_name = "TOKENS", default_value_t = 128_000)]
    pub vocab_size: u32,
    /// `random`: mean length of a prompt, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 1024)]
    pub random_input_len: u32,
    /// `random`: mean length of an answer, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub random_output_len: u32,
    /// `random`: lengths are uniform in mean * (1 ± ratio). A number, or `{"input": …, "output": …}`.
    #[arg(long, value_name = "RATIO", value_parser = range_ratio, default_value = "0.0")]
    pub random_range_ratio: RangeRatio,
    /// `random`: length of a prefix that all prompts share, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub random_prefix_len: u32,
    /// `prefix_repetition`: length of a prefix, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 256)]
    pub prefix_repetition_prefix_len: u32,
    /// `prefix_repetition`: length of a suffix, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 256)]
    pub prefix_repetition_suffix_len: u32,
    /// `prefix_repetition`: number of prefixes.
    #[arg(long, value_name = "COUNT", default_value_t = 10)]
    pub prefix_repetition_num_prefixes: usize,
    /// `prefix_repetition`: length of an answer, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub prefix_repetition_output_len: u32,
    /// `sharegpt`: length of an answer, in tokens [default: as in the file].
    #[arg(long, value_name = "TOKENS")]
    pub sharegpt_output_len: Option<u32>,
    /// `custom`: length of an answer, in tokens; -1 takes each line's `output_tokens`.
    #[arg(long, value_name = "TOKENS", default_value_t = 256, allow_negative_numbers = true, value_parser = clap::value_parser!(i64).range(-1..=1 << 28))]
    pub custom_output_len: i64,
    /// `custom`: sends prompts without the model's chat template.
    #[arg(long)]
    pub skip_chat_template: bool,
    /// `custom`: additional variables of the chat template.
    #[arg(long, value_name = "JSON", value_parser = super::sampling::json_object)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// `timed_trace`: tokens per hash; 512 in Mooncake's traces.
    #[arg(long, value_name = "TOKENS", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1 << 28))]
    pub timed_trace_chunk_hash_size: u32,
    /// `timed_trace`: seconds per unit of its times; 0.001 in Mooncake's traces.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    pub timed_trace_sec_multiplier: f64,
    /// `timed_trace`: name of the time field.
    #[arg(long, value_name = "NAME", default_value = "timestamp")]
    pub timed_trace_label_timestamp: String,
    /// `timed_trace`: name of the prompt length field.
    #[arg(long, value_name = "NAME", default_value = "input_length")]
    pub timed_trace_label_input_length: String,
    /// `timed_trace`: name of the answer length field.
    #[arg(long, value_name = "NAME", default_value = "output_length")]
    pub timed_trace_label_output_length: String,
    /// `timed_trace`: name of the hash field.
    #[arg(long, value_name = "NAME", default_value = "hash_ids")]
    pub timed_trace_label_hash_ids: String,
    /// `timed_trace`: the PYTHONHASHSEED of the vLLM client whose prompts are reproduced.
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub timed_trace_hash_seed: u32,
    /// `timed_trace`: sends requests at the times of the trace; the default.
    #[arg(long, overrides_with = "no_self_timed")]
    pub self_timed: bool,
    /// `timed_trace`: sends requests by --request-rate.
    #[arg(long)]
    pub no_self_timed: bool,
    /// `sessions` without a file: number of sessions.
    #[arg(long, value_name = "COUNT", default_value_t = 8)]
    pub sessions: usize,
    /// `sessions` without a file: turns per session. The first one has --random-input-len tokens.
    #[arg(long, value_name = "COUNT", default_value_t = 4)]
    pub turns: usize,
    /// `sessions` without a file: tokens of every later turn.
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub turn_input_len: u32,
    /// `sessions`: pause between an answer and the next turn, as in `2s`.
    #[arg(long, value_name = "TIME", value_parser = crate::span::parse, default_value = "0s")]
    pub think_time: Duration,
    /// `sessions`: the header that names the session.
    #[arg(long, value_name = "NAME", value_parser = header_name, default_value = "session-id")]
    pub session_header: HeaderName,
}

/// The dataset of the prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DatasetName {
    /// Synthetic prompts
    Random,
    /// A few synthetic prefixes, each shared by many prompts
    #[value(name = "prefix_repetition")]
    PrefixRepetition,
    /// First questions of conversations, from a JSON file in the format of `ShareGPT`
    #[value(name = "sharegpt")]
    ShareGpt,
    /// A JSONL file of `{"prompt": …, "output_tokens": …}`
    Custom,
    /// Lengths from a CSV file in the format of `BurstGPT`
    #[value(name = "burstgpt")]
    BurstGpt,
    /// A recorded trace with times and repeated blocks, from a JSONL file in the format of Mooncake
    #[value(name = "timed_trace")]
    TimedTrace,
    /// Conversations of several turns, synthetic or from a JSONL file
    Sessions,
}

/// How to load the tokenizer, as in vLLM's client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TokenizerMode {
    /// The model's tokenizer
    Auto,
    /// The tokenizer of Hugging Face
    Hf,
    /// The same as `hf`
    Slow,
}

impl DatasetName {
    /// The name on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::PrefixRepetition => "prefix_repetition",
            Self::ShareGpt => "sharegpt",
            Self::Custom => "custom",
            Self::BurstGpt => "burstgpt",
            Self::TimedTrace => "timed_trace",
            Self::Sessions => "sessions",
        }
    }
}

impl Data {
    /// Mean length of a prompt of `random`.
    pub(super) fn input_length(&self) -> u32 {
        self.input_len.unwrap_or(self.random_input_len)
    }

    /// Mean length of an answer to `random`.
    pub(super) fn output_length(&self) -> u32 {
        self.output_len.unwrap_or(self.random_output_len)
    }

    /// Whether answers have the full length by default, as in vLLM.
    pub(super) fn ignores_eos(&self) -> bool {
        matches!(
            self.dataset_name,
            DatasetName::Random | DatasetName::TimedTrace | DatasetName::Sessions
        )
    }

    /// The workload of the flags, before any file is read.
    pub(super) fn workload(&self, backend: BackendName) -> Result<Workload, Failure> {
        let usage = |text: &'static str| Err(Failure::message(ExitStatus::Usage, text));
        let is_trace = self.dataset_name == DatasetName::TimedTrace;
        if is_trace && backend.is_chat() {
            return usage(
                "`timed_trace` has prompts of token ids, which a chat does not accept: set `--backend openai`",
            );
        }
        if (self.self_timed || self.no_self_timed) && !is_trace {
            return usage("`--self-timed` and `--no-self-timed` need `--dataset-name timed_trace`");
        }
        let is_made = matches!(self.dataset_name, DatasetName::Random | DatasetName::PrefixRepetition);
        if let (true, Some(path)) = (is_made, &self.dataset_path) {
            let problem = format!(
                "`{}` reads no file, but `--dataset-path` is `{}`",
                self.dataset_name.name(),
                path.display()
            );
            let mut failure = Failure::message(ExitStatus::Usage, problem);
            failure.hints = vec!["set `--dataset-name` to the kind of the file: `custom`, `sharegpt`, …".to_owned()];
            return Err(failure);
        }
        let dataset = self.dataset()?;
        Ok(match dataset.source {
            Source::Random(random) => Workload::Random(random),
            _ => Workload::Planned(dataset),
        })
    }

    /// The dataset of the flags.
    pub(in crate::cli::bench) fn dataset(&self) -> Result<Dataset, Failure> {
        let path = || {
            let name = self.dataset_name.name();
            let missing = || Failure::new(ExitStatus::Usage, DatasetError::NoPath(name));
            self.dataset_path.clone().ok_or_else(missing)
        };
        let source = match self.dataset_name {
            DatasetName::Random => Source::Random(Random {
                input_length: self.input_length(),
                output_length: self.output_length(),
                range_ratio: self.random_range_ratio,
                prefix_length: self.random_prefix_len,
                vocabulary_size: self.vocab_size,
                prompt_count: self.num_prompts,
                seed: self.seed,
            }),
            DatasetName::PrefixRepetition => Source::PrefixRepetition(PrefixRepetition {
                prefix_length: self.prefix_repetition_prefix_len,
                suffix_length: self.prefix_repetition_suffix_len,
                prefix_count: self.prefix_repetition_num_prefixes,
                output_length: self.output_len.unwrap_or(self.prefix_repetition_output_len),
            }),
            DatasetName::ShareGpt => Source::ShareGpt(ShareGpt {
                path: path()?,
                output_length: self.output_len.or(self.sharegpt_output_len),
            }),
            DatasetName::Custom => Source::Custom(Custom {
                path: path()?,
                output_length: self.output_len.or(u32::try_from(self.custom_output_len).ok()),
                chat_template: !self.skip_chat_template,
                template_settings: self.chat_template_kwargs.clone().unwrap_or_default(),
            }),
            DatasetName::BurstGpt => Source::BurstGpt(BurstGpt { path: path()? }),
            DatasetName::TimedTrace => Source::TimedTrace(TimedTrace {
                path: path()?,
                chunk_length: self.timed_trace_chunk_hash_size,
                seconds_per_unit: self.timed_trace_sec_multiplier,
                time_field: self.timed_trace_label_timestamp.clone(),
                input_field: self.timed_trace_label_input_length.clone(),
                output_field: self.timed_trace_label_output_length.clone(),
                hashes_field: self.timed_trace_label_hash_ids.clone(),
                self_timed: !self.no_self_timed,
                hash_seed: self.timed_trace_hash_seed,
            }),
            DatasetName::Sessions => Source::Sessions(self.conversations()),
        };
        Ok(Dataset {
            source,
            prompt_count: self.num_prompts,
            seed: self.seed,
            shuffle: !self.disable_shuffle,
            oversample: !self.no_oversample,
        })
    }

    fn conversations(&self) -> Sessions {
        let turns = match &self.dataset_path {
            Some(path) => Turns::File(path.clone()),
            None => Turns::Synthetic {
                sessions: self.sessions,
                turns: self.turns,
                first_length: self.input_length(),
                later_length: self.turn_input_len,
            },
        };
        Sessions {
            output_length: match turns {
                Turns::File(_) => self.output_len,
                Turns::Synthetic { .. } => Some(self.output_length()),
            },
            turns,
            think_time: self.think_time,
            header: self.session_header.clone(),
        }
    }
}

fn header_name(text: &str) -> Result<HeaderName, String> {
    HeaderName::try_from(text).map_err(|_| "it is not a valid HTTP header name".to_owned())
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
