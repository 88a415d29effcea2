//! Progress of the start and the stop of a fleet: redrawn on a terminal, one line per change elsewhere.

use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressState, ProgressStyle};
use owo_colors::{AnsiColors, OwoColorize};
use tokio::time::Instant;

use super::{Printer, time_left, time_span};
use crate::fleet::{EngineId, EngineState, Role, TimeLeft};

/// Interval of the spinner.
const TICK: Duration = Duration::from_millis(100);

// All of them fit 80 columns.
/// A starting engine.
const MOVING: &str = "{spinner:.cyan} {prefix}  {bar:10.cyan/dim} {pos:>3} %  {msg:20}  {time:.dim}";
/// A starting engine with an estimate of the time left.
const COUNTED: &str = "{spinner:.cyan} {prefix}  {bar:10.cyan/dim} {pos:>3} %  {msg}";
/// An engine that waits or has reached a state.
const RESTING: &str = "{prefix}  {bar:10.green/dim} {pos:>3} %  {msg}";
/// An engine that failed.
const BROKEN: &str = "{prefix}  {bar:10.red/dim} {pos:>3} %  {msg}";
/// A stopping run.
const STOPPING: &str = "{spinner:.yellow} {msg}";

/// The progress of a starting fleet, one line per engine.
#[derive(Debug)]
pub struct FleetProgress {
    printer: Printer,
    bars: MultiProgress,
    /// Whether the bars are drawn; otherwise changes are printed as lines.
    redraws: bool,
    lines: Vec<EngineLine>,
}

#[derive(Debug)]
struct EngineLine {
    id: EngineId,
    /// Its name, padded to the longest name.
    name: String,
    /// `prefiller1  :7100`, padded; the colour shows the role.
    label: String,
    bar: ProgressBar,
    /// Time of its current start.
    started: Instant,
    state: EngineState,
    phase: Option<(String, u8)>,
}

impl FleetProgress {
    /// Shows the engines before their start. The numbers are their HTTP ports.
    pub fn new(printer: Printer, engines: &[(EngineId, Role, u16)]) -> Self {
        let redraws = printer.redraws();
        let target = if redraws {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bars = MultiProgress::with_draw_target(target);
        let widest = engines.iter().map(|(id, ..)| id.as_str().len()).max().unwrap_or(0);
        let lines = engines
            .iter()
            .map(|(id, role, port)| {
                let name = format!("{id:widest$}");
                let colour = match role {
                    Role::Prefill => AnsiColors::Cyan,
                    Role::Decode => AnsiColors::Magenta,
                };
                let label = format!("{}  :{port:<5}", name.color(colour));
                let bar = bars.add(ProgressBar::new(100).with_finish(ProgressFinish::Abandon));
                bar.set_style(style(RESTING));
                bar.set_prefix(format!("  {label}"));
                bar.set_message("waiting".dimmed().to_string());
                EngineLine {
                    id: id.clone(),
                    name,
                    label,
                    bar,
                    started: Instant::now(),
                    state: EngineState::Planned,
                    phase: None,
                }
            })
            .collect();
        Self {
            printer,
            bars,
            redraws,
            lines,
        }
    }

    /// Updates the phase of a starting engine; `percent` and `left` refer to the whole start.
    pub fn phase(&mut self, engine: &EngineId, phase: &str, percent: u8, left: TimeLeft) {
        let Some(line) = self.lines.iter_mut().find(|line| line.id == *engine) else {
            return;
        };
        let is_new = line.phase.as_ref().is_none_or(|(known, _)| known != phase);
        line.phase = Some((phase.to_owned(), percent));
        if line.state != EngineState::Starting {
            return;
        }
        line.bar.set_position(u64::from(percent));
        line.count(phase, left);
        if is_new && !self.redraws {
            self.printer
                .status(line.plain(&format!("{phase} ({percent} %{})", time_left(left))));
        }
    }

    /// Updates the state of an engine.
    pub fn state(&mut self, engine: &EngineId, state: EngineState) {
        let Some(line) = self.lines.iter_mut().find(|line| line.id == *engine) else {
            return;
        };
        if line.state == state {
            return;
        }
        if state == EngineState::Starting {
            line.started = Instant::now();
            line.phase = None;
        }
        line.state = state;
        line.draw();
        if !self.redraws {
            self.printer.status(line.plain(&state.to_string()));
        }
    }

    /// Hides the bars while `write` prints.
    pub fn suspend<T>(&self, write: impl FnOnce() -> T) -> T {
        self.bars.suspend(write)
    }

    /// Leaves the last lines on the terminal.
    pub fn finish(self) {
        for line in &self.lines {
            line.bar.abandon();
        }
    }

    /// Removes the bars of a start that was cancelled. Those of failed engines stay.
    pub fn clear(self) {
        for line in &self.lines {
            if line.state == EngineState::Failed {
                line.bar.abandon();
            } else {
                line.bar.finish_and_clear();
            }
        }
    }
}

impl EngineLine {
    /// Shows the phase and the time left if it is known, else the elapsed time.
    fn count(&self, phase: &str, left: TimeLeft) {
        let left = match left {
            TimeLeft::Unknown => {
                self.bar.set_style(style(MOVING));
                self.bar.set_message(phase.to_owned());
                return;
            }
            TimeLeft::About(left) => format!("{} left", time_span(left.max(Duration::from_secs(1)))),
            TimeLeft::Longer => "slower this time".to_owned(),
        };
        self.bar.set_style(style(COUNTED));
        self.bar.set_message(format!("{phase:20}  {}", left.dimmed()));
    }

