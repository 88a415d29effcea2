//! Known failures and their fixes: the entries of `hints.toml`, matched against the log.
//!
//! It knows no engine and no process: a failure consists of an error, lines of a log, the last phase and the exit.

use std::sync::LazyLock;

use regex::{Regex, RegexSet};
use serde::Deserialize;

use crate::fleet::{Exit, Retry};

/// One known failure. The head of the file explains how entries match; the first match wins.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hint {
    /// A short unique name for tests and logs, such as `gpu-memory-taken`.
    pub name: String,
    /// A regular expression for the error, or for any line if `anywhere`.
    pub pattern: Option<String>,
    /// Whether the pattern applies to every line of the log, not only to the error.
    #[serde(default)]
    pub anywhere: bool,
    /// The last phase of the start. Without a pattern it is the whole condition: an engine that hangs in this phase.
    pub phase: Option<String>,
    /// The number of the signal that ended the engine, if it left no error.
    pub signal: Option<i32>,
    /// The failure in a few words.
    pub title: String,
    /// The cause in a sentence.
    pub explanation: String,
    /// The command or change that fixes it.
    pub fix: String,
    /// An issue or page with more information.
    pub link: String,
    /// Whether a restart can help.
    pub retry: Retry,
}

/// The evidence of a failure.
#[derive(Debug)]
pub(super) struct FailureFacts<'log> {
    pub(super) error: Option<&'log str>,
    /// The first line that each entry's pattern found in the log, by the entry's index.
    pub(super) evidence: &'log Evidence,
    pub(super) phase: Option<&'static str>,
    /// How the leader ended; `None` if it still ran.
    pub(super) exit: Option<Exit>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HintsFile {
    hint: Vec<Hint>,
}

#[derive(Debug)]
struct HintTable {
    hints: Vec<Hint>,
    /// By entry.
    patterns: Vec<Option<Regex>>,
    /// The patterns of entries that match any line, and the indices of these entries.
    anywhere: (RegexSet, Vec<usize>),
}

static TABLE: LazyLock<HintTable> = LazyLock::new(|| {
    let valid = "the file is part of the program and a test reads it";
    let hints = toml::from_str::<HintsFile>(include_str!("../hints.toml"))
        .expect(valid)
        .hint;
    let compiled = |pattern: &String| Regex::new(pattern).expect(valid);
    let patterns = hints.iter().map(|hint| hint.pattern.as_ref().map(compiled)).collect();
    let everywhere: Vec<usize> = (0..hints.len()).filter(|index| hints[*index].anywhere).collect();
    let set = RegexSet::new(everywhere.iter().filter_map(|index| hints[*index].pattern.as_ref())).expect(valid);
    HintTable {
        hints,
        patterns,
        anywhere: (set, everywhere),
    }
});

/// All known failures, in the order of the file.
pub fn hints() -> &'static [Hint] {
    &TABLE.hints
}

/// The lines of a log that match entries with `anywhere`.
#[derive(Debug, Default)]
pub(super) struct Evidence(Vec<(usize, String)>);

impl Evidence {
    /// Takes one more message of the log, without colours and prefix.
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

/// The first entry that matches, and the line of the log that matches, if it is not the error.
pub(super) fn find<'log>(failure: &FailureFacts<'log>) -> Option<(&'static Hint, Option<&'log str>)> {
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
    fn every_hint_is_complete_and_reachable() {
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
            let failure = FailureFacts {
                error: Some(error),
                evidence: &evidence,
                phase: None,
                exit: Some(Exit::Code(1)),
            };
            assert!(find(&failure).is_none(), "{error}");
        }
    }
}
