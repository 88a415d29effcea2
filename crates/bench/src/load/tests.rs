//! Tests of the load loop on paused time, with requests that only sleep.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::time::sleep;

use super::*;

fn milliseconds(value: u64) -> Duration {
    Duration::from_millis(value)
}

/// A request that takes `duration` and then succeeds or fails.
async fn after(duration: Duration, succeeds: bool) -> Exchange {
    let started = Instant::now();
    sleep(duration).await;
    let answer = Answer {
        first_token: duration,
        latency: duration,
        ..Answer::default()
    };
    let result = if succeeds { Ok(answer) } else { Err("no".to_owned()) };
    Exchange { started, result }
}

#[tokio::test(start_paused = true)]
async fn requests_keep_the_schedule_whatever_answers_take() {
    let releases = [10, 20, 30].map(milliseconds);
    let outcome = run_schedule(
        &Workers::here(),
        &releases,
        None,
        |_| after(milliseconds(1000), true),
        |_, _| {},
        &CancellationToken::new(),
    )
    .await;
    let started: Vec<Duration> = outcome.records.iter().map(|record| record.started).collect();
    assert_eq!(started, releases);
    assert_eq!(outcome.duration, milliseconds(1030));
    assert_eq!((outcome.dropped, outcome.unsent), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_request_releases_its_successor() {
    let releases = [0, 0, 0, 0].map(milliseconds);
    let outcome = run_chained(
        &Workers::here(),
        &releases,
        None,
        [Some((2, milliseconds(50))), None, Some((3, Duration::ZERO)), None].into(),
        |index| after(milliseconds(100), index != 2),
        |_, _| {},
        &CancellationToken::new(),
    )
    .await;
    let started: Vec<Duration> = outcome.records.iter().map(|record| record.started).collect();
    assert_eq!(started, [0, 0, 150, 250].map(milliseconds));
    assert!(
        outcome
            .records
            .iter()
            .all(|record| record.release_lag() == Duration::ZERO)
    );
    assert_eq!((outcome.dropped, outcome.unsent), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn records_are_sorted_by_schedule() {
    let releases = [0, 1, 2].map(milliseconds);
    let exchange = |index: usize| after(milliseconds(300 - 100 * index as u64), index != 1);
    let outcome = run_schedule(
        &Workers::here(),
        &releases,
        None,
        exchange,
        |_, _| {},
        &CancellationToken::new(),
    )
    .await;
    let ends: Vec<(usize, bool)> = outcome
        .records
        .iter()
        .map(|record| (record.index, record.result.is_ok()))
        .collect();
    assert_eq!(ends, [(0, true), (1, false), (2, true)]);
}

#[tokio::test(start_paused = true)]
async fn a_limit_holds_and_its_wait_is_recorded_separately() {
    let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (counted, highest) = (running.clone(), most.clone());
    let exchange = move |_| {
        let (running, most) = (counted.clone(), highest.clone());
        async move {
            most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            let exchange = after(milliseconds(100), true).await;
            running.fetch_sub(1, Ordering::SeqCst);
            exchange
        }
    };
    let seen = Cell::new(0);
    let observe = |totals: &RunningTotals, _: &[Record]| seen.set(seen.get().max(totals.in_flight));
    let outcome = run_schedule(
        &Workers::here(),
        &[Duration::ZERO; 6],
        NonZeroUsize::new(2),
        exchange,
        observe,
        &CancellationToken::new(),
    )
    .await;
    assert_eq!(most.load(Ordering::SeqCst), 2);
    assert_eq!(seen.get(), 2);
    let waits: Vec<Duration> = outcome.records.iter().map(Record::queue_time).collect();
    assert_eq!(waits, [0, 0, 100, 100, 200, 200].map(milliseconds));
    assert!(outcome.records.iter().all(|record| record.released == record.scheduled));
}

#[tokio::test(start_paused = true)]
async fn a_stop_keeps_finished_requests_and_counts_the_rest() {
    let releases = [0, 100, 200, 5000].map(milliseconds);
    let stop = CancellationToken::new();
    let exchange = |index: usize| after(milliseconds(if index == 0 { 50 } else { 9000 }), true);
    let observe = |totals: &RunningTotals, _: &[Record]| {
        if totals.in_flight == 2 {
            stop.cancel();
        }
    };
    let outcome = run_schedule(&Workers::here(), &releases, None, exchange, observe, &stop).await;
    assert_eq!(outcome.records.len(), 1);
    assert_eq!((outcome.dropped, outcome.unsent), (2, 1));
    // The requests in flight are reported at the first tick after their release.
    assert_eq!(outcome.duration, milliseconds(250));
}

#[tokio::test(start_paused = true)]
async fn progress_is_reported_while_requests_run() {
    let reports = Cell::new(0);
    let last = Cell::new(None);
    let observe = |totals: &RunningTotals, _: &[Record]| {
        reports.set(reports.get() + 1);
        last.set(Some(totals.progress(RunPhase::Measuring, None)));
    };
    let exchange = |index: usize| after(milliseconds(2000 + 1000 * index as u64), index < 2);
    run_schedule(
        &Workers::here(),
        &[Duration::ZERO; 3],
        None,
        exchange,
        observe,
        &CancellationToken::new(),
    )
    .await;
    assert!(reports.get() > 10, "{} times in 4 s", reports.get());
    let last = last.get().unwrap();
    assert_eq!((last.total, last.done, last.failed, last.in_flight), (3, 3, 1, 0));
    assert_eq!(last.elapsed, milliseconds(4000));
    assert!((last.mean_ttft_ms.unwrap() - 2500.0).abs() < 1e-9);
    assert_eq!(last.mean_tpot_ms, None);
}
