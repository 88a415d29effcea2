//! The flags of `xpyd bench`: named and meant as those of `vllm bench serve`, with LMCache's xPyD recipe as defaults.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{ArgAction, Args, ValueEnum};
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::bench::{Arrivals, Backend, Metric, Objective, Random, RangeRatio, Spec, Workload};
use crate::report::{ExitStatus, Failure};

/// Benchmarks a server: the running fleet, or any other that speaks OpenAI's API.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    /// The server, as `http://host:port` [default: the running fleet, else --host and --port].
    #[arg(long, value_name = "URL", conflicts_with_all = ["host", "port"], help_heading = "Target")]
    pub base_url: Option<String>,
    /// The server's host [default: 127.0.0.1].
    #[arg(long, help_heading = "Target")]
    pub host: Option<String>,
    /// The server's port [default: 9100].
    #[arg(long, help_heading = "Target")]
    pub port: Option<u16>,
    /// The kind of requests.
    #[arg(long, value_enum, default_value_t = BackendName::Openai, help_heading = "Target")]
    pub backend: BackendName,
    /// The path of the requests [default: by backend].
    #[arg(long, value_name = "PATH", help_heading = "Target")]
    pub endpoint: Option<String>,
    /// The model's name in requests [default: the first that the server lists].
    #[arg(long, help_heading = "Target")]
    pub model: Option<String>,
    /// Headers of every request. `OPENAI_API_KEY` is sent as a bearer token.
    #[arg(long, value_name = "NAME=VALUE", num_args = 1.., help_heading = "Target")]
    pub header: Vec<Header>,

    /// What prompts are made of.
    #[arg(long, value_enum, default_value_t = DatasetName::Random, help_heading = "Workload")]
    pub dataset_name: DatasetName,
    /// Mean length of a prompt, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 7500, help_heading = "Workload")]
    pub random_input_len: u32,
    /// Mean length of an answer, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 200, help_heading = "Workload")]
    pub random_output_len: u32,
    /// Spread of the lengths: uniform in mean * (1 ± ratio). A number, or `{"input": …, "output": …}`.
    #[arg(long, value_name = "RATIO", value_parser = range_ratio, default_value = "0.0", help_heading = "Workload")]
    pub random_range_ratio: RangeRatio,
    /// Length of a prefix that all prompts share, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 0, help_heading = "Workload")]
    pub random_prefix_len: u32,
    /// Prompts are made of token ids below this. The default is Llama 3's.
    #[arg(long, value_name = "TOKENS", default_value_t = 128_000, help_heading = "Workload")]
    pub vocab_size: u32,
    /// How many requests.
    #[arg(long, value_name = "COUNT", default_value_t = 30, help_heading = "Workload")]
    pub num_prompts: usize,
    /// Seed of prompts, lengths and arrivals [default: the clock].
    ///
    /// The same seed makes the same prompts, whose KV a server may still hold from the last run: its numbers are then
    /// those of a cache. So the default differs from run to run, as in LMCache's recipe, and is printed.
    #[arg(long, help_heading = "Workload")]
    pub seed: Option<u32>,
    /// Asks for answers of the full length, whatever the model wants to say.
    #[arg(
        long, value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1, require_equals = true,
        default_value_t = true, default_missing_value = "true", help_heading = "Workload"
    )]
    pub ignore_eos: bool,

    /// Mean requests per second; `inf` sends all at once.
    #[arg(long, value_name = "RATE", default_value_t = 1.0, help_heading = "Load")]
    pub request_rate: f64,
    /// How even the arrivals are: 1 is a Poisson process, more is more even, `inf` is constant.
    #[arg(long, value_name = "SHAPE", default_value_t = 100.0, help_heading = "Load")]
    pub burstiness: f64,
    /// Most requests at the server at once [default: no limit].
    #[arg(long, value_name = "COUNT", help_heading = "Load")]
    pub max_concurrency: Option<NonZeroUsize>,
    /// Copies of the first prompt sent before the clock starts.
    #[arg(long, value_name = "COUNT", default_value_t = 0, help_heading = "Load")]
    pub num_warmups: usize,
    /// How long one request may take, as in `90s` or `6h`.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "6h", help_heading = "Load")]
    pub request_timeout: Duration,

    /// Sampling temperature [default: the server's].
    #[arg(long, help_heading = "Sampling")]
    pub temperature: Option<f64>,
    /// Nucleus sampling [default: the server's].
    #[arg(long, help_heading = "Sampling")]
    pub top_p: Option<f64>,
    /// Sampling from the likeliest tokens [default: the server's].
    #[arg(long, allow_negative_numbers = true, help_heading = "Sampling")]
    pub top_k: Option<i64>,
    /// Smallest probability relative to the likeliest token's [default: the server's].
    #[arg(long, help_heading = "Sampling")]
    pub min_p: Option<f64>,
    /// Penalty by frequency [default: the server's].
    #[arg(long, allow_negative_numbers = true, help_heading = "Sampling")]
    pub frequency_penalty: Option<f64>,
    /// Penalty by presence [default: the server's].
    #[arg(long, allow_negative_numbers = true, help_heading = "Sampling")]
    pub presence_penalty: Option<f64>,
    /// Penalty of repetition [default: 1 for completions].
    #[arg(long, help_heading = "Sampling")]
    pub repetition_penalty: Option<f64>,
    /// More fields of the request's body, as a JSON object.
    #[arg(long, value_name = "JSON", value_parser = json_object, help_heading = "Sampling")]
    pub extra_body: Option<Map<String, Value>>,

    /// The latencies to report: `ttft`, `tpot`, `itl`, `e2el`, `client_queue_time`, `e2el_including_client_queue`.
    #[arg(
        long, value_name = "NAMES", value_delimiter = ',', value_parser = metric, default_value = "ttft,tpot,itl",
        help_heading = "Report"
    )]
    pub percentile_metrics: Vec<Metric>,
    /// The percentiles to report.
    #[arg(
        long, value_name = "NUMBERS", value_delimiter = ',', value_parser = percentile, default_value = "99",
        help_heading = "Report"
    )]
    pub metric_percentiles: Vec<f64>,
    /// What a good request keeps to, in milliseconds: `ttft:500 tpot:20 e2el:5000`.
    #[arg(long, value_name = "NAME:MS", num_args = 1.., help_heading = "Report")]
    pub goodput: Vec<Objective>,
    /// Prints the result as JSON in place of the table: vLLM's keys, and xpyd's own under `xpyd`.
    #[arg(long, help_heading = "Report")]
    pub json: bool,
    /// Saves the result as JSON.
    #[arg(long, help_heading = "Report")]
    pub save_result: bool,
    /// With the values of every request in the JSON.
    #[arg(long, help_heading = "Report")]
    pub save_detailed: bool,
    /// The folder of the saved result [default: the current one].
    #[arg(long, value_name = "PATH", help_heading = "Report")]
    pub result_dir: Option<PathBuf>,
    /// The name of the saved result [default: by backend, rate, model and time].
    #[arg(long, value_name = "NAME", help_heading = "Report")]
    pub result_filename: Option<String>,
}

