//! The page of a comparison of two runs or two servers: every change with its interval, as a chart and a table.

use maud::{Markup, html};
use serde_json::Value;

use super::chart::{Path, Size, bottom_axis, chart};
use super::number::{Axis, finite, hundredths, pixel};

/// Most rows.
const MOST_ROWS: usize = 60;
/// Changes beyond this, in percent, are drawn at the end of the axis.
const FARTHEST: f64 = 200.0;

/// One measure of both runs.
#[derive(Debug)]
struct Measure {
    name: String,
    key: String,
    before: Option<f64>,
    after: Option<f64>,
    /// Change in percent.
    change: Option<f64>,
    interval: Option<(f64, f64)>,
    verdict: String,
}

pub(super) fn of(document: &Value) -> Markup {
    let measures = document["measures"].as_object().into_iter().flatten();
    let rows: Vec<Measure> = measures
        .take(MOST_ROWS)
        .map(|(name, entry)| Measure::of(name, entry))
        .collect();
    let caveats = document["caveats"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str);
    let caveats: Vec<&str> = caveats.take(20).collect();
    html! {
        p.lede { (headline(&rows)) }
        dl.settings.sides { (side("A", &document["a"])) (side("B", &document["b"])) }
        @if !caveats.is_empty() {
            div.banner role="note" { strong { "Not directly comparable" } ul { @for caveat in caveats { li { bdi { (caveat) } } } } }
        }
        section { h2 { "Changes from A to B" } figure {
            (chart("changes", "The change of each measure with its 95 % interval; the table below has the numbers", |size| picture(&rows, size)))
            figcaption { "A dot is the change, and the line through it is its 95 % confidence interval. If the line \
                crosses 0, the change is not significant. A cross is a change without an interval." }
        } }
        section { h2 { "Measures" } (table(&rows)) }
    }
}

fn side(name: &str, side: &Value) -> Markup {
    let text = |key: &str| side[key].as_str().unwrap_or_default();
    html! {
        div { dt { (name) } dd { bdi { (text("file")) (text("base_url")) } br; bdi { (text("model_id")) } } }
    }
}

impl Measure {
    fn of(name: &str, entry: &Value) -> Self {
        let percent = |value: &Value| value.as_f64().map(|share| finite(share) * 100.0);
        let ends = entry["interval"].as_array().map(Vec::as_slice).unwrap_or_default();
        Self {
            name: entry["label"].as_str().unwrap_or(name).to_owned(),
            key: name.to_owned(),
            before: entry["a"].as_f64(),
            after: entry["b"].as_f64(),
            change: percent(&entry["change"]),
            interval: match ends {
                [low, high] => percent(low).zip(percent(high)),
                _ => None,
            },
            verdict: entry["verdict"].as_str().unwrap_or_default().to_owned(),
        }
    }
}

/// The main result in one sentence.
fn headline(rows: &[Measure]) -> String {
    let change = |key: &str, what: &str| {
        let row = rows.iter().find(|row| row.key == key)?;
        let change = row.change?;
        let css_class = row.css_class();
        Some(match css_class {
            "" if row.interval.is_some() => format!("no difference seen {what}"),
            _ => format!(
                "{:.1} % {} {what}",
                change.abs(),
                if change > 0.0 { "slower" } else { "faster" }
            ),
        })
    };
    let sentences: Vec<String> = [
        change("mean_ttft_ms", "to the first token"),
        change("mean_tpot_ms", "per later token"),
    ]
    .into_iter()
    .flatten()
    .collect();
    if sentences.is_empty() {
        return "The changes from A to B, with confidence intervals.".to_owned();
    }
    format!("B against A: {}.", sentences.join(", "))
}

impl Measure {
    /// The CSS class: whether B is significantly better or worse.
    fn css_class(&self) -> &'static str {
        match self.verdict.as_str() {
            "faster" | "higher" | "better" => "better",
            "slower" | "lower" | "worse" => "worse",
            _ => "",
        }
    }
}

fn picture(rows: &[Measure], size: Size) -> (f64, Markup) {
    const PITCH: f64 = 26.0;
    let drawn: Vec<(&Measure, f64)> = rows.iter().filter_map(|row| Some((row, row.change?))).collect();
    let ends = drawn.iter().flat_map(|(row, change)| {
        let (low, high) = row.interval.unwrap_or((*change, *change));
        [low.abs(), high.abs(), change.abs()]
    });
    let most = ends.fold(1.0, f64::max).min(FARTHEST) * 1.08;
    let (top, bottom) = (6.0, 6.0 + PITCH * drawn.len().max(1) as f64);
    let left = size.pick(250.0, 128.0);
    let axis = Axis::linear((-most, most), (left, size.plot().1));
    let (mut intervals, mut dots, mut unsure) = (Path::default(), Path::default(), Path::default());
    for (place, (row, change)) in drawn.iter().enumerate() {
        let y = top + (place as f64 + 0.5) * PITCH;
        if let Some((low, high)) = row.interval {
            intervals.move_to(axis.at(low), y).across_to(axis.at(high));
            dots.dot(axis.at(*change), y);
        } else {
            // The interval is unknown.
            unsure.cross((axis.at(*change), y), 3.0);
        }
    }
    let picture = html! {
        (bottom_axis(&axis, size, (top, bottom), "%"))
        path.mark.middle d={ "M" (pixel(axis.at(0.0))) " " (pixel(top)) "V" (pixel(bottom)) } {}
        path.interval d=(intervals.text()) {}
        path.dots.few d=(dots.text()) {}
        path.unsure d=(unsure.text()) {}
        @for (place, (row, _)) in drawn.iter().enumerate() {
            text x="0" y=(pixel(top + (place as f64 + 0.5) * PITCH + 4.0)) { (row.name) }
        }
    };
    (bottom + 24.0, picture)
}

fn table(rows: &[Measure]) -> Markup {
    let number = |value: Option<f64>| value.map(hundredths).unwrap_or_default();
    html! {
        div.scroll { table.numbers {
            thead { tr {
                th scope="col" { "Measure" } th scope="col" { "A" } th scope="col" { "B" } th scope="col" { "Change" }
                th scope="col" { "95 % interval" } th.text scope="col" { "Verdict" }
            } }
            tbody {
                @for row in rows {
                    tr {
                        th scope="row" { bdi { (row.name) } }
                        td { (number(row.before)) }
                        td { (number(row.after)) }
                        td { @if let Some(change) = row.change { (format!("{change:+.1} %")) } }
                        td { @if let Some((low, high)) = row.interval { (format!("{low:+.1} to {high:+.1} %")) } }
                        td class={ "text " (row.css_class()) } { bdi { (row.verdict) } }
                    }
                }
            }
        } }
    }
}
