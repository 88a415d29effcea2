//! Why an engine failed, as far as its log tells. The supervisor reads no log: the app gives it a function that does.

use std::sync::Arc;

use crate::fleet::{Exit, Retry};
use crate::plan::EngineSpec;

/// What the log of one incarnation says about its failure. The default says nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cause {
    /// Whether starting the engine again can help.
    pub retry: Retry,
    /// What it is and the first real error, in one line; `None` if the log does not tell.
    pub found: Option<String>,
    /// How far the start had come, for people; `None` if the log does not tell.
    pub phase: Option<&'static str>,
}

/// Called before each start of an engine, because its log goes on where the last incarnation ended. Returns what tells
/// about this incarnation.
pub type Explain = Box<dyn Fn(&EngineSpec) -> ExplainIncarnation + Send>;

/// Reads the log of one incarnation, which takes a while, and says why it failed. Takes how its leader ended; `None` if it
/// still ran.
pub type ExplainIncarnation = Arc<dyn Fn(Option<Exit>) -> Cause + Send + Sync>;

/// Asks it where waiting does no harm. Says nothing if there is nobody to ask.
pub(super) async fn ask(explain: Option<ExplainIncarnation>, exit: Option<Exit>) -> Cause {
    match explain {
        Some(explain) => tokio::task::spawn_blocking(move || explain(exit))
            .await
            .unwrap_or_default(),
        None => Cause::default(),
    }
}
