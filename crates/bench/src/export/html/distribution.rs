//! The distribution of a latency: a histogram, and below it the cumulative share.

use maud::{Markup, html};

use super::chart::{MARK_HEIGHT, Mark, Path, Size, bottom_axis, chart, down_lines, left_axis, marks, panel_name};
use super::number::{Axis, percent, pixel, place, round_up, span, tick, whole};
use crate::stats::percentile_of_sorted;

/// From this number of values on, the lower chart shows the tail.
const MANY: usize = 1000;
/// Up to this number of values, each one is drawn.
const FEW: usize = 200;
/// Most steps of a curve; more than pixels show nothing.
const MOST_STEPS: usize = 500;
/// From this ratio of the largest to the smallest value on, the axis is logarithmic.
const WIDE_RANGE: f64 = 10.0;
/// Values below this share of the median are drawn at the lower end of a logarithmic axis. Chunks that were read
/// together have gaps of microseconds, which would take most of the picture.
const LOWEST_SHARE: f64 = 0.1;

/// The data of the chart.
#[derive(Debug)]
pub(super) struct LatencyDistribution<'a> {
    /// `TTFT`.
    pub(super) name: &'a str,
    /// What has one value each: `requests`.
    pub(super) noun: &'a str,
    /// Values in seconds, ascending, at least one.
    pub(super) sorted: &'a [f64],
    /// The objective in seconds.
    pub(super) objective: Option<f64>,
}

/// A bar of the histogram.
#[derive(Debug)]
struct Bin {
    from: f64,
    to: f64,
    count: usize,
}

impl LatencyDistribution<'_> {
    pub(super) fn figure(&self) -> Markup {
        let floor = self.floor();
        let below = self.sorted.partition_point(|value| *value < floor);
        html! {
            figure {
                (chart("spread", &self.label(), |size| self.draw(size)))
                @if self.is_wide() && below > 0 {
                    figcaption { (whole(below)) " of " (whole(self.sorted.len())) " " (self.noun) " are under " (span(floor)) " and are drawn \
                        at the left end." }
                }
            }
        }
    }

    /// The lowest value of a logarithmic axis.
    fn floor(&self) -> f64 {
        self.sorted[0].max(percentile_of_sorted(self.sorted, 50.0) * LOWEST_SHARE)
    }

    fn is_wide(&self) -> bool {
        self.sorted[self.sorted.len() - 1] > self.floor() * WIDE_RANGE
    }

    /// The description for screen readers.
    fn label(&self) -> String {
        let at = |percentile| span(percentile_of_sorted(self.sorted, percentile));
        let objective = self.objective.map(|limit| format!(", {}", self.kept(limit)));
        format!(
            "{} of {} {}: from {} to {}, median {}, P99 {}{}",
            self.name,
            whole(self.sorted.len()),
            self.noun,
            at(0.0),
            at(100.0),
            at(50.0),
            at(99.0),
            objective.unwrap_or_default()
        )
    }

    fn kept(&self, limit: f64) -> String {
        let kept = self.sorted.partition_point(|value| *value <= limit);
        format!("{} within {}", percent(kept, self.sorted.len()), span(limit))
    }

    fn marks(&self, scale: f64) -> Vec<Mark> {
        let at = |percentile| percentile_of_sorted(self.sorted, percentile);
        let mark = |class, name: &str, value: f64| Mark {
            value: value * scale,
            text: format!("{name} {}", span(value)),
            class,
        };
        let mut marks = vec![mark("middle", "median", at(50.0)), mark("tail", "P99", at(99.0))];
        if let Some(limit) = self.objective {
            marks.push(Mark {
                value: limit * scale,
                text: format!("objective: {}", self.kept(limit)),
                class: "limit",
            });
        }
        marks
    }

    fn draw(&self, size: Size) -> (f64, Markup) {
        let (smallest, largest) = (self.sorted[0], self.sorted[self.sorted.len() - 1]);
        let farthest = self.objective.unwrap_or(0.0).max(largest);
        let (scale, unit) = if farthest < 10.0 { (1000.0, "ms") } else { (1.0, "s") };
        let axis = if self.is_wide() {
            let lowest = self
                .objective
                .map_or(self.floor(), |limit| limit.min(self.floor()).max(farthest * 1e-5));
            Axis::logarithmic((lowest * 0.9 * scale, farthest * 1.1 * scale), size.plot())
        } else {
            let margin = ((farthest - smallest) * 0.06).max(farthest * 0.002);
            Axis::linear(
                ((smallest - margin).max(0.0) * scale, (farthest + margin) * scale),
                size.plot(),
            )
        };
        let named = self.marks(scale);
        let names = MARK_HEIGHT * named.len() as f64;
        let upper = (34.0 + names, 34.0 + names + size.pick(150.0, 120.0));
        let lower = (upper.1 + 46.0, upper.1 + 46.0 + size.pick(130.0, 110.0));
        let scale_axis = if axis.is_logarithmic { ", logarithmic" } else { "" };
        let is_tail = self.sorted.len() >= MANY;
        let curve_name = if is_tail {
            "Share that is longer (logarithmic)"
        } else {
            "Share that is not longer"
        };
        let picture = html! {
            (self.histogram(&axis, size, upper, scale))
            (self.curve(&axis, size, lower, scale))
            (bottom_axis(&axis, size, lower, unit))
            (marks(&named, &axis, 22.0, lower.1))
            // Last, because a mark can cross them.
            (panel_name(12.0, &format!("{} by {} (in {unit}{scale_axis})", capital(self.noun), self.name)))
            (panel_name(lower.0 - 12.0, curve_name))
        };
        (lower.1 + 24.0, picture)
    }

    fn histogram(&self, axis: &Axis, size: Size, (top, bottom): (f64, f64), scale: f64) -> Markup {
        let bins = bins(self.sorted, axis, scale, size.pick(60, 30));
        let most = bins.iter().map(|bin| bin.count).max().unwrap_or(1);
        let height = Axis::linear((0.0, round_up(most as f64)), (bottom, top));
        html! {
            (down_lines(axis, size, (top, bottom)))
            (left_axis(&height, size, 4, tick))
            @for bin in bins.iter().filter(|bin| bin.count > 0) {
                @let (from, to) = (axis.at(bin.from), axis.at(bin.to));
                // The smallest bar is visible, so that one slow request among thousands is seen.
                @let y = height.at(bin.count as f64).min(bottom - 1.5);
                rect.bar x=(pixel(from)) y=(pixel(y)) width=(pixel((to - from - 1.0).max(1.0))) height=(pixel(bottom - y)) {
                    title { (whole(bin.count)) " from " (span(bin.from / scale)) " to " (span(bin.to / scale)) }
                }
            }
            @if self.sorted.len() <= FEW {
                path.rug d=(rug(self.sorted, axis, bottom, scale).text()) {}
            }
        }
    }

    /// The share of values up to each size. For many values the share beyond it, so that the tail is legible.
    fn curve(&self, axis: &Axis, size: Size, (top, bottom): (f64, f64), scale: f64) -> Markup {
        let count = self.sorted.len();
        let is_tail = count >= MANY;
        let shares = if is_tail {
            Axis::logarithmic((1.0 / count as f64, 1.0), (bottom, top))
        } else {
            Axis::linear((0.0, 1.0), (bottom, top))
        };
        let mut path = Path::default();
        path.move_to(axis.at(0.0), if is_tail { top } else { bottom });
        for rank in ranks(count, is_tail) {
            let below = (rank + 1) as f64 / count as f64;
            let share = if is_tail { 1.0 - below } else { below };
            path.across_to(axis.at(self.sorted[rank] * scale))
                .down_to(shares.at(share));
        }
        if !is_tail {
            path.across_to(size.plot().1);
        }
        html! {
            (left_axis(&shares, size, 4, |share| format!("{} %", tick(share * 100.0))))
            path.curve d=(path.text()) {}
        }
    }
}

