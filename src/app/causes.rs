//! Connects the supervisor, which decides about restarts, with the logs, which know why an engine failed.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::watch;

use crate::engine::EngineKind;
use crate::fleet::{EngineId, Exit};
use crate::logs::{self, Diagnosis, Position};
use crate::plan::Plan;
use crate::report::one_line;
use crate::supervisor::{Cause, Explain};

/// Where the last incarnation of each engine began to write its log.
pub type Began = HashMap<EngineId, Position>;

/// What tells the supervisor why an engine failed. Notes in `began` where each incarnation begins to write.
pub(super) fn explain(plan: &Plan, began: watch::Sender<Began>) -> Explain {
    let (folder, kind) = (plan.run_dir.clone(), plan.engine);
    Box::new(move |spec| {
        let log = folder.join(&spec.log_file);
        let from = Position::end_of(&log).unwrap_or_else(|error| {
            tracing::warn!(engine = %spec.id, %error, "where its log ends is not known");
            Position::START
        });
        began.send_modify(|began| {
            began.insert(spec.id.clone(), from);
        });
        let engine = spec.id.clone();
        Arc::new(move |exit| cause(&engine, &log, from, kind, exit))
    })
}

fn cause(engine: &EngineId, log: &Path, from: Position, kind: EngineKind, exit: Option<Exit>) -> Cause {
    let phase = logs::phase_reached(log, from, kind).unwrap_or_else(|error| {
        tracing::debug!(%engine, error = one_line(&error), "phases cannot be read");
        None
    });
    let phase = phase.map(|phase| phase.name);
    let Some(Diagnosis { error, hint }) = logs::diagnose(log, from, exit) else {
        return Cause {
            phase,
            ..Cause::default()
        };
    };
    tracing::info!(%engine, known = hint.map(|hint| hint.name.as_str()), error, "cause of a failure");
    let title = hint.map(|hint| hint.title.clone());
    Cause {
        retry: hint.map(|hint| hint.retry).unwrap_or_default(),
        found: match (title, error) {
            (Some(title), Some(error)) => Some(format!("{title}: {error}")),
            (title, error) => title.or(error),
        },
        phase,
    }
}
