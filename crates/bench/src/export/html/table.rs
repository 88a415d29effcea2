//! The tables of the report: latencies, stages, pairs, failures, slowest requests, settings.

use std::collections::BTreeMap;

use maud::{Markup, html};
use serde_json::Value;

use super::number::{hundredths, percent, span, whole};
use super::phase::RequestPhase;
use super::run::{Request, Run, Timing};
use crate::latency_breakdown::Stage;
use crate::stats::failures::by_cause;
use crate::stats::percentile_of_sorted;

/// Rows of the table of slow requests.
const SLOWEST: usize = 10;
/// Rows of the table of pairs.
const MOST_PAIRS: usize = 100;
/// Rows of the table of failures.
const MOST_CAUSES: usize = 20;

/// One row of the table of latencies, in milliseconds.
#[derive(Debug)]
struct Latency {
    name: &'static str,
    meaning: &'static str,
    /// Its name in the result file.
    key: &'static str,
    count: usize,
    mean: f64,
    /// Median, P90, P99, most.
    percentiles: [f64; 4],
}

/// The values of each latency in seconds, ascending.
#[derive(Debug)]
pub(super) struct Values {
    pub(super) first_token: Vec<f64>,
    pub(super) per_token: Vec<f64>,
    pub(super) gaps: Vec<f64>,
    pub(super) whole: Vec<f64>,
}

impl Values {
    pub(super) fn of(run: &Run) -> Self {
        let sorted = |mut values: Vec<f64>| {
            values.sort_unstable_by(f64::total_cmp);
            values
        };
        Self {
            first_token: sorted(run.answered().map(|(_, timing)| timing.first_token).collect()),
            per_token: sorted(
                run.answered()
                    .filter_map(|(request, _)| request.time_per_output_token())
                    .collect(),
            ),
            gaps: sorted(
                run.answered()
                    .flat_map(|(_, timing)| timing.gaps.iter().copied())
                    .collect(),
            ),
            whole: sorted(run.answered().map(|(_, timing)| timing.latency).collect()),
        }
    }
}

/// Mean and percentiles of every latency, with intervals if the result file has them.
pub(super) fn latencies(values: &Values, intervals: &Value) -> Markup {
    let rows = [
        Latency::of("TTFT", "time to first token", "ttft_ms", &values.first_token),
        Latency::of(
            "TPOT",
            "time per output token after the first",
            "tpot_ms",
            &values.per_token,
        ),
        Latency::of(
            "ITL",
            "gap between two chunks of an answer",
            "itl_chunk_gap_ms",
            &values.gaps,
        ),
        Latency::of("E2EL", "from the request to its last token", "e2el_ms", &values.whole),
    ];
    let rows: Vec<Latency> = rows.into_iter().flatten().collect();
    let interval = |row: &Latency, key: &str| {
        let ends = intervals[row.key][key]["interval"].as_array()?;
        let (low, high) = (ends.first()?.as_f64()?, ends.get(1)?.as_f64()?);
        Some(format!("{} – {}", hundredths(low), hundredths(high)))
    };
    let has_intervals = rows.iter().any(|row| interval(row, "mean").is_some());
    html! {
        div.scroll { table.numbers {
            caption { "Latencies of answered requests in milliseconds" @if has_intervals { "; below each, its 95 % interval" } }
            thead { tr {
                th scope="col" { "Latency" } th scope="col" { "Values" } th scope="col" { "Mean" } th scope="col" { "Median" }
                th scope="col" { "P90" } th scope="col" { "P99" } th scope="col" { "Max" }
            } }
            tbody {
                @for row in &rows {
                    tr {
                        th scope="row" { abbr title=(row.meaning) { (row.name) } span.meaning { (row.meaning) } }
                        td { (whole(row.count)) }
                        td { (hundredths(row.mean)) @if let Some(interval) = interval(row, "mean") { span.interval { (interval) } } }
                        @for (value, key) in row.percentiles.iter().zip(["median", "p90", "p99", ""]) {
                            // P99 of fewer than a hundred values is the largest of them.
                            td.weak[key == "p99" && row.count < 100] {
                                (hundredths(*value)) @if let Some(interval) = interval(row, key) { span.interval { (interval) } }
                            }
                        }
                    }
                }
            }
        } }
        @if rows.iter().any(|row| row.count < 100) {
            p.note { "A P99 of fewer than 100 values is close to the largest of them and is shown in grey." }
        }
    }
}

