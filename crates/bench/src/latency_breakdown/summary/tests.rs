//! Tests of run summaries: stages that add up, cold requests, failed hand-offs.

use super::*;
use crate::record::{EngineTimes, ServerTimings as Headers};

/// A request answered after `ttft` ms, of which the proxy explains all but `unexplained` ms.
fn record(index: usize, pair: (&str, &str), ttft: u64, unexplained: u64) -> Record {
    let prefill = ttft - 40 - unexplained;
    let (prefiller, decoder) = pair;
    let answer = Answer {
        first_token: Duration::from_millis(ttft),
        prompt_tokens: Some(100),
        timings: Headers {
            handoff: Some(format!(
                "transferred;prefill=\"{prefiller}\";decode=\"{decoder}\";attempt=1"
            )),
            timing: Some(format!(
                "queue;dur=0, prefill;dur={prefill}, handoff;dur=0, first-token;dur=30, total;dur={}",
                ttft - 10
            )),
            engine: None,
        },
        ..Answer::default()
    };
    Record {
        index,
        scheduled: Duration::ZERO,
        released: Duration::ZERO,
        admitted: Duration::ZERO,
        started: Duration::from_millis(index as u64),
        result: Ok(answer),
    }
}

fn fleet(decode: &[(Counter, f64)]) -> Vec<EngineCounters> {
    vec![
        EngineCounters::counted(
            "prefiller1",
            Role::Prefill,
            &[
                (Counter::Queued, 4.0),
                (Counter::QueueSeconds, 0.04),
                (Counter::Prefilled, 4.0),
                (Counter::PrefillSeconds, 0.2),
                (Counter::ComputedTokens, 400.0),
            ],
        ),
        EngineCounters::counted("decoder1", Role::Decode, decode),
    ]
}

fn means(summary: &BreakdownSummary) -> Vec<(&'static str, u64)> {
    let round = |row: &StageRow| (row.key, u64::try_from(whole(row.mean_ms.round())).unwrap_or_default());
    summary.rows.iter().map(round).collect()
}

#[test]
fn engine_counters_split_legs_and_top_rows_add_up() {
    let records: Vec<Record> = (0..4)
        .map(|index| record(index, ("prefiller1", "decoder1"), 110, 2))
        .collect();
    let engines = fleet(&[
        (Counter::Queued, 4.0),
        (Counter::QueueSeconds, 0.08),
        (Counter::Prefilled, 4.0),
        (Counter::PrefillSeconds, 0.032),
        (Counter::Transfers, 4.0),
        (Counter::TransferSeconds, 0.02),
        (Counter::RemoteTokens, 396.0),
        (Counter::ComputedTokens, 4.0),
    ]);
    let summary = BreakdownSummary::of(&records, &engines).unwrap();
    let expected = [
        ("wire", 10),
        ("proxy_queue", 0),
        ("prefill", 68),
        ("prefill_queue", 10),
        ("prefill_compute", 50),
        ("prefill_http", 8),
        ("handoff", 0),
        ("decode", 30),
        ("kv_transfer", 5),
        ("decode_queue", 15),
        ("first_step", 8),
        ("decode_http", 2),
        ("unexplained", 2),
        ("ttft", 110),
    ];
    assert_eq!(means(&summary), expected);
    let whole: f64 = summary
        .rows
        .iter()
        .filter(|row| !row.is_part && row.key != "ttft")
        .map(|row| row.share)
        .sum();
    assert!((whole - 1.0).abs() < 1e-9);
    assert!(!summary.unexplained.is_too_much());
    let remote = summary.remote.unwrap();
    assert_eq!((remote.used, remote.recomputed, remote.is_counted), (4, 0, true));
    assert_eq!(remote.cached, Some((0.0, 400.0)));
}

#[test]
fn per_request_times_take_precedence_over_sums() {
    let mut records = vec![record(0, ("prefiller1", "decoder1"), 110, 0)];
    let timings = &mut records[0].result.as_mut().unwrap().timings;
    timings.timing = Some(
        "prefill;dur=70, prefill-queue;dur=1, prefill-compute;dur=60, first-token;dur=30, total;dur=100".to_owned(),
    );
    timings.engine = Some(EngineTimes {
        queue: Duration::from_millis(7),
        first_token: Duration::from_millis(9),
    });
    let summary = BreakdownSummary::of(&records, &fleet(&[])).unwrap();
    let row = |key: &str| summary.rows.iter().find(|row| row.key == key).unwrap().clone();
    assert_eq!(row("prefill_compute").percentiles_ms, Some((60.0, 60.0)));
    assert!((row("decode_queue").mean_ms - 7.0).abs() < 1e-9);
    assert!((row("prefill").mean_ms - 70.0).abs() < 1e-9);
}

