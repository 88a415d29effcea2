//! `xpyd profiles list|show|validate`.

use std::path::Path;

use clap::{Parser, Subcommand};

use super::request::{self, FleetArguments, profile_failure};
use crate::machine;
use crate::preflight::{self, Level};
use crate::profile;
use crate::report::{ExitStatus, Failure};
use crate::ui::{Printer, Table};

/// Arguments of `xpyd profiles`.
#[derive(Debug, Parser)]
pub(super) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// List the shipped profiles.
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print a profile as it is written, to start a file of one's own from.
    Show {
        /// A shipped name or the path of a file.
        name: String,
        /// Print what it says with all that it extends, each key once.
        #[arg(long)]
        resolved: bool,
    },
    /// Check a profile without running it.
    Validate {
        /// A shipped name or the path of a file.
        profile: String,
    },
}

pub(super) fn run(arguments: &Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    match &arguments.what {
        What::List { json } => list(*json, printer)?,
        What::Show { name, resolved: false } => {
            let text = profile::text(name).map_err(profile_failure)?;
            printer.data(text.trim_end())?;
        }
        What::Show { name, resolved: true } => {
            let whole = profile::resolved(name, &[], &[]).map_err(profile_failure)?;
            let text = toml::to_string_pretty(&whole).map_err(anyhow::Error::from)?;
            printer.data(text.trim_end())?;
        }
        What::Validate { profile } => validate(profile, printer)?,
    }
    Ok(ExitStatus::Success)
}

fn list(json: bool, printer: Printer) -> Result<(), Failure> {
    let mut rows = Vec::new();
    for name in profile::shipped_names() {
        rows.push(profile::load(name, &[]).map_err(profile_failure)?);
    }
    if json {
        let rows: Vec<_> = rows
            .iter()
            .map(|profile| serde_json::json!({"name": profile.name, "description": profile.description, "model": profile.model}))
            .collect();
        printer.data(serde_json::Value::from(rows))
    } else {
        let mut table = Table::new(["profile", "description"]);
        for profile in rows {
            table.row([profile.name, profile.description]);
        }
        printer.data(table)
    }
}

/// Checks all that can be told of a profile without the machine that is to run it.
fn validate(name: &str, printer: Printer) -> Result<(), Failure> {
    let profile = FleetArguments::of_profile(name).profile()?;
    let nowhere = machine::survey(&machine::Wanted::nothing());
    let plan = match request::build(&profile, &nowhere, Path::new("RUN")) {
        Ok(plan) => Some(plan),
        // That is a question of what is installed.
        Err(failure) if failure.status == ExitStatus::Preflight => None,
        Err(failure) => return Err(failure),
    };
    let findings = plan.as_ref().map(preflight::of_profile).unwrap_or_default();
    for finding in &findings {
        printer.error(request::line(finding));
    }
    let failures = findings.iter().filter(|finding| finding.level == Level::Fail).count();
    if failures > 0 {
        let problems = if failures == 1 { "problem" } else { "problems" };
        let message = format!("`{name}` cannot run anywhere: {failures} {problems} above");
        return Err(Failure::message(ExitStatus::Usage, message));
    }
    printer.data(format!(
        "{name} is a good profile: {} prefill + {} decode engines of {}",
        profile.prefill.count, profile.decode.count, profile.model
    ))
}
