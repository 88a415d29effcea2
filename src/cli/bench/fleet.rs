//! `xpyd bench --profile`: starts a fleet for the benchmark.
//!
//! A second xpyd process runs the fleet, as with `xpyd up --detach`. The benchmark stops it at the end, and the kernel
//! stops it if the benchmark is killed.

use std::path::PathBuf;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use super::{Arguments, Target};
use crate::cli::fleet_arguments::FleetArguments;
use crate::cli::{detach, down};
use crate::control::rundir;
use crate::report::{ExitStatus, Failure};
use crate::ui::Printer;

/// A running fleet.
pub(super) struct Fleet {
    name: String,
    xpyd: Child,
    /// Folder of its logs.
    logs: PathBuf,
    /// Its address.
    pub(super) target: Target,
}

impl Fleet {
    /// Starts the fleet; `None` if it was stopped before it was ready.
    pub(super) async fn start(
        arguments: &Arguments,
        profile: &str,
        printer: Printer,
        stop: &CancellationToken,
    ) -> Result<Option<Self>, Failure> {
        let name = format!("bench-{}", std::process::id());
        let program = std::env::current_exe().map_err(anyhow::Error::from)?;
        let mut xpyd = Command::new(program)
            .args(printer.quiet.then_some("--quiet"))
            .args(up_arguments(arguments, profile, &name)?)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| anyhow::Error::new(error).context("cannot start the process of the fleet"))?;
        if !is_ready(&mut xpyd, printer, stop).await? {
            // It has printed the reason and is ending.
            let ended = xpyd.wait().await.map_err(anyhow::Error::from)?;
            if stop.is_cancelled() {
                return Ok(None);
            }
            let status = detach::status_after(ended);
            let problem = format!("the fleet of profile `{profile}` did not start");
            return Err(
                Failure::message(status, problem).hint(format!("`xpyd plan --profile {profile}` shows the plan"))
            );
        }
        let run = rundir::find(&name).map_err(|error| Failure::new(ExitStatus::Failure, error))?;
        let run = run.ok_or_else(|| Failure::message(ExitStatus::Failure, "the fleet has ended already"))?;
        Ok(Some(Self {
            name,
            xpyd,
            logs: run.logs_dir,
            target: Target {
                base_url: run.proxy_url,
            },
        }))
    }

    /// Stops the fleet; an error if anything of it is left.
    pub(super) async fn stop(mut self, printer: Printer) -> Result<(), Failure> {
        let went_down = down::run_to_its_end(down::Arguments::of(&self.name), printer).await;
        match went_down {
            Ok(_) => {
                self.xpyd.wait().await.map_err(anyhow::Error::from)?;
                Ok(())
            }
            // It ended by itself; its log has the reason.
            Err(failure) if failure.status == ExitStatus::RunState => {
                let problem = "the fleet ended during the benchmark";
                Err(Failure::message(ExitStatus::Failure, problem)
                    .hint(format!("`xpyd logs --run {}` shows why", self.logs.display())))
            }
            Err(failure) => Err(failure),
        }
    }
}

/// The arguments of the command that runs the fleet.
fn up_arguments(arguments: &Arguments, profile: &str, name: &str) -> Result<Vec<String>, Failure> {
    let fleet = &arguments.fleet;
    let mut settings = fleet.set.clone();
    settings.extend(fleet.preset.as_ref().map(|preset| format!("sim.preset={preset}")));
    let mut wanted = FleetArguments::of_profile(profile);
    wanted.set.clone_from(&settings);
    wanted.engine = fleet.engine;
    wanted.connector = fleet.connector;
    wanted.vllm.clone_from(&fleet.vllm);
    wanted.model.clone_from(&arguments.target.model);
    wanted.logs.clone_from(&fleet.logs);
    if !settings
        .iter()
        .any(|setting| setting.trim_start().starts_with("port_offset"))
    {
        let (offset, _claim) = wanted.free_offset()?;
        settings.push(format!("port_offset={offset}"));
    }
    let process = std::process::id().to_string();
    let logs = fleet.logs.display().to_string();
    let mut words = [
        "up",
        "--profile",
        profile,
        "--name",
        name,
        "--logs",
        &logs,
        "--detached-child",
        "--ends-with",
        &process,
    ]
    .map(str::to_owned)
    .to_vec();
    for setting in settings {
        words.extend(["--set".to_owned(), setting]);
    }
    if let Some(engine) = fleet.engine {
        words.extend(["--engine", engine.name()].map(str::to_owned));
    }
    if let Some(connector) = fleet.connector {
        words.extend(["--connector", connector.name()].map(str::to_owned));
    }
    if let Some(model) = &arguments.target.model {
        words.extend(["--model".to_owned(), model.clone()]);
    }
    if !fleet.vllm.is_empty() {
        words.push("--".to_owned());
        words.extend(fleet.vllm.iter().cloned());
    }
    Ok(words)
}

/// Waits until the fleet is ready or its process closes its pipes; true if it is ready. `stop` ends it.
async fn is_ready(xpyd: &mut Child, printer: Printer, stop: &CancellationToken) -> Result<bool, Failure> {
    let mut relay = std::pin::pin!(detach::relay(xpyd.stdout.take(), xpyd.stderr.take(), printer));
    let is_ready = tokio::select! {
        is_ready = &mut relay => is_ready,
        () = stop.cancelled() => {
            terminate(xpyd);
            relay.await
        }
    };
    let is_ready = is_ready.map_err(anyhow::Error::from)?;
    if is_ready && stop.is_cancelled() {
        // Ready and stopped at the same time: it ends as before it is ready.
        terminate(xpyd);
        return Ok(false);
    }
    Ok(is_ready)
}

fn terminate(xpyd: &Child) {
    let process = xpyd.id().and_then(|id| i32::try_from(id).ok());
    if let Some(process) = process {
        // Fails if it has already ended.
        let _ = kill(Pid::from_raw(process), Signal::SIGTERM);
    }
}
