//! The state machines of the supervisor: events go in, actions come out. PURE: no clock, no process, no channel.
//!
//! `engine` is the machine of one engine, `fleet` the machine of the run, which holds one of each engine. Every exit that nobody
//! requested is a failure, whatever its code: a crashed vLLM exits with 0.
//! ```text
//!            Spawn            /health 200          canaries pass       stop requested
//!  Planned ────────> Starting ────────────> Healthy ────────────> Ready ────────────> Draining
//!   │   ^               │ exit, deadline       │ exit, canary       │ exit, hung          │ drained, deadline
//!   │   │               │                      └───────┬────────────┘                     v
//!   │   │ tree empty,   ├──────────────────────────────┴──> Backoff or Failed         Stopping: SIGTERM to the leader,
//!   │   │ wait over     │                                   (tree killed)             SIGKILL to the tree after its
//!   │   └───────────────│── incarnation + 1 ─────────────────┘   restart        ┐     grace
//!   v stop              │ stop: short grace                      requested,     │        │
//!  Stopped <────────────┴──────────────── tree empty ───────────────────────────┴────────┘
//! ```
//! Before the fleet is ready a failure ends the run. After that its cause and the policy decide: the engine waits in Backoff
//! until its tree is empty and its log was searched for the cause. Then it stays failed, or starts again while the others
//! serve. An attached fleet begins with engines that are Healthy already, and one engine's failure never ends its run.
//!
//! The run:
//! ```text
//!  Starting ──all healthy──> Verifying ──ok──> Ready ──stop──> Draining ──> Stopping ──trees gone──> Closing ──> Checking ──> Over
//!      └── stop, a failure, a deadline ──┴───── a role lost ──────────────────^        shim lost ──> Sweeping ──^
//! ```
//! Deadlines are part of the state: [`FleetMachine::next_deadline`] says when [`Event::Tick`] is due, so no timer can be stale.

mod engine;
mod events;
mod fleet;

pub(super) use self::events::{Action, Event};
pub(super) use self::fleet::{FleetMachine, Limits};

#[cfg(test)]
pub(super) mod tests;
