//! Exactness: what a client gets from a fleet is what one engine would have given it.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests stop them as loudly as the tests themselves"
)]

mod answers;
mod cells;
mod passthrough;
