//! Whether xpyd fetches the model once, before any engine starts, so that engines need not ask the hub. PURE.

use serde::Serialize;

use crate::engine::{EngineKind, vllm};
use crate::machine::huggingface::{MAIN, is_repository};
use crate::machine::{Machine, huggingface::CacheState};
use crate::profile::Profile;

/// With this variable, `huggingface_hub` and all that use it read the cache only.
pub(super) const OFFLINE: &str = "HF_HUB_OFFLINE";

/// The model that xpyd fetches where it is not cached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ModelFetch {
    /// `org/model`.
    pub repository: String,
    /// Branch, tag or commit.
    pub revision: String,
}

/// Options with which an engine reads more than the model's own repository, or not from the cache.
const ELSEWHERE: [&str; 12] = [
    "--tokenizer",
    "--tokenizer-revision",
    "--hf-config-path",
    "--code-revision",
    "--speculative-config",
    "--lora-modules",
    "--download-dir",
    "--load-format",
    "--hf-token",
    "--model-loader-extra-config",
    "--trust-remote-code",
    "--config",
];

/// What to fetch. Nothing where the model is a folder, or the profile has engines read from elsewhere: they do that
/// themselves.
pub(super) fn model(profile: &Profile, machine: &Machine) -> Option<ModelFetch> {
    let is_folder = matches!(
        machine.hugging_face.model.state,
        CacheState::Folder | CacheState::BadFolder { .. }
    );
    if profile.engine != EngineKind::Vllm || is_folder || !is_repository(&profile.model) {
        return None;
    }
    let roles = [&profile.prefill, &profile.decode];
    let args = || profile.vllm.args.iter().chain(roles.iter().flat_map(|role| &role.args));
    let reads_elsewhere = args().any(|word| {
        let name = word
            .split_once('=')
            .map_or(word.as_str(), |(name, _)| name)
            .replace('_', "-");
        ELSEWHERE.contains(&name.as_str())
    });
    // Roles may have places of their own; the variables of all engines are those that xpyd looks at, too.
    let has_places = roles
        .iter()
        .any(|role| role.env.keys().any(|name| name.starts_with("HF_")));
    let variables = profile.vllm.env.iter().chain(roles.iter().flat_map(|role| &role.env));
    let other_hub = variables.into_iter().any(|(name, _)| name == "VLLM_USE_MODELSCOPE");
    if reads_elsewhere || has_places || other_hub {
        return None;
    }
    Some(ModelFetch {
        repository: profile.model.clone(),
        revision: revision(profile).to_owned(),
    })
}

/// The revision that the profile's arguments name.
pub fn revision(profile: &Profile) -> &str {
    vllm::option(&profile.vllm.args, &["--revision"]).unwrap_or(MAIN)
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
    fn engines_are_offline_exactly_where_xpyd_fetches_for_them() {
        let (fetch, offline) = fetched(&["model=org/name", "vllm.args=[\"--revision\", \"v2\"]"]);
        let wanted = ModelFetch {
            repository: "org/name".to_owned(),
            revision: "v2".to_owned(),
        };
        assert_eq!((fetch, offline.as_deref()), (Some(wanted), Some("1")));
        for set in [
            "model=/models/x",
            "vllm.args=[\"--tokenizer\", \"org/other\"]",
            "decode.args=[\"--download_dir=/x\"]",
            "prefill.env={HF_HOME=\"/x\"}",
            "engine=sim",
        ] {
            assert_eq!(fetched(&[set]), (None, None), "{set}");
        }
    }

    #[test]
    fn a_variable_of_the_profile_wins() {
        let (fetch, offline) = fetched(&["vllm.env={HF_HUB_OFFLINE=\"0\"}"]);
        assert!(fetch.is_some());
        assert_eq!(offline.as_deref(), Some("0"));
    }
}
