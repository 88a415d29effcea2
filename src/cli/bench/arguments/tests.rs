//! Tests of the flags.

use clap::{FromArgMatches as _, error::ErrorKind};
use reqwest::header::HeaderMap;
use serde_json::{Value, json};

use super::*;
use crate::bench::{Arrivals, Metric, RampStrategy, Random, RangeRatio, Workload};

pub(in crate::cli::bench) fn parse(line: &str) -> Result<Arguments, clap::Error> {
    let command = Arguments::augment_args(clap::Command::new("bench").no_binary_name(true));
    let matches = command.try_get_matches_from(line.split_whitespace())?;
    Arguments::from_arg_matches(&matches)
}

fn spec(line: &str) -> Spec {
    let arguments = parse(line).unwrap();
    arguments.spec(server()).unwrap()
}

/// A server for tests.
pub(in crate::cli::bench) fn server() -> Server {
    Server {
        base_url: "http://h:1".to_owned(),
        headers: HeaderMap::new(),
    }
}

fn random(spec: &Spec) -> &Random {
    match &spec.workload {
        Workload::Random(random) => random,
        Workload::Planned(_) | Workload::Prepared(_) => panic!("not a random one"),
    }
}

#[test]
fn the_defaults_are_vllms() {
    let spec = spec("");
    let random = random(&spec);
    assert_eq!(
        (random.input_length, random.output_length, random.prompt_count),
        (1024, 128, 1000)
    );
    assert_eq!(
        spec.arrivals,
        Arrivals {
            request_rate: f64::INFINITY,
            burstiness: 1.0,
            ramp: None,
        }
    );
    assert!(spec.ignore_eos && spec.extra_body.is_empty() && spec.max_concurrency.is_none());
    assert_eq!(spec.metrics, [Metric::Ttft, Metric::Tpot, Metric::Itl]);
    assert_eq!(
        (spec.endpoint.as_str(), spec.percentiles.as_slice()),
        ("/v1/completions", &[99.0][..])
    );
}

#[test]
fn the_command_line_of_the_recipe_is_accepted() {
    let spec = spec(
        "--port 9100 --seed 1763800000 --model meta-llama/Llama-3.1-8B-Instruct --dataset-name random \
         --random-input-len 7500 --random-output-len 200 --num-prompts 30 --burstiness 100 --request-rate 1 --ignore-eos",
    );
    assert_eq!(spec.workload.seed(), 1_763_800_000);
    assert!(spec.ignore_eos);
}

#[test]
fn given_flags_override_a_recipe() {
    let line = "xpyd bench serve --recipe lmcache-xpyd --num_prompts 3 --random-input-len 64";
    let words = crate::cli::bench::compatible_argv(line.split(' ').map(std::ffi::OsString::from));
    let words: Vec<&str> = words[2..].iter().map(|word| word.to_str().unwrap()).collect();
    let arguments = parse(&words.join(" ")).unwrap();
    assert!(arguments.output.as_vllm);
    let spec = arguments.spec(server()).unwrap();
    let random = random(&spec);
    assert_eq!(
        (random.input_length, random.output_length, random.prompt_count),
        (64, 200, 3)
    );
    assert!(random.seed > 1_763_800_000);
    assert_eq!((spec.arrivals.request_rate, spec.arrivals.burstiness), (1.0, 100.0));
}

#[test]
fn a_ramp_takes_the_place_of_a_rate() {
    let line = "--ramp-up-strategy exponential --ramp-up-start-rps 2 --ramp-up-end-rps 9";
    let ramp = spec(line).arrivals.ramp.unwrap();
    assert_eq!((ramp.strategy, ramp.start, ramp.end), (RampStrategy::Exponential, 2, 9));
    let both = parse(&format!("{line} --request-rate 3")).unwrap();
    assert!(both.spec(server()).is_err());
}

#[test]
fn the_later_of_two_flags_wins() {
    let spec = spec("--num-prompts 3 --seed 1 --num-prompts 4 --goodput ttft:5 tpot:1 ttft:6");
    let random = random(&spec);
    assert_eq!(random.prompt_count, 4);
    assert_eq!(spec.objectives, ["ttft:6", "tpot:1"].map(|text| text.parse().unwrap()));
}

