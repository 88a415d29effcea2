//! The process tree of a vLLM engine: the API server spawns `EngineCore`, which spawns the workers, all in one session.
//!
//! These processes do nothing. They exit when the API server asks them to and survive its SIGKILL, as in vLLM.

use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use crate::log::{Log, Process};
use crate::options::Options;

/// Time limit for children to appear: on a busy machine a process starts in seconds.
const START_DEADLINE: Duration = Duration::from_mins(1);

/// Time limit for children to exit when asked.
const DEADLINE: Duration = Duration::from_secs(5);

/// The process that the fault `stray` leaves. It ends by itself after 10 minutes.
const STRAY: &str = "trap '' TERM INT HUP; exec sleep 600 9>/dev/shm/xpyd-sim-stray-$$";

/// The API server's handle of its process tree.
#[derive(Debug)]
pub(crate) struct Children {
    engine_core: Option<Child>,
    orphans: bool,
}

impl Children {
    /// A handle without children.
    pub(crate) fn new(options: &Options) -> Self {
        Self {
            engine_core: None,
            orphans: options.leaves_orphans(),
        }
    }

    /// Spawns the tree by executing this program again, unless the options disable it.
    pub(crate) async fn spawn(&mut self, options: &Options, log: &Log) -> std::io::Result<()> {
        if !options.spawn_children {
            return Ok(());
        }
        if options.leaves_stray() {
            let mut setsid = Command::new("setsid");
            let forked = setsid.args(["--fork", "sh", "-c", STRAY]).stdin(Stdio::null()).status();
            timeout(START_DEADLINE, forked).await??;
        }
        let mut child = command(options, "VLLM::EngineCore", "engine-core")?
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let engine_core = child.id().unwrap_or_default();
        let stdout = child.stdout.take();
        // Stored before the first wait: a cancelled start must still stop it.
        self.engine_core = Some(child);
        let mut line = String::new();
        if let Some(stdout) = stdout {
            let mut reader = BufReader::new(stdout);
            timeout(START_DEADLINE, reader.read_line(&mut line)).await??;
        }
        log.set_children(engine_core, line.trim().parse().unwrap_or(engine_core));
        Ok(())
    }

    /// Returns when `EngineCore` has exited by itself; never without children.
    pub(crate) async fn exited(&mut self) {
        match &mut self.engine_core {
            Some(child) => drop(child.wait().await),
            None => std::future::pending().await,
        }
    }

    /// Asks the tree to exit, and kills `EngineCore` if it does not.
    pub(crate) async fn stop(&mut self, log: &Log) {
        let Some(child) = &mut self.engine_core else {
            return;
        };
        log.info(
            Process::ApiServer,
            "utils.py:628",
            "[shutdown] Process manager: send sigterm to process EngineCore",
        );
        if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
            // It can have exited in the meantime.
            kill(Pid::from_raw(pid), Signal::SIGTERM).ok();
        }
        if self.orphans {
            return;
        }
        if timeout(DEADLINE, child.wait()).await.is_err() {
            log.line(
                Process::ApiServer,
                "WARNING",
                "utils.py:648",
                "[shutdown] Process manager: force killing remaining processes count=1",
            );
            drop(child.kill().await);
        }
    }
}

fn command(options: &Options, title: &str, kind: &str) -> std::io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg0(title)
        .args(["sim", &options.model, "--child", kind, "--tensor-parallel-size"])
        .arg(options.tensor_parallel_size.to_string());
    if options.leaves_orphans() {
        command.args(["--fault", "orphans"]);
    }
    Ok(command)
}

/// Runs `EngineCore`: spawns the workers, reports the first one's process id, and waits.
pub(crate) async fn engine_core(options: &Options) -> std::io::Result<()> {
    let mut asked_to_stop = signal(SignalKind::terminate())?;
    let mut workers = Vec::new();
    let mut pipes: Vec<Option<ChildStdin>> = Vec::new();
    for rank in 0..options.tensor_parallel_size {
        let title = if options.tensor_parallel_size == 1 {
            "VLLM::Worker".to_owned()
        } else {
            format!("VLLM::Worker_TP{rank}")
        };
        let mut worker = command(options, &title, "worker")?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        pipes.push(worker.stdin.take());
        // From then on it handles SIGTERM.
        if let Some(stdout) = &mut worker.stdout {
            drop(timeout(START_DEADLINE, stdout.read_u8()).await?);
        }
        workers.push(worker);
    }
    let first = workers.first().and_then(Child::id).unwrap_or_default();
    tokio::io::stdout().write_all(format!("{first}\n").as_bytes()).await?;
    tokio::io::stdout().flush().await?;
    let mut any_worker = futures_util::future::select_all(workers.iter_mut().map(|worker| Box::pin(worker.wait())));
    loop {
        tokio::select! {
            _ = asked_to_stop.recv() => {
                if !options.leaves_orphans() {
                    break;
                }
            }
            _ = &mut any_worker => break,
        }
    }
    drop(any_worker);
    // A worker exits at the end of its pipe.
    drop(pipes);
    for worker in &mut workers {
        drop(timeout(DEADLINE, worker.wait()).await);
    }
    Ok(())
}

/// Runs a worker: exits with `EngineCore`, or when asked.
pub(crate) async fn worker(options: &Options) -> std::io::Result<()> {
    let mut asked_to_stop = signal(SignalKind::terminate())?;
    tokio::io::stdout().write_all(b"\n").await?;
    tokio::io::stdout().flush().await?;
    if options.leaves_orphans() {
        return std::future::pending().await;
    }
    let mut nothing = [0; 1];
    tokio::select! {
        _ = asked_to_stop.recv() => {}
        _ = async { tokio::io::stdin().read(&mut nothing).await } => {}
    }
    Ok(())
}
