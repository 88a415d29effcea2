//! The preflight: checks that this machine can run the plan. PURE: a plan and a machine give findings, each with a hint.

mod compatibility;
mod gpu;
mod gpu_memory;
mod memory;
mod model;
mod nodes;
mod options;
mod software;
mod system;

use std::fmt;

use serde::Serialize;

use crate::engine::EngineKind;
use crate::machine::Machine;
use crate::plan::Plan;

pub use model::gibibytes;

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The topic of the check.
    pub topic: Topic,
    /// The name of the check: `gpu`, `vllm`, `hf_token`.
    pub check: &'static str,
    /// How bad it is.
    pub level: Level,
    /// The result, in one sentence.
    pub message: String,
    /// What the user can do about it.
    pub hint: Option<String>,
}

/// The severity of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// The check found no problem.
    Pass,
    /// A problem that does not stop the run.
    Warn,
    /// A problem with which the run cannot work.
    Fail,
}

/// The topics of findings, in the order of a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Topic {
    /// The other nodes of a Slurm allocation.
    Nodes,
    /// The installed programs and packages.
    Software,
    /// The GPUs.
    Gpu,
    /// The memory and cores of the host.
    Memory,
    /// The model, its files, and Hugging Face.
    Model,
    /// Limits, ports, the clock.
    System,
    /// Remains of earlier runs.
    Leftovers,
}

impl fmt::Display for Topic {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Nodes => "nodes",
            Self::Software => "software",
            Self::Gpu => "GPUs",
            Self::Memory => "memory and cores",
            Self::Model => "model",
            Self::System => "system",
            Self::Leftovers => "leftovers",
        })
    }
}

/// Runs all checks, in the order of a start.
pub fn check(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let decided = (Topic::Software, options::decided(plan));
    let nodes = (Topic::Nodes, nodes::findings(machine));
    if plan.engine != EngineKind::Vllm {
        return sorted([nodes, decided, (Topic::System, system::limits(machine))]);
    }
    let topics = [
        nodes,
        (Topic::Software, software::check(plan, machine)),
        decided,
        (Topic::Gpu, gpu::check(plan, machine)),
        (Topic::Gpu, gpu_memory::free(plan, machine)),
        (Topic::Gpu, gpu_memory::fit(plan, machine).into_iter().collect()),
        (Topic::Memory, memory::without_gpus(plan, machine)),
        (
            Topic::Memory,
            memory::of_cache_servers(plan, machine).into_iter().collect(),
        ),
        (Topic::Model, model::check(plan, machine)),
        (Topic::System, system::check(plan, machine)),
    ];
    sorted(topics)
}

/// Problems of a plan on any machine.
pub fn of_profile(plan: &Plan) -> Vec<Finding> {
    sorted([(Topic::Software, options::decided(plan))])
}

/// Checks for a fleet of simulated engines.
pub fn of_simulated(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    sorted([
        (Topic::Software, options::decided(plan)),
        (Topic::System, system::of_simulated(plan, machine)),
    ])
}

/// Findings about a machine without a plan. None of them fails, because nothing is required.
pub fn overview(machine: &Machine) -> Vec<Finding> {
    let topics = [
        (Topic::Software, software::overview(machine)),
        (Topic::Gpu, gpu::overview(machine)),
        (Topic::Model, model::overview(machine)),
        (Topic::System, system::overview(machine)),
    ];
    sorted(topics)
}

fn sorted(topics: impl IntoIterator<Item = (Topic, Vec<Finding>)>) -> Vec<Finding> {
    let of = |(topic, findings): (Topic, Vec<Finding>)| {
        findings.into_iter().map(move |finding| Finding { topic, ..finding })
    };
    topics.into_iter().flat_map(of).collect()
}

/// A finding. [`check`] fills in its topic.
fn finding(check: &'static str, level: Level, message: String, hint: Option<&str>) -> Finding {
    Finding {
        topic: Topic::System,
        check,
        level,
        message,
        hint: hint.map(str::to_owned),
    }
}

#[cfg(test)]
mod tests;
