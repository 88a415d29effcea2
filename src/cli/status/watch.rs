//! `xpyd status --watch`: shows the status repeatedly, until the run ends.

use std::time::Duration;

use jiff::Zoned;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep};

use super::render;
use crate::cli::command;
use crate::cli::detach::status_of;
use crate::cli::running::{client, running};
use crate::control::api::{EngineStatus, Status};
use crate::control::client::ControlClient;
use crate::control::rundir::{self, RunDirError, RunInfo};
use crate::fleet::{EngineState, FleetStage};
use crate::report::{ExitStatus, Failure};
use crate::signals::StopSignals;
use crate::ui::{Printer, Reader, Screen};

/// Interval between checks whether the run still exists, or has appeared.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// How long a run can exist without an answer: while it starts, and while its machine is busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// Parses seconds, with fractions.
pub(super) fn parse_interval(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .filter(|seconds| (0.1..=3600.0).contains(seconds))
        .map(Duration::from_secs_f64)
        .ok_or_else(|| "write seconds from 0.1 to 3600".to_owned())
}

/// Shows the run until it ends. Ctrl+C only ends the watching.
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
    let mut shown = StatusPrinter::new(json, printer);
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
            WaitOutcome::TimeToAsk => {}
            WaitOutcome::RunEnded => break,
            WaitOutcome::ReaderGone => return Ok(ExitStatus::Success),
        }
    }
    drop(shown);
    conclude(&info, printer)
}

/// The run with this name, as soon as it can be asked.
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
enum WaitOutcome {
    TimeToAsk,
    RunEnded,
    ReaderGone,
}

/// Waits for the next interval, a change of the terminal's size, or the end of the run.
async fn wait(info: &RunInfo, interval: Duration, resized: &mut Signal, printer: Printer) -> WaitOutcome {
    let next = Instant::now() + interval;
    while info.is_alive() {
        let left = next.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return WaitOutcome::TimeToAsk;
        }
        if printer.data_reader() == Reader::Gone {
            return WaitOutcome::ReaderGone;
        }
        tokio::select! {
            () = sleep(left.min(POLL_INTERVAL)) => {}
            _ = resized.recv() => return WaitOutcome::TimeToAsk,
        }
    }
    WaitOutcome::RunEnded
}

fn silent(info: &RunInfo) -> Failure {
    // A suspended run has its own error.
    if let Err(suspended) = client(info) {
        return suspended;
    }
    let text = format!("run `{}` (pid {}) does not answer", info.name, info.pid);
    Failure::message(ExitStatus::Failure, text)
        .hint(format!("see the end of its log: `{}`", command("logs", &info.name)))
}

/// Prints how the run ended, and returns its exit status.
fn conclude(info: &RunInfo, printer: Printer) -> Result<ExitStatus, Failure> {
    let name = &info.name;
    let outcome = rundir::outcome(info).map_err(|error| Failure::new(ExitStatus::Failure, error))?;
    let logs = format!(
        "see the end of its log: `xpyd logs xpyd --run {}`",
        info.logs_dir.display()
    );
    let Some(outcome) = outcome else {
        let text = format!("run `{name}` has ended without recording how");
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

/// Prints the status, and remembers what has been printed.
struct StatusPrinter {
    printer: Printer,
    json: bool,
    screen: Option<Screen>,
    last: Option<Status>,
}

impl StatusPrinter {
    fn new(json: bool, printer: Printer) -> Self {
        Self {
            printer,
            json,
            screen: if json { None } else { Screen::open() },
            last: None,
        }
    }

    /// Prints the changes of the status.
    fn show(&mut self, status: &Status) -> Result<Reader, Failure> {
        if let Some(screen) = &self.screen {
            screen.draw(&render(status, screen.width()));
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

/// The changes as one sentence each, or everything the first time. The number of requests changes too fast to be reported.
fn changes(before: Option<&Status>, now: &Status) -> Vec<String> {
    let mut changes = Vec::new();
    if before.is_none_or(|before| before.stage != now.stage) {
        changes.push(match now.stage {
            FleetStage::Ready => format!("run `{}` is ready: {}", now.run.name, now.run.proxy_url),
            stage => format!("run `{}` is {stage}", now.run.name),
        });
    }
    if before.map(Status::degraded).unwrap_or_default() != now.degraded() {
        changes.push(match crate::cli::running::degraded(now) {
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

/// The facts about an engine whose change is worth a line.
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
            host: "127.0.0.1".to_owned(),
            node: None,
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
    fn only_changes_are_printed() {
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
    fn a_fleet_without_a_role_is_degraded() {
        let mut prefill = engine(EngineState::Backoff);
        (prefill.id, prefill.role) = (EngineId::new(Role::Prefill, 0), Role::Prefill);
        let mut now = status(FleetStage::Ready, engine(EngineState::Ready));
        now.engines.push(prefill);
        assert_eq!(now.to_json()["degraded"], serde_json::json!(["prefill"]));
        let words = "run `a` is degraded: no prefill engine is ready".to_owned();
        assert!(changes(None, &now).contains(&words));
        assert!(render(&now, 80).starts_with(&words));
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
