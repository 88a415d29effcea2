//! `xpyd ps`: all runs of this user, wherever they were started.

use std::time::Duration;

use serde_json::{Value, json};

use super::command;
use super::plan::shell_word;
use super::running::{since, stage};
use crate::control::api::Status;
use crate::control::client::ControlClient;
use crate::control::rundir::{self, FoundRun, RunInfo};
use crate::fleet::EngineState;
use crate::report::{ExitStatus, Failure};
use crate::ui::{Printer, Table};

/// How long to wait for a run's status, so that a hung run does not block the list.
const PATIENCE: Duration = Duration::from_secs(5);

/// Arguments of `xpyd ps`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
}

/// Lists the runs. An empty list is a success.
pub(super) async fn run(arguments: Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    let mut rows = Vec::new();
    for seen in rundir::all() {
        rows.push(match seen {
            FoundRun::Up(info) => {
                let status = if info.is_suspended() { None } else { ask(&info).await };
                RunRow::of(&info, status.as_ref())
            }
            FoundRun::Silent { name, pid } => RunRow::without_info(name, "silent", pid),
            FoundRun::Kept { name } => RunRow::without_info(name, "kept", None),
            FoundRun::Foreign { name, user } => RunRow {
                user: Some(user),
                ..RunRow::without_info(name, "foreign", None)
            },
        });
    }
    if arguments.json {
        printer.data(rows.iter().map(RunRow::json).collect::<Value>())?;
    } else if rows.is_empty() {
        printer.status(format!(
            "no run is up; `{}` starts one",
            command("up", rundir::DEFAULT_NAME)
        ));
    } else {
        printer.data(table(&rows))?;
        for line in namesakes(&rows) {
            printer.status(line);
        }
    }
    Ok(ExitStatus::Success)
}

async fn ask(info: &RunInfo) -> Option<Status> {
    let client = ControlClient::new(&info.control_socket).ok()?;
    tokio::time::timeout(PATIENCE, client.status()).await.ok()?.ok()
}

/// A line of the list.
struct RunRow {
    name: String,
    /// The state in one word, for programs.
    state: String,
    /// The state for people.
    shown: String,
    pid: Option<u32>,
    user: Option<u32>,
    info: Option<RunInfo>,
    /// Number of engines that serve, and of all engines.
    engines: Option<(usize, usize)>,
}

impl RunRow {
    fn of(info: &RunInfo, status: Option<&Status>) -> Self {
        let (state, shown) = match status {
            Some(status) => (status.stage.to_string(), stage(status)),
            None if info.is_suspended() => ("suspended".to_owned(), "suspended".to_owned()),
            None => ("silent".to_owned(), "does not answer".to_owned()),
        };
        let serving = |status: &Status| {
            let ready = status
                .engines
                .iter()
                .filter(|engine| engine.state == EngineState::Ready);
            (ready.count(), status.engines.len())
        };
        Self {
            name: info.name.clone(),
            state,
            shown,
            pid: Some(info.pid),
            user: None,
            info: Some(info.clone()),
            engines: status.map(serving),
        }
    }

    /// A run that does not answer.
    fn without_info(name: String, state: &'static str, pid: Option<u32>) -> Self {
        let shown = match state {
            "kept" => "engines waiting, no xpyd",
            "foreign" => "another user's",
            _ => "does not answer",
        };
        Self {
            name,
            state: state.to_owned(),
            shown: shown.to_owned(),
            pid,
            user: None,
            info: None,
            engines: None,
        }
    }

    fn json(&self) -> Value {
        let info = self.info.as_ref();
        json!({
            "name": self.name,
            "state": self.state,
            "pid": self.pid,
            "uid": self.user,
            "proxy_url": info.map(|info| &info.proxy_url),
            "profile": info.map(|info| &info.profile),
            "model": info.map(|info| &info.model),
            "engines": self.engines.map(|(_, all)| all),
            "engines_ready": self.engines.map(|(ready, _)| ready),
            "started_at": info.map(|info| &info.started_at),
            "detached": info.map(|info| info.detached),
            "logs_dir": info.map(|info| &info.logs_dir),
        })
    }
}

fn table(rows: &[RunRow]) -> Table<7> {
    let mut table = Table::new(["name", "state", "engines", "pid", "up for", "proxy", "profile"]);
    for row in rows {
        let info = row.info.as_ref();
        let owner = row
            .user
            .map(user_name)
            .map(|user| format!(" ({user})"))
            .unwrap_or_default();
        table.row([
            row.name.clone(),
            format!("{}{owner}", row.shown),
            row.engines
                .map(|(ready, all)| format!("{ready}/{all}"))
                .unwrap_or_default(),
            row.pid.map(|pid| pid.to_string()).unwrap_or_default(),
            info.and_then(|info| since(&info.started_at)).unwrap_or_default(),
            info.map(|info| info.proxy_url.clone()).unwrap_or_default(),
            info.map(|info| info.profile.clone()).unwrap_or_default(),
        ]);
    }
    table
}

/// How to reach each of several runs with the same name: a command finds the run of its own environment first.
fn namesakes(rows: &[RunRow]) -> Vec<String> {
    let has_namesake = |row: &&RunRow| rows.iter().filter(|other| other.name == row.name).count() > 1;
    let line = |row: &RunRow| {
        let folder = row.info.as_ref()?.control_socket.parent()?.parent()?;
        let environment = match (folder.parent(), folder.file_name()?.to_str()?) {
            (Some(parent), "xpyd") => format!("XDG_RUNTIME_DIR={}", shell_word(&parent.display().to_string())),
            // The folder of an environment without a log-in, `/tmp/xpyd-UID`.
            _ => "XDG_RUNTIME_DIR=".to_owned(),
        };
        let command = command("status", &row.name);
        Some(format!("`{environment} {command}` shows the run with pid {}", row.pid?))
    };
    rows.iter().filter(has_namesake).filter_map(line).collect()
}

/// The name of a user, or the user id if there is no name.
pub(super) fn user_name(user: u32) -> String {
    let known = nix::unistd::User::from_uid(user.into()).ok().flatten();
    known.map_or_else(|| user.to_string(), |known| known.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_one_name_have_a_command_each() {
        let row = |name: &str, pid: u32, socket: &str| {
            let mut info = RunInfo::of_this_process(name).expect("a process");
            info.pid = pid;
            info.control_socket = socket.into();
            RunRow::of(&info, None)
        };
        let rows = [
            row("a", 1, "/run/user/7/xpyd/a/control.sock"),
            row("a", 2, "/tmp/xpyd-7/a/control.sock"),
            row("b", 3, "/run/user/7/xpyd/b/control.sock"),
        ];
        assert_eq!(
            namesakes(&rows),
            [
                "`XDG_RUNTIME_DIR=/run/user/7 xpyd status --name a` shows the run with pid 1",
                "`XDG_RUNTIME_DIR= xpyd status --name a` shows the run with pid 2",
            ]
        );
    }
}
