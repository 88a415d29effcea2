//! The page of several runs: a sweep, or a search for the highest rate that meets the objectives. It reads their result
//! files.

use maud::{Markup, html};
use serde_json::Value;

use super::chart::{Chart, Charts, Mark, Panel, Series, Shape, ShownAxis};
use super::number::{Axis, digits, finite, hundredths, round_up, span, tick, whole};

/// Most points.
const MOST_POINTS: usize = 200;

/// One run of the series.
#[derive(Debug)]
struct Point {
    /// The requested rate or concurrency; `None` if all requests were sent at once.
    asked: Option<f64>,
    served: Option<f64>,
    goodput: Option<f64>,
    output: Option<f64>,
    /// Median and P99, in milliseconds.
    first_token: [Option<f64>; 2],
    per_token: [Option<f64>; 2],
    /// The share of requests that meet the objectives, 0 to 1.
    good: Option<f64>,
    failed: u64,
    state: PointState,
    note: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PointState {
    Fine,
    Failed,
    Invalid,
}

impl PointState {
    fn word(self) -> &'static str {
        match self {
            Self::Fine => "pass",
            Self::Failed => "fail",
            Self::Invalid => "not valid",
        }
    }
}

/// A line through the points: its name, its CSS class, and its value at each point.
type Line<'a> = (&'static str, &'static str, &'a dyn Fn(&Point) -> Option<f64>);

pub(super) fn of_sweep(document: &Value, charts: &mut Charts) -> Markup {
    let points: Vec<Point> = list(document, "points").map(point_of_sweep).collect();
    let unit = match document["axis"].as_str() {
        Some("concurrency") => "at once",
        _ => "req/s",
    };
    let objective = |name: &str| {
        let first = list(document, "points").next()?;
        first["result"]["xpyd"]["objectives"][name].as_f64()
    };
    html! {
        p.lede { (knee(&points, unit)) @if let Some(why) = document["stopped"].as_str() { " Ended: " bdi { (why) } "." } }
        section { h2 { "Latencies over the load" } figure {
            (chart(charts, &points, unit, &[
                ("Time to first token (ms)", &[("median", "middle", &|point| point.first_token[0]), ("P99", "tail", &|point| point.first_token[1])], objective("ttft"), None),
                ("Time per output token (ms)", &[("median", "middle", &|point| point.per_token[0]), ("P99", "tail", &|point| point.per_token[1])], objective("tpot"), None),
                ("Requests served per second", &[("served", "middle", &|point| point.served), ("good", "tail", &|point| point.goodput)], None, None),
            ]))
        } }
        section { h2 { "Runs" } (table(&points, unit)) }
    }
}

pub(super) fn of_search(document: &Value, charts: &mut Charts) -> Markup {
    let mut points: Vec<Point> = list(document, "probes").map(point_of_search).collect();
    points.sort_by(|left, right| left.asked.unwrap_or(0.0).total_cmp(&right.asked.unwrap_or(0.0)));
    let attainment = document["attainment"].as_f64();
    let objective = document["objectives"]["ttft"].as_f64();
    let ending = document["ending"].as_str().unwrap_or_default();
    let is_found = ending == "found";
    html! {
        p.lede {
            @if let Some(rate) = document["rate"].as_f64() {
                @if is_found { "The highest rate that meets the objectives is " b { (digits(rate)) " req/s" } }
                @else { "At least " b { (digits(rate)) " req/s" } " meet the objectives" }
                @if let Some(fails) = document["fails_at"].as_f64() { "; at " (digits(fails)) " req/s it does not" } "." }
            @else if document["fails_at"].is_number() || ending == "a request alone misses" { "No tested rate meets the objectives." }
            @else { "Whether any rate meets the objectives is unknown." }
            @if !is_found && !ending.is_empty() { " The search ended early: " bdi { (early(ending)) } "." }
        }
        (objectives(document))
        section { h2 { "Probes" } figure {
            (chart(charts, &points, "req/s", &[
                ("Requests that meet the objectives (%)", &[("good", "middle", &|point| point.good.map(|good| good * 100.0))], attainment.map(|share| share * 100.0), Some(100.0)),
                ("P99 of the time to first token (ms)", &[("P99", "middle", &|point| point.first_token[1])], objective, None),
            ]))
        } }
        section { h2 { "Runs" } (table(&points, "req/s")) }
    }
}

/// Why a search ended early.
fn early(ending: &str) -> &str {
    match ending {
        "time" => "the time limit was reached",
        "client limit" => "the load generator was too slow",
        "nothing passes" => "even the lowest rate fails",
        "everything passes" => "even the highest rate passes",
        "a request alone misses" => "even a single request at an idle server misses them",
        other => other,
    }
}

