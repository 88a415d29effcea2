//! The page layout: head, headline numbers, and the order of the sections.

use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde_json::Value;

use super::chart::Charts;
use super::comparison;
use super::distribution::LatencyDistribution;
use super::number::{digits, hundredths, span, whole};
use super::over_time;
use super::run::Run;
use super::series;
use super::setup;
use super::stages;
use super::table::{self, Values};
use super::timeline::Timeline;
use crate::stats::client_saturation::ClientValidity;
use xpyd_base::web;

pub(super) fn of_run(run: &Run) -> Markup {
    let setup = &run.xpyd["setup"];
    let kind = if setup::is_simulated(setup) { ", simulated" } else { "" };
    let title = format!("{} at {}{kind}", short_name(&run.model_id), rate(run));
    let mut charts = Charts::default();
    let details = (!run.requests.is_empty()).then(|| details(run, &mut charts));
    frame(
        &title,
        &charts,
        &html! {
            header {
                p.kind { "xpyd bench" span { (table::date(&run.date)) } }
                h1 { bdi { (short_name(&run.model_id)) } " at " (rate(run)) (kind) }
                p.lede { (lede(run)) }
            }
            (setup::banner(setup))
            (banner(run))
            (headline(run))
            @if let Some(details) = details {
                (details)
            } @else {
                p.notice { "The result was saved without details, so there are no charts: `--save-detailed` saves the times of \
                    every request." }
                (named_latencies(run))
            }
            section { h2 { "Settings" } (table::settings(run)) }
            (setup::section(setup))
            (terms())
        },
    )
}

/// The page around its content. A content security policy forbids loading anything.
fn frame(title: &str, charts: &Charts, content: &Markup) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'";
                meta name="referrer" content="no-referrer";
                title { (title) " · xpyd bench" }
                style { (PreEscaped(web::style())) }
            }
            body {
                main { (content) }
                (charts.data())
                script { (PreEscaped(web::script())) }
            }
        }
    }
}

