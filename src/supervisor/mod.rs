//! The supervisor: starts a planned fleet, watches it, and ends it so that nothing is left.
//!
//! [`run`] is the entry. `state` decides (pure), `driver` carries out, the [`shim`] owns the processes. The supervisor is the
//! only writer of the fleet's view. It knows no route of the proxy and no flag of an engine; what it needs of them it gets
//! through [`Hooks`].

mod driver;
mod fleet_changes;
mod hang_report;
mod hooks;
mod leftovers;
mod liveness;
pub mod node;
mod outcome;
pub mod ports;
mod probe;
mod requests;
mod restart_policy;
mod run_folder;
pub mod shim;
pub mod sidecar;
mod spawn_record;
mod startup_watchdog;
mod state;

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

pub use self::driver::run;
pub use self::fleet_changes::FleetChanges;
pub use self::hooks::{CanaryResult, CanaryRound, Diagnose, FailureCause, HookFuture, Hooks};
pub use self::outcome::{EndReason, Leftover, Outcome};
pub use self::ports::{PortConflict, Reservations, reserve, reserve_running};
pub use self::requests::{Refusal, Request};
pub use self::shim::attach::AttachableRun;
pub use self::shim::protocol::{Keep, KeptState};
use crate::fleet::FleetView;
use crate::plan::{EngineSpec, RestartPolicy, RestartWhen};
use crate::signals::StopSignal;

/// The run to supervise.
#[derive(Debug)]
pub struct Settings {
    /// The engines, prefill first.
    pub engines: Vec<EngineSpec>,
    /// Their ports, held until none of their processes is left.
    pub reservations: Reservations,
    /// The run's folder, which exists. It gets logs and `<id>.spawn.json`.
    pub run_dir: PathBuf,
    /// How long requests in flight can go on after a stop was requested.
    pub drain_deadline: Duration,
    /// How long the canaries of one round can take, for each pair of engines in it.
    pub verify_deadline: Duration,
    /// Which engines start again, and when.
    pub restart: RestartPolicy,
    /// Whether and how long the engines outlive this process if it disappears.
    pub keep: Keep,
    /// The run to attach to, instead of starting a shim and engines.
    pub attach: Option<AttachableRun>,
    /// The socket on which clients connect, which the shim holds while no xpyd runs.
    pub listener: Option<OwnedFd>,
    /// The run's name, for spawn records.
    pub run_name: String,
    /// The `xpyd` program, which also runs as the shim: `std::env::current_exe()`.
    pub program: PathBuf,
}

/// How the supervisor is connected to the rest of xpyd.
pub struct Wiring<H> {
    /// Signals that ask for a stop.
    pub signals: mpsc::Receiver<StopSignal>,
    /// Requests, mostly from the control socket.
    pub requests: mpsc::Receiver<Request>,
    /// Where the supervisor publishes the fleet's view; made with [`initial_view`].
    pub view: watch::Sender<Arc<FleetView>>,
    /// Calls into the rest of xpyd.
    pub hooks: H,
}

impl<H> fmt::Debug for Wiring<H> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Wiring").finish_non_exhaustive()
    }
}

/// The view before the first event, for the `watch` channel.
pub fn initial_view(engines: &[EngineSpec]) -> FleetView {
    let never = RestartPolicy {
        policy: RestartWhen::Never,
        max_restarts: 0,
        backoff: Duration::ZERO,
        max_backoff: Duration::ZERO,
        stable_after: Duration::ZERO,
    };
    let limits = state::Limits {
        drain: Duration::ZERO,
        verify: Duration::ZERO,
        restart: never,
    };
    state::FleetMachine::new(engines, limits, None).view(0)
}
