//! The timeline of requests by phase.
//!
//! Few requests have a row each. Many rows would be a thin diagonal, so each request then takes the first free lane,
//! and the height is the number of concurrent requests.

use maud::{Markup, html};
use serde_json::{Value, json};

use super::chart::Charts;
use super::number::{span, whole};
use super::phase::RequestPhase;
use super::run::{Request, Run};

/// Most requests with a row each.
const MOST_ROWS: usize = 120;
/// Most requests to draw. More would take too many bytes.
const MOST_DRAWN: usize = 4000;
/// Of these, most failed requests.
const MOST_FAILED: usize = 500;
/// Of these, the requests with the longest time to first token.
const SLOWEST: usize = 300;
/// Most stalls to draw, the longest first.
const MOST_STALLS: usize = 2000;
/// A gap of this many median gaps is a stall.
const STALL_RATIO: f64 = 4.0;

/// The data of the chart.
#[derive(Debug)]
pub(super) struct Timeline<'a> {
    rows: Vec<TimelineRow<'a>>,
    lanes: usize,
    has_own_rows: bool,
    total: usize,
    /// From the first release to the last token.
    length: f64,
    /// Gaps of at least this length are shown as stalls.
    stall: f64,
    stalls: usize,
    phases: Vec<RequestPhase>,
}

#[derive(Debug)]
struct TimelineRow<'a> {
    request: &'a Request,
    lane: usize,
}

impl<'a> Timeline<'a> {
    /// `gaps` are all gaps of the run, in ascending order.
    pub(super) fn of(run: &'a Run, gaps: &[f64]) -> Self {
        let typical = gaps.get(gaps.len() / 2).copied().unwrap_or(0.0) * STALL_RATIO;
        let longest = gaps.len().checked_sub(MOST_STALLS + 1).map_or(0.0, |place| gaps[place]);
        let stall = typical.max(longest).max(1e-6);
        let length = run.requests.iter().map(end).fold(1e-3, f64::max);
        let drawn = sample(&run.requests);
        let has_own_rows = drawn.len() <= MOST_ROWS;
        let rows = if has_own_rows {
            let rows = drawn.into_iter().enumerate();
            rows.map(|(lane, request)| TimelineRow { request, lane }).collect()
        } else {
            in_lanes(drawn, length)
        };
        Self {
            lanes: rows.iter().map(|row| row.lane + 1).max().unwrap_or(1),
            rows,
            has_own_rows,
            total: run.requests.len(),
            length,
            stall,
            stalls: gaps.len() - gaps.partition_point(|gap| *gap <= stall),
            phases: RequestPhase::used(run),
        }
    }

