//! `xpyd node`: what xpyd runs on the other nodes of a Slurm allocation, and for them on its own.

use clap::Subcommand;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigHandler, SigSet, Signal, raise, signal};

use crate::fleet::Exit;
use crate::machine::{self, NodeQuestion};
use crate::report::{ExitStatus, Failure};
use crate::supervisor::node::{self, ENGINE_VARIABLE, RemoteEngine};
use crate::ui::Printer;

/// Which process this is.
#[derive(Debug, Subcommand)]
pub(super) enum Part {
    /// Stand for an engine on another node; the shim starts it
    Relay {
        /// The node.
        node: String,
    },
    /// Run the engine on its node; `srun` starts it
    Agent,
    /// Print the facts about this node; `srun` starts it
    Survey {
        /// What is asked, as JSON.
        #[arg(value_parser = question)]
        question: NodeQuestion,
    },
}

fn question(text: &str) -> Result<NodeQuestion, serde_json::Error> {
    serde_json::from_str(text)
}

/// Runs it, and returns the exit code.
pub(super) fn run(part: &Part) -> Result<u8, Failure> {
    // One thread, because there are two of these processes for each engine.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new(ExitStatus::Bug, error))?;
    let program = std::env::current_exe().map_err(anyhow::Error::from)?;
    match part {
        Part::Agent => {
            let done = runtime.block_on(node::run_agent(&program));
            done.map_err(|error| Failure::new(ExitStatus::Failure, error))?;
            Ok(0)
        }
        Part::Survey { question } => {
            let facts = serde_json::to_string(&machine::node_facts(question)).map_err(anyhow::Error::from)?;
            Printer::default().data(facts)?;
            Ok(0)
        }
        Part::Relay { node } => {
            let exit = runtime.block_on(node::run_relay(&program, node, remote_engine()?));
            Ok(end_as(exit.map_err(|error| Failure::new(ExitStatus::Failure, error))?))
        }
    }
}

fn remote_engine() -> Result<RemoteEngine, Failure> {
    let usage = |error: anyhow::Error| Failure::new(ExitStatus::Usage, error.context("only xpyd starts a relay"));
    let value = std::env::var(ENGINE_VARIABLE).map_err(|error| usage(error.into()))?;
    serde_json::from_str(&value).map_err(|error| usage(error.into()))
}

/// Ends this process as the engine ended.
#[expect(
    unsafe_code,
    reason = "restores the default action of a signal, which is no function"
)]
fn end_as(exit: Exit) -> u8 {
    match exit {
        Exit::Code(code) => u8::try_from(code & 0xff).unwrap_or(1),
        Exit::Signal(number) => {
            // A core of this process would tell nothing.
            let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
            if let Ok(number) = Signal::try_from(number) {
                // SAFETY: SIG_DFL is not a handler of this program.
                let _ = unsafe { signal(number, SigHandler::SigDfl) };
                let _ = SigSet::empty().thread_set_mask();
                let _ = raise(number);
            }
            ExitStatus::Failure.code()
        }
    }
}
