//! numpy's two random generators, bit for bit, as far as `vllm bench serve` uses them.
//!
//! vLLM's client seeds both with the same number. The same draws give the same arrivals and prompts. Pure. The test
//! vectors come from numpy.

use rand_mt::Mt;
use rand_pcg::Pcg64;
use rand_pcg::rand_core::Rng as _;

/// `np.random` after `np.random.seed(seed)`: the legacy global generator on MT19937.
#[derive(Debug, Clone)]
pub(crate) struct LegacyGenerator {
    twister: Mt,
    /// The polar method makes normal draws in pairs; this is the second one.
    spare_normal: Option<f64>,
}

impl LegacyGenerator {
    pub(crate) fn new(seed: u32) -> Self {
        Self {
            twister: Mt::new(seed),
            spare_normal: None,
        }
    }

    /// One draw of `np.random.randint(0, count)`, also of `RandomState(seed).randint`. `count` is at least 1.
    ///
    /// Method: draws the low bits of the highest value until they are in range. A range of one value draws nothing.
    pub(crate) fn below(&mut self, count: u32) -> u32 {
        let highest = count - 1;
        if highest == 0 {
            return 0;
        }
        let mask = u32::MAX >> highest.leading_zeros();
        loop {
            let value = self.twister.next_u32() & mask;
            if value <= highest {
                return value;
            }
        }
    }

    /// `np.random.permutation(count)`, for a count within 32 bits.
    pub(crate) fn permutation(&mut self, count: usize) -> Vec<usize> {
        let mut items: Vec<usize> = (0..count).collect();
        for index in (1..count).rev() {
            let other = self.below(u32::try_from(index).map_or(u32::MAX, |index| index + 1));
            items.swap(index, other as usize);
        }
        items
    }

    /// `np.random.gamma(shape, scale)`. Both must be positive and finite.
    ///
    /// Methods: Marsaglia and Tsang (2000) above shape 1, Ahrens and Dieter's GS (1974) below it.
    pub(crate) fn gamma(&mut self, shape: f64, scale: f64) -> f64 {
        scale * self.standard_gamma(shape)
    }

    #[expect(clippy::float_cmp, reason = "numpy takes the exponential exactly at shape 1")]
    fn standard_gamma(&mut self, shape: f64) -> f64 {
        if shape == 1.0 {
            self.standard_exponential()
        } else if shape < 1.0 {
            self.gamma_below_one(shape)
        } else {
            self.gamma_above_one(shape)
        }
    }

    fn gamma_below_one(&mut self, shape: f64) -> f64 {
        loop {
            let uniform = self.uniform();
            let exponential = self.standard_exponential();
            if uniform <= 1.0 - shape {
                let candidate = uniform.powf(1.0 / shape);
                if candidate <= exponential {
                    return candidate;
                }
            } else {
                let rest = -((1.0 - uniform) / shape).ln();
                let candidate = (1.0 - shape + shape * rest).powf(1.0 / shape);
                if candidate <= exponential + rest {
                    return candidate;
                }
            }
        }
    }

    fn gamma_above_one(&mut self, shape: f64) -> f64 {
        let base = shape - 1.0 / 3.0;
        let spread = 1.0 / (9.0 * base).sqrt();
        loop {
            let (normal, cube_root) = loop {
                let normal = self.standard_normal();
                let cube_root = 1.0 + spread * normal;
                if cube_root > 0.0 {
                    break (normal, cube_root);
                }
            };
            let cube = cube_root * cube_root * cube_root;
            let uniform = self.uniform();
            let square = normal * normal;
            // The order of the multiplications is numpy's: another one differs in the last bit.
            if uniform < 1.0 - 0.0331 * square * square
                || uniform.ln() < 0.5 * normal * normal + base * (1.0 - cube + cube.ln())
            {
                return base * cube;
            }
        }
    }

    /// Marsaglia's polar method.
    fn standard_normal(&mut self) -> f64 {
        if let Some(spare) = self.spare_normal.take() {
            return spare;
        }
        loop {
            let first = 2.0 * self.uniform() - 1.0;
            let second = 2.0 * self.uniform() - 1.0;
            let square = first * first + second * second;
            if square < 1.0 && square != 0.0 {
                let factor = (-2.0 * square.ln() / square).sqrt();
                self.spare_normal = Some(factor * first);
                return factor * second;
            }
        }
    }

    fn standard_exponential(&mut self) -> f64 {
        -(1.0 - self.uniform()).ln()
    }

    /// A double in [0, 1) of 53 random bits.
    fn uniform(&mut self) -> f64 {
        let high = f64::from(self.twister.next_u32() >> 5);
        let low = f64::from(self.twister.next_u32() >> 6);
        (high * 67_108_864.0 + low) / 9_007_199_254_740_992.0
    }
}

/// `np.random.default_rng(seed)`: PCG64 seeded through `SeedSequence`.
#[derive(Debug)]
pub(crate) struct Generator {
    pcg: Pcg64,
    /// The high half of the last 64-bit draw: a 32-bit draw takes the low half first.
    spare_half: Option<u32>,
}