#[test]
fn optional_features_are_off_by_default() {
    assert_eq!(spec("").options, Options::default());
    let line = "--lora-modules a b --lora-assignment round-robin --logprobs 2 --ready-check-timeout-sec 9 \
                --probe-request-rate 0.5 --request-id-prefix x- --served-model-name m --model org/m --backend vllm \
                --label l --metadata tp=1 run=a=b";
    let spec = spec(line);
    assert_eq!(spec.model, "m");
    assert_eq!(spec.naming.model_id.as_deref(), Some("org/m"));
    assert_eq!(
        (spec.naming.backend, spec.naming.label.as_deref()),
        (Some("vllm"), Some("l"))
    );
    let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    assert_eq!(spec.naming.metadata, [pair("tp", "1"), pair("run", "a=b")]);
    let expected = Options {
        lora: Some(Lora {
            modules: vec!["a".to_owned(), "b".to_owned()],
            assignment: LoraAssignment::RoundRobin,
        }),
        logprobs: Some(2),
        ready_check: Duration::from_secs(9),
        probe_rate: 0.5,
        request_id_prefix: Some("x-".to_owned()),
        tokenizer: None,
        is_insecure: false,
        is_without_tokenizer: false,
    };
    assert_eq!(spec.options, expected);
}

#[test]
fn flags_that_take_several_values_take_them_as_vllm_does() {
    let line =
        "--goodput ttft:500 tpot:20 --header a=1 b=2=3 --metric-percentiles 50,99.9 --percentile-metrics e2el,ttft";
    let arguments = parse(line).unwrap();
    assert_eq!(arguments.output.goodput.len(), 2);
    let headers: Vec<_> = arguments
        .target
        .header
        .iter()
        .map(|header| (header.name.as_str(), header.value.as_bytes()))
        .collect();
    assert_eq!(headers, [("a", &b"1"[..]), ("b", &b"2=3"[..])]);
    assert!(!format!("{arguments:?}").contains("2=3"), "a header's value is secret");
    assert_eq!(arguments.output.metric_percentiles, [50.0, 99.9]);
    assert_eq!(arguments.output.percentile_metrics, [Metric::E2el, Metric::Ttft]);
}

#[test]
fn extra_body_overrides_sampling_flags() {
    let spec = spec(r#"--temperature 0 --top-k -1 --extra-body {"temperature":0.5,"seed":1} --ignore-eos=false"#);
    assert_eq!(
        Value::Object(spec.extra_body),
        json!({"top_k": -1, "temperature": 0.5, "seed": 1})
    );
    assert!(!spec.ignore_eos);
}

#[test]
fn infinite_rates_and_separate_ratios_are_read() {
    let spec = spec(r#"--request-rate inf --burstiness inf --random-range-ratio {"input":0.1,"output":0.2}"#);
    assert!(spec.arrivals.request_rate.is_infinite() && spec.arrivals.burstiness.is_infinite());
    let random = random(&spec);
    assert_eq!(
        random.range_ratio,
        RangeRatio {
            input: 0.1,
            output: 0.2
        }
    );
}

#[test]
fn invalid_flags_are_rejected() {
    for (line, kind) in [
        ("--goodput ttfft:1", ErrorKind::ValueValidation),
        ("--header secret", ErrorKind::ValueValidation),
        ("--header Content-Length=3", ErrorKind::ValueValidation),
        ("--header x-request-id=3", ErrorKind::ValueValidation),
        ("--metric-percentiles 101", ErrorKind::ValueValidation),
        ("--percentile-metrics ttft,tptf", ErrorKind::ValueValidation),
        ("--max-concurrency 0", ErrorKind::ValueValidation),
        ("--random-range-ratio {}", ErrorKind::ValueValidation),
        ("--extra-body [1]", ErrorKind::ValueValidation),
        ("--seed 4294967296", ErrorKind::ValueValidation),
        ("--dataset-name sonnet", ErrorKind::InvalidValue),
        ("--backend openai-audio", ErrorKind::ValueValidation),
        ("--metadata tp", ErrorKind::ValueValidation),
        ("--probe-request-rate inf", ErrorKind::ValueValidation),
        ("--ramp-up-strategy linear", ErrorKind::MissingRequiredArgument),
        ("--ramp-up-start-rps 1", ErrorKind::MissingRequiredArgument),
        ("--ramp-up-start-rps 0", ErrorKind::ValueValidation),
        ("--nmu-prompts 3", ErrorKind::UnknownArgument),
    ] {
        assert_eq!(parse(line).unwrap_err().kind(), kind, "{line}");
    }
}
