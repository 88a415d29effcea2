//! The start and the end of a run, as `up`, `demo` and `down` share them: lock, folder, first messages, and the reason of
//! the end.

use std::path::Path;
use std::time::Duration;

use super::{command, no_run_dir};
use crate::app::{Ended, LogStarts};
use crate::control::rundir::{RunDir, RunDirError};
use crate::engine::EngineKind;
use crate::fleet::{EngineId, Exit, LogLimits, Role};
use crate::logs::{self, Diagnosis, Position, RunFolder};
use crate::own_log::OwnLog;
use crate::plan::Plan;
use crate::report::{ExitStatus, Failure};
use crate::supervisor::{EndReason, Outcome};
use crate::ui::Printer;

/// Default number of folders of old runs to keep.
pub(super) const KEEP_LOGS: usize = 20;

/// Takes the lock of the run with this name.
pub(super) fn acquire(name: &str) -> Result<RunDir, Failure> {
    RunDir::acquire(name).map_err(|error| match &error {
        RunDirError::AlreadyRunning { .. } => Failure::new(ExitStatus::RunState, error).hint(format!(
            "`{}` shows it, `{}` stops it, `--name NAME` starts another run on other ports",
            command("status", name),
            command("down", name)
        )),
        _ => no_run_dir(error),
    })
}

/// Creates the run's folder and returns its absolute path with it.
pub(super) fn create_folder(logs: &Path, plan: &Plan, keep: usize, printer: Printer) -> Result<RunFolder, Failure> {
    let root = std::path::absolute(logs).map_err(anyhow::Error::from)?;
    let stem = Path::new(&plan.profile)
        .file_stem()
        .map_or_else(|| "run".into(), |stem| stem.to_string_lossy());
    let folder = logs::create_run_folder(&root, &stem, keep)
        .map_err(|error| Failure::new(ExitStatus::Failure, error).hint("name another folder with `--logs DIR`"))?;
    for note in folder.notes() {
        printer.status(format!("warn  {note}"));
    }
    Ok(folder)
}

/// Writes xpyd's own log into the run's folder, within the profile's limits, until the result is dropped.
pub(super) fn log_to(folder: &Path, limits: LogLimits) -> Result<OwnLog, Failure> {
    Ok(OwnLog::to_files(folder, limits).map_err(anyhow::Error::from)?)
}

pub(super) fn announce(plan: &Plan, printer: Printer) {
    let count = |role| plan.engines_of(role).count();
    printer.status(format!(
        "starting {} prefill + {} decode {} of {}",
        count(Role::Prefill),
        count(Role::Decode),
        match plan.engine {
            EngineKind::Vllm => "engines",
            EngineKind::Sim => "simulated engines",
        },
        plan.model
    ));
    printer.status(format!(
        "connector {}: {}",
        plan.connector.name(),
        plan.connector_reason
    ));
    for note in &plan.notes {
        printer.status(format!("note: {note}"));
    }
    printer.status(format!("logs in {}", plan.run_dir.display()));
}

pub(super) fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

/// Reports how the run ended, and whether anything is left.
pub(super) fn conclude(ended: &Ended, plan: &Plan, name: &str, printer: Printer) -> Result<ExitStatus, Failure> {
    let Ended { outcome, log_starts } = ended;
    let status = outcome.exit_status();
    report_leftovers(outcome, name, printer);
    match &outcome.reason {
        EndReason::Stopped | EndReason::EnginesKept => Ok(status),
        EndReason::Forced => {
            printer.status("the stop was forced");
            Ok(status)
        }
        EndReason::EngineFailed { engine, exit, .. } => Err(engine_failed(outcome, plan, log_starts, engine, *exit)),
        EndReason::LostRole { engine, .. }
        | EndReason::CrashLoop { engine, .. }
        | EndReason::NotReady {
            engine: Some(engine), ..
        } => Err(engine_failed(outcome, plan, log_starts, engine, None)),
        EndReason::NotReady { engine: None, .. } => Err(hand_off_failed(outcome, plan, log_starts)),
        EndReason::SupervisionLost { .. } => Err(with_logs_hint(
            Failure::message(status, outcome.reason.to_string()),
            plan,
        )),
    }
}

