//! The chart of the time to first token of single requests by stage, in send order. It shows why slow requests are
//! slow.

use maud::{Markup, html};

use super::chart::{Path, Size, chart, left_axis, panel_name};
use super::number::{Axis, pixel, round_up, span, tick, whole};
use super::phase::{self, RequestPhase};
use super::run::{Request, Run, Timing};

/// Most columns; of more requests, the slowest of each group is drawn.
const MOST_COLUMNS: usize = 240;

/// The chart; `None` if the server reported no stages.
pub(super) fn figure(run: &Run) -> Option<Markup> {
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
                (chart("stages", &label, |size| draw(&columns, most, run.objective("ttft"), size)))
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

fn draw(columns: &[&Request], most: f64, objective: Option<f64>, size: Size) -> (f64, Markup) {
    let (top, bottom) = (24.0, 24.0 + size.pick(190.0, 150.0));
    let (left, right) = size.plot();
    let most = most.max(objective.unwrap_or(0.0));
    let (scale, unit) = if most < 10.0 { (1000.0, "ms") } else { (1.0, "s") };
    let height = Axis::linear((0.0, round_up((most * scale).max(1e-3))), (bottom, top));
    let pitch = ((right - left) / columns.len() as f64).min(24.0);
    let width = if pitch > 3.0 { pitch - 1.0 } else { pitch };
    let mut paths: Vec<Path> = std::iter::repeat_with(Path::default).take(phase::COUNT).collect();
    for (place, request) in columns.iter().enumerate() {
        let x = left + place as f64 * pitch;
        let mut base = 0.0;
        for (path, stage) in paths.iter_mut().zip(RequestPhase::all()) {
            let length = if matches!(stage, RequestPhase::Stage(_)) {
                stage.of(request)
            } else {
                0.0
            };
            if length > 0.0 {
                let (from, to) = (height.at(base * scale), height.at((base + length) * scale));
                path.bar((x, x + width), to, from - to);
                base += length;
            }
        }
    }
    let stride = columns.len().div_ceil(size.pick(16, 6)).max(1);
    let picture = html! {
        (panel_name(11.0, &format!("TTFT of each request in the order of sending (in {unit})")))
        (left_axis(&height, size, 4, tick))
        @for (stage, path) in RequestPhase::all().into_iter().zip(&paths) { path class={ "phase " (stage.class()) } d=(path.text()) {} }
        @if let Some(limit) = objective {
            @let y = height.at(limit * scale);
            path.mark.limit d={ "M" (pixel(left)) " " (pixel(y)) "H" (pixel(right)) } {}
            text.name.limit x=(pixel(right)) y=(pixel(y - 4.0)) text-anchor="end" { "objective " (span(limit)) }
        }
        @for (place, request) in columns.iter().enumerate().step_by(stride) {
            text.number x=(pixel(left + place as f64 * pitch + width / 2.0)) y=(pixel(bottom + 17.0)) text-anchor="middle" { (request.index) }
        }
    };
    (bottom + 24.0, picture)
}
