//! Intervals of a change between two runs, by drawing the requests anew many times. Pure: the draws have a fixed seed.
//!
//! Requests of one run are no independent draws: while one waits, its neighbours wait as well. So blocks of neighbours are
//! drawn, not single requests, and a block is as long as the cube root of their number, which is the usual order. And a
//! request brings all its values along, because the gaps of one answer are even more alike.

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

/// What is told of many values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Statistic {
    /// The arithmetic mean.
    Mean,
    /// The percentile, 0 to 100, linear between the two nearest ranks, as numpy has it; 50 is the median.
    Percentile(f64),
}

/// One measure of every request of a run: each has no value, one, or many.
#[derive(Debug, Clone, Default)]
pub struct Column {
    /// Ascending, each with the place of its request.
    sorted: Vec<(f64, usize)>,
    /// Sum and number of the values of each request.
    sums: Vec<(f64, usize)>,
}

/// How often a value would change by chance alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::bench) struct Interval {
    /// Its lower end.
    pub(in crate::bench) low: f64,
    /// Its upper end.
    pub(in crate::bench) high: f64,
    /// The standard error of the logarithm of the ratio: the relative error of the ratio, when small.
    pub(in crate::bench) error: f64,
}

/// Most steps of work for one column: beyond it fewer draws are made, because so many values need fewer.
const MOST_STEPS: usize = 40_000_000;
const DRAWS: usize = 1000;
const FEWEST_DRAWS: usize = 200;
const SEED: u64 = 7;

impl Column {
    /// Of the values of each request, in the order of the schedule.
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

    /// Requests, those without a value included.
    pub fn requests(&self) -> usize {
        self.sums.len()
    }

    /// Requests that have a value.
    pub fn valued(&self) -> usize {
        self.sums.iter().filter(|(_, count)| *count > 0).count()
    }

    /// Values.
    pub fn len(&self) -> usize {
        self.sorted.len()
    }

    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.sorted.is_empty()
    }

    /// The statistic of the values; `None` without any.
    pub fn value(&self, statistic: Statistic) -> Option<f64> {
        self.weighted(statistic, &vec![1; self.requests()])
    }

    /// The interval that holds the true value of the statistic in 95 of 100 cases, by chance of the requests alone. `None`
    /// where too few requests have a value.
    pub fn interval(&self, statistic: Statistic) -> Option<(f64, f64)> {
        if self.valued() < 2 {
            return None;
        }
        let mut random = StdRng::seed_from_u64(SEED);
        let draws = (MOST_STEPS / (self.len() + self.requests())).clamp(FEWEST_DRAWS, DRAWS);
        let values = (0..draws).filter_map(|_| self.weighted(statistic, &draw(self.requests(), &mut random)));
        let values = Self::new(values.map(|value| vec![value]));
        let at = |percentile| values.value(Statistic::Percentile(percentile));
        // A statistic that most draws do not have says nothing.
        at(2.5).zip(at(97.5)).filter(|_| values.len() >= draws * 9 / 10)
    }

    /// The statistic where each request counts as often as its weight says.
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

/// The interval that holds the true ratio `after / before` in 95 of 100 cases, by chance of the requests alone.
///
/// With `paired`, both columns are of the same requests in the same order, and each draw takes the same requests of both,
/// so that what is hard in a request cancels. `None` where a value is not above 0, or nothing can be drawn.
pub(in crate::bench) fn ratio_interval(
    before: &Column,
    after: &Column,
    statistic: Statistic,
    paired: bool,
) -> Option<Interval> {
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
    // A statistic that most draws do not have says nothing.
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

/// How often each of `count` requests is drawn, when blocks of neighbours are drawn until there are as many again. The
/// first request stands behind the last one, so that all have the same chance.
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

/// Requests of one block.
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

    /// As many numbers around 100, with a deviation of about 10, as a seed gives.
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
    fn the_interval_holds_the_true_ratio_about_as_often_as_it_says() {
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
    fn the_interval_of_one_run_holds_the_true_value_about_as_often_as_it_says() {
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
    fn gaps_of_one_request_are_no_independent_values() {
        let alone = column(&noise(5, 400, 1.0));
        let grouped: Vec<Vec<f64>> = noise(5, 20, 1.0).into_iter().map(|value| vec![value; 20]).collect();
        let width = |column: &Column| {
            let (low, high) = column.interval(Statistic::Mean).unwrap();
            high - low
        };
        assert!(width(&Column::new(grouped)) > 2.0 * width(&alone));
    }

    #[test]
    fn pairs_find_what_their_common_noise_hides() {
        let noise = noise(3, 60, 1.0);
        let before = column(&noise);
        let after = column(&noise.iter().map(|value| value * 1.01).collect::<Vec<_>>());
        let apart = ratio_interval(&before, &after, Statistic::Mean, false).unwrap();
        let paired = ratio_interval(&before, &after, Statistic::Mean, true).unwrap();
        assert!(apart.low < 1.0 && 1.0 < apart.high, "{apart:?}");
        assert!(paired.low > 1.005 && paired.high < 1.015, "{paired:?}");
    }

    #[test]
    fn what_has_no_ratio_has_no_interval() {
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
