//! The page: its head, the headline numbers, and the order of its sections.

use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde_json::Value;

use super::course;
use super::number::{digits, hundredths, span, whole};
use super::run::Run;
use super::spread::Spread;
use super::stages;
use super::table::{self, Values};
use super::timeline::Timeline;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

pub(super) fn of_run(run: &Run) -> Markup {
    let title = format!("{} at {}", short_name(&run.model_id), rate(run));
    frame(
        &title,
        &html! {
            header {
                p.kind { "xpyd bench" span { (table::date(&run.date)) } }
                h1 { bdi { (short_name(&run.model_id)) } " at " (rate(run)) }
                p.lede { (lede(run)) }
            }
            (banner(run))
            (headline(run))
            @if run.requests.is_empty() {
                p.notice { "The result was saved without details, so there is nothing to draw: `--save-detailed` keeps the times of \
                    every request." }
                (named_latencies(run))
            } @else {
                (details(run))
            }
            section { h2 { "Settings" } (table::settings(run)) }
            (terms())
        },
    )
}

/// The page around its content. Nothing may be loaded from anywhere, and the browser is told so.
fn frame(title: &str, content: &Markup) -> Markup {
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
                style { (PreEscaped(STYLE)) }
            }
            body {
                main { (content) }
                script { (PreEscaped(SCRIPT)) }
            }
        }
    }
}

/// The parts that need the times of every request.
fn details(run: &Run) -> Markup {
    let values = Values::of(run);
    let timeline = Timeline::of(run);
    html! {
        @if run.failed > 0 { section #failures { h2 { "Failures" } (table::failures(run)) } }
        @if run.completed > 0 {
            section { h2 { "Latencies" } (table::latencies(&values)) }
        }
        section { h2 { "Every request" } (timeline.figure(run)) }
        @if let Some(table) = table::stages(run) { section { h2 { "Where the time to first token goes" } @if let Some(figure) = stages::figure(run) { (figure) } (table) } }
        @if let Some(pairs) = table::pairs(run) { section { h2 { "Engines" } (pairs) } }
        @if run.completed > 0 {
            section { h2 { "Time to first token" }
                (spread("TTFT", "requests", &values.first_token, run.objective("ttft")))
            }
            section { h2 { "While the answer streams" }
                @if !values.gaps.is_empty() { (spread("ITL", "gaps", &values.gaps, None)) }
                @if !values.per_token.is_empty() && run.objective("tpot").is_some() {
                    (spread("TPOT", "requests", &values.per_token, run.objective("tpot")))
                }
            }
            section { h2 { "Over the run" } figure { (course::draw(run)) } }
            section { h2 { "Slowest requests" } (table::slowest(run)) }
        }
    }
}

fn spread(name: &str, noun: &str, sorted: &[f64], objective: Option<f64>) -> Markup {
    let spread = Spread {
        name,
        noun,
        sorted,
        objective,
    };
    spread.figure()
}

/// One sentence that says it all.
fn lede(run: &Run) -> Markup {
    let total = run.completed + run.failed;
    html! {
        @if run.completed == 0 {
            "None of " (whole(total)) " requests was answered."
        } @else {
            @if run.failed == 0 { "All " (whole(total)) " requests were answered" }
            @else { (whole(run.completed)) " of " (whole(total)) " requests were answered" }
            ", " (digits(run.request_throughput)) " a second over " (span(run.duration))
            @if let Some(median) = median(run, "ttft") { "; half of the first tokens came within " (span(median)) }
            @if let Some(median) = median(run, "tpot") { ", and later ones every " (span(median)) }
            "."
        }
    }
}

fn banner(run: &Run) -> Markup {
    let count = |key: &str| run.xpyd.get(key).and_then(Value::as_u64).unwrap_or(0);
    let (dropped, unsent) = (count("dropped"), count("unsent"));
    html! {
        @if dropped + unsent > 0 {
            div.banner role="note" { strong { "Stopped early" }
                p { (whole(dropped)) " requests were dropped in flight and " (whole(unsent)) " were never sent: the numbers are of \
                    those that had ended." }
            }
        }
    }
}

/// A number of the headline.
#[derive(Debug)]
struct Tile {
    name: &'static str,
    value: String,
    unit: &'static str,
    /// A second number that belongs to it.
    below: String,
}

/// The numbers that people come for.
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
        below: run.rate().map(|rate| format!("{rate} asked for")).unwrap_or_default(),
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

/// The median of a latency in seconds: of the requests, or as the file tells it.
fn median(run: &Run, key: &str) -> Option<f64> {
    if run.completed == 0 {
        return None;
    }
    run.latency(&format!("median_{key}_ms"))
        .map(|milliseconds| milliseconds / 1000.0)
}

/// The latencies that a file without details tells by name.
fn named_latencies(run: &Run) -> Markup {
    let named = run.more.iter().filter(|(key, _)| key.ends_with("_ms"));
    html! {
        section { h2 { "Latencies" }
            div.scroll { table.numbers {
                caption { "As the result file tells them, in milliseconds" }
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

/// The last part of a path or of a name with its owner.
fn short_name(model: &str) -> &str {
    let name = model.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    if name.is_empty() { "a model" } else { name }
}

/// What the words mean: the terms are those of `vllm bench serve`.
fn terms() -> Markup {
    html! {
        footer {
            p { "Times are taken in the client, from before a request is sent. " b { "TTFT" } " ends with the first chunk that holds a \
                token. " b { "TPOT" } " is the rest of the answer's time, shared among its later tokens. " b { "ITL" } " is the \
                gap between one chunk and the next, of all requests together: a chunk may hold several tokens. " b { "E2EL" }
                " ends with the last token. A percentile lies between the two nearest values, as numpy has it." }
            p { "This file needs no network and stays as it is." }
        }
    }
}
