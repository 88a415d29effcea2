//! README and docs/ are true: profiles are valid, commands work, links have targets, and tables match the program.

use std::collections::BTreeMap;
use std::process::Output;

use clap::Parser as _;

use crate::support::TestEnv;

const README: &str = include_str!("../../../README.md");
const CONFIGURATION: &str = include_str!("../../../docs/configuration.md");
const OPERATIONS: &str = include_str!("../../../docs/operations.md");

/// The pages whose commands a reader types, by name.
const PAGES: [(&str, &str); 7] = [
    ("README.md", README),
    ("configuration.md", CONFIGURATION),
    ("operations.md", OPERATIONS),
    ("benchmark.md", include_str!("../../../docs/benchmark.md")),
    ("api.md", include_str!("../../../docs/api.md")),
    ("connectors.md", include_str!("../../../docs/connectors.md")),
    ("cluster.md", include_str!("../../../docs/cluster.md")),
];

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// The TOML blocks of a page. Blocks that do not extend a profile are parts of one.
fn toml_blocks(page: &str) -> Vec<String> {
    let blocks = page.split("```toml\n").skip(1);
    let blocks = blocks.map(|rest| rest.split("```").next().expect("an end"));
    let whole = |block: &str| {
        if block.contains("extends = ") {
            block.to_owned()
        } else {
            format!("extends = \"2p2d\"\n{block}")
        }
    };
    blocks.map(whole).collect()
}

/// A test environment with the README's profile in `my.toml`.
fn readme_env() -> TestEnv {
    let env = TestEnv::new();
    std::fs::write(env.path().join("my.toml"), &toml_blocks(README)[0]).expect("a file");
    env
}

/// The xpyd commands on a page, in order, as words without comments. A line that ends in `\` continues.
fn documented_commands(page: &str) -> Vec<Vec<String>> {
    let text = page.replace("\\\n", " ");
    let commands = text.lines().filter_map(|line| line.strip_prefix("    xpyd "));
    let words = commands.map(|line| line.split(" #").next().unwrap_or_default().split_whitespace());
    words.map(|words| words.map(str::to_owned).collect()).collect()
}

#[test]
fn documented_profiles_are_valid() {
    let env = readme_env();
    let toml_blocks = [toml_blocks(README), toml_blocks(CONFIGURATION)].concat();
    assert!(toml_blocks.len() > 5, "{} blocks", toml_blocks.len());
    for (number, toml) in toml_blocks.iter().enumerate() {
        let file = format!("{number}.toml");
        std::fs::write(env.path().join(&file), toml).expect("a file");
        let output = env.run(&["profiles", "validate", &file]);
        assert!(output.status.success(), "{toml}\n{}", text(&output));
    }
    let output = env.run(&["plan", "--profile", "./my.toml", "--engine", "sim"]);
    assert!(
        output.status.success() && text(&output).contains("decoder3"),
        "{}",
        text(&output)
    );
}

#[test]
fn the_readme_profile_runs_on_simulated_engines() {
    let env = readme_env();
    let mut run = env.up(&["--profile", "./my.toml"]);
    run.wait_until_ready();
    let log = env.log("decoder3.log");
    assert!(
        log.contains("these options change nothing here: --max-num-seqs"),
        "{log}"
    );
}

/// A documented command changed for the test machine: simulated engines, free ports, and a limited run time.
fn adapted_command(env: &TestEnv, words: &[String]) -> Vec<String> {
    let mut words = words.to_vec();
    let before = words.iter().position(|word| word == "--").unwrap_or(words.len());
    let insert = |words: &mut Vec<String>, more: &[&str]| {
        words.splice(before..before, more.iter().map(|&word| word.to_owned()));
    };
    let offset = format!("port_offset={}", env.offset);
    match words[0].as_str() {
        "up" => insert(&mut words, &["--dry-run", "--engine", "sim", "--set", &offset]),
        "plan" => insert(&mut words, &["--engine", "sim", "--set", &offset]),
        "bench" => insert(&mut words, &["--num-prompts", "2"]),
        _ => {}
    }
    words.retain(|word| word != "-f");
    if let Some(port) = words.iter().position(|word| word == "--port") {
        words[port + 1] = env.proxy_port().to_string();
    }
    words
}

