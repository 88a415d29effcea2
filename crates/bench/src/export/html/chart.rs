//! The charts of the page as data. `web/charts.js` draws them; every number, tick and text of a chart is decided here.

use maud::{Markup, PreEscaped, html};
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::number::{Axis, tick};
use xpyd_base::web;

/// The charts of a page, in its order.
#[derive(Debug, Default)]
pub(super) struct Charts(Vec<Value>);

impl Charts {
    /// Adds a chart and returns its place in the page. `label` describes it to screen readers, and to readers without
    /// JavaScript.
    pub(super) fn add(&mut self, label: &str, chart: impl Serialize) -> Markup {
        self.0.push(json!(chart));
        html! {
            div.chart role="img" aria-label=(label) data-chart=(self.0.len() - 1) {
                noscript { p.note { "The chart needs JavaScript. " (label.trim_end_matches('.')) "." } }
            }
        }
    }

    /// The data of all charts, for the script.
    pub(super) fn data(&self) -> Markup {
        html! { @if !self.0.is_empty() { script #chart-data type="application/json" { (PreEscaped(web::chart_data(&self.0))) } } }
    }
}

/// Panels above each other with one horizontal axis.
#[derive(Debug, Default, Serialize)]
pub(super) struct Chart {
    pub(super) x: ShownAxis,
    pub(super) panels: Vec<Panel>,
    /// Pixels right of the plot, for a wide and a narrow chart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) right: Option<[u16; 2]>,
    /// The greatest width of a column in pixels, if the horizontal axis counts columns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pitch: Option<u16>,
    /// The names of columns.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) columns: Vec<String>,
}

/// An axis with its ticks.
#[derive(Debug, Default, Serialize)]
pub(super) struct ShownAxis {
    #[serde(serialize_with = "rounded")]
    min: f64,
    #[serde(serialize_with = "rounded")]
    max: f64,
    log: bool,
    /// The first row is at the top.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    flip: bool,
    /// What the axis shows, for the box beside the pointer.
    name: String,
    unit: String,
    /// Value and text of each tick, for a wide and a narrow chart.
    pub(super) ticks: Vec<Vec<(f64, String)>>,
}

impl ShownAxis {
    /// A horizontal axis. The last tick has the unit.
    pub(super) fn bottom(axis: &Axis, name: &str, unit: &str) -> Self {
        let ticks = [10, 4].map(|about| {
            let mut ticks: Vec<(f64, String)> = axis
                .ticks(about)
                .into_iter()
                .map(|value| (value, tick(value)))
                .collect();
            if let Some((_, text)) = ticks.last_mut() {
                *text = format!("{text} {unit}");
            }
            ticks
        });
        Self::with_ticks(axis, name, unit, ticks.into())
    }

    /// A vertical axis.
    pub(super) fn left(axis: &Axis, unit: &str, text: impl Fn(f64) -> String) -> Self {
        let ticks = axis.ticks(4).into_iter().map(|value| (value, text(value))).collect();
        Self::with_ticks(axis, "", unit, vec![ticks])
    }

    /// A horizontal axis of columns, with a few of their names.
    pub(super) fn columns(names: &[String]) -> Self {
        let ticks = [16, 6].map(|most| {
            let stride = names.len().div_ceil(most).max(1);
            let named = names.iter().enumerate().step_by(stride);
            named.map(|(place, name)| (place as f64 + 0.5, name.clone())).collect()
        });
        Self::with_ticks(&Axis::linear(0.0, names.len() as f64), "", "", ticks.into())
    }

    /// A vertical axis of named rows, the first at the top.
    pub(super) fn rows<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        let ticks: Vec<(f64, String)> = names
            .enumerate()
            .map(|(place, name)| (place as f64 + 0.5, name.to_owned()))
            .collect();
        let axis = Axis::linear(0.0, ticks.len().max(1) as f64);
        Self {
            flip: true,
            ..Self::with_ticks(&axis, "", "", vec![ticks])
        }
    }

    fn with_ticks(axis: &Axis, name: &str, unit: &str, ticks: Vec<Vec<(f64, String)>>) -> Self {
        Self {
            min: axis.from,
            max: axis.to,
            log: axis.is_logarithmic,
            flip: false,
            name: name.to_owned(),
            unit: unit.to_owned(),
            ticks,
        }
    }
}

/// One panel of a chart.
#[derive(Debug, Default, Serialize)]
pub(super) struct Panel {
    pub(super) title: String,
    pub(super) y: ShownAxis,
    /// Height in pixels, for a wide and a narrow chart.
    pub(super) height: [u16; 2],
    pub(super) marks: Vec<Mark>,
    pub(super) series: Vec<Series>,
}

/// A marked value: a line through the panel, with a label if it has a text.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Mark {
    /// `x` or `y`, the axis of the value.
    pub(super) on: &'static str,
    #[serde(serialize_with = "rounded")]
    pub(super) value: f64,
    pub(super) text: String,
    /// `middle`, `tail` or `limit`.
    pub(super) class: &'static str,
}

