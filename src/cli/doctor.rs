//! `xpyd doctor`: all checks of a start without starting, and the repairs that xpyd can do itself.

mod reap;
mod show;

use clap::Args;
use tokio::time::Instant;

pub(super) use self::show::Report as Findings;

use super::checks::{self, Leftovers, Remedy};
use super::fleet_arguments::FleetArguments;
use super::planning::build;
use crate::connector::ConnectorChoice;
use crate::engine::EngineKind;
use crate::machine::{self, Machine};
use crate::preflight::{self, Finding, Level, Topic};
use crate::report::{ExitStatus, Failure};
use crate::ui::Printer;

/// The program to look for without a profile.
const VLLM: &str = "vllm";

/// Arguments of `xpyd doctor`.
#[derive(Debug, Clone, Args)]
pub(super) struct Arguments {
    /// The profile to check this machine for (see `xpyd profiles list`); without one, print what is installed
    #[arg(value_name = "PROFILE", group = "chosen")]
    fleet: Option<String>,
    /// The same as an option
    #[arg(short, long, value_name = "NAME|FILE", group = "chosen")]
    profile: Option<String>,
    /// Set one key of the profile; can be repeated, later ones win
    #[arg(long, value_name = "KEY=VALUE", requires = "chosen")]
    set: Vec<String>,
    /// Model path or Hugging Face repository
    #[arg(long, requires = "chosen")]
    model: Option<String>,
    /// What serves the model
    #[arg(long, value_enum, requires = "chosen")]
    engine: Option<EngineKind>,
    /// How KV moves from prefill to decode
    #[arg(long, value_enum, requires = "chosen")]
    connector: Option<ConnectorChoice>,
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
    /// Remove files of killed runs and interrupted downloads, after listing them
    #[arg(long)]
    fix: bool,
    /// List orphaned engine processes, and kill them
    #[arg(long, conflicts_with_all = ["json", "fix"])]
    reap: bool,
    /// Do not ask before killing
    #[arg(long, requires = "reap")]
    yes: bool,
    /// Only kill the process with this id; can be repeated
    #[arg(long, requires = "reap", value_name = "PID")]
    pid: Vec<u32>,
    /// More arguments for `vllm serve`, for all engines
    #[arg(last = true, requires = "chosen", value_name = "VLLM ARGUMENTS")]
    vllm: Vec<String>,
}

impl Arguments {
    /// The name of the profile, if there is one.
    fn profile_name(&self) -> Option<&String> {
        self.fleet.as_ref().or(self.profile.as_ref())
    }
}

pub(super) fn run(arguments: &Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    if arguments.reap {
        return reap::run(arguments.yes, &arguments.pid, printer);
    }
    let began = Instant::now();
    let (mut findings, machine) = collect_findings(arguments)?;
    let leftovers = Leftovers::find();
    findings.extend(leftovers.findings());
    if arguments.fix && fix(leftovers.remedies(&machine), printer) {
        // The report shows the state after the repair.
        let (again, _) = collect_findings(arguments)?;
        findings = again;
        findings.extend(Leftovers::find().findings());
    }
    // A stable sort: within a topic, the order is that of a start.
    findings.sort_by_key(|finding| finding.topic);
    let report = show::Report {
        profile: arguments.profile_name().map(String::as_str),
        findings: &findings,
        took: began.elapsed(),
    };
    if arguments.json {
        printer.data(report.json()?)?;
    } else {
        printer.data(report.text(printer.data_width()))?;
    }
    let worst = findings.iter().map(|finding| finding.level).max();
    Ok(if worst == Some(Level::Fail) {
        ExitStatus::Preflight
    } else {
        ExitStatus::Success
    })
}

/// All findings: for the profile, or an overview without one.
fn collect_findings(arguments: &Arguments) -> Result<(Vec<Finding>, Machine), Failure> {
    let Some(profile) = arguments.profile_name() else {
        let machine = survey(true);
        return Ok((preflight::overview(&machine), machine));
    };
    let fleet = FleetArguments {
        set: arguments.set.clone(),
        model: arguments.model.clone(),
        engine: arguments.engine,
        connector: arguments.connector,
        vllm: arguments.vllm.clone(),
        ..FleetArguments::of_profile(profile)
    };
    let (profile, machine) = fleet.survey()?;
    let findings = match build(&profile, &machine, &fleet.logs.join("RUN")) {
        Ok(plan) if plan.engine == EngineKind::Vllm => checks::of_machine(&plan, &machine),
        Ok(plan) => preflight::of_simulated(&plan, &machine),
        Err(failure) if failure.status == ExitStatus::Preflight => {
            // The other findings are useful as well.
            let mut findings = preflight::overview(&machine);
            findings.insert(0, plan_refused(&failure));
            findings
        }
        Err(failure) => return Err(failure),
    };
    Ok((findings, machine))
}

/// The facts about this machine without a profile, and optionally the account of the token.
pub(super) fn survey(asks_for_account: bool) -> Machine {
    machine::survey(&machine::SurveyRequest {
        asks_for_account,
        program: Some(VLLM),
        gpus: true,
        ..machine::SurveyRequest::nothing()
    })
}

/// The finding for a plan that cannot be built on this machine.
fn plan_refused(failure: &Failure) -> Finding {
    Finding {
        topic: Topic::Software,
        check: "plan",
        level: Level::Fail,
        message: format!("{:#}", failure.error),
        hint: failure.hints.first().cloned(),
    }
}

/// Lists what it removes, and removes it. Returns whether there was anything.
fn fix(remedies: Vec<Remedy>, printer: Printer) -> bool {
    if remedies.is_empty() {
        printer
            .status("nothing to fix: this user has no killed run, no interrupted download and no unused shared memory");
        return false;
    }
    printer.status("removing:");
    for remedy in &remedies {
        printer.status(format!("  {remedy}"));
    }
    for remedy in remedies {
        if let Err(error) = remedy.apply() {
            printer.error(format!("cannot remove {remedy}: {error:#}"));
        }
    }
    true
}

/// The findings about this machine for `xpyd bundle`.
pub(super) fn findings_of_machine(machine: &Machine) -> Vec<Finding> {
    let mut findings = preflight::overview(machine);
    findings.extend(Leftovers::find().findings());
    findings
}

/// Findings as JSON.
pub(super) fn json(findings: &[Finding]) -> Result<String, Failure> {
    show::Report {
        profile: None,
        findings,
        took: std::time::Duration::ZERO,
    }
    .json()
}
