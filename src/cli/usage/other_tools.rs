//! Commands of other tools: for a word that is not a command here, xpyd suggests the right one.

use clap::CommandFactory as _;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::cli::Cli;
use crate::report::{ExitStatus, Failure};

/// Words of other tools, with the xpyd command of the same meaning.
const WORDS: &[(&[&str], &str)] = &[
    (
        &[
            "stop", "kill", "quit", "halt", "shutdown", "rm", "remove", "delete", "destroy",
        ],
        "`xpyd down` stops a run",
    ),
    (
        &["start", "serve", "run", "launch", "deploy", "create", "apply", "server"],
        "`xpyd up` starts a fleet; `xpyd up --model MODEL` chooses the model",
    ),
    (
        &["ls", "list", "runs", "top", "list-runs"],
        "`xpyd ps` lists all runs, `xpyd status` shows the engines of one",
    ),
    (
        &["info", "show", "describe", "inspect", "stats"],
        "`xpyd status` shows a run, `xpyd plan` shows what a run would do",
    ),
    (
        &["init", "new", "config", "configure", "edit", "profile", "template"],
        "`xpyd profiles show 2p2d` prints a profile to change, and `xpyd up --profile ./my.toml` starts it",
    ),
    (&["version"], "`xpyd --version` prints it"),
    (
        &["log", "tail", "events", "journal"],
        "`xpyd logs -f` follows the logs of a run",
    ),
    (
        &["reload", "bounce", "respawn"],
        "`xpyd restart ROLE` restarts engines, one after the other",
    ),
    (
        &["check", "test", "verify", "validate", "health", "env", "collect-env"],
        "`xpyd doctor` checks this machine, `xpyd profiles validate FILE` a profile",
    ),
    (
        &["benchmark", "perf", "load", "measure"],
        "`xpyd bench` measures a server",
    ),
    (
        &["router", "route", "gateway", "balance", "lb"],
        "`xpyd proxy` serves engines that are already running",
    ),
    (
        &["pull", "download", "fetch"],
        "`xpyd up` downloads the model before it starts engines",
    ),
    (
        &["exec", "shell"],
        "`xpyd status` shows the process id and port of each engine, `xpyd logs ROLE` its log",
    ),
    (
        &["attach", "resume"],
        "`xpyd up` attaches to engines that an earlier xpyd left",
    ),
    (
        &["upgrade", "update"],
        "`xpyd down --keep-engines`, then `xpyd up` of the new version, upgrades xpyd while engines run",
    ),
    (
        &["simulate", "mock", "fake"],
        "`xpyd up --engine sim` starts a fleet of simulated engines, `xpyd sim` a single one",
    ),
    (
        &["completion", "complete"],
        "`xpyd completions bash` prints them; other shells work alike",
    ),
];

/// The failure for a word that is not a command of xpyd.
pub(super) fn unknown_command(error: &clap::Error) -> Option<Failure> {
    let (ErrorKind::InvalidSubcommand, Some(ContextValue::String(word))) =
        (error.kind(), error.get(ContextKind::InvalidSubcommand))
    else {
        return None;
    };
    // An unknown word after `xpyd profiles` and others gets clap's own list. The usage is `Usage: xpyd [OPTIONS] <COMMAND>`,
    // but the program's file can have any name.
    let usage = error.get(ContextKind::Usage)?.to_string();
    let usage = anstream::adapter::strip_str(&usage).to_string();
    if !usage.split_whitespace().nth(2)?.starts_with('[') {
        return None;
    }
    let failure = Failure::message(ExitStatus::Usage, format!("unknown command `{word}`"));
    Some(match meant(word) {
        Some(tip) => failure.hint(tip),
        None => failure.hint("`xpyd --help` lists the commands"),
    })
}

