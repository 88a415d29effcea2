//! Checks that the host has enough memory and cores for the engines and their cache servers.

use super::{Finding, Level, finding};
use crate::connector::Connector;
use crate::machine::Machine;
use crate::plan::Plan;

/// Memory of an engine without a GPU besides its KV: vLLM 0.32 with a tiny model used 4 GB in three processes.
const CPU_ENGINE_BYTES: u64 = 4 << 30;

pub(super) fn without_gpus(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    if plan.gpus_needed() > 0 {
        return Vec::new();
    }
    let mut findings = Vec::new();
    let engines = plan.engines.len() as u64;
    if machine.available_memory_bytes < engines * CPU_ENGINE_BYTES {
        let message = format!(
            "{engines} engines on the CPU need about {} GiB, but {} GiB are available",
            (engines * CPU_ENGINE_BYTES) >> 30,
            machine.available_memory_bytes >> 30
        );
        findings.push(finding(
            "memory",
            Level::Warn,
            message,
            Some("choose a profile with fewer engines"),
        ));
    }
    // Every worker with a NIXL agent has a progress thread of UCX, which spins.
    let workers: usize = plan
        .engines
        .iter()
        .map(|engine| usize::from(engine.endpoint.tensor_parallel))
        .sum();
    if machine.cores <= workers {
        let message = format!(
            "each of the {workers} workers keeps one core busy even when idle, and there are {} cores: expect slow starts",
            machine.cores
        );
        findings.push(finding("cores", Level::Warn, message, None));
    }
    findings
}

/// Whether there is memory for the cache servers.
pub(super) fn of_cache_servers(plan: &Plan, machine: &Machine) -> Option<Finding> {
    let Connector::LmCacheMp(lmcache) = &plan.connector else {
        return None;
    };
    let needed = lmcache.l1_bytes.saturating_mul(plan.engines.len() as u64);
    let sizes = format!(
        "{} cache servers need {} MiB, but {} MiB are available",
        plan.engines.len(),
        needed >> 20,
        machine.available_memory_bytes >> 20
    );
    Some(if needed <= machine.available_memory_bytes {
        finding("cache_memory", Level::Pass, sizes, None)
    } else {
        let hint = "make them smaller, for example with `--set lmcache_mp.l1_size=2GiB`";
        finding("cache_memory", Level::Fail, sizes, Some(hint))
    })
}
