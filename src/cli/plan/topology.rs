//! The machine's GPUs with the engines on them: a tree by NUMA node, and the path of each KV transfer.

use std::collections::{BTreeMap, BTreeSet};

use unicode_width::UnicodeWidthStr;

use crate::fleet::Role;
use crate::machine::{Gpu, GpuPath, Machine};
use crate::plan::{EngineSpec, Plan};

const GIB: f64 = (1u64 << 30) as f64;

/// The drawing; `None` if no GPU is known, or the plan uses none.
pub(super) fn text(plan: &Plan, machine: &Machine) -> Option<String> {
    let gpus = machine.gpus.found();
    if gpus.is_empty() || plan.gpus_needed() == 0 {
        return None;
    }
    let mut lines = vec![title(machine)];
    let nodes: BTreeSet<Option<u32>> = gpus.iter().map(|gpu| gpu.numa_node).collect();
    let rows: BTreeMap<u32, [String; 5]> = gpus.iter().map(|gpu| (gpu.index, row(gpu, plan, machine))).collect();
    let widths: [usize; 5] =
        std::array::from_fn(|column| rows.values().map(|row| row[column].width()).max().unwrap_or(0));
    for node in nodes {
        let on_it: Vec<&Gpu> = gpus.iter().filter(|gpu| gpu.numa_node == node).collect();
        lines.push(node_title(node, &on_it));
        for (number, gpu) in on_it.iter().enumerate() {
            let branch = if number + 1 == on_it.len() { "└─" } else { "├─" };
            let cells = rows[&gpu.index].iter().zip(widths);
            let cells: Vec<String> = cells
                .map(|(cell, width)| format!("{cell}{:1$}", "", width - cell.width()))
                .collect();
            lines.push(format!("  {branch} {}", cells.join("  ")).trim_end().to_owned());
        }
    }
    lines.extend(hand_offs(plan, machine));
    Some(lines.join("\n"))
}

fn title(machine: &Machine) -> String {
    let versions = machine.driver.versions();
    if versions.is_empty() {
        "GPUs".to_owned()
    } else {
        format!("GPUs ({})", versions.join(", "))
    }
}

fn node_title(node: Option<u32>, gpus: &[&Gpu]) -> String {
    let name = node.map_or_else(
        || "  NUMA node unknown".to_owned(),
        |node| format!("  NUMA node {node}"),
    );
    match gpus.iter().find_map(|gpu| gpu.cpus.as_ref()) {
        Some(cpus) => format!("{name}, CPUs {cpus}"),
        None => name,
    }
}

/// Label, name, memory, engines, peers.
fn row(gpu: &Gpu, plan: &Plan, machine: &Machine) -> [String; 5] {
    let memory = gpu.memory.map_or_else(
        || "memory unknown".to_owned(),
        |memory| {
            format!(
                "{:.1} of {:.1} GiB free",
                memory.free as f64 / GIB,
                memory.total as f64 / GIB
            )
        },
    );
    let engines = plan.engines.iter().filter(|engine| engine.gpus.contains(&gpu.index));
    let engines: Vec<String> = engines.map(|engine| on_gpu(engine, gpu.index)).collect();
    let engines = if engines.is_empty() {
        "-".to_owned()
    } else {
        engines.join(" + ")
    };
    let peers = peers(gpu, machine);
    let state = match (&gpu.health.unreachable, gpu.health.is_broken()) {
        (Some(reason), _) => format!("out of reach: {reason}"),
        (None, true) => "bad memory".to_owned(),
        (None, false) => peers,
    };
    [gpu.label(), gpu.name.clone(), memory, engines, state]
}

/// `decoder1`, or `decoder1 rank 2` of several.
fn on_gpu(engine: &EngineSpec, index: u32) -> String {
    let rank = engine
        .gpus
        .iter()
        .position(|gpu| *gpu == index)
        .filter(|_| engine.gpus.len() > 1);
    rank.map_or_else(|| engine.id.to_string(), |rank| format!("{} rank {rank}", engine.id))
}

/// `NVLink to 0, 2-7`, `switch with 4`.
fn peers(gpu: &Gpu, machine: &Machine) -> String {
    let to = |path: GpuPath| {
        let others = machine.gpus.found().iter().map(|other| other.index);
        ranges(
            &others
                .filter(|other| *other != gpu.index && gpu.path(*other) == path)
                .collect::<Vec<_>>(),
        )
    };
    let parts = [("NVLink to", to(GpuPath::NvLink)), ("switch with", to(GpuPath::Switch))];
    let parts = parts.iter().filter(|(_, others)| !others.is_empty());
    parts
        .map(|(what, others)| format!("{what} {others}"))
        .collect::<Vec<_>>()
        .join(", ")
}

/// `0-3, 6` for 0, 1, 2, 3, 6.
fn ranges(numbers: &[u32]) -> String {
    let mut sorted = numbers.to_vec();
    sorted.sort_unstable();
    let runs = sorted.chunk_by(|one, next| one + 1 == *next);
    let runs = runs.map(|run| match run {
        [only] => only.to_string(),
        [first, .., last] => format!("{first}-{last}"),
        [] => String::new(),
    });
    runs.collect::<Vec<_>>().join(", ")
}

/// The pairs of engines by their connection, the best first.
fn hand_offs(plan: &Plan, machine: &Machine) -> Vec<String> {
    let mut pairs: BTreeMap<GpuPath, Vec<String>> = BTreeMap::new();
    for prefill in plan.engines_of(Role::Prefill) {
        for decode in plan.engines_of(Role::Decode) {
            let path = way(prefill, decode, machine);
            pairs
                .entry(path)
                .or_default()
                .push(format!("{} to {}", prefill.id, decode.id));
        }
    }
    let lines = pairs
        .into_iter()
        .map(|(path, pairs)| format!("hand-offs over {}: {}", path.name(), pairs.join(", ")));
    lines.collect()
}

/// The connection between two engines is the worst one between ranks that transfer KV to each other.
fn way(prefill: &EngineSpec, decode: &EngineSpec, machine: &Machine) -> GpuPath {
    let path = |one: &u32, other: &u32| machine.gpus.get(*one).map_or(GpuPath::Unknown, |gpu| gpu.path(*other));
    let ways = if prefill.gpus.len() == decode.gpus.len() {
        prefill
            .gpus
            .iter()
            .zip(&decode.gpus)
            .map(|(one, other)| path(one, other))
            .max()
    } else {
        let ways = prefill
            .gpus
            .iter()
            .flat_map(|one| decode.gpus.iter().map(move |other| path(one, other)));
        ways.max()
    };
    ways.unwrap_or(GpuPath::Unknown)
}

#[cfg(test)]
mod tests {
    use super::ranges;

    #[test]
    fn consecutive_numbers_become_ranges() {
        assert_eq!(ranges(&[3, 0, 1, 2, 6]), "0-3, 6");
        assert_eq!(ranges(&[]), "");
    }
}
