//! Prints what the fleet does: progress while it starts, and every change after that.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Duration, Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::start_history;
use crate::engine::EngineKind;
use crate::fleet::{EngineId, EngineState, EngineView, FleetStage, FleetView, Incarnation, Role};
use crate::logs::{self, Estimate, PastStart, Phase, StartEstimator};
use crate::plan::{self, Plan};
use crate::ui::{FleetProgress, Printer, StopProgress, time_span};

/// The progress of the starts, for the status. Only the reporter knows it.
#[derive(Debug, Clone, Default)]
pub(super) struct StartProgress {
    /// The current start of each engine.
    pub(super) starts: HashMap<EngineId, EngineStart>,
    /// When the fleet became ready, RFC 3339.
    pub(super) ready_since: Option<String>,
}

/// One start of an engine.
#[derive(Debug, Clone)]
pub(super) struct EngineStart {
    pub(super) began: Instant,
    /// Its progress.
    start: StartEstimator,
    /// Its duration, once the engine is healthy.
    took: Option<Duration>,
}

impl EngineStart {
    fn begin(last: Option<Arc<PastStart>>) -> Self {
        Self {
            began: Instant::now(),
            start: StartEstimator::begin(last),
            took: None,
        }
    }

    /// The current phase, from the spawn on.
    pub(super) fn phase(&self) -> &'static str {
        self.start.phase().map_or("launching", |phase| phase.name)
    }

    /// The current progress.
    pub(super) fn estimate(&self) -> Estimate {
        self.start.estimate(self.began.elapsed())
    }
}

/// Time between two redraws of what changes with the clock: the time left of a start, and requests in flight of a drain.
const REFRESH: Duration = Duration::from_millis(500);

/// Reads the phases of every engine of the plan, and of engines that are added.
pub(super) async fn follow_all(
    mut plans: watch::Receiver<Arc<Plan>>,
    sender: mpsc::Sender<(EngineId, Phase)>,
    view: watch::Receiver<Arc<FleetView>>,
) {
    let (mut followed, mut readers) = (HashSet::new(), JoinSet::new());
    loop {
        let plan = plans.borrow_and_update().clone();
        for engine in &plan.engines {
            if followed.insert(engine.id.clone()) {
                let log = plan.run_dir.join(&engine.log_file);
                readers.spawn(follow_starts(
                    log,
                    plan.engine,
                    engine.id.clone(),
                    sender.clone(),
                    view.clone(),
                ));
            }
        }
        if plans.changed().await.is_err() {
            // No more engines are added; the readers end with the fleet's view.
            while readers.join_next().await.is_some() {}
            return;
        }
    }
}

/// Reads the phases of every start of an engine from its log. Each start appends to the log of the last one.
pub(super) async fn follow_starts(
    log: PathBuf,
    kind: EngineKind,
    id: EngineId,
    sender: mpsc::Sender<(EngineId, Phase)>,
    mut view: watch::Receiver<Arc<FleetView>>,
) {
    let (mut incarnation, mut offset) = (Incarnation::FIRST, 0);
    loop {
        let start = async {
            if let Err(error) = logs::watch_phases(log.clone(), offset, kind, id.clone(), sender.clone()).await {
                tracing::debug!(engine = %id, %error, "phases cannot be read");
            }
            std::future::pending::<()>().await;
        };
        let is_next = |view: &Arc<FleetView>| view.engine(&id).is_some_and(|engine| engine.incarnation != incarnation);
        let next = tokio::select! {
            () = start => return,
            next = view.wait_for(is_next) => next.ok().and_then(|view| view.engine(&id).map(|engine| engine.incarnation)),
        };
        let Some(next) = next else { return };
        incarnation = next;
        offset = fs_err::metadata(&log).map_or(0, |file| file.len());
    }
}

/// The time of day, with which each line about a running fleet begins.
fn clock() -> String {
    jiff::Zoned::now().strftime("%H:%M:%S").to_string()
}

/// The part of an engine's view that is compared with the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct LastSeen {
    incarnation: Incarnation,
    state: EngineState,
    /// Whether the time of its restart is known.
    will_start: bool,
}

impl LastSeen {
    fn of(engine: &EngineView) -> Self {
        Self {
            incarnation: engine.incarnation,
            state: engine.state,
            will_start: engine.restart_at.is_some(),
        }
    }

    /// Whether `now` is the first view of an engine that is stopped and restarted for its failed hand-offs. The view in
    /// which it drains can have been missed: a later view replaces an earlier one.
    fn begins_restart(self, now: &EngineView) -> bool {
        let is_stopping = matches!(
            now.state,
            EngineState::Draining | EngineState::Stopping | EngineState::Stopped
        );
        now.incarnation == self.incarnation && now.restart_at.is_some() && is_stopping && !self.will_start
    }

    /// Whether the engine failed without a view that showed it.
    fn missed_failure(self, now: &EngineView) -> bool {
        let was_told = self.will_start || matches!(self.state, EngineState::Failed | EngineState::Stopped);
        now.incarnation != self.incarnation && now.reason.is_some() && !was_told
    }
}

