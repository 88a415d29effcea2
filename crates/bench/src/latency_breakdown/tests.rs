//! Tests of stages from headers.

use super::*;
use crate::record::{EngineTimes, ServerTimings};

const MILLISECOND: Duration = Duration::from_millis(1);

fn answer(timing: &str, engine: Option<EngineTimes>) -> Answer {
    Answer {
        first_token: 100 * MILLISECOND,
        latency: 500 * MILLISECOND,
        timings: ServerTimings {
            handoff: Some(r#"transferred;prefill="prefiller1";decode="decoder2";attempt=2"#.to_owned()),
            timing: Some(timing.to_owned()),
            engine,
        },
        ..Answer::default()
    }
}

fn lengths(phases: &RequestStages) -> Vec<(&'static str, u128)> {
    let milliseconds = |span: &StageSpan| (span.stage.key(), span.length.as_millis());
    phases.spans.iter().map(milliseconds).collect()
}

#[test]
fn stages_add_up_to_the_time_of_the_client() {
    let timing =
        "read;dur=1, queue;dur=0.000, prefill;dur=60.000, handoff;dur=1.000, first-token;dur=30.000, total;dur=95.000";
    let phases = RequestStages::of_answer(&answer(timing, None)).unwrap();
    let expected = [
        ("wire", 6),
        ("proxy_queue", 0),
        ("prefill", 60),
        ("handoff", 1),
        ("decode", 30),
        ("unexplained", 3),
    ];
    assert_eq!(lengths(&phases), expected);
    let end = phases.spans.iter().fold(Duration::ZERO, |end, span| {
        assert_eq!(span.start, end);
        end + span.length
    });
    assert_eq!((end, phases.excess), (100 * MILLISECOND, Duration::ZERO));
    assert_eq!((phases.pair().as_str(), phases.attempt), ("prefiller1 → decoder2", 2));
}

#[test]
fn per_request_metrics_split_the_legs() {
    let timing = "retried;dur=7, queue;dur=2, prefill;dur=60, prefill-queue;dur=20, prefill-compute;dur=35, \
                  handoff;dur=0, first-token;dur=25, total;dur=95";
    let engine = EngineTimes {
        queue: 12 * MILLISECOND,
        first_token: 9 * MILLISECOND,
    };
    let phases = RequestStages::of_answer(&answer(timing, Some(engine))).unwrap();
    let expected = [
        ("wire", 5),
        ("retried", 7),
        ("proxy_queue", 2),
        ("prefill_queue", 20),
        ("prefill_compute", 35),
        ("prefill", 5),
        ("handoff", 0),
        ("decode_queue", 12),
        ("first_step", 9),
        ("decode", 4),
        ("unexplained", 1),
    ];
    assert_eq!(lengths(&phases), expected);
}

#[test]
fn timings_longer_than_the_clients_are_excess() {
    let timing = "queue;dur=0, prefill;dur=80, first-token;dur=35, total;dur=115";
    let phases = RequestStages::of_answer(&answer(timing, None)).unwrap();
    assert_eq!(phases.excess, 15 * MILLISECOND);
}

#[test]
fn a_server_without_timings_has_no_stages() {
    assert_eq!(RequestStages::of_answer(&Answer::default()), None);
    assert_eq!(RequestStages::of_answer(&answer("cache;desc=hit", None)), None);
    assert_eq!(
        RequestStages::of_answer(&answer("total;dur=x, first-token;dur=1", None)),
        None
    );
}
