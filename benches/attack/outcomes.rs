//! Counts the outcomes of requests and the causes of broken ones.

use std::collections::BTreeMap;

use crate::client::RequestOutcome;

/// The possible cause of a request that its server did not finish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum CutCause {
    /// xpyd was killed, or not running, during the request.
    KillOfXpyd,
    /// `xpyd down --keep-engines`, and the time until the next xpyd.
    LeavingXpyd,
    /// Another cause; the last fault is named.
    Other(&'static str),
}

/// Examples to keep of each kind.
const EXAMPLES: usize = 3;

#[derive(Debug, Default)]
pub(crate) struct OutcomeCounts {
    counts: BTreeMap<String, u64>,
    examples: BTreeMap<String, Vec<String>>,
    pub(crate) right: u64,
    pub(crate) wrong: u64,
    pub(crate) hangs: u64,
    pub(crate) error_events: u64,
    /// 503 and 429 with `Retry-After`.
    pub(crate) told_to_retry: u64,
    pub(crate) other_errors: u64,
    pub(crate) left: u64,
    cut: BTreeMap<CutCause, u64>,
    unanswered: BTreeMap<CutCause, u64>,
    refused: BTreeMap<CutCause, u64>,
}

impl OutcomeCounts {
    /// Counts an outcome. `seconds` is the time since the start of the attack.
    pub(crate) fn add(&mut self, outcome: &RequestOutcome, cause: CutCause, seconds: f64) {
        let kind = match outcome {
            RequestOutcome::Right => return self.right += 1,
            RequestOutcome::Left => return self.left += 1,
            RequestOutcome::Wrong(_) => {
                self.wrong += 1;
                "wrong".to_owned()
            }
            RequestOutcome::Hang => {
                self.hangs += 1;
                "hang".to_owned()
            }
            RequestOutcome::ErrorEvent(code) => {
                self.error_events += 1;
                format!("error event {code}")
            }
            RequestOutcome::Status {
                status,
                code,
                retry_after,
            } => {
                if *retry_after && matches!(status, 429 | 503) {
                    self.told_to_retry += 1;
                } else {
                    self.other_errors += 1;
                }
                format!("{status} {code}{}", if *retry_after { ", Retry-After" } else { "" })
            }
            RequestOutcome::Cut => {
                *self.cut.entry(cause).or_default() += 1;
                format!("cut by {}", cause.name())
            }
            RequestOutcome::NoAnswer => {
                *self.unanswered.entry(cause).or_default() += 1;
                format!("no answer, by {}", cause.name())
            }
            RequestOutcome::Refused => {
                *self.refused.entry(cause).or_default() += 1;
                format!("refused, by {}", cause.name())
            }
        };
        *self.counts.entry(kind.clone()).or_default() += 1;
        let is_expected = matches!(outcome, RequestOutcome::Status { .. } | RequestOutcome::ErrorEvent(_))
            || cause == CutCause::KillOfXpyd;
        let examples = self.examples.entry(kind).or_default();
        if !is_expected && examples.len() < EXAMPLES {
            examples.push(match outcome {
                RequestOutcome::Wrong(difference) => format!("at {seconds:.1} s, {}: {difference}", cause.name()),
                _ => format!("at {seconds:.1} s, {}", cause.name()),
            });
        }
    }

    pub(crate) fn print(&self) {
        let row = |name: &str, value: String| println!("{name:<44}{value}");
        row("right answers", self.right.to_string());
        row("wrong answers", self.wrong.to_string());
        row("hangs", self.hangs.to_string());
        row("error events in streams", self.error_events.to_string());
        row("503 and 429 with Retry-After", self.told_to_retry.to_string());
        row("other error responses", self.other_errors.to_string());
        row("streams cut without an error event", by_cause(&self.cut));
        row("no answer (ended before the head)", by_cause(&self.unanswered));
        row("connection refused", by_cause(&self.refused));
        row("left by clients", self.left.to_string());
        for (kind, count) in &self.counts {
            println!("  {count:>8}  {kind}");
            for example in self.examples.get(kind).into_iter().flatten() {
                println!("            {example}");
            }
        }
    }

    /// The outcomes that must never occur.
    pub(crate) fn findings(&self) -> Vec<String> {
        let mut findings = Vec::new();
        for (count, what) in [(self.wrong, "wrong answers"), (self.hangs, "hangs")] {
            if count > 0 {
                findings.push(format!("{count} {what}"));
            }
        }
        for (counts, what) in [
            (&self.cut, "streams cut without an error event"),
            (&self.unanswered, "requests without an answer"),
            (&self.refused, "connections refused"),
        ] {
            for (cause, count) in counts.iter().filter(|(cause, _)| **cause != CutCause::KillOfXpyd) {
                findings.push(format!("{count} {what}, by {}", cause.name()));
            }
        }
        findings
    }
}

impl CutCause {
    fn name(self) -> &'static str {
        match self {
            Self::KillOfXpyd => "SIGKILL of xpyd",
            Self::LeavingXpyd => "down --keep-engines",
            Self::Other(fault) => fault,
        }
    }
}

fn by_cause(counts: &BTreeMap<CutCause, u64>) -> String {
    let all: u64 = counts.values().sum();
    let parts: Vec<String> = counts
        .iter()
        .map(|(cause, count)| format!("{count} by {}", cause.name()))
        .collect();
    if parts.is_empty() {
        "0".to_owned()
    } else {
        format!("{all}: {}", parts.join(", "))
    }
}
