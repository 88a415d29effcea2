//! Every request as one row over time, by phase. Drawn here for a page without scripts, and given to the script as data.

use std::fmt::Write as _;

use maud::{Markup, PreEscaped, html};
use serde_json::{Value, json};

use super::chart::{Size, bottom_axis, chart};
use super::number::{Axis, pixel, span, whole};
use super::run::{PHASES, Request, Run};
use crate::bench::stats::percentile_of_sorted;

/// Rows that are drawn: more are thinner than a pixel.
const MOST_ROWS: usize = 1000;
/// Of those, requests that failed.
const MOST_FAILED: usize = 200;
/// Of those, the ones that waited longest for their first token.
const SLOWEST: usize = 100;
/// Stalls that are drawn, the longest ones.
const MOST_STALLS: usize = 2000;
/// A gap is a stall from this many times the median gap on.
const STALL_RATIO: f64 = 4.0;
/// The height of all rows together, in pixels, where they are many.
const HEIGHT: f64 = 560.0;
/// The height of one row where they are few.
const ROW_HEIGHT: f64 = 16.0;
const TOP: f64 = 10.0;

/// What is drawn.
#[derive(Debug)]
pub(super) struct Timeline<'a> {
    rows: Vec<&'a Request>,
    total: usize,
    /// From the first release to the last token.
    length: f64,
    /// From this length on, a gap is shown as a stall.
    stall: f64,
    stalls: usize,
    phases: Vec<usize>,
}

impl<'a> Timeline<'a> {
    pub(super) fn of(run: &'a Run) -> Self {
        let ends = run.requests.iter().map(|request| request.started + request.phases().iter().sum::<f64>() - request.queued);
        let mut gaps: Vec<f64> = run.answered().flat_map(|(_, timing)| timing.gaps.iter().copied()).collect();
        gaps.sort_unstable_by(f64::total_cmp);
        let typical = gaps.get(gaps.len() / 2).copied().unwrap_or(0.0) * STALL_RATIO;
        let allowed = gaps.len().checked_sub(MOST_STALLS).map_or(0.0, |place| gaps[place]);
        let stall = typical.max(allowed).max(1e-6);
        let used = |phase: &usize| run.requests.iter().any(|request| request.phases()[*phase] > 0.0);
        Self {
            rows: sample(&run.requests),
            total: run.requests.len(),
            length: ends.fold(1e-3, f64::max),
            stall,
            stalls: gaps.len() - gaps.partition_point(|gap| *gap <= stall),
            phases: (0..PHASES.len()).filter(used).collect(),
        }
    }

    /// The legend, which tells the medians too; the picture; the notes on what is not in it; the data for the script.
    pub(super) fn figure(&self, run: &Run) -> Markup {
        let failed = self.rows.iter().filter(|row| row.result.is_err()).count();
        let label = format!(
            "{} requests over {}, one row each, by phase; {failed} failed. The table of the slowest requests below has the numbers.",
            whole(self.rows.len()),
            span(self.length)
        );
        html! {
            figure.timeline {
                (self.legend(run))
                div.tools hidden {
                    button type="button" data-action="in" { "Zoom in" }
                    button type="button" data-action="out" { "Zoom out" }
                    button type="button" data-action="left" aria-label="Earlier" { "←" }
                    button type="button" data-action="right" aria-label="Later" { "→" }
                    button type="button" data-action="reset" { "All" }
                    span.hint { "Drag over a stretch of time to look closer." }
                }
                (chart("rows", &label, |size| self.picture(size)))
                div.tip hidden {}
                @if self.rows.len() < self.total {
                    figcaption {
                        (whole(self.rows.len())) " of " (whole(self.total)) " requests are drawn: failed ones, the "
                        (SLOWEST) " that waited longest for their first token, and others at even steps. All numbers and the \
                        other charts are of all requests."
                    }
                }
            }
            script #timeline-data type="application/json" { (PreEscaped(embedded(&self.data()))) }
        }
    }

    fn legend(&self, run: &Run) -> Markup {
        html! {
            ul.legend aria-label="Phases in the order of time, with their medians" {
                @for phase in &self.phases {
                    li { i class={ "swatch " (PHASES[*phase].class) } {} (PHASES[*phase].name) " "
                        span.value { (span(median_phase(run, *phase))) } }
                }
                @if self.stalls > 0 {
                    li { i.swatch.stall {} "stall, a gap over " (span(self.stall)) " " span.value { (whole(self.stalls)) } }
                }
                @if run.failed > 0 { li { i.swatch.failed { "×" } "failed" " " span.value { (whole(run.failed)) } } }
            }
        }
    }

