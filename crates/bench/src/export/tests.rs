//! Compares output formats with files that the real `vllm bench serve` wrote.

use std::num::NonZeroUsize;
use std::time::Duration;

use serde_json::Value;

use crate::record::{Answer, ClientUsage, Record};
use crate::stats::{Distribution, Metric, Metrics, Selection};
use crate::{Arrivals, Backend, Objective, Random, RangeRatio, Report, Spec, Workload};

fn spec(request_rate: f64, burstiness: f64) -> Spec {
    Spec {
        base_url: "http://127.0.0.1:9".to_owned(),
        backend: Backend::Completions,
        endpoint: "/v1/completions".to_owned(),
        model: "tiny".to_owned(),
        headers: reqwest::header::HeaderMap::new(),
        workload: Workload::Random(Random {
            input_length: 1,
            output_length: 1,
            range_ratio: RangeRatio::default(),
            prefix_length: 0,
            vocabulary_size: 1,
            prompt_count: 1,
            seed: 0,
        }),
        arrivals: Arrivals {
            request_rate,
            burstiness,
            ramp: None,
        },
        max_concurrency: None,
        ignore_eos: true,
        extra_body: serde_json::Map::new(),
        warmups: 0,
        request_timeout: Duration::from_mins(1),
        metrics: vec![Metric::Ttft, Metric::Tpot, Metric::Itl],
        percentiles: vec![99.0],
        objectives: Vec::new(),
        keep_texts: true,
        options: crate::Options::default(),
        naming: crate::Naming::default(),
    }
}

fn report(spec: Spec, metrics: Metrics, records: Vec<Record>, prompt_lengths: Vec<u64>) -> Report {
    Report {
        date: "20261122-205142".to_owned(),
        spec,
        metrics,
        records,
        prompt_lengths,
        dropped: 0,
        unsent: 0,
        client_usage: ClientUsage::default(),
        extras: crate::Extras::default(),
        latency_stats: std::sync::OnceLock::new(),
    }
}

/// Mean, median and P99.
fn latency(mean: f64, median: f64, p99: f64) -> Distribution {
    Distribution {
        mean,
        median,
        deviation: 0.0,
        percentiles: vec![(99.0, p99)],
    }
}

struct Capture {
    request_rate: f64,
    completed: usize,
    tokens: [u64; 2],
    duration: f64,
    peaks: (f64, u64),
    ttft: Distribution,
    tpot: Distribution,
    itl: Distribution,
}

impl Capture {
    fn table(self) -> String {
        let metrics = Metrics {
            duration: self.duration,
            completed: self.completed,
            failed: 0,
            total_input_tokens: self.tokens[0],
            total_output_tokens: self.tokens[1],
            request_goodput: None,
            peak_output_throughput: self.peaks.0,
            peak_concurrent_requests: self.peaks.1,
            latencies: vec![
                (Metric::Ttft, self.ttft),
                (Metric::Tpot, self.tpot),
                (Metric::Itl, self.itl),
            ],
        };
        report(spec(self.request_rate, 100.0), metrics, Vec::new(), Vec::new()).table() + "\n"
    }
}

#[test]
fn the_recipe_table_equals_vllms() {
    let table = Capture {
        request_rate: 1.0,
        completed: 30,
        tokens: [225_000, 6000],
        duration: 32.097_696_895_999_89,
        peaks: (217.0, 4),
        ttft: latency(303.183_785_633_329_2, 302.787_525_499_979_9, 306.850_121_010_109),
        tpot: latency(9.001_381_920_267_873, 9.001_823_660_803_975, 9.005_808_573_667_833),
        itl: latency(9.001_381_920_267_873, 9.222_502_500_051_633, 11.790_182_410_102_263),
    };
    assert_eq!(table.table(), crate::fixtures::fixture!("captures/recipe.txt"));
}

/// The run of `captures/everything.json`: the clock readings of vLLM's client in xpyd's records.
fn everything() -> (Value, Report) {
    let file: Value = serde_json::from_str(crate::fixtures::fixture!("captures/everything.json")).unwrap();
    let at = |key: &str, index: usize| file[key][index].as_f64().unwrap();
    let duration = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap();
    let count = file["ttfts"].as_array().unwrap().len();
    let records = (0..count).map(|index| {
        let error = file["errors"][index].as_str().unwrap();
        let gaps = file["itls"][index].as_array().unwrap();
        let answer = Answer {
            first_token: duration(at("ttfts", index)),
            gaps: gaps.iter().map(|gap| duration(gap.as_f64().unwrap())).collect(),
            latency: duration(at("latencies", index)),
            prompt_tokens: file["input_lens"][index].as_u64(),
            completion_tokens: file["output_lens"][index].as_u64(),
            text: file["generated_texts"][index].as_str().unwrap().to_owned(),
            ..Answer::default()
        };
        let released = duration(at("start_times", index) - at("queue_times", index));
        Record {
            index,
            scheduled: released,
            released,
            admitted: duration(at("start_times", index)),
            started: duration(at("start_times", index)),
            result: if error.is_empty() {
                Ok(answer)
            } else {
                Err(error.to_owned())
            },
        }
    });
    let records: Vec<Record> = records.collect();
    let prompt_lengths: Vec<u64> = (0..count)
        .map(|index| file["input_lens"][index].as_u64().unwrap())
        .collect();
    let objectives: Vec<Objective> = ["ttft:80", "e2el:260"].map(|text| text.parse().unwrap()).to_vec();
    let spec = Spec {
        max_concurrency: NonZeroUsize::new(2),
        metrics: Metric::ALL.to_vec(),
        percentiles: vec![50.0, 99.9, 90.0],
        objectives,
        ..spec(12.0, 2.0)
    };
    let selection = Selection {
        percentiles: &spec.percentiles,
        objectives: &spec.objectives,
        is_limited: true,
        is_scheduled: true,
    };
    let duration = duration(file["duration"].as_f64().unwrap());
    let metrics = Metrics::of(&records, &prompt_lengths, duration, selection);
    let report = report(spec, metrics, records, prompt_lengths);
    (file, report)
}

#[test]
fn two_lists_remain_without_details() {
    let (_, report) = everything();
    let brief = report.to_json(false);
    let entries = brief.as_object().unwrap();
    let lists: Vec<&String> = entries
        .iter()
        .filter(|(_, value)| value.is_array())
        .map(|(key, _)| key)
        .collect();
    assert_eq!(lists, ["latencies", "queue_times"]);
}

#[test]
fn failures_are_grouped_by_cause() {
    let (_, mut report) = everything();
    report.records[0].result = Err("the stream broke off".to_owned());
    assert_eq!(
        report.failure_summary().unwrap(),
        "4 of 20 requests failed: Internal Server Error\n1 of 20 requests failed: the stream broke off"
    );
    report.records.retain(|record| record.result.is_ok());
    assert_eq!(report.failure_summary(), None);
}
