//! The arrival process: when each request is released, as a pure function of rate, burstiness, count and seed.

use crate::rng::numpy::LegacyGenerator;

/// The arrival process.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Arrivals {
    /// Mean requests per second; infinite releases all at once. A ramp takes precedence.
    pub request_rate: f64,
    /// Shape of the gamma distribution of the intervals. 1 is a Poisson process, a higher value is more even (the
    /// coefficient of variation is 1/√burstiness), infinite is constant.
    pub burstiness: f64,
    /// A rate that rises from request to request.
    pub ramp: Option<Ramp>,
}

/// A rate that rises from request to request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ramp {
    /// The shape of the rise.
    pub strategy: RampStrategy,
    /// Requests per second at the first request, at least 1.
    pub start: u32,
    /// Requests per second at the last request, at least `start`.
    pub end: u32,
}

/// How a rate rises from request to request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RampStrategy {
    /// By the same amount.
    Linear,
    /// By the same factor.
    Exponential,
}

impl RampStrategy {
    /// Its name on vLLM's command line and in its files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Exponential => "exponential",
        }
    }
}

impl Ramp {
    /// Requests per second at request `index` of `count`.
    pub fn rate(&self, index: usize, count: usize) -> f64 {
        let (start, end) = (f64::from(self.start), f64::from(self.end));
        let progress = index as f64 / count.saturating_sub(1).max(1) as f64;
        match self.strategy {
            RampStrategy::Linear => start + (end - start) * progress,
            RampStrategy::Exponential => start * (end / start).powf(progress),
        }
    }

    /// The whole-number rates that the first `released` of `count` requests reach, each with the first request that has
    /// it. The start rate has no request.
    pub fn steps(&self, count: usize, released: usize) -> Vec<(Option<usize>, u32)> {
        let mut steps = vec![(None, self.start)];
        let mut reached = self.start;
        for index in 0..released {
            while reached < self.end && f64::from(reached + 1) <= self.rate(index, count) {
                reached += 1;
                steps.push((Some(index), reached));
            }
        }
        steps
    }
}

impl Arrivals {
    /// Whether requests arrive at one finite rate.
    pub fn has_fixed_rate(&self) -> bool {
        self.request_rate.is_finite() && self.ramp.is_none()
    }

    /// The release instants, in seconds since the start, ascending.
    ///
    /// Same rule as `vllm bench serve` 0.32: gamma intervals from numpy's legacy generator are summed up. Unless the
    /// rate rises, they are then scaled so that the last release is at `count / request_rate`. So the first request
    /// also waits about one interval.
    pub fn schedule(&self, count: usize, seed: u32) -> Vec<f64> {
        self.schedule_from(count, LegacyGenerator::new(seed))
    }

    /// As [`Self::schedule`], with a generator that the dataset has already drawn from.
    pub(crate) fn schedule_from(&self, count: usize, mut generator: LegacyGenerator) -> Vec<f64> {
        let interval = |index: usize| {
            let rate = self.ramp.map_or(self.request_rate, |ramp| ramp.rate(index, count));
            if rate.is_infinite() {
                0.0
            } else if self.burstiness.is_infinite() {
                1.0 / rate
            } else {
                generator.gamma(self.burstiness, 1.0 / (rate * self.burstiness))
            }
        };
        let mut instants: Vec<f64> = (0..count)
            .map(interval)
            .scan(0.0, |sum, interval| {
                *sum += interval;
                Some(*sum)
            })
            .collect();
        let last = instants.last().copied().unwrap_or_default();
        if self.ramp.is_none() && last != 0.0 {
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
    use crate::fixtures::{fixture, rows};

    /// The vectors are the sleeps of `get_request` in vLLM's own client; `tests/real/bench_vectors.py` writes them.
    #[test]
    fn a_schedule_equals_that_of_vllm_bench_serve_bit_for_bit() {
        for row in rows(fixture!("schedule.txt")) {
            let [parameters, instants] = row[..] else {
                panic!("{row:?}")
            };
            let words: Vec<&str> = parameters.split_whitespace().collect();
            let number = |place: usize| words[place].parse::<f64>().unwrap();
            let strategy = words.get(4).map(|name| {
                let all = [RampStrategy::Linear, RampStrategy::Exponential];
                all.into_iter().find(|strategy| strategy.name() == *name).unwrap()
            });
            let arrivals = Arrivals {
                request_rate: number(2),
                burstiness: number(1),
                ramp: strategy.map(|strategy| Ramp {
                    strategy,
                    start: words[5].parse().unwrap(),
                    end: words[6].parse().unwrap(),
                }),
            };
            let schedule = arrivals.schedule(words[3].parse().unwrap(), words[0].parse().unwrap());
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
            let schedule = Arrivals { request_rate, burstiness, ramp: None }.schedule(count, seed);
            prop_assert_eq!(schedule.len(), count);
            prop_assert!(schedule.is_sorted() && schedule[0] >= 0.0);
            let end = count as f64 / request_rate;
            prop_assert!((schedule[count - 1] - end).abs() <= end * 1e-12);
        }
    }
}
