//! Process trees that do everything to stay, and a supervisor that leaves none of them behind.
//!
//! The trees are small shell scripts; the engine that answers HTTP is this very test program, run again.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod fleet;
mod shim;

use std::path::Path;

use crate::support::{DEADLINE as PATIENCE, until};

/// The variable by which a test finds the processes it has started, wherever they ended up.
const MARK: &str = "XPYD_TEST_MARK";

/// The processes that carry the mark, by id and name. The dead that wait for their parent have no environment any more.
fn marked(mark: &str) -> Vec<(u32, String)> {
    let wanted = format!("{MARK}={mark}");
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            std::fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environment| {
                environment
                    .split(|byte| *byte == 0)
                    .any(|variable| variable == wanted.as_bytes())
            })
        })
        .map(|pid| {
            (
                pid,
                std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default(),
            )
        })
        .collect()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}
