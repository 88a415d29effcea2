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

/// Says that a test proves nothing on this machine. Written past the test harness, which shows no output of tests that pass.
fn skipped(test: &str, reason: &str) {
    let line = format!("\nSKIPPED {test}: {reason}\n");
    std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).expect("standard error can be written");
}
