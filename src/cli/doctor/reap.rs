//! `xpyd doctor --reap`: lists orphaned engine processes, and kills them after a confirmation.

use std::io::{BufRead, IsTerminal};
use std::time::Duration;

use crate::preflight::gibibytes;
use crate::report::{ExitStatus, Failure};
use crate::supervisor::shim::orphans;
use crate::ui::{Printer, Table};

/// Time limit until killed processes have ended. A process in the middle of a GPU transfer takes seconds.
const DEADLINE: Duration = Duration::from_secs(20);

pub(super) fn run(yes: bool, only: &[u32], printer: Printer) -> Result<ExitStatus, Failure> {
    let mut found = orphans::find();
    found.retain(|orphan| only.is_empty() || only.contains(&orphan.pid));
    if found.is_empty() {
        printer.status("no orphaned engine process");
        return Ok(ExitStatus::Success);
    }
    let mut table = Table::new(["pid", "process", "processes", "memory", "why"]);
    for orphan in &found {
        table.row([
            orphan.pid.to_string(),
            orphan.title.clone(),
            orphan.processes.to_string(),
            gibibytes(orphan.resident_bytes),
            orphan.why.clone(),
        ]);
    }
    printer.data(table)?;
    let processes: usize = found.iter().map(|orphan| orphan.processes).sum();
    if !yes && !confirmed(processes, printer)? {
        printer.status("no process was killed");
        return Ok(ExitStatus::Success);
    }
    let left = orphans::reap(&found, DEADLINE);
    if left.is_empty() {
        let noun = if processes == 1 { "process" } else { "processes" };
        printer.status(format!(
            "killed {processes} {noun}, and removed the shared memory that only they used"
        ));
        return Ok(ExitStatus::Success);
    }
    let names: Vec<String> = left.iter().map(|(pid, name)| format!("{name} (pid {pid})")).collect();
    let error = format!("still there after SIGKILL: {}", names.join(", "));
    Err(Failure::message(ExitStatus::TeardownIncomplete, error).hint(
        "a process that waits for a device ends when the driver releases it; `dmesg` shows whether a GPU has failed",
    ))
}

/// Asks on a terminal. Without a terminal, `--yes` is required.
fn confirmed(processes: usize, printer: Printer) -> Result<bool, Failure> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return Err(
            Failure::message(ExitStatus::Usage, "cannot ask for a confirmation: no terminal")
                .hint("`xpyd doctor --reap --yes` kills them without asking"),
        );
    }
    let noun = if processes == 1 {
        "this process"
    } else {
        "these processes"
    };
    printer.error(format!("kill {noun}? [y/N]"));
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer).map_err(anyhow::Error::from)?;
    Ok(["y", "yes"].contains(&answer.trim().to_lowercase().as_str()))
}
