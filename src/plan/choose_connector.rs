//! Chooses the connector: the rule behind `connector = "auto"`, and the refusal of an unsafe choice.
//!
//! vLLM packs K and V into one tensor since 0.26, and LMCache's in-process connector silently copies wrong KV since then
//! (LMCache issues 4463 and 4614; vLLM issue 52617). LMCache has no connector for vLLM's CPU backend.

use crate::connector::{Connector, ConnectorChoice, ConnectorKind, Device, LmCache, LmCacheMp, Nixl};
use crate::engine::EngineKind;
use crate::machine::{self, Machine};
use crate::profile::Profile;

use super::PlanError;

/// The first vLLM whose KV layout LMCache's in-process connector does not understand.
const FIRST_PACKED_VLLM: (u32, u32) = (0, 26);

/// The connector, and the reason for it.
pub(super) fn connector(profile: &Profile, machine: &Machine) -> Result<(Connector, String), PlanError> {
    let nixl = |reason: String| Ok((Connector::Nixl(Nixl {}), reason));
    let lmcache = |reason: String| Ok((Connector::LmCache(lmcache(profile)), reason));
    let objection = objection_to_lmcache(profile, machine);
    match (profile.connector, objection) {
        (ConnectorChoice::Named(ConnectorKind::Nixl), _) => nixl("the profile asks for it".to_owned()),
        (ConnectorChoice::Named(ConnectorKind::LmCacheMp), _) => {
            let l1_bytes = profile.lmcache_mp.l1_bytes;
            let connector = Connector::LmCacheMp(LmCacheMp {
                nixl: Nixl {},
                l1_bytes,
            });
            Ok((connector, "the profile asks for it".to_owned()))
        }
        (ConnectorChoice::Named(ConnectorKind::LmCache), None) => lmcache("the profile asks for it".to_owned()),
        (ConnectorChoice::Named(ConnectorKind::LmCache), Some(objection)) if profile.force_connector => {
            lmcache(format!("forced, although {objection}"))
        }
        (ConnectorChoice::Named(ConnectorKind::LmCache), Some(objection)) => Err(PlanError::UnsafeConnector(objection)),
        (ConnectorChoice::Auto, None) if profile.engine == EngineKind::Sim => {
            lmcache("the simulated engine supports it".to_owned())
        }
        (ConnectorChoice::Auto, None) => lmcache("it is safe with the installed versions".to_owned()),
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

/// The reason why LMCache PD is not safe here, as the rest of a sentence; `None` if it is safe.
fn objection_to_lmcache(profile: &Profile, machine: &Machine) -> Option<String> {
    if profile.engine == EngineKind::Sim {
        return None;
    }
    if profile.device == Device::Cpu {
        return Some("LMCache has no connector for vLLM's CPU backend".to_owned());
    }
    let (major, minor) = FIRST_PACKED_VLLM;
    match &machine.engine {
        machine::Installation::NotAsked | machine::Installation::Missing(_) => {
            Some("no vLLM was found to check".to_owned())
        }
        machine::Installation::Found { vllm: None, .. } => Some("vLLM's version cannot be read".to_owned()),
        machine::Installation::Found { vllm: Some(vllm), .. } if vllm.at_least(major, minor) => Some(format!(
            "with vLLM {vllm} it transfers wrong KV (the layout changed in vLLM {major}.{minor})"
        )),
        machine::Installation::Found { lmcache: None, .. } => Some("LMCache is not installed beside vLLM".to_owned()),
        machine::Installation::Found {
            lmcache: Some(_),
            vllm: Some(_),
            ..
        } => None,
    }
}
