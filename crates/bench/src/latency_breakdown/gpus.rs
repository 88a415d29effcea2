//! GPU use during a run, as measured by the caller of the benchmark.

use serde_json::{Value, json};

/// One GPU over a run.
#[derive(Debug, Clone, PartialEq)]
pub struct GpuUse {
    /// NVML's index.
    pub index: u32,
    /// Product name.
    pub name: String,
    /// Number of samples.
    pub samples: u64,
    /// Share of time in which a kernel ran, in percent.
    pub utilisation: MeanMax,
    /// Power in watts.
    pub power: MeanMax,
    /// Memory in use, in bytes.
    pub memory: MeanMax,
    /// Energy in joules: the sum of power × sample interval.
    pub energy_joules: f64,
}

/// Mean and maximum of the samples.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MeanMax {
    /// Arithmetic mean.
    pub mean: f64,
    /// Maximum.
    pub max: f64,
}

/// Energy of all GPUs per output token, in joules; `None` without energy or tokens.
pub fn joules_per_token(gpus: &[GpuUse], output_tokens: u64) -> Option<f64> {
    let energy: f64 = gpus.iter().map(|gpu| gpu.energy_joules).sum();
    (energy > 0.0 && output_tokens > 0).then(|| energy / output_tokens as f64)
}

/// The object `xpyd.gpus` of the result file; null without GPUs.
pub fn to_json(gpus: &[GpuUse], output_tokens: u64) -> Value {
    if gpus.is_empty() {
        return Value::Null;
    }
    let spread = |of: MeanMax| json!({"mean": of.mean, "max": of.max});
    let each = gpus.iter().map(|gpu| {
        json!({
            "index": gpu.index, "name": gpu.name, "samples": gpu.samples,
            "utilisation_percent": spread(gpu.utilisation), "power_watts": spread(gpu.power),
            "memory_bytes": spread(gpu.memory), "energy_joules": gpu.energy_joules,
        })
    });
    json!({
        "each": each.collect::<Vec<_>>(),
        "joules_per_output_token": joules_per_token(gpus, output_tokens),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn energy_is_shared_by_the_tokens_of_the_answers() {
        let gpu = |index, energy_joules| GpuUse {
            index,
            name: "H100".to_owned(),
            samples: 5,
            utilisation: MeanMax { mean: 40.0, max: 90.0 },
            power: MeanMax {
                mean: 300.0,
                max: 400.0,
            },
            memory: MeanMax::default(),
            energy_joules,
        };
        let gpus = [gpu(0, 300.0), gpu(1, 100.0)];
        assert_eq!(joules_per_token(&gpus, 200), Some(2.0));
        assert_eq!(joules_per_token(&gpus, 0), None);
        assert_eq!(to_json(&gpus, 200)["each"][1]["power_watts"]["max"], 400.0);
        assert_eq!(to_json(&[], 200), Value::Null);
    }
}