/// The sections that need the times of every request.
fn details(run: &Run, charts: &mut Charts) -> Markup {
    let values = Values::of(run);
    let timeline = Timeline::of(run, &values.gaps);
    html! {
        @if run.failed > 0 { section #failures { h2 { "Failures" } (table::failures(run)) } }
        @if run.completed > 0 {
            section { h2 { "Latencies" } (table::latencies(&values, &run.xpyd["statistics"]["all"])) (remarks(run)) }
        }
        section { h2 { "Every request" } (timeline.figure(run, charts)) }
        @if let Some(table) = table::stages(run) { section { h2 { "Where the time to first token goes" } @if let Some(figure) = stages::figure(run, charts) { (figure) } (table) } }
        @if let Some(pairs) = table::pairs(run) { section { h2 { "Engines" } (pairs) } }
        @if run.completed > 0 {
            section { h2 { "Time to first token" }
                (distribution(charts, "TTFT", "requests", &values.first_token, run.objective("ttft")))
            }
            section { h2 { "While the answer streams" }
                @if !values.gaps.is_empty() { (distribution(charts, "ITL", "gaps", &values.gaps, None)) }
                @if !values.per_token.is_empty() && run.objective("tpot").is_some() {
                    (distribution(charts, "TPOT", "requests", &values.per_token, run.objective("tpot")))
                }
            }
            section { h2 { "Over the run" } figure { (over_time::chart(run, charts)) } }
            section { h2 { "Slowest requests" } (table::slowest(run)) }
        }
    }
}

fn distribution(charts: &mut Charts, name: &str, noun: &str, sorted: &[f64], objective: Option<f64>) -> Markup {
    let distribution = LatencyDistribution {
        name,
        noun,
        sorted,
        objective,
    };
    distribution.figure(charts)
}

/// The summary sentence.
fn lede(run: &Run) -> Markup {
    let total = run.completed + run.failed;
    html! {
        @if run.completed == 0 {
            "None of " (whole(total)) " requests were answered."
        } @else {
            @if run.failed == 0 { "All " (whole(total)) " requests were answered" }
            @else { (whole(run.completed)) " of " (whole(total)) " requests were answered" }
            ", " (digits(run.request_throughput)) " a second over " (span(run.duration))
            @if let Some(median) = median(run, "ttft") { "; half of the first tokens came within " (span(median)) }
            @if let Some(median) = median(run, "tpot") { ", and later tokens every " (span(median)) }
            "."
        }
    }
}

/// Warnings above the numbers.
fn banner(run: &Run) -> Markup {
    let own = &run.xpyd;
    let count = |key: &str| own[key].as_u64().unwrap_or(0);
    let (dropped, unsent) = (count("dropped"), count("unsent"));
    let remote = &own["where"]["remote_kv"];
    let (answered, used) = (remote["answered"].as_u64(), remote["used"].as_u64());
    let local = answered
        .zip(used)
        .map_or(0, |(answered, used)| answered.saturating_sub(used));
    html! {
        @if own["valid"] == false {
            div.banner.invalid role="alert" { strong { "INVALID" }
                p { "The load generator was too slow. Do not trust these numbers. Fix: " (ClientValidity::ADVICE) "." }
                (sentences(&own["reasons"]))
            }
        }
        @if dropped + unsent > 0 {
            div.banner role="note" { strong { "Stopped early" }
                p { (whole(dropped)) " requests were dropped in flight and " (whole(unsent)) " were never sent: the numbers cover only requests \
    that had ended." }
            }
        }
        @if local > 0 {
            div.banner role="note" { strong { "KV hand-offs are missing" }
                p { (whole(local)) " of " (whole(answered.unwrap_or(0))) " answers did not use KV from another engine." }
            }
        }
    }
}

/// Remarks without consequences.
fn remarks(run: &Run) -> Markup {
    let cold = &run.xpyd["where"]["cold"];
    let number = |key: &str| cold[key].as_f64();
    html! {
        @if let (Some(requests), Some(all), Some(warm)) = (cold["requests"].as_u64(), number("mean_ttft_ms"), number("mean_ttft_without_ms"))
            && digits(all) != digits(warm) {
            p.note { (whole(requests)) " requests were the first of their pair of engines and paid for the connection between the two: the mean \
                TTFT is " (digits(all)) " ms with them and " (digits(warm)) " ms without." }
        }
        (sentences(&run.xpyd["notes"]))
    }
}

/// A list of sentences from the result file.
fn sentences(list: &Value) -> Markup {
    const MOST: usize = 20;
    let sentences: Vec<&str> = list
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .take(MOST)
        .collect();
    html! { @if !sentences.is_empty() { ul.remarks { @for sentence in sentences { li { bdi { (sentence) } } } } } }
}

/// The page of several runs or of a comparison, from its result file.
pub(super) fn of_document(document: &Value) -> Option<Markup> {
    let mut charts = Charts::default();
    let (title, content) = match document["xpyd_bench"].as_str()? {
        "sweep" => ("Sweep", series::of_sweep(document, &mut charts)),
        "find-max" => (
            "Highest rate within the objectives",
            series::of_search(document, &mut charts),
        ),
        "compare" | "against" => ("Comparison", comparison::of(document, &mut charts)),
        _ => return None,
    };
    let model = document["model_id"].as_str().or(document["b"]["model_id"].as_str());
    let model = short_name(model.unwrap_or_default());
    let setup = &document["setup"];
    let kind = if setup::is_simulated(setup) { ", simulated" } else { "" };
    Some(frame(
        &format!("{title}: {model}{kind}"),
        &charts,
        &html! {
            header {
                p.kind { "xpyd bench" span { (table::date(document["date"].as_str().unwrap_or_default())) } }
                h1 { (title) ": " bdi { (model) } (kind) }
            }
            (setup::banner(setup))
            (content)
            (setup::section(setup))
            (terms())
        },
    ))
}

/// A number of the headline.
#[derive(Debug)]
struct Tile {
    name: &'static str,
    value: String,
    unit: &'static str,
    /// A second, smaller number.
    below: String,
}

/// The headline numbers.
fn headline(run: &Run) -> Markup {
    let total = run.completed + run.failed;
    let latency = |name: &'static str, key: &str, unit: &'static str| {
        let median = median(run, key)?;
        let tail = run
            .latency(&format!("p99_{key}_ms"))
            .map(|tail| format!("P99 {}", digits(tail)));
        Some(Tile {
            name,
            value: digits(median * 1000.0),
            unit,
            below: tail.unwrap_or_default(),
        })
    };
    let goodput = run.request_goodput.map(|goodput| Tile {
        name: "Goodput",
        value: hundredths(goodput),
        unit: "req/s",
        below: objectives(run),
    });
    let output = run.output_throughput.map(|throughput| Tile {
        name: "Output",
        value: digits(throughput),
        unit: "tok/s",
        below: run
            .total_token_throughput
            .map(|total| format!("{} with prompts", digits(total)))
            .unwrap_or_default(),
    });
    let answered = Tile {
        name: "Answered",
        value: whole(run.completed),
        unit: "",
        below: format!("of {}", whole(total)),
    };
    let throughput = Tile {
        name: "Throughput",
        value: hundredths(run.request_throughput),
        unit: "req/s",
        // The last answers arrive after the last request, so this is below the send rate for any server.
        below: run
            .rate()
            .map(|rate| format!("sent at {rate}, until the last answer"))
            .unwrap_or_default(),
    };
    let tiles = [
        Some(answered),
        Some(throughput),
        goodput,
        output,
        latency("Median TTFT", "ttft", "ms"),
        latency("Median TPOT", "tpot", "ms"),
        latency("Median ITL", "itl", "ms"),
    ];
    html! {
        dl.headline {
            @for tile in tiles.into_iter().flatten() {
                div {
                    dt { (tile.name) }
                    dd { span.big { (tile.value) } @if !tile.unit.is_empty() { " " span.unit { (tile.unit) } } }
                    dd.below { (tile.below) }
                }
            }
        }
    }
}

/// `ttft ≤ 500 ms, tpot ≤ 20 ms`
fn objectives(run: &Run) -> String {
    let limits = ["ttft", "tpot", "e2el"]
        .into_iter()
        .filter_map(|name| Some(format!("{name} ≤ {}", span(run.objective(name)?))));
    limits.collect::<Vec<_>>().join(", ")
}

/// The median of a latency in seconds, from the file.
fn median(run: &Run, key: &str) -> Option<f64> {
    if run.completed == 0 {
        return None;
    }
    run.latency(&format!("median_{key}_ms"))
        .map(|milliseconds| milliseconds / 1000.0)
}

/// The latencies in a file without details.
fn named_latencies(run: &Run) -> Markup {
    let named = run.more.iter().filter(|(key, _)| key.ends_with("_ms"));
    html! {
        section { h2 { "Latencies" }
            div.scroll { table.numbers {
                caption { "From the result file, in milliseconds" }
                tbody {
                    @for (key, value) in named {
                        @if let Some(value) = value.as_f64() { tr { th scope="row" { (key) } td { (hundredths(value)) } } }
                    }
                }
            } }
        }
    }
}

fn rate(run: &Run) -> String {
    match run.rate() {
        Some(rate) => format!("{rate} req/s"),
        None => match run.max_concurrency {
            Some(limit) => format!("{limit} at once"),
            None => "full rate".to_owned(),
        },
    }
}

/// The last part of a path or model name.
fn short_name(model: &str) -> &str {
    let name = model.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    if name.is_empty() { "a model" } else { name }
}

/// The definitions of the terms, which are those of `vllm bench serve`.
fn terms() -> Markup {
    html! {
        footer {
            p { "Times are taken in the client, from before a request is sent. " b { "TTFT" } " ends with the first chunk that holds a \
                token. " b { "TPOT" } " is the rest of the answer's time, divided by its later tokens. " b { "ITL" } " is the \
                gap between one chunk and the next, over all requests; a chunk can have several tokens. " b { "E2EL" }
                " ends with the last token. Percentiles are interpolated as in numpy." }
            p { "This file is self-contained and needs no network." }
        }
    }
}
