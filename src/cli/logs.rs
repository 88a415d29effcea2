//! `xpyd logs`: what the roles of a run wrote, now and as they write it.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

use jiff::civil::{DateTime, Time};
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use regex::{Regex, RegexBuilder};
use serde::Serialize;

use super::status::running;
use crate::control::rundir::{self, DEFAULT_NAME, RunInfo};
use crate::logs::Merge;
use crate::logs::folder::LATEST;
use crate::logs::follow::POLL_INTERVAL;
use crate::logs::lines::plain;
use crate::logs::merge::Record;
use crate::logs::roles::{self, RoleLog, UnknownRole};
use crate::logs::stamp::Head;
use crate::report::{ExitStatus, Failure};
use crate::ui::{Printer, RolePrefixes};

/// The folder with all runs' logs, below the current one.
const LOGS_ROOT: &str = "logs";

/// Arguments of `xpyd logs`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Whose logs: `prefiller1`, `decoder2`, `proxy`, `xpyd`, or a group: `prefill`, `decode`, `all`
    #[arg(value_name = "ROLE")]
    roles: Vec<String>,
    /// Go on as the logs grow
    #[arg(short, long)]
    follow: bool,
    /// Begin with the last N lines of each log instead of all of it; counted before `--grep`
    #[arg(short = 'n', long, value_name = "N")]
    tail: Option<usize>,
    /// Leave out what is older: `10m`, `14:05`, `2026-11-23T13:05:00Z`
    #[arg(long, value_name = "TIME", value_parser = parse_since)]
    since: Option<Timestamp>,
    /// Only lines that match this regular expression; colours are not part of a line
    #[arg(long, value_name = "REGEX")]
    grep: Option<String>,
    /// Match without regard to case
    #[arg(short, long, requires = "grep")]
    ignore_case: bool,
    /// One JSON object a line: role, text, and time, level and process where they are known
    #[arg(long)]
    json: bool,
    /// Folder of the run, or its name below `logs`, or `latest`; without it, the run that is up, else the latest
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Name of the run that is up
    #[arg(long, value_name = "NAME", default_value = DEFAULT_NAME, conflicts_with = "run")]
    name: String,
}

/// Prints logs, merged by time; with `--follow`, whatever comes after that as it comes.
pub async fn run(arguments: Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    let source = source(&arguments, printer)?;
    let all = source.logs().map_err(|error| cannot_read(&error))?;
    let chosen = roles::select(&all, &arguments.roles).map_err(unknown_role)?;
    if chosen.is_empty() {
        return Err(Failure::message(
            ExitStatus::Failure,
            format!("there is no log in `{}` yet", source.folder.display()),
        ));
    }
    let mut shown = Shown::new(&chosen, &arguments, printer)?;
    shown
        .show(arguments.follow, source.run.as_ref())
        .await
        .map_err(|error| cannot_read(&error))?;
    Ok(ExitStatus::Success)
}

/// A time as people write it: `10m` ago, `14:05` of the last 24 hours, or a whole date and time.
fn parse_since(text: &str) -> Result<Timestamp, String> {
    let now = Zoned::now();
    if let Ok(ago) = humantime::parse_duration(text) {
        return now.timestamp().checked_sub(ago).map_err(|error| error.to_string());
    }
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    // The date first: a whole date and time can be read as a time as well, of whatever day.
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

/// Where the logs are, and the run that still writes them.
struct Source {
    folder: PathBuf,
    run: Option<RunInfo>,
}

impl Source {
    /// The logs that are there, and those of engines that have not written yet.
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
}

fn source(arguments: &Arguments, printer: Printer) -> Result<Source, Failure> {
    let root = Path::new(LOGS_ROOT);
    if let Some(run) = &arguments.run {
        let found = [run.clone(), root.join(run)].into_iter().find(|path| path.is_dir());
        return match found {
            Some(folder) => Ok(Source {
                folder: resolve(folder)?,
                run: None,
            }),
            None => Err(Failure::message(
                ExitStatus::Usage,
                format!(
                    "there is no folder `{}`, neither here nor in `{LOGS_ROOT}`",
                    run.display()
                ),
            )),
        };
    }
    let latest = root.join(LATEST);
    match running(&arguments.name) {
        Ok(info) => Ok(Source {
            folder: info.logs_dir.clone(),
            run: Some(info),
        }),
        // The latest run here is the default one as likely as any; a run that was named is nothing to guess.
        Err(failure) if failure.status == ExitStatus::RunState && arguments.name == DEFAULT_NAME && latest.is_dir() => {
            let folder = resolve(latest)?;
            printer.status(format!(
                "no run is up; these are the logs of the last one here, {}",
                folder.display()
            ));
            Ok(Source { folder, run: None })
        }
        Err(failure) => Err(failure.hint("`xpyd logs --run DIR` shows those of an earlier run")),
    }
}

/// The folder itself, so that the next run does not move the link under us.
fn resolve(folder: PathBuf) -> Result<PathBuf, Failure> {
    fs_err::canonicalize(folder).map_err(|error| cannot_read(&error))
}

/// Whether anyone still reads what is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reader {
    There,
    Gone,
}

/// The logs being shown.
struct Shown {
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

impl Shown {
    fn new(logs: &[RoleLog], arguments: &Arguments, printer: Printer) -> Result<Self, Failure> {
        let names: Vec<&str> = logs.iter().map(|log| log.name.as_str()).collect();
        let paths = logs.iter().map(|log| log.path.as_path());
        let since = arguments.since.map(Timestamp::as_microsecond);
        let merge = Merge::open(paths, since, arguments.tail, &TimeZone::system());
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
            grep: grep
                .transpose()
                .map_err(|error| Failure::new(ExitStatus::Usage, error))?,
            json: arguments.json,
        })
    }

    /// Shows what is there already and, if it is to be followed, what comes until the run is gone; for ever if there is
    /// none to watch.
    async fn show(&mut self, follow: bool, run: Option<&RunInfo>) -> io::Result<()> {
        loop {
            // Asked before reading, so that what a run wrote last is read after it was seen to be gone.
            let is_over = !follow || run.is_some_and(has_ended);
            loop {
                let records = self.merge.read_new()?;
                if records.is_empty() {
                    break;
                }
                if self.print(&records) == Reader::Gone {
                    return Ok(());
                }
            }
            if is_over {
                let unfinished = self.merge.finish();
                self.print(&unfinished);
                return Ok(());
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    fn print(&self, records: &[Record]) -> Reader {
        let mut lines = String::new();
        for record in records {
            let text = plain(&record.line);
            if self.grep.as_ref().is_none_or(|grep| grep.is_match(&text)) {
                self.add(record, &text, &mut lines);
            }
        }
        if self.printer.data_lines(&lines).is_ok() {
            Reader::There
        } else {
            Reader::Gone
        }
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

/// Whether the run has let its lock go; when in doubt, it has not.
fn has_ended(run: &RunInfo) -> bool {
    rundir::find(&run.name).is_ok_and(|found| found.is_none_or(|found| !found.is_same_run(run)))
}

fn unknown_role(error: UnknownRole) -> Failure {
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

fn cannot_read(error: &io::Error) -> Failure {
    Failure::message(ExitStatus::Failure, format!("cannot read the logs: {error}"))
}
