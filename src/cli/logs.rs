//! `xpyd logs`: prints or follows the logs of a run.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

use jiff::civil::{DateTime, Time};
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use regex::{Regex, RegexBuilder};
use serde::Serialize;

use super::run_plan::RunPlan;
use super::running::running;
use crate::control::rundir::{self, DEFAULT_NAME, RunInfo};
use crate::logs::Merge;
use crate::logs::folder::{self, LATEST};
use crate::logs::follow::POLL_INTERVAL;
use crate::logs::lines::plain;
use crate::logs::merge::Record;
use crate::logs::roles::{self, RoleLog, UnknownRole};
use crate::logs::stamp::Head;
use crate::report::{ExitStatus, Failure};
use crate::signals::StopSignals;
use crate::ui::{Printer, Reader, RolePrefixes};

/// The default folder of all runs' logs, below the current one.
const LOGS_ROOT: &str = "logs";

/// Number of reads of the logs per check whether the run is over. The check can read all of `/proc`.
const LOOKS_PER_QUESTION: usize = 5;

/// Number of lines to begin with; `None` for all.
#[derive(Debug, Clone, Copy)]
struct Tail(Option<usize>);

/// Arguments of `xpyd logs`.
#[derive(Debug, clap::Args)]
#[command(allow_negative_numbers = true)]
pub struct Arguments {
    /// The logs: `prefiller1`, `decoder2`, `proxy`, `xpyd`, or a group: `prefill`, `decode`, `all`
    #[arg(value_name = "ROLE")]
    roles: Vec<String>,
    /// Continue as the logs grow
    #[arg(short, long)]
    follow: bool,
    /// Begin with the last N lines of each log, or with all of it (`all`); counted before `--grep`
    #[arg(short = 'n', long, value_name = "N", value_parser = parse_tail)]
    tail: Option<Tail>,
    /// Leave out older lines: `10m`, `14:05`, `2026-11-23T13:05:00Z`
    #[arg(long, value_name = "TIME", value_parser = parse_since)]
    since: Option<Timestamp>,
    /// Only lines that match this regular expression; colours are not part of a line
    #[arg(long, value_name = "REGEX")]
    grep: Option<String>,
    /// Ignore upper and lower case
    #[arg(short, long, requires = "grep")]
    ignore_case: bool,
    /// One JSON object per line: role and text; time, level and process if they are known
    #[arg(long)]
    json: bool,
    /// Folder of the run, its name below `logs`, or `latest`; default: the run that is up, else the latest
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Name of the run that is up
    #[arg(long, value_name = "NAME", default_value = DEFAULT_NAME, conflicts_with = "run")]
    name: String,
}

/// Prints logs, merged by time. With `--follow`, continues as they grow.
pub async fn run(arguments: Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    let source = source(&arguments, printer)?;
    let all = source.logs().map_err(|error| cannot_read(&error))?;
    let chosen = roles::select(&all, &arguments.roles).map_err(|error| unknown_role(error, &source.folder))?;
    if chosen.is_empty() {
        return Err(Failure::message(
            ExitStatus::Failure,
            format!("`{}` has no log yet", source.folder.display()),
        ));
    }
    let mut shown = LogPrinter::new(&chosen, &arguments, printer)?;
    if !arguments.follow {
        shown.show(false, &source).await?;
        return Ok(ExitStatus::Success);
    }
    let mut signals = StopSignals::listen().map_err(anyhow::Error::from)?;
    tokio::select! {
        biased;
        _ = signals.next() => {}
        shown = shown.show(true, &source) => shown?,
    }
    Ok(ExitStatus::Success)
}

/// A time: `10m` ago, `14:05` of the last 24 hours, or a whole date and time.
fn parse_since(text: &str) -> Result<Timestamp, String> {
    let now = Zoned::now();
    if let Ok(ago) = humantime::parse_duration(text) {
        return now.timestamp().checked_sub(ago).map_err(|error| error.to_string());
    }
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    // The date first: a whole date and time also parses as a time, without its day.
    let local = match (text.parse::<DateTime>(), text.parse::<Time>()) {
        (Ok(local), _) => Some(local),
        (_, Ok(time)) if time > now.time() => now.date().yesterday().ok().map(|day| day.to_datetime(time)),
        (_, Ok(time)) => Some(now.date().to_datetime(time)),
        _ => None,
    };
    local
        .and_then(|local| local.to_zoned(now.time_zone().clone()).ok())
        .map(|time| time.timestamp())
        .ok_or_else(|| "write for example `10m`, `14:05`, `2026-11-23 14:05:00` or `2026-11-23T13:05:00Z`".to_owned())
}

