//! Tests of latency statistics on synthetic records.

use std::time::Duration;

use super::*;
use crate::record::ServerTimings;

fn milliseconds(value: u64) -> Duration {
    Duration::from_millis(value)
}

/// A request with chunks at these milliseconds, this many tokens, and this pair of engines.
fn answered(index: usize, chunks: &[u64], tokens: u64, pair: Option<[&str; 2]>) -> Record {
    let started = milliseconds(index as u64 * 10);
    let handoff =
        pair.map(|[prefill, decode]| format!("transferred;prefill=\"{prefill}\";decode=\"{decode}\";attempt=1"));
    Record {
        index,
        scheduled: started,
        released: started,
        admitted: started,
        started,
        result: Ok(Answer {
            first_token: milliseconds(chunks[0]),
            gaps: chunks.windows(2).map(|pair| milliseconds(pair[1] - pair[0])).collect(),
            latency: milliseconds(chunks[chunks.len() - 1]),
            completion_tokens: Some(tokens),
            timings: ServerTimings {
                handoff,
                ..ServerTimings::default()
            },
            ..Answer::default()
        }),
    }
}

fn row<'a>(rows: &'a [LatencyRow], key: &str) -> &'a LatencyRow {
    rows.iter().find(|row| row.key == key).expect(key)
}

/// The mean, rounded to a microsecond.
fn mean(rows: &[LatencyRow], key: &str) -> String {
    format!("{:.3}", row(rows, key).mean.value)
}

#[test]
fn percentiles_of_few_requests_have_no_interval() {
    let of = |count: usize| {
        let records: Vec<Record> = (0..count)
            .map(|index| answered(index, &[index as u64 + 1, index as u64 + 2], 2, None))
            .collect();
        LatencyStats::of(&records, &[99.0]).rows
    };
    let few = of(99);
    let [tail] = row(&few, "ttft").tails[..] else {
        panic!("{few:?}")
    };
    assert_eq!((tail.too_few, tail.estimate.interval), (Some(99), None));
    assert!((tail.estimate.value - 98.02).abs() < 1e-9, "{tail:?}");
    let enough = of(100);
    let TailPercentile {
        estimate,
        too_few: None,
        ..
    } = row(&enough, "ttft").tails[0]
    else {
        panic!("{enough:?}")
    };
    assert!((estimate.value - 99.01).abs() < 1e-9);
    // A hundred gaps of two requests are not a hundred independent values.
    let long: Vec<u64> = (1..200).collect();
    let few = LatencyStats::of(&[answered(0, &long, 199, None), answered(1, &long, 199, None)], &[99.0]);
    assert_eq!(row(&few.rows, "itl_chunk_gap").tails[0].too_few, Some(2));
}

#[test]
fn intervals_are_reproducible() {
    let records: Vec<Record> = (0..40)
        .map(|index| answered(index, &[100 + index as u64 % 7, 120], 2, None))
        .collect();
    let first = LatencyStats::of(&records, &[50.0]);
    assert_eq!(first, LatencyStats::of(&records, &[50.0]));
    let mean = row(&first.rows, "ttft").mean;
    let (low, high) = mean.interval.unwrap();
    assert!(low < mean.value && mean.value < high && high - low < 4.0, "{mean:?}");
}

#[test]
fn itl_per_token_differs_from_itl_per_chunk() {
    let mut counted = answered(0, &[100, 140, 150], 6, None);
    counted.result.as_mut().unwrap().chunk_tokens = vec![1, 4, 1];
    let statistics = LatencyStats::of(&[counted.clone()], &[99.0]);
    assert_eq!(statistics.tokens, TokenCount::Reported);
    assert_eq!(mean(&statistics.rows, "itl_chunk_gap"), "25.000");
    assert_eq!(row(&statistics.rows, "itl_per_token").count, 5);
    assert_eq!(mean(&statistics.rows, "itl_per_token"), "10.000");

    counted.result.as_mut().unwrap().chunk_tokens.clear();
    let statistics = LatencyStats::of(&[counted], &[99.0]);
    assert_eq!(statistics.tokens, TokenCount::Spread);
    assert_eq!(mean(&statistics.rows, "itl_per_token"), "10.000");

    let one_each = LatencyStats::of(&[answered(0, &[100, 140, 150], 3, None)], &[99.0]);
    assert_eq!(one_each.tokens, TokenCount::OnePerChunk);
    assert!(one_each.rows.iter().all(|row| row.key != "itl_per_token"));
}

#[test]
fn a_chunk_without_tokens_adds_its_gap_to_the_next() {
    let mut record = answered(0, &[100, 110, 130], 3, None);
    let answer = record.result.as_mut().unwrap();
    answer.chunk_tokens = vec![1, 0, 2];
    assert_eq!(answer.token_gaps(), (vec![0.015, 0.015], TokenCount::Reported));
}

#[test]
fn the_first_request_of_each_pair_is_cold() {
    let (a, b) = (Some(["prefiller1", "decoder1"]), Some(["prefiller1", "decoder2"]));
    let records = [
        answered(0, &[900, 901], 2, a),
        answered(1, &[100, 101], 2, a),
        answered(2, &[700, 701], 2, b),
        answered(3, &[100, 101], 2, b),
        answered(4, &[100, 101], 2, None),
    ];
    assert_eq!(cold(&records), HashSet::from([0, 2]));
    let statistics = LatencyStats::of(&records, &[99.0]);
    assert_eq!(statistics.cold, 2);
    assert_eq!(mean(&statistics.rows, "ttft"), "380.000");
    assert_eq!(mean(&statistics.without_cold, "ttft"), "100.000");
    assert!(LatencyStats::of(&records[4..], &[99.0]).without_cold.is_empty());
}

#[test]
fn gaps_of_more_than_twice_the_median_are_stalls() {
    let records = [
        answered(0, &[10, 20, 30, 40, 100], 5, None),
        answered(1, &[10, 20, 30, 40, 60], 5, None),
    ];
    let stalls = LatencyStats::of(&records, &[99.0]).stalls;
    assert_eq!(
        stalls,
        Stalls {
            gaps: 8,
            count: 1,
            requests: 1,
            longest: 60.0
        }
    );
}

#[test]
fn no_answers_give_no_statistics() {
    let statistics = LatencyStats::of(&[], &[99.0]);
    assert!(statistics.rows.is_empty() && statistics.to_json()["all"].as_object().unwrap().is_empty());
}
