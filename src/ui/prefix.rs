//! Whose line it is, in front of it: names in one width, each with its own colour.

use owo_colors::{AnsiColors, OwoColorize};

use super::table::width;

/// Told apart on dark and on light terminals; red is left to errors.
const COLOURS: [AnsiColors; 8] = [
    AnsiColors::Cyan,
    AnsiColors::Yellow,
    AnsiColors::Green,
    AnsiColors::Magenta,
    AnsiColors::Blue,
    AnsiColors::BrightCyan,
    AnsiColors::BrightYellow,
    AnsiColors::BrightGreen,
];

/// The prefixes of several logs that are shown together.
#[derive(Debug, Clone)]
pub struct RolePrefixes {
    prefixes: Vec<String>,
}

impl RolePrefixes {
    /// A prefix per name. A single log needs none, so its lines stay as they are.
    pub fn new(names: &[&str]) -> Self {
        let widest = names.iter().map(|name| width(name)).max().unwrap_or(0);
        let prefixes = names
            .iter()
            .zip(COLOURS.iter().cycle())
            .map(|(name, colour)| match names {
                [_] => String::new(),
                _ => format!("{} ", format!("{name:widest$} |").color(*colour)),
            })
            .collect();
        Self { prefixes }
    }

    /// `line` as one of the log with this index.
    pub fn line(&self, index: usize, line: &str) -> String {
        format!("{}{line}", self.prefixes[index])
    }
}

#[cfg(test)]
mod tests {
    use anstream::adapter::strip_str;

    use super::*;

    #[test]
    fn several_logs_get_names_of_one_width_and_a_single_one_gets_none() {
        let prefixes = RolePrefixes::new(&["prefiller1", "proxy"]);
        let shown = [prefixes.line(0, "a"), prefixes.line(1, "b")].map(|line| strip_str(&line).to_string());
        assert_eq!(shown, ["prefiller1 | a", "proxy      | b"]);
        assert_ne!(prefixes.line(0, "")[..5], prefixes.line(1, "")[..5]);
        assert_eq!(RolePrefixes::new(&["proxy"]).line(0, "b"), "b");
    }
}
