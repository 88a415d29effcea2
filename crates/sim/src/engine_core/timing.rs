//! The timing model: how long a simulated engine takes for each step. Pure; presets are data.
//!
//! Prefill: `a0 + a1·n + a2·n²`, plus a cost per token beyond the longest prefill of this engine so far. Decode step:
//! `d0 + d1·batch + d2·context`, where context is the number of tokens of all sequences in the batch. KV: bytes over
//! bandwidth plus a latency, and a handshake at the first contact of a pair.

use std::time::Duration;

/// The parameters of an engine's times.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preset {
    /// Its name on the command line.
    pub name: &'static str,
    /// Constant part of a prefill, in seconds.
    pub prefill_constant: f64,
    /// Seconds per prompt token.
    pub prefill_per_token: f64,
    /// Seconds per squared prompt token.
    pub prefill_per_token_squared: f64,
    /// Seconds per token beyond the longest prefill so far: the allocator grows, and kernels are selected and loaded.
    pub first_touch_per_token: f64,
    /// Constant part of a decode step, in seconds.
    pub step_constant: f64,
    /// Seconds per sequence of a step.
    pub step_per_sequence: f64,
    /// Seconds per token of context of a step.
    pub step_per_context_token: f64,
    /// Bytes of KV per token, over all ranks.
    pub kv_bytes_per_token: u64,
    /// Bytes per second between two engines; infinite where transfers take no time.
    pub kv_bandwidth: f64,
    /// Constant part of a KV transfer, in seconds.
    pub kv_latency: f64,
    /// First contact of a pair, in seconds.
    pub handshake: f64,
    /// From the start of the process until it serves, in seconds.
    pub start: f64,
    /// From an engine's death to the end of its process, in seconds.
    pub death: f64,
    /// Tokens that the KV cache holds.
    pub kv_cache_tokens: u32,
}

/// The presets that `--preset` knows.
pub const PRESETS: &[Preset] = &[INSTANT, BRISK, H100_LLAMA_3_1_8B, H100_QWEN3_32B, A100_OPT_13B];

/// No operation takes time: for tests, and for benchmarks of the proxy alone.
pub const INSTANT: Preset = Preset {
    name: "instant",
    prefill_constant: 0.0,
    prefill_per_token: 0.0,
    prefill_per_token_squared: 0.0,
    first_touch_per_token: 0.0,
    step_constant: 0.0,
    step_per_sequence: 0.0,
    step_per_context_token: 0.0,
    kv_bytes_per_token: 131_072,
    kv_bandwidth: f64::INFINITY,
    kv_latency: 0.0,
    handshake: 0.0,
    start: 0.0,
    death: 0.1,
    kv_cache_tokens: 400_000,
};

/// As instant, but generation takes long enough to interrupt it: for tests.
pub(crate) const BRISK: Preset = Preset {
    name: "brisk",
    prefill_constant: 0.005,
    prefill_per_token: 10.0e-6,
    step_constant: 0.005,
    kv_latency: 0.005,
    ..INSTANT
};

/// Llama-3.1-8B in bf16 on one H100 with `--enforce-eager`, KV over `NVLink`.
///
/// Prefill: 2 flop per weight and token and causal attention at 0.55 of 989 Tflop/s, 248 ms for 7500 tokens. Decode:
/// 16 GB of weights and 131072 B of KV per token at 0.75 of 3.35 TB/s, plus 2 ms of eager launches: 8.8 ms alone at 7600
/// tokens. KV: 123 GB/s, from the 8 ms that LMCache's blog of 2025-04-29 gives for 7500 tokens in large pages.
///
/// The cost of a first touch is fitted to the table of LMCache's xPyD example (2P2D, 7500 in, 200 out, 30 prompts at
/// 1/s): its mean TTFT of 313.41 ms lies 41 ms above the median of 272.83 ms, and its P99 is 837.32 ms; both say that two
/// requests of the thirty, the first of each prefiller, took about 565 ms longer. That is 78 µs per token beyond a short
/// warm-up. (The table does not say what those two waited for.)
pub const H100_LLAMA_3_1_8B: Preset = Preset {
    name: "h100-llama-3.1-8b",
    prefill_constant: 0.002,
    prefill_per_token: 29.2e-6,
    prefill_per_token_squared: 0.48e-9,
    first_touch_per_token: 78e-6,
    step_constant: 0.008_4,
    step_per_sequence: 30e-6,
    step_per_context_token: 52e-9,
    kv_bytes_per_token: 131_072,
    kv_bandwidth: 123e9,
    kv_latency: 0.002,
    handshake: 0.12,
    start: 2.5,
    death: 1.2,
    kv_cache_tokens: 400_000,
};