impl Latency {
    fn of(name: &'static str, meaning: &'static str, key: &'static str, sorted: &[f64]) -> Option<Self> {
        let count = sorted.len();
        (count > 0).then(|| Self {
            name,
            meaning,
            key,
            count,
            mean: sorted.iter().sum::<f64>() / count as f64 * 1000.0,
            percentiles: [50.0, 90.0, 99.0, 100.0].map(|percentile| percentile_of_sorted(sorted, percentile) * 1000.0),
        })
    }
}

/// The stages of the time to first token; `None` if the server reported none.
pub(super) fn stages(run: &Run) -> Option<Markup> {
    let stages: Vec<RequestPhase> = RequestPhase::used(run)
        .into_iter()
        .filter(|phase| matches!(phase, RequestPhase::Stage(_)))
        .collect();
    let reported = run.answered().filter(|(request, _)| request.reported.is_some()).count();
    if stages.is_empty() {
        return None;
    }
    let rows: Vec<(RequestPhase, Vec<f64>, f64)> = stages
        .into_iter()
        .map(|stage| {
            let lengths = stage.lengths(run);
            let mean = lengths.iter().sum::<f64>() / lengths.len().max(1) as f64;
            (stage, lengths, mean)
        })
        .collect();
    let total: f64 = rows.iter().map(|(_, _, mean)| mean).sum();
    let share = |mean: f64| mean / total.max(f64::MIN_POSITIVE) * 100.0;
    Some(html! {
        div.stack role="img" aria-label="The stages' shares of the mean time to first token; the table has the numbers" {
            @for (stage, _, mean) in &rows { i class={ "swatch " (stage.class()) } style={ "width:" (format!("{:.2}", share(*mean))) "%" } {} }
        }
        div.scroll { table.numbers {
            caption { "Stages of the time to first token, in milliseconds" @if reported < run.completed {
                ", of " (whole(reported)) " of " (whole(run.completed)) " requests for which the server reported them" } }
            thead { tr {
                th scope="col" { "Stage" } th scope="col" { "Share" } th scope="col" { "Mean" } th scope="col" { "Median" }
                th scope="col" { "P90" } th scope="col" { "P99" } th scope="col" { "Max" }
            } }
            tbody {
                @for (stage, lengths, mean) in &rows {
                    tr {
                        th scope="row" { i class={ "swatch " (stage.class()) } {} (stage.name()) }
                        td { (format!("{:.1} %", share(*mean))) }
                        td { (hundredths(mean * 1000.0)) }
                        @for percentile in [50.0, 90.0, 99.0, 100.0] {
                            td { (hundredths(percentile_of_sorted(lengths, percentile) * 1000.0)) }
                        }
                    }
                }
            }
        } }
    })
}

