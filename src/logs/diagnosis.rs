//! Diagnoses a failed engine from its log: the first real error, not the last line.
//!
//! Several processes of vLLM write one log. When one fails the others fail as a consequence, each with a traceback of its own, and
//! the last ones only refer to earlier lines. So the first exception counts, and the first one within a chain of exceptions.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use regex::Regex;

use self::hints::Evidence;
pub use self::hints::{Hint, hints};
use super::lines::{LineSplitter, plain};
use super::phases::{Phase, PhaseTracker};
use super::rotation::{self, Position};
use crate::engine::EngineKind;
use crate::fleet::Exit;

mod hints;

/// The longest error text, in characters.
const MAX_LENGTH: usize = 400;

/// How many bytes at the end of a log are searched. An engine that fails late logs the cause at the end.
const SEARCHED: u64 = 4 * 1024 * 1024;

/// The most lines that belong to a headline such as `1 validation error for …`.
const CONTINUATION_LINES: usize = 2;

/// One line: process, level and message. Process and level can be missing.
const RECORD: &str = r"(?x)
    ^(?: \( (?P<process> [^()]+ \s pid=\d+ ) \) \s )?
    (?: (?P<level> DEBUG|INFO|WARNING|ERROR|CRITICAL ) \s+ \d\d-\d\d \s \d\d:\d\d:\d\d \s \[ [^\]]+ \] \s? )?
    (?P<message> .* )$";

/// The last line of a Python traceback: `package.ClassName: message`.
const EXCEPTION: &str = r"^(?:[A-Za-z_]\w*\.)*(?P<class>[A-Z]\w*|\w+Error)(?:: .*|:?)$";

/// Errors of one line.
const ERROR_LINE: &str = r"(?x)
    ^ (?: ERROR|CRITICAL ) : \s+ (?P<uvicorn> .+ ) $
    | ^ error: \s (?P<sidecar> .+ ) $
    | ^ \[ [^\]]+ \] \s LMCache \s (?: ERROR|CRITICAL ) : \s (?P<lmcache> .+? ) (?: \s \( \S+ : \d+ : \S+ \) )? $
    | ^ (?P<crash> Fatal\ Python\ error: .* | .* Segmentation\ fault .* | terminate\ called\ .* | .* :\ command\ not\ found
        | .* CUDA\ out\ of\ memory .* ) $";

/// Lines that only report the failure of something else.
const CONSEQUENCE: &str = r"(?x)
    [Ss]ee \s (?:the \s)? (?: root \s cause | stack \s trace )
    | EngineDeadError
    | ^EngineCore \s (?: encountered | failed )
    | output_handler \s failed
    | ^WorkerProc \s
    | check \s the \s stack \s trace \s above
    | Worker \s failed \s with \s KV \s connector \s output
    | One \s or \s more \s workers \s failed
    | ^Application \s startup \s failed";

/// The first real error in the lines of one engine's log, without colours and prefixes.
pub fn first_error<'log>(lines: impl IntoIterator<Item = &'log str>) -> Option<String> {
    let mut search = Search::new();
    for line in lines {
        search.feed(line);
    }
    search.finish()
}

/// [`first_error`] of a log from `from` on, where the failed incarnation began to write.
pub fn first_error_in(log: &Path, from: Position) -> io::Result<Option<String>> {
    let mut search = Search::new();
    each_line(log, from, |line| search.feed(line))?;
    Ok(search.finish())
}

/// The diagnosis of a failed engine.
#[derive(Debug, Clone)]
pub struct Diagnosis {
    /// The first real error by [`first_error`], or else the line of the log that shows the failure. `None` if the log has none, as
    /// after SIGKILL.
    pub error: Option<String>,
    /// The known failure that matches.
    pub hint: Option<&'static Hint>,
}

/// The last phase of the start that began to write at `from`; `None` if its log shows none.
pub fn phase_reached(log: &Path, from: Position, kind: EngineKind) -> io::Result<Option<Phase>> {
    let mut phases = PhaseTracker::new(kind);
    each_line(log, from, |line| {
        phases.feed(line);
    })?;
    Ok(phases.reached())
}

/// Diagnoses an engine from its log at `log`, from `from` on, where its failed incarnation began to write. `exit` is how its leader
/// ended; `None` if it still ran, so it hung. Returns `None` if the log shows nothing or cannot be read.
///
/// An engine that was asked to stop gets no hint: vLLM fails in many ways when it gets SIGTERM during its start.
pub fn diagnose(log: &Path, from: Position, exit: Option<Exit>) -> Option<Diagnosis> {
    let mut search = Search::new();
    let mut evidence = Evidence::default();
    let mut phases = PhaseTracker::new(EngineKind::Vllm);
    let read = each_line(log, from, |line| {
        let line = plain(line.trim_end().as_bytes());
        phases.feed(&line);
        evidence.feed(search.message(&line));
        search.feed(&line);
    });
    if let Err(error) = read {
        tracing::debug!(%error, "a failed engine's log cannot be read");
    }
    let error = search.found();
    if exit.is_some_and(Exit::was_asked_for) {
        return error.map(|error| Diagnosis {
            error: Some(shortened(error)),
            hint: None,
        });
    }
    let found = hints::find(&hints::FailureFacts {
        error: error.as_deref(),
        evidence: &evidence,
        phase: phases.reached().map(|phase| phase.name),
        exit,
    });
    let (hint, line) = found.map_or((None, None), |(hint, line)| (Some(hint), line));
    let error = error.as_deref().or(line).map(|text| shortened(text.to_owned()));
    (error.is_some() || hint.is_some()).then_some(Diagnosis { error, hint })
}

