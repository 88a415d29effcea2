//! Questions to a run that is up: its address, its status, and waiting for it.

use std::time::Duration;

use jiff::Timestamp;
use tokio::signal::unix::SignalKind;
use tokio::time::Instant;

use super::ps::user_name;
use super::{attach, command, no_run_dir};
use crate::control::api::Status;
use crate::control::client::{ClientError, ControlClient};
use crate::control::rundir::{self, FoundRun, RunDirError, RunInfo};
use crate::fleet::FleetStage;
use crate::report::{ExitStatus, Failure};
use crate::signals::SignalListener;
use crate::ui;

/// Interval between two requests for the status.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The run with this name, or the failure that there is none.
pub(super) fn running(name: &str) -> Result<RunInfo, Failure> {
    match rundir::find(name) {
        Ok(Some(info)) => Ok(info),
        Ok(None) => Err(match attach::find(name)? {
            Some(kept) => Failure::message(
                ExitStatus::RunState,
                format!(
                    "run `{name}` has lost its xpyd; its engines are waiting: {}",
                    attach::describe(&kept)
                ),
            )
            .hint(format!(
                "`{}` attaches to them, `{}` stops them",
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

/// The failure that no run of this name is up. It names the other runs.
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

/// A client of this run. Fails if the run is suspended, because it would not answer.
pub(super) fn client(info: &RunInfo) -> Result<ControlClient, Failure> {
    if info.is_suspended() {
        let text = format!(
            "run `{}` (pid {}) is suspended by Ctrl+Z or SIGSTOP",
            info.name, info.pid
        );
        return Err(Failure::message(ExitStatus::Failure, text)
            .hint(format!("resume it: `kill -CONT {}`, or `fg` in its terminal", info.pid)));
    }
    ControlClient::new(&info.control_socket).map_err(|error| Failure::new(ExitStatus::Bug, error))
}

/// The run's status. If the run does not answer, it is asked again until it has ended or the deadline has passed: on a
/// busy host, one late answer means nothing.
pub(super) async fn status(client: &ControlClient, info: &RunInfo, deadline: Instant) -> Result<Status, Failure> {
    loop {
        let error = match client.status().await {
            Ok(status) => return Ok(status),
            Err(error) => error,
        };
        let is_silent = matches!(error, ClientError::NoAnswer { .. });
        if !is_silent || Instant::now() >= deadline || !info.is_alive() {
            return Err(Failure::new(ExitStatus::Failure, error).hint(format!(
                "see the end of its log: `{}`",
                command("logs xpyd", &info.name)
            )));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Waits for an operation of the run. Ctrl+C only ends the waiting.
pub(super) async fn wait_for_run(
    what: &str,
    name: &str,
    waiting: impl Future<Output = Result<ExitStatus, Failure>>,
) -> Result<ExitStatus, Failure> {
    let mut interrupt = SignalListener::listen(SignalKind::interrupt()).map_err(anyhow::Error::from)?;
    tokio::select! {
        ended = waiting => ended,
        () = interrupt.recv() => {
            let text = format!("stopped waiting: the {what} continues");
            Err(Failure::message(ExitStatus::Forced, text).hint(format!("`{}` shows how far it is", command("status", name))))
        }
    }
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

/// `degraded: no prefill engine is ready`, for a fleet that cannot serve.
pub(super) fn degraded(status: &Status) -> Option<String> {
    let roles: Vec<String> = status
        .degraded()
        .iter()
        .map(|role| format!("no {role} engine is ready"))
        .collect();
    (!roles.is_empty()).then(|| format!("degraded: {}", roles.join(", ")))
}

/// The time since an RFC 3339 time.
pub(super) fn since(time: &str) -> Option<String> {
    let then: Timestamp = time.parse().ok()?;
    // If the clock was set back, the span is negative and counts as 0.
    let span = Timestamp::now().duration_since(then);
    Some(ui::time_span(Duration::try_from(span).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::UnixListener;

    use super::*;

    /// A run whose control socket closes the first connections without an answer.
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
    async fn a_silent_run_is_asked_again() {
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