    /// The legend with medians, the picture, notes, and the data for the script.
    pub(super) fn figure(&self, run: &Run, charts: &mut Charts) -> Markup {
        let failed = self.rows.iter().filter(|row| row.request.result.is_err()).count();
        let label = format!(
            "{} requests over {}, by phase; {failed} of them failed. The table of the slowest requests has the numbers.",
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
                    span.hint { "Drag over a time range to zoom in." }
                }
                (charts.add(&label, self.data()))
                (self.notes())
            }
        }
    }

    fn notes(&self) -> Markup {
        html! {
            @if !self.has_own_rows || self.rows.len() < self.total {
                figcaption {
                    @if !self.has_own_rows {
                        "Each request takes the first free lane, so the height is the number of concurrent requests. "
                    }
                    @if self.rows.len() < self.total {
                        (whole(self.rows.len())) " of " (whole(self.total)) " requests are drawn: up to " (MOST_FAILED) " that failed, the "
                        (SLOWEST) " with the longest time to first token, and an even selection of the others. All numbers and all other \
        charts cover all requests."
                    }
                }
            }
        }
    }

    fn legend(&self, run: &Run) -> Markup {
        html! {
            ul.legend aria-label="RequestStages in the order of time, with their medians" {
                @for phase in &self.phases {
                    li { i class={ "swatch " (phase.class()) } {} (phase.name()) " " span.value { (span(phase.median(run))) } }
                }
                @if self.stalls > 0 {
                    li { i.swatch.stall {} "gap over " (span(self.stall)) " " span.value { (whole(self.stalls)) } }
                }
                @if run.failed > 0 { li { i.swatch.failed { "×" } "failed " span.value { (whole(run.failed)) } } }
            }
        }
    }

    /// The stalls of a request: start and end since the first release.
    fn stalls_of(&self, request: &Request) -> Vec<(f64, f64)> {
        let Ok(timing) = &request.result else {
            return Vec::new();
        };
        let mut instant = request.started + timing.first_token;
        let mut stalls = Vec::new();
        for gap in &timing.gaps {
            if *gap > self.stall {
                stalls.push((instant, instant + gap));
            }
            instant += gap;
        }
        stalls
    }

    /// The data for the script, in tenths of a millisecond.
    pub(super) fn data(&self) -> Value {
        let rows = self.rows.iter().map(|TimelineRow { request, lane }| {
            let stalls = self.stalls_of(request).into_iter();
            let stalls: Vec<i64> = stalls.flat_map(|(from, to)| [units(from), units(to - from)]).collect();
            let mut row = json!({
                "request": request.index,
                "lane": lane,
                "start": units(request.started - request.queued),
                "phases": self.phases.iter().map(|phase| units(phase.of(request))).collect::<Vec<_>>(),
                "input": request.input_tokens,
                "output": request.output_tokens,
            });
            // Omitted if empty, because this is most of a large page.
            if !stalls.is_empty() {
                row["stalls"] = json!(stalls);
            }
            if let Some(reported) = &request.reported {
                row["pair"] = json!(reported.pair);
            }
            if let Err(error) = &request.result {
                row["error"] = json!(error);
            }
            row
        });
        json!({
            "phases": self.phases.iter().map(|phase| json!([phase.name(), phase.class()])).collect::<Vec<_>>(),
            "length": units(self.length),
            "lanes": self.lanes,
            "ownRows": self.has_own_rows,
            "rows": rows.collect::<Vec<_>>(),
        })
    }
}

/// Tenths of a millisecond.
#[expect(clippy::cast_possible_truncation, reason = "a run of days has far fewer")]
fn units(seconds: f64) -> i64 {
    (seconds * 10_000.0).round() as i64
}

/// End of a request since the first release.
fn end(request: &Request) -> f64 {
    request.started + request.result.as_ref().map_or(0.0, super::run::Timing::end)
}

/// Puts each request into the first lane that is free at its release.
fn in_lanes(requests: Vec<&Request>, length: f64) -> Vec<TimelineRow<'_>> {
    // A failed request has no length, but its cross has a width.
    let room = |request: &Request| length / if request.result.is_ok() { 1000.0 } else { 120.0 };
    let mut free_at: Vec<f64> = Vec::new();
    let rows = requests.into_iter().map(|request| {
        let start = request.started - request.queued;
        let lane = free_at
            .iter()
            .position(|free_at| *free_at <= start)
            .unwrap_or(free_at.len());
        let busy_until = end(request) + room(request);
        match free_at.get_mut(lane) {
            Some(free_at) => *free_at = busy_until,
            None => free_at.push(busy_until),
        }
        TimelineRow { request, lane }
    });
    rows.collect()
}

/// The requests to draw, in the order of the schedule.
fn sample(requests: &[Request]) -> Vec<&Request> {
    if requests.len() <= MOST_DRAWN {
        return requests.iter().collect();
    }
    let mut is_chosen = vec![false; requests.len()];
    let (mut answered, failed): (Vec<usize>, Vec<usize>) =
        (0..requests.len()).partition(|place| requests[*place].result.is_ok());
    for place in failed.iter().step_by(failed.len().div_ceil(MOST_FAILED).max(1)) {
        is_chosen[*place] = true;
    }
    answered.sort_by(|left, right| requests[*right].first_token().total_cmp(&requests[*left].first_token()));
    for place in answered.iter().take(SLOWEST) {
        is_chosen[*place] = true;
    }
    let left = MOST_DRAWN - is_chosen.iter().filter(|chosen| **chosen).count();
    for place in (0..requests.len()).step_by(requests.len().div_ceil(left)) {
        is_chosen[place] = true;
    }
    let chosen = requests.iter().zip(is_chosen);
    chosen
        .filter_map(|(request, is_chosen)| is_chosen.then_some(request))
        .collect()
}
