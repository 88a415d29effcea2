//! The run over time: tokens per second, requests at the server, and time to first token, on one time axis.

use maud::Markup;

use super::chart::{Chart, Charts, Mark, Panel, Series, Shape, ShownAxis};
use super::number::{Axis, digits, place, round_step, round_up, span, tick};
use super::run::Run;

/// Most dots; more would overlap.
const MOST_DOTS: usize = 3000;
/// Up to this number, dots are large.
const FEW_DOTS: usize = 300;
/// Approximate number of throughput bars.
const ABOUT_BARS: f64 = 120.0;
/// Most points of the line of requests at the server.
const MOST_POINTS: usize = 400;

/// The data of the chart.
#[derive(Debug)]
struct OverTime {
    /// Length of the run, in seconds since the first release.
    length: f64,
    /// Length of a bar in seconds.
    step: f64,
    /// Tokens of each bar.
    tokens: Vec<f64>,
    /// Requests at the server from a time on.
    in_flight: Vec<(f64, usize)>,
}

pub(super) fn chart(run: &Run, charts: &mut Charts) -> Markup {
    let over_time = OverTime::of(run);
    let most_tokens = over_time.tokens.iter().copied().fold(0.0, f64::max) / over_time.step;
    let most_requests = over_time.in_flight.iter().map(|(_, count)| *count).max().unwrap_or(0);
    let label = format!(
        "Over the {} of the run: at most {} output tokens per second, at most {most_requests} requests at the server",
        span(over_time.length),
        digits(most_tokens),
    );
    let axis = Axis::linear(0.0, over_time.length);
    let chart = Chart {
        x: ShownAxis::bottom(&axis, "at", "s"),
        panels: vec![over_time.tokens(), over_time.in_flight(), first_tokens(run)],
        ..Chart::default()
    };
    charts.add(&label, chart)
}

impl OverTime {
    fn of(run: &Run) -> Self {
        let ends = run.answered().map(|(request, timing)| request.started + timing.end());
        let starts = run.requests.iter().map(|request| request.started);
        let length = ends.chain(starts).fold(0.0, f64::max).max(1e-3);
        let step = round_step(length / ABOUT_BARS);
        let mut tokens = vec![0.0; place(length / step) + 1];
        let mut changes: Vec<(f64, isize)> = Vec::new();
        for (request, timing) in run.answered() {
            changes.extend([(request.started, 1), (request.started + timing.end(), -1)]);
            // A chunk can have several tokens: each chunk counts as an equal share of the answer.
            let chunks = timing.gaps.len() + 1;
            let each = request.output_tokens.max(1) as f64 / chunks as f64;
            let mut instant = request.started + timing.first_token;
            for gap in [0.0].iter().chain(&timing.gaps) {
                instant += gap;
                let bar = place(instant / step).min(tokens.len() - 1);
                tokens[bar] += each;
            }
        }
        changes.sort_unstable_by(|left, right| left.0.total_cmp(&right.0));
        Self {
            length,
            step,
            tokens,
            in_flight: thinned(&running(&changes), length),
        }
    }

    fn tokens(&self) -> Panel {
        let rates = || self.tokens.iter().map(|tokens| tokens / self.step);
        let most = round_up(rates().fold(1.0, f64::max));
        let mut points: Vec<(f64, f64)> = rates()
            .enumerate()
            .map(|(place, rate)| ((place as f64 * self.step).min(self.length), rate))
            .collect();
        points.extend(points.last().map(|(_, rate)| (self.length, *rate)));
        let title = format!("Output tokens per second, in steps of {} s", tick(self.step));
        let y = ShownAxis::left(&Axis::linear(0.0, most), "tok/s", tick);
        panel(title, y, vec![Series::of(Shape::Area, "output", "area", points)])
    }

    fn in_flight(&self) -> Panel {
        let most = self.in_flight.iter().map(|(_, count)| *count).max().unwrap_or(1);
        let counts = self.in_flight.iter().map(|(instant, count)| (*instant, *count as f64));
        let points = [(0.0, 0.0)].into_iter().chain(counts);
        let y = ShownAxis::left(&Axis::linear(0.0, round_up(most.max(1) as f64)), "", tick);
        let line = Series::of(Shape::Steps, "requests", "accent", points);
        panel("Requests at the server".to_owned(), y, vec![line])
    }
}

fn panel(title: String, y: ShownAxis, series: Vec<Series>) -> Panel {
    Panel {
        title,
        y,
        height: [130, 105],
        marks: Vec::new(),
        series,
    }
}

/// One dot per request at its send time and time to first token; a cross at the bottom for a failed request.
fn first_tokens(run: &Run) -> Panel {
    let most = run.answered().map(|(_, timing)| timing.first_token).fold(0.0, f64::max);
    let most = run.objective("ttft").map_or(most, |limit| most.max(limit));
    let (scale, unit) = if most < 10.0 { (1000.0, "ms") } else { (1.0, "s") };
    let stride = run.requests.len().div_ceil(MOST_DOTS).max(1);
    let answered = run.answered().step_by(stride);
    let dots = answered.map(|(request, timing)| (request.started, timing.first_token * scale));
    let class = if run.requests.len() <= FEW_DOTS { "few" } else { "" };
    let failed = run.requests.iter().filter(|request| request.result.is_err());
    let crosses = failed.take(MOST_DOTS).map(|request| (request.started, 0.0));
    let failures = Series::of(Shape::Crosses, "", "bad", crosses);
    let title = format!("Time to first token by when a request was sent (in {unit})");
    let y = ShownAxis::left(&Axis::linear(0.0, round_up((most * scale).max(1e-3))), unit, tick);
    let limit = run
        .objective("ttft")
        .map(|limit| Mark::limit(limit * scale, "objective".to_owned()));
    Panel {
        marks: limit.into_iter().collect(),
        ..panel(title, y, vec![Series::of(Shape::Dots, "TTFT", class, dots), failures])
    }
}

/// The number of running requests after each change.
fn running(changes: &[(f64, isize)]) -> Vec<(f64, usize)> {
    let mut count = 0;
    let counted = changes.iter().map(|(instant, change)| {
        count += change;
        (*instant, usize::try_from(count).unwrap_or(0))
    });
    counted.collect()
}

/// At most [`MOST_POINTS`] points: the highest within each time step.
fn thinned(points: &[(f64, usize)], length: f64) -> Vec<(f64, usize)> {
    if points.len() <= MOST_POINTS {
        return points.to_vec();
    }
    let step = length / MOST_POINTS as f64;
    let mut thinned: Vec<(f64, usize)> = Vec::with_capacity(MOST_POINTS + 1);
    for (instant, count) in points {
        let start = (instant / step).floor() * step;
        match thinned.last_mut() {
            Some(last) if last.0 >= start => last.1 = last.1.max(*count),
            _ => thinned.push((start, *count)),
        }
    }
    // The last change is the end of the last request.
    thinned.extend(points.last());
    thinned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_line_keeps_its_peaks_and_its_end() {
        let mut changes = Vec::new();
        for request in 0..1000 {
            changes.extend([(f64::from(request), 1), (f64::from(request) + 0.5, -1)]);
        }
        changes.extend([(400.1, 7), (400.2, -7)]);
        changes.sort_unstable_by(|left: &(f64, isize), right| left.0.total_cmp(&right.0));
        let points = thinned(&running(&changes), 1000.0);
        assert!(points.len() <= MOST_POINTS + 2);
        assert_eq!(points.iter().map(|(_, count)| *count).max(), Some(8));
        assert_eq!(points.last(), Some(&(999.5, 0)));
    }
}
