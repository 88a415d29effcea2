//! `xpyd sim`: runs one simulated engine, with the arguments, variables and files of `vllm serve`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, ValueEnum};
use tokio::net::TcpListener;

use crate::engine::arguments::{self, GivenOption};
use crate::report::{ExitStatus, Failure};
use crate::sim;

/// Arguments of `xpyd sim`: those of `vllm serve` with an effect here, then those of the simulation. `line` removes the
/// others.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub struct Arguments {
    /// The model, a name or a path; nothing is loaded
    pub model: String,
    /// The model name for clients
    #[arg(long)]
    pub served_model_name: Option<String>,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    /// Port to listen on
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Longest prompt plus answer, in tokens
    #[arg(long, default_value_t = 8192)]
    pub max_model_len: u32,
    /// Tensor-parallel ranks
    #[arg(long, default_value_t = 1)]
    pub tensor_parallel_size: u16,
    /// Data-parallel ranks; each has its own side channel, and the first one does all the work
    #[arg(long, default_value_t = 1)]
    pub data_parallel_size: u16,
    /// The connector, as JSON
    #[arg(long)]
    pub kv_transfer_config: Option<String>,
    /// Capture no CUDA graphs
    #[arg(long)]
    pub enforce_eager: bool,
    /// Accepted; the prefix cache is always off
    #[arg(long = "no-enable-prefix-caching")]
    pub no_enable_prefix_caching: bool,
    /// Prefill every prompt in one step
    #[arg(long = "no-enable-chunked-prefill")]
    pub no_enable_chunked_prefill: bool,
    /// Tokens per scheduler step
    #[arg(long)]
    pub max_num_batched_tokens: Option<u32>,
    /// API keys; clients must send one of them
    #[arg(long, num_args = 1.., value_name = "KEY", env = "VLLM_API_KEY", hide_env_values = true)]
    pub api_key: Vec<String>,
    /// Seconds that running requests can continue after SIGTERM
    #[arg(long, default_value_t = 0)]
    pub shutdown_timeout: u64,
    /// Report cached tokens in `usage`
    #[arg(long, overrides_with = "no_enable_prompt_tokens_details")]
    pub enable_prompt_tokens_details: bool,
    /// Do not report cached tokens in `usage`
    #[arg(long = "no-enable-prompt-tokens-details")]
    pub no_enable_prompt_tokens_details: bool,
    /// Report a request's times in its answer
    #[arg(long)]
    pub enable_per_request_metrics: bool,
    /// Accepted; nothing is computed
    #[arg(long)]
    pub dtype: Option<String>,
    /// Accepted; no memory is used
    #[arg(long)]
    pub gpu_memory_utilization: Option<f64>,
    /// Accepted; nothing is bound
    #[arg(long)]
    pub numa_bind: bool,
    /// Accepted; nothing is bound
    #[arg(long, num_args = 1.., value_name = "NODE")]
    pub numa_bind_nodes: Vec<u32>,
    /// An option of `vllm serve` without an effect here
    #[arg(long, hide = true, value_name = "OPTION", action = ArgAction::Append)]
    pub ignored: Vec<String>,
    /// The timing preset
    #[arg(long, default_value = sim::INSTANT.name)]
    pub preset: String,
    /// A fault to simulate, as NAME or NAME=VALUE; can be repeated
    #[arg(long = "fault", value_name = "KNOB", action = ArgAction::Append)]
    pub faults: Vec<String>,
    /// The process of the engine to run
    #[arg(long, hide = true)]
    pub child: Option<SpawnedProcess>,
    /// Answer everything at once with canned bytes, for `benches/proxy`
    #[arg(long, hide = true)]
    pub null: bool,
    /// Events per stream of a null engine
    #[arg(long, hide = true, default_value_t = 16, requires = "null")]
    pub null_events: u32,
    /// Time between two events of a null engine's streams
    #[arg(long, hide = true, default_value = "0s", requires = "null", value_parser = crate::span::parse)]
    pub null_interval: Duration,
}

/// A process that the simulated API server spawns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SpawnedProcess {
    /// vLLM's `EngineCore`.
    EngineCore,
    /// vLLM's worker.
    Worker,
}

/// A whole command line with the options of `vllm serve` after `sim` in the spelling of [`Arguments`]. Options without an
/// effect are listed after `--ignored`.
pub(super) fn line(all: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut all: Vec<OsString> = all.into_iter().collect();
    // Global flags take no values, so the first word that is not a flag is the command.
    let is_word = |word: &OsString| !word.as_encoded_bytes().starts_with(b"-");
    let verb = all.iter().skip(1).position(is_word).map(|place| place + 1);
    let Some(verb) = verb.filter(|&place| all[place] == "sim") else {
        return all;
    };
    let rest: Option<Vec<String>> = all[verb + 1..]
        .iter()
        .map(|word| word.to_str().map(str::to_owned))
        .collect();
    if let Some(rest) = rest {
        all.truncate(verb + 1);
        all.extend(words(&rest).into_iter().map(OsString::from));
    }
    all
}

