//! The distribution of a latency: a histogram, and below it the cumulative share.

use maud::{Markup, html};

use super::chart::{Chart, Charts, Mark, Panel, Series, Shape, ShownAxis};
use super::number::{Axis, digits, percent, place, round_up, span, tick, whole};
use crate::stats::percentile_of_sorted;

/// From this number of values on, the lower chart shows the tail.
const MANY: usize = 1000;
/// Up to this number of values, each one is drawn.
const FEW: usize = 200;
/// Most steps of a curve; more than pixels show nothing.
const MOST_STEPS: usize = 500;
/// Most bars of the histogram.
const MOST_BINS: usize = 60;
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
    pub(super) fn figure(&self, charts: &mut Charts) -> Markup {
        let floor = self.floor();
        let below = self.sorted.partition_point(|value| *value < floor);
        html! {
            figure {
                (charts.add(&self.label(), self.chart()))
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
            on: "x",
            value: value * scale,
            text: format!("{name} {}", span(value)),
            class,
        };
        let mut marks = vec![mark("middle", "median", at(50.0)), mark("tail", "P99", at(99.0))];
        if let Some(limit) = self.objective {
            marks.push(Mark {
                on: "x",
                value: limit * scale,
                text: format!("objective: {}", self.kept(limit)),
                class: "limit",
            });
        }
        marks
    }

    fn chart(&self) -> Chart {
        let (smallest, largest) = (self.sorted[0], self.sorted[self.sorted.len() - 1]);
        let farthest = self.objective.unwrap_or(0.0).max(largest);
        let (scale, unit) = if farthest < 10.0 { (1000.0, "ms") } else { (1.0, "s") };
        let axis = if self.is_wide() {
            let lowest = self
                .objective
                .map_or(self.floor(), |limit| limit.min(self.floor()).max(farthest * 1e-5));
            Axis::logarithmic(lowest * 0.9 * scale, farthest * 1.1 * scale)
        } else {
            let margin = ((farthest - smallest) * 0.06).max(farthest * 0.002);
            Axis::linear((smallest - margin).max(0.0) * scale, (farthest + margin) * scale)
        };
        let scale_axis = if axis.is_logarithmic { ", logarithmic" } else { "" };
        let marks = self.marks(scale);
        let without_texts = marks.iter().map(|mark| Mark {
            text: String::new(),
            ..mark.clone()
        });
        let without_texts = without_texts.collect();
        let title = format!("{} by {} (in {unit}{scale_axis})", capital(self.noun), self.name);
        Chart {
            x: ShownAxis::bottom(&axis, self.name, unit),
            panels: vec![
                self.histogram(&axis, scale, title, marks),
                self.curve(&axis, scale, without_texts),
            ],
            ..Chart::default()
        }
    }

    fn histogram(&self, axis: &Axis, scale: f64, title: String, marks: Vec<Mark>) -> Panel {
        let bins: Vec<Bin> = bins(self.sorted, axis, scale, MOST_BINS);
        let most = bins.iter().map(|bin| bin.count).max().unwrap_or(1);
        let bins: Vec<Bin> = bins.into_iter().filter(|bin| bin.count > 0).collect();
        let text = |bin: &Bin| {
            format!(
                "{} from {} to {}",
                whole(bin.count),
                span(bin.from / scale),
                span(bin.to / scale)
            )
        };
        let bars = Series {
            to: bins.iter().map(|bin| bin.to).collect(),
            text: bins.iter().map(text).collect(),
            ..Series::of(
                Shape::Bars,
                self.noun,
                "area",
                bins.iter().map(|bin| (bin.from, bin.count as f64)),
            )
        };
        let mut series = vec![bars];
        if self.sorted.len() <= FEW {
            let values = self.sorted.iter().map(|value| (value * scale, 0.0));
            series.push(Series::of(Shape::Rug, "", "accent", values));
        }
        Panel {
            title,
            y: ShownAxis::left(&Axis::linear(0.0, round_up(most as f64)), self.noun, tick),
            height: [170, 130],
            marks,
            series,
        }
    }

    /// The share of values up to each size. For many values the share beyond it, so that the tail is legible.
    fn curve(&self, axis: &Axis, scale: f64, marks: Vec<Mark>) -> Panel {
        let count = self.sorted.len();
        let is_tail = count >= MANY;
        let least = 1.0 / count as f64;
        let (shares, title) = if is_tail {
            (Axis::logarithmic(least, 1.0), "Share that is longer (logarithmic)")
        } else {
            (Axis::linear(0.0, 1.0), "Share that is not longer")
        };
        let percents = |share: f64| format!("{} %", tick(share * 100.0));
        let inside = |value: f64| value.clamp(axis.from, axis.to);
        let mut points = vec![(axis.from, if is_tail { 1.0 } else { 0.0 })];
        points.extend(ranks(count, is_tail).into_iter().map(|rank| {
            let below = (rank + 1) as f64 / count as f64;
            let share = if is_tail { (1.0 - below).max(least) } else { below };
            (inside(self.sorted[rank] * scale), share)
        }));
        if !is_tail {
            points.push((axis.to, 1.0));
        }
        let mut curve = Series::of(
            Shape::Steps,
            if is_tail { "longer" } else { "not longer" },
            "accent",
            points,
        );
        curve.text = curve
            .y
            .iter()
            .map(|share| format!("{} %", digits(share * 100.0)))
            .collect();
        Panel {
            title: title.to_owned(),
            y: ShownAxis::left(&shares, "", percents),
            height: [140, 115],
            marks,
            series: vec![curve],
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

fn capital(word: &str) -> String {
    let mut characters = word.chars();
    let first = characters.next().map(|first| first.to_uppercase().to_string());
    first.unwrap_or_default() + characters.as_str()
}
