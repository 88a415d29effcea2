//! What the plan says to engines, against what the installed vLLM understands: options, connectors, and what both roles must
//! have in common.

use std::collections::BTreeSet;

use super::{Finding, Level, compatibility, finding};
use crate::connector::Connector;
use crate::engine::arguments::{self, Given};
use crate::engine::vllm;
use crate::fleet::Role;
use crate::machine::{Environment, Version};
use crate::plan::{EngineSpec, Objection, Plan};

/// Options without which the sources have not been found: what they do not hold then says nothing.
const SURE: [&str; 3] = ["--max-model-len", "--port", "--served-model-name"];

/// Options that one role has and the other lacks make a hand-off fail or lie: NIXL compares a hash of most of them only when
/// the first request comes (`kv_connector/v1/nixl/metadata.py` of vLLM 0.32).
const COMMON: [&str; 6] = [
    "--dtype",
    "--kv-cache-dtype",
    "--block-size",
    "--speculative-config",
    "--attention-backend",
    "--disable-hybrid-kv-cache-manager",
];

/// The variable with the layout of KV, which both roles must have alike, too.
const LAYOUT: &str = "VLLM_KV_CACHE_LAYOUT";

/// What the profile gives engines although xpyd decides it.
pub(super) fn decided(plan: &Plan) -> Vec<Finding> {
    let finding = |objection: &Objection| {
        let then = if objection.is_fatal { "" } else { "; yours holds" };
        let message = format!("{}: {}{then}", objection.given, objection.why);
        let level = if objection.is_fatal { Level::Fail } else { Level::Warn };
        finding("decided", level, message, Some(&objection.instead))
    };
    let ranks = pipeline(plan).into_iter();
    plan.objections.iter().map(finding).chain(ranks).collect()
}

/// Ranks over which no hand-off is known to go (`nixl/connector.py`, `nixl/base_worker.py` of vLLM 0.32).
fn pipeline(plan: &Plan) -> Option<Finding> {
    const STAGES: [&str; 2] = ["--pipeline-parallel-size", "--prefill-context-parallel-size"];
    let has_stages = |engine: &&EngineSpec| {
        let args = vllm::own_arguments(&engine.argv);
        let number = |name| arguments::value(args, name).and_then(|value| value.parse().ok());
        STAGES.iter().any(|name| number(name).unwrap_or(1) > 1)
    };
    let with_stages = plan.engines.iter().filter(has_stages);
    let mut bad = with_stages.filter(|engine| engine.role == Role::Decode || plan.connector.notifies());
    let engine = bad.next()?;
    let (level, who) = if plan.connector.notifies() {
        (Level::Fail, "LMCache hands over rank to rank")
    } else {
        (
            Level::Warn,
            "NIXL takes pipeline stages and context ranks on prefill engines only",
        )
    };
    let message = format!("{} has pipeline stages or context ranks: {who}", engine.id);
    let hint = "use `tensor_parallel` or `--data-parallel-size` instead";
    Some(finding("ranks", level, message, Some(hint)))
}

/// Options of the plan that the installed vLLM does not have: it would say so after half a minute of imports, and end.
pub(super) fn unknown(plan: &Plan, environment: &Environment, vllm: Option<&Version>) -> Vec<Finding> {
    if !SURE.iter().all(|option| environment.options.contains(*option)) {
        return Vec::new();
    }
    let mut seen = BTreeSet::new();
    let mut findings = Vec::new();
    for engine in &plan.engines {
        for option in arguments::read(vllm::own_arguments(&engine.argv)) {
            if is_known(&option, environment) || !seen.insert(option.spelled) {
                continue;
            }
            let version = vllm.map(|version| format!(" {version}")).unwrap_or_default();
            let message = format!(
                "vLLM{version} has no option `{}`, and {} would end at once",
                option.spelled, engine.id
            );
            let hint = advice(option.spelled, environment);
            findings.push(finding("options", Level::Fail, message, Some(&hint)));
        }
    }
    if findings.is_empty() {
        let message = "vLLM knows every option of the plan".to_owned();
        findings.push(finding("options", Level::Pass, message, None));
    }
    findings
}

