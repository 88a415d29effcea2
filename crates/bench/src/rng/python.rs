//! Python's random generator and string hash, bit for bit, as far as vLLM's datasets use them. Pure.
//!
//! The test vectors come from `CPython` 3.11.

use rand_mt::Mt;

/// `random.Random(seed)`; the module `random` after `random.seed(seed)` is the same.
#[derive(Debug)]
pub(crate) struct Random {
    twister: Mt,
}

impl Random {
    /// A generator for a seed of 0 or more.
    pub(crate) fn new(seed: u64) -> Self {
        let [high, low] = crate::rng::numpy::halves(seed);
        let words = [low, high];
        let used = if high == 0 { 1 } else { 2 };
        Self {
            twister: Mt::new_with_key(words.into_iter().take(used)),
        }
    }

    /// `random()`: a double in [0, 1) of 53 random bits.
    fn uniform(&mut self) -> f64 {
        let high = f64::from(self.twister.next_u32() >> 5);
        let low = f64::from(self.twister.next_u32() >> 6);
        (high * 67_108_864.0 + low) / 9_007_199_254_740_992.0
    }

    /// `randrange(count)`: an integer below `count`, which is not 0.
    pub(crate) fn below(&mut self, count: usize) -> usize {
        let bits = usize::BITS - count.leading_zeros();
        loop {
            let value = self.bits(bits);
            if let Ok(value) = usize::try_from(value)
                && value < count
            {
                return value;
            }
        }
    }

    /// `getrandbits(bits)` for up to 64 bits: low words first; the last word gives its high bits.
    fn bits(&mut self, bits: u32) -> u64 {
        if bits <= 32 {
            return u64::from(self.twister.next_u32() >> (32 - bits));
        }
        let low = u64::from(self.twister.next_u32());
        low | u64::from(self.twister.next_u32() >> (64 - bits)) << 32
    }

    /// `shuffle(items)`.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for index in (1..items.len()).rev() {
            let other = self.below(index + 1);
            items.swap(index, other);
        }
    }

    /// `choices(items, k=count)`, with replacement. `items` is not empty.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the product is at least 0 and below the number of items"
    )]
    pub(crate) fn choices(&mut self, items: &[u32], count: usize) -> Vec<u32> {
        let size = items.len() as f64;
        (0..count).map(|_| items[(self.uniform() * size) as usize]).collect()
    }
}

/// `hash(text)` of ASCII text in a Python with `PYTHONHASHSEED=seed`, as the 64 bits of the signed result.
///
/// `SipHash-1-3` with a key from the seed: zero at 0, else the bytes of a linear congruential generator.
pub(crate) fn hash(text: &str, seed: u32) -> u64 {
    if text.is_empty() {
        return 0;
    }
    let [first, second] = hash_key(seed);
    match sip_hash(first, second, text.as_bytes()) {
        // `CPython` uses -1 as an error code, so no hash has that value.
        u64::MAX => u64::MAX - 1,
        hash => hash,
    }
}

fn hash_key(seed: u32) -> [u64; 2] {
    if seed == 0 {
        return [0, 0];
    }
    let mut state = seed;
    let mut byte = || {
        state = state.wrapping_mul(214_013).wrapping_add(2_531_011);
        state.to_le_bytes()[2]
    };
    let mut word = || u64::from_le_bytes(std::array::from_fn(|_| byte()));
    [word(), word()]
}

/// Aumasson and Bernstein's `SipHash` with one round per word and three at the end.
fn sip_hash(first: u64, second: u64, bytes: &[u8]) -> u64 {
    let mut state = [
        first ^ 0x736f_6d65_7073_6575,
        second ^ 0x646f_7261_6e64_6f6d,
        first ^ 0x6c79_6765_6e65_7261,
        second ^ 0x7465_6462_7974_6573,
    ];
    let words = bytes.chunks_exact(8);
    let mut last = [0; 8];
    last[..words.remainder().len()].copy_from_slice(words.remainder());
    last[7] = bytes.len().to_le_bytes()[0];
    let words = words.map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()));
    for word in words.chain([u64::from_le_bytes(last)]) {
        state[3] ^= word;
        sip_round(&mut state);
        state[0] ^= word;
    }
    state[2] ^= 0xff;
    for _ in 0..3 {
        sip_round(&mut state);
    }
    state[0] ^ state[1] ^ state[2] ^ state[3]
}

