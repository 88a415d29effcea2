//! `xpyd up`: from the command line to a running fleet, and how it ended.

use std::path::Path;
use std::time::Duration;

use clap::Args;

use super::request::{self, FleetArguments};
use super::{attach, block_on, checks, command, detach, engine_key, fetch, no_run_dir};
use crate::app::{self, Ended, LogStarts, Ready, Run};
use crate::control::rundir::{self, DEFAULT_NAME, RunDir, RunDirError};
use crate::engine::EngineKind;
use crate::fleet::{EngineId, Exit, LogLimits};
use crate::logs::{self, Diagnosis, Position, RunFolder};
use crate::own_log::OwnLog;
use crate::plan::{self, Plan};
use crate::proxy;
use crate::report::{ExitStatus, Failure};
use crate::supervisor::shim::orphans;
use crate::supervisor::{EndReason, Outcome};
use crate::ui::Printer;

/// Folders of old runs to keep by default.
pub(super) const KEEP_LOGS: usize = 20;

/// Arguments of `xpyd up`.
#[derive(Debug, Clone, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    fleet: FleetArguments,
    /// Only print what would be done, as `xpyd plan` does.
    #[arg(long)]
    dry_run: bool,
    /// Return once the fleet is ready, and leave it running; `xpyd down` stops it.
    #[arg(short, long, conflicts_with = "dry_run")]
    detach: bool,
    /// Name of the run, for `xpyd down`, `status` and `logs` when there are several.
    #[arg(long, default_value = "default")]
    name: String,
    /// Folders of old runs to keep.
    #[arg(long, default_value_t = KEEP_LOGS, value_name = "COUNT")]
    keep_logs: usize,
    /// Set by `--detach` on the process that stays.
    #[arg(long, hide = true)]
    detached_child: bool,
    /// Set by `xpyd bench --profile`: the parent whose end is the end of this run, too.
    #[arg(long, hide = true, value_name = "PID", requires = "detached_child")]
    ends_with: Option<i32>,
}

pub(super) fn run(arguments: &Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    if arguments.detached_child {
        detach::become_session_leader()?;
    }
    if let Some(parent) = arguments.ends_with {
        detach::end_with(parent)?;
    }
    let (profile, machine) = arguments.fleet.survey()?;
    let draft = request::build(&profile, &machine, &arguments.fleet.logs.join("RUN"))?;
    if arguments.detach && !arguments.detached_child {
        outlives_the_terminal(draft.proxy.service.access_log.file.as_deref())?;
        return block_on(detach::start(&arguments.name, printer));
    }
    let (mut profile, draft) = arguments
        .fleet
        .beside_others(&arguments.name, profile, draft, &machine, printer)?;
    if arguments.dry_run {
        super::plan::show(&draft, &machine, false, printer)?;
        return Ok(ExitStatus::Success);
    }
    let proxy_parts = request::proxy_parts(&draft.proxy.service)?;
    let run_dir = acquire(&arguments.name)?;
    let attach = attach::find(&arguments.name)?;
    let engine_key = engine_key::choose(&mut profile, &draft, attach.as_ref())?;
    // Held to the end of the run, so that no other run takes the folder for an old one.
    let folder;
    let plan = if let Some(kept) = &attach {
        let plan = request::build(
            &attach::where_they_run(&profile, kept, &arguments.name)?,
            &machine,
            &kept.kept.run_dir,
        )?;
        attach::resume(plan, kept, &arguments.name)?
    } else {
        request::preflight(&draft, &machine, printer)?;
        fetch::model(&draft, &profile, &machine, printer)?;
        folder = create_folder(&arguments.fleet.logs, &draft, arguments.keep_logs, printer)?;
        request::build(&profile, &machine, folder.path())?
    };
    let _log = log_to(&plan.run_dir, profile.logs)?;
    if let Some(kept) = &attach {
        let who = attach::who(kept);
        printer.status(format!("attaching to the engines that an earlier xpyd left: {who}"));
        printer.status(format!("logs in {}", plan.run_dir.display()));
    } else {
        announce(&plan, printer);
        if let Some(unwatched) = checks::unwatched(&orphans::find()) {
            printer.status(format!("note: {unwatched}: {}", checks::HOW_TO_REAP));
        }
    }
    let detached = arguments.detached_child;
    if let Some(fate) = rundir::fate_at_logout().filter(|_| detached && arguments.ends_with.is_none()) {
        printer.status(format!("note: {fate}"));
    }
    let key = key_in_words(&plan);
    let run = Run {
        plan: plan.clone(),
        name: arguments.name.clone(),
        run_dir,
        detached,
        has_parent: arguments.ends_with.is_some(),
        attach,
        proxy_parts: proxy::Parts {
            engine_key: engine_key.sent,
            ..proxy_parts
        },
        engine_key: engine_key.made,
        grow: Box::new(move |plan, role, count| plan::grow(&profile, &machine, plan, role, count)),
        printer,
        prints_throughput: true,
    };
    let log = plan.run_dir.join("xpyd.log");
    let ended = block_on(app::run(run, async move |ready: Ready| {
        tell_ready(&ready, &key, detached, printer);
        if detached {
            detach::release_parent(&log);
        }
        std::future::pending::<()>().await;
    }))?;
    conclude(&ended, &plan, &arguments.name, printer)
}

