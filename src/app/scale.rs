//! Another number of engines of a role while the fleet serves: stopped ones come back first, then new ones join; those
//! with the highest numbers leave first.

use std::fmt;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};

use crate::control::api::{ScaleAnswer, ScaleRequest};
use crate::control::rundir::{RunDir, RunInfo};
use crate::control::server::Scale;
use crate::fleet::{EngineId, EngineState, FleetView, Incarnation, Role};
use crate::plan::{EngineSpec, Growth, Plan, PlanError};
use crate::report::one_line;
use crate::supervisor::{Request, Then};

/// Plans so many engines more of a role.
pub type Grow = Box<dyn Fn(&Plan, Role, usize) -> Result<Growth, PlanError> + Send + Sync>;

/// What it takes to come from the engines that are there to the number that is wanted.
#[derive(Debug, Default, PartialEq, Eq)]
struct Steps {
    /// Stopped engines that start again, the lowest number first.
    restart: Vec<EngineId>,
    /// New engines.
    join: usize,
    /// Engines that are drained and stopped, the highest number first.
    stop: Vec<EngineId>,
}

impl fmt::Display for Steps {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |engines: &[EngineId]| engines.iter().map(EngineId::as_str).collect::<Vec<_>>().join(", ");
        let mut parts = Vec::new();
        if !self.restart.is_empty() {
            parts.push(format!("{} start again", names(&self.restart)));
        }
        if self.join > 0 {
            parts.push(format!("{} new join", self.join));
        }
        if !self.stop.is_empty() {
            parts.push(format!("{} stop", names(&self.stop)));
        }
        formatter.write_str(if parts.is_empty() { "nothing changes" } else { "" })?;
        formatter.write_str(&parts.join("; "))
    }
}

/// PURE: decides who comes and goes.
fn steps(view: &FleetView, role: Role, count: usize) -> Steps {
    let of_role = view.engines.iter().filter(|engine| engine.role == role);
    let (out, active): (Vec<_>, Vec<_>) =
        of_role.partition(|engine| matches!(engine.state, EngineState::Stopped | EngineState::Failed));
    let missing = count.saturating_sub(active.len());
    let restart: Vec<EngineId> = out.iter().take(missing).map(|engine| engine.id.clone()).collect();
    let surplus = active.len().saturating_sub(count);
    Steps {
        join: missing - restart.len(),
        restart,
        stop: active
            .iter()
            .rev()
            .take(surplus)
            .map(|engine| engine.id.clone())
            .collect(),
    }
}

/// Carries out what is asked for, one request after the other. The only one that changes a running plan.
pub(super) struct Scaler {
    pub(super) grow: Grow,
    pub(super) plan: watch::Sender<Arc<Plan>>,
    pub(super) view: watch::Receiver<Arc<FleetView>>,
    pub(super) requests: mpsc::Sender<Request>,
    pub(super) run_dir: Arc<RunDir>,
    pub(super) info: RunInfo,
}

impl Scaler {
    pub(super) async fn run(self, mut asked: mpsc::Receiver<Scale>) {
        while let Some(Scale { request, reply }) = asked.recv().await {
            let answer = self.scale(request).await;
            // Whoever asked may have gone.
            let _ = reply.send(answer);
        }
    }

    async fn scale(&self, ScaleRequest { role, count }: ScaleRequest) -> Result<ScaleAnswer, String> {
        let steps = steps(&self.view.borrow().clone(), role, usize::from(count));
        tracing::info!(%role, count, "asked to scale: {steps}");
        let mut starting = Vec::new();
        for engine in steps.restart {
            let incarnation = self.ask(&engine, Then::Restart).await?;
            starting.push((engine, incarnation.0));
        }
        if steps.join > 0 {
            starting.extend(self.join(role, steps.join).await?);
        }
        for engine in &steps.stop {
            self.ask(engine, Then::Stay).await?;
        }
        Ok(ScaleAnswer {
            starting,
            stopping: steps.stop,
        })
    }

