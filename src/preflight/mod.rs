//! The preflight: whether this machine can carry the plan. Pure: a plan and a machine give findings, each with a hint.

mod compatibility;
mod gpu;
mod gpu_memory;
mod memory;
mod model;
mod options;
mod software;
mod system;

use std::fmt;

use serde::Serialize;

use crate::engine::EngineKind;
use crate::machine::Machine;
use crate::plan::Plan;

pub use model::gibibytes;

/// One result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about.
    pub topic: Topic,
    /// What was looked at: `gpu`, `vllm`, `hf_token`.
    pub check: &'static str,
    /// How bad it is.
    pub level: Level,
    /// What was found, in one sentence.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Pass,
    /// The run may go on.
    Warn,
    /// The run cannot work.
    Fail,
}

/// What a finding is about, in the order of a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Topic {
    /// What the engines are made of.
    Software,
    /// Their GPUs.
    Gpu,
    /// The host's memory and cores.
    Memory,
    /// The model, its files, and Hugging Face.
    Model,
    /// Limits, ports, the clock.
    System,
    /// What earlier runs have left.
    Leftovers,
}

impl fmt::Display for Topic {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Software => "software",
            Self::Gpu => "GPUs",
            Self::Memory => "memory and cores",
            Self::Model => "model",
            Self::System => "system",
            Self::Leftovers => "leftovers",
        })
    }
}

/// Checks everything; the order is the order of a start.
pub fn check(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let decided = (Topic::Software, options::decided(plan));
    if plan.engine != EngineKind::Vllm {
        return sorted([decided, (Topic::System, system::limits(machine))]);
    }
    let topics = [
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

/// What is wrong with a plan whatever the machine.
pub fn of_profile(plan: &Plan) -> Vec<Finding> {
    sorted([(Topic::Software, options::decided(plan))])
}

/// What a simulated fleet needs of a machine.
pub fn of_simulated(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    sorted([
        (Topic::Software, options::decided(plan)),
        (Topic::System, system::of_simulated(plan, machine)),
    ])
}

/// What can be said of a machine without a plan: nothing is needed, so nothing fails.
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

/// A finding whose topic is filled in by [`check`].
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
