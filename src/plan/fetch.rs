//! Decides whether xpyd downloads the model once before the engines start, so that engines need no access to the hub. PURE.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::engine::{EngineKind, arguments};
use crate::machine::huggingface::{MAIN, MODELSCOPE, is_repository};
use crate::machine::{Machine, huggingface::CacheState};
use crate::profile::Profile;

/// With this variable, `huggingface_hub` and all programs that use it read only the cache.
pub(super) const OFFLINE: &str = "HF_HUB_OFFLINE";

/// The model that xpyd downloads if it is not in the cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ModelFetch {
    /// The repository: `org/model`.
    pub repository: String,
    /// The branch, tag or commit.
    pub revision: String,
}

/// Options that make an engine read something other than the model's own repository, read outside the cache, or run code
/// that xpyd does not know.
const ELSEWHERE: [&str; 24] = [
    "--tokenizer",
    "--tokenizer-revision",
    "--hf-config-path",
    "--code-revision",
    "--speculative-config",
    "--spec-model",
    "--lora-modules",
    "--default-mm-loras",
    "--download-dir",
    "--load-format",
    "--hf-token",
    "--model-loader-extra-config",
    "--trust-remote-code",
    "--config",
    "--generation-config",
    "--io-processor-plugin",
    "--reasoning-parser-plugin",
    "--tool-parser-plugin",
    "--worker-cls",
    "--worker-extension-cls",
    "--scheduler-cls",
    "--middleware",
    "--logits-processors",
    "--model-class-overrides",
];

/// Variables that make an engine read more files after its start: adapters, plugins.
const LATER: [&str; 4] = [
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "VLLM_LORA_RESOLVER_CACHE_DIR",
    "VLLM_LORA_RESOLVER_HF_REPO_LIST",
    "VLLM_PLUGINS",
];

/// The model to download. `None` if the model is not a repository, or if an engine can read from elsewhere: engines then
/// download themselves.
pub(super) fn model(profile: &Profile, machine: &Machine) -> Option<ModelFetch> {
    let is_here = matches!(
        machine.hugging_face.model.state,
        CacheState::Folder | CacheState::BadFolder { .. } | CacheState::GgufFile | CacheState::Elsewhere { .. }
    );
    if profile.engine != EngineKind::Vllm || is_here || !is_repository(&profile.model) {
        return None;
    }
    let roles = [&profile.prefill, &profile.decode];
    let mut args = roles.iter().map(|role| &role.args).chain([&profile.vllm.args]);
    // A role can have its own cache folder, but xpyd only looks at the variables of all engines.
    let shared = shared_env(profile);
    let has_places = roles
        .iter()
        .flat_map(|role| &role.env)
        .any(|(name, _)| name.starts_with("HF_") && !shared.contains_key(name));
    let mut variables = roles.iter().flat_map(|role| &role.env);
    let is_elsewhere = args.any(|args| reads_elsewhere(args))
        || has_places
        || variables.any(|(name, value)| is_later(name, value))
        || shared
            .iter()
            .chain(&machine.inherited)
            .any(|(name, value)| is_later(name, value));
    let revision = |role| profile.argument(role, REVISION).unwrap_or(MAIN);
    if is_elsewhere || revision(&profile.prefill) != revision(&profile.decode) {
        return None;
    }
    Some(ModelFetch {
        repository: profile.model.clone(),
        revision: revision(&profile.prefill).to_owned(),
    })
}

const REVISION: &str = "--revision";

/// Whether these arguments name something else to read, by a known option or by a value that can be a repository.
fn reads_elsewhere(args: &[String]) -> bool {
    arguments::read(args).iter().any(|given| {
        given.fits.iter().any(|name| ELSEWHERE.contains(name))
            || given.values.iter().any(|value| names_repository(value))
    })
}

/// Whether a value is `org/name`, or JSON or a list with such a name.
fn names_repository(value: &str) -> bool {
    let between = |character: char| "\"'{}[]:=, ".contains(character);
    value
        .split(between)
        .any(|word| word.contains('/') && is_repository(word))
}

fn is_later(name: &str, value: &str) -> bool {
    let is_off = ["", "0", "false"].contains(&value.trim().to_ascii_lowercase().as_str());
    (LATER.contains(&name) || name == MODELSCOPE) && !is_off
}