/// As the installed vLLM's parser reads it; what this xpyd knows of spellings is in `engine::arguments`.
fn is_known(option: &Given<'_>, environment: &Environment) -> bool {
    let known = &environment.options;
    let normal = option.spelled.replace('_', "-");
    let name = normal.split('.').next().unwrap_or_default();
    let fits = |name: &str| {
        let beginning = known.range(name.to_owned()..).next();
        known.contains(name) || (name.starts_with("--") && beginning.is_some_and(|known| known.starts_with(name)))
    };
    let positive = name.strip_prefix("--no-").map(|rest| format!("--{rest}"));
    // `--disable-x` is there where `--enable-x` is, and `--no-disable-x` with it.
    let opposite = [Some(name), positive.as_deref()]
        .into_iter()
        .flatten()
        .find_map(arguments::opposite);
    let opposite = opposite.filter(|_| environment.has_pairs);
    fits(name)
        || positive.as_deref().is_some_and(fits)
        || opposite.is_some_and(|name| fits(&name))
        || normal.starts_with("-O")
        || name == "-cc"
}

fn advice(option: &str, environment: &Environment) -> String {
    const CLOSE: f64 = 0.75;
    let normal = option.replace('_', "-");
    if let Some(instead) = compatibility::instead(&normal) {
        return format!("{instead} (profiles say options in `vllm.args`, `prefill.args` and `decode.args`)");
    }
    // Where switches do not come in pairs, the other one of a pair is what `--no-` does.
    let other = arguments::opposite(&normal).filter(|other| environment.options.contains(other));
    if let Some(other) = other {
        let negated = other.replacen("--", "--no-", 1);
        return format!("with this version it is `{negated}`");
    }
    let likeness = |name: &&String| strsim::normalized_damerau_levenshtein(name, &normal);
    let closest = environment
        .options
        .iter()
        .filter(|name| !says_the_opposite(name, &normal))
        .max_by(|one, other| likeness(one).total_cmp(&likeness(other)));
    match closest.filter(|name| likeness(name) >= CLOSE) {
        Some(name) => format!("did you mean `{name}`? Options are in `vllm.args`, `prefill.args` and `decode.args`"),
        None => {
            "take it out of `vllm.args`, `prefill.args` or `decode.args`; `vllm serve --help=all` lists what there is"
                .to_owned()
        }
    }
}

/// Whether one of two switches turns on what the other one turns off, by their beginnings.
fn says_the_opposite(one: &str, other: &str) -> bool {
    let turns_off = |name: &str| name.starts_with("--disable-") || name.starts_with("--no-");
    turns_off(one) != turns_off(other)
}

/// The plan's connectors that the installed vLLM has removed, or does not have yet.
pub(super) fn unregistered(plan: &Plan, environment: &Environment, vllm: Option<&Version>) -> Option<Finding> {
    if environment.connectors.is_empty() {
        return None;
    }
    let needed: &[&str] = match plan.connector {
        Connector::Nixl(_) => &["NixlConnector"],
        Connector::LmCache(_) => &["LMCacheConnectorV1"],
        Connector::LmCacheMp(_) => &["MultiConnector", "NixlConnector", "LMCacheMPConnector"],
    };
    let missing: Vec<&str> = needed
        .iter()
        .filter(|name| !environment.connectors.contains(**name))
        .copied()
        .collect();
    (!missing.is_empty()).then(|| {
        let version = vllm.map(|version| format!(" {version}")).unwrap_or_default();
        let message = format!("vLLM{version} has no {}", missing.join(" and no "));
        let hint = match plan.connector {
            Connector::Nixl(_) => "upgrade vLLM in its environment: `pip install -U vllm nixl`",
            Connector::LmCache(_) | Connector::LmCacheMp(_) => "`--connector nixl`, or another version of vLLM",
        };
        finding("connector", Level::Fail, message, Some(hint))
    })
}

/// Options and variables that both roles must have alike.
pub(super) fn different(plan: &Plan) -> Vec<Finding> {
    let option = |role: Role, name: &str| {
        let engine = plan.engines_of(role).next()?;
        let given = arguments::read(vllm::own_arguments(&engine.argv));
        let given = given.into_iter().rfind(|given| given.name == name)?;
        let switch = if given.is_off() { "no" } else { "yes" };
        Some(given.value().unwrap_or(switch).to_owned())
    };
    let variable = |role: Role| plan.engines_of(role).next()?.env.get(LAYOUT).cloned();
    let both = |value: &dyn Fn(Role) -> Option<String>| (value(Role::Prefill), value(Role::Decode));
    let options = COMMON
        .iter()
        .map(|name| (*name, both(&|role| option(role, name)), "args"));
    let all = options.chain([(LAYOUT, both(&variable), "env")]);
    let differs = all.filter_map(|(name, (prefill, decode), place)| {
        (prefill != decode).then(|| {
            // A default may be the very value that the other role names.
            let (level, then) = match (&prefill, &decode) {
                (Some(_), Some(_)) => (Level::Fail, "no hand-off can work"),
                _ => (Level::Warn, "no hand-off works unless that is the default"),
            };
            let shown = |value: Option<String>| value.map_or("the default".to_owned(), |value| format!("`{value}`"));
            let message = format!(
                "prefill engines have {} for `{name}`, and decode engines {}: {then}",
                shown(prefill),
                shown(decode)
            );
            let hint = format!("say it once, in `vllm.{place}`, instead of in `prefill.{place}` or `decode.{place}`");
            finding("roles", level, message, Some(&hint))
        })
    });
    differs.collect()
}

