//! What others get to see of the fleet's state. PURE.

use std::sync::Arc;

use super::{Engine, Fleet, Stage, Tree};
use crate::fleet::{EngineId, EngineView, FleetStage, FleetView, Load};
use crate::supervisor::Ending;
use crate::supervisor::shim::protocol::LeftoverProcess;

impl Fleet {
    /// The view, if readers would see a difference since the last call.
    pub(in crate::supervisor) fn changed_view(&mut self, generation: u64) -> Option<FleetView> {
        std::mem::take(&mut self.changed).then(|| self.view(generation))
    }

    /// The view now.
    pub(in crate::supervisor) fn view(&self, generation: u64) -> FleetView {
        let mut engines: Vec<_> = self.engines.iter().map(|engine| Arc::new(engine.view())).collect();
        // Those that joined later stand last, whatever their role.
        engines.sort_by_key(|engine| engine.role);
        FleetView {
            generation,
            stage: match self.stage {
                Stage::Starting => FleetStage::Starting,
                Stage::Verifying => FleetStage::Verifying,
                Stage::Ready => FleetStage::Ready,
                Stage::Draining { .. } if matches!(self.ending, Some((Ending::Kept, _))) => FleetStage::Leaving,
                Stage::Draining { .. } => FleetStage::Draining,
                Stage::Stopping { .. } | Stage::Closing { .. } | Stage::Sweeping | Stage::Checking => {
                    FleetStage::Stopping
                }
                Stage::Over => FleetStage::Stopped,
            },
            engines,
        }
    }

    /// The loads of this engine, or of all, for the wait until they are idle.
    pub(in crate::supervisor) fn loads(&self, of: Option<&EngineId>) -> Vec<Arc<Load>> {
        let meant = self
            .engines
            .iter()
            .filter(|engine| of.is_none_or(|id| engine.spec.id == *id));
        meant.map(|engine| Arc::clone(&engine.load)).collect()
    }

    /// Processes that were reported as left, with their engine.
    pub(in crate::supervisor) fn leftovers(&self) -> Vec<(Option<EngineId>, LeftoverProcess)> {
        let mut left = Vec::new();
        for engine in &self.engines {
            if let Tree::Left(processes) = &engine.tree {
                left.extend(
                    processes
                        .iter()
                        .map(|process| (Some(engine.spec.id.clone()), process.clone())),
                );
            }
        }
        left.extend(self.strays.iter().map(|process| (None, process.clone())));
        left
    }
}

impl Engine {
    fn view(&self) -> EngineView {
        EngineView {
            id: self.spec.id.clone(),
            role: self.spec.role,
            incarnation: self.incarnation,
            state: self.state,
            endpoint: self.spec.endpoint.clone(),
            pid: self.pid,
            reason: self.reason.clone(),
            restart_at: self.restart_at,
            load: Arc::clone(&self.load),
        }
    }
}
