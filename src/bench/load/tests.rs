//! The loop on paused time, with requests that only sleep.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::time::sleep;

use super::*;

fn milliseconds(value: u64) -> Duration {
    Duration::from_millis(value)
}

/// A request that takes so long and then fails or gives an answer.
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
async fn requests_go_out_on_schedule_however_long_answers_take() {
    let releases = [10, 20, 30].map(milliseconds);
    let outcome = drive(
        &Lanes::here(),
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
async fn the_end_of_a_request_releases_the_one_that_follows_it() {
    let releases = [0, 0, 0, 0].map(milliseconds);
    let outcome = drive_chained(
        &Lanes::here(),
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
async fn records_stand_in_the_order_of_the_schedule() {
    let releases = [0, 1, 2].map(milliseconds);
    let exchange = |index: usize| after(milliseconds(300 - 100 * index as u64), index != 1);
    let outcome = drive(
        &Lanes::here(),
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
async fn a_limit_holds_and_the_wait_for_it_is_recorded_apart() {
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
    let observe = |tally: &Tally, _: &[Record]| seen.set(seen.get().max(tally.in_flight));
    let outcome = drive(
        &Lanes::here(),
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
async fn a_stop_keeps_what_has_ended_and_counts_the_rest() {
    let releases = [0, 100, 200, 5000].map(milliseconds);
    let stop = CancellationToken::new();
    let exchange = |index: usize| after(milliseconds(if index == 0 { 50 } else { 9000 }), true);
    let observe = |tally: &Tally, _: &[Record]| {
        if tally.in_flight == 2 {
            stop.cancel();
        }
    };
    let outcome = drive(&Lanes::here(), &releases, None, exchange, observe, &stop).await;
    assert_eq!(outcome.records.len(), 1);
    assert_eq!((outcome.dropped, outcome.unsent), (2, 1));
    // What is in flight is told with the first tick after its release.
    assert_eq!(outcome.duration, milliseconds(250));
}

#[tokio::test(start_paused = true)]
async fn progress_is_told_while_nothing_happens_and_holds_the_means_so_far() {
    let told = Cell::new(0);
    let last = Cell::new(None);
    let observe = |tally: &Tally, _: &[Record]| {
        told.set(told.get() + 1);
        last.set(Some(tally.progress(Phase::Measuring)));
    };
    let exchange = |index: usize| after(milliseconds(2000 + 1000 * index as u64), index < 2);
    drive(
        &Lanes::here(),
        &[Duration::ZERO; 3],
        None,
        exchange,
        observe,
        &CancellationToken::new(),
    )
    .await;
    assert!(told.get() > 10, "{} times in 4 s", told.get());
    let last = last.get().unwrap();
    assert_eq!((last.total, last.done, last.failed, last.in_flight), (3, 3, 1, 0));
    assert_eq!(last.elapsed, milliseconds(4000));
    assert!((last.mean_ttft_ms.unwrap() - 2500.0).abs() < 1e-9);
    assert_eq!(last.mean_tpot_ms, None);
}