/// Reports whether any process or listener of the run is left.
pub(super) fn report_leftovers(outcome: &Outcome, name: &str, printer: Printer) {
    if outcome.reason == EndReason::EnginesKept {
        printer.status(format!(
            "xpyd has left; the engines wait for the next `{}`, and `{}` stops them",
            command("up", name),
            command("down", name)
        ));
    } else if outcome.left.is_empty() {
        printer.status(format!(
            "stopped in {}; no process and no listener is left",
            seconds(outcome.teardown)
        ));
    } else {
        printer.error("the teardown is incomplete; still there:");
        for left in &outcome.left {
            printer.error(format!("  {left}"));
        }
    }
}

/// The failure of a run that an engine's failure ended: the first real error in its log, the known cause, and what to do
/// about it.
fn engine_failed(
    outcome: &Outcome,
    plan: &Plan,
    log_starts: &LogStarts,
    engine: &EngineId,
    exit: Option<Exit>,
) -> Failure {
    let spec = plan.engines.iter().find(|spec| spec.id == *engine);
    let log = spec.map(|spec| plan.run_dir.join(&spec.log_file)).unwrap_or_default();
    let diagnosis = logs::diagnose(&log, last_start(log_starts, engine), exit);
    let shown = format!("{} shows its log", logs_of(engine, plan));
    with_diagnosis(outcome, diagnosis.as_ref(), shown)
}

/// The failure of a run whose engines are all ready, but do not transfer KV. The log of one of them can have the reason.
fn hand_off_failed(outcome: &Outcome, plan: &Plan, log_starts: &LogStarts) -> Failure {
    let diagnosed = plan.engines.iter().find_map(|spec| {
        let log = plan.run_dir.join(&spec.log_file);
        let diagnosis = logs::diagnose(&log, last_start(log_starts, &spec.id), None)?;
        diagnosis.hint.is_some().then_some((spec, diagnosis))
    });
    match diagnosed {
        Some((spec, mut diagnosis)) => {
            diagnosis.error = diagnosis.error.map(|error| format!("{}: {error}", spec.id));
            let shown = format!("{} shows its log", logs_of(&spec.id, plan));
            with_diagnosis(outcome, Some(&diagnosis), shown)
        }
        None => with_logs_hint(
            Failure::message(outcome.exit_status(), outcome.reason.to_string()),
            plan,
        ),
    }
}

/// The command that shows the log of an engine of this run. It also works after the run has ended.
fn logs_of(engine: &EngineId, plan: &Plan) -> String {
    format!("`xpyd logs {engine} --tail 50 --run {}`", plan.run_dir.display())
}

/// The position in the log at which the engine's last incarnation, which failed, began.
fn last_start(log_starts: &LogStarts, engine: &EngineId) -> Position {
    log_starts.get(engine).copied().unwrap_or(Position::START)
}

fn with_logs_hint(failure: Failure, plan: &Plan) -> Failure {
    failure.hint(format!("the logs of the run are in {}", plan.run_dir.display()))
}

/// The ending, caused by the error in the log, caused by its known cause; then the hints.
fn with_diagnosis(outcome: &Outcome, diagnosis: Option<&Diagnosis>, log_shown_by: String) -> Failure {
    let hint = diagnosis.and_then(|diagnosis| diagnosis.hint);
    let known = hint.map(|hint| format!("{}: {}", hint.title, hint.explanation));
    let ending = outcome.reason.to_string();
    let error = diagnosis.and_then(|diagnosis| diagnosis.error.clone());
    // The reason of an engine that failed while it served names it already.
    let error = error.filter(|error| !ending.contains(error));
    let error = match (known, error) {
        (Some(known), Some(error)) => anyhow::Error::msg(known).context(error).context(ending),
        (Some(cause), None) | (None, Some(cause)) => anyhow::Error::msg(cause).context(ending),
        (None, None) => anyhow::Error::msg(ending),
    };
    let mut failure = Failure::new(outcome.exit_status(), error);
    if let Some(hint) = hint {
        tracing::info!(name = hint.name, "known failure");
        failure = failure.hint(hint.fix.as_str()).hint(format!("{} says more", hint.link));
    }
    failure.hint(log_shown_by)
}
