//! `xpyd restart`: takes engines out one after the other, and starts them again, while the others serve.

use std::time::Duration;

use tokio::time::Instant;

use super::command;
use super::status::{client, running};
use super::upgraded;
use crate::control::api::{EngineStatus, Status};
use crate::control::client::{ClientError, ControlClient};
use crate::control::rundir::{DEFAULT_NAME, RunInfo};
use crate::fleet::{EngineId, EngineState, EngineVerb, FleetStage};
use crate::logs::roles::{self, RoleLog};
use crate::report::{ExitStatus, Failure};
use crate::ui::{FleetProgress, Printer};

/// How often to look how far an engine is.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Arguments of `xpyd restart`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    engines: EngineArguments,
    /// How long to wait for each engine; it goes on after that
    #[arg(long, value_name = "DURATION", default_value = "35m", value_parser = crate::span::parse)]
    timeout: Duration,
}

/// Which engines of which run.
#[derive(Debug, clap::Args)]
pub(super) struct EngineArguments {
    /// Engines, as in `xpyd logs`: decoder1, prefiller2, decode, prefill, all
    #[arg(required = true, value_name = "ROLE")]
    roles: Vec<String>,
    /// Name of the run
    #[arg(long, value_name = "NAME", default_value = DEFAULT_NAME)]
    name: String,
    /// Go on even where no other engine of the role serves; clients are refused meanwhile
    #[arg(long)]
    force: bool,
}

/// Restarts engines, each only when the one before serves again.
pub(super) async fn run(arguments: Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    send_verb(&arguments.engines, EngineVerb::Restart, arguments.timeout, printer).await
}

/// Takes engines out one after the other, and waits for each with progress.
pub(super) async fn send_verb(
    arguments: &EngineArguments,
    verb: EngineVerb,
    timeout: Duration,
    printer: Printer,
) -> Result<ExitStatus, Failure> {
    let name = &arguments.name;
    super::goes_on(verb.name(), name, send_to_each(arguments, verb, timeout, printer)).await
}

async fn send_to_each(
    arguments: &EngineArguments,
    verb: EngineVerb,
    timeout: Duration,
    printer: Printer,
) -> Result<ExitStatus, Failure> {
    let info = running(&arguments.name)?;
    let mut ids = engines(&info, &arguments.roles)?;
    if matches!(verb, EngineVerb::Restart) && !arguments.force {
        upgraded::check(&info)?;
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
        let wait = Wait {
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

/// The engines that `names` mean.
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

/// The run's status. A run that does not answer is asked again until it has ended or the deadline has passed: on a busy host
/// one late answer says nothing about the run.
pub(super) async fn status(client: &ControlClient, info: &RunInfo, deadline: Instant) -> Result<Status, Failure> {
    loop {
        let error = match client.status().await {
            Ok(status) => return Ok(status),
            Err(error) => error,
        };
        let is_silent = matches!(error, ClientError::NoAnswer { .. });
        if !is_silent || Instant::now() >= deadline || !info.is_alive() {
            return Err(Failure::new(ExitStatus::Failure, error).hint(format!(
                "see what the run last wrote: `{}`",
                command("logs xpyd", &info.name)
            )));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

fn refused(error: ClientError, force: bool, name: &str) -> Failure {
    let refusal = matches!(&error, ClientError::Refused { status: 409, .. });
    let failure = Failure::new(ExitStatus::Failure, error);
    if refusal && !force {
        failure.hint(format!(
            "`{}` shows the engines; `--force` takes out the last one of a role as well",
            command("status", name)
        ))
    } else {
        failure
    }
}

/// One engine that is on its way.
pub(super) struct Wait<'call> {
    pub(super) id: &'call EngineId,
    pub(super) verb: EngineVerb,
    /// The first incarnation after a restart.
    pub(super) incarnation: u32,
    pub(super) info: &'call RunInfo,
}

impl Wait<'_> {
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
                let text = format!("the run is {}, so {} was not waited for", status.stage, self.id);
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
            // One that crashed while it drained waits in backoff as well, and then starts as it was asked to.
            (EngineVerb::Restart, EngineState::Backoff) if !is_next => Ok(false),
            // Its cause is still looked for.
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

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::UnixListener;

    use super::*;

    /// A run whose control socket drops the first connections without an answer.
    async fn answers_after(silent: usize, socket: UnixListener, status: Status) {
        for _ in 0..silent {
            drop(socket.accept().await.unwrap());
        }
        let body = serde_json::to_string(&status).unwrap();
        let (mut connection, _) = socket.accept().await.unwrap();
        assert!(connection.read(&mut [0; 4096]).await.unwrap() > 0);
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        connection.write_all((head + &body).as_bytes()).await.unwrap();
    }

    #[tokio::test]
    async fn a_run_that_misses_an_answer_is_asked_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let info = RunInfo::of_this_process("a-run-of-this-test").unwrap();
        let expected = Status {
            run: info.clone(),
            stage: FleetStage::Ready,
            ready_since: None,
            in_flight: 3,
            drain_seconds_left: None,
            engines: Vec::new(),
        };
        let run = answers_after(2, UnixListener::bind(&path).unwrap(), expected.clone());
        let client = ControlClient::new(&path).unwrap();
        let ask = async {
            let now = Instant::now();
            assert!(status(&client, &info, now).await.is_err(), "the deadline has passed");
            let patient = status(&client, &info, now + Duration::from_mins(1)).await;
            assert_eq!(patient.unwrap(), expected);
        };
        tokio::join!(run, ask);
    }
}
