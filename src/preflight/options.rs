//! Checks the options of the plan against the installed vLLM, and the options that both roles must share.

use std::collections::BTreeSet;

use super::{Finding, Level, compatibility, finding};
use crate::connector::Connector;
use crate::engine::arguments::{self, GivenOption};
use crate::engine::vllm;
use crate::fleet::Role;
use crate::machine::{PythonEnvironment, Version};
use crate::plan::{EngineSpec, Plan, ReservedOption};

/// Options that every version has. If the sources lack them, the option list is incomplete, and a missing option proves
/// nothing.
const SURE: [&str; 3] = ["--max-model-len", "--port", "--served-model-name"];

/// Options that must be equal in both roles, or a hand-off fails or gives wrong results. NIXL compares a hash of most of
/// them only when the first request arrives (`kv_connector/v1/nixl/metadata.py` of vLLM 0.32).
const COMMON: [&str; 6] = [
    "--dtype",
    "--kv-cache-dtype",
    "--block-size",
    "--speculative-config",
    "--attention-backend",
    "--disable-hybrid-kv-cache-manager",
];

/// The variable with the layout of KV, which must be equal in both roles, too.
const LAYOUT: &str = "VLLM_KV_CACHE_LAYOUT";

/// Options in the profile that xpyd sets itself.
pub(super) fn decided(plan: &Plan) -> Vec<Finding> {
    let finding = |objection: &ReservedOption| {
        let then = if objection.is_fatal { "" } else { "; your value is used" };
        let message = format!("{}: {}{then}", objection.given, objection.why);
        let level = if objection.is_fatal { Level::Fail } else { Level::Warn };
        finding("decided", level, message, Some(&objection.instead))
    };
    let ranks = pipeline(plan).into_iter();
    plan.objections.iter().map(finding).chain(ranks).collect()
}

/// Kinds of ranks for which no hand-off is known to work (`nixl/connector.py`, `nixl/base_worker.py` of vLLM 0.32).
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
        (Level::Fail, "LMCache transfers KV from rank to rank")
    } else {
        (
            Level::Warn,
            "NIXL supports pipeline stages and context ranks on prefill engines only",
        )
    };
    let message = format!("{} has pipeline stages or context ranks: {who}", engine.id);
    let hint = "use `tensor_parallel` or `--data-parallel-size` instead";
    Some(finding("ranks", level, message, Some(hint)))
}

/// Options that the installed vLLM does not have. vLLM itself would report them only after half a minute of imports.
pub(super) fn unknown(plan: &Plan, environment: &PythonEnvironment, vllm: Option<&Version>) -> Vec<Finding> {
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
                "vLLM{version} has no option `{}`, so {} would exit at once",
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

/// Whether the installed vLLM's parser accepts the option. xpyd's own table of spellings is in `engine::arguments`.
fn is_known(option: &GivenOption<'_>, environment: &PythonEnvironment) -> bool {
    let known = &environment.options;
    let normal = option.spelled.replace('_', "-");
    let name = normal.split('.').next().unwrap_or_default();
    let fits = |name: &str| {
        let beginning = known.range(name.to_owned()..).next();
        known.contains(name) || (name.starts_with("--") && beginning.is_some_and(|known| known.starts_with(name)))
    };
    let positive = name.strip_prefix("--no-").map(|rest| format!("--{rest}"));
    // If there is `--enable-x`, there is `--disable-x`, and `--no-disable-x` with it.
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

fn advice(option: &str, environment: &PythonEnvironment) -> String {
    const CLOSE: f64 = 0.75;
    let normal = option.replace('_', "-");
    if let Some(instead) = compatibility::instead(&normal) {
        return format!("{instead} (in profiles: `vllm.args`, `prefill.args` and `decode.args`)");
    }
    // Where switches are not paired, `--no-` does the same as the other one of a pair.
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
            "remove it from `vllm.args`, `prefill.args` or `decode.args`; `vllm serve --help=all` lists all options"
                .to_owned()
        }
    }
}

/// Whether one switch turns on what the other one turns off, judged by their prefixes.
fn says_the_opposite(one: &str, other: &str) -> bool {
    let turns_off = |name: &str| name.starts_with("--disable-") || name.starts_with("--no-");
    turns_off(one) != turns_off(other)
}

/// The plan's connectors that the installed vLLM has removed, or does not have yet.
pub(super) fn unregistered(plan: &Plan, environment: &PythonEnvironment, vllm: Option<&Version>) -> Option<Finding> {
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

/// Options and variables that differ between the roles but must not.
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
            // The default can be the value that the other role sets.
            let (level, then) = match (&prefill, &decode) {
                (Some(_), Some(_)) => (Level::Fail, "KV transfers cannot work"),
                _ => (Level::Warn, "KV transfers only work if that is the default"),
            };
            let shown = |value: Option<String>| value.map_or("the default".to_owned(), |value| format!("`{value}`"));
            let message = format!(
                "prefill engines have {} for `{name}`, and decode engines {}: {then}",
                shown(prefill),
                shown(decode)
            );
            let hint = format!("set it once, in `vllm.{place}`, instead of `prefill.{place}` or `decode.{place}`");
            finding("roles", level, message, Some(&hint))
        })
    });
    differs.collect()
}

/// Engines hash prompts. With Python's random seed, each engine computes other hashes, and none finds another one's KV.
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
    // LMCache finds KV by these hashes; NIXL sends parameters.
    let level = match plan.connector {
        Connector::Nixl(_) => Level::Warn,
        Connector::LmCache(_) | Connector::LmCacheMp(_) => Level::Fail,
    };
    let hint = "remove it from `vllm.env`, `prefill.env` and `decode.env`: xpyd sets it to 0 for all engines";
    Some(finding("hash_seed", level, message, Some(hint)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(has_pairs: bool) -> PythonEnvironment {
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
        PythonEnvironment {
            options: names.map(str::to_owned).into(),
            has_pairs,
            ..PythonEnvironment::default()
        }
    }

    fn known(option: &str, has_pairs: bool) -> bool {
        let args = [option.to_owned()];
        is_known(&arguments::read(&args)[0], &environment(has_pairs))
    }

    #[test]
    fn options_are_known_in_every_spelling() {
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
    fn paired_switches_follow_the_installed_vllm() {
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
    fn a_missing_option_has_a_suggestion() {
        let advice = |option: &str| advice(option, &environment(false));
        assert!(advice("--disable_log_requests").contains("--enable-log-requests"));
        assert!(advice("--max-model-lenn").contains("did you mean `--max-model-len`"));
        assert!(advice("--something-else-altogether").contains("remove it from"));
    }

    #[test]
    fn suggestions_never_invert_a_switch() {
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
