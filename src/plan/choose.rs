//! Which connector: the rule behind `connector = "auto"`, and the refusal of an unsafe choice.
//!
//! vLLM packed K and V into one tensor in 0.26, and LMCache's in-process connector has copied wrong KV without a word
//! since (LMCache issues 4463 and 4614; vLLM issue 52617). LMCache has no connector for vLLM's CPU backend.

use crate::connector::{Connector, LmCache, LmCacheMp, Nixl};
use crate::engine::EngineKind;
use crate::machine::{self, Machine};
use crate::profile::{ConnectorChoice, DeviceChoice, Profile};

use super::PlanError;

/// The first vLLM whose KV layout LMCache's in-process connector does not understand.
const FIRST_PACKED_VLLM: (u32, u32) = (0, 26);

/// The connector, and why that one.
pub(super) fn connector(profile: &Profile, machine: &Machine) -> Result<(Connector, String), PlanError> {
    let nixl = |reason: String| Ok((Connector::Nixl(Nixl {}), reason));
    let lmcache = |reason: String| Ok((Connector::LmCache(lmcache(profile)), reason));
    let objection = objection_to_lmcache(profile, machine);
    match (profile.connector, objection) {
        (ConnectorChoice::Nixl, _) => nixl("the profile asks for it".to_owned()),
        (ConnectorChoice::LmCacheMp, _) => {
            let l1_bytes = profile.lmcache_mp.l1_bytes;
            let connector = Connector::LmCacheMp(LmCacheMp {
                nixl: Nixl {},
                l1_bytes,
            });
            Ok((connector, "the profile asks for it".to_owned()))
        }
        (ConnectorChoice::LmCache, None) => lmcache("the profile asks for it".to_owned()),
        (ConnectorChoice::LmCache, Some(objection)) if profile.force_connector => {
            lmcache(format!("forced, although {objection}"))
        }
        (ConnectorChoice::LmCache, Some(objection)) => Err(PlanError::UnsafeConnector(objection)),
        (ConnectorChoice::Auto, None) if profile.engine == EngineKind::Sim => {
            lmcache("the simulated engine speaks it".to_owned())
        }
        (ConnectorChoice::Auto, None) => lmcache("it is safe with what is installed".to_owned()),
        (ConnectorChoice::Auto, Some(objection)) => nixl(format!("not LMCache, because {objection}")),
    }
}

fn lmcache(profile: &Profile) -> LmCache {
    LmCache {
        first_token: profile.lmcache.first_token,
        prefill_buffer_bytes: profile.lmcache.prefill_buffer_bytes,
        decode_buffer_bytes: profile.lmcache.decode_buffer_bytes,
    }
}

/// Why LMCache PD would not be safe here, as the rest of a sentence; `None` when it is.
fn objection_to_lmcache(profile: &Profile, machine: &Machine) -> Option<String> {
    if profile.engine == EngineKind::Sim {
        return None;
    }
    if profile.device == DeviceChoice::Cpu {
        return Some("LMCache has no connector for vLLM's CPU backend".to_owned());
    }
    let (major, minor) = FIRST_PACKED_VLLM;
    match &machine.engine {
        machine::Engine::NotAsked | machine::Engine::Missing(_) => Some("no vLLM was found to check".to_owned()),
        machine::Engine::Found { vllm: None, .. } => Some("vLLM's version could not be read".to_owned()),
        machine::Engine::Found { vllm: Some(vllm), .. } if vllm.at_least(major, minor) => Some(format!(
            "with vLLM {vllm} it hands over wrong KV (its layout changed in vLLM {major}.{minor})"
        )),
        machine::Engine::Found { lmcache: None, .. } => Some("LMCache is not installed beside vLLM".to_owned()),
        machine::Engine::Found {
            lmcache: Some(_),
            vllm: Some(_),
            ..
        } => None,
    }
}
