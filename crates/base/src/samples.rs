//! Samples of a metrics page, in Prometheus' text format (version 0.0.4) or in `OpenMetrics`. PURE.

use std::borrow::Cow;
use std::collections::BTreeMap;

/// The sum of all samples with this name, and with this label (`name="value"`) if one is given. 0 if there are none. Reads the text
/// format only.
pub fn sum(page: &str, name: &str, label: Option<&str>) -> f64 {
    let samples = page
        .lines()
        .filter(|line| line.starts_with(name))
        .filter_map(Sample::read);
    let counted = samples.filter(|sample| {
        sample.name == name && label.is_none_or(|label| labels(sample.labels).any(|other| other == label))
    });
    // A timestamp can follow the value.
    let values = counted.filter_map(|sample| sample.value.split(' ').next()?.parse::<f64>().ok());
    values.fold(0.0, |sum, value| sum + value)
}

/// Converts a page to the text format 0.0.4; a page in that format stays unchanged. `OpenMetrics` differs: a counter's samples
/// have another name than the counter, there are more types, a sample can have an exemplar, times are in seconds, and `# EOF`
/// ends the page.
pub fn as_text_format(page: &str) -> Cow<'_, str> {
    if !page.trim_end().ends_with("# EOF") {
        return Cow::Borrowed(page);
    }
    let kinds: BTreeMap<&str, &str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '))
        .collect();
    let mut text = String::with_capacity(page.len());
    for line in page.lines() {
        let Some(said) = line.strip_prefix("# ") else {
            as_sample(line, &mut text);
            continue;
        };
        let Some((what @ ("HELP" | "TYPE"), rest)) = said.split_once(' ') else {
            continue;
        };
        let (name, said) = rest.split_once(' ').unwrap_or((rest, ""));
        let (suffix, kind) = match kinds.get(name).copied().unwrap_or_default() {
            "counter" => ("_total", "counter"),
            "info" => ("_info", "gauge"),
            "stateset" => ("", "gauge"),
            "gaugehistogram" => ("", "histogram"),
            "unknown" => ("", "untyped"),
            kind => ("", kind),
        };
        let said = if what == "TYPE" { kind } else { said };
        text.extend(["# ", what, " ", name, suffix, " ", said, "\n"]);
    }
    Cow::Owned(text)
}

/// An `OpenMetrics` sample without its exemplar, with its timestamp in milliseconds.
fn as_sample(line: &str, text: &mut String) {
    let Some(Sample { value, .. }) = Sample::read(line) else {
        return;
    };
    let end = value.as_ptr().addr() + value.len() - line.as_ptr().addr();
    match value
        .split_once(' ')
        .and_then(|(_, time)| Some((time, time.trim().parse::<f64>().ok()?)))
    {
        Some((time, seconds)) => text.extend([&line[..end - time.len()], &format!("{:.0}", seconds * 1000.0)]),
        None => text.push_str(&line[..end]),
    }
    text.push('\n');
}

/// A sample's line.
#[derive(Debug, Clone, Copy)]
pub struct Sample<'line> {
    /// The metric's name.
    pub name: &'line str,
    /// The text between the braces.
    pub labels: &'line str,
    /// The value, and the time if there is one.
    pub value: &'line str,
}

impl<'line> Sample<'line> {
    /// The sample of this line. `None` for a comment or what is no sample.
    pub fn read(line: &'line str) -> Option<Self> {
        let end = line.find(['{', ' '])?;
        let (name, rest) = line.split_at(end);
        let (labels, value) = match rest.strip_prefix('{') {
            Some(rest) => rest.split_at(end_of_labels(rest)?),
            None => ("", rest),
        };
        let value = value.trim_start_matches('}');
        let value = value.split_once(" # ").map_or(value, |(value, _exemplar)| value).trim();
        let is_number = |text: &str| text.parse::<f64>().is_ok();
        let is_sample = is_name(name) && !value.is_empty() && value.split_whitespace().take(3).all(is_number);
        is_sample.then_some(Self { name, labels, value })
    }
}

/// Whether this can be the name of a metric.
pub fn is_name(name: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"_:".contains(&byte);
    !name.is_empty() && !name.starts_with(|first: char| first.is_ascii_digit()) && name.bytes().all(is_part)
}

/// The position of the brace that closes the labels, outside of values.
fn end_of_labels(text: &str) -> Option<usize> {
    cuts(text, b'}').next()
}

/// The labels, each `name="value"`.
pub fn labels(text: &str) -> impl Iterator<Item = &str> {
    let mut start = 0;
    let parts = cuts(text, b',').chain([text.len()]).map(move |end| {
        let part = text[start..end].trim();
        start = end + 1;
        part
    });
    parts.filter(|label| {
        let value = label.split_once("=\"").filter(|(name, _)| is_name(name));
        value.is_some_and(|(_, value)| value.ends_with('"'))
    })
}

/// The positions of `mark` outside of values.
fn cuts(text: &str, mark: u8) -> impl Iterator<Item = usize> {
    let (mut is_within, mut is_escaped) = (false, false);
    text.bytes().enumerate().filter_map(move |(place, byte)| {
        if is_escaped {
            is_escaped = false;
        } else if is_within && byte == b'\\' {
            is_escaped = true;
        } else if byte == b'"' {
            is_within = !is_within;
        } else if byte == mark && !is_within {
            return Some(place);
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_over_labels_of_one_name() {
        let text = "# TYPE x:tokens_total counter\nx:tokens_total{engine=\"0\"} 3.0\nx:tokens_total{engine=\"1\"} 4\n\
            x:tokens_total_more 9\nx:running 2\n";
        assert_eq!(sum(text, "x:tokens_total", None).to_string(), "7");
        assert_eq!(sum(text, "x:tokens_total", Some("engine=\"1\"")).to_string(), "4");
        assert_eq!(sum(text, "x:running", None).to_string(), "2");
        assert_eq!(sum(text, "x:absent", None).to_string(), "0");
    }

    #[test]
    fn an_exemplar_is_no_part_of_a_value() {
        let page =
            "# TYPE x:tokens counter\nx:tokens_total{engine=\"0\"} 3 # {trace_id=\"a\"} 1.0 17.5\nx:running 2\n# EOF\n";
        let text = as_text_format(page);
        assert_eq!(sum(&text, "x:tokens_total", None).to_string(), "3");
        assert_eq!(sum(&text, "x:running", None).to_string(), "2");
    }
}
