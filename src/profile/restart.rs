//! The `[restart]` table of a profile.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// When xpyd restarts an engine that failed. It applies to engines that have been ready once; a failure before the fleet
/// is ready ends the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RestartPolicy {
    /// The failures after which xpyd restarts.
    pub policy: RestartWhen,
    /// Restarts in a row, without a stable time in between, after which xpyd gives the engine up.
    pub max_restarts: u32,
    /// The delay before the first restart. It doubles with each restart in a row, plus a random quarter at most.
    #[serde(with = "crate::span")]
    #[schemars(with = "crate::span::Text")]
    pub backoff: Duration,
    /// The longest delay, before the random quarter.
    #[serde(with = "crate::span")]
    #[schemars(with = "crate::span::Text")]
    pub max_backoff: Duration,
    /// An engine that has been ready for this long is stable, and its restarts are counted from 0 again.
    #[serde(with = "crate::span")]
    #[schemars(with = "crate::span::Text")]
    pub stable_after: Duration,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            policy: RestartWhen::OnFailure,
            max_restarts: 5,
            backoff: Duration::from_secs(1),
            max_backoff: Duration::from_mins(1),
            stable_after: Duration::from_mins(5),
        }
    }
}

/// The failures after which xpyd restarts an engine. Every exit that xpyd did not ask for is a failure, whatever the exit
/// code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestartWhen {
    /// After no failure.
    Never,
    /// After failures that do not have to come back. A wrong flag would.
    OnFailure,
    /// After every failure.
    Always,
}