/// The suggested command for `word`.
fn meant(word: &str) -> Option<String> {
    let lower = word.to_lowercase();
    let habit = WORDS.iter().find(|(words, _)| words.contains(&lower.as_str()));
    if let Some((_, tip)) = habit {
        return Some((*tip).to_owned());
    }
    let command = Cli::command();
    let shown = command.get_subcommands().filter(|command| !command.is_hide_set());
    let nearest = shown
        .map(|command| {
            (
                strsim::normalized_damerau_levenshtein(command.get_name(), &lower),
                command.get_name(),
            )
        })
        .filter(|(likeness, _)| *likeness >= 0.5)
        // The first one of equally similar candidates.
        .min_by(|left, right| right.0.total_cmp(&left.0));
    nearest.map(|(_, name)| format!("did you mean `xpyd {name}`?"))
}

/// Removes internal flags and commands from the suggestions.
pub(super) fn hide_internals(error: &mut clap::Error) {
    let command = Cli::command();
    let verbs = || command.get_subcommands();
    let hidden_flags = verbs()
        .flat_map(clap::Command::get_arguments)
        .filter(|flag| flag.is_hide_set());
    let mut hidden: Vec<String> = hidden_flags
        .filter_map(|flag| Some(format!("--{}", flag.get_long()?)))
        .collect();
    hidden.extend(
        verbs()
            .filter(|verb| verb.is_hide_set())
            .map(|verb| verb.get_name().to_owned()),
    );
    for kind in [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand] {
        let names_internal = match error.get(kind) {
            Some(ContextValue::String(one)) => hidden.contains(one),
            Some(ContextValue::Strings(several)) => several.iter().any(|one| hidden.contains(one)),
            _ => false,
        };
        if names_internal {
            error.remove(kind);
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    fn told(line: &[&str]) -> String {
        let words = std::iter::once("xpyd").chain(line.iter().copied());
        let mut error = Cli::try_parse_from(words).map(drop).expect_err("no command");
        hide_internals(&mut error);
        unknown_command(&error).map_or_else(|| error.render().to_string(), |failure| failure.to_string())
    }

    #[test]
    fn words_of_other_tools_suggest_a_command() {
        for (word, command) in [
            ("stop", "`xpyd down`"),
            ("serve", "`xpyd up`"),
            ("RUN", "`xpyd up`"),
            ("ls", "`xpyd ps`"),
            ("init", "profiles show"),
            ("config", "profiles show"),
            ("version", "`xpyd --version`"),
            ("pu", "did you mean `xpyd up`?"),
            ("statsu", "did you mean `xpyd status`?"),
            ("dwon", "did you mean `xpyd down`?"),
            ("benhc", "did you mean `xpyd bench`?"),
        ] {
            let told = told(&[word]);
            assert!(told.contains(&format!("unknown command `{word}`")), "{told}");
            assert!(told.contains(command), "{word}: {told}");
        }
        let told = told(&["xylophone"]);
        assert!(
            told.contains("`xpyd --help`") && !told.contains("did you mean"),
            "{told}"
        );
    }

    #[test]
    fn a_renamed_program_has_the_same_suggestions() {
        let error = Cli::try_parse_from(["/opt/xpyd-0.1", "stop"]).expect_err("no command");
        let failure = unknown_command(&error).expect("a suggestion");
        assert!(failure.to_string().contains("`xpyd down`"), "{failure}");
    }

    #[test]
    fn every_suggestion_exists() {
        let command = Cli::command();
        let shown: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).collect();
        for (words, tip) in WORDS {
            let verb = tip
                .split("\u{60}xpyd ")
                .nth(1)
                .and_then(|rest| rest.split([' ', '`']).next());
            let verb = verb.expect("a command");
            assert!(verb == "--version" || shown.contains(&verb), "{tip}");
            assert!(words.iter().all(|word| !shown.contains(word)), "{words:?}");
        }
    }

    #[test]
    fn internal_commands_are_never_suggested() {
        for line in [
            &["gaurdian"][..],
            &["companio"],
            &["sim-lmcach"],
            &["up", "--detached-chil"],
            &["up", "--ends-wit"],
        ] {
            let told = told(line);
            for internal in ["`shim`", "sidecar", "sim-lmcache", "--detached-child", "--ends-with"] {
                let suggested = told.replace(line.last().expect("a word"), "");
                assert!(!suggested.contains(internal), "{line:?}: {told}");
            }
        }
        // clap itself reports the subcommands of a command.
        assert!(told(&["profiles", "sho"]).contains("show"));
    }
}
