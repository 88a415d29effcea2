//! Flags to settings.

use clap::{FromArgMatches as _, error::ErrorKind};
use serde_json::{Value, json};

use super::*;
use crate::bench::{Metric, RangeRatio, Workload};

fn parse(line: &str) -> Result<Arguments, clap::Error> {
    let command = Arguments::augment_args(clap::Command::new("bench").no_binary_name(true));
    let matches = command.try_get_matches_from(line.split_whitespace())?;
    Arguments::from_arg_matches(&matches)
}

fn spec(line: &str) -> Spec {
    let arguments = parse(line).unwrap();
    arguments.spec("http://h:1".to_owned(), HeaderMap::new()).unwrap()
}

#[test]
fn the_defaults_are_lmcaches_recipe() {
    let spec = spec("");
    let Workload::Random(random) = &spec.workload else {
        panic!()
    };
    assert_eq!(
        (random.input_length, random.output_length, random.prompt_count),
        (7500, 200, 30)
    );
    assert_eq!(
        spec.arrivals,
        Arrivals {
            request_rate: 1.0,
            burstiness: 100.0
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
fn the_recipes_own_command_line_is_understood() {
    let spec = spec(
        "--port 9100 --seed 1763800000 --model meta-llama/Llama-3.1-8B-Instruct --dataset-name random \
         --random-input-len 7500 --random-output-len 200 --num-prompts 30 --burstiness 100 --request-rate 1 --ignore-eos",
    );
    assert_eq!(spec.workload.seed(), 1_763_800_000);
    assert!(spec.ignore_eos);
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
fn sampling_flags_become_fields_and_extra_body_goes_before_them() {
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
    let Workload::Random(random) = spec.workload else {
        panic!()
    };
    assert_eq!(
        random.range_ratio,
        RangeRatio {
            input: 0.1,
            output: 0.2
        }
    );
}

#[test]
fn what_makes_no_sense_is_refused() {
    for (line, kind) in [
        ("--goodput ttfft:1", ErrorKind::ValueValidation),
        ("--header secret", ErrorKind::ValueValidation),
        ("--metric-percentiles 101", ErrorKind::ValueValidation),
        ("--percentile-metrics ttft,tptf", ErrorKind::ValueValidation),
        ("--max-concurrency 0", ErrorKind::ValueValidation),
        ("--random-range-ratio {}", ErrorKind::ValueValidation),
        ("--extra-body [1]", ErrorKind::ValueValidation),
        ("--seed 4294967296", ErrorKind::ValueValidation),
        ("--dataset-name sonnet", ErrorKind::InvalidValue),
        ("--base-url http://h:1 --port 1", ErrorKind::ArgumentConflict),
        ("--nmu-prompts 3", ErrorKind::UnknownArgument),
    ] {
        assert_eq!(parse(line).unwrap_err().kind(), kind, "{line}");
    }
}
