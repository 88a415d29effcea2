//! The log lines of a simulated engine in vLLM's format. The only file of the simulation that writes to the terminal:
//! an engine logs to stderr, which the launcher stores.

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// The target of an engine's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogTarget {
    /// Stderr.
    Stderr,
    /// Nowhere: for engines within a test process.
    Nowhere,
}

/// The vLLM process that writes a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Process {
    ApiServer,
    EngineCore,
    Worker,
}

/// Writes log lines. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Log {
    target: LogTarget,
    engine_core: Arc<AtomicU32>,
    worker: Arc<AtomicU32>,
}

impl Log {
    pub(crate) fn new(target: LogTarget) -> Self {
        Self {
            target,
            engine_core: Arc::new(AtomicU32::new(std::process::id())),
            worker: Arc::new(AtomicU32::new(std::process::id())),
        }
    }

    /// Sets the process ids in the lines of the engine core and of the first worker.
    pub(crate) fn set_children(&self, engine_core: u32, worker: u32) {
        self.engine_core.store(engine_core, Ordering::Relaxed);
        self.worker.store(worker, Ordering::Relaxed);
    }

    /// `(APIServer pid=9311) INFO 11-22 21:50:42 [entry.py:136] Supported tasks: ['generate']`
    pub(crate) fn line(&self, process: Process, level: &str, place: &str, message: &str) {
        if self.target == LogTarget::Nowhere {
            return;
        }
        let (name, pid) = match process {
            Process::ApiServer => ("APIServer", std::process::id()),
            Process::EngineCore => ("EngineCore", self.engine_core.load(Ordering::Relaxed)),
            Process::Worker => ("Worker", self.worker.load(Ordering::Relaxed)),
        };
        let time = jiff::Zoned::now().strftime("%m-%d %H:%M:%S");
        self.raw(&format!("({name} pid={pid}) {level} {time} [{place}] {message}\n"));
    }

    /// An INFO line.
    pub(crate) fn info(&self, process: Process, place: &str, message: &str) {
        self.line(process, "INFO", place, message);
    }

    /// An ERROR line of the engine core.
    pub(crate) fn error(&self, place: &str, message: &str) {
        self.line(Process::EngineCore, "ERROR", place, message);
    }

    /// Writes raw text: uvicorn's lines, progress bars, tracebacks. One write per call, so that lines are not split.
    pub(crate) fn raw(&self, text: &str) {
        if self.target == LogTarget::Stderr {
            // A closed pipe must not end the engine.
            drop(std::io::stderr().write_all(text.as_bytes()));
        }
    }
}