/// The folder of the logs, and the run that still writes them.
struct LogSource {
    folder: PathBuf,
    run: Option<RunInfo>,
}

impl LogSource {
    /// The existing logs, and those of engines that have not written yet.
    fn logs(&self) -> io::Result<Vec<RoleLog>> {
        let mut logs = roles::logs_in(&self.folder)?;
        for engine in self.run.iter().flat_map(|run| &run.engines) {
            if logs.iter().all(|log| log.name != engine.id.as_str()) {
                logs.push(RoleLog {
                    name: engine.id.to_string(),
                    path: self.folder.join(&engine.log_file),
                });
            }
        }
        roles::sort(&mut logs);
        Ok(logs)
    }

    /// Whether the run writes no more logs. For a run that is given as a folder, an xpyd must have recorded its outcome
    /// there, and no process can have a file of the folder open for writing. Without an outcome the run can be active in
    /// another, invisible container.
    fn is_over(&self) -> bool {
        match &self.run {
            Some(run) => !run.is_alive(),
            None => rundir::has_outcome(&self.folder) && !folder::is_written(&self.folder),
        }
    }
}

fn source(arguments: &Arguments, printer: Printer) -> Result<LogSource, Failure> {
    let root = Path::new(LOGS_ROOT);
    if let Some(run) = &arguments.run {
        let found = [run.clone(), root.join(run)].into_iter().find(|path| path.is_dir());
        return match found {
            Some(folder) => Ok(LogSource {
                folder: resolve(folder)?,
                run: None,
            }),
            None => Err(Failure::message(
                ExitStatus::Usage,
                format!("no folder `{}`, neither here nor in `{LOGS_ROOT}`", run.display()),
            )),
        };
    }
    let latest = root.join(LATEST);
    match running(&arguments.name) {
        Ok(info) => Ok(LogSource {
            folder: info.logs_dir.clone(),
            run: Some(info),
        }),
        // Here the latest run is probably the default one. A named run is not guessed.
        Err(failure) if failure.status == ExitStatus::RunState && arguments.name == DEFAULT_NAME && latest.is_dir() => {
            let folder = resolve(latest)?;
            printer.status(format!(
                "no run `{DEFAULT_NAME}` is up; these are the logs of the last run here, {}",
                folder.display()
            ));
            Ok(LogSource { folder, run: None })
        }
        Err(failure) => Err(failure.hint("`xpyd logs --run DIR` shows the logs of an earlier run")),
    }
}

/// The folder itself, because the next run moves the link `latest`.
/// Parses a number of lines, or `all`, as other tools do.
fn parse_tail(text: &str) -> Result<Tail, String> {
    if text == "all" {
        return Ok(Tail(None));
    }
    let lines = text
        .parse()
        .map_err(|_| "expected a number of lines, or `all`".to_owned())?;
    Ok(Tail(Some(lines)))
}

/// The failure for an invalid regular expression.
fn no_pattern(error: &regex::Error) -> Failure {
    // The last line has the reason; the lines before it point to the position.
    let text = error.to_string();
    let reason = text
        .lines()
        .last()
        .unwrap_or_default()
        .trim()
        .trim_start_matches("error: ");
    Failure::message(
        ExitStatus::Usage,
        format!("`--grep` is not a regular expression: {reason}"),
    )
    .hint("escape a special character with a backslash: `--grep '\\('`")
}

fn resolve(folder: PathBuf) -> Result<PathBuf, Failure> {
    fs_err::canonicalize(folder).map_err(|error| cannot_read(&error))
}

/// Prints the lines of logs, merged and filtered.
struct LogPrinter {
    printer: Printer,
    names: Vec<String>,
    prefixes: RolePrefixes,
    merge: Merge,
    grep: Option<Regex>,
    json: bool,
}

/// A line for programs.
#[derive(Serialize)]
struct JsonLine<'line> {
    role: &'line str,
    #[serde(skip_serializing_if = "Option::is_none")]
    time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    level: Option<Cow<'line, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<Cow<'line, str>>,
    text: &'line str,
}

