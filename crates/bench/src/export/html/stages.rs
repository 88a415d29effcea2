//! The chart of the time to first token of single requests by stage, in send order. It shows why slow requests are
//! slow.

use maud::{Markup, html};

use super::chart::{Chart, Charts, Mark, Panel, Series, Shape, ShownAxis};
use super::number::{Axis, round_up, span, tick, whole};
use super::phase::RequestPhase;
use super::run::{Request, Run, Timing};

/// Most columns; of more requests, the slowest of each group is drawn.
const MOST_COLUMNS: usize = 240;

/// The chart; `None` if the server reported no stages.
pub(super) fn figure(run: &Run, charts: &mut Charts) -> Option<Markup> {
    let reported: Vec<_> = run
        .answered()
        .filter(|(request, _)| request.reported.is_some())
        .collect();
    let group = reported.len().div_ceil(MOST_COLUMNS).max(1);
    let columns: Vec<&Request> = reported.chunks(group).filter_map(slowest).collect();
    let most = columns.iter().map(|request| request.first_token()).fold(0.0, f64::max);
    let label = format!(
        "Time to first token of {} requests by stage, the longest {}; the table below has the numbers",
        whole(columns.len()),
        span(most)
    );
    (!columns.is_empty()).then(|| {
        html! {
            figure {
                (charts.add(&label, chart(&columns, most, run.objective("ttft"))))
                @if group > 1 { figcaption { "Each column is the slowest of " (group) " requests that were sent one after the other." } }
            }
        }
    })
}

fn slowest<'a>(group: &[(&'a Request, &'a Timing)]) -> Option<&'a Request> {
    let most = group
        .iter()
        .max_by(|left, right| left.1.first_token.total_cmp(&right.1.first_token));
    most.map(|(request, _)| *request)
}

fn chart(columns: &[&Request], most: f64, objective: Option<f64>) -> Chart {
    let most = most.max(objective.unwrap_or(0.0));
    let (scale, unit) = if most < 10.0 { (1000.0, "ms") } else { (1.0, "s") };
    let mut series: Vec<Series> = Vec::new();
    let mut bases = vec![0.0; columns.len()];
    for stage in RequestPhase::all() {
        if !matches!(stage, RequestPhase::Stage(_)) {
            continue;
        }
        let mut bars = Series::of(Shape::Bars, stage.name(), stage.class(), []);
        for (place, (request, base)) in columns.iter().zip(&mut bases).enumerate() {
            let length = stage.of(request);
            if length > 0.0 {
                bars.x.push(place as f64);
                bars.to.push((place + 1) as f64);
                bars.base.push(*base * scale);
                *base += length;
                bars.y.push(*base * scale);
                bars.text.push(span(length));
            }
        }
        if !bars.x.is_empty() {
            series.push(bars);
        }
    }
    let limit = objective.map(|limit| Mark::limit(limit * scale, format!("objective {}", span(limit))));
    let numbers: Vec<String> = columns.iter().map(|request| request.index.to_string()).collect();
    let panel = Panel {
        title: format!("TTFT of each request in the order of sending (in {unit})"),
        y: ShownAxis::left(&Axis::linear(0.0, round_up((most * scale).max(1e-3))), unit, tick),
        height: [200, 150],
        marks: limit.into_iter().collect(),
        series,
    };
    Chart {
        x: ShownAxis::columns(&numbers),
        panels: vec![panel],
        pitch: Some(24),
        columns: numbers.iter().map(|number| format!("Request {number}")).collect(),
        ..Chart::default()
    }
}
