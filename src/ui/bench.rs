//! Progress of a benchmark: two lines that are drawn again on a terminal, a line now and then elsewhere. Knows only the
//! numbers it shows.

use std::fmt::Write as _;
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use owo_colors::OwoColorize as _;

use super::Printer;
use crate::bench::Progress;

/// Between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// From here on it is said that nothing comes back. A long answer takes less with any model that is worth a benchmark.
const SILENCE: Duration = Duration::from_mins(1);

/// Between two turns of the sign that work goes on, where how much is left is not known.
const SPIN_INTERVAL: Duration = Duration::from_millis(120);

/// Shows how far a benchmark is, on stderr. It may be shared with whoever else prints meanwhile.
#[derive(Debug)]
pub struct BenchProgress {
    printer: Printer,
    medium: Medium,
    state: Mutex<State>,
}

#[derive(Debug)]
enum Medium {
    Bar,
    Lines,
    Nothing,
}

/// What the numbers of a moment alone do not tell.
#[derive(Debug, Default)]
struct State {
    /// When the last line was written, since the start.
    last_line: Duration,
    pace: Pace,
    /// What is on the terminal. Each has a bar of its own: one that changed its place would leave its last picture behind.
    shown: Option<Shown>,
}

#[derive(Debug)]
struct Shown {
    bar: ProgressBar,
    /// Whether it counts requests; else it turns.
    counts: bool,
}

/// How fast requests end.
#[derive(Debug, Clone, Copy, Default)]
struct Pace {
    /// When some had ended for the first time, and how many.
    first: Option<(Duration, usize)>,
    /// When the number of those last grew, and to what.
    last: (Duration, usize),
}

impl BenchProgress {
    /// A bar if stderr is a terminal, lines if not, nothing if the printer is quiet.
    pub fn new(printer: Printer) -> Self {
        Self::wanted(printer, true)
    }

    /// As [`Self::new`] where `is_wanted`, else one that shows nothing.
    pub fn wanted(printer: Printer, is_wanted: bool) -> Self {
        Self {
            printer,
            medium: if is_wanted {
                Medium::of(printer)
            } else {
                Medium::Nothing
            },
            state: Mutex::default(),
        }
    }

    /// Shows that something without a number goes on, such as `making prompts`, until the next call. Only on a terminal:
    /// elsewhere what has begun is a line of somebody else.
    pub fn begin(&self, what: &str) {
        if let Medium::Bar = &self.medium {
            self.lock().show(false).set_message(what.to_owned());
        }
    }

    /// Shows the state, or decides that it is too early to.
    pub fn update(&self, label: &str, progress: &Progress) {
        let mut state = self.lock();
        state.pace.observe(progress);
        match &self.medium {
            Medium::Bar => {
                // First what matters most: the end of the line is cut where the terminal is narrow.
                let left = state.pace.time_left(progress).map(|left| format!("{}, ", about(left)));
                let details = details(progress, state.pace, self.printer.colour());
                let bar = state.show(true);
                bar.set_prefix(label.to_owned());
                bar.set_length(progress.total as u64);
                bar.set_position(progress.done as u64);
                bar.set_message(left.unwrap_or_default() + &details);
            }
            Medium::Lines => {
                // Less time than at the last line: another phase has begun.
                if progress.elapsed < state.last_line {
                    state.last_line = Duration::ZERO;
                }
                if progress.elapsed >= state.last_line + LINE_INTERVAL {
                    state.last_line = progress.elapsed;
                    self.printer.status(line(label, progress, state.pace));
                }
            }
            Medium::Nothing => {}
        }
    }

    /// Lets somebody else print, and shows the progress again below.
    pub fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        let bar = self.lock().shown.as_ref().map(|shown| shown.bar.clone());
        match bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    /// Takes away whatever is shown, until the next call.
    pub fn clear(&self) {
        self.lock().clear();
    }

    /// Waits for a run, and takes the bar away when it ends or is stopped: what others say of the stop stands below nothing.
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
        // Whoever panicked while it held numbers left numbers.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for BenchProgress {
    fn drop(&mut self) {
        self.clear();
    }
}

impl State {
    /// The bar on the terminal, in the shape that is wanted.
    fn show(&mut self, counts: bool) -> &ProgressBar {
        if self.shown.as_ref().is_none_or(|shown| shown.counts != counts) {
            self.clear();
        }
        &self.shown.get_or_insert_with(|| Shown::new(counts)).bar
    }

    fn clear(&mut self) {
        if let Some(shown) = self.shown.take() {
            shown.bar.finish_and_clear();
        }
    }
}

