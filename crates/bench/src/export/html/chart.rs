//! Common parts of all charts: two widths, so that text is legible on a phone without a script, and the axes.

use std::fmt::{self, Write as _};

use maud::{Markup, html};

use super::number::{Axis, pixel, tick};

/// A chart is drawn twice, for a wide page and for a phone; the style sheet shows one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Size {
    Wide,
    Narrow,
}

impl Size {
    /// Width in pixels.
    pub(super) fn width(self) -> f64 {
        self.pick(960.0, 380.0)
    }

    /// The first and last horizontal pixel of the plot. The axis labels are left of it.
    pub(super) fn plot(self) -> (f64, f64) {
        (self.pick(56.0, 42.0), self.width() - self.pick(20.0, 14.0))
    }

    pub(super) fn pick<T>(self, wide: T, narrow: T) -> T {
        match self {
            Self::Wide => wide,
            Self::Narrow => narrow,
        }
    }
}

/// The commands of an SVG path. One path of many shapes is much smaller than many elements.
#[derive(Debug, Default)]
pub(super) struct Path(String);

impl Path {
    fn add(&mut self, command: fmt::Arguments<'_>) -> &mut Self {
        // Writing to a String cannot fail.
        let _ = self.0.write_fmt(command);
        self
    }

    pub(super) fn move_to(&mut self, x: f64, y: f64) -> &mut Self {
        self.add(format_args!("M{} {}", pixel(x), pixel(y)))
    }

    pub(super) fn line_to(&mut self, x: f64, y: f64) -> &mut Self {
        self.add(format_args!("L{} {}", pixel(x), pixel(y)))
    }

    pub(super) fn across_to(&mut self, x: f64) -> &mut Self {
        self.add(format_args!("H{}", pixel(x)))
    }

    pub(super) fn down_to(&mut self, y: f64) -> &mut Self {
        self.add(format_args!("V{}", pixel(y)))
    }

    pub(super) fn close(&mut self) -> &mut Self {
        self.add(format_args!("Z"))
    }

    /// A filled bar, at least 0.1 pixels wide.
    pub(super) fn bar(&mut self, (from, to): (f64, f64), y: f64, thickness: f64) {
        let width = pixel((to - from).max(0.1));
        self.move_to(from, y)
            .add(format_args!("h{width}v{}h-{width}z", pixel(thickness)));
    }

    /// A diagonal cross around a point.
    pub(super) fn cross(&mut self, (x, y): (f64, f64), arm: f64) {
        let length = pixel(2.0 * arm);
        self.move_to(x - arm, y - arm)
            .add(format_args!("l{length} {length}m-{length} 0l{length} -{length}"));
    }

    /// A line of zero length, which round line ends turn into a dot.
    pub(super) fn dot(&mut self, x: f64, y: f64) {
        self.move_to(x, y).add(format_args!("h0"));
    }

    pub(super) fn text(&self) -> &str {
        &self.0
    }
}

/// A chart in both widths. `label` describes it for screen readers; `draw` returns the height in pixels and the
/// picture.
pub(super) fn chart(class: &str, label: &str, draw: impl Fn(Size) -> (f64, Markup)) -> Markup {
    html! {
        @for (size, name) in [(Size::Wide, "wide"), (Size::Narrow, "narrow")] {
            @let (height, picture) = draw(size);
            svg class={ "chart " (name) " " (class) } role="img" aria-label=(label)
                viewBox={ "0 0 " (pixel(size.width())) " " (pixel(height)) } { (picture) }
        }
    }
}

/// The bottom axis: a grid line at each tick, and its number below. The last number has the unit.
pub(super) fn bottom_axis(axis: &Axis, size: Size, (top, bottom): (f64, f64), unit: &str) -> Markup {
    let ticks = axis.ticks(size.pick(10, 4));
    html! {
        (down_lines(axis, size, (top, bottom)))
        @for (place, value) in ticks.iter().enumerate() {
            @let is_last = place + 1 == ticks.len();
            text.number x=(pixel(axis.at(*value))) y=(pixel(bottom + 17.0)) text-anchor="middle" {
                (tick(*value)) @if is_last { " " (unit) }
            }
        }
    }
}

/// The grid lines of the bottom axis without numbers, for an upper panel.
pub(super) fn down_lines(axis: &Axis, size: Size, (top, bottom): (f64, f64)) -> Markup {
    let mut lines = Path::default();
    for value in axis.ticks(size.pick(10, 4)) {
        lines.move_to(axis.at(value), top).down_to(bottom);
    }
    html! { path.grid d=(lines.text()) {} }
}

/// The left axis: a grid line at each tick, and its number at the left.
pub(super) fn left_axis(axis: &Axis, size: Size, about: usize, text: impl Fn(f64) -> String) -> Markup {
    let (left, right) = size.plot();
    html! {
        @for value in axis.ticks(about) {
            @let y = axis.at(value);
            path.(if value == 0.0 { "base" } else { "grid" }) d={ "M" (pixel(left)) " " (pixel(y)) "H" (pixel(right)) } {}
            text.number x=(pixel(left - 7.0)) y=(pixel(y + 4.0)) text-anchor="end" { (text(value)) }
        }
    }
}

/// The title of a panel, above its left end.
pub(super) fn panel_name(y: f64, name: &str) -> Markup {
    html! { text.panel x="0" y=(pixel(y)) { (name) } }
}

/// A marked value: a vertical line through the panels, with a label at its upper end.
#[derive(Debug)]
pub(super) struct Mark {
    pub(super) value: f64,
    pub(super) text: String,
    /// `middle`, `tail` or `limit`.
    pub(super) class: &'static str,
}

/// Height of a mark's label.
pub(super) const MARK_HEIGHT: f64 = 17.0;

/// Draws marks, each with its label in a row of its own, so that labels do not overlap.
pub(super) fn marks(marks: &[Mark], axis: &Axis, top: f64, bottom: f64) -> Markup {
    let y = |place: usize| top + place as f64 * MARK_HEIGHT;
    html! {
        @for (place, mark) in marks.iter().enumerate() {
            path class={ "mark " (mark.class) } d={ "M" (pixel(axis.at(mark.value))) " " (pixel(y(place) + 2.0)) "V" (pixel(bottom)) } {}
        }
        // After all lines, so that no line crosses a label.
        @for (place, mark) in marks.iter().enumerate() {
            @let (x, anchor) = beside(axis.at(mark.value), &mark.text, axis.pixels());
            text class={ "name " (mark.class) } x=(pixel(x)) y=(pixel(y(place) + 12.0)) text-anchor=(anchor) { (mark.text) }
        }
    }
}

/// The position of a label: right of its line, else left of it, else at the right end.
fn beside(line: f64, text: &str, (left, right): (f64, f64)) -> (f64, &'static str) {
    const GAP: f64 = 6.0;
    // The width of letters of 12 pixels.
    let width = text.chars().count() as f64 * 6.6;
    if line + GAP + width <= right {
        (line + GAP, "start")
    } else if line - GAP - width >= left {
        (line - GAP, "end")
    } else {
        (right, "end")
    }
}
