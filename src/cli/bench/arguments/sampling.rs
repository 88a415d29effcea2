//! Flags of `xpyd bench`: sampling parameters.

use clap::{ArgAction, Args};
use serde_json::{Map, Value};

/// The sampling flags.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Sampling")]
pub struct Sampling {
    /// Generates answers of the full length [default: true for `random`, `timed_trace` and `sessions`].
    #[arg(
        long, value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1, require_equals = true,
        default_missing_value = "true"
    )]
    pub ignore_eos: Option<bool>,
    /// Sampling temperature [default: the server's].
    #[arg(long)]
    pub temperature: Option<f64>,
    /// Nucleus sampling [default: the server's].
    #[arg(long)]
    pub top_p: Option<f64>,
    /// Samples from this number of likeliest tokens [default: the server's].
    #[arg(long, allow_negative_numbers = true)]
    pub top_k: Option<i64>,
    /// Smallest probability relative to the likeliest token [default: the server's].
    #[arg(long)]
    pub min_p: Option<f64>,
    /// Frequency penalty [default: the server's].
    #[arg(long, allow_negative_numbers = true)]
    pub frequency_penalty: Option<f64>,
    /// Presence penalty [default: the server's].
    #[arg(long, allow_negative_numbers = true)]
    pub presence_penalty: Option<f64>,
    /// Repetition penalty [default: 1 for completions].
    #[arg(long)]
    pub repetition_penalty: Option<f64>,
    /// Number of log probabilities per token of a completion [default: none].
    #[arg(long, value_name = "COUNT")]
    pub logprobs: Option<u32>,
    /// Additional fields of the request body, as a JSON object.
    #[arg(long, value_name = "JSON", value_parser = json_object)]
    pub extra_body: Option<Map<String, Value>>,
}

impl Sampling {
    /// The body fields that the user set; `--extra-body` takes precedence over single flags, as in vLLM.
    pub(super) fn fields(&self) -> Map<String, Value> {
        let flags = [
            ("top_p", self.top_p.map(Value::from)),
            ("top_k", self.top_k.map(Value::from)),
            ("min_p", self.min_p.map(Value::from)),
            ("temperature", self.temperature.map(Value::from)),
            ("frequency_penalty", self.frequency_penalty.map(Value::from)),
            ("presence_penalty", self.presence_penalty.map(Value::from)),
            ("repetition_penalty", self.repetition_penalty.map(Value::from)),
        ];
        let set = flags
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value?)));
        set.chain(self.extra_body.clone().unwrap_or_default()).collect()
    }
}

pub(super) fn json_object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("not a JSON object: {error}"))
}