impl Generator {
    pub(crate) fn new(seed: u32) -> Self {
        let [state_high, state_low, stream_high, stream_low] = seed_sequence(seed);
        let join = |high, low| u128::from(high) << 64 | u128::from(low);
        Self {
            pcg: Pcg64::new(join(state_high, state_low), join(stream_high, stream_low)),
            spare_half: None,
        }
    }

    /// One draw of `integers(low, highest + 1)`. A range of one value draws nothing.
    ///
    /// Method: Lemire's (2019), multiplication with rejection.
    pub(crate) fn integer(&mut self, low: u32, highest: u32) -> u32 {
        debug_assert!(low <= highest, "an empty range has no integer");
        let span = highest - low;
        if span == 0 {
            return low;
        }
        let Some(count) = span.checked_add(1) else {
            return self.next_u32();
        };
        let rejected_below = (u32::MAX - span) % count;
        loop {
            let product = u64::from(self.next_u32()) * u64::from(count);
            let [offset, fraction] = halves(product);
            if fraction >= rejected_below {
                return low + offset;
            }
        }
    }

    fn next_u32(&mut self) -> u32 {
        if let Some(high) = self.spare_half.take() {
            return high;
        }
        let [high, low] = halves(self.pcg.next_u64());
        self.spare_half = Some(high);
        low
    }
}

/// The high and the low 32 bits.
#[expect(clippy::cast_possible_truncation, reason = "the halves of 64 bits are 32 bits each")]
pub(crate) fn halves(value: u64) -> [u32; 2] {
    [(value >> 32) as u32, value as u32]
}

/// `SeedSequence(seed).generate_state(4, np.uint64)` (O'Neill's `seed_seq` as numpy has it; the constants are its own).
fn seed_sequence(seed: u32) -> [u64; 4] {
    const POOL_SIZE: usize = 4;
    let mut hash_constant = 0x43b0_d7e5_u32;
    let mut hash = |value: u32| {
        let mixed = value ^ hash_constant;
        hash_constant = hash_constant.wrapping_mul(0x931e_8875);
        let mixed = mixed.wrapping_mul(hash_constant);
        mixed ^ mixed >> 16
    };
    let mix = |left: u32, right: u32| {
        let mixed = 0xca01_f9dd_u32
            .wrapping_mul(left)
            .wrapping_sub(0x4973_f715_u32.wrapping_mul(right));
        mixed ^ mixed >> 16
    };

    let mut pool = [hash(seed), hash(0), hash(0), hash(0)];
    for source in 0..POOL_SIZE {
        for target in (0..POOL_SIZE).filter(|&target| target != source) {
            pool[target] = mix(pool[target], hash(pool[source]));
        }
    }

    let mut output_constant = 0x8b51_f9dd_u32;
    let mut words = pool.iter().cycle().map(|&word| {
        let mixed = word ^ output_constant;
        output_constant = output_constant.wrapping_mul(0x58f3_8ded);
        let mixed = mixed.wrapping_mul(output_constant);
        u64::from(mixed ^ mixed >> 16)
    });
    std::array::from_fn(|_| {
        let low = words.next().unwrap_or_default();
        low | words.next().unwrap_or_default() << 32
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{fixture, numbers, rows};

    #[test]
    fn gamma_draws_equal_numpys_bit_for_bit() {
        for row in rows(fixture!("gamma.txt")) {
            let [parameters, first, fold] = row[..] else {
                panic!("{row:?}")
            };
            let [seed, shape, rate] = numbers::<f64>(parameters)[..] else {
                panic!("{row:?}")
            };
            let mut generator = LegacyGenerator::new(format!("{seed}").parse().unwrap());
            let draws: Vec<u64> = (0..2000)
                .map(|_| generator.gamma(shape, 1.0 / (rate * shape)).to_bits())
                .collect();
            let expected: Vec<u64> = first
                .split_whitespace()
                .map(|bits| u64::from_str_radix(bits, 16).unwrap())
                .collect();
            assert_eq!(draws[..4], expected, "{parameters}");
            let folded = draws.iter().fold(0_u64, |hash, bits| hash.rotate_left(1) ^ bits);
            assert_eq!(format!("{folded:016x}"), fold.trim(), "{parameters}");
        }
    }

    #[test]
    fn integer_draws_equal_numpys_across_calls_on_one_generator() {
        let mut generator = (0, Generator::new(0));
        for row in rows(fixture!("integers.txt")) {
            let [parameters, draws] = row[..] else {
                panic!("{row:?}")
            };
            let [seed, low, highest] = numbers::<u32>(parameters)[..] else {
                panic!("{row:?}")
            };
            if generator.0 != seed {
                generator = (seed, Generator::new(seed));
            }
            for expected in numbers::<u32>(draws) {
                assert_eq!(generator.1.integer(low, highest), expected, "{parameters}");
            }
        }
    }
}
