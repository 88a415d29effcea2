//! The result file of `vllm bench serve` 0.33: its keys in its order. xpyd's additions are under the key `xpyd`.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::html;
use super::vllm_table::percentile_word;
use crate::latency_breakdown::gpus;
use crate::load::conversation;
use crate::record::{Answer, EngineTimes, Record};
use crate::report::{Probes, Report};
use crate::stats::goodput;

pub(crate) fn render(report: &Report, detailed: bool) -> Value {
    let mut result = Map::new();
    settings(&mut result, report);
    totals(&mut result, report);
    requests(&mut result, report, detailed);
    extras(&mut result, report);
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

/// One entry per finished request, in seconds. vLLM keeps two of the lists even without details.
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
        server_times(result, report);
    }
    extend(
        result,
        [
            ("max_output_tokens_per_s", json!(report.metrics.peak_output_throughput)),
            (
                "max_concurrent_requests",
                json!(report.metrics.peak_concurrent_requests),
            ),
            // vLLM computes it for audio only.
            ("rtfx", json!(0.0)),
        ],
    );
}

/// Adds the queue time and the time to first token that the server reports per request; nothing if it reports none.
fn server_times(result: &mut Map<String, Value>, report: &Report) {
    if report.records.iter().all(|record| engine_times(record).is_none()) {
        return;
    }
    let times_of = |value: fn(EngineTimes) -> Duration| -> Value {
        let seconds = |record| engine_times(record).map(|times| value(times).as_secs_f64());
        report.records.iter().map(|record| json!(seconds(record))).collect()
    };
    extend(
        result,
        [
            ("server_queue_times", times_of(|times| times.queue)),
            ("server_ttfts", times_of(|times| times.first_token)),
        ],
    );
}

/// Adds probes, ramp steps and the engines' decoding counters.
fn extras(result: &mut Map<String, Value>, report: &Report) {
    if let Some(probes) = report.extras.probes.as_ref().and_then(Probes::numbers) {
        extend(
            result,
            [
                ("probe_completed", json!(probes.completed)),
                ("probe_failed", json!(probes.failed)),
                ("probe_median_e2el_ms", json!(probes.median_ms)),
                ("probe_p99_e2el_ms", json!(probes.p99_ms)),
                ("probe_max_e2el_ms", json!(probes.most_ms)),
            ],
        );
    }
    if let Some(ramp) = report.spec.arrivals.ramp {
        let count = report.prompt_lengths.len();
        let events = ramp
            .steps(count, count - report.unsent)
            .into_iter()
            .map(|(request, rate)| {
                let released = request.and_then(|request| report.released(request)).unwrap_or_default();
                json!({"rps": rate, "timestamp": report.local_time(released)})
            });
        extend(result, [("rps_change_events", events.collect())]);
    }
    if let Some(speculation) = &report.extras.speculation {
        extend(
            result,
            [
                ("spec_decode_acceptance_rate", json!(speculation.acceptance_rate)),
                ("spec_decode_acceptance_length", json!(speculation.acceptance_length)),
                ("spec_decode_num_drafts", json!(speculation.drafts)),
                ("spec_decode_draft_tokens", json!(speculation.draft_tokens)),
                ("spec_decode_accepted_tokens", json!(speculation.accepted_tokens)),
                (
                    "spec_decode_per_position_acceptance_rates",
                    json!(speculation.acceptance_by_position),
                ),
            ],
        );
    }
    if let Some(diffusion) = &report.extras.diffusion {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a count of steps, which vLLM cuts as well"
        )]
        let denoising_steps = diffusion.denoising_steps as i64;
        extend(
            result,
            [
                ("diffusion_committed_throughput", json!(diffusion.committed_throughput)),
                ("diffusion_steps_per_canvas", json!(diffusion.steps_per_canvas)),
                ("diffusion_committed_per_step", json!(diffusion.committed_per_step)),
                ("diffusion_committed_tokens", json!(diffusion.committed_tokens)),
                ("diffusion_denoising_steps", json!(denoising_steps)),
                ("diffusion_canvas_positions", json!(diffusion.canvas_positions)),
            ],
        );
    }
}

fn latencies(result: &mut Map<String, Value>, report: &Report) {
    for (metric, distribution) in report.shown_latencies() {
        let key = metric.key();
        result.insert(format!("mean_{key}_ms"), json!(distribution.mean));
        result.insert(format!("median_{key}_ms"), json!(distribution.median));
        result.insert(format!("std_{key}_ms"), json!(distribution.deviation));
        for (percentile, value) in &distribution.percentiles {
            result.insert(format!("p{}_{key}_ms", percentile_word(*percentile)), json!(value));
        }
    }
}

fn own(report: &Report, detailed: bool) -> Value {
    let validity = report.validity();
    let lag = &validity.lag;
    let at = |place: usize| lag.percentiles[place].1;
    let failures: Vec<Value> = report
        .failures()
        .into_iter()
        .map(|group| json!({"cause": group.cause, "count": group.count}))
        .collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "setup": report.extras.setup,
        "seed": report.spec.workload.seed(),
        "objectives": goodput::to_json(&report.spec.objectives),
        "release_lag_ms": {"mean": lag.mean, "p50": at(0), "p99": at(1), "max": at(2)},
        "valid": validity.is_valid(),
        "reasons": validity.reasons,
        "notes": validity.notes,
        "client": validity.to_json(),
        "statistics": report.latency_stats().to_json(),
        "failures": failures,
        "dropped": report.dropped,
        "unsent": report.unsent,
        "request_stages": detailed.then(|| html::stages(report)),
        "where": report.latency_breakdown().map(|summary| summary.to_json()),
        "turns": conversation::turns_to_json(report),
        "gpus": gpus::to_json(&report.extras.gpus, report.metrics.total_output_tokens),
    })
}

/// The times that the engine reported for a request.
fn engine_times(record: &Record) -> Option<EngineTimes> {
    answer(record)?.timings.engine
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
