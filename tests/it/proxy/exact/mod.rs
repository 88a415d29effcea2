//! Exactness: a fleet gives a client the same response as one engine.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests stop them as loudly as the tests themselves"
)]

mod answers;
mod cells;
mod passthrough;
