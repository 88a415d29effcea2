//! `xpyd status`: what a run is doing.

mod watch;

use std::time::Duration;

use jiff::Timestamp;

use super::ps::user_name;
use super::{attach, command, no_run_dir};
use crate::control::api::{EngineStatus, Status};
use crate::control::client::ControlClient;
use crate::control::rundir::{self, DEFAULT_NAME, FoundRun, RunDirError, RunInfo};
use crate::fleet::{EngineState, FleetStage, OutlivedKv};
use crate::report::{ExitStatus, Failure};
use crate::ui::{self, Printer, Table};

/// Columns from which a whole table is drawn, a usual detail included.
const WIDE: usize = 112;

/// Arguments of `xpyd status`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Name of the run
    #[arg(long, value_name = "NAME", default_value = DEFAULT_NAME)]
    name: String,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
    /// Go on until the run ends: drawn anew every so many seconds on a terminal, elsewhere a line for every change
    #[arg(
        short,
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        default_missing_value = "1",
        value_parser = watch::parse_interval
    )]
    watch: Option<Duration>,
}

/// Prints the status of a run. A run that is not there is a failure with its own exit code. A run that is watched ends
/// the command with its own exit code.
pub async fn run(arguments: Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    if let Some(interval) = arguments.watch {
        return watch::run(&arguments.name, interval, arguments.json, printer).await;
    }
    let info = running(&arguments.name)?;
    let client = client(&info)?;
    let status = client.status().await.map_err(|error| {
        Failure::new(ExitStatus::Failure, error)
            .hint(format!("see what it last wrote: `{}`", command("logs", &info.name)))
    })?;
    if arguments.json {
        let status = serde_json::to_string_pretty(&status.to_json());
        printer.data(status.map_err(|error| Failure::new(ExitStatus::Bug, error))?)?;
    } else {
        printer.data(picture(&status, usize::MAX))?;
    }
    Ok(ExitStatus::Success)
}

/// The run of this name, or the failure that says that none is there.
pub(super) fn running(name: &str) -> Result<RunInfo, Failure> {
    match rundir::find(name) {
        Ok(Some(info)) => Ok(info),
        Ok(None) => Err(match attach::find(name)? {
            Some(kept) => Failure::message(
                ExitStatus::RunState,
                format!(
                    "run `{name}` has lost its xpyd; its engines are kept: {}",
                    attach::who(&kept)
                ),
            )
            .hint(format!(
                "`{}` attaches to them, `{}` ends them",
                command("up", name),
                command("down", name)
            )),
            None => none_is_up(name),
        }),
        Err(error @ RunDirError::NotPublished { .. }) => {
            Err(Failure::new(ExitStatus::RunState, error).hint("try again in a moment"))
        }
        Err(error @ RunDirError::BadName(_)) => Err(Failure::new(ExitStatus::Usage, error)),
        Err(error) => Err(no_run_dir(error)),
    }
}

/// No run of this name is up. Others that are up are named.
fn none_is_up(name: &str) -> Failure {
    let mut failure = Failure::message(ExitStatus::RunState, format!("no run `{name}` is up"));
    let (foreign, own): (Vec<_>, Vec<_>) = rundir::visible()
        .into_iter()
        .partition(|seen| matches!(seen, FoundRun::Foreign { .. }));
    for seen in foreign {
        if let FoundRun::Foreign { name: theirs, user } = seen
            && theirs == name
        {
            let (status, user) = (command("status", name), user_name(user));
            failure = failure.hint(format!("user `{user}` has one: `sudo -u {user} {status}`"));
        }
    }
    let others: Vec<String> = own
        .iter()
        .filter(|seen| seen.name() != name)
        .map(|seen| format!("`--name {}`", seen.name()))
        .collect();
    if others.is_empty() {
        failure.hint(format!("start one: `{}`", command("up", name)))
    } else {
        failure.hint(format!(
            "`xpyd ps` shows the runs that are up; name one of them: {}",
            others.join(", ")
        ))
    }
}

/// A client of this run, which is not just suspended: it would not answer.
pub(super) fn client(info: &RunInfo) -> Result<ControlClient, Failure> {
    if info.is_suspended() {
        let text = format!(
            "run `{}` (pid {}) is suspended: somebody pressed Ctrl+Z, or sent SIGSTOP",
            info.name, info.pid
        );
        return Err(Failure::message(ExitStatus::Failure, text).hint(format!(
            "`fg` in its terminal, or `kill -CONT {}`, lets it go on",
            info.pid
        )));
    }
    ControlClient::new(&info.control_socket).map_err(|error| Failure::new(ExitStatus::Bug, error))
}

