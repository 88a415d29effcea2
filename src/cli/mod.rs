//! The command line: one thin file per command.

mod allocation;
mod attach;
pub mod bench;
mod bundle;
mod checks;
mod completions;
mod demo;
mod detach;
mod doctor;
pub mod down;
mod drain;
mod engine_change;
mod engine_key;
mod fetch;
mod first_process;
mod fleet_arguments;
pub mod logs;
mod node;
mod other_runs;
mod plan;
mod planning;
mod profiles;
pub mod proxy;
mod proxy_options;
mod ps;
#[cfg(test)]
mod reference;
mod restart;
mod run_lifecycle;
mod run_plan;
mod running;
mod scale;
mod sidecar;
pub mod sim;
mod sim_lmcache;
mod slurm;
pub mod status;
mod up;
mod usage;
mod vllm_upgrade;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use self::allocation::StepKind;
use crate::control::rundir::{self, FoundRun, RunDirError, RunInfo};
use crate::report::{ExitStatus, Failure};
use crate::signals;
use crate::supervisor::shim;
use crate::ui::{self, Printer};

/// Serve LLMs with prefill and decode on different engines, on one machine or a Slurm allocation.
#[derive(Debug, Parser)]
#[command(name = "xpyd", version, max_term_width = 100, arg_required_else_help = true)]
#[command(after_help = after_help())]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
    /// Print errors and data only
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Run the command in this Slurm job, on its first node, where `xpyd up` runs
    #[arg(long, global = true, value_name = "ID")]
    job: Option<String>,
}

/// `Exit codes: 0 ok, 1 the work failed, …`.
fn after_help() -> String {
    let codes = ExitStatus::ALL.map(|status| format!("{} {}", status.code(), status.name()));
    format!("Start with `xpyd demo`. Exit codes: {}.", codes.join(", "))
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Start a fleet, serve the OpenAI API, and stop on Ctrl+C
    Up(up::Arguments),
    /// Show a whole fleet of simulated engines at work, in one minute
    Demo(demo::Arguments),
    /// Show the engines of a run, their states and their load
    Status(status::Arguments),
    /// List all runs of this user
    Ps(ps::Arguments),
    /// Print or follow the logs of a run
    Logs(logs::Arguments),
    /// Restart engines one by one, while the others serve
    Restart(restart::Arguments),
    /// Drain engines and stop them, while the others serve
    Drain(drain::Arguments),
    /// Change the number of engines of a role
    Scale(scale::Arguments),
    /// Stop a run
    Down(down::Arguments),
    /// Benchmark a server, with the flags and the table of `vllm bench serve`
    Bench(Box<bench::Arguments>),
    /// Serve the API over engines that xpyd did not start, on this machine or others
    Proxy(proxy::Arguments),
    /// Run one simulated engine with the interface of `vllm serve`
    Sim(Box<sim::Arguments>),
    /// Show everything that a run would do: ports, GPUs, command lines, files
    Plan(plan::Arguments),
    /// Check that this machine can run a profile
    Doctor(doctor::Arguments),
    /// Write an archive for an issue: plan, logs and findings, without secrets
    Bundle(bundle::Arguments),
    /// List, show or check profiles
    Profiles(profiles::Arguments),
    /// Run a fleet over the nodes of a Slurm cluster
    #[command(subcommand)]
    Slurm(slurm::Verb),
    /// Print shell completions
    Completions(completions::Arguments),
    /// Own the engines of a run; `xpyd up` starts it, with its control socket as stdin
    #[command(hide = true)]
    Shim,
    /// Start a server that an engine needs, then become the engine
    #[command(hide = true)]
    Sidecar(sidecar::Arguments),
    /// Run an engine on another node of a Slurm allocation
    #[command(hide = true, subcommand)]
    Node(node::Part),
    /// Run one simulated cache server with the interface of `lmcache server`
    #[command(hide = true)]
    SimLmcache(sim_lmcache::Arguments),
}

impl Verb {
    /// How the command runs as a step of a job. `None` if it is not about the runs, GPUs or engines of a machine, and so runs
    /// where it is.
    fn as_step(&self) -> Option<StepKind> {
        match self {
            Self::Slurm(_)
            | Self::Proxy(_)
            | Self::Sim(_)
            | Self::Profiles(_)
            | Self::Completions(_)
            | Self::Shim
            | Self::Sidecar(_)
            | Self::Node(_)
            | Self::SimLmcache(_) => None,
            Self::Down(_) => Some(StepKind::CanEndTheJob),
            Self::Up(arguments) if arguments.detaches() => Some(StepKind::OutlivesTheStep),
            _ => Some(StepKind::Plain),
        }
    }
}

