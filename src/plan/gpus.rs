//! The GPUs of a plan: how many each engine needs, which ones it gets, and how it is bound to them. PURE.

use std::collections::VecDeque;

use super::placement::{PlacementRequest, place};
use super::{EngineSpec, Plan, PlanError, nodes};
use crate::connector::Device;
use crate::engine::{EngineKind, arguments, vllm};
use crate::fleet::{EngineId, Role};
use crate::machine::{Installation, Machine};
use crate::profile::{Profile, RoleProfile};

/// The fraction of a GPU's memory that each engine of a role uses, 0 to 1.
fn share(profile: &Profile, role: &RoleProfile, machine: &Machine) -> f64 {
    given_share(profile, role).unwrap_or_else(|| default_share(machine))
}

/// The fraction of a GPU's memory that the profile's own keys set for a role.
pub(super) fn given_share(profile: &Profile, role: &RoleProfile) -> Option<f64> {
    role.gpu_memory_utilization.or(profile.vllm.gpu_memory_utilization)
}

/// The fraction of the memory of each of its GPUs that an engine uses, 0 to 1.
pub fn memory_share(engine: &EngineSpec, machine: &Machine) -> f64 {
    let given = arguments::value(vllm::own_arguments(&engine.argv), vllm::MEMORY_OPTION);
    let given = given.and_then(|value| value.parse().ok());
    given.unwrap_or_else(|| default_share(machine))
}

/// The default of the installed vLLM.
fn default_share(machine: &Machine) -> f64 {
    match &machine.engine {
        Installation::Found { vllm: Some(vllm), .. } => vllm::default_memory_utilization(vllm.at_least(0, 32)),
        Installation::Found { vllm: None, .. } | Installation::Missing(_) | Installation::NotAsked => {
            vllm::default_memory_utilization(true)
        }
    }
}

fn uses_gpus(profile: &Profile) -> bool {
    profile.engine == EngineKind::Vllm && profile.device == Device::Cuda
}

fn group(profile: &Profile, machine: &Machine, role: Role, fixed: Vec<u32>) -> PlacementRequest {
    let of_role = match role {
        Role::Prefill => &profile.prefill,
        Role::Decode => &profile.decode,
    };
    PlacementRequest {
        role,
        ranks: profile.ranks(of_role).total(),
        fixed,
        share: share(profile, of_role, machine),
    }
}

/// The GPUs of every engine, prefill first; empty for engines that use none. GPUs that the profile names are kept.
pub(super) fn for_all(profile: &Profile, machine: &Machine) -> VecDeque<Vec<u32>> {
    if !uses_gpus(profile) {
        return VecDeque::new();
    }
    let mut groups = Vec::new();
    for (role, of_role) in [(Role::Prefill, &profile.prefill), (Role::Decode, &profile.decode)] {
        let mut named = of_role.gpus.chunks(profile.ranks(of_role).total());
        for _ in 0..of_role.count {
            let fixed = named.next().unwrap_or_default().to_vec();
            groups.push(group(profile, machine, role, fixed));
        }
    }
    place(machine.gpus.found(), &groups).into()
}

/// Fails if an engine needs more GPUs than any node has.
pub(super) fn check_sizes(profile: &Profile, machine: &Machine) -> Result<(), PlanError> {
    if !uses_gpus(profile) {
        return Ok(());
    }
    let roles = [(Role::Prefill, &profile.prefill), (Role::Decode, &profile.decode)];
    let check = |(role, of_role): (Role, &RoleProfile)| {
        nodes::check_size(machine, profile.ranks(of_role).total(), &EngineId::new(role, 0))
    };
    roles.into_iter().try_for_each(check)
}

/// GPUs for `count` more engines of `role`, beside the engines of the plan.
pub(super) fn for_more(
    profile: &Profile,
    machine: &Machine,
    plan: &Plan,
    role: Role,
    count: usize,
) -> VecDeque<Vec<u32>> {
    if !uses_gpus(profile) {
        return VecDeque::new();
    }
    let existing = plan
        .engines
        .iter()
        .map(|engine| group(profile, machine, engine.role, engine.gpus.clone()));
    let new = std::iter::repeat_with(|| group(profile, machine, role, Vec::new())).take(count);
    let groups: Vec<PlacementRequest> = existing.chain(new).collect();
    place(machine.gpus.found(), &groups)
        .into_iter()
        .skip(plan.engines.len())
        .collect()
}

/// The UUIDs of these GPUs; empty unless NVML reported all of them.
pub(super) fn uuids(machine: &Machine, gpus: &[u32]) -> Vec<String> {
    let uuids: Option<Vec<String>> = gpus
        .iter()
        .map(|index| Some(machine.gpus.get(*index)?.uuid.clone()).filter(|uuid| !uuid.is_empty()))
        .collect();
    uuids.unwrap_or_default()
}

/// The value of `CUDA_VISIBLE_DEVICES`: UUIDs if the engine can read them, else indices. The meaning of an index depends
/// on the driver and on CUDA's device order, and a MIG slice has none.
pub(super) fn visible(machine: &Machine, gpus: &[u32], uuids: &[String]) -> String {
    let reads_uuids = match &machine.engine {
        Installation::Found { has_device_ids, .. } => *has_device_ids,
        Installation::Missing(_) | Installation::NotAsked => true,
    };
    let is_slice = |index: &u32| machine.gpus.get(*index).is_some_and(|gpu| gpu.parent.is_some());
    let index_on_node = |index: &u32| {
        machine
            .gpus
            .get(*index)
            .and_then(|gpu| gpu.node.as_ref())
            .map_or(*index, |node| node.index)
    };
    if !uuids.is_empty() && (reads_uuids || gpus.iter().any(is_slice)) {
        return uuids.join(",");
    }
    let indices = gpus.iter().map(|index| index_on_node(index).to_string());
    indices.collect::<Vec<_>>().join(",")
}

/// The NUMA node of each GPU, or nothing if the engine is not to be bound: binding is impossible, the machine has one
/// node, or the profile's own arguments set the binding.
pub(super) fn numa_nodes(machine: &Machine, gpus: &[u32], args: &[String]) -> Vec<u32> {
    let has_flag = matches!(
        &machine.engine,
        Installation::Found {
            has_numa_bind: true,
            ..
        }
    );
    let is_told = arguments::read(args)
        .iter()
        .any(|given| given.name.starts_with("--numa-bind"));
    if !has_flag || !machine.binds_numa || is_told {
        return Vec::new();
    }
    let nodes: Option<Vec<u32>> = gpus.iter().map(|index| machine.gpus.get(*index)?.numa_node).collect();
    nodes.unwrap_or_default()
}

/// Notes for the user about engines that share a GPU.
pub(super) fn notes(plan: &Plan, machine: &Machine) -> Vec<String> {
    let mut notes = Vec::new();
    for gpu in machine.gpus.found() {
        let on_it: Vec<&str> = plan
            .engines
            .iter()
            .filter(|engine| engine.gpus.contains(&gpu.index))
            .map(|engine| engine.id.as_str())
            .collect();
        if on_it.len() > 1 {
            notes.push(format!(
                "{} share {} and start one after the other",
                on_it.join(" and "),
                gpu.label()
            ));
        }
    }
    notes
}
