//! What a machine has, where no plan says what is needed.

use super::{Finding, Level, finding};
use crate::machine::{Gpus, Machine};

/// The GPUs that xpyd may use.
pub(super) fn gpus(machine: &Machine) -> Vec<Finding> {
    let without = "`xpyd demo` and `--engine sim` need none, and `--profile cpu-1p1d` runs real vLLM without one";
    match &machine.gpus {
        Gpus::NotAsked => Vec::new(),
        Gpus::Unavailable(reason) => vec![finding("gpu", Level::Warn, reason.clone(), Some(without))],
        Gpus::Found(found) if found.is_empty() => {
            let message = "there is a driver, and no GPU that xpyd may use".to_owned();
            vec![finding(
                "gpu",
                Level::Warn,
                message,
                Some("widen CUDA_VISIBLE_DEVICES, or see `nvidia-smi -L`"),
            )]
        }
        Gpus::Found(found) => {
            let mut kinds: Vec<(&str, usize)> = Vec::new();
            for gpu in found {
                match kinds.iter_mut().find(|(name, _)| *name == gpu.name) {
                    Some((_, count)) => *count += 1,
                    None => kinds.push((&gpu.name, 1)),
                }
            }
            let kinds: Vec<String> = kinds.iter().map(|(name, count)| format!("{count} × {name}")).collect();
            vec![finding("gpu", Level::Pass, kinds.join(", "), None)]
        }
    }
}
