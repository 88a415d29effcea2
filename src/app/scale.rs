//! `scale`: changes the number of engines of a role while the fleet serves. Stopped engines restart before new ones are added;
//! the highest numbers are drained first.

use std::fmt;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};

use crate::control::api::{ScaleRequest, ScaleResponse};
use crate::control::rundir::{RunDir, RunInfo};
use crate::control::server::ScaleCommand;
use crate::fleet::{EngineId, EngineState, EngineVerb, FleetView, Incarnation, Role};
use crate::plan::{EngineSpec, Growth, Plan, PlanError};
use crate::report::one_line;
use crate::supervisor::Request;

/// Plans this many more engines of a role.
pub type Grow = Box<dyn Fn(&Plan, Role, usize) -> Result<Growth, PlanError> + Send + Sync>;

/// The steps from the current engines to the requested number.
#[derive(Debug, Default, PartialEq, Eq)]
struct ScaleSteps {
    /// Stopped engines to restart, the lowest number first.
    restart: Vec<EngineId>,
    /// The number of new engines.
    add: usize,
    /// Engines to drain, the highest number first.
    drain: Vec<EngineId>,
}

impl fmt::Display for ScaleSteps {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |engines: &[EngineId]| engines.iter().map(EngineId::as_str).collect::<Vec<_>>().join(", ");
        let mut parts = Vec::new();
        if !self.restart.is_empty() {
            parts.push(format!("{} restart", names(&self.restart)));
        }
        if self.add > 0 {
            parts.push(format!("{} are added", self.add));
        }
        if !self.drain.is_empty() {
            parts.push(format!("{} are drained", names(&self.drain)));
        }
        formatter.write_str(if parts.is_empty() { "nothing changes" } else { "" })?;
        formatter.write_str(&parts.join("; "))
    }
}

/// Decides which engines start and stop. PURE.
fn steps(view: &FleetView, role: Role, count: usize) -> ScaleSteps {
    let of_role = view.engines.iter().filter(|engine| engine.role == role);
    let (out, active): (Vec<_>, Vec<_>) =
        of_role.partition(|engine| matches!(engine.state, EngineState::Stopped | EngineState::Failed));
    let missing = count.saturating_sub(active.len());
    let restart: Vec<EngineId> = out.iter().take(missing).map(|engine| engine.id.clone()).collect();
    let surplus = active.len().saturating_sub(count);
    ScaleSteps {
        add: missing - restart.len(),
        restart,
        drain: active
            .iter()
            .rev()
            .take(surplus)
            .map(|engine| engine.id.clone())
            .collect(),
    }
}

/// Carries out scale requests, one after the other. Nothing else changes the plan of a running fleet.
pub(super) struct Scaler {
    pub(super) grow: Grow,
    pub(super) plan: watch::Sender<Arc<Plan>>,
    pub(super) view: watch::Receiver<Arc<FleetView>>,
    pub(super) requests: mpsc::Sender<Request>,
    pub(super) run_dir: Arc<RunDir>,
    pub(super) info: RunInfo,
}

impl Scaler {
    pub(super) async fn run(self, mut asked: mpsc::Receiver<ScaleCommand>) {
        while let Some(ScaleCommand { request, reply }) = asked.recv().await {
            let answer = self.scale(request).await;
            // The receiver can be gone.
            let _ = reply.send(answer);
        }
    }

    async fn scale(&self, ScaleRequest { role, count }: ScaleRequest) -> Result<ScaleResponse, String> {
        let steps = steps(&self.view.borrow().clone(), role, usize::from(count));
        tracing::info!(%role, count, "request to scale: {steps}");
        let mut starting = Vec::new();
        for engine in steps.restart {
            let incarnation = self.ask(&engine, EngineVerb::Restart).await?;
            starting.push((engine, incarnation.0));
        }
        if steps.add > 0 {
            starting.extend(self.add(role, steps.add).await?);
        }
        for engine in &steps.drain {
            self.ask(engine, EngineVerb::Drain).await?;
        }
        Ok(ScaleResponse {
            starting,
            stopping: steps.drain,
        })
    }

