//! `xpyd doctor`: every check of a start without the start, and what can be put right at once.

mod reap;
mod show;

use clap::Args;
use tokio::time::Instant;

pub(super) use self::show::Report as Findings;

use super::checks::{self, Leftovers, Remedy};
use super::request::{self, ConnectorFlag, EngineFlag, FleetArguments};
use crate::engine::EngineKind;
use crate::machine::{self, Machine};
use crate::preflight::{self, Finding, Level, Topic};
use crate::report::{ExitStatus, Failure};
use crate::ui::Printer;

/// The program that is looked for where no profile names one.
const VLLM: &str = "vllm";

/// Arguments of `xpyd doctor`.
#[derive(Debug, Clone, Args)]
pub(super) struct Arguments {
    /// The profile to check this machine for (see `xpyd profiles list`); without one, nothing is needed, and it is told what is there
    #[arg(value_name = "PROFILE", group = "chosen")]
    fleet: Option<String>,
    /// The same as an option
    #[arg(short, long, value_name = "NAME|FILE", group = "chosen")]
    profile: Option<String>,
    /// Changes one key of the profile; may be repeated, later ones win
    #[arg(long, value_name = "KEY=VALUE", requires = "chosen")]
    set: Vec<String>,
    /// Model path or Hugging Face repository
    #[arg(long, requires = "chosen")]
    model: Option<String>,
    /// What serves the model
    #[arg(long, value_enum, requires = "chosen")]
    engine: Option<EngineFlag>,
    /// How KV moves from prefill to decode
    #[arg(long, value_enum, requires = "chosen")]
    connector: Option<ConnectorFlag>,
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
    /// Remove what killed runs and broken downloads have left, after it was listed
    #[arg(long)]
    fix: bool,
    /// Find engines that nobody watches, show them, and end them
    #[arg(long, conflicts_with_all = ["json", "fix"])]
    reap: bool,
    /// End them without asking
    #[arg(long, requires = "reap")]
    yes: bool,
    /// Only this one; may be repeated
    #[arg(long, requires = "reap", value_name = "PID")]
    pid: Vec<u32>,
    /// More arguments for `vllm serve`, of all engines
    #[arg(last = true, requires = "chosen", value_name = "VLLM ARGUMENTS")]
    vllm: Vec<String>,
}

impl Arguments {
    /// The profile, if there is one.
    fn chosen(&self) -> Option<&String> {
        self.fleet.as_ref().or(self.profile.as_ref())
    }
}

pub(super) fn run(arguments: &Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    if arguments.reap {
        return reap::run(arguments.yes, &arguments.pid, printer);
    }
    let began = Instant::now();
    let (mut findings, machine) = look(arguments)?;
    let leftovers = Leftovers::find();
    findings.extend(leftovers.findings());
    if arguments.fix && fix(leftovers.remedies(&machine), printer) {
        // What is told below is what is true now.
        let (again, _) = look(arguments)?;
        findings = again;
        findings.extend(Leftovers::find().findings());
    }
    // Stable: within a topic, the order is that of a start.
    findings.sort_by_key(|finding| finding.topic);
    let report = show::Report {
        profile: arguments.chosen().map(String::as_str),
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

/// What is there, against the profile if there is one.
fn look(arguments: &Arguments) -> Result<(Vec<Finding>, Machine), Failure> {
    let Some(profile) = arguments.chosen() else {
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
    let findings = match request::build(&profile, &machine, &fleet.logs.join("RUN")) {
        Ok(plan) if plan.engine == EngineKind::Vllm => checks::of_machine(&plan, &machine),
        Ok(plan) => preflight::of_simulated(&plan, &machine),
        Err(failure) if failure.status == ExitStatus::Preflight => {
            // The rest is worth to be known, too.
            let mut findings = preflight::overview(&machine);
            findings.insert(0, refused(&failure));
            findings
        }
        Err(failure) => return Err(failure),
    };
    Ok((findings, machine))
}

/// This machine, where nothing is asked of it; and, if wanted, whose the token is.
pub(super) fn survey(asks_for_account: bool) -> Machine {
    machine::survey(&machine::Wanted {
        asks_for_account,
        program: Some(VLLM),
        gpus: true,
        ..machine::Wanted::nothing()
    })
}

/// A plan that cannot be made on this machine.
fn refused(failure: &Failure) -> Finding {
    Finding {
        topic: Topic::Software,
        check: "plan",
        level: Level::Fail,
        message: format!("{:#}", failure.error),
        hint: failure.hints.first().cloned(),
    }
}

/// Lists what is removed, and removes it. Whether there was anything.
fn fix(remedies: Vec<Remedy>, printer: Printer) -> bool {
    if remedies.is_empty() {
        printer.status("nothing to fix: no killed run, no broken download and no dead shared memory of this user's");
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

/// The checks of this machine as `xpyd bundle` takes them along.
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
