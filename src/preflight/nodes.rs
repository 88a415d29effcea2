//! Findings about the other nodes of a Slurm allocation.

use super::{Finding, Level, finding};
use crate::machine::{Machine, NodeFacts};

/// One finding for each other node.
pub(super) fn findings(machine: &Machine) -> Vec<Finding> {
    let others = machine.nodes.others.iter();
    others
        .map(|other| {
            let problem = match &other.facts {
                Err(reason) => Some((
                    format!("does not answer: {reason}"),
                    "`srun --overlap --nodelist=NODE xpyd --version` shows what Slurm says; xpyd must have the same path on all nodes",
                )),
                Ok(facts) => problem(facts, machine),
            };
            let (level, message, hint) = match problem {
                None => (Level::Pass, "has xpyd, the engine and the folder of the logs".to_owned(), None),
                Some((message, hint)) => (Level::Fail, message, Some(hint)),
            };
            let name = &other.node.name;
            finding("node", level, format!("{name} {message}"), hint)
        })
        .collect()
}

fn problem(facts: &NodeFacts, machine: &Machine) -> Option<(String, &'static str)> {
    let own = env!("CARGO_PKG_VERSION");
    if facts.xpyd != own {
        let message = format!("has xpyd {}, and this node has {own}", facts.xpyd);
        return Some((
            message,
            "install the same xpyd on all nodes, or on a file system that they share",
        ));
    }
    if !facts.sees_shared_file {
        let message = "does not see the folder of the logs as this node does".to_owned();
        return Some((
            message,
            "name a folder on a file system that all nodes share: `--logs DIR`",
        ));
    }
    match (machine.engine.vllm_version(), facts.engine.as_deref()) {
        (Some(_), None) => Some((
            "does not have the engine's program at the same path".to_owned(),
            "install vLLM on a file system that all nodes share, or at the same path on each",
        )),
        (Some(here), Some(there)) if here != there => Some((
            format!("has vLLM {there}, and this node has {here}"),
            "prefill and decode engines need one version: install the same on all nodes",
        )),
        _ => None,
    }
}