fn sip_round([a, b, c, d]: &mut [u64; 4]) {
    *a = a.wrapping_add(*b);
    *c = c.wrapping_add(*d);
    *b = b.rotate_left(13) ^ *a;
    *d = d.rotate_left(16) ^ *c;
    *a = a.rotate_left(32);
    *c = c.wrapping_add(*b);
    *a = a.wrapping_add(*d);
    *b = b.rotate_left(17) ^ *c;
    *d = d.rotate_left(21) ^ *a;
    *c = c.rotate_left(32);
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::rng::numpy::LegacyGenerator;

    #[derive(Deserialize)]
    struct Vectors {
        random: Vec<Draws>,
        legacy: Vec<Legacy>,
        hashes: Vec<Hashes>,
    }

    #[derive(Deserialize)]
    struct Draws {
        seed: u64,
        random: Vec<String>,
        bits: Vec<u64>,
        below: Vec<usize>,
        shuffle: Vec<usize>,
        choice: Vec<usize>,
        choices: Vec<u32>,
    }

    #[derive(Deserialize)]
    struct Legacy {
        seed: u32,
        randint: Vec<Vec<u32>>,
        permutation: Vec<usize>,
    }

    #[derive(Deserialize)]
    struct Hashes {
        seed: u32,
        hashes: Vec<(String, u64)>,
    }

    fn vectors() -> Vectors {
        serde_json::from_str(crate::fixtures::fixture!("python.json")).unwrap()
    }

    #[test]
    fn draws_equal_pythons() {
        for draws in vectors().random {
            let mut random = Random::new(draws.seed);
            // Python prints a double as `0x1.hhhhp-e`; only its value matters here.
            for expected in &draws.random {
                let (mantissa, exponent) = expected.trim_start_matches("0x1.").split_once('p').unwrap();
                let mantissa = 1.0 + u64::from_str_radix(mantissa, 16).unwrap() as f64 / 2_f64.powi(52);
                assert_eq!(
                    random.uniform().to_bits(),
                    (mantissa * 2_f64.powi(exponent.parse().unwrap())).to_bits()
                );
            }
            for expected in draws.bits {
                assert_eq!(random.bits(20), expected);
            }
            let counts = [1, 2, 3, 10, 1000, 1 << 31, 1 << 32, 1 << 33];
            assert_eq!(counts.map(|count| random.below(count)).to_vec(), draws.below);
            let mut items: Vec<usize> = (0..50).collect();
            random.shuffle(&mut items);
            assert_eq!(items, draws.shuffle);
            let chosen: Vec<usize> = (0..10).map(|_| random.below(17)).collect();
            assert_eq!(chosen, draws.choice);
            let items: Vec<u32> = (0..1000).collect();
            assert_eq!(random.choices(&items, 10), draws.choices);
        }
    }

    #[test]
    fn numpys_legacy_integers_and_permutations_are_its_own() {
        for legacy in vectors().legacy {
            let mut generator = LegacyGenerator::new(legacy.seed);
            for (count, expected) in [1, 2, 1000, 128_256, 1 << 31].into_iter().zip(legacy.randint) {
                let drawn: Vec<u32> = (0..6).map(|_| generator.below(count)).collect();
                assert_eq!(drawn, expected, "below {count}");
            }
            assert_eq!(generator.permutation(60), legacy.permutation);
        }
    }

    #[test]
    fn hashes_of_strings_equal_pythons_for_every_seed() {
        for Hashes { seed, hashes } in vectors().hashes {
            for (text, expected) in hashes.into_iter().filter(|(text, _)| text.is_ascii()) {
                assert_eq!(hash(&text, seed), expected, "{text} with seed {seed}");
            }
        }
    }
}
