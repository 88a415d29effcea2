//! Progress of a benchmark: two redrawn lines on a terminal, and a line now and then elsewhere.

use std::fmt::Write as _;
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use owo_colors::OwoColorize as _;

use super::Printer;
use crate::bench::Progress;

/// Interval of lines without a terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Time without a finished request after which a message says so. Even long answers take less with a usable model.
const SILENCE: Duration = Duration::from_mins(1);

/// Interval of the spinner.
const SPIN_INTERVAL: Duration = Duration::from_millis(120);

/// Shows the progress of a benchmark on stderr. It can be shared with code that prints in the meantime.
#[derive(Debug)]
pub struct BenchProgress {
    printer: Printer,
    mode: OutputMode,
    state: Mutex<State>,
}

#[derive(Debug)]
enum OutputMode {
    Bar,
    Lines,
    Nothing,
}

/// State beyond the current numbers.
#[derive(Debug, Default)]
struct State {
    /// Time of the last line since the start.
    last_line: Duration,
    pace: Pace,
    /// The bar on the terminal. Each template has its own bar, because changing the template would leave old lines
    /// behind.
    shown: Option<VisibleBar>,
}

#[derive(Debug)]
struct VisibleBar {
    bar: ProgressBar,
    /// Whether it counts requests; else it is a spinner.
    counts: bool,
}

/// The rate at which requests end.
#[derive(Debug, Clone, Copy, Default)]
struct Pace {
    /// When the first requests had ended, and how many.
    first: Option<(Duration, usize)>,
    /// When the number of ended requests last grew, and to what.
    last: (Duration, usize),
}

impl BenchProgress {
    /// A bar if stderr is a terminal, lines if not, nothing if the printer is quiet.
    pub fn new(printer: Printer) -> Self {
        Self::wanted(printer, true)
    }

    /// As [`Self::new`]; shows nothing unless `is_wanted`.
    pub fn wanted(printer: Printer, is_wanted: bool) -> Self {
        Self {
            printer,
            mode: if is_wanted {
                OutputMode::of(printer)
            } else {
                OutputMode::Nothing
            },
            state: Mutex::default(),
        }
    }

    /// Shows a spinner with a text such as `making prompts` until the next call. Only on a terminal.
    pub fn begin(&self, what: &str) {
        if let OutputMode::Bar = &self.mode {
            self.lock().show(false).set_message(what.to_owned());
        }
    }

    /// Shows the progress, unless it is too early for the next line.
    pub fn update(&self, label: &str, progress: &Progress) {
        let mut state = self.lock();
        state.pace.observe(progress);
        match &self.mode {
            OutputMode::Bar => {
                // The most important first, because a narrow terminal cuts the line.
                let left = state.pace.time_left(progress).map(|left| format!("{}, ", about(left)));
                let details = details(progress, state.pace, self.printer.colour());
                let bar = state.show(true);
                bar.set_prefix(label.to_owned());
                bar.set_length(progress.total as u64);
                bar.set_position(progress.done as u64);
                bar.set_message(left.unwrap_or_default() + &details);
            }
            OutputMode::Lines => {
                // Less time than at the last line: a new phase has begun.
                if progress.elapsed < state.last_line {
                    state.last_line = Duration::ZERO;
                }
                if progress.elapsed >= state.last_line + LINE_INTERVAL {
                    state.last_line = progress.elapsed;
                    self.printer.status(line(label, progress, state.pace));
                }
            }
            OutputMode::Nothing => {}
        }
    }

    /// Hides the progress while `print` runs.
    pub fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        let bar = self.lock().shown.as_ref().map(|shown| shown.bar.clone());
        match bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    /// Hides the progress until the next call.
    pub fn clear(&self) {
        self.lock().clear();
    }