    fn draw(&self) {
        let took = time_span(self.started.elapsed());
        let (mark, template, message) = match self.state {
            EngineState::Planned => (" ".to_owned(), RESTING, "waiting".dimmed().to_string()),
            EngineState::Starting => {
                self.bar.reset();
                self.bar.set_prefix(self.label.clone());
                self.bar.set_style(style(MOVING));
                self.bar.set_message("launching");
                self.bar.enable_steady_tick(TICK);
                return;
            }
            EngineState::Healthy => ("✓".cyan().to_string(), RESTING, format!("healthy after {took}")),
            EngineState::Ready => (
                "✓".green().to_string(),
                RESTING,
                format!("{} after {took}", "ready".green()),
            ),
            EngineState::Failed => {
                let phase = self
                    .phase
                    .as_ref()
                    .map(|(phase, _)| format!(": {phase}"))
                    .unwrap_or_default();
                let failed = "failed".red().bold().to_string();
                ("✗".red().to_string(), BROKEN, format!("{failed}{phase}  {took}"))
            }
            EngineState::Draining | EngineState::Stopping | EngineState::Stopped | EngineState::Backoff => {
                (" ".to_owned(), RESTING, self.state.yellow().to_string())
            }
        };
        self.bar.disable_steady_tick();
        self.bar.set_style(style(template));
        self.bar.set_prefix(format!("{mark} {}", self.label));
        match self.state {
            // A hand-off must still be verified.
            EngineState::Healthy => self.bar.set_position(99),
            EngineState::Ready => self.bar.set_position(100),
            _ => {}
        }
        self.bar.set_message(message);
    }

    /// `prefiller1  loading weights (56 %)  12 s`
    fn plain(&self, news: &str) -> String {
        format!("{}  {news}  {}", self.name, time_span(self.started.elapsed()))
    }
}

/// The progress of a stopping run: draining, then stopping.
#[derive(Debug)]
pub struct StopProgress {
    printer: Printer,
    line: ProgressBar,
    redraws: bool,
    /// How the user can force the stop, shown while waiting.
    force_hint: String,
    /// The last printed state.
    printed: String,
}

impl StopProgress {
    /// A progress that shows nothing yet. `force_hint` is, for example, `press Ctrl+C again to force`.
    pub fn new(printer: Printer, force_hint: impl Into<String>) -> Self {
        let redraws = printer.redraws();
        let target = if redraws {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let line = ProgressBar::with_draw_target(None, target);
        line.set_style(style(STOPPING));
        if redraws {
            // The terminal has just printed `^C`; a redrawn line must start in a new line.
            printer.status("");
        }
        line.enable_steady_tick(TICK);
        Self {
            printer,
            line,
            redraws,
            force_hint: force_hint.into(),
            printed: String::new(),
        }
    }

    /// Requests in flight can continue for `left`.
    pub fn draining(&mut self, in_flight: usize, left: Option<Duration>) {
        let requests = if in_flight == 1 { "request" } else { "requests" };
        let limit = left
            .map(|left| format!(", at most {} more", time_span(left)))
            .unwrap_or_default();
        self.show(
            "draining",
            &format!("draining: {in_flight} {requests} in flight{limit}"),
        );
    }

    /// These engines have not stopped yet.
    pub fn stopping(&mut self, left: &[EngineId]) {
        let names: Vec<&str> = left.iter().map(EngineId::as_str).collect();
        let text = match names.as_slice() {
            [] => "stopping".to_owned(),
            names => format!("stopping: waiting for {}", names.join(", ")),
        };
        self.show(&text, &text);
    }

    /// Removes the line.
    pub fn clear(self) {
        self.line.finish_and_clear();
    }

    /// Removes the line and prints a summary.
    pub fn finish(self, summary: impl std::fmt::Display) {
        self.line.finish_and_clear();
        self.printer.status(summary);
    }

    /// Shows `text`. Without a terminal it is printed only if `news` has changed.
    fn show(&mut self, news: &str, text: &str) {
        let text = format!("{text}  {}", format!("({})", self.force_hint).dimmed());
        if !self.redraws && self.printed != news {
            self.printer.status(&text);
        }
        news.clone_into(&mut self.printed);
        self.line.set_message(text);
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .expect("the templates are constants and a test makes each style")
        .with_key("time", |state: &ProgressState, writer: &mut dyn std::fmt::Write| {
            // A formatting error cannot be reported here, and a missing time is harmless.
            let _ = writer.write_str(&time_span(state.elapsed()));
        })
        .progress_chars("━╸─")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_template_makes_a_style() {
        for template in [MOVING, COUNTED, RESTING, BROKEN, STOPPING] {
            style(template);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_plain_line_has_name_state_and_time() {
        let engines = [
            (EngineId::new(Role::Prefill, 0), Role::Prefill, 7100),
            (EngineId::new(Role::Decode, 0), Role::Decode, 7200),
        ];
        let quiet = Printer { quiet: true };
        let mut progress = FleetProgress::new(quiet, &engines);
        progress.state(&engines[1].0, EngineState::Starting);
        tokio::time::advance(Duration::from_secs(12)).await;
        assert_eq!(
            progress.lines[1].plain("loading weights (56 %)"),
            "decoder1    loading weights (56 %)  12 s"
        );
        // A restart resets time and phase.
        progress.phase(&engines[1].0, "loading weights", 56, TimeLeft::Unknown);
        progress.state(&engines[1].0, EngineState::Failed);
        progress.state(&engines[1].0, EngineState::Starting);
        assert_eq!(progress.lines[1].phase, None);
        assert_eq!(progress.lines[1].plain("launching"), "decoder1    launching  0 s");
    }
}
