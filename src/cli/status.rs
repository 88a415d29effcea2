//! `xpyd status`: shows the state of a run.

mod watch;

use std::time::Duration;

use super::command;
use super::running::{client, running, since, stage};
use crate::control::api::{EngineStatus, Status};
use crate::control::rundir::DEFAULT_NAME;
use crate::fleet::{EngineState, OutlivedKv};
use crate::report::{ExitStatus, Failure};
use crate::ui::{self, Printer, Table};

/// Minimum number of columns for the whole table with a usual detail.
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
    /// Continue until the run ends: redraw at this interval on a terminal, else print a line per change
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

/// Prints the status of a run. If there is no such run, the exit code says so. A watched run ends the command with its own
/// exit code.
pub async fn run(arguments: Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    if let Some(interval) = arguments.watch {
        return watch::run(&arguments.name, interval, arguments.json, printer).await;
    }
    let info = running(&arguments.name)?;
    let client = client(&info)?;
    let status = client.status().await.map_err(|error| {
        Failure::new(ExitStatus::Failure, error)
            .hint(format!("see the end of its log: `{}`", command("logs", &info.name)))
    })?;
    if arguments.json {
        let status = serde_json::to_string_pretty(&status.to_json());
        printer.data(status.map_err(|error| Failure::new(ExitStatus::Bug, error))?)?;
    } else {
        printer.data(render(&status, usize::MAX))?;
    }
    Ok(ExitStatus::Success)
}

/// The status for people. Columns that do not fit into `width` beside the detail are left out.
fn render(status: &Status, width: usize) -> String {
    let run = &status.run;
    let age = since(&run.started_at)
        .map(|age| format!(", up for {age}"))
        .unwrap_or_default();
    let engines = if width < WIDE {
        narrow_table(&status.engines).to_string()
    } else {
        wide_table(&status.engines).to_string()
    };
    let mut lines = vec![
        format!("run `{}` is {}{age} (pid {})", run.name, stage(status), run.pid),
        format!("  profile  {}", run.profile),
        format!("  model    {}", run.model),
        format!("  proxy    {} ({} in flight)", run.proxy_url, status.in_flight),
        format!("  logs     {}", run.logs_dir.display()),
    ];
    lines.extend(direct_access(status));
    lines.extend([String::new(), engines]);
    lines.join("\n")
}

/// How the operator can call an engine directly, if that needs the generated key.
fn direct_access(status: &Status) -> Option<String> {
    let file = status.run.engine_key_file.as_ref()?.display();
    let last = status.engines.last()?;
    let host = Some(last.host.as_str()).filter(|host| !host.is_empty());
    let (host, port) = (host.unwrap_or("127.0.0.1"), last.port);
    Some(format!(
        "  direct   curl -H \"Authorization: Bearer $(cat {file})\" http://{host}:{port}/v1/models"
    ))
}

fn wide_table(engines: &[EngineStatus]) -> Table<9> {
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
            address(engine),
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

/// `7200`, or `n2:7200` on another node.
fn address(engine: &EngineStatus) -> String {
    match &engine.node {
        Some(node) => format!("{node}:{}", engine.port),
        None => engine.port.to_string(),
    }
}

fn narrow_table(engines: &[EngineStatus]) -> Table<4> {
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

/// Facts that the state alone does not show.
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
