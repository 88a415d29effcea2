//! The wire types of the control socket. They are separate from the program's own types, so that each can change without the
//! other.
//!
//! | Request | Body | Answer |
//! |---|---|---|
//! | `GET /v1/status` | | 200 [`Status`] |
//! | `POST /v1/down` | [`DownRequest`] | 202 [`DownResponse`], at once; the run is gone when its lock is free |
//! | `POST /v1/engines/{id}/restart` | [`EngineRequest`] | 202 [`EngineResponse`], at once; the status shows the rest |
//! | `POST /v1/engines/{id}/drain` | [`EngineRequest`] | the same |
//! | `POST /v1/scale` | [`ScaleRequest`] | 202 [`ScaleResponse`], at once; the status shows the rest |
//!
//! Every other response carries an [`ErrorBody`]. Readers ignore unknown fields, so fields can be added.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::rundir::RunInfo;
use crate::fleet::{EngineId, EngineState, EngineView, FleetStage, OutlivedKv, Role, TimeLeft};

/// The status of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The run's process and files.
    pub run: RunInfo,
    /// The stage of the fleet.
    pub stage: FleetStage,
    /// When the fleet became ready, RFC 3339; `None` before that.
    pub ready_since: Option<String>,
    /// Requests in flight in the proxy.
    pub in_flight: usize,
    /// Time left for the drain, in seconds; `None` without a drain.
    pub drain_seconds_left: Option<u64>,
    /// Prefill engines first, each role in number order.
    pub engines: Vec<EngineStatus>,
}

impl Status {
    /// Roles without a ready engine in a ready fleet: requests get 503.
    pub fn degraded(&self) -> Vec<Role> {
        let is_served = |role: Role| {
            let mut engines = self.engines.iter();
            engines.any(|engine| engine.role == role && engine.state == EngineState::Ready)
        };
        let is_ready = self.stage == FleetStage::Ready;
        let roles = [Role::Prefill, Role::Decode].into_iter();
        roles.filter(|role| is_ready && !is_served(*role)).collect()
    }

    /// The status as JSON, with the derived fields `degraded` and so on.
    pub fn to_json(&self) -> serde_json::Value {
        let mut value = serde_json::to_value(self).expect("a status can be put into JSON");
        value["degraded"] = serde_json::json!(self.degraded());
        value
    }

    /// The engines that can still have a process.
    pub fn engines_left(&self) -> Vec<EngineId> {
        self.engines
            .iter()
            .filter(|engine| engine.state.is_alive())
            .map(|engine| engine.id.clone())
            .collect()
    }

    /// The status without fields that change with the clock only, to compare two of them.
    #[must_use]
    pub fn timeless(&self) -> Self {
        let mut status = self.clone();
        status.drain_seconds_left = None;
        for engine in &mut status.engines {
            engine.uptime_seconds = None;
            engine.eta_seconds = None;
            engine.restart_in_seconds = None;
        }
        status
    }
}

impl EngineStatus {
    /// The status of an engine whose start has this progress.
    #[must_use]
    pub fn starting(self, percent: u8, left: TimeLeft) -> Self {
        let eta_seconds = match left {
            TimeLeft::About(left) => Some(left.as_secs().max(1)),
            TimeLeft::Unknown | TimeLeft::Longer => None,
        };
        Self {
            percent: Some(percent),
            eta_seconds,
            slower_than_last: left == TimeLeft::Longer,
            ..self
        }
    }

    /// The time left of its start.
    pub fn time_left(&self) -> TimeLeft {
        match self.eta_seconds {
            Some(seconds) => TimeLeft::About(Duration::from_secs(seconds)),
            None if self.slower_than_last => TimeLeft::Longer,
            None => TimeLeft::Unknown,
        }
    }
}

/// The status of one engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineStatus {
    /// Its name.
    pub id: EngineId,
    /// Its role.
    pub role: Role,
    /// Its state.
    pub state: EngineState,
    /// The phase of its start, from its log, such as `loading weights`.
    pub phase: Option<String>,
    /// Progress of its start, 0 to 100; 100 only once it is ready.
    pub percent: Option<u8>,
    /// Estimated time left of its start in seconds, from the last successful start; `None` without an estimate.
    #[serde(default)]
    pub eta_seconds: Option<u64>,
    /// Whether its start takes longer than the last successful one.
    #[serde(default)]
    pub slower_than_last: bool,
    /// Its leader's process id.
    pub pid: Option<u32>,
    /// Port of its OpenAI API.
    pub port: u16,
    /// The address on which it listens; empty if xpyd is older.
    #[serde(default)]
    pub host: String,
    /// The node on which it runs, if it is not that of xpyd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Indices of its GPUs.
    pub gpus: Vec<u32>,
    /// The number of this start, from 1.
    pub incarnation: u32,
    /// Requests in flight on it.
    pub in_flight: usize,
    /// Uptime of this incarnation, in seconds.
    pub uptime_seconds: Option<u64>,
    /// Why it failed, in one line.
    pub reason: Option<String>,
    /// Time until it starts again, in seconds; `None` unless it waits for a restart.
    pub restart_in_seconds: Option<u64>,
    /// Its counters of KV that outlived its lease.
    #[serde(default)]
    pub outlived_kv: OutlivedKv,
}

impl From<&EngineView> for EngineStatus {
    /// Fills the fields that the fleet's view has. Phase, GPUs, uptime and progress stay empty.
    fn from(view: &EngineView) -> Self {
        Self {
            id: view.id.clone(),
            role: view.role,
            state: view.state,
            phase: None,
            percent: match view.state {
                EngineState::Healthy => Some(99),
                EngineState::Ready => Some(100),
                _ => None,
            },
            eta_seconds: None,
            slower_than_last: false,
            pid: view.pid,
            port: view.endpoint.port,
            host: view.endpoint.host.clone(),
            node: None,
            gpus: Vec::new(),
            incarnation: view.incarnation.0,
            in_flight: view.load.in_flight(),
            uptime_seconds: None,
            reason: view.reason.clone(),
            restart_in_seconds: view
                .restart_at
                .map(|at| at.saturating_duration_since(Instant::now()).as_secs()),
            outlived_kv: view.load.outlived_kv(),
        }
    }
}

/// A request to stop the run.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DownRequest {
    /// Kill now instead of draining.
    #[serde(default)]
    pub force: bool,
    /// End xpyd and keep the engines for the next one. 409 if that is not possible.
    #[serde(default)]
    pub keep_engines: bool,
}

/// The run is stopping. The response does not wait for the end; the client watches the run's lock.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct DownResponse {
    /// Always true.
    pub stopping: bool,
    /// How long the engines wait for the next xpyd, in seconds; 0 if they end with this one.
    #[serde(default)]
    pub keep_seconds: u64,
}

/// A request to restart or drain one engine.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineRequest {
    /// Also if no other engine of its role serves.
    #[serde(default)]
    pub force: bool,
}

/// The engine is being drained.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct EngineResponse {
    /// After a restart, the engine is of this incarnation or a later one.
    pub incarnation: u32,
}

/// A request for another number of engines of a role.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScaleRequest {
    /// The role.
    pub role: Role,
    /// The number of engines of the role, at least 1.
    pub count: u16,
}

/// The engines that start and stop.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ScaleResponse {
    /// The engines that start, in number order, each with its next incarnation.
    pub starting: Vec<(EngineId, u32)>,
    /// The engines that are drained and stopped, the highest number first.
    pub stopping: Vec<EngineId>,
}

/// Why a request failed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorBody {
    /// One line.
    pub error: String,
}
