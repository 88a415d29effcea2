//! Exactness: a fleet gives a client the same response as one engine.

#![expect(clippy::unwrap_used, reason = "a failed helper must fail its test")]

mod answers;
mod cells;
mod passthrough;