    /// Waits for a run and removes the bar when it ends or is stopped, so that messages about the stop are below
    /// nothing.
    pub async fn until_stopped<T>(&self, stop: impl Future<Output = ()>, run: impl Future<Output = T>) -> T {
        tokio::pin!(run);
        let ended = tokio::select! {
            biased;
            () = stop => None,
            ended = &mut run => Some(ended),
        };
        self.clear();
        match ended {
            Some(ended) => ended,
            None => run.await,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // The numbers are valid even after a panic.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for BenchProgress {
    fn drop(&mut self) {
        self.clear();
    }
}

impl State {
    /// The bar on the terminal with the right template.
    fn show(&mut self, counts: bool) -> &ProgressBar {
        if self.shown.as_ref().is_none_or(|shown| shown.counts != counts) {
            self.clear();
        }
        &self.shown.get_or_insert_with(|| VisibleBar::new(counts)).bar
    }

    fn clear(&mut self) {
        if let Some(shown) = self.shown.take() {
            shown.bar.finish_and_clear();
        }
    }
}

impl VisibleBar {
    fn new(counts: bool) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let template = if counts {
            "{prefix} {bar:28.cyan/dim} {pos}/{len}\n  {wide_msg}"
        } else {
            "{spinner} {wide_msg}"
        };
        // The templates are constants, so this does not fail.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━╸─").tick_chars("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏ "));
        }
        if !counts {
            bar.enable_steady_tick(SPIN_INTERVAL);
        }
        Self { bar, counts }
    }
}

impl OutputMode {
    fn of(printer: Printer) -> Self {
        if printer.quiet {
            Self::Nothing
        } else if printer.redraws() {
            Self::Bar
        } else {
            Self::Lines
        }
    }
}

impl Pace {
    /// Adds the current progress.
    fn observe(&mut self, progress: &Progress) {
        if progress.done < self.last.1 || progress.elapsed < self.last.0 {
            // A new phase has begun.
            *self = Self::default();
        }
        if progress.done > self.last.1 {
            self.last = (progress.elapsed, progress.done);
            self.first.get_or_insert(self.last);
        }
    }

    /// The time left: that of the schedule, or longer if requests end more slowly.
    fn time_left(&self, progress: &Progress) -> Option<Duration> {
        let to_release = progress.total.saturating_sub(progress.released) as f64;
        let by_schedule = progress.asked_rate.map(|rate| to_release / rate);
        let by_pace = self.first.and_then(|(since, before)| {
            let (seconds, ended) = (self.last.0.saturating_sub(since).as_secs_f64(), self.last.1 - before);
            // A few requests give no estimate.
            let is_known = ended >= 3 && seconds > 0.0;
            is_known.then(|| progress.total.saturating_sub(progress.done) as f64 * seconds / ended as f64)
        });
        let seconds = [by_schedule, by_pace].into_iter().flatten().reduce(f64::max)?;
        Duration::try_from_secs_f64(seconds).ok()
    }

    /// The time without a finished request, if it is long.
    fn silence(&self, progress: &Progress) -> Option<Duration> {
        let since = progress.elapsed.saturating_sub(self.last.0);
        (progress.in_flight > 0 && since >= SILENCE).then_some(since)
    }
}

/// The line for output that cannot be redrawn.
fn line(label: &str, progress: &Progress, pace: Pace) -> String {
    let Progress { total, done, .. } = progress;
    let left = pace.time_left(progress).map(|left| format!(", {}", about(left)));
    format!(
        "{label}: {done}/{total} requests after {} s, {}{}",
        progress.elapsed.as_secs(),
        details(progress, pace, false),
        left.unwrap_or_default()
    )
}

fn details(progress: &Progress, pace: Pace, is_coloured: bool) -> String {
    let mut parts = Vec::new();
    let seconds = progress.elapsed.as_secs_f64();
    if let Some(asked) = progress.asked_rate.filter(|_| seconds > 0.0) {
        // The first request is sent after one interval.
        parts.push(format!("{:.2} of {asked} req/s", progress.released as f64 / seconds));
    }
    parts.push(format!("{} in flight", progress.in_flight));
    if progress.failed > 0 {
        let failed = format!("{} failed", progress.failed);
        parts.push(if is_coloured { failed.red().to_string() } else { failed });
    }
    if let Some(mean) = progress.mean_ttft_ms {
        parts.push(format!("mean TTFT {mean:.1} ms"));
    }
    if let Some(mean) = progress.mean_tpot_ms {
        // After TTFT, which is also a mean; 80 columns have no room for the word again.
        let mean_of = if progress.mean_ttft_ms.is_some() { "" } else { "mean " };
        parts.push(format!("{mean_of}TPOT {mean:.2} ms"));
    }
    let mut text = parts.join(", ");
    if let Some(silence) = pace.silence(progress) {
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "; no request has ended for {} s: Ctrl+C prints the results so far",
            silence.as_secs()
        );
    }
    text
}

