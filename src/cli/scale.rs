//! `xpyd scale`: changes the number of engines of a role, while the others serve.

use std::str::FromStr;
use std::time::Duration;

use tokio::time::Instant;

use super::command;
use super::engine_change::EngineWait;
use super::running::{POLL_INTERVAL, client, running, status, wait_for_run};
use super::vllm_upgrade;
use crate::control::api::{ScaleRequest, ScaleResponse, Status};
use crate::control::client::{ClientError, ControlClient};
use crate::control::rundir::{DEFAULT_NAME, RunInfo};
use crate::fleet::{EngineId, EngineVerb, MAX_ENGINES_PER_ROLE, Role};
use crate::report::{ExitStatus, Failure};
use crate::ui::{FleetProgress, Printer};

/// How long to wait until a new engine is in the status. It is planned at once.
const SEEN_DEADLINE: Duration = Duration::from_secs(5);

/// Arguments of `xpyd scale`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The number of engines per role: decode=3, prefill=2
    #[arg(required = true, value_name = "ROLE=COUNT")]
    counts: Vec<Count>,
    /// Name of the run
    #[arg(long, value_name = "NAME", default_value = DEFAULT_NAME)]
    name: String,
    /// How long to wait for each engine; it continues after that
    #[arg(long, value_name = "DURATION", default_value = "35m", value_parser = crate::span::parse)]
    timeout: Duration,
}

/// A role with its number of engines: `decode=3`.
#[derive(Debug, Clone, Copy)]
struct Count(ScaleRequest);

impl FromStr for Count {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (role, count) = text
            .split_once('=')
            .ok_or("expected ROLE=COUNT, for example decode=3")?;
        let role = match role {
            "prefill" => Role::Prefill,
            "decode" => Role::Decode,
            _ => return Err(format!("`{role}` is not a role: use `prefill` or `decode`")),
        };
        if count.starts_with('+') {
            return Err(format!(
                "`{count}` is not a number of engines: write the total number, as in `{role}=4`"
            ));
        }
        match count.parse() {
            Ok(0) => Err("a role needs at least 1 engine".to_owned()),
            Ok(count) if count > MAX_ENGINES_PER_ROLE => {
                Err(format!("a role can have at most {MAX_ENGINES_PER_ROLE} engines"))
            }
            Ok(count) => Ok(Self(ScaleRequest { role, count })),
            Err(_) => Err(format!("`{count}` is not a number of engines")),
        }
    }
}

/// Changes the number of engines, and waits until new ones serve and removed ones are stopped.
pub(super) async fn run(arguments: Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    wait_for_run("change", &arguments.name, scale(&arguments, printer)).await
}

async fn scale(arguments: &Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    let info = running(&arguments.name)?;
    let client = client(&info)?;
    for Count(request) in arguments.counts.iter().copied() {
        let known = info.engines.iter().filter(|engine| engine.role == request.role).count();
        if usize::from(request.count) > known {
            vllm_upgrade::check(&info)?;
        }
        let answer = client
            .scale(request)
            .await
            .map_err(|error| refused(error, &info.name))?;
        let ScaleResponse { starting, stopping } = &answer;
        if starting.is_empty() && stopping.is_empty() {
            printer.status(format!("{} {} engines serve already", request.count, request.role));
            continue;
        }
        let deadline = Instant::now() + arguments.timeout;
        let mut progress = FleetProgress::new(printer, &shown(&client, &info, &answer, deadline).await?);
        let starts = starting.iter().map(|(id, start)| (id, *start, EngineVerb::Restart));
        let stops = stopping.iter().map(|id| (id, 0, EngineVerb::Drain));
        for (id, incarnation, verb) in starts.chain(stops) {
            let wait = EngineWait {
                id,
                verb,
                incarnation,
                info: &info,
            };
            wait.until_done(&client, Instant::now() + arguments.timeout, &mut progress)
                .await?;
        }
        progress.finish();
    }
    Ok(ExitStatus::Success)
}

/// The engines that start and stop, from the run's status.
async fn shown(
    client: &ControlClient,
    info: &RunInfo,
    answer: &ScaleResponse,
    deadline: Instant,
) -> Result<Vec<(EngineId, Role, u16)>, Failure> {
    let seen_by = deadline.min(Instant::now() + SEEN_DEADLINE);
    loop {
        let Status { engines, .. } = status(client, info, deadline).await?;
        let changes =
            |id: &EngineId| answer.stopping.contains(id) || answer.starting.iter().any(|(start, _)| start == id);
        let shown: Vec<_> = engines
            .into_iter()
            .filter(|engine| changes(&engine.id))
            .map(|engine| (engine.id, engine.role, engine.port))
            .collect();
        if shown.len() == answer.starting.len() + answer.stopping.len() || Instant::now() >= seen_by {
            return Ok(shown);
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

fn refused(error: ClientError, name: &str) -> Failure {
    Failure::new(ExitStatus::Failure, error).hint(format!("`{}` shows the engines", command("status", name)))
}