/// Refuses an access log that a detached run loses: the terminal and the pipes of its parent close when the start is over.
fn outlives_the_terminal(access_log: Option<&Path>) -> Result<(), Failure> {
    const OF_THE_TERMINAL: [&str; 5] = ["/dev/stdout", "/dev/stderr", "/dev/tty", "/dev/fd", "/proc/self/fd"];
    let Some(path) = access_log.filter(|path| OF_THE_TERMINAL.iter().any(|place| path.starts_with(place))) else {
        return Ok(());
    };
    let problem = format!(
        "`--access-log {}` ends with the terminal, and `--detach` does not",
        path.display()
    );
    Err(Failure::message(ExitStatus::Usage, problem).hint("name a file: `--access-log access.jsonl`"))
}

/// Takes the lock of the run of this name.
pub(super) fn acquire(name: &str) -> Result<RunDir, Failure> {
    RunDir::acquire(name).map_err(|error| match &error {
        RunDirError::AlreadyRunning { .. } => Failure::new(ExitStatus::RunState, error).hint(format!(
            "`{}` shows it, `{}` stops it, `--name NAME` starts another one on ports of its own",
            command("status", name),
            command("down", name)
        )),
        _ => no_run_dir(error),
    })
}

/// Makes the run's folder and returns its absolute path with it.
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

/// Sends xpyd's own log into the run's folder, within the profile's limits, until the result is dropped.
pub(super) fn log_to(folder: &Path, limits: LogLimits) -> Result<OwnLog, Failure> {
    Ok(OwnLog::to_files(folder, limits).map_err(anyhow::Error::from)?)
}

