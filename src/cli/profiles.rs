//! `xpyd profiles list|show|validate|schema`.

use std::path::Path;

use clap::{Parser, Subcommand};

use super::fleet_arguments::FleetArguments;
use super::planning::{self, build, profile_failure};
use crate::machine;
use crate::preflight::{self, Level};
use crate::profile;
use crate::report::{ExitStatus, Failure};
use crate::ui::{Printer, Table};

/// Arguments of `xpyd profiles`.
#[derive(Debug, Parser)]
pub(super) struct Arguments {
    #[command(subcommand)]
    what: ProfilesCommand,
}

#[derive(Debug, Subcommand)]
enum ProfilesCommand {
    /// List the shipped profiles.
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print a profile, as a start for your own.
    Show {
        /// The name of a shipped profile, or the path of a file.
        name: String,
        /// Print it with everything it extends, each key once.
        #[arg(long)]
        resolved: bool,
    },
    /// Print the JSON Schema of profiles, with which editors check and complete keys.
    Schema,
    /// Check a profile without running it.
    Validate {
        /// The name of a shipped profile, or the path of a file.
        profile: String,
    },
}

/// The first line of a printed profile. Editors (taplo, Even Better TOML) read the schema from there; for TOML it is a comment.
const EDITOR_LINE: &str = concat!(
    "#:schema ",
    env!("CARGO_PKG_REPOSITORY"),
    "/raw/v",
    env!("CARGO_PKG_VERSION"),
    "/docs/profile.schema.json\n"
);

pub(super) fn run(arguments: &Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    match &arguments.what {
        ProfilesCommand::List { json } => list(*json, printer)?,
        ProfilesCommand::Show { name, resolved: false } => {
            let text = profile::text(name).map_err(profile_failure)?;
            // A file of the user is printed as it is.
            let line = if Path::new(name).is_file() { "" } else { EDITOR_LINE };
            printer.data(format!("{line}{}", text.trim_end()))?;
        }
        ProfilesCommand::Show { name, resolved: true } => {
            let whole = profile::resolved(name, &[], &[]).map_err(profile_failure)?;
            let text = toml::to_string_pretty(&whole).map_err(anyhow::Error::from)?;
            printer.data(format!("{EDITOR_LINE}{}", text.trim_end()))?;
        }
        ProfilesCommand::Schema => printer.data(format!("{:#}", profile::schema()))?,
        ProfilesCommand::Validate { profile } => validate(profile, printer)?,
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

/// Checks everything about a profile that does not depend on the machine.
fn validate(name: &str, printer: Printer) -> Result<(), Failure> {
    let profile = FleetArguments::of_profile(name).profile()?;
    let nowhere = machine::survey(&machine::SurveyRequest::nothing());
    let plan = match build(&profile, &nowhere, Path::new("RUN")) {
        Ok(plan) => Some(plan),
        // That depends on the installed versions.
        Err(failure) if failure.status == ExitStatus::Preflight => None,
        Err(failure) => return Err(failure),
    };
    let findings = plan.as_ref().map(preflight::of_profile).unwrap_or_default();
    for finding in &findings {
        printer.error(planning::line(finding));
    }
    let failures = findings.iter().filter(|finding| finding.level == Level::Fail).count();
    if failures > 0 {
        let problems = if failures == 1 { "problem" } else { "problems" };
        let message = format!("`{name}` cannot run on any machine: {failures} {problems} above");
        return Err(Failure::message(ExitStatus::Usage, message));
    }
    printer.data(format!(
        "{name} is valid: {} prefill + {} decode engines of {}",
        profile.prefill.count, profile.decode.count, profile.model
    ))
}