/// The names of backends, as vLLM has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendName {
    /// `/v1/completions`, with prompts of token ids.
    #[value(alias = "vllm")]
    Openai,
    /// `/v1/chat/completions`, with prompts of words, about one token each.
    OpenaiChat,
}

/// What prompts are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DatasetName {
    /// Synthetic ones.
    Random,
}

/// A header given on the command line. Its value is not printed.
#[derive(Debug, Clone)]
pub struct Header {
    /// Its name.
    pub name: HeaderName,
    /// Its value.
    pub value: HeaderValue,
}

impl FromStr for Header {
    type Err = String;

    /// Reads `NAME=VALUE`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("a header is written `NAME=VALUE`")?;
        let name = HeaderName::try_from(name.trim()).map_err(|_| "the name is not one of an HTTP header")?;
        let mut value = HeaderValue::try_from(value.trim()).map_err(|_| "the value holds what a header cannot")?;
        value.set_sensitive(true);
        Ok(Self { name, value })
    }
}

impl Arguments {
    /// The run that they ask for. Its model is empty if they leave that to the server.
    pub(super) fn spec(&self, base_url: String, headers: HeaderMap) -> Result<Spec, Failure> {
        let backend = match self.backend {
            BackendName::Openai => Backend::Completions,
            BackendName::OpenaiChat => Backend::Chat,
        };
        let workload = match self.dataset_name {
            DatasetName::Random => Workload::Random(Random {
                input_length: self.random_input_len,
                output_length: self.random_output_len,
                range_ratio: self.random_range_ratio,
                prefix_length: self.random_prefix_len,
                vocabulary_size: self.vocab_size,
                prompt_count: self.num_prompts,
                seed: self.seed.unwrap_or_else(clock_seed),
            }),
        };
        let endpoint = self.endpoint.as_deref().unwrap_or(backend.endpoint());
        if !endpoint.starts_with('/') {
            return Err(Failure::message(
                ExitStatus::Usage,
                "`--endpoint` is a path and starts with `/`",
            ));
        }
        Ok(Spec {
            base_url,
            backend,
            endpoint: endpoint.to_owned(),
            model: self.model.clone().unwrap_or_default(),
            headers,
            workload,
            arrivals: Arrivals {
                request_rate: self.request_rate,
                burstiness: self.burstiness,
            },
            max_concurrency: self.max_concurrency,
            ignore_eos: self.ignore_eos,
            extra_body: self.sampling(),
            warmups: self.num_warmups,
            request_timeout: self.request_timeout,
            metrics: self.percentile_metrics.clone(),
            percentiles: self.metric_percentiles.clone(),
            objectives: self.goodput.clone(),
            keep_texts: self.save_detailed,
        })
    }

    /// The fields of the body that the user set; `--extra-body` goes before the single flags, as in vLLM.
    fn sampling(&self) -> Map<String, Value> {
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

    /// What is about to run, in one line.
    pub(super) fn headline(&self, spec: &Spec) -> String {
        format!(
            "{} requests of {} tokens in and {} out to `{}` at {}{}: {} req/s, burstiness {}, seed {}",
            self.num_prompts,
            self.random_prefix_len + self.random_input_len,
            self.random_output_len,
            spec.model,
            spec.base_url,
            spec.endpoint,
            self.request_rate,
            self.burstiness,
            spec.workload.seed(),
        )
    }
}

/// The seconds of the clock, as the shell's `date +%s` gives them; they wrap around in 2106.
#[expect(clippy::cast_possible_truncation, reason = "the low bits are the ones that differ")]
fn clock_seed() -> u32 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_secs() as u32
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

fn json_object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("not a JSON object: {error}"))
}

fn metric(name: &str) -> Result<Metric, String> {
    let found = Metric::ALL.into_iter().find(|metric| metric.key() == name);
    found.ok_or_else(|| format!("it is one of {}", Metric::ALL.map(Metric::key).join(", ")))
}

fn percentile(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (0.0..=100.0).contains(number));
    number.ok_or_else(|| "a percentile is a number from 0 to 100".to_owned())
}

#[cfg(test)]
mod tests;