/// Calls `take` with every line of the log's end, from `from` on.
fn each_line(log: &Path, from: Position, mut take: impl FnMut(&str)) -> io::Result<()> {
    let bytes = rotation::end_since(log, from, SEARCHED)?;
    let mut splitter = LineSplitter::default();
    splitter.feed(&bytes, |line| take(&String::from_utf8_lossy(&line)));
    if let Some(line) = splitter.finish() {
        take(&String::from_utf8_lossy(&line));
    }
    Ok(())
}

fn shortened(text: String) -> String {
    match text.char_indices().nth(MAX_LENGTH) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// The context of the next line of one process.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum TracebackContext {
    #[default]
    Nothing,
    /// In a traceback; the next line that looks like an exception ends it.
    Traceback,
    /// In the traceback of an exception that Python ignored.
    Ignored,
    /// In the lines below a headline; this many more belong to it.
    Headline(usize),
}

#[derive(Debug)]
struct Search {
    record: Regex,
    exception: Regex,
    argument: Regex,
    error_line: Regex,
    headline: Regex,
    consequence: Regex,
    within: HashMap<String, TracebackContext>,
    /// An exception or a refused argument: the best evidence.
    cause: Option<String>,
    /// An error without an exception.
    error: Option<String>,
    /// A consequence of another failure.
    consequence_seen: Option<String>,
}

impl Search {
    fn new() -> Self {
        let compile = |pattern| Regex::new(pattern).expect("the patterns are constants and every test compiles them");
        Self {
            record: compile(RECORD),
            exception: compile(EXCEPTION),
            argument: compile(r"^[\w./ -]+: error: (?P<message>.+)$"),
            error_line: compile(ERROR_LINE),
            headline: compile(r"\d+ validation errors? for \S+$"),
            consequence: compile(CONSEQUENCE),
            within: HashMap::new(),
            cause: None,
            error: None,
            consequence_seen: None,
        }
    }