    async fn ask(&self, engine: &EngineId, verb: EngineVerb) -> Result<Incarnation, String> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Engine {
            engine: engine.clone(),
            verb,
            force: false,
            reply,
        };
        self.send(request, answer)
            .await?
            .map_err(|refusal| format!("cannot {verb} {engine}: {refusal}"))
    }

    async fn add(&self, role: Role, count: usize) -> Result<Vec<(EngineId, u32)>, String> {
        let plan = Arc::clone(&self.plan.borrow());
        let growth = (self.grow)(&plan, role, count).map_err(|error| one_line(&error))?;
        let mut added = Vec::new();
        let mut grown = Plan::clone(&plan);
        let mut result = Ok(());
        for spec in growth.engines {
            result = self.add_one(&spec).await;
            if result.is_err() {
                break;
            }
            added.push((spec.id.clone(), Incarnation::FIRST.0));
            grown.engines.push(spec);
        }
        // Once for all of them, because each time the whole plan is written.
        if !added.is_empty() {
            grown.engines.sort_by_key(|engine| engine.role);
            self.publish(&grown);
        }
        result.map(|()| added)
    }

    async fn add_one(&self, spec: &EngineSpec) -> Result<(), String> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Add {
            spec: Box::new(spec.clone()),
            reply,
        };
        self.send(request, answer).await?
    }

    async fn send<T>(&self, request: Request, answer: oneshot::Receiver<T>) -> Result<T, String> {
        let is_ending = || "the run is ending".to_owned();
        self.requests.send(request).await.map_err(|_| is_ending())?;
        answer.await.map_err(|_| is_ending())
    }

    /// Publishes the new plan to the status, `run.json` and `plan.json`.
    fn publish(&self, plan: &Plan) {
        let info = RunInfo {
            engines: super::run_engines(plan),
            ..self.info.clone()
        };
        if let Err(error) = self.run_dir.publish(&info) {
            tracing::warn!(
                error = one_line(&error),
                "cannot update `run.json`: later commands do not know the new engine"
            );
        }
        if let Err(error) = super::write_plan(plan) {
            tracing::warn!(
                error = one_line(&error),
                "cannot update `plan.json`: it lacks the new engine"
            );
        }
        self.plan.send_replace(Arc::new(plan.clone()));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fleet::{EngineView, FleetStage};

    fn view(states: &[EngineState]) -> FleetView {
        let engines = states.iter().enumerate().map(|(index, state)| EngineView {
            state: *state,
            ..EngineView::fixture(Role::Decode, index)
        });
        FleetView {
            generation: 1,
            stage: FleetStage::Ready,
            engines: engines.map(Arc::new).collect(),
        }
    }

    #[test]
    fn stopped_engines_restart_before_new_ones_are_added() {
        let view = view(&[EngineState::Ready, EngineState::Stopped, EngineState::Ready]);
        let steps = steps(&view, Role::Decode, 5);
        assert_eq!((steps.restart, steps.add), (vec![EngineId::new(Role::Decode, 1)], 2));
        assert_eq!(steps.drain, []);
    }

    #[test]
    fn the_highest_numbers_are_drained_first() {
        let view = view(&[EngineState::Ready, EngineState::Backoff, EngineState::Ready]);
        let ids = [2, 1].map(|index| EngineId::new(Role::Decode, index));
        assert_eq!(steps(&view, Role::Decode, 1).drain, ids);
    }

    proptest! {
        #[test]
        fn the_steps_lead_to_the_requested_number(serving in prop::collection::vec(any::<bool>(), 0..8), count in 1_usize..10) {
            let states: Vec<EngineState> = serving
                .iter()
                .map(|serves| if *serves { EngineState::Ready } else { EngineState::Stopped })
                .collect();
            let active = serving.iter().filter(|serves| **serves).count();
            let ScaleSteps { restart, add, drain } = steps(&view(&states), Role::Decode, count);
            prop_assert_eq!(active + restart.len() + add - drain.len(), count);
            prop_assert!(drain.is_empty() || restart.is_empty() && add == 0);
        }
    }
}
