//! Detects overload: whether the queue grows without bound during a run. The latencies of such a run depend only on its
//! length. Pure.

/// The growth of the time to first token during a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QueueGrowth {
    /// Lower confidence bound of the growth, in seconds per second. A server at 110 % of its capacity falls behind by
    /// 0.1.
    pub min_slope: f64,
    /// The growth from the first to the last part of the run, relative to the mean of the first part.
    pub relative_rise: f64,
}

/// Number of parts of a run. Parts are compared, not single requests, because neighbours wait together.
const PARTS: usize = 8;
/// Fewest requests in a part.
const PART_REQUESTS: usize = 5;
/// Student's t at 97.5 % for this number of parts.
const STUDENT: f64 = 2.447;
/// Smallest growth that counts: less takes longer than any run to show.
const LEAST_SLOPE: f64 = 0.02;
/// Smallest relative growth that counts.
const LEAST_RISE: f64 = 1.0;

impl QueueGrowth {
    /// Computes the growth from requests in the order of their release: release time and time to first token, in
    /// seconds. `None` for too few requests.
    pub fn of(requests: &[(f64, f64)]) -> Option<Self> {
        if requests.len() < PARTS * PART_REQUESTS {
            return None;
        }
        let parts: Vec<(f64, f64)> = (0..PARTS)
            .map(|part| {
                let [from, to] = [part, part + 1].map(|bound| bound * requests.len() / PARTS);
                mean(&requests[from..to])
            })
            .collect();
        let (middle, level) = mean(&parts);
        let spread: f64 = parts.iter().map(|(at, _)| (at - middle).powi(2)).sum();
        if spread <= 0.0 {
            return None;
        }
        let slope = parts
            .iter()
            .map(|(at, value)| (at - middle) * (value - level))
            .sum::<f64>()
            / spread;
        let residual = |(at, value): &(f64, f64)| (value - level - slope * (at - middle)).powi(2);
        let error = (parts.iter().map(residual).sum::<f64>() / (PARTS - 2) as f64 / spread).sqrt();
        let total_rise = slope * (parts[PARTS - 1].0 - parts[0].0);
        Some(Self {
            min_slope: slope - STUDENT * error,
            relative_rise: total_rise / parts[0].1.max(f64::MIN_POSITIVE),
        })
    }

    /// Whether the load exceeds the capacity of the server.
    pub fn is_overload(self) -> bool {
        self.min_slope > LEAST_SLOPE && self.relative_rise > LEAST_RISE
    }
}

fn mean(points: &[(f64, f64)]) -> (f64, f64) {
    let count = points.len() as f64;
    let sum = points
        .iter()
        .fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
    (sum.0 / count, sum.1 / count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::queue_model::Queue;

    fn is_overload(rate: f64, burstiness: f64, count: usize, seed: u32) -> bool {
        let requests = Queue::PREFILLERS.first_tokens(rate, burstiness, count, seed);
        QueueGrowth::of(&requests).is_some_and(QueueGrowth::is_overload)
    }

    #[test]
    fn overload_is_detected() {
        let found = (0..20).filter(|&seed| is_overload(10.0, 1.0, 200, seed)).count();
        assert!(found >= 18, "{found} of 20");
        assert!((0..20).all(|seed| is_overload(9.0, 100.0, 200, seed)));
    }

    #[test]
    fn a_server_that_keeps_up_is_rarely_overloaded() {
        let accused = (0..200).filter(|&seed| is_overload(5.0, 1.0, 200, seed)).count();
        assert!(accused <= 4, "{accused} of 200");
        assert!((0..50).all(|seed| !is_overload(7.5, 100.0, 400, seed)));
    }

    #[test]
    fn few_requests_have_no_growth() {
        assert_eq!(QueueGrowth::of(&[(0.0, 1.0); 39]), None);
        assert_eq!(QueueGrowth::of(&[(0.0, 1.0); 80]), None);
    }
}
