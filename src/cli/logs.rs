//! `xpyd logs`: what the roles of a run wrote, now and as they write it.

use std::io;
use std::path::{Path, PathBuf};

use super::status::running;
use crate::control::rundir::{self, DEFAULT_NAME, RunInfo};
use crate::logs::folder::LATEST;
use crate::logs::follow::{Follower, POLL_INTERVAL};
use crate::logs::lines::plain;
use crate::logs::roles::{self, RoleLog, UnknownRole};
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
    /// Begin with the last N lines of each log instead of all of it
    #[arg(short = 'n', long, value_name = "N")]
    tail: Option<usize>,
    /// Folder of the run, or its name below `logs`, or `latest`; without it, the run that is up, else the latest
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Name of the run that is up
    #[arg(long, value_name = "NAME", default_value = DEFAULT_NAME, conflicts_with = "run")]
    name: String,
}

/// Prints logs, role after role; with `--follow`, whatever comes after that as it comes.
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
    let mut shown = Shown::new(&chosen, printer);
    show(&mut shown, &chosen, &arguments, source.run.as_ref())
        .await
        .map_err(|error| cannot_read(&error))?;
    Ok(ExitStatus::Success)
}

async fn show(shown: &mut Shown, logs: &[RoleLog], arguments: &Arguments, run: Option<&RunInfo>) -> io::Result<()> {
    if shown.begin(logs, arguments.tail)? == Reader::Gone {
        return Ok(());
    }
    if arguments.follow {
        return shown.follow(run).await;
    }
    shown.finish();
    Ok(())
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
        Err(failure) => Err(failure.hint("logs of an earlier run: xpyd logs --run DIR")),
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
    prefixes: RolePrefixes,
    followers: Vec<Follower>,
}

impl Shown {
    fn new(logs: &[RoleLog], printer: Printer) -> Self {
        let names: Vec<&str> = logs.iter().map(|log| log.name.as_str()).collect();
        Self {
            printer,
            prefixes: RolePrefixes::new(&names),
            followers: Vec::new(),
        }
    }

    /// Shows what is there already, log after log.
    fn begin(&mut self, logs: &[RoleLog], tail: Option<usize>) -> io::Result<Reader> {
        for (index, log) in logs.iter().enumerate() {
            let mut follower = match tail {
                None => Follower::from_start(&log.path),
                Some(count) => {
                    let (follower, lines) = Follower::from_last(&log.path, count)?;
                    if self.print(index, &lines) == Reader::Gone {
                        return Ok(Reader::Gone);
                    }
                    follower
                }
            };
            loop {
                let lines = follower.read_new()?;
                if lines.is_empty() {
                    break;
                }
                if self.print(index, &lines) == Reader::Gone {
                    return Ok(Reader::Gone);
                }
            }
            self.followers.push(follower);
        }
        Ok(Reader::There)
    }

    /// Shows what comes, until the run is gone, or for ever if there is none to watch.
    async fn follow(&mut self, run: Option<&RunInfo>) -> io::Result<()> {
        loop {
            // Asked before reading, so that what a run wrote last is read after it was seen to be gone.
            let is_over = run.is_some_and(has_ended);
            let mut is_quiet = true;
            for index in 0..self.followers.len() {
                let lines = self.followers[index].read_new()?;
                is_quiet &= lines.is_empty();
                if self.print(index, &lines) == Reader::Gone {
                    return Ok(());
                }
            }
            if is_quiet && is_over {
                self.finish();
                return Ok(());
            }
            if is_quiet {
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        }
    }

    /// Shows the lines that never got an end.
    fn finish(&mut self) {
        for index in 0..self.followers.len() {
            if let Some(line) = self.followers[index].finish() {
                self.print(index, &[line]);
            }
        }
    }

    fn print(&self, index: usize, lines: &[Vec<u8>]) -> Reader {
        let lines = lines.iter().map(|line| self.prefixes.line(index, &plain(line)));
        if self.printer.data_lines(lines).is_ok() {
            Reader::There
        } else {
            Reader::Gone
        }
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
