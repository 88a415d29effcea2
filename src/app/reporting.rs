//! Tells the user what the fleet does: progress while it starts, and every change after that.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::fleet::{EngineId, EngineState, FleetStage, FleetView};
use crate::logs::Phase;
use crate::plan::Plan;
use crate::ui::Printer;
use crate::ui::progress::FleetProgress;

/// The phases that engines have reached, for the status.
pub(super) type Phases = Arc<HashMap<EngineId, Phase>>;

/// Prints what changes.
#[derive(Debug)]
pub(super) struct Reporter {
    printer: Printer,
    progress: Option<FleetProgress>,
    stage: FleetStage,
    states: HashMap<EngineId, EngineState>,
    phases: HashMap<EngineId, Phase>,
}

impl Reporter {
    pub(super) fn new(printer: Printer, plan: &Plan) -> Self {
        let engines: Vec<_> =
            plan.engines.iter().map(|engine| (engine.id.clone(), engine.role, engine.endpoint.port)).collect();
        Self {
            printer,
            progress: Some(FleetProgress::new(printer, &engines)),
            stage: FleetStage::Starting,
            states: HashMap::new(),
            phases: HashMap::new(),
        }
    }

    /// Reports until `stop` is cancelled, then once more what the last view says.
    pub(super) async fn run(
        mut self,
        mut view: watch::Receiver<Arc<FleetView>>,
        mut phases: mpsc::Receiver<(EngineId, Phase)>,
        published: watch::Sender<Phases>,
        stop: CancellationToken,
    ) {
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                changed = view.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    let current = view.borrow_and_update().clone();
                    self.view_changed(&current);
                }
                Some((engine, phase)) = phases.recv() => {
                    if let Some(progress) = &mut self.progress {
                        progress.phase(&engine, phase.name, phase.percent);
                    }
                    self.phases.insert(engine, phase);
                    published.send_replace(Arc::new(self.phases.clone()));
                }
            }
        }
        let last = view.borrow().clone();
        self.view_changed(&last);
    }

    fn view_changed(&mut self, view: &FleetView) {
        for engine in &view.engines {
            let before = self.states.insert(engine.id.clone(), engine.state);
            if before == Some(engine.state) {
                continue;
            }
            match &mut self.progress {
                Some(progress) => progress.state(&engine.id, engine.state),
                None if engine.state == EngineState::Failed => {
                    let reason = engine.reason.as_deref().unwrap_or("it ended");
                    self.printer.error(format!("{} failed: {reason}", engine.id));
                }
                None => {}
            }
        }
        if view.stage != self.stage {
            self.stage = view.stage;
            self.stage_changed(view);
        }
    }

    fn stage_changed(&mut self, view: &FleetView) {
        match view.stage {
            FleetStage::Starting => {}
            FleetStage::Verifying => {
                let text = "verifying: one hand-off through every pair of engines";
                match &self.progress {
                    Some(progress) => progress.suspend(|| self.printer.status(text)),
                    None => self.printer.status(text),
                }
            }
            FleetStage::Ready => self.finish_progress(),
            FleetStage::Draining => {
                self.finish_progress();
                let in_flight: usize = view.engines.iter().map(|engine| engine.load.in_flight()).sum();
                let what = if in_flight == 0 { String::new() } else { " once the requests in flight are done".to_owned() };
                self.printer.status(format!("stopping the engines{what}; press Ctrl+C again to force"));
            }
            FleetStage::Stopping => self.finish_progress(),
            FleetStage::Stopped => {}
        }
    }

    fn finish_progress(&mut self) {
        if let Some(progress) = self.progress.take() {
            progress.finish("");
        }
    }
}
