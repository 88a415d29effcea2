//! `xpyd slurm`: the batch script of a fleet.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use clap::{Args, Subcommand};

use super::allocation::without_options;
use super::fleet_arguments::FleetArguments;
use crate::connector::Device;
use crate::engine::EngineKind;
use crate::profile::RoleProfile;
use crate::report::{ExitStatus, Failure};
use crate::ui::Printer;

/// Options of the job. All others choose the fleet, as those of `xpyd up`.
const OWN_OPTIONS: [&str; 8] = [
    "--nodes",
    "--gpus-per-node",
    "--time",
    "--partition",
    "--account",
    "--sbatch",
    "--setup",
    "--drain-before",
];

/// What to do with the batch script.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Print the batch script of a fleet
    Render(Arguments),
    /// Submit a fleet as a job; prints the job's id
    Submit(Arguments),
}

/// Arguments of `xpyd slurm render` and `submit`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Number of nodes
    #[arg(long, default_value_t = 1)]
    nodes: u16,
    /// GPUs of each node; the default divides the GPUs of the fleet among the nodes
    #[arg(long, value_name = "COUNT")]
    gpus_per_node: Option<usize>,
    /// Time limit of the job, as `sbatch` reads it: `4:00:00`
    #[arg(long)]
    time: Option<String>,
    /// Partition
    #[arg(long)]
    partition: Option<String>,
    /// Account
    #[arg(long)]
    account: Option<String>,
    /// Another option for `sbatch`, such as `--exclusive` or `--container-image=…`; can be repeated
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    sbatch: Vec<String>,
    /// A shell line that runs before xpyd, such as `module load cuda`; can be repeated
    #[arg(long, value_name = "LINE")]
    setup: Vec<String>,
    /// How long before the time limit the fleet starts to drain
    #[arg(long, default_value = "2m", value_parser = crate::span::parse, value_name = "TIME")]
    drain_before: std::time::Duration,
    #[command(flatten)]
    fleet: FleetArguments,
}

pub(super) fn run(verb: &Verb, printer: Printer) -> Result<ExitStatus, Failure> {
    match verb {
        Verb::Render(arguments) => printer.data_part(script(arguments)?)?,
        Verb::Submit(arguments) => {
            let job = submit(&script(arguments)?)?;
            printer.data(&job)?;
            printer.status(format!(
                "next  xpyd status --job {job} · xpyd logs all -f --job {job} · xpyd down --job {job}"
            ));
        }
    }
    Ok(ExitStatus::Success)
}

fn script(arguments: &Arguments) -> Result<String, Failure> {
    let profile = arguments.fleet.profile()?;
    let roles = [&profile.prefill, &profile.decode];
    let needs_gpus = profile.engine == EngineKind::Vllm && profile.device == Device::Cuda;
    let of_role = |role: &&RoleProfile| usize::from(role.count) * profile.ranks(role).total();
    let gpus: usize = roles.iter().filter(|_| needs_gpus).map(of_role).sum();
    let per_node = arguments
        .gpus_per_node
        .unwrap_or_else(|| gpus.div_ceil(usize::from(arguments.nodes)));
    let mut script = String::from("#!/bin/bash\n");
    let mut option = |text: String| {
        // Writing to a string does not fail.
        let _ = writeln!(script, "#SBATCH {text}");
    };
    option(format!("--job-name=xpyd-{}", name_of(&profile.name)));
    option(format!("--nodes={}", arguments.nodes));
    option("--ntasks-per-node=1".to_owned());
    if per_node > 0 {
        option(format!("--gpus-per-node={per_node}"));
    }
    let given = [
        ("time", &arguments.time),
        ("partition", &arguments.partition),
        ("account", &arguments.account),
    ];
    for (name, value) in given {
        if let Some(value) = value {
            option(format!("--{name}={value}"));
        }
    }
    option(format!("--signal=B:TERM@{}", arguments.drain_before.as_secs()));
    option("--output=xpyd-%j.out".to_owned());
    arguments.sbatch.iter().for_each(|text| option(text.clone()));
    for line in &arguments.setup {
        let _ = writeln!(script, "{line}");
    }
    script.push_str("# xpyd runs on the first node, and starts engines on all of them.\n");
    let program = std::env::current_exe().map_err(anyhow::Error::from)?;
    let mut words = vec![program.to_string_lossy().into_owned(), "up".to_owned()];
    words.extend(fleet_words());
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    let _ = writeln!(script, "exec {}", words.join(" "));
    Ok(script)
}

/// The arguments that choose the fleet, as they were given.
fn fleet_words() -> impl Iterator<Item = String> {
    let words = std::env::args_os().skip_while(|word| word != "slurm").skip(2);
    let words = without_options(words, &OWN_OPTIONS);
    words.into_iter().map(|word| word.to_string_lossy().into_owned())
}

/// The profile's name as a part of the job's name.
fn name_of(profile: &str) -> String {
    let stem = std::path::Path::new(profile).file_stem().unwrap_or_default();
    stem.to_string_lossy().into_owned()
}

/// The word as a shell reads it.
fn quoted(word: &str) -> String {
    let is_plain = |character: char| character.is_ascii_alphanumeric() || "-_./=:,@%+".contains(character);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Submits the script, and returns the job's id.
fn submit(script: &str) -> Result<String, Failure> {
    let failed = |error: anyhow::Error| {
        Failure::new(ExitStatus::Failure, error.context("cannot submit the job"))
            .hint("`xpyd slurm render` prints the script, to submit it by hand")
    };
    let mut sbatch = Command::new("sbatch")
        .arg("--parsable")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(anyhow::Error::new(error).context("cannot run `sbatch`")))?;
    if let Some(mut input) = sbatch.stdin.take() {
        input
            .write_all(script.as_bytes())
            .map_err(|error| failed(error.into()))?;
    }
    let output = sbatch.wait_with_output().map_err(|error| failed(error.into()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(failed(anyhow::Error::msg(said)));
    }
    // `--parsable` prints `ID` or `ID;CLUSTER`.
    let printed = String::from_utf8_lossy(&output.stdout);
    Ok(printed.trim().split(';').next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted("--set"), "--set");
        assert_eq!(quoted("decode.port=7600"), "decode.port=7600");
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
        assert_eq!(quoted("$HOME"), "'$HOME'");
    }
}