    /// A line without colours and without its prefix.
    fn message<'line>(&self, line: &'line str) -> &'line str {
        let message = self.record.captures(line).and_then(|record| record.name("message"));
        message.map_or(line, |message| message.as_str())
    }

    fn feed(&mut self, line: &str) {
        let line = plain(line.trim_end().as_bytes());
        let Some(record) = self.record.captures(&line) else {
            return;
        };
        let process = record.name("process").map_or("", |process| process.as_str()).to_owned();
        let level = record.name("level").map(|level| level.as_str());
        let message = &record["message"];
        let is_error = !matches!(level, Some("DEBUG" | "INFO" | "WARNING"));
        let within = self.within.get(&process).copied().unwrap_or_default();
        let next = self.read(within, message, is_error, level.is_some());
        self.within.insert(process, next);
    }

    /// Reads one message of a process. Returns the context of its next line.
    fn read(&mut self, within: TracebackContext, message: &str, is_error: bool, has_level: bool) -> TracebackContext {
        match within {
            TracebackContext::Headline(lines)
                if lines > 0 && !message.trim_start().starts_with("For further information") =>
            {
                if let Some(cause) = &mut self.cause {
                    let detail = message.split(" [type=").next().unwrap_or_default().trim();
                    cause.push_str(": ");
                    cause.push_str(detail);
                }
                return TracebackContext::Headline(lines - 1);
            }
            TracebackContext::Headline(_) => return TracebackContext::Nothing,
            TracebackContext::Ignored | TracebackContext::Traceback => {
                let is_frame = message.is_empty() || message.starts_with(char::is_whitespace);
                if is_frame || message.starts_with("Traceback (") {
                    return within;
                }
                if let Some(exception) = self.exception.captures(message) {
                    let class = exception["class"].to_owned();
                    // Log levels look like exceptions, and another process can write one in between.
                    if class.chars().any(|letter| letter.is_ascii_lowercase()) {
                        let is_stop = matches!(
                            class.as_str(),
                            "KeyboardInterrupt" | "SystemExit" | "CancelledError" | "GeneratorExit"
                        );
                        if within == TracebackContext::Ignored || is_stop {
                            return TracebackContext::Nothing;
                        }
                        return self.found_cause(message);
                    }
                }
                return within;
            }
            TracebackContext::Nothing => {}
        }
        if message.starts_with("Exception ignored in") {
            return TracebackContext::Ignored;
        }
        if !is_error {
            return TracebackContext::Nothing;
        }
        // LMCache logs a whole traceback as one message with text before it.
        if message.contains("Traceback (most recent call last)") {
            return TracebackContext::Traceback;
        }
        if let Some(argument) = self.argument.captures(message).filter(|_| !has_level) {
            let text = argument["message"].to_owned();
            return self.found_cause(&text);
        }
        if has_level {
            self.found_error(message);
        } else if let Some(found) = self.error_line.captures(message) {
            let text = found
                .iter()
                .skip(1)
                .flatten()
                .next()
                .map(|text| text.as_str().to_owned());
            self.found_error(&text.unwrap_or_default());
        }
        TracebackContext::Nothing
    }

    fn found_cause(&mut self, text: &str) -> TracebackContext {
        if self.consequence.is_match(text) {
            self.consequence_seen.get_or_insert_with(|| text.to_owned());
            return TracebackContext::Nothing;
        }
        if self.cause.is_some() {
            return TracebackContext::Nothing;
        }
        self.cause = Some(text.to_owned());
        let lines = if self.headline.is_match(text) {
            CONTINUATION_LINES
        } else {
            0
        };
        TracebackContext::Headline(lines)
    }

    fn found_error(&mut self, text: &str) {
        let slot = if self.consequence.is_match(text) {
            &mut self.consequence_seen
        } else {
            &mut self.error
        };
        slot.get_or_insert_with(|| text.to_owned());
    }

    fn finish(self) -> Option<String> {
        self.found().map(shortened)
    }

    /// The error at its full length.
    fn found(self) -> Option<String> {
        self.cause.or(self.error).or(self.consequence_seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(text: &str) -> Option<String> {
        first_error(text.lines())
    }

    #[test]
    fn a_log_without_an_error_has_no_cause() {
        assert_eq!(
            first("(APIServer pid=1) INFO 11-22 22:12:25 [a.py:1] Error rate: 0\nINFO:     ok\n"),
            None
        );
    }

    #[test]
    fn of_chained_exceptions_the_first_counts() {
        let log = "Traceback (most recent call last):\n  File \"a\"\nValueError: first\n\n\
            During handling of the above exception, another exception occurred:\n\n\
            Traceback (most recent call last):\n  File \"b\"\nRuntimeError: second\n";
        assert_eq!(first(log).unwrap(), "ValueError: first");
    }

    #[test]
    fn lines_of_other_processes_do_not_end_a_traceback() {
        let log = "(Worker pid=2) ERROR 11-22 22:09:01 [w.py:1] WorkerProc hit an exception.\n\
            (Worker pid=2) ERROR 11-22 22:09:01 [w.py:1] Traceback (most recent call last):\n\
            (APIServer pid=1) INFO 11-22 22:09:01 [a.py:1] SomeClass: fine\n\
            (Worker pid=2) ERROR 11-22 22:09:01 [w.py:1]   File \"w.py\"\n\
            INFO:     127.0.0.1:1 - \"GET /health HTTP/1.1\" 200 OK\n\
            (Worker pid=2) ERROR 11-22 22:09:01 [w.py:1] torch.OutOfMemoryError: CUDA out of memory.\n\
            (EngineCore pid=3) Traceback (most recent call last):\n\
            (EngineCore pid=3) RuntimeError: Engine core initialization failed. See root cause above.\n";
        assert_eq!(first(log).unwrap(), "torch.OutOfMemoryError: CUDA out of memory.");
    }

    #[test]
    fn a_consequence_counts_only_without_a_cause() {
        let consequence = "RuntimeError: Engine core initialization failed. See root cause above.";
        let log = format!("Traceback (most recent call last):\n  File \"a\"\n{consequence}\n");
        assert_eq!(first(&log).unwrap(), consequence);
        let log = format!("{log}(EngineCore pid=3) ERROR 11-22 22:09:01 [c.py:1] no space left on device\n");
        assert_eq!(first(&log).unwrap(), "no space left on device");
    }

    #[test]
    fn stops_and_ignored_exceptions_are_no_causes() {
        let log = "Exception ignored in: <function X.__del__ at 0x7f>\nTraceback (most recent call last):\n\
            \x20 File \"a\"\nAttributeError: gone\n\
            Traceback (most recent call last):\n  File \"b\"\nKeyboardInterrupt\n\
            Traceback (most recent call last):\n  File \"c\"\nOSError: real\n";
        assert_eq!(first(log).unwrap(), "OSError: real");
    }

    #[test]
    fn uvicorn_and_lmcache_errors_are_found_without_traceback() {
        assert_eq!(
            first("ERROR:    [Errno 98] error while attempting to bind on address ('0.0.0.0', 1)\n").unwrap(),
            "[Errno 98] error while attempting to bind on address ('0.0.0.0', 1)"
        );
        let line =
            "\x1b[31;20m[2026-11-22 22:20:27,158] LMCache ERROR:\x1b[0m no peer \x1b[3m(pd.py:31:lmcache.pd)\x1b[0m";
        assert_eq!(first(line).unwrap(), "no peer");
    }

    #[test]
    fn an_endless_message_is_cut() {
        let log = format!(
            "Traceback (most recent call last):\n  File \"a\"\nValueError: {}\n",
            "ä".repeat(10_000)
        );
        assert_eq!(first(&log).unwrap().chars().count(), MAX_LENGTH + 1);
    }
}
