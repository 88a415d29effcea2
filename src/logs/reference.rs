//! `docs/troubleshooting.md`: the known failures of engines, written from `hints.toml`.

use std::fmt::Write as _;
use std::path::Path;

use super::hints;

const HEAD: &str = "\
# Troubleshooting

| Question | Command |
|---|---|
| Can this machine run the profile? | `xpyd doctor --profile NAME` |
| What would xpyd start? | `xpyd plan --profile NAME` |
| Which runs are there, and in which state? | `xpyd ps`, `xpyd status` |
| What does an engine say? | `xpyd logs decoder1 --tail 50` |
| What do all engines say about a word? | `xpyd logs --since 10m --grep error -i` |
| Did a killed run leave something? | `xpyd doctor --fix` for files, `xpyd doctor --reap` for processes |
| How do I report a problem? | `xpyd bundle` packs logs, plan and findings, without secrets |

When an engine fails, xpyd prints the first real error of its log, and the entry of this list that fits. The list is generated from
`src/logs/hints.toml`: `XPYD_UPDATE_DOCS=1 cargo test --lib logs::reference` writes it, and a test compares it with the program. The
title of an entry is what xpyd prints; **Log** is a regular expression for the line of the log.
";

/// The headings of `hints.toml`, each with the names of its entries.
fn groups() -> Vec<(&'static str, Vec<&'static str>)> {
    let mut groups = Vec::new();
    for line in include_str!("hints.toml").lines() {
        if let Some(title) = line.strip_prefix("# --- ").and_then(|rest| rest.strip_suffix(" ---")) {
            groups.push((title, Vec::new()));
        } else if let Some(name) = line.strip_prefix("name = ") {
            let (_, names): &mut (&str, Vec<&str>) = groups.last_mut().expect("entries stand below a heading");
            names.push(name.trim_matches('"'));
        }
    }
    groups
}

fn render() -> String {
    let mut text = HEAD.to_owned();
    for (title, names) in groups() {
        let title = title.split(':').next().unwrap_or(title);
        write!(text, "\n## {title}\n").expect("a string takes all");
        for name in names {
            let hint = hints().iter().find(|hint| hint.name == name).expect("an entry");
            write!(text, "\n### {}\n\n", hint.title).expect("a string takes all");
            if let Some(pattern) = &hint.pattern {
                writeln!(text, "**Log:** `` {pattern} ``\n").expect("a string takes all");
            }
            let explanation = sentence(&hint.explanation);
            let fix = sentence(&hint.fix);
            writeln!(text, "{explanation} **Fix:** {fix} [More]({})", hint.link).expect("a string takes all");
        }
    }
    text
}

/// With a capital at its start and a full stop at its end.
fn sentence(fragment: &str) -> String {
    let mut letters = fragment.chars();
    let first: String = letters
        .next()
        .map(|first| first.to_uppercase().collect())
        .unwrap_or_default();
    format!("{first}{}.", letters.as_str().trim_end_matches('.'))
}

#[test]
fn the_page_lists_every_known_failure() {
    assert_eq!(
        groups().iter().map(|(_, names)| names.len()).sum::<usize>(),
        hints().len()
    );
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/troubleshooting.md");
    if std::env::var_os("XPYD_UPDATE_DOCS").is_some() {
        fs_err::write(&path, render()).expect("the page can be written");
    }
    let written = fs_err::read_to_string(&path).expect("the page is there");
    assert!(
        written == render(),
        "docs/troubleshooting.md is not what hints.toml says: run `XPYD_UPDATE_DOCS=1 cargo test --lib logs::reference`"
    );
}