/// Engines hash prompts; with Python's own random seed none finds what another has made.
pub(super) fn hash_seed(plan: &Plan) -> Option<Finding> {
    const NAME: &str = "PYTHONHASHSEED";
    let seeds: BTreeSet<&str> = plan
        .engines
        .iter()
        .map(|engine| engine.env.get(NAME).map_or("random", String::as_str))
        .collect();
    let is_random = seeds.contains("random");
    if seeds.len() == 1 && !is_random {
        return None;
    }
    let message = if is_random {
        format!("{NAME} is not set to a number: engines hash the same prompt differently")
    } else {
        let seeds: Vec<&str> = seeds.into_iter().collect();
        format!(
            "{NAME} differs between engines ({}): they hash the same prompt differently",
            seeds.join(", ")
        )
    };
    // LMCache finds KV by such hashes; NIXL sends parameters.
    let level = match plan.connector {
        Connector::Nixl(_) => Level::Warn,
        Connector::LmCache(_) | Connector::LmCacheMp(_) => Level::Fail,
    };
    let hint = "take it out of `vllm.env`, `prefill.env` and `decode.env`: xpyd sets it to 0 for all engines";
    Some(finding("hash_seed", level, message, Some(hint)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(has_pairs: bool) -> Environment {
        let names = [
            "--max-model-len",
            "--port",
            "--served-model-name",
            "--enforce-eager",
            "--compilation-config",
            "-tp",
            "--gpu-memory-utilization",
            "--enable-prefix-caching",
            "--enable-log-requests",
            "--disable-hybrid-kv-cache-manager",
        ];
        Environment {
            options: names.map(str::to_owned).into(),
            has_pairs,
            ..Environment::default()
        }
    }

    fn known(option: &str, has_pairs: bool) -> bool {
        let args = [option.to_owned()];
        is_known(&arguments::read(&args)[0], &environment(has_pairs))
    }

    #[test]
    fn options_are_known_in_every_spelling_that_vllm_takes() {
        for option in [
            "--max-model-len",
            "--max_model_len",
            "--no-enforce-eager",
            "--compilation-config.mode",
            "-O3",
            "-O",
            "-tp",
            "--gpu-memory-util",
        ] {
            assert!(known(option, false), "{option}");
        }
        for option in ["--max-model-length", "--disable-log-requests", "-xx", "--no-such"] {
            assert!(!known(option, false), "{option}");
        }
    }

    #[test]
    fn switches_come_in_pairs_where_the_installed_vllm_has_them() {
        for option in [
            "--disable-prefix-caching",
            "--disable_prefix_caching",
            "--disable-log-requests",
            "--enable-hybrid-kv-cache-manager",
            "--no-disable-prefix-caching",
        ] {
            assert!(known(option, true) && !known(option, false), "{option}");
        }
        assert!(!known("--disable-such", true));
    }

    #[test]
    fn an_option_that_is_not_there_is_replaced_or_corrected() {
        let advice = |option: &str| advice(option, &environment(false));
        assert!(advice("--disable_log_requests").contains("--enable-log-requests"));
        assert!(advice("--max-model-lenn").contains("did you mean `--max-model-len`"));
        assert!(advice("--something-else-altogether").contains("take it out"));
    }

    #[test]
    fn no_advice_says_the_opposite_of_what_was_asked() {
        let advice = |option: &str| advice(option, &environment(false));
        assert_eq!(
            advice("--disable-prefix-caching"),
            "with this version it is `--no-enable-prefix-caching`"
        );
        assert_eq!(
            advice("--enable-hybrid-kv-cache-manager"),
            "with this version it is `--no-disable-hybrid-kv-cache-manager`"
        );
        for option in [
            "--disable-prefix-cachin",
            "--no-enable-prefix-cachin",
            "--disable-prefix-cache",
        ] {
            assert!(
                !advice(option).contains("`--enable-prefix-caching`"),
                "{}",
                advice(option)
            );
        }
    }
}