/// Prints what changes.
#[derive(Debug)]
pub(super) struct Reporter {
    printer: Printer,
    /// The progress bars of the start, while it lasts.
    progress: Option<FleetProgress>,
    /// Fires once the bars were drawn for the last time.
    settled: Option<oneshot::Sender<()>>,
    /// The progress line of the stop, while it lasts.
    stopping: Option<StopProgress>,
    stage: FleetStage,
    /// The last view of each engine.
    states: HashMap<EngineId, LastSeen>,
    seen: StartProgress,
    published: watch::Sender<Arc<StartProgress>>,
    /// The key of each engine's start in the history.
    keys: HashMap<EngineId, String>,
    /// The last good starts.
    past: HashMap<String, Arc<PastStart>>,
}

impl Reporter {
    pub(super) fn new(
        printer: Printer,
        plan: &Plan,
        settled: oneshot::Sender<()>,
        published: watch::Sender<Arc<StartProgress>>,
    ) -> Self {
        let engines: Vec<_> = plan
            .engines
            .iter()
            .map(|engine| (engine.id.clone(), engine.role, engine.endpoint.port))
            .collect();
        Self {
            printer,
            progress: Some(FleetProgress::new(printer, &engines)),
            settled: Some(settled),
            stopping: None,
            stage: FleetStage::Starting,
            states: HashMap::new(),
            seen: StartProgress::default(),
            published,
            keys: plan
                .engines
                .iter()
                .map(|engine| (engine.id.clone(), plan::start_key(plan, engine)))
                .collect(),
            past: start_history::recall(),
        }
    }

