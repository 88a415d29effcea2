//! Bootstrap confidence intervals of a statistic and of the ratio of two runs. Pure: the draws have a fixed seed.
//!
//! Requests of one run are not independent: while one waits, its neighbours wait too. So blocks of neighbouring
//! requests are drawn. A block has the length of the cube root of the number of requests, the usual choice. All values
//! of a request are drawn together, because the gaps of one answer are even more alike.

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

/// A statistic of many values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Statistic {
    /// The arithmetic mean.
    Mean,
    /// The percentile, 0 to 100, interpolated as in numpy; 50 is the median.
    Percentile(f64),
}

/// The values of one metric for every request of a run: none, one or many per request.
#[derive(Debug, Clone, Default)]
pub struct Column {
    /// All values in ascending order, each with the position of its request.
    sorted: Vec<(f64, usize)>,
    /// Sum and number of values of each request.
    sums: Vec<(f64, usize)>,
}

/// The confidence interval of a ratio.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Interval {
    /// Its lower end.
    pub(crate) low: f64,
    /// Its upper end.
    pub(crate) high: f64,
    /// Standard error of the logarithm of the ratio: for small errors the relative error of the ratio.
    pub(crate) error: f64,
}

/// Most work steps for one column. Larger columns get fewer draws, because they need fewer.
const MOST_STEPS: usize = 40_000_000;
const DRAWS: usize = 1000;
const FEWEST_DRAWS: usize = 200;
const SEED: u64 = 7;

impl Column {
    /// The column of these values, in the order of the schedule.
    pub fn new(values: impl IntoIterator<Item = Vec<f64>>) -> Self {
        let mut column = Self::default();
        for (place, values) in values.into_iter().enumerate() {
            column.sums.push((values.iter().sum(), values.len()));
            column.sorted.extend(values.into_iter().map(|value| (value, place)));
        }
        column
            .sorted
            .sort_unstable_by(|(left, _), (right, _)| left.total_cmp(right));
        column
    }

    /// Number of requests, including those without a value.
    pub fn requests(&self) -> usize {
        self.sums.len()
    }

    /// Number of requests with a value.
    pub fn valued(&self) -> usize {
        self.sums.iter().filter(|(_, count)| *count > 0).count()
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.sorted.len()
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.sorted.is_empty()
    }

    /// The statistic; `None` without values.
    pub fn value(&self, statistic: Statistic) -> Option<f64> {
        self.weighted(statistic, &vec![1; self.requests()])
    }

    /// The 95 % confidence interval of the statistic, with the requests as the only source of chance. `None` if fewer
    /// than two requests have a value.
    pub fn interval(&self, statistic: Statistic) -> Option<(f64, f64)> {
        if self.valued() < 2 {
            return None;
        }
        let mut random = StdRng::seed_from_u64(SEED);
        let draws = (MOST_STEPS / (self.len() + self.requests())).clamp(FEWEST_DRAWS, DRAWS);
        let values = (0..draws).filter_map(|_| self.weighted(statistic, &draw(self.requests(), &mut random)));
        let values = Self::new(values.map(|value| vec![value]));
        let at = |percentile| values.value(Statistic::Percentile(percentile));
        // The statistic must exist in most draws.
        at(2.5).zip(at(97.5)).filter(|_| values.len() >= draws * 9 / 10)
    }

    /// The statistic with each request weighted.
    fn weighted(&self, statistic: Statistic, weights: &[u32]) -> Option<f64> {
        let count = |(&(_, count), &weight): (&(f64, usize), &u32)| count * weight as usize;
        let total: usize = self.sums.iter().zip(weights).map(count).sum();
        if total == 0 {
            return None;
        }
        match statistic {
            Statistic::Mean => {
                let weighed = self.sums.iter().zip(weights);
                let sum: f64 = weighed.map(|((sum, _), weight)| sum * f64::from(*weight)).sum();
                Some(sum / total as f64)
            }
            Statistic::Percentile(percentile) => Some(self.percentile(percentile, weights, total)),
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rank lies between 0 and the number of values"
    )]
    fn percentile(&self, percentile: f64, weights: &[u32], total: usize) -> f64 {
        let rank = (percentile / 100.0).clamp(0.0, 1.0) * (total - 1) as f64;
        let below = rank.floor() as usize;
        let mut passed = 0;
        let mut low = None;
        for &(value, place) in &self.sorted {
            passed += weights[place] as usize;
            if low.is_none() && passed > below {
                low = Some(value);
            }
            if let Some(low) = low
                && passed > (below + 1).min(total - 1)
            {
                return low + (value - low) * rank.fract();
            }
        }
        low.unwrap_or_default()
    }
}

