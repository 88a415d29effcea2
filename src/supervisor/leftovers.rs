//! The last check of a run: which processes and listeners still exist.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::shim::client::is_still_there;
use super::shim::protocol::LeftoverProcess;
use super::{Leftover, ports};
use crate::fleet::EngineId;
use crate::plan::{EngineSpec, PortUse};

/// How long ports can stay taken after the last process: the kernel closes sockets while it ends a process.
const PORTS_DEADLINE: Duration = Duration::from_secs(5);

/// Returns the processes that still exist and the ports that are still taken. Waits up to [`PORTS_DEADLINE`] until there are none.
pub(super) async fn find(processes: &[(Option<EngineId>, LeftoverProcess)], engines: &[EngineSpec]) -> Vec<Leftover> {
    let deadline = Instant::now() + PORTS_DEADLINE;
    loop {
        let still_there = processes
            .iter()
            .filter(|(_, process)| is_still_there(process))
            .map(|(engine, process)| Leftover::Process {
                engine: engine.clone(),
                pid: process.pid,
                name: process.name.clone(),
                state: process.state,
            });
        let held = ports::of_this_node(engines).flat_map(|engine| {
            let held = |used: &&PortUse| !ports::is_free(&engine.endpoint.host, used.port);
            engine.ports.iter().filter(held).map(|used| Leftover::Port {
                engine: engine.id.clone(),
                port: used.port,
                purpose: used.purpose.clone(),
                holder: ports::holder(used.port),
            })
        });
        let left: Vec<Leftover> = still_there.chain(held).collect();
        if left.is_empty() || Instant::now() >= deadline {
            return left;
        }
        sleep(Duration::from_millis(20)).await;
    }
}
