//! Checks that the memory for the engines is free, names the processes that use it, and estimates whether model and KV fit.

use super::{Finding, Level, finding};
use crate::engine::{arguments, vllm};
use crate::fleet::Role;
use crate::machine::{Gpu, GpuMemory, GpuProcess, KvShape, Machine, ModelSize};
use crate::plan::{EngineSpec, Plan, memory_share};

const GIB: f64 = (1u64 << 30) as f64;

/// Memory of an engine besides weights and KV: its CUDA context, activations of a step, CUDA graphs. vLLM reports values
/// of this size for models with 8 billion parameters.
const OVERHEAD_BYTES: u64 = 2 << 30;

/// Number of processes to name.
const MOST_HOLDERS: usize = 3;

/// Whether the memory that engines will use on each GPU is free.
pub(super) fn free(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let mut findings = Vec::new();
    let (mut checked, mut smallest) = (0, f64::INFINITY);
    for gpu in machine.gpus.found() {
        let engines = plan.engines.iter().filter(|engine| engine.gpus.contains(&gpu.index));
        let engines: Vec<&EngineSpec> = engines.collect();
        if engines.is_empty() || gpu.health.unreachable.is_some() {
            continue;
        }
        let Some(memory) = gpu.memory.filter(|memory| memory.total > 0) else {
            let message = format!(
                "the memory of {} cannot be read, so xpyd cannot check it before {} starts",
                gpu.label(),
                names(&engines)
            );
            findings.push(finding("gpu_memory", Level::Warn, message, None));
            continue;
        };
        checked += 1;
        smallest = smallest.min(memory.free as f64 / memory.total as f64);
        findings.extend(lacking(gpu, memory, &engines, machine));
    }
    if findings.is_empty() && checked > 0 {
        let message = format!(
            "at least {:.0} % of each planned GPU is free",
            (smallest * 100.0).floor()
        );
        findings.push(finding("gpu_memory", Level::Pass, message, None));
    }
    findings
}

fn names(engines: &[&EngineSpec]) -> String {
    let names: Vec<&str> = engines.iter().map(|engine| engine.id.as_str()).collect();
    names.join(" and ")
}

fn lacking(gpu: &Gpu, memory: GpuMemory, engines: &[&EngineSpec], machine: &Machine) -> Option<Finding> {
    let shares: Vec<f64> = engines.iter().map(|engine| memory_share(engine, machine)).collect();
    let wanted: f64 = shares.iter().sum();
    if memory.free as f64 >= wanted * memory.total as f64 {
        return None;
    }
    let shares: Vec<String> = shares.iter().map(f64::to_string).collect();
    let message = format!(
        "{} has {:.1} of {:.1} GiB free, and {} {} {} of it ({:.1} GiB){}",
        gpu.label(),
        memory.free as f64 / GIB,
        memory.total as f64 / GIB,
        names(engines),
        if engines.len() == 1 { "needs" } else { "need" },
        shares.join(" + "),
        wanted * memory.total as f64 / GIB,
        held_by(gpu.processes.as_deref())
    );
    let fits = largest_share(memory, engines.len());
    let mut hints = Vec::new();
    if gpu.processes.iter().flatten().any(is_orphan) {
        hints.push("`xpyd doctor --reap` kills orphaned engines".to_owned());
    }
    if let Some(fits) = fits {
        hints.push(format!(
            "`--set vllm.gpu_memory_utilization={fits}` fits into the free memory"
        ));
    }
    hints.push(
        "stop that process, or choose other GPUs with `--set prefill.gpus=[…]` and `--set decode.gpus=[…]`".to_owned(),
    );
    Some(finding("gpu_memory", Level::Fail, message, Some(&hints.join("; "))))
}

/// The processes that use a GPU's memory, as the end of a sentence.
fn held_by(processes: Option<&[GpuProcess]>) -> String {
    let Some(processes) = processes else {
        return "; NVML does not report which process uses it".to_owned();
    };
    let mut processes: Vec<&GpuProcess> = processes.iter().collect();
    processes.sort_by_key(|process| std::cmp::Reverse(process.bytes));
    let named: Vec<String> = processes.iter().take(MOST_HOLDERS).map(ToString::to_string).collect();
    match processes.len() {
        0 => "; NVML lists no process that uses it".to_owned(),
        count if count > MOST_HOLDERS => {
            format!("; {} and {} more use it", named.join(", "), count - MOST_HOLDERS)
        }
        1 => format!("; {} uses it", named.join(", ")),
        _ => format!("; {} use it", named.join(", ")),
    }
}

