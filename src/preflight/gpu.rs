//! Checks that the GPUs of the plan exist, are healthy, and can be used as planned.

use super::{Finding, Level, finding};
use crate::machine::{Gpu, Gpus, Installation, Machine};
use crate::plan::{EngineSpec, Plan};

pub(super) fn check(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let needed = plan.gpus_needed();
    if needed == 0 {
        return Vec::new();
    }
    let no_gpu = "try the simulated engines with `--engine sim`, or real vLLM without a GPU with `--profile cpu-1p1d`";
    let found = match &machine.gpus {
        Gpus::Found(found) => found,
        Gpus::Unavailable(reason) if plan.names_gpus => {
            let message = format!("the {needed} GPUs in the profile cannot be checked: {reason}");
            let hint = "xpyd cannot check whether they exist, how much memory is free, and whether engines free \
                their memory";
            return vec![finding("gpu", Level::Warn, message, Some(hint))];
        }
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
            "the plan needs {needed} GPUs, but xpyd can use {} here (none with index {}){}",
            found.len(),
            missing.join(", "),
            inherited_list(machine)
        );
        let hint = "choose a smaller profile (`xpyd profiles list`), `--set prefill.count=1`, or extend \
            CUDA_VISIBLE_DEVICES; \
            two engines share a GPU with `--set vllm.gpu_memory_utilization=0.45`; without GPUs, try `--engine sim`";
        return vec![finding("gpu", Level::Fail, message, Some(hint))];
    }
    let mut findings = vec![finding("gpu", Level::Pass, summary(needed, found, machine), None)];
    for gpu in found {
        let users = plan.engines.iter().filter(|engine| engine.gpus.contains(&gpu.index));
        let users: Vec<&str> = users.map(|engine| engine.id.as_str()).collect();
        if !users.is_empty() {
            findings.extend(health(gpu, &users.join(" and ")));
        }
    }
    findings.extend(plan.engines.iter().filter_map(|engine| kinds(engine, machine)));
    findings.extend(plan.engines.iter().filter_map(|engine| slices(engine, machine)));
    findings
}

/// The GPUs that xpyd can use, without a plan.
pub(super) fn overview(machine: &Machine) -> Vec<Finding> {
    let without = "`xpyd demo` and `--engine sim` need no GPU, and `--profile cpu-1p1d` runs real vLLM without one";
    match &machine.gpus {
        Gpus::NotAsked => Vec::new(),
        Gpus::Unavailable(reason) => vec![finding("gpu", Level::Warn, reason.clone(), Some(without))],
        Gpus::Found(found) if found.is_empty() => {
            let message = format!(
                "there is a driver, but no GPU that xpyd can use{}",
                inherited_list(machine)
            );
            vec![finding(
                "gpu",
                Level::Warn,
                message,
                Some("extend CUDA_VISIBLE_DEVICES, or see `nvidia-smi -L`"),
            )]
        }
        Gpus::Found(found) => vec![finding("gpu", Level::Pass, kinds_of(found), None)],
    }
}

/// `; CUDA_VISIBLE_DEVICES is "2,3"`, where that hides GPUs.
fn inherited_list(machine: &Machine) -> String {
    let list = machine.driver.visible.as_ref();
    list.map_or_else(String::new, |list| format!("; CUDA_VISIBLE_DEVICES is {list:?}"))
}

/// `8 × NVIDIA H100, 1 × NVIDIA T4`.
fn kinds_of(found: &[Gpu]) -> String {
    let mut kinds: Vec<(&str, usize)> = Vec::new();
    for gpu in found {
        match kinds.iter_mut().find(|(name, _)| *name == gpu.name) {
            Some((_, count)) => *count += 1,
            None => kinds.push((&gpu.name, 1)),
        }
    }
    let kinds: Vec<String> = kinds.iter().map(|(name, count)| format!("{count} × {name}")).collect();
    kinds.join(", ")
}

