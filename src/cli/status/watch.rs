//! `xpyd status --watch`: the status again and again, until the run ends.

use std::time::Duration;

use jiff::Zoned;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep};

use super::{client, command, picture, running};
use crate::cli::detach::status_of;
use crate::control::api::{EngineStatus, Status};
use crate::control::client::ControlClient;
use crate::control::rundir::{self, RunDirError, RunInfo};
use crate::fleet::{EngineState, FleetStage};
use crate::report::{ExitStatus, Failure};
use crate::signals::StopSignals;
use crate::ui::{Printer, Reader, Screen};

/// How often to look whether the run is still there, or has appeared.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// How long a run may be there without an answer: while it starts, and while its machine is busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// Seconds, of which parts are allowed.
pub(super) fn parse_interval(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .filter(|seconds| (0.1..=3600.0).contains(seconds))
        .map(Duration::from_secs_f64)
        .ok_or_else(|| "write seconds from 0.1 to 3600".to_owned())
}

/// Shows the run until it ends; Ctrl+C only ends the watching.
pub(super) async fn run(name: &str, interval: Duration, json: bool, printer: Printer) -> Result<ExitStatus, Failure> {
    let mut signals = StopSignals::listen().map_err(anyhow::Error::from)?;
    tokio::select! {
        biased;
        _ = signals.next() => Ok(ExitStatus::Success),
        ended = watch(name, interval, json, printer) => ended,
    }
}

async fn watch(name: &str, interval: Duration, json: bool, printer: Printer) -> Result<ExitStatus, Failure> {
    let info = published(name).await?;
    let client = client(&info)?;
    let mut resized = signal(SignalKind::window_change()).map_err(anyhow::Error::from)?;
    let mut shown = Shown::new(json, printer);
    let mut answered = Instant::now();
    loop {
        match ask(&client, &info).await {
            Some(status) => {
                answered = Instant::now();
                if shown.show(&status)? == Reader::Gone {
                    return Ok(ExitStatus::Success);
                }
            }
            None if answered.elapsed() > PATIENCE => return Err(silent(&info)),
            None => {}
        }
        match wait(&info, interval, &mut resized, printer).await {
            Waited::TimeToAsk => {}
            Waited::RunEnded => break,
            Waited::ReaderGone => return Ok(ExitStatus::Success),
        }
    }
    drop(shown);
    conclude(&info, printer)
}

/// The run of this name, once it can be asked.
async fn published(name: &str) -> Result<RunInfo, Failure> {
    let began = Instant::now();
    while let Err(RunDirError::NotPublished { .. }) = rundir::find(name) {
        if began.elapsed() > PATIENCE {
            break;
        }
        sleep(POLL_INTERVAL).await;
    }
    running(name)
}

/// The status, if this very run answers.
async fn ask(client: &ControlClient, info: &RunInfo) -> Option<Status> {
    let answer = client.status().await;
    answer.ok().filter(|status| status.run.is_same_run(info))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waited {
    TimeToAsk,
    RunEnded,
    ReaderGone,
}

/// Waits until it is time to ask again, which it also is when the terminal has another size, or the run has ended.
async fn wait(info: &RunInfo, interval: Duration, resized: &mut Signal, printer: Printer) -> Waited {
    let next = Instant::now() + interval;
    while info.is_alive() {
        let left = next.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Waited::TimeToAsk;
        }
        if printer.data_reader() == Reader::Gone {
            return Waited::ReaderGone;
        }
        tokio::select! {
            () = sleep(left.min(POLL_INTERVAL)) => {}
            _ = resized.recv() => return Waited::TimeToAsk,
        }
    }
    Waited::RunEnded
}

fn silent(info: &RunInfo) -> Failure {
    // It may be suspended, which is another thing.
    if let Err(suspended) = client(info) {
        return suspended;
    }
    let text = format!("run `{}` (pid {}) is there and does not answer", info.name, info.pid);
    Failure::message(ExitStatus::Failure, text)
        .hint(format!("see what it last wrote: `{}`", command("logs", &info.name)))
}

/// Says how the run ended, and ends as it did.
fn conclude(info: &RunInfo, printer: Printer) -> Result<ExitStatus, Failure> {
    let name = &info.name;
    let outcome = rundir::outcome(info).map_err(|error| Failure::new(ExitStatus::Failure, error))?;
    let logs = format!("see its last words: `xpyd logs xpyd --run {}`", info.logs_dir.display());
    let Some(outcome) = outcome else {
        let text = format!("run `{name}` has ended without saying how");
        return Err(Failure::message(ExitStatus::Failure, text).hint(logs));
    };
    let status = status_of(i32::from(outcome.exit_code)).unwrap_or(ExitStatus::Failure);
    if status == ExitStatus::Success {
        printer.status(format!("run `{name}` has ended, and nothing of it is left"));
        return Ok(status);
    }
    let left = outcome.leftovers.iter().map(|left| format!("\n  still there: {left}"));
    let text = format!(
        "run `{name}` has ended with exit code {}{}",
        outcome.exit_code,
        left.collect::<String>()
    );
    Err(Failure::message(status, text).hint(logs))
}

/// What has been shown, and how.
struct Shown {
    printer: Printer,
    json: bool,
    screen: Option<Screen>,
    last: Option<Status>,
}

impl Shown {
    fn new(json: bool, printer: Printer) -> Self {
        Self {
            printer,
            json,
            screen: if json { None } else { Screen::open() },
            last: None,
        }
    }

