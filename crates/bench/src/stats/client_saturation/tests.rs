//! Tests of each reason that makes a run invalid.

use std::time::Duration;

use super::*;

fn validity(lag_p99: f64, busiest: f64, merged: u64) -> ClientValidity {
    ClientValidity {
        reasons: Vec::new(),
        notes: Vec::new(),
        lag: Distribution {
            percentiles: vec![(50.0, 0.0), (99.0, lag_p99), (100.0, lag_p99)],
            ..Distribution::default()
        },
        read_delay: ReadDelay {
            reads: 1000,
            merged,
            ..ReadDelay::default()
        },
        client_usage: ClientUsage {
            threads: 1,
            busiest,
            processor_time: Duration::from_secs(1),
            wall_time: Duration::from_secs(2),
            cores: 4,
        },
        connections: 0,
        connecting: 0.0,
    }
}

fn reasons(mut validity: ClientValidity, ttft: f64, is_scheduled: bool) -> Vec<String> {
    validity.judge(ttft, 1000, is_scheduled);
    validity.reasons
}

#[test]
fn a_client_that_kept_up_is_valid() {
    assert!(reasons(validity(0.9, 0.7, 9), 0.5, true).is_empty());
    assert!(reasons(validity(4.9, 0.0, 0), 100.0, true).is_empty());
    // A burst has no schedule.
    assert!(reasons(validity(40.0, 0.0, 0), 1000.0, false).is_empty());
}

#[test]
fn lag_is_relative_to_the_median_ttft() {
    let late = reasons(validity(6.0, 0.0, 0), 100.0, true);
    assert_eq!(
        late,
        [
            "requests left this client up to 6.0 ms late (P99), and 5.0 ms are the most that a median time to first token of \
             100.0 ms allows"
        ]
    );
    assert_eq!(reasons(validity(11.0, 0.0, 0), 1000.0, true).len(), 1);
}

#[test]
fn busy_threads_and_lost_gaps_are_reasons() {
    assert!(reasons(validity(0.0, 0.93, 0), 100.0, true)[0].contains("used 93 % of its core"));
    assert!(reasons(validity(0.0, 0.0, 20), 100.0, true)[0].starts_with("2.0 % of the chunks were read late"));
}

#[test]
fn machine_load_is_a_note() {
    let mut validity = validity(0.0, 0.0, 0);
    let machine = MachineUse {
        busy: 0.95,
        stolen: 0.05,
    };
    validity.annotate(Some(machine), &[]);
    assert_eq!(
        validity.notes,
        [
            "other virtual machines took 5 % of this one's time during the run",
            "this machine's cores were 95 % busy during the run, 13 % of it this client's doing",
        ]
    );
    assert!(validity.is_valid());
}
