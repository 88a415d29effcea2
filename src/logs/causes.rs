//! Why an engine failed, told from its log: the first real error, not the last line.
//!
//! vLLM is several processes that write one log, and when one fails the others fail of it, each with a traceback of its
//! own. The last ones only say to look above. So the first exception counts, and within a chain of exceptions the
//! first one too.

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

/// Longest answer, in characters.
const MAX_LENGTH: usize = 400;

/// How much of a log's end is searched, in bytes. An engine that fails late fails at the end.
const SEARCHED: u64 = 4 * 1024 * 1024;

/// Most lines that follow a headline such as `1 validation error for …` and belong to it.
const CONTINUATION_LINES: usize = 2;

/// One line: who wrote it, as what, and the message. Both parts before the message may be missing.
const RECORD: &str = r"(?x)
    ^(?: \( (?P<process> [^()]+ \s pid=\d+ ) \) \s )?
    (?: (?P<level> DEBUG|INFO|WARNING|ERROR|CRITICAL ) \s+ \d\d-\d\d \s \d\d:\d\d:\d\d \s \[ [^\]]+ \] \s? )?
    (?P<message> .* )$";

/// A Python exception as a traceback ends with it: `package.ClassName: message`.
const EXCEPTION: &str = r"^(?:[A-Za-z_]\w*\.)*(?P<class>[A-Z]\w*|\w+Error)(?:: .*|:?)$";

/// Errors that are one line each.
const ERROR_LINE: &str = r"(?x)
    ^ (?: ERROR|CRITICAL ) : \s+ (?P<uvicorn> .+ ) $
    | ^ error: \s (?P<sidecar> .+ ) $
    | ^ \[ [^\]]+ \] \s LMCache \s (?: ERROR|CRITICAL ) : \s (?P<lmcache> .+? ) (?: \s \( \S+ : \d+ : \S+ \) )? $
    | ^ (?P<crash> Fatal\ Python\ error: .* | .* Segmentation\ fault .* | terminate\ called\ .* | .* :\ command\ not\ found
        | .* CUDA\ out\ of\ memory .* ) $";

/// Lines that only report that something else failed.
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

/// [`first_error`] of a log from `from` on, which is where the failed incarnation began to write.
pub fn first_error_in(log: &Path, from: Position) -> io::Result<Option<String>> {
    let mut search = Search::new();
    each_line(log, from, |line| search.feed(line))?;
    Ok(search.finish())
}

/// Why an engine failed.
#[derive(Debug, Clone)]
pub struct Diagnosis {
    /// The first real error, as [`first_error`] gives it, or else the line of the log that shows the failure. `None` if
    /// the log says nothing, as after SIGKILL.
    pub error: Option<String>,
    /// What is known about this failure.
    pub hint: Option<&'static Hint>,
}

/// How far the start came that began to write at `from`; `None` if its log shows nothing of it.
pub fn phase_reached(log: &Path, from: Position, kind: EngineKind) -> io::Result<Option<Phase>> {
    let mut phases = PhaseTracker::new(kind);
    each_line(log, from, |line| {
        phases.feed(line);
    })?;
    Ok(phases.reached())
}

/// Why the engine failed that wrote the log at `log`, from `from` on, which is where its failed incarnation began to
/// write. `exit` is how its leader ended; `None` if it still ran, so that it hung. `None` if there is nothing
/// to say. A log that cannot be read says nothing.
///
/// An engine that was asked to stop gets no hint: vLLM fails in many ways when SIGTERM meets its start.
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
    let found = hints::find(&hints::Failure {
        error: error.as_deref(),
        evidence: &evidence,
        phase: phases.reached().map(|phase| phase.name),
        exit,
    });
    let (hint, line) = found.map_or((None, None), |(hint, line)| (Some(hint), line));
    let error = error.as_deref().or(line).map(|text| shortened(text.to_owned()));
    (error.is_some() || hint.is_some()).then_some(Diagnosis { error, hint })
}