/// Whether a process looks like an orphaned engine.
fn is_orphan(process: &GpuProcess) -> bool {
    let command = process.local.as_ref().map_or("", |local| local.command.as_str());
    command.contains("VLLM::") || command.contains("::EngineCore") || command.contains("::Worker")
}

/// The largest utilisation, in hundredths, with which this many engines fit into the free memory. `None` if it is too
/// small to be useful.
fn largest_share(memory: GpuMemory, engines: usize) -> Option<f64> {
    let hundredths = (memory.free as f64 / memory.total as f64 * 100.0 / engines.max(1) as f64).floor();
    (hundredths >= 10.0).then_some(hundredths / 100.0)
}

/// Whether weights and KV fit into each engine's memory. This is an estimate: only the engine itself knows.
pub(super) fn fit(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let Some(model) = &machine.model else {
        return Vec::new();
    };
    let roles = [Role::Prefill, Role::Decode].into_iter();
    roles
        .filter_map(|role| {
            let engine = plan.engines_of(role).next()?;
            let gpus = engine.gpus.iter().map(|index| machine.gpus.get(*index)?.memory);
            let smallest = gpus.min_by_key(|memory| memory.map_or(0, |memory| memory.total))??;
            let args = vllm::own_arguments(&engine.argv);
            let option = |name: &str| arguments::value(args, name);
            let copies = option("--data-parallel-size").and_then(|ranks| ranks.parse::<u64>().ok());
            let demand = MemoryDemand {
                budget: part_of(smallest.total, memory_share(engine, machine)),
                ranks: engine.gpus.len() as u64 / copies.unwrap_or(1).max(1),
                tokens: option("--max-model-len")
                    .and_then(|tokens| tokens.parse().ok())
                    .or(model.max_positions)?,
                requests: option("--max-num-seqs").and_then(|requests| requests.parse().ok()),
                value_bytes: match option("--kv-cache-dtype") {
                    Some(name) if name.starts_with("fp8") => 1,
                    _ => model.kv.value_bytes,
                },
            };
            Some(judge(role, model, &demand))
        })
        .collect()
}

/// The memory that an engine needs, and the memory that it has.
#[derive(Debug, Clone, Copy)]
struct MemoryDemand {
    /// Memory that it can use on each GPU, in bytes.
    budget: u64,
    /// Tensor-parallel ranks.
    ranks: u64,
    /// Length of the longest request, in tokens.
    tokens: u64,
    /// Number of concurrent requests, if the profile sets it.
    requests: Option<u64>,
    /// Bytes of one KV value.
    value_bytes: u64,
}

fn judge(role: Role, model: &ModelSize, demand: &MemoryDemand) -> Finding {
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / GIB);
    let weights = model.weights_bytes / demand.ranks.max(1);
    let about = if model.weights_are_exact { "" } else { "about " };
    let left = demand.budget.saturating_sub(weights + OVERHEAD_BYTES);
    let one = model.kv.bytes(demand.tokens, demand.ranks, demand.value_bytes).max(1);
    if left == 0 {
        let message = format!(
            "{role} engines need {about}{} for weights on each GPU and about {} for other data, but can use {}: \
             they will not start",
            gib(weights),
            gib(OVERHEAD_BYTES),
            gib(demand.budget)
        );
        let hint = format!(
            "spread each engine over more GPUs with `--set {role}.tensor_parallel={}`, or choose a smaller or \
             quantised model",
            demand.ranks * 2
        );
        return finding("fit", Level::Warn, message, Some(&hint));
    }
    if one > left {
        let message = format!(
            "KV of one request of {} tokens needs {} on each GPU of {role} engines, but about {} are left beside \
             {about}{} of weights: they will not start",
            demand.tokens,
            gib(one),
            gib(left),
            gib(weights)
        );
        let hint = format!(
            "`--set vllm.max_model_len={}` would fit",
            most_tokens(&model.kv, left, demand)
        );
        return finding("fit", Level::Warn, message, Some(&hint));
    }
    let fit = left / one;
    if let Some(requests) = demand.requests.filter(|requests| *requests > fit) {
        let message = format!(
            "about {fit} requests of {} tokens fit into {role} engines at once, not the {requests} of \
             --max-num-seqs: the other requests wait or are preempted",
            demand.tokens
        );
        return finding("fit", Level::Warn, message, None);
    }
    let message = format!(
        "{role} engines: {about}{} of weights on each GPU, and KV for about {fit} requests of {} tokens",
        gib(weights),
        demand.tokens
    );
    finding("fit", Level::Pass, message, None)
}

