//! The tests that take minutes: faults under load, every fault in every phase, floods of log lines.
//!
//! `cargo test` leaves them out; `cargo test --test long` runs them.

use std::io::Write as _;

mod chaos;
mod kernel;
mod log_flood;
mod measure;
#[path = "../it/support/mod.rs"]
#[expect(dead_code, reason = "shared with `it`, which uses all of it")]
mod support;
mod teardown_matrix;

/// Says that a test proves nothing on this machine. Written past the test harness, which shows no output of tests that pass, and
/// to the file that `.ci/run` prints at its end.
fn skipped(test: &str, reason: &str) {
    let line = format!("SKIPPED {test}: {reason}\n");
    let mut stderr = std::io::stderr();
    stderr
        .write_all(format!("\n{line}").as_bytes())
        .expect("standard error can be written");
    if let Some(list) = std::env::var_os("XPYD_SKIPPED_TESTS") {
        let list = std::fs::File::options().append(true).create(true).open(list);
        list.and_then(|mut list| list.write_all(line.as_bytes()))
            .expect("the list can be written");
    }
}
