//! Whether a queue grows without bound while a run goes on: then its numbers say how long it ran, and nothing of the
//! server. Pure.

/// How the time to first token rises along a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Growth {
    /// Seconds that it rises per second; surely at least so many. A server that is asked for 10 % more than it can do falls
    /// behind by 0.1.
    pub least: f64,
    /// The rise from the first to the last part of the run, over the mean of the first part.
    pub rise: f64,
}

/// Parts of a run. Neighbours wait together, so the parts are compared, not single requests.
const PARTS: usize = 8;
/// Fewest requests of a part.
const PART_REQUESTS: usize = 5;
/// Student's t of 97.5 % for as many parts.
const STUDENT: f64 = 2.447;
/// A server that falls behind by less needs longer than any run to show it.
const LEAST_SLOPE: f64 = 0.02;
/// A rise that no longer goes unseen.
const LEAST_RISE: f64 = 1.0;

impl Growth {
    /// Of requests in the order of their release: when each was released, and how long its first token took, in seconds.
    /// `None` of too few.
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
        let rise = slope * (parts[PARTS - 1].0 - parts[0].0);
        Some(Self {
            least: slope - STUDENT * error,
            rise: rise / parts[0].1.max(f64::MIN_POSITIVE),
        })
    }

    /// Whether the server has more to do than it can.
    pub fn is_overload(self) -> bool {
        self.least > LEAST_SLOPE && self.rise > LEAST_RISE
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
    use crate::bench::search::queue_model::Queue;

    fn is_overload(rate: f64, burstiness: f64, count: usize, seed: u32) -> bool {
        let requests = Queue::PREFILLERS.first_tokens(rate, burstiness, count, seed);
        Growth::of(&requests).is_some_and(Growth::is_overload)
    }

    #[test]
    fn a_server_that_is_asked_for_too_much_is_found_out() {
        let found = (0..20).filter(|&seed| is_overload(10.0, 1.0, 200, seed)).count();
        assert!(found >= 18, "{found} of 20");
        assert!((0..20).all(|seed| is_overload(9.0, 100.0, 200, seed)));
    }

    #[test]
    fn a_server_that_keeps_up_is_rarely_accused() {
        let accused = (0..200).filter(|&seed| is_overload(5.0, 1.0, 200, seed)).count();
        assert!(accused <= 4, "{accused} of 200");
        assert!((0..50).all(|seed| !is_overload(7.5, 100.0, 400, seed)));
    }

    #[test]
    fn few_requests_tell_nothing() {
        assert_eq!(Growth::of(&[(0.0, 1.0); 39]), None);
        assert_eq!(Growth::of(&[(0.0, 1.0); 80]), None);
    }
}
