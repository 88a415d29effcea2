//! The report of `xpyd doctor`, as text and as JSON: findings by topic in the order of a start, each with its hint, and a
//! summary at the end.

use std::fmt::Write;
use std::time::Duration;

use owo_colors::OwoColorize;

use crate::preflight::{Finding, Level};
use crate::report::Failure;
use crate::ui::{table, wrap};

/// All findings, and the time that the checks took.
#[derive(Debug)]
pub(in crate::cli) struct Report<'findings> {
    pub(in crate::cli) profile: Option<&'findings str>,
    pub(in crate::cli) findings: &'findings [Finding],
    pub(in crate::cli) took: Duration,
}

impl Report<'_> {
    fn of(&self, level: Level) -> Vec<&Finding> {
        self.findings.iter().filter(|finding| finding.level == level).collect()
    }

    /// The report for programs. The keys are stable; checks can be added and removed.
    pub(super) fn json(&self) -> Result<String, Failure> {
        let value = serde_json::json!({
            "xpyd": env!("CARGO_PKG_VERSION"),
            "profile": self.profile,
            "level": self.findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Pass),
            "pass": self.of(Level::Pass).len(),
            "warn": self.of(Level::Warn).len(),
            "fail": self.of(Level::Fail).len(),
            "seconds": (self.took.as_secs_f64() * 1000.0).round() / 1000.0,
            "findings": self.findings,
        });
        Ok(serde_json::to_string_pretty(&value).map_err(anyhow::Error::from)?)
    }

    /// The report for people, in lines of at most `width` columns.
    pub(in crate::cli) fn text(&self, width: Option<usize>) -> String {
        let names = self
            .findings
            .iter()
            .map(|finding| table::width(finding.check))
            .max()
            .unwrap_or(0);
        let mut text = String::new();
        let mut topic = None;
        for finding in self.findings {
            if topic != Some(finding.topic) {
                let gap = if topic.is_some() { "\n" } else { "" };
                let _ = writeln!(text, "{gap}{}", finding.topic.to_string().bold());
                topic = Some(finding.topic);
            }
            // Two spaces, the level, two spaces, the name, two spaces.
            let indent = names + 10;
            let name = format!("{:names$}", finding.check);
            let message = wrap::column(&finding.message, indent, width);
            let _ = writeln!(text, "  {}  {name}  {message}", level(finding.level));
            let hint = finding.hint.as_ref().filter(|_| finding.level != Level::Pass);
            if let Some(hint) = hint {
                let hint = wrap::column(hint, indent + 6, width);
                let _ = writeln!(text, "{:indent$}{} {hint}", "", "hint:".cyan());
            }
        }
        text + "\n" + &self.sum()
    }

    /// `2 failed (ports, vllm), 1 warning (shm), 9 passed, in 0.4 s`.
    fn sum(&self) -> String {
        let names = |findings: &[&Finding]| {
            let mut names: Vec<&str> = findings.iter().map(|finding| finding.check).collect();
            names.dedup();
            names.join(", ")
        };
        let (failed, warned) = (self.of(Level::Fail), self.of(Level::Warn));
        let mut parts = Vec::new();
        if !failed.is_empty() {
            parts.push(format!(
                "{} ({})",
                format!("{} failed", failed.len()).red().bold(),
                names(&failed)
            ));
        }
        if !warned.is_empty() {
            let noun = if warned.len() == 1 { "warning" } else { "warnings" };
            parts.push(format!(
                "{} ({})",
                format!("{} {noun}", warned.len()).yellow(),
                names(&warned)
            ));
        }
        parts.push(format!("{} passed", self.of(Level::Pass).len()).green().to_string());
        format!("{}, in {:.1} s", parts.join(", "), self.took.as_secs_f64())
    }
}

fn level(level: Level) -> String {
    match level {
        Level::Pass => "pass".green().to_string(),
        Level::Warn => "warn".yellow().bold().to_string(),
        Level::Fail => "fail".red().bold().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::Topic;

    fn finding(topic: Topic, check: &'static str, level: Level, message: &str, hint: Option<&str>) -> Finding {
        Finding {
            topic,
            check,
            level,
            message: message.to_owned(),
            hint: hint.map(str::to_owned),
        }
    }

    fn findings() -> Vec<Finding> {
        vec![
            finding(
                Topic::Software,
                "vllm",
                Level::Pass,
                "vLLM 0.32.0 at /opt/venv/bin/vllm",
                None,
            ),
            finding(
                Topic::Model,
                "hf_access",
                Level::Fail,
                "`org/model` is not cached, and its licence is not accepted by this token's account",
                Some("accept it at https://huggingface.co/org/model"),
            ),
            finding(
                Topic::System,
                "shm",
                Level::Warn,
                "/dev/shm has 12.0 MiB of 64.0 MiB free",
                Some("start the container with `--shm-size=16g`"),
            ),
            finding(
                Topic::System,
                "time",
                Level::Pass,
                "the clock is plausible",
                Some("not shown"),
            ),
        ]
    }

    fn shown(width: Option<usize>) -> String {
        let report = Report {
            profile: Some("2p2d"),
            findings: &findings(),
            took: Duration::from_millis(412),
        };
        anstream::adapter::strip_str(&report.text(width)).to_string()
    }

    #[test]
    fn findings_are_aligned_by_topic_with_a_summary() {
        insta::assert_snapshot!(shown(None));
    }

    #[test]
    fn a_narrow_terminal_wraps_lines() {
        let text = shown(Some(60));
        insta::assert_snapshot!(text);
        assert!(
            text.lines()
                .all(|line| table::width(line) <= 60 || !line.trim().contains(' ')),
            "{text}"
        );
    }
}
