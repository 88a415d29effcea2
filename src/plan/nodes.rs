//! The node of each engine, in a Slurm allocation of several nodes. PURE.

use super::PlanError;
use crate::fleet::EngineId;
use crate::machine::Machine;
use crate::slurm::Node;

/// Engines, their side channels and notifications stay on this machine, if it is the only node.
const LOOPBACK: &str = "127.0.0.1";

/// Where an engine runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Home {
    /// The other node; `None` for this one.
    pub(super) node: Option<Node>,
    /// The address on which it listens.
    pub(super) address: String,
}

/// The address at which engines reach the proxy.
pub(super) fn proxy_address(machine: &Machine) -> &str {
    machine.nodes.this.as_ref().map_or(LOOPBACK, |node| &node.address)
}

/// The node of an engine: that of its GPUs. Engines without GPUs take the nodes in turns, by their number within the role,
/// so that a prefill engine and a decode engine of the same number share a node.
pub(super) fn home(machine: &Machine, id: &EngineId, index: usize, gpus: &[u32]) -> Result<Home, PlanError> {
    let node = if gpus.is_empty() {
        let turn = index % (machine.nodes.others.len() + 1);
        turn.checked_sub(1).map(|other| &machine.nodes.others[other].node)
    } else {
        let mut names = gpus.iter().map(|index| machine.gpus.get(*index)?.node_name());
        let name = names.next().flatten();
        if names.any(|other| other != name) {
            return Err(PlanError::SpansNodes { engine: id.to_string() });
        }
        let others = machine.nodes.others.iter().map(|other| &other.node);
        name.and_then(|name| others.into_iter().find(|node| node.name == name))
    };
    Ok(Home {
        address: node.map_or_else(|| proxy_address(machine).to_owned(), |node| node.address.clone()),
        node: node.cloned(),
    })
}

/// Fails if an engine needs more GPUs than any node has.
pub(super) fn check_size(machine: &Machine, ranks: usize, id: &EngineId) -> Result<(), PlanError> {
    if machine.nodes.others.is_empty() {
        // The preflight reports GPUs that a machine lacks.
        return Ok(());
    }
    let of = |node: Option<&str>| {
        machine
            .gpus
            .found()
            .iter()
            .filter(|gpu| gpu.node_name() == node)
            .count()
    };
    let others = machine.nodes.others.iter().map(|other| of(Some(&other.node.name)));
    let largest = others.chain([of(None)]).max().unwrap_or(0);
    if ranks > largest {
        return Err(PlanError::LargerThanNode {
            engine: id.to_string(),
            needed: ranks,
            largest,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::machine::{Gpus, NodeFacts, Nodes, OtherNode};
    use crate::plan::{Plan, build};
    use crate::profile;

    fn node(name: &str, address: &str) -> Node {
        let [name, address] = [name, address].map(str::to_owned);
        Node { name, address }
    }

    /// Two nodes with `gpus` GPUs each.
    fn cluster(gpus: u32) -> Machine {
        let of_other = Machine::fixture(gpus, "0.32.0", None).gpus;
        Machine::fixture(gpus, "0.32.0", None).with_nodes(Nodes {
            this: Some(node("n1", "10.0.0.1")),
            others: vec![OtherNode {
                node: node("n2", "10.0.0.2"),
                facts: Ok(NodeFacts {
                    xpyd: "0.1.0".to_owned(),
                    gpus: of_other,
                    engine: Some("0.32.0".to_owned()),
                    sees_shared_file: true,
                }),
            }],
        })
    }

    fn plan(profile: &str, machine: &Machine) -> Result<Plan, PlanError> {
        let profile = profile::load(profile, &[]).expect("a shipped profile");
        build(&profile, machine, Path::new("/run"))
    }

    fn places(plan: &Plan) -> Vec<(String, String, Vec<u32>)> {
        let engines = plan.engines.iter();
        engines
            .map(|engine| {
                let node = engine.node.as_ref().map_or("this", |node| &node.name);
                (engine.id.to_string(), node.to_owned(), engine.gpus.clone())
            })
            .collect()
    }

    #[test]
    fn a_fleet_that_fits_on_one_node_stays_there() {
        let plan = plan("1p1d", &cluster(2)).expect("a plan");
        assert!(
            plan.engines.iter().all(|engine| engine.node == plan.engines[0].node),
            "{:?}",
            places(&plan)
        );
    }

    #[test]
    fn engines_of_two_nodes_have_the_addresses_and_gpus_of_their_nodes() {
        let plan = plan("2p2d-nixl", &cluster(2)).expect("a plan");
        let other: Vec<_> = plan.engines.iter().filter(|engine| engine.node.is_some()).collect();
        assert_eq!(other.len(), 2, "{:?}", places(&plan));
        for engine in &plan.engines {
            let address = if engine.node.is_some() { "10.0.0.2" } else { "10.0.0.1" };
            assert_eq!(engine.endpoint.host, address);
            assert_eq!(engine.env["VLLM_NIXL_SIDE_CHANNEL_HOST"], address);
            assert!(engine.env["CUDA_VISIBLE_DEVICES"].starts_with("GPU-0000000"));
            assert_eq!(
                engine.gpu_uuids.is_empty(),
                engine.node.is_some(),
                "NVML of this node does not know them"
            );
        }
    }

    #[test]
    fn the_ranks_of_an_engine_share_a_node() {
        let plan = plan("2p2d-tp2", &cluster(4)).expect("a plan");
        for engine in &plan.engines {
            let is_far = |index: &u32| *index >= 4;
            assert!(
                engine.gpus.iter().all(|gpu| is_far(gpu) == engine.node.is_some()),
                "{:?}",
                places(&plan)
            );
        }
    }

    #[test]
    fn an_engine_that_is_larger_than_a_node_is_refused() {
        let error = plan("1p1d-tp4", &cluster(2)).expect_err("no node has 4 GPUs");
        assert_eq!(
            error.to_string(),
            "prefiller1 needs 4 GPUs, but no node of this allocation has more than 2"
        );
    }

    #[test]
    fn engines_without_gpus_take_the_nodes_in_turns() {
        let mut machine = cluster(0);
        machine.gpus = Gpus::NotAsked;
        let profile = profile::load("cpu-1p1d", &[]).expect("a shipped profile");
        let homes = (0..3).map(|index| home(&machine, &EngineId::named("x"), index, &[]).expect("a home"));
        let names: Vec<_> = homes.map(|home| home.node.map(|node| node.name)).collect();
        assert_eq!(names, [None, Some("n2".to_owned()), None]);
        assert!(build(&profile, &machine, Path::new("/run")).is_ok());
    }
}