/// The pairs of engines with the latencies of their requests; `None` if the server reported none.
pub(super) fn pairs(run: &Run) -> Option<Markup> {
    let mut pairs: BTreeMap<&str, Vec<(&Request, &Timing)>> = BTreeMap::new();
    for (request, timing) in run.answered() {
        if let Some(reported) = &request.reported {
            pairs.entry(&reported.pair).or_default().push((request, timing));
        }
    }
    let stages = [
        RequestPhase::Stage(Stage::PrefillCompute),
        RequestPhase::Stage(Stage::Prefill),
        RequestPhase::Stage(Stage::Handoff),
    ];
    let used = RequestPhase::used(run);
    let stages: Vec<RequestPhase> = stages.into_iter().filter(|stage| used.contains(stage)).collect();
    let sorted = |values: &mut dyn Iterator<Item = f64>| {
        let mut values: Vec<f64> = values.collect();
        values.sort_unstable_by(f64::total_cmp);
        values
    };
    (!pairs.is_empty()).then(|| {
        html! {
            div.scroll { table.numbers {
                caption { "By pair of engines, in milliseconds" }
                thead { tr {
                    th scope="col" { "Pair" } th scope="col" { "Requests" } th scope="col" { "Median TTFT" } th scope="col" { "P99 TTFT" }
                    @for stage in &stages { th scope="col" { "Median " (stage.name()) } }
                    th scope="col" { "Median TPOT" }
                } }
                tbody {
                    @for (pair, requests) in pairs.iter().take(MOST_PAIRS) {
                        @let first_tokens = sorted(&mut requests.iter().map(|(_, timing)| timing.first_token));
                        @let per_token = sorted(&mut requests.iter().filter_map(|(request, _)| request.time_per_output_token()));
                        tr {
                            th scope="row" { bdi { (pair) } }
                            td { (whole(requests.len())) }
                            td { (milliseconds(&first_tokens, 50.0)) }
                            td.weak[requests.len() < 100] { (milliseconds(&first_tokens, 99.0)) }
                            @for stage in &stages {
                                td { (milliseconds(&sorted(&mut requests.iter().map(|(request, _)| stage.of(request))), 50.0)) }
                            }
                            td { (milliseconds(&per_token, 50.0)) }
                        }
                    }
                }
            } }
            @if pairs.len() > MOST_PAIRS { p.note { "Further pairs: " (whole(pairs.len() - MOST_PAIRS)) "." } }
        }
    })
}

/// A percentile of ascending seconds in milliseconds; empty without values.
fn milliseconds(sorted: &[f64], percentile: f64) -> String {
    if sorted.is_empty() {
        return String::new();
    }
    hundredths(percentile_of_sorted(sorted, percentile) * 1000.0)
}

/// Failures by cause, the most frequent first.
pub(super) fn failures(run: &Run) -> Markup {
    let requests = run.requests.iter().enumerate();
    let causes =
        by_cause(requests.filter_map(|(place, request)| Some((place, request.result.as_ref().err()?.as_str()))));
    let total = run.requests.len();
    html! {
        div.scroll { table.failures {
            caption { (whole(run.failed)) " of " (whole(run.completed + run.failed)) " requests failed, by cause" }
            thead { tr {
                th scope="col" { "Requests" } th scope="col" { "Share" } th.text scope="col" { "Cause" } th scope="col" { "First sent" } th scope="col" { "Last sent" }
            } }
            tbody {
                @for group in causes.iter().take(MOST_CAUSES) {
                    @let times = || group.members.iter().map(|place| run.requests[*place].started);
                    tr {
                        td { (whole(group.count)) }
                        td { (percent(group.count, total)) }
                        td.text { bdi { (group.cause) } }
                        td { (hundredths(times().fold(f64::INFINITY, f64::min))) " s" }
                        td { (hundredths(times().fold(0.0, f64::max))) " s" }
                    }
                }
            }
        } }
        @if causes.len() > MOST_CAUSES {
            p.note { "Further causes: " (whole(causes.len() - MOST_CAUSES)) "." }
        }
    }
}