/// The highest load that the server handles, in a sentence.
fn knee(points: &[Point], unit: &str) -> String {
    let asked = |state| {
        let points = points.iter().filter(move |point| point.state == state);
        points.filter_map(|point| point.asked)
    };
    let (kept, lost) = (
        asked(PointState::Fine).reduce(f64::max),
        asked(PointState::Failed).reduce(f64::min),
    );
    match (kept, lost) {
        (Some(kept), Some(lost)) if kept < lost => {
            format!(
                "The server keeps up with {} {unit}, and falls behind at {}.",
                tick(kept),
                tick(lost)
            )
        }
        (Some(kept), None) => format!(
            "The server keeps up with every tested load, up to {} {unit}.",
            tick(kept)
        ),
        (None, Some(lost)) => format!("The server falls behind at {} {unit} already.", tick(lost)),
        _ => format!("{} runs with different loads.", whole(points.len())),
    }
}

fn objectives(document: &Value) -> Markup {
    let limits = document["objectives"].as_object().into_iter().flatten();
    let limits = limits.filter_map(|(name, limit)| Some(format!("{name} ≤ {}", span(limit.as_f64()? / 1000.0))));
    let limits = limits.collect::<Vec<_>>().join(", ");
    html! {
        @if !limits.is_empty() {
            p.note { "Objectives: " (limits) @if let Some(share) = document["attainment"].as_f64() { ", of " (tick(share * 100.0)) " % of the requests" } "." }
        }
    }
}

fn list<'a>(document: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    document[key].as_array().into_iter().flatten().take(MOST_POINTS)
}

fn point_of_sweep(entry: &Value) -> Point {
    let result = &entry["result"];
    let number = |key: &str| result[key].as_f64().map(finite);
    let is_valid = entry["valid"] != false && result["xpyd"]["valid"] != false;
    let is_overloaded = entry["overloaded"] == true;
    Point {
        asked: entry["asked"].as_f64(),
        served: entry["served"].as_f64().or(number("request_throughput")),
        goodput: number("request_goodput"),
        output: number("output_throughput"),
        first_token: [number("median_ttft_ms"), number("p99_ttft_ms")],
        per_token: [number("median_tpot_ms"), number("p99_tpot_ms")],
        good: None,
        failed: entry["failed"].as_u64().unwrap_or(0),
        state: match (is_valid, is_overloaded) {
            (false, _) => PointState::Invalid,
            (true, true) => PointState::Failed,
            (true, false) => PointState::Fine,
        },
        note: match entry["why_invalid"].as_str() {
            Some(why) => why.to_owned(),
            None if is_overloaded => "more was sent than served, and the queue grew".to_owned(),
            None => String::new(),
        },
    }
}

fn point_of_search(entry: &Value) -> Point {
    let missed = entry["missed"].as_object().into_iter().flatten();
    let missed = missed.filter(|(_, count)| count.as_u64() > Some(0));
    let missed: Vec<String> = missed.map(|(name, count)| format!("{count} missed {name}")).collect();
    Point {
        asked: entry["rate"].as_f64(),
        served: None,
        goodput: None,
        output: None,
        first_token: [None, entry["ttft_ms"].as_f64()],
        per_token: [None, None],
        good: entry["good"].as_f64().map(finite),
        failed: entry["failed"].as_u64().unwrap_or(0),
        state: match entry["verdict"].as_str() {
            Some("pass") => PointState::Fine,
            Some("invalid") => PointState::Invalid,
            _ => PointState::Failed,
        },
        note: match entry["why_invalid"].as_str() {
            Some(why) => why.to_owned(),
            None if entry["growing"] == true => "the queue grows".to_owned(),
            None => missed.join(", "),
        },
    }
}

/// A panel: its title, its lines, the objective, and the greatest possible value.
type Content<'a> = (&'a str, &'a [Line<'a>], Option<f64>, Option<f64>);

/// The load axis. Loads that span a factor of 8 or more are drawn logarithmically.
fn load_axis(points: &[Point]) -> Axis {
    let asked = || points.iter().filter_map(|point| point.asked);
    let most = asked().fold(0.0, f64::max);
    let least = asked().fold(most, f64::min);
    if least > 0.0 && most >= least * 8.0 {
        return Axis::logarithmic(least * 0.95, most * 1.05);
    }
    // A single load is drawn in the middle.
    let margin = if most > least {
        (most - least) * 0.04
    } else {
        most.max(1.0) / 2.0
    };
    Axis::linear((least - margin).max(0.0), most + margin)
}

