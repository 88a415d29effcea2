//! The `[deadlines]` table of a profile, and the time limits that follow from it.

use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

/// The time limits of a run.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Deadlines {
    /// Time for an engine to start: from its spawn until its `/health` answers 200.
    #[serde(with = "crate::span")]
    #[schemars(with = "crate::span::Text")]
    pub ready: Duration,
    /// A start that writes no log, uses no CPU and reads nothing for this long hangs.
    #[serde(with = "crate::span")]
    #[schemars(with = "crate::span::Text")]
    pub start_stall: Duration,
    /// Time for requests in flight after the first Ctrl+C, and when an engine is drained.
    #[serde(with = "crate::span")]
    #[schemars(with = "crate::span::Text")]
    pub drain: Duration,
    /// Time from SIGTERM to SIGKILL of an engine that has served.
    #[serde(with = "crate::span")]
    #[schemars(with = "crate::span::Text")]
    pub stop: Duration,
    /// Time for one prefill leg.
    #[serde(with = "crate::span")]
    #[schemars(with = "crate::span::Text")]
    pub prefill: Duration,
    /// Time from the answer of the prefill engine until the KV has arrived.
    #[serde(with = "crate::span")]
    #[schemars(with = "crate::span::Text")]
    pub handoff: Duration,
    /// Time between two events of a stream, and for a whole answer that is not streamed.
    #[serde(with = "crate::span")]
    #[schemars(with = "crate::span::Text")]
    pub decode_idle: Duration,
    /// An engine with running requests that generates no token for this long hangs.
    #[serde(with = "crate::span")]
    #[schemars(with = "crate::span::Text")]
    pub stall: Duration,
    /// How long engines whose xpyd was killed wait for the next one; "0s" stops them at once. Default: 15 minutes for
    /// detached runs, else 0.
    #[serde(deserialize_with = "crate::span::deserialize_some")]
    #[schemars(with = "Option<crate::span::Text>")]
    pub keep: Option<Duration>,
}

impl Default for Deadlines {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            ready: seconds(1800),
            // One tick of CPU time is progress, so this is far more than any working start needs.
            start_stall: seconds(300),
            drain: seconds(30),
            // vLLM kills its own processes after 5 s, then its API server closes; a loaded machine takes its time.
            stop: seconds(25),
            prefill: seconds(300),
            handoff: seconds(90),
            // It also limits a whole answer that is not streamed.
            decode_idle: seconds(600),
            // Far more than the longest prefill. vLLM counts a prompt's tokens only at the end of its prefill.
            stall: seconds(120),
            keep: None,
        }
    }
}

/// How long a hung engine can live after `stall`: time for one more query of its metrics, and for the hang report.
const TO_END_A_HANG: Duration = Duration::from_mins(1);

impl Deadlines {
    /// The shortest safe lease on KV. It is longer than both legs of a request, even if either engine hangs meanwhile, so
    /// no decode engine reads blocks that belong to another request.
    ///
    /// In vLLM 0.32 the decode engine sends a heartbeat every sixth of the lease, which extends it by two thirds of its
    /// length. A decode engine that hangs at the worst moment leaves half of the lease, which is longer than xpyd needs to
    /// kill it.
    pub fn kv_lease(&self) -> Duration {
        let both_legs = self.prefill + self.decode_idle + TO_END_A_HANG;
        let lease = both_legs.max((self.stall + TO_END_A_HANG) * 2);
        // vLLM reads whole seconds.
        Duration::from_secs(lease.as_secs() + u64::from(lease.subsec_nanos() > 0))
    }

    /// How long LMCache's scheduler waits for its worker. xpyd kills a worker that hangs for longer, so a busy machine
    /// alone never makes the engine compute a prompt again.
    pub fn lookup(&self) -> Duration {
        self.stall + TO_END_A_HANG
    }
}