/// The 95 % confidence interval of the ratio `after / before`, with the requests as the only source of chance.
///
/// With `paired`, both columns have the same requests in the same order, and each draw takes the same requests of both,
/// so that the difficulty of a request cancels out. `None` if a value is not positive or a column is empty.
pub(crate) fn ratio_interval(before: &Column, after: &Column, statistic: Statistic, paired: bool) -> Option<Interval> {
    if before.is_empty() || after.is_empty() || (paired && before.requests() != after.requests()) {
        return None;
    }
    let mut random = StdRng::seed_from_u64(SEED);
    let steps = before.len() + after.len() + before.requests() + after.requests();
    let draws = (MOST_STEPS / steps).clamp(FEWEST_DRAWS, DRAWS);
    let mut ratios = Vec::with_capacity(draws);
    for _ in 0..draws {
        let of_before = draw(before.requests(), &mut random);
        let of_after = (!paired).then(|| draw(after.requests(), &mut random));
        let low = before.weighted(statistic, &of_before);
        let high = after.weighted(statistic, of_after.as_ref().unwrap_or(&of_before));
        if let (Some(low), Some(high)) = (low, high)
            && low > 0.0
            && high > 0.0
        {
            ratios.push((high / low).ln());
        }
    }
    // The statistic must exist in most draws.
    if ratios.len() < draws * 9 / 10 {
        return None;
    }
    Some(summary(&ratios))
}

fn summary(logarithms: &[f64]) -> Interval {
    let count = logarithms.len() as f64;
    let mean = logarithms.iter().sum::<f64>() / count;
    let variance = logarithms.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
    let column = Column::new(logarithms.iter().map(|&value| vec![value]));
    let at = |percentile| column.value(Statistic::Percentile(percentile)).unwrap_or(mean).exp();
    Interval {
        low: at(2.5),
        high: at(97.5),
        error: variance.sqrt(),
    }
}

/// Draws blocks of neighbours until `count` requests are drawn. Returns how often each was drawn. The list is circular,
/// so that all requests have the same chance.
fn draw(count: usize, random: &mut StdRng) -> Vec<u32> {
    let mut weights = vec![0; count];
    let block = block(count);
    let mut left = count;
    while left > 0 {
        let first = random.random_range(0..count);
        for place in 0..block.min(left) {
            weights[(first + place) % count] += 1;
        }
        left -= block.min(left);
    }
    weights
}

