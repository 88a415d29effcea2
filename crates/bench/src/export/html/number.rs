//! Number formats for people, and the ranges and ticks of chart axes. Pure.

/// A finite number; anything else becomes 0.
pub(super) fn finite(value: f64) -> f64 {
    if value.is_finite() { value } else { 0.0 }
}

/// The whole part of a non-negative number, as an index.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "negative numbers and those that are none become 0, and the callers bound the rest"
)]
pub(super) fn place(value: f64) -> usize {
    value as usize
}

/// A duration in a suitable unit with three digits: `0.42 ms`, `303 ms`, `2.10 s`.
pub(super) fn span(seconds: f64) -> String {
    let milliseconds = seconds * 1000.0;
    if seconds >= 600.0 {
        format!("{:.0} min", seconds / 60.0)
    } else if milliseconds >= 999.5 {
        format!("{} s", digits(seconds))
    } else {
        format!("{} ms", digits(milliseconds))
    }
}

/// At least three significant digits: `0.42`, `9.00`, `30.3`, `303`, `12 345`.
pub(super) fn digits(value: f64) -> String {
    match value.abs() {
        small if small < 9.995 => format!("{value:.2}"),
        some if some < 99.95 => format!("{value:.1}"),
        _ => grouped(&format!("{value:.0}")),
    }
}

/// A whole number with grouped thousands: `12 345`, with a non-breaking space.
pub(super) fn whole(value: impl std::fmt::Display) -> String {
    grouped(&value.to_string())
}

/// Two decimals as in vLLM's table, with grouped thousands.
pub(super) fn hundredths(value: f64) -> String {
    let text = format!("{value:.2}");
    let (whole, fraction) = text.split_once('.').unwrap_or((&text, "00"));
    format!("{}.{fraction}", grouped(whole))
}

/// A share as a percentage; 100 % and 0 % only if exact.
pub(super) fn percent(part: usize, whole: usize) -> String {
    let share = part as f64 / whole.max(1) as f64 * 100.0;
    if part == 0 || part == whole {
        format!("{share:.0} %")
    } else {
        format!("{:.1} %", share.clamp(0.1, 99.9))
    }
}

fn grouped(digits: &str) -> String {
    const NARROW_SPACE: char = '\u{202f}';
    let (sign, digits) = digits.strip_prefix('-').map_or(("", digits), |digits| ("-", digits));
    if digits.len() <= 4 {
        return format!("{sign}{digits}");
    }
    let mut text = sign.to_owned();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(NARROW_SPACE);
        }
        text.push(digit);
    }
    text
}

/// The range of a chart's axis.
#[derive(Debug, Clone, Copy)]
pub(super) struct Axis {
    pub(super) from: f64,
    pub(super) to: f64,
    pub(super) is_logarithmic: bool,
}

impl Axis {
    /// A linear axis. Equal ends are made different.
    pub(super) fn linear(from: f64, to: f64) -> Self {
        // In proportion, so that six digits still tell the ends apart.
        let to = if to > from {
            to
        } else {
            from + (from.abs() * 1e-3).max(1e-6)
        };
        Self {
            from,
            to,
            is_logarithmic: false,
        }
    }

    /// A logarithmic axis for positive values.
    pub(super) fn logarithmic(from: f64, to: f64) -> Self {
        Self {
            is_logarithmic: true,
            ..Self::linear(from.max(1e-9), to.max(from.max(1e-9) * 1.01))
        }
    }

    /// The value at a fraction of the axis, 0 to 1.
    pub(super) fn value(&self, share: f64) -> f64 {
        if self.is_logarithmic {
            self.from * (self.to / self.from).powf(share)
        } else {
            self.from + share * (self.to - self.from)
        }
    }

    /// The fraction of the axis at a value, from 0 to 1, also for values beyond the ends.
    pub(super) fn share(&self, value: f64) -> f64 {
        let share = if self.is_logarithmic {
            (value.max(self.from) / self.from).ln() / (self.to / self.from).ln()
        } else {
            (value - self.from) / (self.to - self.from)
        };
        share.clamp(0.0, 1.0)
    }