fn words(given: &[String]) -> Vec<String> {
    let known = Arguments::augment_args(clap::Command::new("sim"));
    let is_own = |name: &str| {
        let mut names = known.get_arguments().filter_map(clap::Arg::get_long);
        ["help", "quiet"].contains(&name) || names.any(|own| own == name)
    };
    let mut words: Vec<String> = Vec::new();
    let mut next = 0;
    for option in arguments::read(given) {
        words.extend_from_slice(&given[next..option.words.start]);
        next = option.words.end;
        let written = option.spelled.trim_start_matches('-').replace('_', "-");
        let full = option.name.trim_start_matches('-').to_owned();
        if is_own(&written) && option.values.len() != 1 || !is_own(&full) && is_own(&written) {
            words.push(
                option.spelled.replace('_', "-")
                    + given[option.words.start]
                        .strip_prefix(option.spelled)
                        .unwrap_or_default(),
            );
            words.extend_from_slice(&given[option.words.start + 1..option.words.end]);
            continue;
        }
        let (off, is_off) = (format!("no-{full}"), option.is_off());
        if option.part.is_none() && is_own(&off) && (is_off || !is_own(&full)) {
            // Without this word, the engine does what is asked.
            words.retain(|word| *word != format!("--{off}"));
            words.extend(is_off.then(|| format!("--{off}")));
        } else if option.part.is_none() && is_own(&full) && !is_off && is_usable(&full, &option) {
            match option.values[..] {
                [] => words.push(format!("--{full}")),
                [value] => words.push(format!("--{full}={}", in_digits(&full, value))),
                _ => {
                    words.push(format!("--{full}"));
                    words.extend(option.values.iter().map(|&value| value.to_owned()));
                }
            }
        } else {
            words.push(format!("--ignored={}", option.spelled));
        }
    }
    words.extend_from_slice(&given[next..]);
    words
}

/// Whether the value has a meaning here. `--max-model-len auto` leaves the choice to the engine.
fn is_usable(name: &str, option: &GivenOption<'_>) -> bool {
    !name.starts_with("max-") || option.value().and_then(arguments::number).is_some()
}

/// A number of tokens, written in digits only.
fn in_digits(name: &str, value: &str) -> String {
    let number = arguments::number(value).filter(|_| name.starts_with("max-"));
    number.map_or_else(|| value.to_owned(), |number| number.to_string())
}

/// Runs one process of an engine until it ends.
pub(super) async fn run(arguments: Arguments) -> Result<ExitStatus, Failure> {
    if arguments.null {
        return answer_at_once(&arguments).await;
    }
    let options = arguments.into_options()?;
    // The engine's own log has the reason, as vLLM's does; only the exit code is missing.
    Ok(sim::run(options).await.unwrap_or(ExitStatus::Failure))
}

async fn answer_at_once(arguments: &Arguments) -> Result<ExitStatus, Failure> {
    let failed = |error: std::io::Error| {
        let address = format!("cannot serve on `{}:{}`", arguments.host, arguments.port);
        Failure::new(ExitStatus::Failure, anyhow::Error::new(error).context(address))
    };
    let listener = TcpListener::bind((arguments.host.as_str(), arguments.port))
        .await
        .map_err(failed)?;
    let engine = sim::NullEngine {
        events: arguments.null_events,
        interval: arguments.null_interval,
    };
    match engine.serve(listener).await.map_err(failed)? {}
}

