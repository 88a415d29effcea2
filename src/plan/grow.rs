//! Adds engines to the plan of a running fleet. PURE. Running engines keep their ports and GPUs. New engines get the next
//! ports of their role, and free GPUs.

use super::build::{Builder, check_ports};
use super::gpus;
use super::{EngineSpec, Plan, PlanError};
use crate::fleet::Role;
use crate::machine::{Gpu, Machine};
use crate::profile::Profile;

/// A plan with new engines.
#[derive(Debug, Clone)]
pub struct Growth {
    /// The plan with the new engines.
    pub plan: Plan,
    /// The new engines.
    pub engines: Vec<EngineSpec>,
}

/// Adds `count` engines of `role` to a plan that was built from this profile and machine.
///
/// # Errors
/// When no GPU is left for them, or one of their ports is taken within the plan.
pub fn grow(profile: &Profile, machine: &Machine, plan: &Plan, role: Role, count: usize) -> Result<Growth, PlanError> {
    let existing = plan.engines_of(role).count();
    let places = gpus::for_more(profile, machine, plan, role, count);
    let mut builder = Builder::new(profile, machine, &plan.connector, &plan.run_dir, places);
    let is_taken = |gpu: &&Gpu| plan.engines.iter().any(|engine| engine.gpus.contains(&gpu.index));
    let mut free = machine.gpus.found().len() - machine.gpus.found().iter().filter(is_taken).count();
    let mut engines = Vec::new();
    for added in 0..count {
        let engine = builder.engine(role, existing + added, plan.engines.len() + added)?;
        if engine.gpus.iter().any(|index| machine.gpus.get(*index).is_none()) {
            return Err(PlanError::NoGpuLeft {
                engine: engine.id.to_string(),
                needed: engine.gpus.len(),
                free,
            });
        }
        free = free.saturating_sub(engine.gpus.len());
        engines.push(engine);
    }
    let mut grown = plan.clone();
    grown.engines.extend(engines.iter().cloned());
    grown.engines.sort_by_key(|engine| engine.role);
    check_ports(&grown)?;
    Ok(Growth { plan: grown, engines })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;
    use crate::plan::build;
    use crate::profile::{self, Override};

    fn profile(connector: &str) -> Profile {
        let overrides = [Override::parse(&format!("connector={connector}")).expect("an override")];
        profile::load("1p1d", &overrides).expect("a shipped profile")
    }

    #[test]
    fn new_engines_share_nothing_with_running_ones() {
        for connector in ["nixl", "lmcache", "lmcache-mp"] {
            let (profile, machine) = (profile(connector), Machine::fixture(8, "0.25.1", Some("0.3.9")));
            let mut plan = build(&profile, &machine, Path::new("/run")).expect("a plan");
            for (role, count) in [(Role::Decode, 2), (Role::Prefill, 1), (Role::Decode, 1)] {
                let before = plan.clone();
                let growth = grow(&profile, &machine, &plan, role, count).expect("room");
                assert_eq!(growth.engines.len(), count);
                for engine in &before.engines {
                    assert!(growth.plan.engines.contains(engine), "{} runs already", engine.id);
                }
                plan = growth.plan;
            }
            let unique = |values: Vec<String>| values.iter().collect::<BTreeSet<_>>().len() == values.len();
            assert!(unique(plan.ports().iter().map(|(port, _)| port.to_string()).collect()));
            assert!(unique(
                plan.files().map(|file| file.path.display().to_string()).collect()
            ));
            let gpus = plan.engines.iter().flat_map(|engine| &engine.gpus);
            assert!(unique(gpus.map(u32::to_string).collect()));
            let ranges = plan.engines.iter().filter_map(|engine| engine.env.get("VLLM_PORT"));
            assert!(unique(ranges.cloned().collect()));
            let names: Vec<&str> = plan.engines.iter().map(|engine| engine.id.as_str()).collect();
            assert_eq!(
                names,
                [
                    "prefiller1",
                    "prefiller2",
                    "decoder1",
                    "decoder2",
                    "decoder3",
                    "decoder4"
                ]
            );
        }
    }

    #[test]
    fn no_free_gpu_is_an_error() {
        let (profile, machine) = (profile("nixl"), Machine::fixture(2, "0.25.1", None));
        let plan = build(&profile, &machine, Path::new("/run")).expect("a plan");
        let error = grow(&profile, &machine, &plan, Role::Decode, 1).expect_err("no room");
        assert_eq!(
            error.to_string(),
            "decoder2 needs 1 GPU, but 0 of this machine are free"
        );
    }
}