pub(super) fn announce(plan: &Plan, printer: Printer) {
    let count = |role| plan.engines_of(role).count();
    printer.status(format!(
        "starting {} prefill + {} decode {} of {}",
        count(crate::fleet::Role::Prefill),
        count(crate::fleet::Role::Decode),
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

/// Where a shell finds a key that lets a client in.
fn key_in_words(plan: &Plan) -> String {
    let file = plan.proxy.service.guard.api_key_file.as_ref();
    let in_variable = std::env::var_os("XPYD_API_KEY").is_some_and(|keys| !keys.is_empty());
    match file.and_then(|file| std::path::absolute(file).ok()) {
        Some(file) if !in_variable => format!("$(grep -m1 '^[^#]' '{}')", file.display()),
        _ => "$XPYD_API_KEY".to_owned(),
    }
}

fn tell_ready(ready: &Ready, key: &str, detached: bool, printer: Printer) {
    let checked = format!("handed over correctly (checked in {})", seconds(ready.verified_in));
    printer.status(if ready.not_serving.is_empty() {
        format!("ready: every pair of engines {checked}")
    } else {
        let names: Vec<&str> = ready.not_serving.iter().map(EngineId::as_str).collect();
        format!(
            "ready: every pair of engines that serve {checked}; not serving yet: {}",
            names.join(", ")
        )
    });
    printer.status(format!("\n  OpenAI API   {}/v1   model {}", ready.url, ready.model));
    let header = if ready.wants_key {
        format!("-H \"Authorization: Bearer {key}\" ")
    } else {
        String::new()
    };
    printer.status(format!(
        "  try          curl {}/v1/completions {header}-H 'content-type: application/json' \\\n                 -d '{{\"model\": \"{}\", \"prompt\": \"Hello\", \"max_tokens\": 16}}'",
        ready.url, ready.model
    ));
    printer.status(format!("  and          {}", next_commands(ready, key).join(" · ")));
    if !detached {
        printer.status("\npress Ctrl+C to stop");
    }
}

/// What to type next.
fn next_commands(ready: &Ready, key: &str) -> Vec<String> {
    let mut commands = vec![command("status", &ready.name), command("logs decoder1 -f", &ready.name)];
    // Over TLS the bench needs flags that depend on who signed the certificate.
    if ready.url.starts_with("http://") {
        let key = if ready.wants_key {
            format!("OPENAI_API_KEY=\"{key}\" ")
        } else {
            String::new()
        };
        let server = if ready.name == DEFAULT_NAME {
            String::new()
        } else {
            format!(" --base-url {}", ready.url)
        };
        commands.push(format!("{key}xpyd bench{server}"));
    }
    commands.push(command("down", &ready.name));
    commands
}

pub(super) fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

/// Says how the run ended: why, and whether anything is left.
pub(super) fn conclude(ended: &Ended, plan: &Plan, name: &str, printer: Printer) -> Result<ExitStatus, Failure> {
    let Ended { outcome, log_starts } = ended;
    let status = outcome.exit_status();
    say_what_is_left(outcome, name, printer);
    match &outcome.reason {
        EndReason::Stopped | EndReason::EnginesKept => Ok(status),
        EndReason::Forced => {
            printer.status("the stop was forced");
            Ok(status)
        }
        EndReason::EngineFailed { engine, exit, .. } => Err(explained(outcome, plan, log_starts, engine, *exit)),
        EndReason::LostRole { engine, .. }
        | EndReason::CrashLoop { engine, .. }
        | EndReason::NotReady {
            engine: Some(engine), ..
        } => Err(explained(outcome, plan, log_starts, engine, None)),
        EndReason::NotReady { engine: None, .. } => Err(hand_off_failed(outcome, plan, log_starts)),
        EndReason::SupervisionLost { .. } => Err(in_folder(Failure::message(status, outcome.reason.to_string()), plan)),
    }
}

/// Says whether anything of the run is still there.
pub(super) fn say_what_is_left(outcome: &Outcome, name: &str, printer: Printer) {
    if outcome.reason == EndReason::EnginesKept {
        printer.status(format!(
            "left; the engines wait for the next `{}`, and `{}` ends them",
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

/// The failure of a run that an engine's failure ended: the first real error of its log, what that means, and what to do
/// about it.
fn explained(outcome: &Outcome, plan: &Plan, log_starts: &LogStarts, engine: &EngineId, exit: Option<Exit>) -> Failure {
    let spec = plan.engines.iter().find(|spec| spec.id == *engine);
    let log = spec.map(|spec| plan.run_dir.join(&spec.log_file)).unwrap_or_default();
    let diagnosis = logs::diagnose(&log, last_start(log_starts, engine), exit);
    let shown = format!("{} shows its log", logs_of(engine, plan));
    with_diagnosis(outcome, diagnosis.as_ref(), shown)
}

/// The failure of a run whose engines all came up, but do not hand over. One of them may have said why.
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
        None => in_folder(
            Failure::message(outcome.exit_status(), outcome.reason.to_string()),
            plan,
        ),
    }
}

/// The command that shows the log of an engine of this run, also after the run has ended.
fn logs_of(engine: &EngineId, plan: &Plan) -> String {
    format!("`xpyd logs {engine} --tail 50 --run {}`", plan.run_dir.display())
}

/// Where the engine's last incarnation, which is the one that failed, began to write.
fn last_start(log_starts: &LogStarts, engine: &EngineId) -> Position {
    log_starts.get(engine).copied().unwrap_or(Position::START)
}

fn in_folder(failure: Failure, plan: &Plan) -> Failure {
    failure.hint(format!("the logs of the run are in {}", plan.run_dir.display()))
}

/// The ending, caused by the error in the log, caused by what is known to be behind it; then what to do.
fn with_diagnosis(outcome: &Outcome, diagnosis: Option<&Diagnosis>, log_shown_by: String) -> Failure {
    let hint = diagnosis.and_then(|diagnosis| diagnosis.hint);
    let known = hint.map(|hint| format!("{}: {}", hint.title, hint.explanation));
    let ending = outcome.reason.to_string();
    let error = diagnosis.and_then(|diagnosis| diagnosis.error.clone());
    // The reason of an engine that failed while clients were served names it already.
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
