//! Tests of the search against functions and against a queue model.

use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::queue_model::Queue;
use super::sprt::{Decision, RequestOutcome, Sprt};
use super::*;

/// Runs a search with a function that judges each rate. Returns the end and the probed rates.
fn search(first: f64, tolerance: f64, mut judge: impl FnMut(f64) -> ProbeVerdict) -> (Search, SearchEnd, Vec<f64>) {
    let mut search = Search::new(first, tolerance);
    let mut rates = Vec::new();
    loop {
        match search.step() {
            Step::Done(ending) => return (search, ending, rates),
            Step::Probe(rate) => {
                rates.push(rate);
                search.take(rate, judge(rate));
            }
        }
    }
}

fn up_to(capacity: f64) -> impl Fn(f64) -> ProbeVerdict {
    move |rate| {
        if rate <= capacity {
            ProbeVerdict::Pass
        } else {
            ProbeVerdict::Fail
        }
    }
}

/// One probe of the queue as in the benchmark: requests count as they end, until the test decides.
fn probe(queue: Queue, burstiness: f64, limit: f64, attainment: f64, rate: f64, seed: u32) -> (ProbeVerdict, usize) {
    let mut sprt = Sprt::new(attainment, 1, 10.0);
    let most = Sprt::max_requests(attainment) + 1500;
    let mut ends: Vec<(f64, usize, f64, f64)> = queue
        .first_tokens(rate, burstiness, most, seed)
        .into_iter()
        .enumerate()
        .map(|(place, (released, first_token))| (released + first_token + 2.0, place, released, first_token))
        .collect();
    ends.sort_by(|left, right| left.0.total_cmp(&right.0));
    for (ended, place, released, first_token) in ends {
        let outcome = RequestOutcome {
            released,
            ended,
            first_token: Some(first_token),
            missed: if first_token > limit { vec![0] } else { vec![] },
        };
        sprt.add(place, outcome);
        if sprt.decision() != Decision::Undecided {
            break;
        }
    }
    let verdict = match sprt.final_decision() {
        Decision::Pass => ProbeVerdict::Pass,
        _ => ProbeVerdict::Fail,
    };
    (verdict, sprt.counted())
}

#[test]
fn the_first_rates_double_or_halve() {
    let (_, _, rates) = search(1.0, 0.05, up_to(5.0));
    assert_eq!(rates[..4], [1.0, 2.0, 4.0, 8.0]);
    let (_, _, rates) = search(1.0, 0.05, up_to(0.2));
    assert_eq!(rates[..4], [1.0, 0.5, 0.25, 0.125]);
}

#[test]
fn servers_that_never_or_always_meet_the_objectives_end_the_search() {
    assert_eq!(search(1.0, 0.05, |_| ProbeVerdict::Fail).1, SearchEnd::NothingPasses);
    assert_eq!(search(1.0, 0.05, |_| ProbeVerdict::Pass).1, SearchEnd::EverythingPasses);
}

#[test]
fn invalid_probes_decide_nothing() {
    let (search, ending, rates) = search(1.0, 0.05, |rate| {
        if rate > 5.0 {
            ProbeVerdict::Invalid
        } else {
            ProbeVerdict::Pass
        }
    });
    assert_eq!(ending, SearchEnd::ClientLimit);
    assert_eq!(search.bracket(), (Some(4.0), None));
    assert_eq!(rates[3..], [8.0, 8.0, 8.0]);
}

#[test]
fn one_wrong_result_is_corrected() {
    for wrong in 0..8 {
        let mut number = 0;
        let (found, ending, _) = search(1.0, 0.05, |rate| {
            number += 1;
            let is_met = rate <= 6.1;
            if is_met == (number - 1 != wrong) {
                ProbeVerdict::Pass
            } else {
                ProbeVerdict::Fail
            }
        });
        let (low, high) = found.bracket();
        assert_eq!(ending, SearchEnd::Found);
        let (low, high) = (low.unwrap(), high.unwrap());
        // A wrong result near the true rate moves the bracket by no more than that.
        assert!(low <= 6.1 * 1.15 && high >= 6.1 / 1.15, "{wrong}: {low} {high}");
    }
}

#[test]
fn the_search_finds_the_true_rate_of_a_queue() {
    for (burstiness, attainment) in [(1.0, 0.9), (100.0, 0.9), (1.0, 0.99), (100.0, 0.99)] {
        let truth = Queue::PREFILLERS.true_rate(burstiness, 0.5, attainment);
        let mut off = 0;
        for seed in 0..20 {
            let mut number = 0;
            let (found, ending, _) = search(1.0, 0.05, |rate| {
                number += 1;
                probe(
                    Queue::PREFILLERS,
                    burstiness,
                    0.5,
                    attainment,
                    rate,
                    seed * 100 + number,
                )
                .0
            });
            assert_eq!(ending, SearchEnd::Found);
            let low = found.bracket().0.unwrap();
            off += usize::from(low < truth * 0.8 || low > truth * 1.25);
        }
        assert!(
            off <= 3,
            "burstiness {burstiness}, {attainment}: {off} of 20 are off {truth}"
        );
    }
}

#[test]
fn uneven_arrivals_cost_most_of_the_capacity() {
    let [even, uneven] = [100.0, 1.0].map(|burstiness| Queue::PREFILLERS.true_rate(burstiness, 0.5, 0.99));
    assert!((7.0..8.1).contains(&even), "{even}");
    assert!((2.0..3.2).contains(&uneven), "{uneven}");
}

proptest! {
    #[test]
    fn a_monotone_server_is_bracketed_to_the_tolerance(
        first in 0.1_f64..100.0, ratio in -9.0_f64..9.0, tolerance in 0.01_f64..0.5,
    ) {
        let capacity = first * ratio.exp2();
        let (found, ending, rates) = search(first, tolerance, up_to(capacity));
        let (low, high) = found.bracket();
        let (low, high) = (low.unwrap(), high.unwrap());
        prop_assert_eq!(ending, SearchEnd::Found);
        prop_assert!(low <= capacity && capacity < high, "{} {} {}", low, capacity, high);
        prop_assert!(high <= low * (1.0 + tolerance));
        prop_assert!(rates.len() <= 30, "{} probes", rates.len());
    }

    #[test]
    fn any_results_end_the_search_with_an_ordered_bracket(seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let (found, _, rates) = search(1.0, 0.05, |_| match random.random_range(0..5) {
            0 | 1 => ProbeVerdict::Pass,
            2 | 3 => ProbeVerdict::Fail,
            _ => ProbeVerdict::Invalid,
        });
        prop_assert!(rates.len() <= MOST_PROBES);
        if let (Some(low), Some(high)) = found.bracket() {
            prop_assert!(low < high);
        }
    }
}

#[test]
fn a_burst_gives_the_first_rate() {
    // Ten per second; the last ones are late because few are left.
    let steady: Vec<f64> = (1..=50).map(|place| f64::from(place) / 10.0).collect();
    let with_tail: Vec<f64> = steady
        .iter()
        .copied()
        .chain((0..14).map(|place| 5.0 + f64::from(place)))
        .collect();
    assert_eq!(first_rate(steady), Some(5.0));
    assert!(first_rate(with_tail).is_some_and(|rate| (4.5..=5.5).contains(&rate)));
    assert_eq!(first_rate(vec![1.0; 7]), None);
    assert_eq!(first_rate(vec![0.0; 20]), None);
    let slow: Vec<f64> = (1..=64).map(|place| f64::from(place) * 9.7).collect();
    assert!(first_rate(slow).is_some_and(|rate| (rate - 0.052).abs() < 1e-9));
}
