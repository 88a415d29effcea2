//! Diagnoses failed engines from their logs, for the supervisor, which decides about restarts.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::watch;

use crate::engine::EngineKind;
use crate::fleet::{EngineId, Exit};
use crate::logs::{self, Diagnosis, Position};
use crate::plan::{EngineSpec, Plan};
use crate::report::one_line;
use crate::supervisor::{Diagnose, FailureCause};

/// Where the newest incarnation of each engine began to write its log.
pub type LogStarts = HashMap<EngineId, Position>;

/// Diagnoses the engines of one run.
pub(super) struct LogDiagnosis {
    folder: PathBuf,
    kind: EngineKind,
    starts: watch::Sender<LogStarts>,
}

impl LogDiagnosis {
    /// `starts` gets the position in the log at each start of an engine.
    pub(super) fn new(plan: &Plan, starts: watch::Sender<LogStarts>) -> Self {
        Self {
            folder: plan.run_dir.clone(),
            kind: plan.engine,
            starts,
        }
    }

    /// Called before the start; what is returned reads the log from there on.
    pub(super) fn of_start(&self, spec: &EngineSpec) -> Diagnose {
        let log = self.folder.join(&spec.log_file);
        let from = Position::end_of(&log).unwrap_or_else(|error| {
            tracing::warn!(engine = %spec.id, %error, "cannot find the end of the engine's log");
            Position::START
        });
        self.starts.send_modify(|starts| {
            starts.insert(spec.id.clone(), from);
        });
        let (engine, kind) = (spec.id.clone(), self.kind);
        Arc::new(move |exit| failure_cause(&engine, &log, from, kind, exit))
    }
}

fn failure_cause(engine: &EngineId, log: &Path, from: Position, kind: EngineKind, exit: Option<Exit>) -> FailureCause {
    let phase = logs::phase_reached(log, from, kind).unwrap_or_else(|error| {
        tracing::debug!(%engine, error = one_line(&error), "cannot read the phases of its start");
        None
    });
    let phase = phase.map(|phase| phase.name);
    let Some(Diagnosis { error, hint }) = logs::diagnose(log, from, exit) else {
        return FailureCause {
            phase,
            ..FailureCause::default()
        };
    };
    tracing::info!(%engine, known = hint.map(|hint| hint.name.as_str()), error, "cause of a failure");
    let title = hint.map(|hint| hint.title.clone());
    FailureCause {
        retry: hint.map(|hint| hint.retry).unwrap_or_default(),
        found: match (title, error) {
            (Some(title), Some(error)) => Some(format!("{title}: {error}")),
            (title, error) => title.or(error),
        },
        phase,
    }
}