/// Parses the command line and runs the command.
pub fn main() -> ExitCode {
    if let Some(ended) = first_process::run() {
        return ended;
    }
    signals::prepare();
    ui::choose_colours();
    let printer = Printer::default();
    let code = Cli::try_parse_from(sim::line(bench::compatible_argv(std::env::args_os()))).map_or_else(
        |error| usage::refuse(error, printer).map(ExitStatus::code),
        |cli| {
            if let Some(kind) = cli.verb.as_step()
                && let Some(code) = allocation::move_to_first_node(cli.job.as_deref(), kind)?
            {
                return Ok(code);
            }
            run(cli.verb, Printer { quiet: cli.quiet })
        },
    );
    ExitCode::from(code.unwrap_or_else(|failure| {
        printer.error(&failure);
        failure.status.code()
    }))
}

/// Runs one command, and returns its exit code.
fn run(verb: Verb, printer: Printer) -> Result<u8, Failure> {
    let status = match verb {
        // It ends as an engine does, which can have any code.
        Verb::Node(part) => return node::run(&part),
        Verb::Up(arguments) => up::run(&arguments, printer),
        Verb::Demo(arguments) => demo::run(&arguments, printer),
        Verb::Status(arguments) => block_on(status::run(arguments, printer)),
        Verb::Ps(arguments) => block_on(ps::run(arguments, printer)),
        Verb::Logs(arguments) => block_on(logs::run(arguments, printer)),
        Verb::Restart(arguments) => block_on(restart::run(arguments, printer)),
        Verb::Scale(arguments) => block_on(scale::run(arguments, printer)),
        Verb::Drain(arguments) => block_on(drain::run(arguments, printer)),
        Verb::Down(arguments) => block_on(down::run(arguments, printer)),
        Verb::Bench(arguments) => block_on(bench::run(*arguments, running_fleet(), printer)),
        Verb::Proxy(arguments) => block_on(proxy::run(arguments, printer)),
        Verb::Sim(arguments) => block_on(sim::run(*arguments)),
        Verb::Plan(arguments) => plan::run(&arguments, printer),
        Verb::Doctor(arguments) => doctor::run(&arguments, printer),
        Verb::Bundle(arguments) => bundle::run(&arguments, printer),
        Verb::Profiles(arguments) => profiles::run(&arguments, printer),
        Verb::Slurm(verb) => slurm::run(&verb, printer),
        Verb::Completions(arguments) => completions::run(&arguments, printer),
        Verb::Shim => Ok(shim::process::run()),
        Verb::Sidecar(arguments) => sidecar::run(&arguments, printer),
        Verb::SimLmcache(arguments) => block_on(sim_lmcache::run(arguments)),
    };
    status.map(ExitStatus::code)
}

/// Runs an async command on the main thread, with worker threads for its tasks.
fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| {
            Failure::new(
                ExitStatus::Bug,
                anyhow::Error::new(error).context("cannot start the async runtime"),
            )
        })?;
    runtime.block_on(work)
}

/// The command `xpyd VERB` for the run `name`, as people type it.
fn command(verb: &str, name: &str) -> String {
    if name == rundir::DEFAULT_NAME {
        format!("xpyd {verb}")
    } else {
        format!("xpyd {verb} --name {name}")
    }
}

/// The failure if the runtime folder cannot be used.
fn no_run_dir(error: RunDirError) -> Failure {
    let hint = error.hint();
    let status = match &error {
        RunDirError::BadName(_) => ExitStatus::Usage,
        _ => ExitStatus::Failure,
    };
    let mut failure = Failure::new(status, error);
    failure.hints.extend(hint);
    failure
}

/// The run with the default name, or the only one: the default target of `xpyd bench`.
fn running_fleet() -> Option<bench::Target> {
    let only = || match &rundir::visible()[..] {
        [FoundRun::Up(run)] => Some(RunInfo::clone(run)),
        _ => None,
    };
    let run = rundir::find(rundir::DEFAULT_NAME).ok().flatten().or_else(only)?;
    Some(bench::Target {
        base_url: run.proxy_url,
    })
}