impl Arguments {
    /// Checks the arguments, and reads the variables of vLLM and LMCache.
    ///
    /// # Errors
    /// With exit code 2 for wrong usage, as `vllm serve`.
    pub fn into_options(self) -> Result<sim::Options, Failure> {
        let usage = |error: sim::OptionsError| Failure::new(ExitStatus::Usage, error);
        let preset =
            sim::Preset::named(&self.preset).ok_or_else(|| usage(sim::OptionsError::Preset(self.preset.clone())))?;
        let kv_transfer = self
            .kv_transfer_config
            .as_deref()
            .map(sim::KvTransferConfig::parse)
            .transpose()
            .map_err(usage)?;
        let faults = self
            .faults
            .iter()
            .map(|fault| fault.parse())
            .collect::<Result<Vec<sim::Fault>, _>>()
            .map_err(|error| usage(error.into()))?;
        let variable = |name: &str| std::env::var(name).ok();
        let side_channel_port = variable("VLLM_NIXL_SIDE_CHANNEL_PORT")
            .map(|port| {
                port.parse()
                    .map_err(|_| usage(sim::OptionsError::Port("VLLM_NIXL_SIDE_CHANNEL_PORT", port)))
            })
            .transpose()?
            .unwrap_or(5600);
        let step_deadline = variable("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS")
            .and_then(|seconds| seconds.parse().ok())
            .map_or(sim::STEP_DEADLINE, Duration::from_secs);
        Ok(sim::Options {
            served_model_name: self.served_model_name.unwrap_or_else(|| self.model.clone()),
            model: self.model,
            host: self.host,
            port: self.port,
            max_model_len: self.max_model_len,
            tensor_parallel_size: self.tensor_parallel_size.max(1),
            data_parallel_size: self.data_parallel_size.max(1),
            kv_transfer,
            side_channel: (
                variable("VLLM_NIXL_SIDE_CHANNEL_HOST").unwrap_or_else(|| "localhost".to_owned()),
                side_channel_port,
            ),
            lmcache_config_file: variable("LMCACHE_CONFIG_FILE").map(PathBuf::from),
            python_hash_seed: variable("PYTHONHASHSEED"),
            chunked_prefill: !self.no_enable_chunked_prefill,
            max_num_batched_tokens: self.max_num_batched_tokens,
            step_deadline,
            api_keys: self.api_key.into_iter().filter(|key| !key.is_empty()).collect(),
            shutdown_timeout: Duration::from_secs(self.shutdown_timeout),
            prompt_tokens_details: self.enable_prompt_tokens_details && !self.no_enable_prompt_tokens_details,
            per_request_metrics: self.enable_per_request_metrics,
            enforce_eager: self.enforce_eager,
            preset,
            faults,
            ignored: self.ignored,
            spawn_children: true,
            process: match self.child {
                None => sim::ProcessKind::ApiServer,
                Some(SpawnedProcess::EngineCore) => sim::ProcessKind::EngineCore,
                Some(SpawnedProcess::Worker) => sim::ProcessKind::Worker,
            },
            log: sim::LogTarget::Stderr,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn read(words: &str) -> Vec<String> {
        let words = words.split(' ').map(OsString::from);
        line(words)
            .into_iter()
            .map(|word| word.into_string().unwrap())
            .collect()
    }

    #[test]
    fn options_without_effect_are_removed_and_listed() {
        for (given, left) in [
            (
                "xpyd sim m --max-num-seqs 128 --port 1",
                "xpyd sim m --ignored=--max-num-seqs --port=1",
            ),
            (
                "xpyd sim m --enable-chunked-prefill -q awq -O3 --lora-modules a=b c=d",
                "xpyd sim m --ignored=-q --ignored=-O3 --ignored=--lora-modules",
            ),
            (
                "xpyd sim m --disable-prefix-caching --no-enable-chunked-prefill -tp 2",
                "xpyd sim m --no-enable-prefix-caching --no-enable-chunked-prefill --tensor-parallel-size=2",
            ),
            (
                "xpyd sim m --max_model_len 8k --api-key a b --an-option-of-tomorrow x y",
                "xpyd sim m --max-model-len=8000 --api-key a b --ignored=--an-option-of-tomorrow",
            ),
            (
                "xpyd -q sim m --fault orphans --preset instant --child worker",
                "xpyd -q sim m --fault orphans --preset=instant --child=worker",
            ),
            ("xpyd up --max-num-seqs 3", "xpyd up --max-num-seqs 3"),
        ] {
            assert_eq!(read(given).join(" "), left, "{given}");
        }
    }

    #[test]
    fn the_last_value_wins() {
        let words =
            read("sim sim m --max-model-len 1 --max-model-len 2 --no-enable-chunked-prefill --enable-chunked-prefill");
        let options = Command::try_parse_from(&words[1..])
            .unwrap()
            .arguments
            .into_options()
            .unwrap();
        assert_eq!((options.max_model_len, options.chunked_prefill), (2, true));
    }

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn options(arguments: &[&str]) -> Result<sim::Options, Failure> {
        let all = ["sim", "meta-llama/Llama-3.1-8B-Instruct"].iter().chain(arguments);
        Command::try_parse_from(all).unwrap().arguments.into_options()
    }

    #[test]
    fn vllm_arguments_are_accepted() {
        let options = options(&[
            "--served-model-name=llama",
            "--enforce-eager",
            "--no-enable-prefix-caching",
            "--no-enable-chunked-prefill",
            "--max-num-batched-tokens=8192",
            "--shutdown-timeout=10",
            "--gpu-memory-utilization=0.8",
            "--dtype=bfloat16",
            r#"--kv-transfer-config={"kv_connector":"NixlConnector","kv_role":"kv_producer","kv_buffer_device":"cuda"}"#,
            "--preset=h100-llama-3.1-8b",
            "--fault=slow-start=2s",
            "--fault=drop-notification",
        ])
        .unwrap();
        assert_eq!(options.served_model_name, "llama");
        assert!(!options.chunked_prefill);
        assert_eq!(options.shutdown_timeout, Duration::from_secs(10));
        assert_eq!(options.faults.len(), 2);
        assert_eq!(options.preset, sim::H100_LLAMA_3_1_8B);
    }

    #[test]
    fn invalid_arguments_exit_as_vllm_does() {
        for wrong in [
            r#"--kv-transfer-config={"kv_connector":"NixlConnector","kv_role":"kv_producer","kv_rank":0}"#,
            "--preset=h200",
            "--fault=explode",
        ] {
            let failure = options(&[wrong]).expect_err(wrong);
            assert_eq!(failure.status, ExitStatus::Usage, "{wrong}");
        }
    }
}
