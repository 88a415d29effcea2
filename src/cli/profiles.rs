//! `xpyd profiles list|show|validate`.

use clap::{Parser, Subcommand};

use super::request::profile_failure;
use crate::profile::{self, ProfileError};
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
    /// Print a shipped profile, to start a file of one's own from.
    Show {
        /// Its name.
        name: String,
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
        What::Show { name } => printer.data_part(text(name)?),
        What::Validate { profile } => {
            let loaded = profile::load(profile, &[]).map_err(profile_failure)?;
            printer.data(format!(
                "{profile} is a good profile: {} prefill + {} decode engines of {}",
                loaded.prefill.count, loaded.decode.count, loaded.model
            ));
        }
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
        printer.data(serde_json::Value::from(rows));
    } else {
        let mut table = Table::new(["profile", "description"]);
        for profile in rows {
            table.row([profile.name, profile.description]);
        }
        printer.data(table);
    }
    Ok(())
}

fn text(name: &str) -> Result<&'static str, Failure> {
    let found = profile::shipped().find(|(shipped, _)| *shipped == name);
    found.map(|(_, text)| text).ok_or_else(|| {
        // The same words and the same hint as everywhere else that a profile is looked for by name.
        let error = profile::load(name, &[]).err().unwrap_or(ProfileError::Unknown {
            name: name.to_owned(),
            nearest: None,
        });
        profile_failure(error)
    })
}