/// Qwen3-32B on H100, prefill on one GPU and decode on four, vLLM 0.12; from rows of single engines alone.
///
/// The rows are aiconfigurator's `silicon_sample.csv` for aggregated engines, 4096 tokens in and 512 out, closed loop: on
/// four GPUs 426/12.3, 513/15.4, 634/22.0, 905/34.9 and 1363/61.7 ms of TTFT/TPOT at 8, 16, 32, 64 and 128 requests at
/// once; on two GPUs 1039/35.8 at 32. Of such an engine, `rate × prefill` of all time is prefill, so a step takes
/// `TPOT × (1 − rate × prefill)`. With 170 ms of prefill the steps of the five rows lie on one line, 9.1 ms + 92.5 µs for
/// each sequence of about 4352 tokens (21 ns a token of context). The row of two GPUs then leaves 251 ms of prefill for a
/// step of 21 ms: 2 ms, half the weights at 0.75 of 3.35 TB/s, and twice the line's slope. The same ratio once more makes
/// 369 ms on one GPU. KV has 262144 B per token.
pub(crate) const H100_QWEN3_32B: Preset = Preset {
    name: "h100-qwen3-32b",
    prefill_constant: 0.002,
    prefill_per_token: 89.7e-6,
    step_constant: 0.009_1,
    step_per_context_token: 21e-9,
    kv_bytes_per_token: 262_144,
    kv_bandwidth: 123e9,
    kv_latency: 0.002,
    handshake: 0.12,
    start: 2.5,
    death: 1.2,
    ..INSTANT
};

/// OPT-13B on A100 80 GB, prefill on two GPUs and decode on one: the fits of `DistServe`'s profiler, from
/// `simdistserve/estimators/profile_data/profiler-a100-80g.distserve.json` (the decode fit is that of batches below 95),
/// with the millisecond that its simulator adds to a prefill. Transfers take no time there, and next to none here.
pub(crate) const A100_OPT_13B: Preset = Preset {
    name: "a100-opt-13b",
    prefill_constant: 0.015_743,
    prefill_per_token: 68.577e-6,
    prefill_per_token_squared: 2.449_6e-9,
    step_constant: 0.019_935,
    step_per_sequence: 38.507e-6,
    step_per_context_token: 0.626_94e-6,
    // 40 layers, hidden size 5120, keys and values of two bytes.
    kv_bytes_per_token: 819_200,
    kv_bandwidth: 300e9,
    start: 2.5,
    death: 1.2,
    kv_cache_tokens: 60_000,
    ..INSTANT
};

impl Preset {
    /// The preset with this name.
    pub fn named(name: &str) -> Option<Self> {
        PRESETS.iter().copied().find(|preset| preset.name == name)
    }

    /// The time of a prefill of `tokens` on an engine whose longest so far had `longest` tokens.
    pub(crate) fn prefill(&self, tokens: usize, longest: usize) -> Duration {
        let count = tokens as f64;
        Duration::from_secs_f64(
            self.prefill_constant
                + self.prefill_per_token * count
                + self.prefill_per_token_squared * count * count
                + self.first_touch_per_token * tokens.saturating_sub(longest) as f64,
        )
    }

    /// The time of a decode step of `sequences` with `context` tokens in total.
    pub(crate) fn step(&self, sequences: usize, context: usize) -> Duration {
        Duration::from_secs_f64(
            self.step_constant
                + self.step_per_sequence * sequences as f64
                + self.step_per_context_token * context as f64,
        )
    }

    /// The time of the KV transfer of `tokens`.
    pub(crate) fn transfer(&self, tokens: usize) -> Duration {
        let bytes = self.kv_bytes_per_token as f64 * tokens as f64;
        Duration::from_secs_f64(self.kv_latency + bytes / self.kv_bandwidth)
    }

