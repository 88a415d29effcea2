//! The relay: stands for an engine of another node on this one. It is the leader that the local shim starts.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};

use super::message::{Messages, RemoteEngine, ToAgent, ToRelay, line};
use super::{ENGINE_VARIABLE, HEARTBEAT, SILENCE};
use crate::fleet::Exit;
use crate::slurm::{self, Node};
use crate::supervisor::shim::tree::MARK_VARIABLE;

/// How long Slurm can take to start the agent: a step waits until another one gives resources back.
const START_DEADLINE: Duration = Duration::from_mins(1);

/// How long `srun` can take to end after the engine has ended: the agent still ends the engine's other processes.
const END_DEADLINE: Duration = Duration::from_secs(5);

/// Why the engine on the other node ended, if it did not end by itself.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// `srun` cannot be started.
    #[error("cannot start `srun`")]
    Srun(#[source] std::io::Error),
    /// The engine could not be started.
    #[error("node {node}: {reason}")]
    Failed {
        /// The node.
        node: String,
        /// The reason, in one line.
        reason: String,
    },
    /// The node sends nothing any more.
    #[error("node {node} has not answered for {} s", SILENCE.as_secs())]
    Lost {
        /// The node.
        node: String,
    },
    /// Slurm did not start the agent in time.
    #[error("Slurm started no step on node {node} within {} s", START_DEADLINE.as_secs())]
    NotStarted {
        /// The node.
        node: String,
    },
    /// The step ended, and the agent had not reported the end of the engine.
    #[error("the Slurm step on node {node} ended (srun {status})")]
    StepEnded {
        /// The node.
        node: String,
        /// How `srun` ended.
        status: std::process::ExitStatus,
    },
}

/// The command line and the variables of the relay for this engine.
pub fn command(program: &Path, node: &Node, engine: &RemoteEngine) -> (Vec<String>, BTreeMap<String, String>) {
    let argv = [&*program.to_string_lossy(), "node", "relay", &node.name].map(str::to_owned);
    let value = serde_json::to_string(engine).unwrap_or_default();
    (argv.into(), BTreeMap::from([(ENGINE_VARIABLE.to_owned(), value)]))
}

/// Runs the engine on its node until it has ended, and returns how it ended.
pub async fn run(program: &Path, node: &str, engine: RemoteEngine) -> Result<Exit, RelayError> {
    let mut srun = start(program, node).map_err(RelayError::Srun)?;
    let stop_grace = engine.spec.stop_grace;
    match follow(&mut srun, node, engine).await {
        Ok(Some(end)) => {
            // The agent first ends the engine's other processes. What is left then gets SIGKILL with this process' tree.
            let deadline = if end.was_requested { stop_grace } else { END_DEADLINE };
            drop(timeout(deadline, srun.wait()).await);
            Ok(end.exit)
        }
        Ok(None) => match timeout(END_DEADLINE, srun.wait()).await {
            Ok(Ok(status)) => Err(RelayError::StepEnded {
                node: node.to_owned(),
                status,
            }),
            Ok(Err(error)) => Err(RelayError::Srun(error)),
            Err(_) => Err(RelayError::Lost { node: node.to_owned() }),
        },
        Err(error) => {
            // On a lost node nothing answers, so `srun` would wait for minutes.
            let _ = srun.start_kill();
            Err(error)
        }
    }
}

/// The end of the engine's leader.
struct EngineEnd {
    exit: Exit,
    /// Whether this process passed SIGTERM on before.
    was_requested: bool,
}

/// Starts the agent on the node. Its standard error, with the engine's output, is that of this process.
fn start(program: &Path, node: &str) -> std::io::Result<Child> {
    let agent = [program.as_os_str(), OsStr::new("node"), OsStr::new("agent")];
    let argv = slurm::step(node, &agent);
    Command::new(&argv[0])
        .args(&argv[1..])
        .env_remove(ENGINE_VARIABLE)
        .env_remove(MARK_VARIABLE)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
}

/// Passes messages on until the engine has ended; `None` if only the step has.
async fn follow(srun: &mut Child, node: &str, engine: RemoteEngine) -> Result<Option<EngineEnd>, RelayError> {
    let (Some(mut input), Some(output)) = (srun.stdin.take(), srun.stdout.take()) else {
        return Ok(None);
    };
    let mut messages = Messages::new(BufReader::new(output));
    let mut terminate = signal(SignalKind::terminate()).map_err(RelayError::Srun)?;
    let mut beat = interval(HEARTBEAT);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    send(&mut input, &ToAgent::Start(Box::new(engine))).await;
    let (mut is_started, mut was_requested) = (false, false);
    let mut deadline = Instant::now() + START_DEADLINE;
    loop {
        tokio::select! {
            message = messages.next() => match message {
                Some(ToRelay::Alive) => {
                    is_started = true;
                    deadline = Instant::now() + SILENCE;
                }
                Some(ToRelay::Failed(reason)) => {
                    return Err(RelayError::Failed { node: node.to_owned(), reason });
                }
                Some(ToRelay::Exited(exit)) => return Ok(Some(EngineEnd { exit, was_requested })),
                None => return Ok(None),
            },
            _ = terminate.recv() => {
                was_requested = true;
                send(&mut input, &ToAgent::Terminate).await;
            }
            _ = beat.tick() => send(&mut input, &ToAgent::Alive).await,
            () = sleep_until(deadline) => {
                let node = node.to_owned();
                return Err(if is_started { RelayError::Lost { node } } else { RelayError::NotStarted { node } });
            }
        }
    }
}

/// Sends a message. If the step has ended, or hangs, the reader notices it.
async fn send(input: &mut ChildStdin, message: &ToAgent) {
    drop(timeout(HEARTBEAT, input.write_all(&line(message))).await);
}