    /// Reports until `stop` is cancelled, and then the last view.
    pub(super) async fn run(
        mut self,
        mut view: watch::Receiver<Arc<FleetView>>,
        mut phases: mpsc::Receiver<(EngineId, Phase)>,
        mut notes: mpsc::Receiver<String>,
        stop: CancellationToken,
    ) {
        let mut refresh = interval(REFRESH);
        refresh.set_missed_tick_behavior(MissedTickBehavior::Skip);
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
                _ = refresh.tick(), if self.stopping.is_some() || self.progress.is_some() => {
                    let current = view.borrow().clone();
                    self.show_stop(&current);
                    self.show_starts();
                }
                Some(note) = notes.recv() => self.tell(&note),
                Some((engine, phase)) = phases.recv() => {
                    if let Some(EngineStart { began, start, .. }) = self.seen.starts.get_mut(&engine) {
                        start.reach(phase, began.elapsed());
                        self.publish();
                        self.show_starts();
                    }
                }
            }
        }
        let last = view.borrow().clone();
        self.view_changed(&last);
        if let Some(stopping) = self.stopping.take() {
            stopping.clear();
        }
    }

    /// Prints a line: above the progress bars of a start, else with the time, because it can be read much later.
    fn tell(&self, text: &str) {
        match &self.progress {
            Some(progress) => progress.suspend(|| self.printer.status(text)),
            None => self.printer.status(format!("{}  {text}", clock())),
        }
    }

    /// The same for a warning.
    fn warn(&self, text: &str) {
        match &self.progress {
            Some(progress) => progress.suspend(|| self.printer.error(text)),
            None => self.printer.error(format!("{}  {text}", clock())),
        }
    }

    fn view_changed(&mut self, view: &FleetView) {
        for engine in &view.engines {
            let now = LastSeen::of(engine);
            let before = self.states.insert(engine.id.clone(), now);
            if before == Some(now) {
                continue;
            }
            tracing::info!(
                engine = %engine.id,
                incarnation = %engine.incarnation,
                state = %engine.state,
                reason = engine.reason,
                "engine"
            );
            self.follow_start(engine);
            if let Some(progress) = &mut self.progress {
                progress.state(&engine.id, engine.state);
                continue;
            }
            if before.is_some_and(|before| before.missed_failure(engine)) {
                self.tell_restart(engine, Instant::now());
            }
            if before.is_some_and(|before| before.begins_restart(engine)) {
                let reason = engine.reason.as_deref().unwrap_or("its hand-offs fail");
                self.warn(&format!("{} is drained and restarted: {reason}", engine.id));
                continue;
            }
            self.tell_change(engine, view.stage);
        }
        if view.stage != self.stage {
            self.stage = view.stage;
            tracing::info!(stage = %view.stage, "fleet");
            self.stage_changed(view);
        }
    }

    /// Updates the start of an engine whose state has changed.
    fn follow_start(&mut self, engine: &EngineView) {
        match engine.state {
            EngineState::Starting => {
                let last = self.keys.get(&engine.id).and_then(|key| self.past.get(key));
                let start = EngineStart::begin(last.cloned());
                self.seen.starts.insert(engine.id.clone(), start);
                self.publish();
            }
            // A view can have been missed.
            EngineState::Healthy | EngineState::Ready => {
                if let Some(start) = self.seen.starts.get_mut(&engine.id) {
                    start.took.get_or_insert(start.began.elapsed());
                }
            }
            _ => {}
        }
    }

    /// Draws the progress of each start.
    fn show_starts(&mut self) {
        let Some(progress) = &mut self.progress else { return };
        for (engine, start) in &self.seen.starts {
            let Estimate { percent, left } = start.estimate();
            progress.phase(engine, start.phase(), percent, left);
        }
    }

    /// Prints the duration of each engine's start, and saves it for the next run.
    fn conclude_starts(&self, view: &FleetView) {
        let took = view.engines.iter().filter_map(|engine| {
            let start = self.seen.starts.get(&engine.id)?;
            Some((engine.id.clone(), start.took?, start))
        });
        let (mut said, mut good) = (Vec::new(), Vec::new());
        for (id, took, start) in took {
            said.push(format!("{id} {}", time_span(took)));
            good.extend(self.keys.get(&id).map(|key| (key.clone(), start.start.finish(took))));
        }
        if !said.is_empty() {
            self.printer.status(format!("started: {}", said.join(", ")));
        }
        start_history::remember(good);
    }

    /// Prints the changes of single engines while the others serve, and every failure.
    fn tell_change(&self, engine: &EngineView, stage: FleetStage) {
        let (id, reason) = (&engine.id, engine.reason.as_deref().unwrap_or("it ended"));
        let serving = stage == FleetStage::Ready;
        let again = if engine.incarnation == Incarnation::FIRST {
            ""
        } else {
            " again"
        };
        match engine.state {
            EngineState::Failed => self.warn(&format!("{id} failed: {reason}")),
            EngineState::Backoff => {
                // Without a restart time the diagnosis still runs, and its cause belongs into the line.
                if let Some(at) = engine.restart_at {
                    self.tell_restart(engine, at);
                }
            }
            EngineState::Draining if serving => self.tell(&format!("{id} takes no more requests")),
            EngineState::Stopped if serving => self.tell(&format!("{id} is stopped")),
            EngineState::Starting => self.tell(&format!("{id} starts{again}")),
            EngineState::Ready => self.tell(&format!("{id} serves{again}")),
            _ => {}
        }
    }

    fn tell_restart(&self, engine: &EngineView, at: Instant) {
        let (id, reason) = (&engine.id, engine.reason.as_deref().unwrap_or("it ended"));
        let wait = time_span(at.saturating_duration_since(Instant::now()));
        self.warn(&format!("{id} failed: {reason}; it starts again in {wait}"));
    }

    fn stage_changed(&mut self, view: &FleetView) {
        match view.stage {
            FleetStage::Starting => {}
            FleetStage::Verifying => {
                self.tell("verifying: one hand-off through every pair of engines");
            }
            FleetStage::Ready => {
                self.seen.ready_since = Some(jiff::Timestamp::now().to_string());
                self.publish();
                if let Some(progress) = self.progress.take() {
                    progress.finish();
                    self.conclude_starts(view);
                }
                self.settle();
            }
            FleetStage::Leaving | FleetStage::Draining | FleetStage::Stopping => {
                if let Some(progress) = self.progress.take() {
                    progress.clear();
                }
                self.settle();
                let printer = self.printer;
                self.stopping
                    .get_or_insert_with(|| StopProgress::new(printer, "press Ctrl+C again to force"));
                self.show_stop(view);
            }
            FleetStage::Stopped => {}
        }
    }

    fn publish(&self) {
        self.published.send_replace(Arc::new(self.seen.clone()));
    }

    /// Draws what the stop waits for: requests, then engines.
    fn show_stop(&mut self, view: &FleetView) {
        let Some(stopping) = &mut self.stopping else { return };
        if matches!(view.stage, FleetStage::Leaving | FleetStage::Draining) {
            let in_flight = view.engines.iter().filter(|engine| engine.role == Role::Decode);
            stopping.draining(in_flight.map(|engine| engine.load.in_flight()).sum(), None);
        } else {
            let left = view.engines.iter().filter(|engine| engine.state.is_alive());
            stopping.stopping(&left.map(|engine| engine.id.clone()).collect::<Vec<_>>());
        }
    }

    /// Signals that the bars were drawn for the last time.
    fn settle(&mut self) {
        if let Some(settled) = self.settled.take() {
            // No receiver waits when the run is ending.
            let _ = settled.send(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_for_failed_hand_offs_is_told_once_even_if_the_drain_is_missed() {
        let serving = EngineView {
            state: EngineState::Ready,
            ..EngineView::fixture(Role::Prefill, 0)
        };
        let at = |state| EngineView {
            state,
            restart_at: Some(Instant::now()),
            reason: Some("its hand-offs with decoder1 fail".to_owned()),
            ..serving.clone()
        };
        let (draining, stopping) = (at(EngineState::Draining), at(EngineState::Stopping));
        assert!(LastSeen::of(&serving).begins_restart(&draining));
        assert!(LastSeen::of(&serving).begins_restart(&stopping), "the drain was missed");
        assert!(
            !LastSeen::of(&draining).begins_restart(&stopping),
            "it was told already"
        );
        let drained_by_user = EngineView {
            restart_at: None,
            ..draining
        };
        assert!(!LastSeen::of(&serving).begins_restart(&drained_by_user));
    }
}
