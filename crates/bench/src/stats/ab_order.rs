//! A/B comparison of two servers on the same requests: the order of runs, and the statistics of the pairs. Pure.

use crate::record::{Answer, Record};
use crate::stats::Metric;
use crate::stats::bootstrap::{Column, Statistic};
use crate::stats::compare::{self, MetricChange};

/// The two servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The measured server.
    A,
    /// The server that it is compared with.
    B,
}

/// Number of blocks. It is even, so that each server goes first equally often.
const BLOCKS: usize = 4;

/// The number of requests in each block. No block is empty.
pub fn blocks(requests: usize) -> Vec<usize> {
    let count = if requests < BLOCKS { requests.min(2) } else { BLOCKS };
    (0..count)
        .map(|block| requests * (block + 1) / count - requests * block / count)
        .collect()
}

/// The order of the servers in a block. `A B B A` cancels a linear drift over time.
pub fn order(block: usize) -> [Side; 2] {
    if block.is_multiple_of(2) {
        [Side::A, Side::B]
    } else {
        [Side::B, Side::A]
    }
}

/// The requests that both servers answered, in pairs.
#[derive(Debug, Clone, Default)]
pub struct Pairs {
    answers: Vec<(Answer, Answer)>,
    /// Requests that only one server answered.
    unpaired: usize,
}

impl Pairs {
    /// Adds the records of one block from both servers, each in the order of the schedule.
    pub fn add(&mut self, first: &[Record], second: &[Record]) {
        let mut others = second.iter().peekable();
        for record in first {
            while others.next_if(|other| other.index < record.index).is_some() {
                self.unpaired += 1;
            }
            let other = others.next_if(|other| other.index == record.index);
            match (&record.result, other.map(|other| &other.result)) {
                (Ok(one), Some(Ok(other))) => self.answers.push((one.clone(), other.clone())),
                _ => self.unpaired += 1,
            }
        }
        self.unpaired += others.count();
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.answers.len()
    }

    /// Whether there are no pairs.
    pub fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }

    /// Requests that only one server answered. They do not count.
    pub fn unpaired(&self) -> usize {
        self.unpaired
    }

    /// The change from A to B in every measure.
    pub fn rows(&self, percentiles: &[f64]) -> Vec<MetricChange> {
        let mut statistics = vec![Statistic::Mean, Statistic::Percentile(50.0)];
        let others = percentiles
            .iter()
            .filter(|percentile| (**percentile - 50.0).abs() > f64::EPSILON);
        statistics.extend(others.map(|&percentile| Statistic::Percentile(percentile)));
        let mut rows = Vec::new();
        for metric in [Metric::Ttft, Metric::Tpot, Metric::Itl, Metric::E2el] {
            let columns = (
                Column::new(self.answers.iter().map(|(answer, _)| values(answer, metric))),
                Column::new(self.answers.iter().map(|(_, answer)| values(answer, metric))),
            );
            for &statistic in &statistics {
                let value = |column: &Column| Some(column.value(statistic)? * 1000.0);
                let Some(means) = value(&columns.0).zip(value(&columns.1)) else {
                    continue;
                };
                rows.push(compare::latency(
                    metric,
                    statistic,
                    means,
                    Some((&columns.0, &columns.1)),
                    true,
                ));
            }
        }
        rows
    }
}

/// The values that one answer has for a metric, in seconds.
fn values(answer: &Answer, metric: Metric) -> Vec<f64> {
    match metric {
        Metric::Ttft => vec![answer.first_token.as_secs_f64()],
        Metric::Tpot => answer.time_per_output_token().into_iter().collect(),
        Metric::Itl => answer.gaps.iter().map(std::time::Duration::as_secs_f64).collect(),
        _ => vec![answer.latency.as_secs_f64()],
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::stats::compare::ChangeVerdict;

    fn record(index: usize, milliseconds: Option<u64>) -> Record {
        let answer = milliseconds.map(|milliseconds| Answer {
            first_token: Duration::from_millis(milliseconds),
            latency: Duration::from_millis(milliseconds),
            ..Answer::default()
        });
        Record {
            index,
            result: answer.ok_or_else(|| "no".to_owned()),
            scheduled: Duration::ZERO,
            released: Duration::ZERO,
            admitted: Duration::ZERO,
            started: Duration::ZERO,
        }
    }

    #[test]
    fn only_requests_that_both_answered_are_paired() {
        let mut pairs = Pairs::default();
        let first = [
            record(0, Some(1)),
            record(1, None),
            record(2, Some(1)),
            record(4, Some(1)),
        ];
        let second = [
            record(0, Some(1)),
            record(1, Some(1)),
            record(3, Some(1)),
            record(4, Some(1)),
            record(5, None),
        ];
        pairs.add(&first, &second);
        assert_eq!((pairs.len(), pairs.unpaired()), (2, 4));
    }

    #[test]
    fn pairing_detects_small_differences() {
        let milliseconds = |index: usize| 100 + (index * 37 % 50) as u64 * 20;
        let first: Vec<Record> = (0..100).map(|index| record(index, Some(milliseconds(index)))).collect();
        let second: Vec<Record> = (0..100)
            .map(|index| record(index, Some(milliseconds(index) + 10)))
            .collect();
        let mut pairs = Pairs::default();
        pairs.add(&first, &second);
        let rows = pairs.rows(&[99.0]);
        let mean = rows.iter().find(|row| row.key == "mean_ttft_ms").unwrap();
        assert_eq!(mean.verdict, ChangeVerdict::Slower);
        assert!(mean.detectable.unwrap() < 0.02, "{mean:?}");
        assert!(rows.iter().all(|row| !row.key.contains("itl")));
    }

    proptest! {
        #[test]
        fn blocks_hold_all_requests_and_alternate_the_first_server(requests in 1_usize..1000) {
            let blocks = blocks(requests);
            prop_assert_eq!(blocks.iter().sum::<usize>(), requests);
            prop_assert!(blocks.iter().all(|count| *count > 0));
            let first = (0..blocks.len()).filter(|&block| order(block)[0] == Side::A).count();
            prop_assert!(requests < 2 || first * 2 == blocks.len());
        }
    }
}
