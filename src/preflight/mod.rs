//! The preflight: whether this machine can carry the plan. Pure: a plan and a machine give findings, each with a hint.

mod gpu;
mod gpu_memory;
mod memory;
mod model;
mod software;

use serde::Serialize;

use crate::engine::EngineKind;
use crate::machine::Machine;
use crate::plan::Plan;

/// One result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
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

/// Checks everything; the order is the order of a start.
pub fn check(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let mut findings = Vec::new();
    if plan.engine == EngineKind::Vllm {
        findings.extend(software::check(plan, machine));
        findings.extend(gpu::check(plan, machine));
        findings.extend(gpu_memory::free(plan, machine));
        findings.extend(gpu_memory::fit(plan, machine));
        findings.extend(memory::without_gpus(plan, machine));
        findings.extend(memory::of_cache_servers(plan, machine));
        findings.extend(model::check(plan, machine));
    }
    findings
}

fn finding(check: &'static str, level: Level, message: String, hint: Option<&str>) -> Finding {
    Finding {
        check,
        level,
        message,
        hint: hint.map(str::to_owned),
    }
}

#[cfg(test)]
mod tests;