impl Shown {
    fn new(counts: bool) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let template = if counts {
            "{prefix} {bar:28.cyan/dim} {pos}/{len}\n  {wide_msg}"
        } else {
            "{spinner} {wide_msg}"
        };
        // The templates are constants, and what a constant says is right.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━╸─").tick_chars("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏ "));
        }
        if !counts {
            bar.enable_steady_tick(SPIN_INTERVAL);
        }
        Self { bar, counts }
    }
}

impl Medium {
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
    /// Takes the state of a moment.
    fn observe(&mut self, progress: &Progress) {
        if progress.done < self.last.1 || progress.elapsed < self.last.0 {
            // Another phase has begun.
            *self = Self::default();
        }
        if progress.done > self.last.1 {
            self.last = (progress.elapsed, progress.done);
            self.first.get_or_insert(self.last);
        }
    }

    /// How long the rest takes: as long as the schedule does, or longer where requests end more slowly than that.
    fn time_left(&self, progress: &Progress) -> Option<Duration> {
        let to_release = progress.total.saturating_sub(progress.released) as f64;
        let by_schedule = progress.asked_rate.map(|rate| to_release / rate);
        let by_pace = self.first.and_then(|(since, before)| {
            let (seconds, ended) = (self.last.0.saturating_sub(since).as_secs_f64(), self.last.1 - before);
            // Of a few nothing can be told.
            let is_known = ended >= 3 && seconds > 0.0;
            is_known.then(|| progress.total.saturating_sub(progress.done) as f64 * seconds / ended as f64)
        });
        let seconds = [by_schedule, by_pace].into_iter().flatten().reduce(f64::max)?;
        Duration::try_from_secs_f64(seconds).ok()
    }

    /// How long nothing has ended, if that is remarkable.
    fn silence(&self, progress: &Progress) -> Option<Duration> {
        let since = progress.elapsed.saturating_sub(self.last.0);
        (progress.in_flight > 0 && since >= SILENCE).then_some(since)
    }
}

/// The line that is printed where nothing can be redrawn.
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
        // The first request of a schedule goes out after one interval, and not at once.
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
        // Behind the time to first token, which is a mean, too; a line of 80 columns has no room for the word again.
        let mean_of = if progress.mean_ttft_ms.is_some() { "" } else { "mean " };
        parts.push(format!("{mean_of}TPOT {mean:.2} ms"));
    }
    let mut text = parts.join(", ");
    if let Some(silence) = pace.silence(progress) {
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "; none has ended for {} s: Ctrl+C shows what there is",
            silence.as_secs()
        );
    }
    text
}

/// A length of time that is only estimated.
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
    fn a_bar_of_another_shape_takes_the_place_of_the_one_before() {
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
    fn a_line_says_what_is_known_and_no_more() {
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

    /// What is heard when `done` requests have ended after so many seconds.
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
    fn the_rest_takes_as_long_as_the_slower_of_schedule_and_server() {
        let mut pace = Pace::default();
        let left = |pace: &Pace, progress: &Progress| pace.time_left(progress).map(|left| left.as_secs());
        // One ends every two seconds, though one a second is sent.
        for (seconds, done) in [(4, 1), (6, 2), (8, 3), (10, 4)] {
            after(&mut pace, seconds, done, Some(1.0));
        }
        let late = after(&mut pace, 10, 4, Some(1.0));
        assert_eq!(left(&pace, &late), Some(52));
        let all_at_once = after(&mut pace, 10, 4, None);
        assert_eq!(left(&pace, &all_at_once), Some(52));
        // The next phase begins anew, and of one answer nothing can be told.
        let next = after(&mut pace, 1, 1, None);
        assert_eq!(left(&pace, &next), None);
    }

    #[test]
    fn a_server_that_sends_nothing_is_told_of() {
        let mut pace = Pace::default();
        after(&mut pace, 10, 1, None);
        let early = after(&mut pace, 69, 1, None);
        let late = after(&mut pace, 75, 1, None);
        assert!(!line("benchmark", &early, pace).contains("none has ended"));
        assert!(line("benchmark", &late, pace).ends_with("; none has ended for 65 s: Ctrl+C shows what there is"));
    }

    #[test]
    fn estimates_claim_no_more_than_they_know() {
        let about = |seconds| about(Duration::from_secs(seconds));
        assert_eq!(
            [about(0), about(99), about(150), about(7300)],
            ["almost done", "about 99 s left", "about 3 min left", "about 2 h left"]
        );
    }
}
