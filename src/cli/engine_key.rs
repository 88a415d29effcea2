//! The API key of the engines: the user's own, or one generated for the run, so that only xpyd and its operator can use
//! the engines.

use rand::RngExt as _;

use crate::engine::vllm::API_KEY_VARIABLE;
use crate::fleet::Role;
use crate::plan::Plan;
use crate::profile::Profile;
use crate::proxy::{self, EngineKey};
use crate::report::{ExitStatus, Failure};
use crate::supervisor::AttachableRun;

/// The prefix of a generated key, which a later xpyd recognises.
const PREFIX: &str = "xpyd-run-";

/// The key of a run's engines.
#[derive(Debug, Default)]
pub(super) struct ChosenKey {
    /// The key that the proxy sends; `None` if the engines accept requests without a key.
    pub(super) proxy_key: Option<EngineKey>,
    /// The key, if it was generated for this run.
    pub(super) generated: Option<String>,
}

/// Chooses the key of the engines of `draft`, and sets it for engines without one. The engines in `kept` are running
/// already, and keep their key.
pub(super) fn choose(profile: &mut Profile, draft: &Plan, kept: Option<&AttachableRun>) -> Result<ChosenKey, Failure> {
    let inherited = inherited();
    let users = draft.engine_key(inherited.as_deref()).map_err(|error| {
        Failure::new(ExitStatus::Usage, error)
            .hint("set the same `--api-key` for both roles, for example in `[vllm] args`")
    })?;
    let generated = match (users, kept) {
        (None, Some(kept)) => generated_key_of(kept),
        (None, None) if is_generated(draft) => Some(new_key()),
        _ => None,
    };
    let proxy_key = match &generated {
        Some(key) => checked(Some(key))?.map(EngineKey::known_to_xpyd_only),
        None => checked(users)?,
    };
    if let Some(key) = users.or(generated.as_deref()) {
        for role in draft.roles_without_key(inherited.as_deref()) {
            let of_role = match role {
                Role::Prefill => &mut profile.prefill,
                Role::Decode => &mut profile.decode,
            };
            of_role.env.insert(API_KEY_VARIABLE.to_owned(), key.to_owned());
        }
    }
    Ok(ChosenKey { proxy_key, generated })
}

/// Whether a run of this plan generates a key: the user has set none, and has not turned it off for all engines. Engines
/// that get the clients' keys cannot have one of their own.
pub(super) fn is_generated(draft: &Plan) -> bool {
    let inherited = inherited();
    !draft.proxy.config.guard.pass_key_through
        && matches!(draft.engine_key(inherited.as_deref()), Ok(None))
        && !draft.roles_without_key(inherited.as_deref()).is_empty()
}

/// The key that an earlier xpyd generated for these engines.
fn generated_key_of(kept: &AttachableRun) -> Option<String> {
    let specs = kept.specs().ok()?;
    let mut keys = specs
        .into_iter()
        .filter_map(|mut spec| spec.env.remove(API_KEY_VARIABLE));
    keys.find(|key| key.starts_with(PREFIX))
}

fn new_key() -> String {
    format!("{PREFIX}{:032x}", rand::rng().random::<u128>())
}

/// The key in the variable that vLLM reads.
pub(super) fn inherited() -> Option<String> {
    std::env::var(API_KEY_VARIABLE).ok()
}

/// The key, if it can be sent in a header.
pub(super) fn checked(key: Option<&str>) -> Result<Option<EngineKey>, Failure> {
    let key = key.filter(|key| !key.is_empty()).map(EngineKey::new).transpose();
    key.map_err(|error: proxy::KeyError| {
        Failure::new(
            ExitStatus::Usage,
            anyhow::Error::new(error).context("the API key of the engines is invalid"),
        )
    })
}