/// The requests with the longest time to first token, with all their times.
pub(super) fn slowest(run: &Run) -> Markup {
    let mut requests: Vec<_> = run.answered().collect();
    requests.sort_by(|left, right| right.1.first_token.total_cmp(&left.1.first_token));
    requests.truncate(SLOWEST);
    let is_told = |phase: &RequestPhase| !matches!(phase, RequestPhase::Wait | RequestPhase::Decoding);
    let phases: Vec<RequestPhase> = RequestPhase::used(run).into_iter().filter(is_told).collect();
    // If there are no stages, TTFT is enough.
    let phases = if phases.len() > 1 { phases } else { Vec::new() };
    html! {
        div.scroll { table.numbers {
            caption { "The slowest first tokens, in milliseconds" }
            thead { tr {
                th scope="col" { "Request" } th scope="col" { "TTFT" } th scope="col" { "TPOT" } th scope="col" { "E2EL" }
                th scope="col" { "Sent at" } th scope="col" { "Tokens in" } th scope="col" { "out" }
                @for phase in &phases { th scope="col" { (phase.name()) } }
            } }
            tbody {
                @for (request, timing) in &requests {
                    tr {
                        th scope="row" { (request.index) }
                        td { (hundredths(timing.first_token * 1000.0)) }
                        td { (request.time_per_output_token().map(|time| hundredths(time * 1000.0)).unwrap_or_default()) }
                        td { (hundredths(timing.latency * 1000.0)) }
                        td { (hundredths(request.started)) " s" }
                        td { (request.input_tokens.map(whole).unwrap_or_default()) }
                        td { (whole(request.output_tokens)) }
                        @for phase in &phases { td { (hundredths(phase.of(request) * 1000.0)) } }
                    }
                }
            }
        } }
    }
}

/// The settings of the run.
pub(super) fn settings(run: &Run) -> Markup {
    let rate = run
        .rate()
        .map_or("all at once".to_owned(), |rate| format!("{rate} requests per second"));
    let limit = run.max_concurrency.map_or("no limit".to_owned(), whole);
    let own = |key: &str| run.xpyd.get(key).map(plain);
    let more = run.more.iter().filter(|(key, value)| is_setting(key, value));
    html! {
        dl.settings {
            (setting("Model", Some(run.model_id.clone())))
            (setting("Backend", Some(run.backend.clone())))
            (setting("Requests", Some(whole(run.num_prompts))))
            (setting("Rate", Some(rate)))
            (setting("Burstiness", run.burstiness.map(|shape| format!("{shape} ({})", arrivals(shape)))))
            (setting("Most at once", Some(limit)))
            (setting("Seed", own("seed")))
            (setting("Tokens in", Some(whole(run.total_input_tokens))))
            (setting("Tokens out", Some(whole(run.total_output_tokens))))
            (setting("Length of the run", Some(span(run.duration))))
            (setting("Ended", Some(date(&run.date))))
            (setting("xpyd", own("version")))
            @for (key, value) in more { (setting(key, Some(plain(value)))) }
        }
    }
}

fn setting(name: &str, value: Option<String>) -> Markup {
    html! {
        @if let Some(value) = value.filter(|value| !value.is_empty()) {
            div { dt { (name) } dd { bdi { (value) } } }
        }
    }
}

fn arrivals(burstiness: f64) -> &'static str {
    match burstiness {
        shape if shape < 1.0 => "burstier than a Poisson process",
        shape if shape > 1.0 => "more even than a Poisson process",
        _ => "a Poisson process",
    }
}

/// Whether an unknown key is user metadata and short enough to show.
fn is_setting(key: &str, value: &Value) -> bool {
    const KNOWN: [&str; 4] = ["endpoint_type", "rtfx", "label", "tokenizer_id"];
    let is_short = match value {
        Value::String(text) => text.len() <= 200,
        Value::Number(_) | Value::Bool(_) => true,
        _ => false,
    };
    is_short && !KNOWN.contains(&key) && !key.ends_with("_ms")
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// `20261122-205142` as `2026-11-22 20:51:42`; anything else as it is.
pub(super) fn date(text: &str) -> String {
    let digits: Vec<char> = text.chars().filter(char::is_ascii_digit).collect();
    if digits.len() != 14 || text.len() != 15 {
        return text.to_owned();
    }
    let part = |from: usize, to: usize| digits[from..to].iter().collect::<String>();
    format!(
        "{}-{}-{} {}:{}:{}",
        part(0, 4),
        part(4, 6),
        part(6, 8),
        part(8, 10),
        part(10, 12),
        part(12, 14)
    )
}