    /// The time of the first contact of a pair.
    pub(crate) fn handshake(&self) -> Duration {
        Duration::from_secs_f64(self.handshake)
    }

    /// Whether a decode step takes no time at all.
    pub(crate) fn steps_take_no_time(&self) -> bool {
        self.step(1, 1).is_zero()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// LMCache's published table: mean and median TTFT, P99 TTFT, mean TPOT, in milliseconds.
    const PUBLISHED: [f64; 4] = [313.41, 272.83, 837.32, 8.84];

    #[test]
    fn the_h100_preset_gives_the_published_table_after_short_warm_ups() {
        let preset = H100_LLAMA_3_1_8B;
        let milliseconds = |duration: Duration| duration.as_secs_f64() * 1e3;
        let warm_up = 300;
        let rest = milliseconds(preset.transfer(7500) + preset.step(1, 7500));
        let cold = milliseconds(preset.prefill(7500, warm_up)) + rest;
        let warm = milliseconds(preset.prefill(7500, 7500)) + rest;
        // Two prefill engines and thirty requests that never overlap: the first on each is cold.
        let mean = (2.0 * cold + 28.0 * warm) / 30.0;
        let steps: f64 = (1..200).map(|made| milliseconds(preset.step(1, 7500 + made))).sum();
        for (simulated, published) in [mean, warm, cold, steps / 199.0].into_iter().zip(PUBLISHED) {
            let ratio = simulated / published;
            assert!((0.95..1.05).contains(&ratio), "{simulated} against {published}");
        }
    }

    /// Rows of single engines, four GPUs: requests at once, then TTFT and TPOT in milliseconds.
    const QWEN3_ROWS: [(u16, f64, f64); 5] = [
        (8, 426.0, 12.3),
        (16, 513.0, 15.4),
        (32, 634.0, 22.0),
        (64, 905.0, 34.9),
        (128, 1363.0, 61.7),
    ];

    #[test]
    fn the_qwen3_preset_decodes_as_the_single_engines_it_is_fitted_to() {
        for (at_once, ttft, tpot) in QWEN3_ROWS {
            let rate = f64::from(at_once) / (ttft + 511.0 * tpot);
            let step = tpot * (1.0 - rate * 170.0);
            let made = H100_QWEN3_32B.step(1, usize::from(at_once) * 4352).as_secs_f64() * 1e3;
            assert!(
                (0.9..1.1).contains(&(made / step)),
                "{made} against {step} at {at_once}"
            );
        }
    }

    #[test]
    fn the_qwen3_preset_gives_the_disaggregated_row_it_was_not_fitted_to() {
        // aiconfigurator, vLLM 0.12, 8 prefill engines of one GPU and 2 decode engines of four, 4000 in and 1000 out.
        const PUBLISHED: [f64; 2] = [368.0, 8.75];
        let preset = H100_QWEN3_32B;
        let milliseconds = |duration: Duration| duration.as_secs_f64() * 1e3;
        let ttft = milliseconds(preset.prefill(4000, 4000) + preset.transfer(4000) + preset.step(1, 4000));
        let tpot = milliseconds(preset.step(1, 4500));
        for (made, published) in [ttft, tpot].into_iter().zip(PUBLISHED) {
            assert!((0.93..1.07).contains(&(made / published)), "{made} against {published}");
        }
    }

    #[test]
    fn a_length_is_touched_for_the_first_time_only_once() {
        let preset = H100_LLAMA_3_1_8B;
        assert!(preset.prefill(1000, 0) > preset.prefill(1000, 500));
        assert_eq!(preset.prefill(1000, 1000), preset.prefill(1000, 5000));
    }

    #[test]
    fn nothing_takes_time_in_the_instant_preset() {
        assert_eq!(INSTANT.prefill(10_000, 0), Duration::ZERO);
        assert_eq!(INSTANT.transfer(10_000), Duration::ZERO);
        assert!(INSTANT.steps_take_no_time() && !H100_LLAMA_3_1_8B.steps_take_no_time());
    }
}
