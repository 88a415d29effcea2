//! Tests of vLLM's aggregation rules on synthetic records, and of numpy's rules on its own numbers.

use proptest::prelude::*;

use super::*;
use crate::fixtures::{fixture, numbers, rows};

const EVERYTHING: Selection<'_> = Selection {
    percentiles: &[99.0],
    objectives: &[],
    is_limited: true,
    is_scheduled: true,
};

fn milliseconds(value: u64) -> Duration {
    Duration::from_millis(value)
}

/// An answer with chunks at these milliseconds after its start.
fn answered(index: usize, started: u64, chunks: &[u64], completion_tokens: u64) -> Record {
    let gaps = chunks.windows(2).map(|pair| milliseconds(pair[1] - pair[0])).collect();
    Record {
        index,
        scheduled: milliseconds(started),
        released: milliseconds(started),
        admitted: milliseconds(started),
        started: milliseconds(started),
        result: Ok(Answer {
            first_token: milliseconds(chunks[0]),
            gaps,
            latency: milliseconds(chunks[chunks.len() - 1]),
            prompt_tokens: None,
            completion_tokens: Some(completion_tokens),
            ..Answer::default()
        }),
    }
}

fn failed(index: usize, started: u64) -> Record {
    Record {
        result: Err("HTTP 500".to_owned()),
        ..answered(index, started, &[0], 0)
    }
}

fn of(records: &[Record], selection: Selection<'_>) -> Metrics {
    Metrics::of(records, &vec![10; records.len()], Duration::from_secs(2), selection)
}

#[test]
fn means_percentiles_and_deviations_are_numpys() {
    for row in rows(fixture!("summary.txt")) {
        let [values, expected] = row[..] else { panic!("{row:?}") };
        let values = numbers::<f64>(values);
        let distribution = Distribution::of_seconds(values, &[50.0, 90.0, 99.0, 99.9]);
        let mut actual = vec![distribution.mean, distribution.median, distribution.deviation];
        actual.extend(distribution.percentiles.iter().map(|(_, value)| value));
        for (actual, expected) in actual.iter().zip(numbers::<f64>(expected)) {
            assert_eq!(
                actual.to_bits(),
                (expected * 1000.0).to_bits(),
                "{actual} ms is not {expected} s"
            );
        }
    }
}

#[test]
fn no_values_are_zero_and_not_nan() {
    let distribution = Distribution::of_seconds(Vec::new(), &[99.0]);
    assert_eq!(
        distribution,
        Distribution {
            percentiles: vec![(99.0, 0.0)],
            ..Distribution::default()
        }
    );
}

#[test]
fn only_answered_requests_count() {
    let metrics = of(&[answered(0, 0, &[100, 120], 2), failed(1, 50)], EVERYTHING);
    assert_eq!((metrics.completed, metrics.failed), (1, 1));
    assert_eq!((metrics.total_input_tokens, metrics.total_output_tokens), (10, 2));
    assert!((metrics.request_throughput() - 0.5).abs() < 1e-12);
    assert!((metrics.total_throughput() - 6.0).abs() < 1e-12);
    assert_eq!(metrics.peak_concurrent_requests, 1);
}

#[test]
fn one_token_answers_have_no_tpot_but_are_good() {
    let objectives = ["tpot:1".parse().unwrap()];
    let selection = Selection {
        objectives: &objectives,
        ..EVERYTHING
    };
    let metrics = of(
        &[answered(0, 0, &[100], 1), answered(1, 0, &[100, 110, 120], 3)],
        selection,
    );
    let tpot = metrics.latency(Metric::Tpot).unwrap();
    assert!((tpot.mean - 10.0).abs() < 1e-9, "{tpot:?}");
    assert!((metrics.request_goodput.unwrap() - 0.5).abs() < 1e-12);
}

#[test]
fn time_per_output_token_is_by_tokens_and_gaps_are_by_chunks() {
    // Two chunks of four tokens.
    let metrics = of(&[answered(0, 0, &[100, 170], 8)], EVERYTHING);
    assert!((metrics.latency(Metric::Tpot).unwrap().mean - 10.0).abs() < 1e-9);
    assert!((metrics.latency(Metric::Itl).unwrap().mean - 70.0).abs() < 1e-9);
}

#[test]
fn an_uncounted_answer_has_as_many_tokens_as_chunks() {
    let mut record = answered(0, 0, &[100, 110, 120], 0);
    assert_eq!(of(&[record.clone()], EVERYTHING).total_output_tokens, 3);
    record.result.as_mut().unwrap().completion_tokens = None;
    assert_eq!(of(&[record], EVERYTHING).total_output_tokens, 3);
}

#[test]
fn the_servers_prompt_token_count_takes_precedence() {
    let mut record = answered(0, 0, &[100], 1);
    record.result.as_mut().unwrap().prompt_tokens = Some(11);
    assert_eq!(
        of(&[record, answered(1, 0, &[100], 1)], EVERYTHING).total_input_tokens,
        21
    );
}

#[test]
fn peaks_are_counted_in_seconds_from_the_first_start() {
    let first = answered(0, 1500, &[100, 900, 1100], 3);
    // It starts 1.2 s after the first one, in the same second as that one's last chunk.
    let second = answered(1, 2700, &[10, 20], 2);
    let metrics = of(&[first, second], EVERYTHING);
    assert!((metrics.peak_output_throughput - 3.0).abs() < f64::EPSILON);
    assert_eq!(metrics.peak_concurrent_requests, 2);
}

#[test]
fn waiting_in_the_client_is_apart_from_the_latency() {
    let mut record = answered(0, 500, &[100], 1);
    record.released = milliseconds(200);
    let metrics = of(&[record], EVERYTHING);
    let mean = |metric| metrics.latency(metric).unwrap().mean;
    assert!((mean(Metric::E2el) - 100.0).abs() < 1e-9);
    assert!((mean(Metric::ClientQueueTime) - 300.0).abs() < 1e-9);
    assert!((mean(Metric::E2elIncludingClientQueue) - 400.0).abs() < 1e-9);
    let unlimited = of(
        &[answered(0, 0, &[1], 1)],
        Selection {
            is_limited: false,
            ..EVERYTHING
        },
    );
    assert_eq!(unlimited.latency(Metric::ClientQueueTime), None);
    assert_eq!(unlimited.latency(Metric::E2elIncludingClientQueue), None);
    let all_at_once = of(
        &[answered(0, 0, &[1], 1)],
        Selection {
            is_scheduled: false,
            ..EVERYTHING
        },
    );
    assert!(all_at_once.latency(Metric::ClientQueueTime).is_some());
    assert_eq!(all_at_once.latency(Metric::E2elIncludingClientQueue), None);
}

proptest! {
    #[test]
    fn percentiles_ascend_between_the_extremes(
        values in prop::collection::vec(0.0_f64..10.0, 1..60), mut percentiles in prop::collection::vec(0.0_f64..=100.0, 1..9),
    ) {
        percentiles.sort_by(f64::total_cmp);
        let distribution = Distribution::of_seconds(values.clone(), &percentiles);
        let found: Vec<f64> = distribution.percentiles.iter().map(|(_, value)| value / 1000.0).collect();
        prop_assert!(found.windows(2).all(|pair| pair[0] <= pair[1] + 1e-12));
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(0.0, f64::max);
        prop_assert!(found.iter().all(|value| (least - 1e-12..=most + 1e-12).contains(value)));
    }
}
