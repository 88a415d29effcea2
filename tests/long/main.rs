//! Tests that take minutes: chaos runs, the teardown matrix, log floods, and faults that need the kernel's help.
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

/// Reports that a test cannot run on this machine. The line goes directly to standard error, because the test harness hides the
/// output of passed tests, and to the file of `XPYD_SKIPPED_TESTS`, which `.ci/run` prints at its end.
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