#[test]
fn documented_commands_work_in_order() {
    let env = readme_env();
    let arguments = env.up_arguments(&["-d"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let output = env.run(&arguments);
    assert!(output.status.success(), "{}", text(&output));
    let mut done = 0;
    let all: Vec<Vec<String>> = PAGES.iter().flat_map(|(_, page)| documented_commands(page)).collect();
    // A proxy for engines on other machines runs for ever. The others need Slurm.
    let needs_more =
        |words: &[String]| words[0] == "proxy" || words[0] == "slurm" || words.contains(&"--job".to_owned());
    for line in all.iter().filter(|words| !needs_more(words)) {
        let words = adapted_command(&env, line);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let output = env.run(&words);
        assert!(output.status.success(), "{words:?}: {}", text(&output));
        done += 1;
        // The commands after it need no fleet, or another one.
        if words[0] == "down" {
            let output = env.run(&arguments);
            assert!(output.status.success(), "{}", text(&output));
        }
    }
    assert!(done > 20, "only {done} commands");
    let output = env.run(&["down"]);
    assert!(output.status.success(), "{}", text(&output));
    for line in all {
        let words = [vec!["xpyd".to_owned()], line.clone()].concat();
        let parsed = xpyd::cli::Cli::try_parse_from(&words);
        assert!(parsed.is_ok() || words[1] == "bench", "{line:?}: {:?}", parsed.err());
    }
}

#[test]
fn the_readme_names_every_shipped_profile() {
    let env = TestEnv::new();
    let list = text(&env.run(&["profiles", "list"]));
    let names: Vec<&str> = list
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert!(names.contains(&"2p2d"), "{list}");
    for name in names {
        assert!(README.contains(&format!("`{name}`")), "`{name}` is not in the README");
    }
}

#[test]
fn every_documented_command_exists() {
    let env = TestEnv::new();
    let mut verbs = BTreeMap::new();
    for (name, page) in PAGES {
        // Commands in backticks and in indented blocks.
        let quoted = page.lines().flat_map(|line| line.split('`').skip(1).step_by(2));
        let blocks = page.lines().filter(|line| line.starts_with("    "));
        let commands = quoted
            .chain(blocks)
            .filter_map(|piece| piece.trim().strip_prefix("xpyd "));
        let words = commands.filter_map(|rest| rest.split_whitespace().next());
        verbs.extend(
            words
                .filter(|verb| verb.starts_with(char::is_lowercase))
                .map(|verb| (verb, name)),
        );
    }
    assert!(verbs.len() > 10, "only {verbs:?}");
    for (verb, page) in verbs {
        let output = env.run(&[verb, "--help"]);
        assert!(output.status.success(), "`xpyd {verb}` is in {page}: {}", text(&output));
    }
}

#[test]
fn links_point_to_files() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut seen = 0;
    for (name, page) in PAGES {
        let folder = if name == "README.md" {
            root.to_owned()
        } else {
            root.join("docs")
        };
        for link in page.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap_or_default();
            if file.is_empty() || link.contains("://") {
                continue;
            }
            assert!(folder.join(file).exists(), "{name} links to `{link}`");
            seen += 1;
        }
    }
    assert!(seen > 12, "only {seen} links");
}

#[test]
fn completions_exist_for_the_documented_shells() {
    let env = TestEnv::new();
    for shell in ["bash", "zsh", "fish"] {
        let output = env.run(&["completions", shell]);
        let script = text(&output);
        assert!(output.status.success() && script.contains("profiles"), "{shell}");
        assert!(README.contains(shell), "the README does not name {shell}");
        // Commands that only xpyd itself runs.
        assert!(!script.contains("shim") && !script.contains("sim-lmcache"), "{shell}");
    }
}