/// The fraction `part` of `bytes`.
fn part_of(bytes: u64, part: f64) -> u64 {
    // Thousandths are finer than any value in use.
    let thousandths = (0..=1000u16)
        .rev()
        .find(|thousandths| f64::from(*thousandths) <= part * 1000.0 + 0.5);
    bytes / 1000 * u64::from(thousandths.unwrap_or(0))
}

/// Length of the longest request whose KV fits into `left` bytes, rounded down to blocks of 1024 tokens if it is that long.
fn most_tokens(kv: &KvShape, left: u64, demand: &MemoryDemand) -> u64 {
    let fits = |tokens: u64| kv.bytes(tokens, demand.ranks, demand.value_bytes) <= left;
    let (mut low, mut high) = (0, demand.tokens);
    while low + 1 < high {
        let middle = low.midpoint(high);
        if fits(middle) { low = middle } else { high = middle }
    }
    if low >= 1024 { low / 1024 * 1024 } else { low }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama 3.1 with 8 billion parameters.
    fn llama() -> ModelSize {
        ModelSize {
            weights_bytes: 16_060_522_496,
            weights_are_exact: true,
            max_positions: Some(131_072),
            kv: KvShape {
                full_layers: 32,
                window_layers: 0,
                window: u64::MAX,
                heads: 8,
                values: 2048,
                value_bytes: 2,
            },
        }
    }

    fn demand(mib: u64, ranks: u64, tokens: u64) -> MemoryDemand {
        MemoryDemand {
            budget: mib << 20,
            ranks,
            tokens,
            requests: None,
            value_bytes: 2,
        }
    }

    #[test]
    fn a_fitting_model_reports_requests() {
        let found = judge(Role::Decode, &llama(), &demand(74_957, 1, 16_384));
        assert_eq!(found.level, Level::Pass);
        assert_eq!(
            found.message,
            "decode engines: 15.0 GiB of weights on each GPU, and KV for about 28 requests of 16384 tokens"
        );
        let many = MemoryDemand {
            requests: Some(64),
            ..demand(74_957, 1, 16_384)
        };
        let found = judge(Role::Decode, &llama(), &many);
        assert!(
            found.level == Level::Warn && found.message.contains("about 28 requests"),
            "{found:?}"
        );
    }

    #[test]
    fn a_long_context_gets_the_longest_that_fits() {
        let found = judge(Role::Prefill, &llama(), &demand(22 << 10, 1, 131_072));
        assert_eq!(found.level, Level::Warn);
        assert!(found.message.contains("needs 16.0 GiB"), "{found:?}");
        let hint = found.hint.expect("a hint");
        // 22 GiB minus 15 for weights and 2 for the rest: 5 GiB, at 131072 bytes per token.
        assert_eq!(hint, "`--set vllm.max_model_len=40960` would fit");
        assert_eq!(
            judge(Role::Prefill, &llama(), &demand(22 << 10, 2, 131_072)).level,
            Level::Pass
        );
    }

    #[test]
    fn large_weights_need_more_gpus() {
        let found = judge(Role::Decode, &llama(), &demand(14 << 10, 1, 4096));
        assert_eq!(found.level, Level::Warn);
        assert!(found.hint.is_some_and(|hint| hint.contains("decode.tensor_parallel=2")));
    }

    #[test]
    fn the_largest_utilisation_fits_all_engines() {
        let memory = |free: u64| GpuMemory {
            total: 80 << 30,
            free: free << 30,
            used: 0,
        };
        assert_eq!(largest_share(memory(50), 1), Some(0.62));
        assert_eq!(largest_share(memory(50), 2), Some(0.31));
        assert_eq!(largest_share(memory(2), 1), None);
    }
}