impl Mark {
    /// The horizontal line of an objective.
    pub(super) fn limit(value: f64, text: String) -> Self {
        Self {
            on: "y",
            value,
            text,
            class: "limit",
        }
    }
}

/// How a series is drawn.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Shape {
    /// A line from point to point, which ascend in x.
    #[default]
    Line,
    /// A line that keeps each value up to the next point.
    Steps,
    /// The area below such a line.
    Area,
    /// Bars from `x` to `to`, and from `base`, or 0, to `y`.
    Bars,
    Dots,
    Crosses,
    /// Horizontal lines from `x` to `to`.
    Intervals,
    /// Short lines below the axis.
    Rug,
}

/// One series of a panel. A series with a name is in the box beside the pointer.
#[derive(Debug, Default, Serialize)]
pub(super) struct Series {
    pub(super) kind: Shape,
    pub(super) name: String,
    /// The name of its colour or style.
    pub(super) class: &'static str,
    #[serde(serialize_with = "all_rounded")]
    pub(super) x: Vec<f64>,
    #[serde(serialize_with = "all_rounded")]
    pub(super) y: Vec<f64>,
    #[serde(serialize_with = "all_rounded", skip_serializing_if = "Vec::is_empty")]
    pub(super) to: Vec<f64>,
    #[serde(serialize_with = "all_rounded", skip_serializing_if = "Vec::is_empty")]
    pub(super) base: Vec<f64>,
    /// What the box says of each point; without it, the value and the unit of the axis.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) text: Vec<String>,
    /// Whether the name is also at the end of the line.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) end: bool,
}

impl Series {
    /// A series of points. Of a line, points at one place become the last of them.
    pub(super) fn of(
        kind: Shape,
        name: &str,
        class: &'static str,
        points: impl IntoIterator<Item = (f64, f64)>,
    ) -> Self {
        let mut series = Self {
            kind,
            name: name.to_owned(),
            class,
            ..Self::default()
        };
        let is_line = matches!(kind, Shape::Line | Shape::Steps | Shape::Area);
        for (x, y) in points {
            let (x, y) = (significant(x), significant(y));
            match (series.x.last(), series.y.last_mut()) {
                (Some(last), Some(value)) if is_line && x <= *last => *value = y,
                _ => {
                    series.x.push(x);
                    series.y.push(y);
                }
            }
        }
        series
    }
}

/// A number with six significant digits, which is finer than a pixel and keeps pages small.
fn significant(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(0.0)
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn rounded<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(significant(*value))
}

fn all_rounded<S: Serializer>(values: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(values.iter().map(|value| significant(*value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_ascend_and_other_series_keep_every_point() {
        let points = [(0.0, 1.0), (1.0, 2.0), (1.0, 3.0), (2.0, 0.123_456_789)];
        let line = Series::of(Shape::Steps, "", "", points);
        assert_eq!((line.x, line.y), (vec![0.0, 1.0, 2.0], vec![1.0, 3.0, 0.123_457]));
        assert_eq!(Series::of(Shape::Dots, "", "", points).x.len(), 4);
    }

    #[test]
    fn axes_have_fewer_ticks_on_a_narrow_chart_and_a_unit_at_the_last() {
        let axis = ShownAxis::bottom(&Axis::logarithmic(1.0, 100.0), "TTFT", "ms");
        let texts = |place: usize| {
            axis.ticks[place]
                .iter()
                .map(|(_, text)| text.as_str())
                .collect::<Vec<_>>()
        };
        assert_eq!(texts(0), ["1", "2", "5", "10", "20", "50", "100 ms"]);
        assert_eq!(texts(1), ["1", "3", "10", "30", "100 ms"]);
        let names: Vec<String> = (0..40).map(|number| number.to_string()).collect();
        let columns = ShownAxis::columns(&names);
        assert_eq!(columns.ticks.iter().map(Vec::len).collect::<Vec<_>>(), [14, 6]);
    }
}