/// The variables that all engines share: those of `[vllm]`, and those that both roles set to the same value.
pub fn shared_env(profile: &Profile) -> BTreeMap<String, String> {
    let mut shared = profile.vllm.env.clone();
    let (prefill, decode) = (&profile.prefill.env, &profile.decode.env);
    let same = prefill.iter().filter(|(name, value)| decode.get(*name) == Some(value));
    shared.extend(same.map(|(name, value)| (name.clone(), value.clone())));
    shared
}

/// The revision in the profile's arguments. If the roles differ, that of the prefill engines.
pub fn revision(profile: &Profile) -> &str {
    profile.argument(&profile.prefill, REVISION).unwrap_or(MAIN)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::plan::build;
    use crate::profile::{Override, load};

    fn fetched(set: &[&str]) -> (Option<ModelFetch>, Option<String>) {
        let overrides: Vec<Override> = set
            .iter()
            .map(|set| Override::parse(set).expect("an override"))
            .collect();
        let profile = load("1p1d", &overrides).expect("a profile");
        let machine = Machine::fixture(2, "0.32.0", None);
        let plan = build(&profile, &machine, Path::new("/run")).expect("a plan");
        (plan.fetch, plan.engines[0].env.get(OFFLINE).cloned())
    }

    #[test]
    fn engines_are_offline_if_xpyd_downloads() {
        let (fetch, offline) = fetched(&["model=org/name", "vllm.args=[\"--revision\", \"v2\"]"]);
        let wanted = ModelFetch {
            repository: "org/name".to_owned(),
            revision: "v2".to_owned(),
        };
        assert_eq!((fetch, offline.as_deref()), (Some(wanted), Some("1")));
        for set in [
            "model=/models/x",
            "vllm.args=[\"--tokenizer\", \"org/other\"]",
            "vllm.args=[\"--tokenizer=gpt2\"]",
            "vllm.args=[\"-sc\", \"{\\\"model\\\":\\\"org/draft\\\"}\"]",
            "vllm.args=[\"--speculative-config.model\", \"org/draft\"]",
            "vllm.args=[\"--speculative_config.method=eagle\"]",
            "vllm.args=[\"--spec-model\", \"draft\"]",
            "decode.args=[\"--spec-mod=draft\"]",
            "vllm.args=[\"--enable-lora\", \"--lora-mod\", \"a=org/lora\"]",
            "vllm.args=[\"--an-option-of-tomorrow\", \"org/more\"]",
            "decode.args=[\"--revision\", \"v2\"]",
            "decode.args=[\"--rev\", \"v2\"]",
            "vllm.args=[\"--code_revision=v2\"]",
            "vllm.env.VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
            "prefill.env.VLLM_LORA_RESOLVER_HF_REPO_LIST=org/lora",
            "vllm.env.VLLM_USE_MODELSCOPE=True",
            "decode.env.VLLM_USE_MODELSCOPE=true",
            "decode.args=[\"--download_dir=/x\"]",
            "prefill.env={HF_HOME=\"/x\"}",
            "engine=sim",
        ] {
            assert_eq!(fetched(&[set]), (None, None), "{set}");
        }
    }

    #[test]
    fn the_revision_of_both_roles_is_downloaded() {
        for set in [
            &["vllm.args=[\"--revision=v2\"]"][..],
            &["prefill.args=[\"--revision\", \"v2\"]", "decode.args=[\"--revis=v2\"]"],
            &["vllm.args=[\"--revision=v1\", \"--revision=v2\", \"--max-num-seqs\", \"3\"]"],
        ] {
            let set: Vec<&str> = ["model=org/name"].iter().chain(set).copied().collect();
            let (fetch, offline) = fetched(&set);
            assert_eq!(fetch.map(|fetch| fetch.revision).as_deref(), Some("v2"), "{set:?}");
            assert_eq!(offline.as_deref(), Some("1"));
        }
    }

    #[test]
    fn a_variable_of_the_profile_wins() {
        let (fetch, offline) = fetched(&["vllm.env={HF_HUB_OFFLINE=\"0\"}"]);
        assert!(fetch.is_some());
        assert_eq!(offline.as_deref(), Some("0"));
    }
}