    fn picture(&self, size: Size) -> (f64, Markup) {
        let pitch = (HEIGHT / self.rows.len().max(1) as f64).min(ROW_HEIGHT);
        let bottom = TOP + pitch * self.rows.len().max(1) as f64;
        let axis = Axis::linear((0.0, self.length), size.plot());
        let thickness = if pitch > 4.0 { pitch - 2.0 } else { pitch };
        let mut paths = vec![String::new(); PHASES.len()];
        let (mut stalls, mut crosses) = (String::new(), String::new());
        for (place, row) in self.rows.iter().enumerate() {
            let y = TOP + place as f64 * pitch;
            let mut bar = |path: &mut String, from: f64, to: f64| {
                let (from, to) = (axis.at(from), axis.at(to));
                // Writing to a String cannot fail.
                let _ = write!(
                    path,
                    "M{} {}h{}v{}h-{2}z",
                    pixel(from),
                    pixel(y),
                    pixel((to - from).max(0.1)),
                    pixel(thickness)
                );
            };
            let mut start = row.started - row.queued;
            for (path, length) in paths.iter_mut().zip(row.phases()) {
                if length > 0.0 {
                    bar(path, start, start + length);
                    start += length;
                }
            }
            for (from, to) in self.stalls_of(row) {
                bar(&mut stalls, from, to);
            }
            if row.result.is_err() {
                let (x, y, arm) = (axis.at(row.started), y + thickness / 2.0, (thickness / 2.0).clamp(2.0, 4.0));
                let _ = write!(
                    crosses,
                    "M{} {}l{2} {2}m-{2} 0l{2} -{2}",
                    pixel(x - arm),
                    pixel(y - arm),
                    pixel(2.0 * arm)
                );
            }
        }
        let picture = html! {
            g.axis { (bottom_axis(&axis, size, (TOP, bottom), "s")) }
            g.labels { (self.row_labels(size, pitch)) }
            g.plot data-left=(pixel(size.plot().0)) data-right=(pixel(size.plot().1)) data-top=(pixel(TOP)) data-bottom=(pixel(bottom)) {
                @for (phase, path) in PHASES.iter().zip(&paths) { path class={ "phase " (phase.class) } d=(path) {} }
                path.stall d=(stalls) {}
                path.crosses d=(crosses) {}
            }
        };
        (bottom + 24.0, picture)
    }

    /// The numbers of some requests, at the left of their rows.
    fn row_labels(&self, size: Size, pitch: f64) -> Markup {
        let stride = (22.0 / pitch).ceil() as usize;
        html! {
            @for (place, row) in self.rows.iter().enumerate().step_by(stride.max(1)) {
                text.number x=(pixel(size.plot().0 - 7.0)) y=(pixel(TOP + place as f64 * pitch + pitch / 2.0 + 4.0)) text-anchor="end" {
                    (row.index)
                }
            }
        }
    }

    /// From when to when nothing came, since the first release.
    fn stalls_of(&self, row: &Request) -> Vec<(f64, f64)> {
        let Ok(timing) = &row.result else {
            return Vec::new();
        };
        let mut instant = row.started + timing.first_token;
        let mut stalls = Vec::new();
        for gap in &timing.gaps {
            if *gap > self.stall {
                stalls.push((instant, instant + gap));
            }
            instant += gap;
        }
        stalls
    }

    /// What the script needs to draw the same again at another scale, in tenths of a millisecond.
    fn data(&self) -> Value {
        let units = |seconds: f64| (seconds * 10_000.0).round() as i64;
        let rows = self.rows.iter().map(|row| {
            let start = row.started - row.queued;
            let stalls: Vec<i64> = self
                .stalls_of(row)
                .into_iter()
                .flat_map(|(from, to)| [units(from), units(to - from)])
                .collect();
            json!({
                "request": row.index,
                "start": units(start),
                "phases": row.phases().map(units),
                "stalls": stalls,
                "input": row.input_tokens,
                "output": row.output_tokens,
                "pair": row.pair,
                "error": row.result.as_ref().err(),
            })
        });
        json!({
            "phases": PHASES.iter().map(|phase| json!([phase.name, phase.class])).collect::<Vec<_>>(),
            "length": units(self.length),
            "rows": rows.collect::<Vec<_>>(),
        })
    }
}

/// The median of a phase over the requests that have it.
fn median_phase(run: &Run, phase: usize) -> f64 {
    let lengths = run.answered().map(|(request, _)| request.phases()[phase]);
    let mut lengths: Vec<f64> = lengths.filter(|length| *length > 0.0).collect();
    lengths.sort_unstable_by(f64::total_cmp);
    if lengths.is_empty() {
        0.0
    } else {
        percentile_of_sorted(&lengths, 50.0)
    }
}

/// Which rows are drawn, in the order of the schedule.
fn sample(requests: &[Request]) -> Vec<&Request> {
    if requests.len() <= MOST_ROWS {
        return requests.iter().collect();
    }
    let mut is_chosen = vec![false; requests.len()];
    let failed = (0..requests.len()).filter(|place| requests[*place].result.is_err());
    let failed: Vec<usize> = failed.collect();
    for place in failed.iter().step_by(failed.len().div_ceil(MOST_FAILED).max(1)) {
        is_chosen[*place] = true;
    }
    let mut slowest: Vec<usize> = (0..requests.len()).filter(|place| requests[*place].result.is_ok()).collect();
    slowest.sort_by(|left, right| requests[*right].first_token().total_cmp(&requests[*left].first_token()));
    for place in slowest.iter().take(SLOWEST) {
        is_chosen[*place] = true;
    }
    let left = MOST_ROWS - is_chosen.iter().filter(|chosen| **chosen).count();
    for place in (0..requests.len()).step_by(requests.len().div_ceil(left)) {
        is_chosen[place] = true;
    }
    let rows = requests.iter().zip(is_chosen);
    rows.filter_map(|(request, is_chosen)| is_chosen.then_some(request)).collect()
}

/// JSON that may stand in a page's script element, whatever its texts hold: nothing in it can end the element or begin
/// a comment, because `<`, `>` and `&` are written as escapes.
pub(super) fn embedded(data: &Value) -> String {
    data.to_string()
        .replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('&', "\\u0026")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029")
}