/// `4 of 8 GPUs (8 × NVIDIA H100), driver 570.86.15, CUDA 12.8`.
fn summary(needed: usize, found: &[Gpu], machine: &Machine) -> String {
    let mut parts = vec![format!("{needed} of {} GPUs ({})", found.len(), kinds_of(found))];
    parts.extend(machine.driver.versions());
    parts.join(", ")
}

/// Problems of one GPU that the plan uses.
fn health(gpu: &Gpu, users: &str) -> Vec<Finding> {
    let label = gpu.label();
    let fault = |level, message: String, hint: &str| finding("gpu_health", level, message, Some(hint));
    let reset = format!(
        "stop all processes on it, then `sudo nvidia-smi --gpu-reset -i {}`, or reboot; until then choose others with \
        `--set prefill.gpus=[…]` and `--set decode.gpus=[…]`, or remove it from CUDA_VISIBLE_DEVICES",
        gpu.parent.unwrap_or(gpu.index)
    );
    let mut findings = Vec::new();
    if let Some(reason) = &gpu.health.unreachable {
        let message = format!("{label}, planned for {users}, cannot be used: {reason}");
        let hint = format!("`dmesg | grep -i xid` shows details; {reset}");
        return vec![fault(Level::Fail, message, &hint)];
    }
    if gpu.health.repair_failed == Some(true) {
        let message = format!("{label}, planned for {users}, has bad memory that could not be replaced (XID 64)");
        let hint = "replace the card; until then remove it from CUDA_VISIBLE_DEVICES";
        findings.push(fault(Level::Fail, message, hint));
    } else if gpu.health.repair_pending == Some(true) {
        let message = format!("{label}, planned for {users}, waits for a reset to replace bad memory (XID 63)");
        findings.push(fault(Level::Warn, message, &reset));
    }
    if let Some(errors) = gpu.health.uncorrected_errors.filter(|errors| *errors > 0) {
        let message = format!(
            "{label}, planned for {users}, had {errors} uncorrected memory errors since its driver was loaded (XID 48, 94, 95)"
        );
        findings.push(fault(Level::Warn, message, &reset));
    }
    findings
}

/// Ranks of one engine wait for the slowest GPU, and have as much KV as the smallest.
fn kinds(engine: &EngineSpec, machine: &Machine) -> Option<Finding> {
    let mut names: Vec<&str> = engine
        .gpus
        .iter()
        .filter_map(|index| Some(machine.gpus.get(*index)?.name.as_str()))
        .collect();
    names.sort_unstable();
    names.dedup();
    (names.len() > 1).then(|| {
        let message = format!("{} runs on GPUs of different kinds: {}", engine.id, names.join(", "));
        let hint = "choose GPUs of one kind with `--set prefill.gpus=[…]` and `--set decode.gpus=[…]`";
        finding("gpu_kinds", Level::Warn, message, Some(hint))
    })
}

/// What MIG does not support.
fn slices(engine: &EngineSpec, machine: &Machine) -> Option<Finding> {
    let is_slice = |index: &u32| machine.gpus.get(*index).is_some_and(|gpu| gpu.parent.is_some());
    if !engine.gpus.iter().any(is_slice) {
        return None;
    }
    if engine.gpus.len() > 1 {
        let message = format!(
            "{} needs {} MIG slices, but CUDA shows a process only one slice",
            engine.id,
            engine.gpus.len()
        );
        let hint = "use `--set prefill.tensor_parallel=1` and `--set decode.tensor_parallel=1`, or turn MIG off with \
            `sudo nvidia-smi -mig 0`";
        return Some(finding("mig", Level::Fail, message, Some(hint)));
    }
    match &machine.engine {
        Installation::Found {
            has_device_ids: false,
            vllm,
            ..
        } => {
            let version = vllm
                .as_ref()
                .map_or_else(|| "this vLLM".to_owned(), |vllm| format!("vLLM {vllm}"));
            let message = format!(
                "{} needs a MIG slice, but {version} crashes on the UUID of one",
                engine.id
            );
            let hint = "install a vLLM with the option `--device-ids` (0.32 has it)";
            Some(finding("mig", Level::Fail, message, Some(hint)))
        }
        _ => None,
    }
}
