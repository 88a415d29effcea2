//! From a profile to a plan, and from a plan to its findings, with the errors for users.

use std::path::Path;

use super::checks;
use crate::machine::Machine;
use crate::plan::{self, Plan, PlanError};
use crate::preflight::{Finding, Level};
use crate::profile::{Profile, ProfileError};
use crate::report::{ExitStatus, Failure};
use crate::ui::Printer;

pub(super) fn profile_failure(error: ProfileError) -> Failure {
    let hint = error.hint();
    let failure = Failure::new(ExitStatus::Usage, error);
    match hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

/// Builds the plan of a run in `run_dir`.
pub(super) fn build(profile: &Profile, machine: &Machine, run_dir: &Path) -> Result<Plan, Failure> {
    plan::build(profile, machine, run_dir).map_err(|error| {
        let status = match &error {
            PlanError::UnsafeConnector(_)
            | PlanError::NoGpuLeft { .. }
            | PlanError::LargerThanNode { .. }
            | PlanError::SpansNodes { .. } => ExitStatus::Preflight,
            PlanError::PortTooHigh { .. } | PlanError::PortTwice { .. } | PlanError::UnequalRanks { .. } => {
                ExitStatus::Usage
            }
        };
        let hint = error.hint();
        Failure::new(status, error).hint(hint)
    })
}

/// Checks the plan against the machine, prints warnings and failures, and fails if the run cannot work.
pub(super) fn preflight(plan: &Plan, machine: &Machine, printer: Printer) -> Result<(), Failure> {
    let findings = checks::of_plan(plan, machine);
    let failures = findings.iter().filter(|finding| finding.level == Level::Fail).count();
    for finding in &findings {
        match finding.level {
            Level::Pass => {}
            Level::Warn => printer.status(line(finding)),
            Level::Fail => printer.error(line(finding)),
        }
    }
    if failures == 0 {
        return Ok(());
    }
    let noun = if failures == 1 { "problem" } else { "problems" };
    Err(Failure::message(
        ExitStatus::Preflight,
        format!(
            "this machine cannot run profile `{}`: {failures} {noun} above",
            plan.profile
        ),
    ))
}

/// A finding in one or two lines.
pub(super) fn line(finding: &Finding) -> String {
    let level = match finding.level {
        Level::Pass => "pass",
        Level::Warn => "warn",
        Level::Fail => "fail",
    };
    let hint = finding
        .hint
        .as_ref()
        .map(|hint| format!("\n      hint: {hint}"))
        .unwrap_or_default();
    format!("{level}  {}: {}{hint}", finding.check, finding.message)
}
