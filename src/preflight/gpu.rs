//! Whether the GPUs of the plan are there.

use super::{Finding, Level, finding};
use crate::machine::{Gpus, Machine};
use crate::plan::Plan;

pub(super) fn check(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let needed = plan.gpus_needed();
    if needed == 0 {
        return Vec::new();
    }
    let no_gpu = "try the simulated engines with `--engine sim`, or real vLLM without a GPU with `--profile cpu-1p1d`";
    let found = match &machine.gpus {
        Gpus::Found(found) => found,
        Gpus::Unavailable(reason) => {
            return vec![finding(
                "gpu",
                Level::Fail,
                format!("the plan needs {needed} GPUs: {reason}"),
                Some(no_gpu),
            )];
        }
        Gpus::NotAsked => return Vec::new(),
    };
    let missing: Vec<String> = plan
        .engines
        .iter()
        .flat_map(|engine| &engine.gpus)
        .filter(|index| !found.iter().any(|gpu| gpu.index == **index))
        .map(u32::to_string)
        .collect();
    if !missing.is_empty() {
        let message = format!(
            "the plan needs {needed} GPUs, and xpyd may use {} here (none with index {})",
            found.len(),
            missing.join(", ")
        );
        let hint = "choose a smaller profile (`xpyd profiles list`), `--set prefill.count=1`, or widen CUDA_VISIBLE_DEVICES; \
            without GPUs, try `--engine sim`";
        return vec![finding("gpu", Level::Fail, message, Some(hint))];
    }
    let names: Vec<&str> = found.iter().map(|gpu| gpu.name.as_str()).collect();
    vec![finding(
        "gpu",
        Level::Pass,
        format!("{needed} of {} GPUs ({})", found.len(), summary(&names)),
        None,
    )]
}

/// `4 × NVIDIA H100` for equal names, else all of them.
fn summary(names: &[&str]) -> String {
    match names.first() {
        Some(first) if names.iter().all(|name| name == first) => format!("{} × {first}", names.len()),
        _ => names.join(", "),
    }
}