    /// About `about` round values within the axis.
    pub(super) fn ticks(&self, about: usize) -> Vec<f64> {
        if self.is_logarithmic {
            self.logarithmic_ticks(about)
        } else {
            let step = round_step((self.to - self.from) / about.max(1) as f64);
            let first = (self.from / step).ceil();
            let last = (self.to / step + 1e-9).floor();
            (0..=40)
                .map(|count| first + f64::from(count))
                .take_while(|count| *count <= last)
                .map(|count| count * step)
                .collect()
        }
    }

    fn logarithmic_ticks(&self, about: usize) -> Vec<f64> {
        let decades = (self.to / self.from).log10();
        let within = |value: &f64| *value >= self.from * 0.999 && *value <= self.to * 1.001;
        // Fewer per decade until they fit.
        let choices: [&[f64]; 3] = [&[1.0, 2.0, 5.0], &[1.0, 3.0], &[1.0]];
        let per_decade = choices
            .into_iter()
            .find(|choice| choice.len() as f64 * decades <= about as f64 + 1.5)
            .unwrap_or(choices[2]);
        let first = self.from.log10().floor();
        let decades = (0..=16).map(|count| 10f64.powf(first + f64::from(count)));
        decades
            .flat_map(|decade| per_decade.iter().map(move |factor| factor * decade))
            .filter(within)
            .collect()
    }
}

/// The next larger of 1, 2 and 5 times a power of ten.
pub(super) fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.max(1e-12).log10().floor());
    let factor = [1.0, 2.0, 5.0]
        .into_iter()
        .find(|factor| factor * power >= step * 0.999);
    factor.unwrap_or(10.0) * power
}

/// The next larger round value, so that the axis ends at a tick.
pub(super) fn round_up(value: f64) -> f64 {
    let step = round_step(value / 4.0);
    (value / step - 1e-9).ceil() * step
}

/// Short text for a tick, without trailing zeros.
pub(super) fn tick(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    if value.abs() >= 9_999.5 {
        return format!("{}k", trimmed(&format!("{:.2}", value / 1000.0)));
    }
    // Enough digits for steps of 1 % of the value.
    trimmed(&format!("{value:.4}"))
}

fn trimmed(text: &str) -> String {
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_digits_that_say_something() {
        let spans = [0.00042, 0.009, 0.0303, 0.303, 0.9999, 2.1, 75.0, 1200.0].map(span);
        assert_eq!(
            spans,
            [
                "0.42 ms", "9.00 ms", "30.3 ms", "303 ms", "1.00 s", "2.10 s", "75.0 s", "20 min"
            ]
        );
        assert_eq!(
            (whole(12_345_678_u64).as_str(), hundredths(-12_345.678).as_str()),
            ("12\u{202f}345\u{202f}678", "-12\u{202f}345.68")
        );
        assert_eq!([tick(0.005), tick(20.0), tick(25_000.0)], ["0.005", "20", "25k"]);
    }

    #[test]
    fn nearly_all_is_not_all() {
        assert_eq!(percent(3000, 3000), "100 %");
        assert_eq!(percent(2999, 3000), "99.9 %");
        assert_eq!(percent(1, 30_000), "0.1 %");
    }

    #[test]
    fn an_axis_puts_values_where_they_belong_and_keeps_others_inside() {
        let linear = Axis::linear(0.0, 10.0);
        assert_eq!(
            [5.0, -3.0, 99.0].map(|value| linear.share(value).to_string()),
            ["0.5", "0", "1"]
        );
        let logarithmic = Axis::logarithmic(1.0, 100.0);
        assert_eq!(
            [10.0, 0.0, 1e9].map(|value| logarithmic.share(value).to_string()),
            ["0.5", "0", "1"]
        );
        let ticks = |axis: &Axis, about| axis.ticks(about).into_iter().map(tick).collect::<Vec<_>>().join(" ");
        assert_eq!(ticks(&logarithmic, 6), "1 2 5 10 20 50 100");
        assert_eq!(ticks(&logarithmic, 2), "1 10 100");
        assert_eq!(ticks(&linear, 5), "0 2 4 6 8 10");
    }

    #[test]
    fn an_axis_of_one_value_still_has_a_length() {
        let axis = Axis::linear(3.0, 3.0);
        assert!(axis.share(3.0).is_finite() && axis.ticks(4).len() < 50);
        assert!(Axis::logarithmic(0.0, 0.0).share(0.0).is_finite());
    }
}
