//! A model server for tests: prefill engines with one queue, and requests that arrive as in the benchmark.

use crate::Arrivals;

/// Prefill engines with one queue and a constant service time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Queue {
    pub(crate) servers: usize,
    /// Service time per request in seconds.
    pub(crate) service: f64,
    /// Seconds from the end of the service to the first token.
    pub(crate) hand_off: f64,
}

impl Queue {
    /// Two H100 that each prefill 7500 tokens of an 8B model, and 30 ms for the KV hand-off.
    pub(crate) const PREFILLERS: Self = Self {
        servers: 2,
        service: 0.248,
        hand_off: 0.03,
    };

    /// The release time and the time to first token of each request.
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

    /// The highest rate, to 1 %, at which this share of very many requests meets the limit.
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