/// Gives every line of the log's end to `take`, from `from` on.
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

/// What each process of the log is in the middle of.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Within {
    #[default]
    Nothing,
    /// The next line that looks like an exception ends it.
    Traceback,
    /// Python tells of an exception that it ignored; its traceback means nothing.
    Ignored,
    /// So many more lines belong to the headline found.
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
    within: HashMap<String, Within>,
    /// An exception or a refused argument: as good as it gets.
    cause: Option<String>,
    /// An error without an exception.
    error: Option<String>,
    /// Something that failed because something else did.
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

    /// A line without colours, without what says who wrote it and when.
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

    /// Reads one message of a process; what the process is within after it.
    fn read(&mut self, within: Within, message: &str, is_error: bool, has_level: bool) -> Within {
        match within {
            Within::Headline(lines) if lines > 0 && !message.trim_start().starts_with("For further information") => {
                if let Some(cause) = &mut self.cause {
                    let detail = message.split(" [type=").next().unwrap_or_default().trim();
                    cause.push_str(": ");
                    cause.push_str(detail);
                }
                return Within::Headline(lines - 1);
            }
            Within::Headline(_) => return Within::Nothing,
            Within::Ignored | Within::Traceback => {
                let is_frame = message.is_empty() || message.starts_with(char::is_whitespace);
                if is_frame || message.starts_with("Traceback (") {
                    return within;
                }
                if let Some(exception) = self.exception.captures(message) {
                    let class = exception["class"].to_owned();
                    // Levels look like exceptions, and another process may write one in between.
                    if class.chars().any(|letter| letter.is_ascii_lowercase()) {
                        let is_stop = matches!(
                            class.as_str(),
                            "KeyboardInterrupt" | "SystemExit" | "CancelledError" | "GeneratorExit"
                        );
                        if within == Within::Ignored || is_stop {
                            return Within::Nothing;
                        }
                        return self.found_cause(message);
                    }
                }
                return within;
            }
            Within::Nothing => {}
        }
        if message.starts_with("Exception ignored in") {
            return Within::Ignored;
        }
        if !is_error {
            return Within::Nothing;
        }
        // LMCache logs a whole traceback as one message that begins with a text of its own.
        if message.contains("Traceback (most recent call last)") {
            return Within::Traceback;
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
        Within::Nothing
    }

    fn found_cause(&mut self, text: &str) -> Within {
        if self.consequence.is_match(text) {
            self.consequence_seen.get_or_insert_with(|| text.to_owned());
            return Within::Nothing;
        }
        if self.cause.is_some() {
            return Within::Nothing;
        }
        self.cause = Some(text.to_owned());
        let lines = if self.headline.is_match(text) {
            CONTINUATION_LINES
        } else {
            0
        };
        Within::Headline(lines)
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
    fn a_consequence_counts_only_where_nothing_else_is_known() {
        let consequence = "RuntimeError: Engine core initialization failed. See root cause above.";
        let log = format!("Traceback (most recent call last):\n  File \"a\"\n{consequence}\n");
        assert_eq!(first(&log).unwrap(), consequence);
        let log = format!("{log}(EngineCore pid=3) ERROR 11-22 22:09:01 [c.py:1] no space left on device\n");
        assert_eq!(first(&log).unwrap(), "no space left on device");
    }

    #[test]
    fn being_stopped_and_exceptions_that_python_ignores_are_no_causes() {
        let log = "Exception ignored in: <function X.__del__ at 0x7f>\nTraceback (most recent call last):\n\
            \x20 File \"a\"\nAttributeError: gone\n\
            Traceback (most recent call last):\n  File \"b\"\nKeyboardInterrupt\n\
            Traceback (most recent call last):\n  File \"c\"\nOSError: real\n";
        assert_eq!(first(log).unwrap(), "OSError: real");
    }

    #[test]
    fn errors_of_uvicorn_and_lmcache_are_found_without_a_traceback() {
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