#[test]
fn the_first_request_of_each_pair_is_cold() {
    let pair = |decoder| ("prefiller1", decoder);
    let records = [
        record(0, pair("decoder1"), 900, 0),
        record(1, pair("decoder2"), 700, 0),
        record(2, pair("decoder1"), 100, 0),
        record(3, pair("decoder2"), 100, 0),
    ];
    let summary = BreakdownSummary::of(&records, &[]).unwrap();
    let cold = summary.cold.unwrap();
    assert_eq!(
        (cold.requests, cold.cold_ms, cold.warm_ms, cold.all_ms),
        (2, 800.0, 100.0, 450.0)
    );
    assert_eq!(summary.pairs[0].name, "prefiller1 → decoder1");
    assert_eq!((summary.pairs[1].requests, summary.pairs[1].first_ttft_ms), (2, 700.0));
    assert_eq!(BreakdownSummary::of(&records[..2], &[]).unwrap().cold, None);
}

#[test]
fn recomputed_prompts_do_not_count_as_remote_kv() {
    let records: Vec<Record> = (0..4)
        .map(|index| record(index, ("prefiller1", "decoder1"), 110, 0))
        .collect();
    let engines = fleet(&[(Counter::ComputedTokens, 302.0), (Counter::RemoteTokens, 99.0)]);
    let remote = BreakdownSummary::of(&records, &engines).unwrap().remote.unwrap();
    assert_eq!((remote.answered, remote.used, remote.recomputed), (4, 1, 3));
    assert!(remote.is_counted);
    // Without counters there is only the word of the proxy.
    let remote = BreakdownSummary::of(&records, &[]).unwrap().remote.unwrap();
    assert_eq!((remote.used, remote.is_counted), (4, false));
}

#[test]
fn bypassed_prompts_are_not_recomputed() {
    let mut records: Vec<Record> = (0..4)
        .map(|index| record(index, ("prefiller1", "decoder1"), 110, 0))
        .collect();
    records[0].result.as_mut().unwrap().timings.handoff =
        Some("bypassed;reason=\"n\";decode=\"decoder1\";attempt=1".to_owned());
    let engines = fleet(&[(Counter::ComputedTokens, 103.0), (Counter::RemoteTokens, 297.0)]);
    let remote = BreakdownSummary::of(&records, &engines).unwrap().remote.unwrap();
    assert_eq!((remote.answered, remote.used, remote.recomputed), (4, 3, 0));
    assert_eq!(
        remote.outcomes.keys().collect::<Vec<_>>(),
        ["bypassed (n)", "transferred"]
    );
}

#[test]
fn the_worst_request_decides_whether_too_much_is_unexplained() {
    let pair = ("prefiller1", "decoder1");
    let summary = BreakdownSummary::of(&[record(0, pair, 100, 0), record(1, pair, 100, 8)], &[]).unwrap();
    let unexplained = summary.unexplained;
    assert!((unexplained.mean - 0.04).abs() < 1e-9 && (unexplained.worst - 0.08).abs() < 1e-9);
    assert_eq!((unexplained.worst_request, unexplained.worst_ms.round()), (1, 8.0));
    assert!(summary.unexplained.is_too_much());
}

#[test]
fn a_single_server_is_split_by_its_counters() {
    let answer = Answer {
        first_token: Duration::from_millis(100),
        ..Answer::default()
    };
    let records = [Record {
        result: Ok(answer),
        ..record(0, ("", ""), 100, 0)
    }];
    assert_eq!(BreakdownSummary::of(&records, &[]), None);
    let counted = [
        (Counter::Queued, 1.0),
        (Counter::QueueSeconds, 0.02),
        (Counter::Prefilled, 1.0),
        (Counter::PrefillSeconds, 0.07),
    ];
    let summary = BreakdownSummary::of(&records, &[EngineCounters::counted("0", Role::Alone, &counted)]).unwrap();
    assert_eq!(
        means(&summary),
        [("queue", 20), ("prefill_compute", 70), ("http", 10), ("ttft", 100)]
    );
    assert!(summary.remote.is_none() && summary.cold.is_none());
}
