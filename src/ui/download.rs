//! Progress of a download: a bar on a terminal, a line now and then elsewhere.

use std::sync::Mutex;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};
use tokio::time::Instant;

use super::{Printer, time_span};

const BAR: &str = "  {bar:24.cyan/dim} {binary_bytes:>10} of {binary_total_bytes}  {binary_bytes_per_sec:.dim}  {msg}";

/// Interval of lines if nothing can be redrawn.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// A running download. Several threads can report to it.
#[derive(Debug)]
pub struct DownloadProgress {
    printer: Printer,
    redraws: bool,
    bar: ProgressBar,
    began: Instant,
    last_line: Mutex<LastLine>,
}

/// The last printed line.
#[derive(Debug)]
struct LastLine {
    at: Instant,
    percent: u64,
}

impl DownloadProgress {
    /// A download that has received nothing.
    pub fn new(printer: Printer) -> Self {
        let redraws = printer.redraws();
        let target = if redraws {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(0), target).with_finish(ProgressFinish::AndClear);
        if let Ok(style) = ProgressStyle::with_template(BAR) {
            bar.set_style(style);
        }
        let began = Instant::now();
        Self {
            printer,
            redraws,
            bar,
            began,
            last_line: Mutex::new(LastLine { at: began, percent: 0 }),
        }
    }

    /// Updates the number of received bytes and files.
    pub fn advance(&self, bytes: u64, total: u64, (files, total_files): (usize, usize)) {
        self.bar.set_length(total);
        self.bar.set_position(bytes);
        self.bar
            .set_message(format!("file {} of {total_files}", (files + 1).min(total_files)));
        if self.redraws || total == 0 {
            return;
        }
        let percent = u64::try_from(u128::from(bytes) * 100 / u128::from(total)).unwrap_or(100);
        let Ok(mut last_line) = self.last_line.lock() else {
            return;
        };
        if last_line.at.elapsed() >= LINE_EVERY && percent > last_line.percent {
            *last_line = LastLine {
                at: Instant::now(),
                percent,
            };
            self.printer
                .status(format!("  {percent} % of {:.1} GiB", total as f64 / 1_073_741_824.0));
        }
    }

    /// Prints a note above the bar.
    pub fn note(&self, text: &str) {
        if self.redraws {
            self.bar.suspend(|| self.printer.status(format!("  {text}")));
        } else {
            self.printer.status(format!("  {text}"));
        }
    }

    /// Removes the bar. Returns the time that the download took.
    pub fn finish(&self) -> String {
        self.bar.finish_and_clear();
        time_span(self.began.elapsed())
    }
}