    async fn ask(&self, engine: &EngineId, then: Then) -> Result<Incarnation, String> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Engine {
            engine: engine.clone(),
            then,
            force: false,
            reply,
        };
        self.send(request, answer)
            .await?
            .map_err(|refusal| format!("{engine} cannot change: {refusal}"))
    }

    async fn join(&self, role: Role, count: usize) -> Result<Vec<(EngineId, u32)>, String> {
        let plan = Arc::clone(&self.plan.borrow());
        let growth = (self.grow)(&plan, role, count).map_err(|error| one_line(&error))?;
        let mut joined = Vec::new();
        let mut grown = Plan::clone(&plan);
        let mut result = Ok(());
        for spec in growth.engines {
            result = self.join_one(&spec).await;
            if result.is_err() {
                break;
            }
            joined.push((spec.id.clone(), Incarnation::FIRST.0));
            grown.engines.push(spec);
        }
        // Once for all of them: the whole plan is written each time.
        if !joined.is_empty() {
            grown.engines.sort_by_key(|engine| engine.role);
            self.publish(&grown);
        }
        result.map(|()| joined)
    }

    async fn join_one(&self, spec: &EngineSpec) -> Result<(), String> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Join {
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

    /// Lets the status, later commands and the run's folder know the new engine.
    fn publish(&self, plan: &Plan) {
        let info = RunInfo {
            engines: super::run_engines(plan),
            ..self.info.clone()
        };
        if let Err(error) = self.run_dir.publish(&info) {
            tracing::warn!(error = one_line(&error), "later commands do not know of the new engine");
        }
        if let Err(error) = super::write_plan(plan) {
            tracing::warn!(error = one_line(&error), "plan.json does not know of the new engine");
        }
        self.plan.send_replace(Arc::new(plan.clone()));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fleet::{Endpoint, EngineView, FleetStage, Load};

    fn view(states: &[EngineState]) -> FleetView {
        let engines = states.iter().enumerate().map(|(index, state)| EngineView {
            id: EngineId::new(Role::Decode, index),
            role: Role::Decode,
            incarnation: Incarnation::FIRST,
            state: *state,
            endpoint: Endpoint {
                host: "127.0.0.1".into(),
                port: 1,
                tensor_parallel: 1,
                receiver: None,
            },
            pid: None,
            reason: None,
            restart_at: None,
            load: Arc::new(Load::default()),
        });
        FleetView {
            generation: 1,
            stage: FleetStage::Ready,
            engines: engines.map(Arc::new).collect(),
        }
    }

    #[test]
    fn stopped_engines_come_back_before_new_ones_join() {
        let view = view(&[EngineState::Ready, EngineState::Stopped, EngineState::Ready]);
        let steps = steps(&view, Role::Decode, 5);
        assert_eq!((steps.restart, steps.join), (vec![EngineId::new(Role::Decode, 1)], 2));
        assert_eq!(steps.stop, []);
    }

    #[test]
    fn the_highest_numbers_leave_first() {
        let view = view(&[EngineState::Ready, EngineState::Backoff, EngineState::Ready]);
        let ids = [2, 1].map(|index| EngineId::new(Role::Decode, index));
        assert_eq!(steps(&view, Role::Decode, 1).stop, ids);
    }

    proptest! {
        #[test]
        fn the_steps_lead_to_the_number_that_was_asked_for(serving in prop::collection::vec(any::<bool>(), 0..8), count in 1_usize..10) {
            let states: Vec<EngineState> = serving
                .iter()
                .map(|serves| if *serves { EngineState::Ready } else { EngineState::Stopped })
                .collect();
            let active = serving.iter().filter(|serves| **serves).count();
            let Steps { restart, join, stop } = steps(&view(&states), Role::Decode, count);
            prop_assert_eq!(active + restart.len() + join - stop.len(), count);
            prop_assert!(stop.is_empty() || restart.is_empty() && join == 0);
        }
    }
}
