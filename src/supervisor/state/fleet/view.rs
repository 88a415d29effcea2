//! What others read of the fleet's state. PURE.

use std::sync::Arc;

use super::{FleetMachine, RunStage};
use crate::fleet::{EngineId, FleetStage, FleetView, Load};
use crate::supervisor::EndReason;
use crate::supervisor::shim::protocol::LeftoverProcess;
use crate::supervisor::state::engine::ProcessTree;

impl FleetMachine {
    /// The view, if it differs from the one of the last call.
    pub(in crate::supervisor) fn changed_view(&mut self, generation: u64) -> Option<FleetView> {
        self.output.take_view_changed().then(|| self.view(generation))
    }

    /// The current view.
    pub(in crate::supervisor) fn view(&self, generation: u64) -> FleetView {
        let mut engines: Vec<_> = self.engines.iter().map(|engine| Arc::new(engine.view())).collect();
        // Engines that were added later stand last, whatever their role.
        engines.sort_by_key(|engine| engine.role);
        FleetView {
            generation,
            stage: match self.stage {
                RunStage::Starting => FleetStage::Starting,
                RunStage::Verifying => FleetStage::Verifying,
                RunStage::Ready => FleetStage::Ready,
                RunStage::Draining { .. } if matches!(self.end, Some((EndReason::EnginesKept, _))) => {
                    FleetStage::Leaving
                }
                RunStage::Draining { .. } => FleetStage::Draining,
                RunStage::Stopping { .. } | RunStage::Closing { .. } | RunStage::Sweeping | RunStage::Checking => {
                    FleetStage::Stopping
                }
                RunStage::Over => FleetStage::Stopped,
            },
            engines,
        }
    }

    /// The loads of this engine, or of all engines, for the wait until they are idle.
    pub(in crate::supervisor) fn loads(&self, of: Option<&EngineId>) -> Vec<Arc<Load>> {
        let engines = self
            .engines
            .iter()
            .filter(|engine| of.is_none_or(|id| engine.is_named(id)));
        engines.map(|engine| Arc::clone(&engine.load)).collect()
    }

    /// Processes that outlived SIGKILL, with their engine.
    pub(in crate::supervisor) fn leftovers(&self) -> Vec<(Option<EngineId>, LeftoverProcess)> {
        let mut left = Vec::new();
        for engine in &self.engines {
            if let ProcessTree::Left(processes) = &engine.tree {
                left.extend(processes.iter().map(|process| (Some(engine.id()), process.clone())));
            }
        }
        left.extend(self.unowned_processes.iter().map(|process| (None, process.clone())));
        left
    }
}
