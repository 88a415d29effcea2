//! The API key of the engines: the user's own, or one made for the run, so that only xpyd and its operator can use them.

use rand::RngExt as _;

use crate::engine::vllm::API_KEY_VARIABLE;
use crate::fleet::Role;
use crate::plan::Plan;
use crate::profile::Profile;
use crate::proxy::{self, EngineKey};
use crate::report::{ExitStatus, Failure};
use crate::supervisor::AttachableRun;

/// How a key that was made for a run begins, so that a later xpyd tells it from a user's.
const PREFIX: &str = "xpyd-run-";

/// The key of a run's engines.
#[derive(Debug, Default)]
pub(super) struct Chosen {
    /// What the proxy sends; `None` if the engines take requests from everyone.
    pub(super) sent: Option<EngineKey>,
    /// The key, if it was made for this run.
    pub(super) made: Option<String>,
}

/// Chooses the key of the engines of `draft`, and gives it to those that have none. `kept` are engines that run already:
/// they keep the key they have.
pub(super) fn choose(profile: &mut Profile, draft: &Plan, kept: Option<&AttachableRun>) -> Result<Chosen, Failure> {
    let inherited = inherited();
    let users = draft.engine_key(inherited.as_deref()).map_err(|error| {
        Failure::new(ExitStatus::Usage, error)
            .hint("give both roles the same `--api-key`, for example in `[vllm] args`")
    })?;
    let made = match (users, kept) {
        (None, Some(kept)) => key_of(kept),
        (None, None) if is_made(draft) => Some(new_key()),
        _ => None,
    };
    let sent = match &made {
        Some(key) => checked(Some(key))?.map(EngineKey::known_to_xpyd_only),
        None => checked(users)?,
    };
    if let Some(key) = users.or(made.as_deref()) {
        for role in draft.roles_without_key(inherited.as_deref()) {
            let of_role = match role {
                Role::Prefill => &mut profile.prefill,
                Role::Decode => &mut profile.decode,
            };
            of_role.env.insert(API_KEY_VARIABLE.to_owned(), key.to_owned());
        }
    }
    Ok(Chosen { sent, made })
}

/// Whether a run of this plan makes a key: its user has given none, and wants some engine to have one. Engines that shall
/// see the keys of clients cannot have one of their own.
pub(super) fn is_made(draft: &Plan) -> bool {
    let inherited = inherited();
    !draft.proxy.service.guard.pass_key_through
        && matches!(draft.engine_key(inherited.as_deref()), Ok(None))
        && !draft.roles_without_key(inherited.as_deref()).is_empty()
}

/// The key that an earlier xpyd made for these engines.
fn key_of(kept: &AttachableRun) -> Option<String> {
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

/// A key of engines as a header carries it.
pub(super) fn checked(key: Option<&str>) -> Result<Option<EngineKey>, Failure> {
    let key = key.filter(|key| !key.is_empty()).map(EngineKey::new).transpose();
    key.map_err(|error: proxy::KeyError| {
        Failure::new(
            ExitStatus::Usage,
            anyhow::Error::new(error).context("the key of the engines"),
        )
    })
}
