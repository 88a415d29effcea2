//! Prefixes of log lines: the engine names, padded to one width, each in its own colour.

use owo_colors::{AnsiColors, OwoColorize};

use super::table::width;

/// Colours that are distinct on dark and light terminals. Red is reserved for errors.
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

/// The prefixes of several logs that are printed together.
#[derive(Debug, Clone)]
pub struct RolePrefixes {
    prefixes: Vec<String>,
}

impl RolePrefixes {
    /// A prefix per name. A single log gets none.
    pub fn new(names: &[&str], coloured: bool) -> Self {
        let widest = names.iter().map(|name| width(name)).max().unwrap_or(0);
        let prefixes = names
            .iter()
            .zip(COLOURS.iter().cycle())
            .map(|(name, colour)| match names {
                [_] => String::new(),
                _ if coloured => format!("{} ", format!("{name:widest$} |").color(*colour)),
                _ => format!("{name:widest$} | "),
            })
            .collect();
        Self { prefixes }
    }

    /// The prefix of the log with this index.
    pub fn of(&self, index: usize) -> &str {
        &self.prefixes[index]
    }
}

#[cfg(test)]
mod tests {
    use anstream::adapter::strip_str;

    use super::*;

    #[test]
    fn prefixes_have_one_width_and_a_single_log_has_none() {
        let names = ["prefiller1", "proxy"];
        let (plain, coloured) = (RolePrefixes::new(&names, false), RolePrefixes::new(&names, true));
        assert_eq!([plain.of(0), plain.of(1)], ["prefiller1 | ", "proxy      | "]);
        assert_eq!(
            [0, 1].map(|index| strip_str(coloured.of(index)).to_string()),
            [0, 1].map(|index| plain.of(index))
        );
        assert_ne!(coloured.of(0)[..5], coloured.of(1)[..5]);
        assert_eq!(RolePrefixes::new(&["proxy"], true).of(0), "");
    }
}
