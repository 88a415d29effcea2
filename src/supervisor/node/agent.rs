//! The agent: runs one engine on the node on which it was started, for a relay on another node.

use std::io::{self, Write as _};
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncRead, BufReader};
use tokio::net::unix::pipe;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};

use super::message::{Messages, RemoteEngine, ToAgent, ToRelay, line};
use super::{HEARTBEAT, SILENCE};
use crate::plan::EngineSpec;
use crate::report::one_line;
use crate::supervisor::ports;
use crate::supervisor::shim::client::{Shim, ShimLog};
use crate::supervisor::shim::protocol::{Command, Event, ProtocolError, Spawn};

/// How long the engine's processes can take to end after SIGKILL, before the agent gives up. The shim reports them before.
const KILL_DEADLINE: Duration = Duration::from_secs(40);

/// Why the agent could not do its work. An engine that fails is no error of the agent.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Standard input is not what `srun` gives a step.
    #[error("`xpyd node agent` is started by xpyd, through `srun`")]
    Input(#[source] io::Error),
    /// The relay sent no engine.
    #[error("the relay sent no engine within {} s", SILENCE.as_secs())]
    NoEngine,
}

/// Runs one engine until it has ended, or until the relay is gone.
pub async fn run(program: &Path) -> Result<(), AgentError> {
    let input =
        pipe::Receiver::from_owned_fd(rustix::io::dup(io::stdin()).map_err(|error| AgentError::Input(error.into()))?)
            .map_err(AgentError::Input)?;
    let mut relay = Messages::new(BufReader::new(input));
    let Ok(Some(ToAgent::Start(engine))) = timeout(SILENCE, relay.next()).await else {
        return Err(AgentError::NoEngine);
    };
    match Agent::start(program, *engine).await {
        Ok(mut agent) => agent.serve(&mut relay).await,
        Err(reason) => tell(&ToRelay::Failed(reason)),
    }
    Ok(())
}

struct Agent {
    shim: Shim,
    engine: RemoteEngine,
    /// Held until the engine has ended.
    _ports: ports::Reservations,
}

impl Agent {
    /// Reserves the engine's ports, and starts it. The error is one line.
    async fn start(program: &Path, engine: RemoteEngine) -> Result<Self, String> {
        let here = EngineSpec {
            node: None,
            ..engine.spec.clone()
        };
        let ports = ports::reserve(&[here]).map_err(|conflict| one_line(&conflict))?;
        let shim = Shim::start(program, ShimLog::Inherited).await;
        let mut shim = shim.map_err(|error| one_line(&error))?;
        let spec = &engine.spec;
        let spawn = Spawn {
            engine: spec.id.clone(),
            incarnation: engine.incarnation,
            argv: spec.argv.clone(),
            env: spec.env.clone(),
            directory: engine.directory.clone(),
            log: None,
            log_limits: spec.log_limits,
            stop_grace: spec.stop_grace,
            memo: serde_json::Value::Null,
        };
        shim.send(&Command::Spawn(spawn)).map_err(|error| one_line(&error))?;
        Ok(Self {
            shim,
            engine,
            _ports: ports,
        })
    }

    /// Passes messages on until the engine and all its processes have ended, and ends them if the relay is gone.
    async fn serve<R: AsyncRead + Unpin>(&mut self, relay: &mut Messages<BufReader<R>>) {
        // When Slurm ends a step, it sends these to each of its processes. The engine ends by them, and the agent reports that.
        let ignored = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
        let mut beat = interval(HEARTBEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut deadline = Instant::now() + SILENCE;
        let (mut is_terminated, mut has_exited) = (false, false);
        loop {
            tokio::select! {
                message = relay.next() => match message {
                    Some(ToAgent::Terminate) => {
                        is_terminated = true;
                        let _ = self.command(&Command::Terminate { engine: self.id() });
                    }
                    Some(ToAgent::Alive | ToAgent::Start(_)) => deadline = Instant::now() + SILENCE,
                    None => break,
                },
                event = self.shim.event() => match event {
                    Ok(Event::SpawnFailed { reason, .. }) => {
                        tell(&ToRelay::Failed(reason));
                        break;
                    }
                    Ok(Event::Exited { exit, .. }) => {
                        tell(&ToRelay::Exited(exit));
                        has_exited = true;
                        break;
                    }
                    Ok(_) => {}
                    Err(error) => {
                        tell(&ToRelay::Failed(one_line(&error)));
                        self.shim.sweep().await;
                        return;
                    }
                },
                _ = beat.tick() => tell(&ToRelay::Alive),
                () = sleep_until(deadline) => break,
            }
        }
        drop(ignored);
        self.end(is_terminated && has_exited).await;
    }

    /// Ends what is left of the engine. After a requested stop its processes have the time that they have on any node.
    async fn end(&mut self, was_requested: bool) {
        if was_requested {
            let rest = async { while !matches!(self.shim.event().await, Ok(Event::TreeEmpty { .. }) | Err(_)) {} };
            drop(timeout(self.engine.spec.stop_grace, rest).await);
        }
        let _ = self.command(&Command::Shutdown);
        drop(timeout(KILL_DEADLINE, async { while self.shim.event().await.is_ok() {} }).await);
        self.shim.ended().await;
    }

    fn id(&self) -> crate::fleet::EngineId {
        self.engine.spec.id.clone()
    }

    fn command(&mut self, command: &Command) -> Result<(), ProtocolError> {
        self.shim.send(command)
    }
}

/// Sends a message to the relay. A relay that is gone is noticed by the reader.
fn tell(message: &ToRelay) {
    let mut output = io::stdout().lock();
    drop(output.write_all(&line(message)).and_then(|()| output.flush()));
}