/// The length of a block.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a root of a number of requests"
)]
fn block(count: usize) -> usize {
    ((count as f64).cbrt().round() as usize).max(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn column(values: &[f64]) -> Column {
        Column::new(values.iter().map(|&value| vec![value]))
    }

    /// `count` numbers around 100 with a deviation of about 10, times `scale`.
    fn noise(seed: u64, count: usize, scale: f64) -> Vec<f64> {
        let mut random = StdRng::seed_from_u64(seed);
        (0..count)
            .map(|_| {
                let sum: f64 = (0..12).map(|_| random.random_range(0.0..1.0)).sum();
                scale * (100.0 + 10.0 * (sum - 6.0))
            })
            .collect()
    }

    #[test]
    fn percentiles_are_numpys() {
        let values = column(&[4.0, 1.0, 3.0, 2.0]);
        assert_eq!(values.value(Statistic::Percentile(50.0)), Some(2.5));
        assert_eq!(values.value(Statistic::Percentile(100.0)), Some(4.0));
        assert_eq!(values.value(Statistic::Percentile(0.0)), Some(1.0));
        assert_eq!(values.value(Statistic::Mean), Some(2.5));
        assert_eq!(column(&[7.0]).value(Statistic::Percentile(99.0)), Some(7.0));
        assert_eq!(column(&[]).value(Statistic::Mean), None);
    }

    #[test]
    fn a_weight_counts_as_that_many_values() {
        let values = column(&[1.0, 2.0, 3.0]);
        let weights = [0, 3, 1];
        assert_eq!(values.weighted(Statistic::Mean, &weights), Some(2.25));
        assert_eq!(values.weighted(Statistic::Percentile(50.0), &weights), Some(2.0));
        assert_eq!(values.weighted(Statistic::Percentile(100.0), &weights), Some(3.0));
    }

    #[test]
    fn ratio_intervals_have_their_coverage() {
        let mut held = 0;
        for seed in 0..100 {
            let before = column(&noise(seed, 60, 1.0));
            let after = column(&noise(seed + 1000, 60, 1.2));
            let interval = ratio_interval(&before, &after, Statistic::Mean, false).unwrap();
            held += i32::from(interval.low <= 1.2 && 1.2 <= interval.high);
        }
        assert!((84..=100).contains(&held), "{held} of 100");
    }

    #[test]
    fn intervals_of_one_run_have_their_coverage() {
        for (statistic, truth) in [(Statistic::Mean, 100.0), (Statistic::Percentile(50.0), 100.0)] {
            let mut held = 0;
            for seed in 0..40 {
                let (low, high) = column(&noise(seed, 60, 1.0)).interval(statistic).unwrap();
                held += i32::from(low <= truth && truth <= high);
            }
            assert!((32..=40).contains(&held), "{statistic:?}: {held} of 40");
        }
        assert_eq!(column(&[1.0]).interval(Statistic::Mean), None);
    }

    #[test]
    fn gaps_of_one_request_are_drawn_together() {
        let alone = column(&noise(5, 400, 1.0));
        let grouped: Vec<Vec<f64>> = noise(5, 20, 1.0).into_iter().map(|value| vec![value; 20]).collect();
        let width = |column: &Column| {
            let (low, high) = column.interval(Statistic::Mean).unwrap();
            high - low
        };
        assert!(width(&Column::new(grouped)) > 2.0 * width(&alone));
    }

    #[test]
    fn pairing_removes_common_noise() {
        let noise = noise(3, 60, 1.0);
        let before = column(&noise);
        let after = column(&noise.iter().map(|value| value * 1.01).collect::<Vec<_>>());
        let apart = ratio_interval(&before, &after, Statistic::Mean, false).unwrap();
        let paired = ratio_interval(&before, &after, Statistic::Mean, true).unwrap();
        assert!(apart.low < 1.0 && 1.0 < apart.high, "{apart:?}");
        assert!(paired.low > 1.005 && paired.high < 1.015, "{paired:?}");
    }

    #[test]
    fn zero_or_empty_columns_have_no_interval() {
        let zero = column(&[0.0; 20]);
        assert_eq!(ratio_interval(&zero, &zero, Statistic::Mean, false), None);
        assert_eq!(ratio_interval(&zero, &column(&[]), Statistic::Mean, false), None);
    }

    proptest! {
        #[test]
        fn a_draw_takes_as_many_requests_as_there_are(count in 1_usize..300, seed: u64) {
            let weights = draw(count, &mut StdRng::seed_from_u64(seed));
            prop_assert_eq!(weights.iter().sum::<u32>() as usize, count);
        }

        #[test]
        fn a_percentile_lies_between_the_values(
            values in prop::collection::vec(0.1_f64..10.0, 1..50), percentile in 0.0_f64..100.0,
        ) {
            let value = column(&values).value(Statistic::Percentile(percentile)).unwrap();
            let least = values.iter().copied().fold(f64::INFINITY, f64::min);
            let most = values.iter().copied().fold(0.0, f64::max);
            prop_assert!((least..=most).contains(&value));
        }
    }
}
