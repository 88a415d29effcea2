//! Progress of a benchmark: a bar on a terminal, a line now and then elsewhere. Knows only the numbers it shows.

use std::cell::Cell;
use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Printer;

/// Between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// What is shown.
#[derive(Debug, Clone, Copy)]
pub struct Snapshot {
    /// What the requests are for: `warm-up`, `benchmark`.
    pub label: &'static str,
    /// Requests to make.
    pub total: usize,
    /// Those that have ended.
    pub done: usize,
    /// Those that have failed.
    pub failed: usize,
    /// Those that are at the server.
    pub in_flight: usize,
    /// Since the start.
    pub elapsed: Duration,
    /// Mean time to first token so far, in milliseconds.
    pub mean_ttft_ms: Option<f64>,
    /// Mean time per output token so far, in milliseconds.
    pub mean_tpot_ms: Option<f64>,
}

/// Shows how far a benchmark is, on stderr.
#[derive(Debug)]
pub struct BenchProgress {
    printer: Printer,
    medium: Medium,
}

#[derive(Debug)]
enum Medium {
    Bar(ProgressBar),
    /// When the last line was written, since the start.
    Lines(Cell<Duration>),
}

impl BenchProgress {
    /// A bar if stderr is a terminal, lines if not, nothing if the printer is quiet.
    pub fn new(printer: Printer) -> Self {
        let medium = if std::io::stderr().is_terminal() && !printer.quiet {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{prefix} [{bar:20}] {pos}/{len}, {wide_msg}");
            bar.set_style(style.expect("the template is a constant").progress_chars("=> "));
            Medium::Bar(bar)
        } else {
            Medium::Lines(Cell::new(Duration::ZERO))
        };
        Self { printer, medium }
    }

    /// Shows the state, or decides that it is too early to.
    pub fn update(&self, snapshot: &Snapshot) {
        match &self.medium {
            Medium::Bar(bar) => {
                bar.set_prefix(snapshot.label);
                bar.set_length(snapshot.total as u64);
                bar.set_position(snapshot.done as u64);
                bar.set_message(snapshot.details());
            }
            Medium::Lines(last) => {
                // Less time than at the last line: another phase has begun.
                if snapshot.elapsed < last.get() {
                    last.set(Duration::ZERO);
                }
                if snapshot.elapsed >= last.get() + LINE_INTERVAL {
                    last.set(snapshot.elapsed);
                    self.printer.status(snapshot.line());
                }
            }
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Medium::Bar(bar) = &self.medium {
            bar.finish_and_clear();
        }
    }
}

impl Snapshot {
    fn line(&self) -> String {
        let Self {
            label,
            total,
            done,
            elapsed,
            ..
        } = self;
        format!(
            "{label}: {done}/{total} requests after {} s, {}",
            elapsed.as_secs(),
            self.details()
        )
    }

    fn details(&self) -> String {
        let mut text = format!("{} in flight", self.in_flight);
        // Writing to a String cannot fail.
        if let Some(mean) = self.mean_ttft_ms {
            let _ = write!(text, ", mean TTFT {mean:.1} ms");
        }
        if let Some(mean) = self.mean_tpot_ms {
            let _ = write!(text, ", mean TPOT {mean:.2} ms");
        }
        if self.failed > 0 {
            let _ = write!(text, ", {} failed", self.failed);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_is_known_and_no_more() {
        let mut snapshot = Snapshot {
            label: "benchmark",
            total: 30,
            done: 0,
            failed: 0,
            in_flight: 2,
            elapsed: Duration::from_millis(5100),
            mean_ttft_ms: None,
            mean_tpot_ms: None,
        };
        assert_eq!(snapshot.line(), "benchmark: 0/30 requests after 5 s, 2 in flight");
        snapshot.mean_ttft_ms = Some(303.18);
        snapshot.mean_tpot_ms = Some(9.004);
        snapshot.failed = 1;
        assert_eq!(
            snapshot.line(),
            "benchmark: 0/30 requests after 5 s, 2 in flight, mean TTFT 303.2 ms, mean TPOT 9.00 ms, 1 failed"
        );
    }
}