/// The status for people. Columns that do not fit `width` beside the detail are left out.
fn picture(status: &Status, width: usize) -> String {
    let run = &status.run;
    let age = since(&run.started_at)
        .map(|age| format!(", up for {age}"))
        .unwrap_or_default();
    let engines = if width < WIDE {
        narrow(&status.engines).to_string()
    } else {
        wide(&status.engines).to_string()
    };
    let mut lines = vec![
        format!("run `{}` is {}{age} (pid {})", run.name, stage(status), run.pid),
        format!("  profile  {}", run.profile),
        format!("  model    {}", run.model),
        format!("  proxy    {} ({} in flight)", run.proxy_url, status.in_flight),
        format!("  logs     {}", run.logs_dir.display()),
    ];
    lines.extend(direct(status));
    lines.extend([String::new(), engines]);
    lines.join("\n")
}

/// How the operator asks an engine directly, if that takes the key that was made for the run.
fn direct(status: &Status) -> Option<String> {
    let file = status.run.engine_key_file.as_ref()?.display();
    let port = status.engines.last()?.port;
    Some(format!(
        "  direct   curl -H \"Authorization: Bearer $(cat {file})\" http://127.0.0.1:{port}/v1/models"
    ))
}

fn wide(engines: &[EngineStatus]) -> Table<9> {
    let mut table = Table::new([
        "engine",
        "role",
        "state",
        "pid",
        "port",
        "gpus",
        "in flight",
        "uptime",
        "detail",
    ]);
    for engine in engines {
        table.row([
            engine.id.to_string(),
            engine.role.to_string(),
            ui::state(engine.state),
            engine.pid.map(|pid| pid.to_string()).unwrap_or_default(),
            engine.port.to_string(),
            engine.gpus.iter().map(u32::to_string).collect::<Vec<_>>().join(","),
            engine.in_flight.to_string(),
            engine
                .uptime_seconds
                .map(Duration::from_secs)
                .map(ui::time_span)
                .unwrap_or_default(),
            detail(engine),
        ]);
    }
    table
}

fn narrow(engines: &[EngineStatus]) -> Table<4> {
    let mut table = Table::new(["engine", "state", "in flight", "detail"]);
    for engine in engines {
        table.row([
            engine.id.to_string(),
            ui::state(engine.state),
            engine.in_flight.to_string(),
            detail(engine),
        ]);
    }
    table
}

pub(super) fn stage(status: &Status) -> String {
    let ready_for = status.ready_since.as_deref().and_then(since);
    match (status.stage, ready_for, status.drain_seconds_left) {
        _ if !status.degraded().is_empty() => degraded(status).unwrap_or_default(),
        (FleetStage::Ready, Some(span), _) => format!("ready for {span}"),
        (FleetStage::Draining, _, Some(left)) => format!("draining for at most {left} s more"),
        (stage, ..) => stage.to_string(),
    }
}

/// `degraded: no prefill engine is ready`, of a fleet that cannot answer.
fn degraded(status: &Status) -> Option<String> {
    let roles: Vec<String> = status
        .degraded()
        .iter()
        .map(|role| format!("no {role} engine is ready"))
        .collect();
    (!roles.is_empty()).then(|| format!("degraded: {}", roles.join(", ")))
}

/// How long ago an RFC 3339 time was.
pub(super) fn since(time: &str) -> Option<String> {
    let then: Timestamp = time.parse().ok()?;
    // A clock that was set back makes a negative span; that is no time ago.
    let span = Timestamp::now().duration_since(then);
    Some(ui::time_span(Duration::try_from(span).unwrap_or_default()))
}

/// What the state alone does not say.
fn detail(engine: &EngineStatus) -> String {
    let start = match (&engine.phase, engine.percent, engine.state) {
        (Some(phase), Some(percent), EngineState::Starting) => {
            let left = ui::time_left(engine.time_left());
            Some(format!("{phase} ({percent} %{left})"))
        }
        _ => None,
    };
    let restarts = (engine.incarnation > 1).then(|| format!("start {}", engine.incarnation));
    let next = engine
        .restart_in_seconds
        .map(|seconds| format!("starts again in {}", ui::time_span(Duration::from_secs(seconds))));
    let OutlivedKv { expired, late } = engine.outlived_kv;
    let outlived = (expired + late > 0).then(|| format!("KV leases expired: {expired}, late reads: {late}"));
    let parts: Vec<String> = [start, engine.reason.clone(), next, restarts, outlived]
        .into_iter()
        .flatten()
        .collect();
    parts.join("; ")
}
