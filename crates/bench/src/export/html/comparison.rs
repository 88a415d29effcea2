//! The page of a comparison of two runs or two servers: every change with its interval, as a chart and a table.

use maud::{Markup, html};
use serde_json::Value;

use super::chart::{Chart, Charts, Mark, Panel, Series, Shape, ShownAxis};
use super::number::{Axis, finite, hundredths};

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

pub(super) fn of(document: &Value, charts: &mut Charts) -> Markup {
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
            (charts.add("The change of each measure with its 95 % interval; the table below has the numbers", chart(&rows)))
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

fn chart(rows: &[Measure]) -> Chart {
    let drawn: Vec<(&Measure, f64)> = rows.iter().filter_map(|row| Some((row, row.change?))).collect();
    let ends = drawn.iter().flat_map(|(row, change)| {
        let (low, high) = row.interval.unwrap_or((*change, *change));
        [low.abs(), high.abs(), change.abs()]
    });
    let most = ends.fold(1.0, f64::max).min(FARTHEST) * 1.08;
    let (mut intervals, mut dots, mut unsure) = (
        Series::of(Shape::Intervals, "", "accent", []),
        Series::of(Shape::Dots, "change", "few", []),
        // The interval is unknown.
        Series::of(Shape::Crosses, "change", "soft", []),
    );
    for (place, (row, change)) in drawn.iter().enumerate() {
        let y = place as f64 + 0.5;
        let series = if row.interval.is_some() { &mut dots } else { &mut unsure };
        let interval = row.interval.map(|(low, high)| format!(" ({low:+.1} to {high:+.1} %)"));
        series
            .text
            .push(format!("{change:+.1} %{}", interval.unwrap_or_default()));
        series.x.push(*change);
        series.y.push(y);
        if let Some((low, high)) = row.interval {
            intervals.x.push(low);
            intervals.to.push(high);
            intervals.y.push(y);
        }
    }
    let zero = Mark {
        on: "x",
        value: 0.0,
        text: String::new(),
        class: "middle",
    };
    let height = u16::try_from(26 * drawn.len().max(1)).unwrap_or(u16::MAX);
    let panel = Panel {
        title: String::new(),
        y: ShownAxis::rows(drawn.iter().map(|(row, _)| row.name.as_str())),
        height: [height; 2],
        marks: vec![zero],
        series: vec![intervals, dots, unsure],
    };
    Chart {
        x: ShownAxis::bottom(&Axis::linear(-most, most), "", "%"),
        panels: vec![panel],
        ..Chart::default()
    }
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