/// Panels above each other with one load axis.
fn chart(charts: &mut Charts, points: &[Point], unit: &str, contents: &[Content<'_>]) -> Markup {
    let with_values = |content: &&Content<'_>| {
        let has = |point: &Point| content.1.iter().any(|(_, _, value)| value(point).is_some());
        points.iter().any(has)
    };
    let most = points.iter().filter_map(|point| point.asked).fold(0.0, f64::max);
    let least = points.iter().filter_map(|point| point.asked).fold(most, f64::min);
    let label = format!(
        "{} runs from {} to {} {unit}; the table below has the numbers",
        points.len(),
        tick(least),
        tick(most)
    );
    let shown = contents.iter().filter(with_values);
    let chart = Chart {
        x: ShownAxis::bottom(&load_axis(points), "", unit),
        panels: shown.map(|content| panel(points, content)).collect(),
        right: Some([72, 66]),
        ..Chart::default()
    };
    charts.add(&label, chart)
}

fn panel(points: &[Point], (title, lines, limit, greatest): &Content<'_>) -> Panel {
    let limit = *limit;
    let values = points
        .iter()
        .flat_map(|point| lines.iter().filter_map(|(_, _, value)| value(point)));
    // One value of an overloaded server must not flatten all others: values far beyond the limit are cut.
    let most = values.fold(limit.unwrap_or(0.0), f64::max);
    let most = limit.map_or(most, |limit| most.min(limit * 6.0)).max(1e-6);
    // Room for the label of the limit below the panel title.
    let height = Axis::linear(0.0, greatest.unwrap_or_else(|| round_up(most * 1.12)));
    let objective = limit.map(|limit| Mark::limit(limit, format!("objective {}", tick(limit))));
    Panel {
        title: (*title).to_owned(),
        y: ShownAxis::left(&height, "", tick),
        height: [160, 125],
        marks: objective.into_iter().collect(),
        series: lines.iter().flat_map(|line| trace(points, line)).collect(),
    }
}

/// The line, its dots, and the crosses of bad runs.
fn trace(points: &[Point], (name, class, value): &Line<'_>) -> [Series; 3] {
    let all = points
        .iter()
        .filter_map(|point| Some((point.asked?, value(point)?, point.state)));
    let mut all: Vec<(f64, f64, PointState)> = all.collect();
    all.sort_by(|left, right| left.0.total_cmp(&right.0));
    let of = |is_fine: bool| {
        let some = all
            .iter()
            .filter(move |(_, _, state)| (*state == PointState::Fine) == is_fine);
        some.map(|(asked, value, _)| (*asked, *value))
    };
    let line = all.iter().map(|(asked, value, _)| (*asked, *value));
    [
        Series {
            end: true,
            ..Series::of(Shape::Line, name, class, line)
        },
        Series::of(Shape::Dots, "", "few", of(true)),
        Series::of(Shape::Crosses, "", "bad", of(false)),
    ]
}

fn table(points: &[Point], unit: &str) -> Markup {
    let text = |value: Option<f64>| value.map(hundredths).unwrap_or_default();
    let has = |value: &dyn Fn(&Point) -> Option<f64>| points.iter().any(|point| value(point).is_some());
    let columns: Vec<Line<'_>> = [
        (
            "Served, req/s",
            "",
            &(|point: &Point| point.served) as &dyn Fn(&Point) -> Option<f64>,
        ),
        ("Good, req/s", "", &|point| point.goodput),
        ("Good, %", "", &|point| point.good.map(|good| good * 100.0)),
        ("Output, tok/s", "", &|point| point.output),
        ("Median TTFT, ms", "", &|point| point.first_token[0]),
        ("P99 TTFT, ms", "", &|point| point.first_token[1]),
        ("Median TPOT, ms", "", &|point| point.per_token[0]),
        ("P99 TPOT, ms", "", &|point| point.per_token[1]),
    ]
    .into_iter()
    .filter(|(_, _, value)| has(*value))
    .collect();
    html! {
        div.scroll { table.numbers {
            thead { tr {
                th scope="col" { "Asked, " (unit) }
                @for (name, _, _) in &columns { th scope="col" { (name) } }
                th scope="col" { "Failed" } th scope="col" { "Verdict" }
            } }
            tbody {
                @for point in points {
                    tr {
                        th scope="row" { (point.asked.map_or("all at once".to_owned(), tick)) }
                        @for (_, _, value) in &columns { td { (text(value(point))) } }
                        td { (whole(point.failed)) }
                        td { (point.state.word()) }
                    }
                }
            }
        } }
        ul.remarks {
            @for point in points.iter().filter(|point| !point.note.is_empty()) {
                li { (point.asked.map_or("all at once".to_owned(), |asked| format!("{} {unit}", tick(asked)))) ": " bdi { (point.note) } }
            }
        }
    }
}
