//! `xpyd status`: what a run is doing.

use std::time::Duration;

use jiff::Timestamp;

use super::attach;
use crate::control::api::{EngineStatus, Status};
use crate::control::client::ControlClient;
use crate::control::rundir::{self, DEFAULT_NAME, RunDirError, RunInfo};
use crate::fleet::{EngineState, FleetStage};
use crate::report::{ExitStatus, Failure};
use crate::ui::{self, Printer, Table};

/// Arguments of `xpyd status`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Name of the run
    #[arg(long, value_name = "NAME", default_value = DEFAULT_NAME)]
    name: String,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
}

/// Prints the status of a run. A run that is not there is a failure with its own exit code.
pub async fn run(arguments: Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    let info = running(&arguments.name)?;
    let client = client(&info)?;
    let status = client.status().await.map_err(|error| {
        Failure::new(ExitStatus::Failure, error).hint(format!("see what it last wrote: {}", logs_command(&info.name)))
    })?;
    if arguments.json {
        printer.data(serde_json::to_string_pretty(&status).map_err(|error| Failure::new(ExitStatus::Bug, error))?);
    } else {
        print(&status, printer);
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
                "`xpyd up` attaches to them, {} ends them",
                attach::down_command(name)
            )),
            None => Failure::message(ExitStatus::RunState, format!("no run `{name}` is up")).hint("start one: xpyd up"),
        }),
        Err(error @ RunDirError::NotPublished { .. }) => {
            Err(Failure::new(ExitStatus::RunState, error).hint("try again in a moment"))
        }
        Err(error @ RunDirError::BadName(_)) => Err(Failure::new(ExitStatus::Usage, error)),
        Err(error) => Err(Failure::new(ExitStatus::Failure, error)),
    }
}

/// A client of this run.
pub(super) fn client(info: &RunInfo) -> Result<ControlClient, Failure> {
    ControlClient::new(&rundir::socket_path(&info.name)).map_err(|error| Failure::new(ExitStatus::Bug, error))
}

/// The command that shows the logs of the run `name`.
pub(super) fn logs_command(name: &str) -> String {
    if name == DEFAULT_NAME {
        "xpyd logs".to_owned()
    } else {
        format!("xpyd logs --name {name}")
    }
}

fn print(status: &Status, printer: Printer) {
    let run = &status.run;
    let age = since(&run.started_at)
        .map(|age| format!(", up for {age}"))
        .unwrap_or_default();
    printer.data(format!(
        "run `{}` is {}{age} (pid {})",
        run.name,
        stage(status),
        run.pid
    ));
    printer.data(format!("  profile  {}", run.profile));
    printer.data(format!("  model    {}", run.model));
    printer.data(format!("  proxy    {} ({} in flight)", run.proxy_url, status.in_flight));
    printer.data(format!("  logs     {}", run.logs_dir.display()));
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
    for engine in &status.engines {
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
    printer.data("");
    printer.data(table);
}

fn stage(status: &Status) -> String {
    let ready_for = status.ready_since.as_deref().and_then(since);
    match (status.stage, ready_for, status.drain_seconds_left) {
        (FleetStage::Ready, Some(span), _) => format!("ready for {span}"),
        (FleetStage::Draining, _, Some(left)) => format!("draining for at most {left} s more"),
        (stage, ..) => stage.to_string(),
    }
}

/// How long ago an RFC 3339 time was.
fn since(time: &str) -> Option<String> {
    let then: Timestamp = time.parse().ok()?;
    // A clock that was set back makes a negative span; that is no time ago.
    let span = Timestamp::now().duration_since(then);
    Some(ui::time_span(Duration::try_from(span).unwrap_or_default()))
}

/// What the state alone does not say.
fn detail(engine: &EngineStatus) -> String {
    let start = match (&engine.phase, engine.percent, engine.state) {
        (Some(phase), Some(percent), EngineState::Starting) => Some(format!("{phase} ({percent} %)")),
        _ => None,
    };
    let restarts = (engine.incarnation > 1).then(|| format!("start {}", engine.incarnation));
    let next = engine
        .restart_in_seconds
        .map(|seconds| format!("starts again in {}", ui::time_span(Duration::from_secs(seconds))));
    let parts: Vec<String> = [start, engine.reason.clone(), next, restarts]
        .into_iter()
        .flatten()
        .collect();
    parts.join("; ")
}
