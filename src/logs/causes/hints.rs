//! What people can do about an engine's failure: entries of `hints.toml`, found by what the log says.
//!
//! Knows no engine and no process: a failure is an error, a few lines of a log, the phase reached and how it ended.

use std::sync::LazyLock;

use regex::{Regex, RegexSet};
use serde::Deserialize;

use crate::fleet::{Exit, Retry};

/// One known failure. The file says how an entry is found, and that the first that fits wins.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hint {
    /// Short and unique, for tests and logs: `gpu-memory-taken`.
    pub name: String,
    /// Regular expression that finds the failure by its error, or in any line if `anywhere`.
    pub pattern: Option<String>,
    /// The pattern is looked for in every line of the log, not only in the error.
    #[serde(default)]
    pub anywhere: bool,
    /// Name of the phase that the start had reached. Without a pattern, it is the whole condition: an engine that
    /// hangs there.
    pub phase: Option<String>,
    /// Number of the signal that ended the engine, which left no error behind.
    pub signal: Option<i32>,
    /// What it is, in a few words.
    pub title: String,
    /// Why it happens, in a sentence.
    pub explanation: String,
    /// A command or a change that mends it.
    pub fix: String,
    /// The thread or page that knows more.
    pub link: String,
    /// Whether starting the engine again can help.
    pub retry: Retry,
}

/// Everything that is known of a failure.
#[derive(Debug)]
pub(super) struct Failure<'log> {
    pub(super) error: Option<&'log str>,
    /// The first line that each entry's pattern found in the log, by the entry's index.
    pub(super) evidence: &'log Evidence,
    pub(super) phase: Option<&'static str>,
    /// `None` if it still ran.
    pub(super) exit: Option<Exit>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    hint: Vec<Hint>,
}

#[derive(Debug)]
struct Table {
    hints: Vec<Hint>,
    /// By entry.
    patterns: Vec<Option<Regex>>,
    /// The patterns of entries that look at every line, and the entries' indices.
    anywhere: (RegexSet, Vec<usize>),
}

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let valid = "the file is part of the program and a test reads it";
    let hints = toml::from_str::<File>(include_str!("../hints.toml")).expect(valid).hint;
    let compiled = |pattern: &String| Regex::new(pattern).expect(valid);
    let patterns = hints.iter().map(|hint| hint.pattern.as_ref().map(compiled)).collect();
    let everywhere: Vec<usize> = (0..hints.len()).filter(|index| hints[*index].anywhere).collect();
    let set = RegexSet::new(everywhere.iter().filter_map(|index| hints[*index].pattern.as_ref())).expect(valid);
    Table {
        hints,
        patterns,
        anywhere: (set, everywhere),
    }
});

/// All known failures, in the order in which they are tried.
pub fn hints() -> &'static [Hint] {
    &TABLE.hints
}

/// The lines of a log that entries with `anywhere` look for.
#[derive(Debug, Default)]
pub(super) struct Evidence(Vec<(usize, String)>);

impl Evidence {
    /// Looks at one more message of the log, which has no colours and no prefix.
    pub(super) fn feed(&mut self, message: &str) {
        let (set, indices) = &TABLE.anywhere;
        for found in set.matches(message) {
            let index = indices[found];
            if self.of(index).is_none() {
                self.0.push((index, message.to_owned()));
            }
        }
    }

    fn of(&self, index: usize) -> Option<&str> {
        let found = self.0.iter().find(|(of, _)| *of == index);
        found.map(|(_, line)| line.as_str())
    }
}

/// The first entry that fits, and the line of the log that shows it, if it is not the error.
pub(super) fn find<'log>(failure: &Failure<'log>) -> Option<(&'static Hint, Option<&'log str>)> {
    TABLE.hints.iter().enumerate().find_map(|(index, hint)| {
        let fits = |wanted: Option<&str>| wanted.is_none_or(|phase| failure.phase == Some(phase));
        if !fits(hint.phase.as_deref()) {
            return None;
        }
        match (&TABLE.patterns[index], hint.signal) {
            (Some(_), _) if hint.anywhere => failure.evidence.of(index).map(|line| (hint, Some(line))),
            (Some(pattern), _) => failure
                .error
                .filter(|error| pattern.is_match(error))
                .map(|_| (hint, None)),
            (None, Some(signal)) => {
                let fits = failure.error.is_none() && failure.exit == Some(Exit::Signal(signal));
                fits.then_some((hint, None))
            }
            (None, None) => (failure.error.is_none() && failure.exit.is_none()).then_some((hint, None)),
        }
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::engine::EngineKind;

    #[test]
    fn every_entry_can_be_found_and_tells_all_it_has_to() {
        let mut names = HashSet::new();
        let phases: HashSet<&str> = EngineKind::Vllm
            .phase_markers()
            .iter()
            .map(|marker| marker.phase)
            .collect();
        for hint in hints() {
            let name = &hint.name;
            assert!(names.insert(name), "{name} is there twice");
            assert!(
                hint.pattern.is_some() || hint.signal.is_some() || hint.phase.is_some(),
                "{name} would fit everything"
            );
            assert!(
                hint.pattern.is_none() || hint.signal.is_none(),
                "{name} has two conditions"
            );
            assert!(!hint.anywhere || hint.pattern.is_some(), "{name} looks for nothing");
            assert!(
                hint.phase.as_deref().is_none_or(|phase| phases.contains(phase)),
                "{name}"
            );
            for text in [&hint.title, &hint.explanation, &hint.fix] {
                assert!(
                    !text.is_empty() && !text.ends_with('.') && !text.contains('\n'),
                    "{name}: {text}"
                );
            }
            assert!(hint.link.starts_with("https://"), "{name}: {}", hint.link);
        }
    }

    #[test]
    fn no_pattern_fits_an_error_that_says_nothing() {
        let evidence = Evidence::default();
        for error in ["", "RuntimeError", "fault injected at this phase"] {
            let failure = Failure {
                error: Some(error),
                evidence: &evidence,
                phase: None,
                exit: Some(Exit::Code(1)),
            };
            assert!(find(&failure).is_none(), "{error}");
        }
    }
}