/// The ranks to draw: all of them, or a selection that is even in the share.
fn ranks(count: usize, is_tail: bool) -> Vec<usize> {
    if count <= MOST_STEPS {
        return (0..count).collect();
    }
    let last = count - 1;
    let rank = |step: usize| {
        let share = step as f64 / MOST_STEPS as f64;
        let from_end = if is_tail {
            (count as f64).powf(1.0 - share) - 1.0
        } else {
            last as f64 * (1.0 - share)
        };
        last - place(from_end.round()).min(last)
    };
    let mut ranks: Vec<usize> = (0..=MOST_STEPS).map(rank).collect();
    ranks.dedup();
    ranks
}

/// Bins of equal width on the axis; their number by the rule of Freedman and Diaconis.
fn bins(sorted: &[f64], axis: &Axis, scale: f64, most: usize) -> Vec<Bin> {
    let share = |value: f64| axis.share(value * scale);
    let at = |percentile| share(percentile_of_sorted(sorted, percentile));
    let step = 2.0 * (at(75.0) - at(25.0)) / (sorted.len() as f64).cbrt();
    let wanted = if step > 0.0 { 1.0 / step } else { most as f64 };
    let count = place(wanted.ceil()).clamp(12, most);
    let mut bins: Vec<Bin> = (0..count)
        .map(|step| Bin {
            from: axis.value(step as f64 / count as f64),
            to: axis.value((step + 1) as f64 / count as f64),
            count: 0,
        })
        .collect();
    for value in sorted {
        bins[place(share(*value) * count as f64).min(count - 1)].count += 1;
    }
    bins
}

/// A short line for each value.
fn rug(sorted: &[f64], axis: &Axis, bottom: f64, scale: f64) -> Path {
    let mut path = Path::default();
    for value in sorted {
        path.move_to(axis.at(value * scale), bottom + 2.0).down_to(bottom + 7.0);
    }
    path
}

fn capital(word: &str) -> String {
    let mut characters = word.chars();
    let first = characters.next().map(|first| first.to_uppercase().to_string());
    first.unwrap_or_default() + characters.as_str()
}
