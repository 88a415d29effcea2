//! When each request is released: a pure function of rate, burstiness, count and seed.

use super::numpy::LegacyGenerator;

/// The arrival process.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Arrivals {
    /// Mean requests per second; infinite releases all at once.
    pub request_rate: f64,
    /// Shape of the gamma distribution of the intervals: 1 is a Poisson process, more is more even (the coefficient of
    /// variation is 1/√burstiness), infinite is constant.
    pub burstiness: f64,
}

impl Arrivals {
    /// The release instants, in seconds since the start, ascending.
    ///
    /// The rule of `vllm bench serve` 0.32: gamma intervals from numpy's legacy generator, cumulated, then scaled so that
    /// the last release is at `count / request_rate`. The first request therefore waits too, about one interval.
    pub fn schedule(&self, count: usize, seed: u32) -> Vec<f64> {
        if self.request_rate.is_infinite() {
            return vec![0.0; count];
        }
        let mut generator = LegacyGenerator::new(seed);
        let mut instants: Vec<f64> = (0..count)
            .map(|_| {
                if self.burstiness.is_infinite() {
                    1.0 / self.request_rate
                } else {
                    generator.gamma(self.burstiness, 1.0 / (self.request_rate * self.burstiness))
                }
            })
            .scan(0.0, |sum, interval| {
                *sum += interval;
                Some(*sum)
            })
            .collect();
        if let Some(&last) = instants.last().filter(|&&last| last != 0.0) {
            let factor = count as f64 / self.request_rate / last;
            for instant in &mut instants {
                *instant *= factor;
            }
        }
        instants
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::bench::vectors::{numbers, rows};

    #[test]
    fn a_schedule_equals_that_of_vllm_bench_serve_bit_for_bit() {
        for row in rows(include_str!("vectors/schedule.txt")) {
            let [parameters, instants] = row[..] else {
                panic!("{row:?}")
            };
            let [seed, burstiness, request_rate, count] = numbers::<f64>(parameters)[..] else {
                panic!("{row:?}")
            };
            let arrivals = Arrivals {
                request_rate,
                burstiness,
            };
            let schedule = arrivals.schedule(format!("{count}").parse().unwrap(), format!("{seed}").parse().unwrap());
            let bits: Vec<String> = schedule
                .iter()
                .map(|instant| format!("{:016x}", instant.to_bits()))
                .collect();
            assert_eq!(bits.join(" "), instants.trim(), "{parameters}");
        }
    }

    proptest! {
        #[test]
        fn a_schedule_ascends_and_ends_at_count_over_rate(
            seed: u32, count in 1_usize..200, request_rate in 0.01_f64..1000.0, burstiness in 0.05_f64..200.0,
        ) {
            let schedule = Arrivals { request_rate, burstiness }.schedule(count, seed);
            prop_assert_eq!(schedule.len(), count);
            prop_assert!(schedule.is_sorted() && schedule[0] >= 0.0);
            let end = count as f64 / request_rate;
            prop_assert!((schedule[count - 1] - end).abs() <= end * 1e-12);
        }
    }
}
