//! What the README says is so.

use std::process::Output;

use crate::support::Place;

fn readme() -> &'static str {
    include_str!("../../README.md")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn its_profile_is_a_good_one() {
    let toml = readme()
        .split("```toml\n")
        .nth(1)
        .and_then(|rest| rest.split("```").next())
        .expect("a TOML block");
    let place = Place::new();
    std::fs::write(place.path().join("my.toml"), toml).expect("a file");
    let output = place.run(&["profiles", "validate", "my.toml"]);
    assert!(output.status.success(), "{}", text(&output));
    let output = place.run(&["plan", "--profile", "./my.toml", "--engine", "sim"]);
    assert!(
        output.status.success() && text(&output).contains("decoder3"),
        "{}",
        text(&output)
    );
}

#[test]
fn it_names_every_shipped_profile() {
    let place = Place::new();
    let list = text(&place.run(&["profiles", "list"]));
    let names: Vec<&str> = list
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert!(names.contains(&"2p2d"), "{list}");
    for name in names {
        assert!(readme().contains(&format!("`{name}`")), "`{name}` is not in the README");
    }
}

#[test]
fn its_commands_are_commands() {
    let place = Place::new();
    // What stands between backticks, and in indented blocks.
    let quoted = readme().lines().flat_map(|line| line.split('`').skip(1).step_by(2));
    let blocks = readme().lines().filter(|line| line.starts_with("    "));
    let words = quoted
        .chain(blocks)
        .filter_map(|piece| piece.trim().strip_prefix("xpyd "));
    let mut seen = 0;
    for verb in words
        .filter_map(|rest| rest.split_whitespace().next())
        .filter(|verb| verb.starts_with(char::is_lowercase))
    {
        let output = place.run(&[verb, "--help"]);
        assert!(
            output.status.success(),
            "`xpyd {verb}` is in the README: {}",
            text(&output)
        );
        seen += 1;
    }
    assert!(seen > 10, "only {seen} commands were found");
}

#[test]
fn its_exit_codes_are_those_of_the_help() {
    let help = text(&Place::new().run(&["--help"]));
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    let (_, listed) = help.split_once("Exit codes: ").expect("the list");
    let listed = listed.trim_end_matches('.').split(", ");
    let listed: Vec<(&str, &str)> = listed.map(|item| item.split_once(' ').expect("a code")).collect();
    let (_, table) = readme()
        .split_once("| Exit code | Meaning |\n|---|---|\n")
        .expect("the table");
    let rows = table
        .lines()
        .map_while(|line| line.strip_prefix("| ")?.strip_suffix(" |")?.split_once(" | "));
    let rows: Vec<(&str, &str)> = rows.collect();
    assert_eq!(rows.len(), listed.len(), "{rows:?} {listed:?}");
    for ((code, meaning), (listed_code, listed_meaning)) in rows.into_iter().zip(listed) {
        assert!(
            code == listed_code && meaning.starts_with(listed_meaning),
            "{code} {meaning} is {listed_code} {listed_meaning} in the help"
        );
    }
}

#[test]
fn completions_are_made_for_the_shells_it_names() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish"] {
        let output = place.run(&["completions", shell]);
        assert!(output.status.success() && text(&output).contains("profiles"), "{shell}");
    }
}
