//! Incompatible versions and removed options: the entries of `compatibility.toml`.

use std::sync::LazyLock;

use serde::Deserialize;

use super::{Finding, Level, finding};
use crate::machine::{Installation, Version};
use crate::plan::Plan;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CompatibilityRules {
    rule: Vec<Rule>,
    option: Vec<RemovedOption>,
}

/// Versions of a package with a known problem. The file explains the keys.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    name: String,
    package: String,
    from: Option<String>,
    below: Option<String>,
    /// The plan's connectors; empty: only without a plan.
    connectors: Option<Vec<String>>,
    /// Other packages that must be installed as well, in these versions.
    #[serde(default)]
    with: Vec<OtherPackage>,
    level: RuleLevel,
    message: String,
    hint: String,
}

/// Versions of another package that a rule requires as well.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct OtherPackage {
    package: String,
    from: Option<String>,
    below: Option<String>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RuleLevel {
    Warn,
    Fail,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RemovedOption {
    name: String,
    instead: String,
}

static RULES: LazyLock<CompatibilityRules> = LazyLock::new(|| {
    toml::from_str(include_str!("compatibility.toml")).expect("the file is part of the program and a test reads it")
});

/// The rules that apply to the installed versions.
pub(super) fn check(plan: Option<&Plan>, engine: &Installation) -> Vec<Finding> {
    let fits = |rule: &&Rule| {
        let connector = plan.map_or("", |plan| plan.connector.name());
        let is_there = |with: &OtherPackage| {
            let version = version(engine, &with.package);
            version.is_some_and(|version| is_between(&version, with.from.as_ref(), with.below.as_ref()))
        };
        let is_meant = rule.connectors.as_ref().is_none_or(|wanted| match &wanted[..] {
            [] => connector.is_empty(),
            wanted => wanted.iter().any(|wanted| wanted == connector),
        });
        is_meant && rule.with.iter().all(is_there)
    };
    let rules = RULES.rule.iter().filter(fits);
    rules
        .filter_map(|rule| {
            let version = version(engine, &rule.package).filter(|version| rule.applies_to(version))?;
            let level = match rule.level {
                RuleLevel::Warn => Level::Warn,
                RuleLevel::Fail => Level::Fail,
            };
            let other = rule.with.first().and_then(|with| self::version(engine, &with.package));
            let other = other.map(|version| version.text).unwrap_or_default();
            let message = rule
                .message
                .replace("{version}", &version.text)
                .replace("{other}", &other);
            Some(finding(&rule.name, level, message, Some(&rule.hint)))
        })
        .collect()
}

/// What to write instead of a removed option.
pub(super) fn instead(option: &str) -> Option<&'static str> {
    let found = RULES.option.iter().find(|gone| gone.name == option);
    found.map(|gone| gone.instead.as_str())
}

impl Rule {
    fn applies_to(&self, version: &Version) -> bool {
        is_between(version, self.from.as_ref(), self.below.as_ref())
    }
}

fn is_between(version: &Version, from: Option<&String>, below: Option<&String>) -> bool {
    let bound = |text: Option<&String>| text.and_then(|text| Version::parse(text));
    bound(from).is_none_or(|from| version.numbers >= from.numbers)
        && bound(below).is_none_or(|below| version.numbers < below.numbers)
}

fn version(engine: &Installation, package: &str) -> Option<Version> {
    let Installation::Found {
        vllm,
        lmcache,
        nixl,
        environment,
        ..
    } = engine
    else {
        return None;
    };
    match package {
        "vllm" => vllm.clone(),
        "lmcache" => lmcache.clone(),
        "nixl" => nixl.clone(),
        other => environment.packages.get(other).and_then(|text| Version::parse(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_is_valid() {
        for rule in &RULES.rule {
            let with = rule.with.iter().flat_map(|with| [&with.from, &with.below]);
            for bound in [&rule.from, &rule.below].into_iter().chain(with).flatten() {
                assert!(Version::parse(bound).is_some(), "{}: {bound}", rule.name);
            }
            assert!(
                rule.from.is_some() || rule.below.is_some(),
                "{} is about all versions",
                rule.name
            );
            assert!(!rule.message.ends_with('.') && !rule.hint.is_empty(), "{}", rule.name);
        }
        let mut names: Vec<&str> = RULES.option.iter().map(|option| option.name.as_str()).collect();
        assert!(names.iter().all(|name| name.starts_with("--") && !name.contains('_')));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), RULES.option.len(), "an option is there twice");
    }

    #[test]
    fn rules_apply_between_their_bounds() {
        let rule = |from: Option<&str>, below: Option<&str>| Rule {
            name: String::new(),
            package: String::new(),
            from: from.map(str::to_owned),
            below: below.map(str::to_owned),
            connectors: None,
            with: Vec::new(),
            level: RuleLevel::Warn,
            message: String::new(),
            hint: String::new(),
        };
        let about = |rule: &Rule, text| rule.applies_to(&Version::parse(text).expect("a version"));
        let between = rule(Some("0.26"), Some("0.30"));
        assert!(about(&between, "0.26.0") && about(&between, "0.29.9+cu130"));
        assert!(!about(&between, "0.25.9") && !about(&between, "0.30.0"));
    }
}
