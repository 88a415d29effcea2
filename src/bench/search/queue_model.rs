//! A server that is a queue, for tests: requests that arrive as the bench sends them, and prefillers that take them in turn.

use crate::bench::Arrivals;

/// As many prefillers with one queue, each of which takes the same time for every request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Queue {
    pub(crate) servers: usize,
    /// Seconds per request.
    pub(crate) service: f64,
    /// Seconds from there to the first token.
    pub(crate) hand_off: f64,
}

impl Queue {
    /// Two H100 that prefill 7500 tokens of an 8B model each, and 30 ms to hand the KV over.
    pub(crate) const PREFILLERS: Self = Self {
        servers: 2,
        service: 0.248,
        hand_off: 0.03,
    };

    /// When each request is released, and how long its first token takes.
    pub(crate) fn first_tokens(&self, request_rate: f64, burstiness: f64, count: usize, seed: u32) -> Vec<(f64, f64)> {
        let arrivals = Arrivals {
            request_rate,
            burstiness,
            ramp: None,
        };
        let mut free = vec![0.0_f64; self.servers];
        arrivals
            .schedule(count, seed)
            .into_iter()
            .map(|arrival| {
                let next = free
                    .iter_mut()
                    .min_by(|left, right| left.total_cmp(right))
                    .expect("a server");
                *next = next.max(arrival) + self.service;
                (arrival, *next - arrival + self.hand_off)
            })
            .collect()
    }

    /// The highest rate, to a hundredth of it, at which such a share of very many requests has its first token in time.
    pub(crate) fn true_rate(&self, burstiness: f64, limit: f64, attainment: f64) -> f64 {
        let meets = |rate: f64| {
            let all = self.first_tokens(rate, burstiness, 100_000, 5);
            let good = all.iter().filter(|(_, first_token)| *first_token <= limit).count();
            good as f64 >= attainment * all.len() as f64
        };
        let (mut low, mut high) = (0.01, 100.0);
        while high / low > 1.01 {
            let middle = f64::sqrt(low * high);
            if meets(middle) {
                low = middle;
            } else {
                high = middle;
            }
        }
        low
    }
}