    /// Shows what the status has of news.
    fn show(&mut self, status: &Status) -> Result<Reader, Failure> {
        if let Some(screen) = &self.screen {
            screen.draw(&picture(status, screen.width()));
            return Ok(Reader::There);
        }
        let before = self.last.replace(status.timeless());
        let mut lines = String::new();
        if !self.json {
            let now = Zoned::now().strftime("%H:%M:%S").to_string();
            for change in changes(before.as_ref(), status) {
                lines.extend([now.as_str(), "  ", &change, "\n"]);
            }
        } else if before != self.last {
            lines = status.to_json().to_string() + "\n";
        }
        if lines.is_empty() {
            return Ok(Reader::There);
        }
        self.printer.data_lines(&lines)
    }
}

/// What has changed, a sentence each; everything when there was nothing before. Requests come and go too fast for that.
fn changes(before: Option<&Status>, now: &Status) -> Vec<String> {
    let mut changes = Vec::new();
    if before.is_none_or(|before| before.stage != now.stage) {
        changes.push(match now.stage {
            FleetStage::Ready => format!("run `{}` is ready: {}", now.run.name, now.run.proxy_url),
            stage => format!("run `{}` is {stage}", now.run.name),
        });
    }
    if before.map(Status::degraded).unwrap_or_default() != now.degraded() {
        changes.push(match super::degraded(now) {
            Some(words) => format!("run `{}` is {words}", now.run.name),
            None => format!("run `{}` is no longer degraded", now.run.name),
        });
    }
    for engine in &now.engines {
        let known = before.and_then(|before| before.engines.iter().find(|known| known.id == engine.id));
        if known.is_none_or(|known| news(known) != news(engine)) {
            let detail = super::detail(engine);
            let colon = if detail.is_empty() { "" } else { ": " };
            changes.push(format!("{} is {}{colon}{detail}", engine.id, engine.state));
        }
    }
    changes
}

/// What of an engine is worth a line.
fn news(engine: &EngineStatus) -> (EngineState, u32, Option<&str>, Option<&str>) {
    let phase = engine
        .phase
        .as_deref()
        .filter(|_| engine.state == EngineState::Starting);
    (engine.state, engine.incarnation, phase, engine.reason.as_deref())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{EngineId, Role, TimeLeft};

    fn engine(state: EngineState) -> EngineStatus {
        EngineStatus {
            outlived_kv: crate::fleet::OutlivedKv::default(),
            id: EngineId::new(Role::Decode, 0),
            role: Role::Decode,
            state,
            phase: Some("loading weights".to_owned()),
            percent: None,
            eta_seconds: None,
            slower_than_last: false,
            pid: Some(7),
            port: 7200,
            gpus: vec![0],
            incarnation: 1,
            in_flight: 0,
            uptime_seconds: Some(1),
            reason: None,
            restart_in_seconds: None,
        }
    }

    fn status(stage: FleetStage, engine: EngineStatus) -> Status {
        Status {
            run: RunInfo::of_this_process("a").expect("a process"),
            stage,
            ready_since: None,
            in_flight: 0,
            drain_seconds_left: None,
            engines: vec![engine],
        }
    }

    #[test]
    fn a_line_is_a_change_and_never_just_the_clock() {
        let about = |seconds| TimeLeft::About(Duration::from_secs(seconds));
        let starting = engine(EngineState::Starting);
        let first = status(FleetStage::Starting, starting.clone().starting(40, about(12)));
        assert_eq!(
            changes(None, &first),
            [
                "run `a` is starting",
                "decoder1 is starting: loading weights (40 %, about 12 s left)"
            ]
        );
        let later = status(FleetStage::Starting, starting.starting(41, about(11)));
        assert_eq!(changes(Some(&first), &later), [""; 0]);
        assert_ne!(first.timeless(), later.timeless());
        let mut only_the_clock = later.clone();
        only_the_clock.engines[0].eta_seconds = Some(10);
        only_the_clock.engines[0].uptime_seconds = Some(2);
        assert_eq!(only_the_clock.timeless(), later.timeless());
        let mut failed = engine(EngineState::Failed);
        failed.reason = Some("it was killed".to_owned());
        let failed = status(FleetStage::Stopping, failed);
        assert_eq!(
            changes(Some(&later), &failed),
            ["run `a` is stopping", "decoder1 is failed: it was killed"]
        );
    }

    #[test]
    fn a_ready_fleet_without_a_ready_engine_of_a_role_is_degraded() {
        let mut prefill = engine(EngineState::Backoff);
        (prefill.id, prefill.role) = (EngineId::new(Role::Prefill, 0), Role::Prefill);
        let mut now = status(FleetStage::Ready, engine(EngineState::Ready));
        now.engines.push(prefill);
        assert_eq!(now.to_json()["degraded"], serde_json::json!(["prefill"]));
        let words = "run `a` is degraded: no prefill engine is ready".to_owned();
        assert!(changes(None, &now).contains(&words));
        assert!(picture(&now, 80).starts_with(&words));
        let mut later = now.clone();
        later.engines[1].state = EngineState::Ready;
        assert!(changes(Some(&now), &later).contains(&"run `a` is no longer degraded".to_owned()));
        let starting = status(FleetStage::Starting, engine(EngineState::Starting));
        assert_eq!(starting.degraded(), []);
    }

    #[test]
    fn intervals_are_seconds_within_reason() {
        assert_eq!(parse_interval("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["0", "-1", "NaN", "inf", "4000", "1s", ""] {
            assert!(parse_interval(wrong).is_err(), "{wrong}");
        }
    }
}