impl LogPrinter {
    fn new(logs: &[RoleLog], arguments: &Arguments, printer: Printer) -> Result<Self, Failure> {
        let names: Vec<&str> = logs.iter().map(|log| log.name.as_str()).collect();
        let paths = logs.iter().map(|log| log.path.as_path());
        let since = arguments.since.map(Timestamp::as_microsecond);
        let merge = Merge::open(
            paths,
            since,
            arguments.tail.and_then(|Tail(lines)| lines),
            &TimeZone::system(),
        );
        let grep = arguments.grep.as_ref().map(|pattern| {
            RegexBuilder::new(pattern)
                .case_insensitive(arguments.ignore_case)
                .build()
        });
        Ok(Self {
            printer,
            prefixes: RolePrefixes::new(&names, printer.colours_data()),
            names: names.into_iter().map(str::to_owned).collect(),
            merge: merge.map_err(|error| cannot_read(&error))?,
            grep: grep.transpose().map_err(|error| no_pattern(&error))?,
            json: arguments.json,
        })
    }

    /// Prints the existing lines. With `follow`, also prints later ones until the run has ended.
    async fn show(&mut self, follow: bool, source: &LogSource) -> Result<(), Failure> {
        for look in 0_usize.. {
            // Checked before reading, so that the last lines of a run that has ended are still read.
            let is_over = !follow || look.is_multiple_of(LOOKS_PER_QUESTION) && source.is_over();
            loop {
                let records = self.merge.read_new().map_err(|error| cannot_read(&error))?;
                if records.is_empty() {
                    break;
                }
                if self.print(&records)? == Reader::Gone {
                    return Ok(());
                }
                // So that Ctrl+C is handled between two batches.
                tokio::task::yield_now().await;
            }
            if is_over {
                let unfinished = self.merge.finish();
                self.print(&unfinished)?;
                return Ok(());
            }
            if self.printer.data_reader() == Reader::Gone {
                return Ok(());
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    fn print(&self, records: &[Record]) -> Result<Reader, Failure> {
        let mut lines = String::new();
        for record in records {
            let text = plain(&record.line);
            if self.grep.as_ref().is_none_or(|grep| grep.is_match(&text)) {
                self.add(record, &text, &mut lines);
            }
        }
        self.printer.data_lines(&lines)
    }

    /// Adds a line to `lines`.
    fn add(&self, record: &Record, text: &str, lines: &mut String) {
        if self.json {
            lines.push_str(&self.json(record, text));
        } else {
            lines.push_str(self.prefixes.of(record.log));
            lines.push_str(text);
        }
        lines.push('\n');
    }

    fn json(&self, record: &Record, text: &str) -> String {
        let head = Head::of(&record.line);
        let line = JsonLine {
            role: &self.names[record.log],
            time: record
                .time
                .and_then(|time| Timestamp::from_microsecond(time).ok())
                .map(|time| time.to_string()),
            level: head.level.map(String::from_utf8_lossy),
            process: head.process.map(String::from_utf8_lossy),
            text,
        };
        serde_json::to_string(&line).expect("texts can be put into JSON")
    }
}

fn unknown_role(error: UnknownRole, folder: &Path) -> Failure {
    if is_planned(&error.name, folder) {
        let text = format!(
            "{} has no log: run `{}` ended before its start",
            error.name,
            folder.display()
        );
        return Failure::message(ExitStatus::Failure, text).hint(format!(
            "`xpyd logs xpyd --run {}` shows why it ended",
            folder.display()
        ));
    }
    let known = format!("this run has: {}", error.known.join(" "));
    let nearest = error
        .nearest
        .as_ref()
        .map(|nearest| format!("did you mean `{nearest}`?"));
    let failure = Failure::new(ExitStatus::Usage, error);
    match nearest {
        Some(nearest) => failure.hint(nearest).hint(known),
        None => failure.hint(known),
    }
}

/// Whether the plan of the run in `folder` has an engine or a role with this name.
fn is_planned(name: &str, folder: &Path) -> bool {
    let plan = RunPlan::read(folder);
    plan.is_some_and(|plan| plan.engines().iter().any(|engine| engine["id"] == name))
}

fn cannot_read(error: &io::Error) -> Failure {
    Failure::message(ExitStatus::Failure, format!("cannot read the logs: {error}"))
}