/// An estimated duration.
fn about(left: Duration) -> String {
    match left.as_secs() {
        0 => "almost done".to_owned(),
        seconds @ 1..100 => format!("about {seconds} s left"),
        seconds @ 100..5400 => format!("about {} min left", (seconds + 30) / 60),
        seconds => format!("about {} h left", (seconds + 1800) / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::RunPhase;

    fn start() -> Progress {
        Progress {
            phase: RunPhase::Measuring,
            total: 30,
            released: 5,
            done: 0,
            failed: 0,
            in_flight: 2,
            elapsed: Duration::from_secs(5),
            asked_rate: Some(1.0),
            mean_ttft_ms: None,
            mean_tpot_ms: None,
        }
    }

    #[test]
    fn a_new_template_replaces_the_bar() {
        let mut state = State::default();
        let spinner = state.show(false).clone();
        state.show(false);
        assert!(!spinner.is_finished());
        let bar = state.show(true).clone();
        assert!(spinner.is_finished() && !bar.is_finished());
        state.clear();
        assert!(bar.is_finished() && state.shown.is_none());
    }

    #[test]
    fn a_line_has_only_known_numbers() {
        let mut progress = start();
        assert_eq!(
            line("benchmark", &progress, Pace::default()),
            "benchmark: 0/30 requests after 5 s, 1.00 of 1 req/s, 2 in flight, about 25 s left"
        );
        progress.asked_rate = None;
        assert_eq!(
            line("benchmark", &progress, Pace::default()),
            "benchmark: 0/30 requests after 5 s, 2 in flight"
        );
        progress.mean_ttft_ms = Some(303.18);
        progress.mean_tpot_ms = Some(9.004);
        progress.failed = 1;
        assert_eq!(
            line("benchmark", &progress, Pace::default()),
            "benchmark: 0/30 requests after 5 s, 2 in flight, 1 failed, mean TTFT 303.2 ms, TPOT 9.00 ms"
        );
    }

    /// The progress when `done` requests have ended after `seconds`.
    fn after(pace: &mut Pace, seconds: u64, done: usize, asked_rate: Option<f64>) -> Progress {
        let progress = Progress {
            released: (usize::try_from(seconds).unwrap()).min(30),
            done,
            elapsed: Duration::from_secs(seconds),
            asked_rate,
            ..start()
        };
        pace.observe(&progress);
        progress
    }

    #[test]
    fn the_time_left_follows_the_slower_of_schedule_and_server() {
        let mut pace = Pace::default();
        let left = |pace: &Pace, progress: &Progress| pace.time_left(progress).map(|left| left.as_secs());
        // One ends every two seconds, but one per second is sent.
        for (seconds, done) in [(4, 1), (6, 2), (8, 3), (10, 4)] {
            after(&mut pace, seconds, done, Some(1.0));
        }
        let late = after(&mut pace, 10, 4, Some(1.0));
        assert_eq!(left(&pace, &late), Some(52));
        let all_at_once = after(&mut pace, 10, 4, None);
        assert_eq!(left(&pace, &all_at_once), Some(52));
        // The next phase starts again, and one answer gives no estimate.
        let next = after(&mut pace, 1, 1, None);
        assert_eq!(left(&pace, &next), None);
    }

    #[test]
    fn a_silent_server_is_reported() {
        let mut pace = Pace::default();
        after(&mut pace, 10, 1, None);
        let early = after(&mut pace, 69, 1, None);
        let late = after(&mut pace, 75, 1, None);
        assert!(!line("benchmark", &early, pace).contains("no request has ended"));
        assert!(
            line("benchmark", &late, pace)
                .ends_with("; no request has ended for 65 s: Ctrl+C prints the results so far")
        );
    }

    #[test]
    fn estimates_are_rounded() {
        let about = |seconds| about(Duration::from_secs(seconds));
        assert_eq!(
            [about(0), about(99), about(150), about(7300)],
            ["almost done", "about 99 s left", "about 3 min left", "about 2 h left"]
        );
    }
}
