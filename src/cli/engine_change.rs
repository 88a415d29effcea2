//! Restarting and draining engines of a running fleet, as `restart`, `drain` and `scale` share it: the request, and
//! waiting with progress.

use std::time::Duration;

use tokio::time::Instant;

use super::command;
use super::running::{POLL_INTERVAL, client, running, status, wait_for_run};
use super::vllm_upgrade;
use crate::control::api::EngineStatus;
use crate::control::client::{ClientError, ControlClient};
use crate::control::rundir::{DEFAULT_NAME, RunInfo};
use crate::fleet::{EngineId, EngineState, EngineVerb, FleetStage};
use crate::logs::roles::{self, RoleLog};
use crate::report::{ExitStatus, Failure};
use crate::ui::{FleetProgress, Printer};

/// The engines to change, and their run.
#[derive(Debug, clap::Args)]
pub(super) struct EngineArguments {
    /// Engines, as in `xpyd logs`: decoder1, prefiller2, decode, prefill, all
    #[arg(required = true, value_name = "ROLE")]
    roles: Vec<String>,
    /// Name of the run
    #[arg(long, value_name = "NAME", default_value = DEFAULT_NAME)]
    name: String,
    /// Continue even if no other engine of the role serves; clients are refused meanwhile
    #[arg(long)]
    force: bool,
}

/// Drains engines one after the other, and waits for each with progress.
pub(super) async fn change_engines(
    arguments: &EngineArguments,
    verb: EngineVerb,
    timeout: Duration,
    printer: Printer,
) -> Result<ExitStatus, Failure> {
    let name = &arguments.name;
    wait_for_run(verb.name(), name, change_each(arguments, verb, timeout, printer)).await
}

async fn change_each(
    arguments: &EngineArguments,
    verb: EngineVerb,
    timeout: Duration,
    printer: Printer,
) -> Result<ExitStatus, Failure> {
    let info = running(&arguments.name)?;
    let mut ids = engines(&info, &arguments.roles)?;
    if matches!(verb, EngineVerb::Restart) && !arguments.force {
        vllm_upgrade::check(&info)?;
    }
    let client = client(&info)?;
    let ports = status(&client, &info, Instant::now() + timeout).await?.engines;
    if verb == EngineVerb::Drain {
        let is_stopped = |id: &EngineId| {
            ports
                .iter()
                .any(|engine| engine.id == *id && engine.state == EngineState::Stopped)
        };
        for id in ids.extract_if(.., |id| is_stopped(id)) {
            printer.status(format!("{id} is stopped already"));
        }
    }
    let shown: Vec<_> = ports
        .iter()
        .filter(|engine| ids.contains(&engine.id))
        .map(|engine| (engine.id.clone(), engine.role, engine.port))
        .collect();
    let mut progress = FleetProgress::new(printer, &shown);
    for id in &ids {
        let answer = client.engine(id, verb, arguments.force).await;
        let wait = EngineWait {
            id,
            verb,
            incarnation: answer
                .map_err(|error| refused(error, arguments.force, &info.name))?
                .incarnation,
            info: &info,
        };
        wait.until_done(&client, Instant::now() + timeout, &mut progress)
            .await?;
    }
    progress.finish();
    Ok(ExitStatus::Success)
}

/// The engines with these names.
fn engines(info: &RunInfo, names: &[String]) -> Result<Vec<EngineId>, Failure> {
    let known: Vec<RoleLog> = info
        .engines
        .iter()
        .map(|engine| RoleLog {
            name: engine.id.to_string(),
            path: info.logs_dir.join(&engine.log_file),
        })
        .collect();
    let meant = roles::select(&known, names).map_err(|unknown| {
        let known = format!("there are {}", unknown.known.join(", "));
        let hint = match &unknown.nearest {
            Some(nearest) => format!("did you mean `{nearest}`? {known}"),
            None => known,
        };
        Failure::new(ExitStatus::Usage, unknown).hint(hint)
    })?;
    Ok(meant.iter().map(|role| EngineId::named(&role.name)).collect())
}

fn refused(error: ClientError, force: bool, name: &str) -> Failure {
    let refusal = matches!(&error, ClientError::Refused { status: 409, .. });
    let failure = Failure::new(ExitStatus::Failure, error);
    if refusal && !force {
        failure.hint(format!(
            "`{}` shows the engines; `--force` also stops the last one of a role",
            command("status", name)
        ))
    } else {
        failure
    }
}

/// Waiting for one engine.
pub(super) struct EngineWait<'call> {
    pub(super) id: &'call EngineId,
    pub(super) verb: EngineVerb,
    /// The first incarnation after the restart.
    pub(super) incarnation: u32,
    pub(super) info: &'call RunInfo,
}

impl EngineWait<'_> {
    pub(super) async fn until_done(
        &self,
        client: &ControlClient,
        deadline: Instant,
        progress: &mut FleetProgress,
    ) -> Result<(), Failure> {
        loop {
            let status = status(client, self.info, deadline).await?;
            let engine = status.engines.iter().find(|engine| engine.id == *self.id);
            if let Some(engine) = engine {
                progress.state(&engine.id, engine.state);
                if let (Some(phase), Some(percent)) = (&engine.phase, engine.percent) {
                    progress.phase(&engine.id, phase, percent, engine.time_left());
                }
                if self.is_done(engine)? {
                    return Ok(());
                }
            }
            if status.stage != FleetStage::Ready {
                let text = format!("the run is {}, so xpyd does not wait for {}", status.stage, self.id);
                return Err(Failure::message(ExitStatus::Failure, text));
            }
            if Instant::now() >= deadline {
                let state = engine.map_or(EngineState::Planned, |engine| engine.state);
                let failure = Failure::message(ExitStatus::NotReady, format!("{} is still {state}", self.id));
                return Err(failure.hint(format!(
                    "the run continues; `{}` shows how far it is",
                    command("status", &self.info.name)
                )));
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    fn is_done(&self, engine: &EngineStatus) -> Result<bool, Failure> {
        let is_next = engine.incarnation >= self.incarnation;
        match (self.verb, engine.state) {
            (EngineVerb::Restart, EngineState::Ready) if is_next => Ok(true),
            (EngineVerb::Drain, EngineState::Stopped) => Ok(true),
            // An engine that crashes while it drains also waits in backoff, and then starts again as requested.
            (EngineVerb::Restart, EngineState::Backoff) if !is_next => Ok(false),
            // xpyd is still looking for the cause.
            (_, EngineState::Backoff) if engine.restart_in_seconds.is_none() => Ok(false),
            (_, EngineState::Failed | EngineState::Backoff) => {
                let reason = engine.reason.as_deref().unwrap_or("it ended");
                let failure = Failure::message(ExitStatus::EngineFailed, format!("{} failed: {reason}", self.id));
                let logs = command(&format!("logs {} --tail 50", self.id), &self.info.name);
                Err(failure.hint(format!("`{logs}` shows its log")))
            }
            _ => Ok(false),
        }
    }
}
