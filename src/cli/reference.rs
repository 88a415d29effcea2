//! `docs/cli.md`: the commands, their options and the exit codes, written from what clap and `report` know.

use std::fmt::Write as _;
use std::path::Path;

use clap::{Arg, ArgAction, Command, CommandFactory as _};

use super::Cli;
use crate::report::ExitStatus;

const HEAD: &str = "\
# Commands

This page is generated: `XPYD_UPDATE_DOCS=1 cargo test --lib cli::reference` writes it, and a test compares it with the program.
`xpyd COMMAND --help` shows the same.

";

fn render() -> String {
    let mut text = HEAD.to_owned() + "## Exit codes\n\n| Exit code | Meaning |\n|---|---|\n";
    for status in ExitStatus::ALL {
        line(&mut text, &format!("| {} | {} |", status.code(), status.meaning()));
    }
    let mut root = Cli::command();
    root.build();
    for command in root.get_subcommands() {
        describe(&mut text, command, "xpyd");
    }
    text
}

fn line(text: &mut String, line: &str) {
    writeln!(text, "{line}").expect("a string takes all");
}

fn describe(text: &mut String, command: &Command, parents: &str) {
    let name = format!("{parents} {}", command.get_name());
    if command.is_hide_set() || command.get_name() == "help" {
        return;
    }
    let inner: Vec<&Command> = command
        .get_subcommands()
        .filter(|inner| inner.get_name() != "help" && !inner.is_hide_set())
        .collect();
    line(text, &format!("\n## {name}\n"));
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    line(text, &format!("{}.", about.trim_end_matches('.')));
    let mut shown: Vec<&Arg> = command
        .get_arguments()
        .filter(|argument| !argument.is_hide_set() && !argument.is_global_set())
        .filter(|argument| !["help", "version"].contains(&argument.get_id().as_str()))
        .collect();
    shown.sort_by_key(|argument| !argument.is_positional());
    if !shown.is_empty() {
        line(text, "\n| Argument | Default | Meaning |\n|---|---|---|");
    }
    for argument in shown {
        line(text, &row(argument));
    }
    for command in inner {
        describe(text, command, &name);
    }
}

fn row(argument: &Arg) -> String {
    let values = argument.get_value_names().unwrap_or_default();
    let takes_values = argument.is_positional()
        || matches!(argument.get_action(), ArgAction::Set | ArgAction::Append) && !values.is_empty();
    let values = if takes_values {
        values.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    } else {
        String::new()
    };
    let long = argument.get_long().map(|long| format!("--{long}"));
    let short = argument.get_short().map(|short| format!("-{short}"));
    let flags: Vec<String> = short.into_iter().chain(long).collect();
    let name = [flags.join(", "), values].join(" ");
    let defaults: Vec<_> = argument
        .get_default_values()
        .iter()
        .map(|value| value.to_string_lossy())
        .collect();
    let default = if takes_values && !defaults.is_empty() {
        format!("`{}`", defaults.join(" "))
    } else {
        String::new()
    };
    let mut meaning = argument.get_help().map(ToString::to_string).unwrap_or_default();
    let choices: Vec<String> = argument
        .get_possible_values()
        .iter()
        .filter(|choice| !choice.is_hide_set())
        .map(|choice| format!("`{}`", choice.get_name()))
        .collect();
    if takes_values && !choices.is_empty() {
        write!(meaning, " ({})", choices.join(", ")).expect("a string takes all");
    }
    if let Some(variable) = argument.get_env() {
        write!(meaning, " (variable `{}`)", variable.to_string_lossy()).expect("a string takes all");
    }
    format!(
        "| `{}` | {default} | {} |",
        name.trim().replace('|', "\\|"),
        meaning.replace('|', "\\|").replace('\n', " ")
    )
}

#[test]
fn the_page_is_what_the_program_knows() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/cli.md");
    if std::env::var_os("XPYD_UPDATE_DOCS").is_some() {
        fs_err::write(&path, render()).expect("the page can be written");
    }
    let written = fs_err::read_to_string(&path).expect("the page is there");
    assert!(
        written == render(),
        "docs/cli.md is not what the program knows: run `XPYD_UPDATE_DOCS=1 cargo test --lib cli::reference`"
    );
}
