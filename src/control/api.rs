//! The wire types of the control socket, apart from the types that the program works with, so that either may change
//! without the other.
//!
//! | Request | Body | Answer |
//! |---|---|---|
//! | `GET /v1/status` | | 200 [`Status`] |
//! | `POST /v1/down` | [`DownRequest`] | 202 [`DownAnswer`], at once; the run is gone when its lock is free |
//! | `POST /v1/engines/{id}/restart` | [`EngineRequest`] | 202 [`EngineAnswer`], at once; the status shows the rest |
//! | `POST /v1/engines/{id}/drain` | [`EngineRequest`] | the same |
//! | `POST /v1/scale` | [`ScaleRequest`] | 202 [`ScaleAnswer`], at once; the status shows the rest |
//!
//! Every other answer carries an [`ErrorBody`]. Readers ignore fields that they do not know, so fields may be added.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::rundir::RunInfo;
use crate::fleet::{EngineId, EngineState, EngineView, FleetStage, OutlivedKv, Role, TimeLeft};

/// Everything a run tells about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Who runs, and where its files are.
    pub run: RunInfo,
    /// Where the whole fleet is.
    pub stage: FleetStage,
    /// When the fleet became ready, RFC 3339; `None` before that.
    pub ready_since: Option<String>,
    /// Requests in the proxy now.
    pub in_flight: usize,
    /// How long the drain may still take, in seconds; `None` when there is none.
    pub drain_seconds_left: Option<u64>,
    /// Prefill engines first, each role in number order.
    pub engines: Vec<EngineStatus>,
}

impl Status {
    /// Roles of which a ready fleet has no ready engine, so that requests are answered 503.
    pub fn degraded(&self) -> Vec<Role> {
        let is_served = |role: Role| {
            let mut engines = self.engines.iter();
            engines.any(|engine| engine.role == role && engine.state == EngineState::Ready)
        };
        let is_ready = self.stage == FleetStage::Ready;
        let roles = [Role::Prefill, Role::Decode].into_iter();
        roles.filter(|role| is_ready && !is_served(*role)).collect()
    }

    /// The status as programs get it: with what follows from it.
    pub fn to_json(&self) -> serde_json::Value {
        let mut value = serde_json::to_value(self).expect("a status can be put into JSON");
        value["degraded"] = serde_json::json!(self.degraded());
        value
    }

    /// The engines of which a process may still be there.
    pub fn engines_left(&self) -> Vec<EngineId> {
        self.engines
            .iter()
            .filter(|engine| engine.state.is_alive())
            .map(|engine| engine.id.clone())
            .collect()
    }

    /// The same without what only moves with the clock, to tell what has changed.
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
    /// The same of an engine whose start is so far.
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

    /// How long its start still takes.
    pub fn time_left(&self) -> TimeLeft {
        match self.eta_seconds {
            Some(seconds) => TimeLeft::About(Duration::from_secs(seconds)),
            None if self.slower_than_last => TimeLeft::Longer,
            None => TimeLeft::Unknown,
        }
    }
}

/// What a status tells about one engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineStatus {
    /// Its name.
    pub id: EngineId,
    /// What it does.
    pub role: Role,
    /// Where it is in its life.
    pub state: EngineState,
    /// The phase of its start, from its log: `loading weights`.
    pub phase: Option<String>,
    /// How far its start is, 0 to 100; 100 only once it is ready.
    pub percent: Option<u8>,
    /// About how many seconds its start still takes, judged by the last good one; `None` where that says nothing.
    #[serde(default)]
    pub eta_seconds: Option<u64>,
    /// Whether its start takes longer than the last good one did.
    #[serde(default)]
    pub slower_than_last: bool,
    /// Its leader's process id.
    pub pid: Option<u32>,
    /// Port of its OpenAI API.
    pub port: u16,
    /// Indices of its GPUs.
    pub gpus: Vec<u32>,
    /// Which start of it this is, from 1.
    pub incarnation: u32,
    /// Requests in flight on it.
    pub in_flight: usize,
    /// How long this incarnation has been running, in seconds.
    pub uptime_seconds: Option<u64>,
    /// Why it failed, in one line.
    pub reason: Option<String>,
    /// In how many seconds it starts again; `None` unless it waits for that.
    pub restart_in_seconds: Option<u64>,
    /// What it counts of KV that outlived its lease.
    #[serde(default)]
    pub outlived_kv: OutlivedKv,
}

impl From<&EngineView> for EngineStatus {
    /// What the fleet's view knows. Phase, GPUs, uptime, and how far a start is, are known elsewhere and start empty.
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

/// Asks a run to stop.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DownRequest {
    /// Kill now instead of draining.
    #[serde(default)]
    pub force: bool,
    /// Let xpyd end and the engines wait for the next one. Answered by 409 where that cannot be.
    #[serde(default)]
    pub keep_engines: bool,
}

/// The run stops. It does not wait for the end: whoever asked watches the run's lock.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct DownAnswer {
    /// Always true.
    pub stopping: bool,
    /// How long the engines will wait for the next xpyd, in seconds; 0 if they end with this one.
    #[serde(default)]
    pub keep_seconds: u64,
}

/// Asks for one engine to be drained and stopped, and perhaps started again.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineRequest {
    /// Even if its role then has no engine that serves.
    #[serde(default)]
    pub force: bool,
}

/// The engine is being drained.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct EngineAnswer {
    /// After a restart, the engine is of this incarnation or a later one.
    pub incarnation: u32,
}

/// Asks for another number of engines of a role.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScaleRequest {
    /// The role.
    pub role: Role,
    /// Engines of it that are to serve, at least 1.
    pub count: u16,
}

/// The engines that come or go.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ScaleAnswer {
    /// Those that start, in number order, each with the incarnation that will serve.
    pub starting: Vec<(EngineId, u32)>,
    /// Those that are drained and stopped, the highest number first.
    pub stopping: Vec<EngineId>,
}

/// Why a request was not answered.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorBody {
    /// In one line.
    pub error: String,
}
