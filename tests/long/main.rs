//! The tests that take minutes: faults under load, every fault in every phase, floods of log lines.
//!
//! `cargo test` leaves them out; `cargo test --test long` runs them.

mod chaos;
mod kernel;
mod log_flood;
mod matrix;
mod measure;
#[path = "../it/support.rs"]
#[expect(dead_code, reason = "shared with `it`, which uses all of it")]
mod support;
