//! `xpyd doctor --reap`: shows engines that nobody watches, and ends them once somebody has said so.

use std::io::{BufRead, IsTerminal};
use std::time::Duration;

use crate::preflight::gibibytes;
use crate::report::{ExitStatus, Failure};
use crate::supervisor::shim::orphans;
use crate::ui::{Printer, Table};

/// How long killed processes may take until they are gone. One in the middle of a transfer to a GPU takes seconds.
const DEADLINE: Duration = Duration::from_secs(20);

pub(super) fn run(yes: bool, only: &[u32], printer: Printer) -> Result<ExitStatus, Failure> {
    let mut found = orphans::find();
    found.retain(|orphan| only.is_empty() || only.contains(&orphan.pid));
    if found.is_empty() {
        printer.status("no engine without a run: nothing to end");
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
        printer.status("nothing was ended");
        return Ok(ExitStatus::Success);
    }
    let left = orphans::reap(&found, DEADLINE);
    if left.is_empty() {
        let noun = if processes == 1 { "process" } else { "processes" };
        printer.status(format!(
            "ended {processes} {noun}, and removed the shared memory that only they used"
        ));
        return Ok(ExitStatus::Success);
    }
    let names: Vec<String> = left.iter().map(|(pid, name)| format!("{name} (pid {pid})")).collect();
    let error = format!("still there after SIGKILL: {}", names.join(", "));
    Err(Failure::message(ExitStatus::TeardownIncomplete, error)
        .hint("a process that a device holds ends once its driver lets go; `dmesg` tells of a GPU that has failed"))
}

/// Asks on a terminal. Where nobody can answer, `--yes` has to say so.
fn confirmed(processes: usize, printer: Printer) -> Result<bool, Failure> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return Err(
            Failure::message(ExitStatus::Usage, "nobody can be asked whether they may be ended")
                .hint("`xpyd doctor --reap --yes` ends them without asking"),
        );
    }
    let noun = if processes == 1 {
        "this process"
    } else {
        "these processes"
    };
    printer.error(format!("end {noun}? [y/N]"));
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer).map_err(anyhow::Error::from)?;
    Ok(["y", "yes"].contains(&answer.trim().to_lowercase().as_str()))
}
