//! What the plan says to engines, against what the installed vLLM understands: options, connectors, and what both roles must
//! have in common.

use std::collections::BTreeSet;

use super::{Finding, Level, compatibility, finding};
use crate::connector::Connector;
use crate::engine::vllm;
use crate::fleet::Role;
use crate::machine::{Environment, Version};
use crate::plan::{EngineSpec, Plan};

/// Options without which the sources have not been found: what they do not hold then says nothing.
const SURE: [&str; 3] = ["--max-model-len", "--port", "--served-model-name"];

/// Options that one role has and the other lacks make a hand-off fail or lie: NIXL compares a hash of most of them only when
/// the first request comes (`kv_connector/v1/nixl/metadata.py` of vLLM 0.32).
const COMMON: [&[&str]; 4] = [
    &["--dtype"],
    &["--kv-cache-dtype"],
    &["--speculative-config"],
    &["--attention-backend"],
];

/// Options of the plan that the installed vLLM does not have: it would say so after half a minute of imports, and end.
pub(super) fn unknown(plan: &Plan, environment: &Environment, vllm: Option<&Version>) -> Vec<Finding> {
    let known = &environment.options;
    if !SURE.iter().all(|option| known.contains(*option)) {
        return Vec::new();
    }
    let mut seen = BTreeSet::new();
    let mut findings = Vec::new();
    for engine in &plan.engines {
        for option in given(engine) {
            if is_known(option, known) || !seen.insert(option) {
                continue;
            }
            let version = vllm.map(|version| format!(" {version}")).unwrap_or_default();
            let message = format!(
                "vLLM{version} has no option `{option}`, and {} would end at once",
                engine.id
            );
            findings.push(finding("options", Level::Fail, message, Some(&advice(option, known))));
        }
    }
    if findings.is_empty() {
        let message = "vLLM knows every option of the plan".to_owned();
        findings.push(finding("options", Level::Pass, message, None));
    }
    findings
}

/// The options on an engine's command line. A word that begins with `-` and a digit is a value.
fn given(engine: &EngineSpec) -> impl Iterator<Item = &str> {
    // What stands before `serve` belongs to the program that starts the companion.
    let start = engine
        .argv
        .iter()
        .position(|word| word == "serve")
        .map_or(0, |index| index + 1);
    engine.argv[start..].iter().filter_map(|word| {
        let is_option = word.starts_with("--") && word.len() > 2
            || word.starts_with('-') && word.chars().nth(1).is_some_and(char::is_alphabetic);
        is_option.then(|| word.split_once('=').map_or(word.as_str(), |(name, _)| name))
    })
}

/// As vLLM's parser reads it: `_` is `-`, `--no-…` turns a switch off, `--a.b` is a part of `--a`, a beginning that fits is
/// enough, and `-O3` needs no space (`utils/argparse_utils.py` of vLLM 0.32).
fn is_known(option: &str, known: &BTreeSet<String>) -> bool {
    let normal = option.replace('_', "-");
    let name = normal.split('.').next().unwrap_or_default();
    let positive = name.strip_prefix("--no-").map(|rest| format!("--{rest}"));
    let fits = |name: &str| {
        let beginning = known.range(name.to_owned()..).next();
        known.contains(name) || (name.starts_with("--") && beginning.is_some_and(|known| known.starts_with(name)))
    };
    fits(name) || positive.is_some_and(|name| fits(&name)) || normal.starts_with("-O") || name == "-cc"
}

fn advice(option: &str, known: &BTreeSet<String>) -> String {
    const CLOSE: f64 = 0.75;
    let normal = option.replace('_', "-");
    if let Some(instead) = compatibility::instead(&normal) {
        return format!("{instead} (profiles say options in `vllm.args`, `prefill.args` and `decode.args`)");
    }
    let likeness = |name: &&String| strsim::normalized_damerau_levenshtein(name, &normal);
    let closest = known
        .iter()
        .max_by(|one, other| likeness(one).total_cmp(&likeness(other)));
    match closest.filter(|name| likeness(name) >= CLOSE) {
        Some(name) => format!("did you mean `{name}`? Options are in `vllm.args`, `prefill.args` and `decode.args`"),
        None => {
            "take it out of `vllm.args`, `prefill.args` or `decode.args`; `vllm serve --help=all` lists what there is"
                .to_owned()
        }
    }
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

/// Options that both roles must have alike.
pub(super) fn different(plan: &Plan) -> Vec<Finding> {
    let value = |role: Role, names: &[&str]| {
        let engine = plan.engines_of(role).next();
        engine
            .and_then(|engine| vllm::option(&engine.argv, names))
            .map(str::to_owned)
    };
    let differs = COMMON.iter().filter_map(|names| {
        let (prefill, decode) = (value(Role::Prefill, names), value(Role::Decode, names));
        (prefill != decode).then(|| {
            // A default may be the very value that the other role names.
            let (level, then) = match (&prefill, &decode) {
                (Some(_), Some(_)) => (Level::Fail, "no hand-off can work"),
                _ => (Level::Warn, "no hand-off works unless that is the default"),
            };
            let shown = |value: Option<String>| value.map_or("the default".to_owned(), |value| format!("`{value}`"));
            let message = format!(
                "prefill engines have {} for `{}`, and decode engines {}: {then}",
                shown(prefill),
                names[0],
                shown(decode)
            );
            let hint = "say it once, in `vllm.args`, instead of in `prefill.args` or `decode.args`";
            finding("roles", level, message, Some(hint))
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

    fn known() -> BTreeSet<String> {
        let names = [
            "--max-model-len",
            "--port",
            "--served-model-name",
            "--enforce-eager",
            "--compilation-config",
            "-tp",
            "--gpu-memory-utilization",
        ];
        names.map(str::to_owned).into()
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
            assert!(is_known(option, &known()), "{option}");
        }
        for option in ["--max-model-length", "--disable-log-requests", "-xx", "--no-such"] {
            assert!(!is_known(option, &known()), "{option}");
        }
    }

    #[test]
    fn an_option_that_is_not_there_is_replaced_or_corrected() {
        assert!(advice("--disable_log_requests", &known()).contains("--enable-log-requests"));
        assert!(advice("--max-model-lenn", &known()).contains("did you mean `--max-model-len`"));
        assert!(advice("--something-else-altogether", &known()).contains("take it out"));
    }
}
