//! `xpyd down`: stops a run and waits until it has ended.

use std::time::Duration;

use tokio::time::Instant;

use super::run_lifecycle::{acquire, report_leftovers};
use super::running::{client, running, wait_for_run};
use super::{attach, command};
use crate::app;
use crate::control::api::DownRequest;
use crate::control::client::{ClientError, ControlClient};
use crate::control::rundir::{self, DEFAULT_NAME, RunInfo};
use crate::fleet::FleetStage;
use crate::report::{ExitStatus, Failure};
use crate::supervisor::{AttachableRun, EndReason};
use crate::ui::{Printer, StopProgress, time_span};

/// Interval between checks whether the run has ended.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Arguments of `xpyd down`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Name of the run
    #[arg(long, value_name = "NAME", default_value = DEFAULT_NAME)]
    name: String,
    /// Kill the engines now, without waiting for requests in flight
    #[arg(long)]
    force: bool,
    /// Only stop xpyd and its proxy, for an upgrade: the engines wait for the next `xpyd up`
    #[arg(long, conflicts_with = "force")]
    keep_engines: bool,
    /// How long to wait for the end; the run continues to stop after that
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = crate::span::parse)]
    timeout: Duration,
}

impl Arguments {
    /// A graceful stop of the run with this name.
    pub(super) fn of(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            force: false,
            keep_engines: false,
            timeout: Duration::from_mins(5),
        }
    }
}

/// Stops a run. It succeeds only if the run has ended and reported that nothing is left. Ctrl+C only ends the waiting.
pub async fn run(arguments: Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    match kept_engines(&arguments.name)? {
        // This process stops the engines itself, so Ctrl+C must not end it early.
        Some(kept) => end_kept(kept, arguments, printer).await,
        None => wait_for_run("stop", &arguments.name, stop(&arguments, printer)).await,
    }
}

/// As [`run`], but signals do not end the waiting.
pub(super) async fn run_to_its_end(arguments: Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    match kept_engines(&arguments.name)? {
        Some(kept) => end_kept(kept, arguments, printer).await,
        None => stop(&arguments, printer).await,
    }
}

/// The engines of a run with this name that has lost its xpyd.
fn kept_engines(name: &str) -> Result<Option<AttachableRun>, Failure> {
    if rundir::find(name).is_ok_and(|found| found.is_none()) {
        attach::find(name)
    } else {
        Ok(None)
    }
}

async fn stop(arguments: &Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    let info = running(&arguments.name)?;
    let client = client(&info)?;
    let started = Instant::now();
    let request = DownRequest {
        force: arguments.force,
        keep_engines: arguments.keep_engines,
    };
    let mut kept_for = Duration::ZERO;
    match client.down(request).await {
        Ok(answer) => kept_for = Duration::from_secs(answer.keep_seconds),
        // It can have ended by itself. If it has not, waiting is useless.
        Err(_) if !info.is_alive() => {}
        Err(error @ ClientError::Refused { .. }) => return Err(Failure::new(ExitStatus::Failure, error)),
        Err(error) => return Err(unanswered(error, &info)),
    }
    let force = command("down --force", &info.name);
    let hurry = if arguments.force {
        "forced".to_owned()
    } else {
        format!("{force} kills now")
    };
    let progress = StopProgress::new(printer, hurry);
    if !wait(&info, &client, started + arguments.timeout, progress).await {
        let waited = time_span(started.elapsed());
        let failure = Failure::message(
            ExitStatus::TeardownIncomplete,
            format!("run `{}` (pid {}) is still there after {waited}", info.name, info.pid),
        );
        return Err(failure.hint(format!("it continues to stop; `{force}` kills it now")));
    }
    match rundir::outcome(&info) {
        Ok(Some(outcome)) if outcome.leftovers.is_empty() && !kept_for.is_zero() => {
            printer.status(format!(
                "xpyd has left run `{}`; its engines wait {} for the next `{}`, and `{}` stops them",
                info.name,
                humantime::format_duration(kept_for),
                command("up", &info.name),
                command("down", &info.name)
            ));
            Ok(ExitStatus::Success)
        }
        Ok(Some(outcome)) if outcome.leftovers.is_empty() => {
            printer.status(format!(
                "run `{}` is down after {}",
                info.name,
                time_span(started.elapsed())
            ));
            Ok(ExitStatus::Success)
        }
        Ok(Some(outcome)) => {
            let left = outcome.leftovers.join("\n  ");
            let text = format!("run `{}` has ended, but left:\n  {left}", info.name);
            Err(Failure::message(ExitStatus::TeardownIncomplete, text))
        }
        Ok(None) => {
            let text = format!(
                "run `{}` has ended without reporting whether anything is left",
                info.name
            );
            let failure = Failure::message(ExitStatus::TeardownIncomplete, text);
            Err(failure.hint(format!(
                "see the end of its log: `xpyd logs xpyd --run {}`",
                info.logs_dir.display()
            )))
        }
        Err(error) => Err(Failure::new(ExitStatus::TeardownIncomplete, error)),
    }
}

/// Stops the engines of a run that has lost its xpyd.
async fn end_kept(kept: AttachableRun, arguments: Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    if arguments.keep_engines {
        let text = format!("run `{}` has no xpyd; its engines are waiting already", arguments.name);
        return Err(Failure::message(ExitStatus::RunState, text));
    }
    let (run_dir, name) = (acquire(&arguments.name)?, arguments.name);
    printer.status(format!(
        "stopping the engines that an earlier xpyd left: {}",
        attach::describe(&kept)
    ));
    let outcome = app::end_kept(kept, &run_dir, name.clone(), arguments.force, printer).await?;
    report_leftovers(&outcome, &name, printer);
    match &outcome.reason {
        // Without the shim monitor, the engines are killed without their grace period, which is still a stop.
        EndReason::Stopped | EndReason::Forced | EndReason::SupervisionLost { .. } => Ok(outcome.exit_status()),
        ending => Err(Failure::message(outcome.exit_status(), ending.to_string())),
    }
}

/// Waits with progress until the run has ended. Returns false at the deadline.
async fn wait(info: &RunInfo, client: &ControlClient, deadline: Instant, mut progress: StopProgress) -> bool {
    while info.is_alive() {
        if Instant::now() >= deadline {
            return false;
        }
        // Late in its stop, a run no longer answers. Its lock still shows when it has ended.
        if let Ok(status) = client.status().await {
            match status.stage {
                FleetStage::Leaving | FleetStage::Draining => {
                    progress.draining(status.in_flight, status.drain_seconds_left.map(Duration::from_secs));
                }
                _ => progress.stopping(&status.engines_left()),
            }
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    progress.clear();
    true
}

fn unanswered(error: ClientError, info: &RunInfo) -> Failure {
    let failure = Failure::new(ExitStatus::TeardownIncomplete, error);
    if info.keeps_engines {
        failure.hint(format!(
            "xpyd hangs: `kill -KILL {}` ends it, then `{}` ends its engines, which wait for the next xpyd",
            info.pid,
            command("down", &info.name)
        ))
    } else {
        failure.hint(format!(
            "xpyd hangs: `kill -KILL {}` ends it, and its shim then ends the engines",
            info.pid
        ))
    }
}
