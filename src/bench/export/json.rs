//! The result file of `vllm bench serve` 0.32: its keys, in its order; what is ours stands under the key `xpyd`.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::html;
use crate::bench::attribution::gpus;
use crate::bench::goodput;
use crate::bench::record::{Answer, Record};
use crate::bench::report::Report;

pub(crate) fn render(report: &Report, detailed: bool) -> Value {
    let mut result = Map::new();
    settings(&mut result, report);
    totals(&mut result, report);
    requests(&mut result, report, detailed);
    latencies(&mut result, report);
    result.insert("xpyd".to_owned(), own(report, detailed));
    Value::Object(result)
}

fn extend<const N: usize>(result: &mut Map<String, Value>, entries: [(&str, Value); N]) {
    result.extend(entries.map(|(key, value)| (key.to_owned(), value)));
}

fn settings(result: &mut Map<String, Value>, report: &Report) {
    let spec = &report.spec;
    let backend = report.backend();
    extend(
        result,
        [
            ("date", json!(report.date)),
            ("endpoint_type", json!(backend)),
            ("backend", json!(backend)),
            ("label", json!(spec.naming.label)),
            ("model_id", json!(report.model_id())),
            ("tokenizer_id", json!(spec.naming.tokenizer_id)),
            ("num_prompts", json!(report.prompt_lengths.len())),
        ],
    );
    result.extend(
        spec.naming
            .metadata
            .iter()
            .map(|(key, value)| (key.clone(), json!(value))),
    );
    extend(
        result,
        [
            ("request_rate", number(spec.arrivals.request_rate)),
            ("burstiness", number(spec.arrivals.burstiness)),
            ("max_concurrency", json!(spec.max_concurrency)),
        ],
    );
    if let Some(ramp) = spec.arrivals.ramp {
        extend(
            result,
            [
                ("ramp_up_strategy", json!(ramp.strategy.name())),
                ("ramp_up_start_rps", json!(ramp.start)),
                ("ramp_up_end_rps", json!(ramp.end)),
            ],
        );
    }
}

fn totals(result: &mut Map<String, Value>, report: &Report) {
    let metrics = &report.metrics;
    extend(
        result,
        [
            ("duration", json!(metrics.duration)),
            ("completed", json!(metrics.completed)),
            ("failed", json!(metrics.failed)),
            ("total_input_tokens", json!(metrics.total_input_tokens)),
            ("total_output_tokens", json!(metrics.total_output_tokens)),
            ("request_throughput", json!(metrics.request_throughput())),
            ("request_goodput", json!(metrics.request_goodput)),
            ("output_throughput", json!(metrics.output_throughput())),
            ("total_token_throughput", json!(metrics.total_throughput())),
        ],
    );
}

/// One entry per request that has ended, in seconds. vLLM keeps two of the lists even when details are not asked for.
fn requests(result: &mut Map<String, Value>, report: &Report, detailed: bool) {
    let each = |value: fn(&Report, &Record) -> Value| -> Value {
        report.records.iter().map(|record| value(report, record)).collect()
    };
    if detailed {
        extend(
            result,
            [
                (
                    "input_lens",
                    each(|report, record| {
                        let counted = answer(record).and_then(|answer| answer.prompt_tokens);
                        json!(counted.unwrap_or(report.prompt_lengths[record.index]))
                    }),
                ),
                (
                    "output_lens",
                    each(|_, record| json!(answer(record).map_or(0, Answer::output_tokens))),
                ),
                (
                    "ttfts",
                    each(|_, record| json!(answer(record).map_or(0.0, |answer| answer.first_token.as_secs_f64()))),
                ),
                (
                    "itls",
                    each(|_, record| {
                        let gaps = answer(record).map(|answer| answer.gaps.as_slice()).unwrap_or_default();
                        gaps.iter().map(Duration::as_secs_f64).collect()
                    }),
                ),
            ],
        );
    }
    let latency = each(|_, record| json!(answer(record).map_or(0.0, |answer| answer.latency.as_secs_f64())));
    extend(result, [("latencies", latency)]);
    if detailed {
        extend(
            result,
            [("start_times", each(|_, record| json!(record.started.as_secs_f64())))],
        );
    }
    let queue_time = each(|_, record| json!(record.queue_time().as_secs_f64()));
    extend(result, [("queue_times", queue_time)]);
    if detailed {
        extend(
            result,
            [
                (
                    "generated_texts",
                    each(|_, record| json!(answer(record).map_or("", |answer| &answer.text))),
                ),
                (
                    "errors",
                    each(|_, record| json!(record.result.as_ref().err().map_or("", String::as_str))),
                ),
            ],
        );
    }
    extend(
        result,
        [
            ("max_output_tokens_per_s", json!(report.metrics.peak_output_throughput)),
            (
                "max_concurrent_requests",
                json!(report.metrics.peak_concurrent_requests),
            ),
            // Only of audio, in vLLM.
            ("rtfx", json!(0.0)),
        ],
    );
}

fn latencies(result: &mut Map<String, Value>, report: &Report) {
    let shown = report
        .metrics
        .latencies
        .iter()
        .filter(|(metric, _)| report.spec.metrics.contains(metric));
    for (metric, distribution) in shown {
        let key = metric.key();
        result.insert(format!("mean_{key}_ms"), json!(distribution.mean));
        result.insert(format!("median_{key}_ms"), json!(distribution.median));
        result.insert(format!("std_{key}_ms"), json!(distribution.deviation));
        for (percentile, value) in &distribution.percentiles {
            result.insert(format!("p{percentile}_{key}_ms"), json!(value));
        }
    }
}

fn own(report: &Report, detailed: bool) -> Value {
    let lag = report.release_lag();
    let at = |place: usize| lag.percentiles[place].1;
    let failures: Vec<Value> = report
        .failures()
        .into_iter()
        .map(|group| json!({"cause": group.cause, "count": group.count}))
        .collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "seed": report.spec.workload.seed(),
        "objectives": goodput::to_json(&report.spec.objectives),
        "release_lag_ms": {"mean": lag.mean, "p50": at(0), "p99": at(1), "max": at(2)},
        "failures": failures,
        "dropped": report.dropped,
        "unsent": report.unsent,
        "request_stages": detailed.then(|| html::stages(report)),
        "where": report.attribution().map(|summary| summary.to_json()),
        "gpus": gpus::to_json(&report.beside.gpus, report.metrics.total_output_tokens),
    })
}

fn answer(record: &Record) -> Option<&Answer> {
    record.result.as_ref().ok()
}

/// A number, or `"inf"` as vLLM writes an infinite rate.
fn number(value: f64) -> Value {
    if value.is_infinite() {
        json!("inf")
    } else {
        json!(value)
    }
}
