//! The search against servers that are functions, and against a queue.

use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::evidence::{Ballot, Evidence, Opinion};
use super::queue_model::Queue;
use super::*;

/// Searches with a function that judges each rate; gives the ending and the rates tried.
fn search(first: f64, tolerance: f64, mut judge: impl FnMut(f64) -> Verdict) -> (Search, Ending, Vec<f64>) {
    let mut search = Search::new(first, tolerance);
    let mut rates = Vec::new();
    loop {
        match search.step() {
            Step::End(ending) => return (search, ending, rates),
            Step::Probe(rate) => {
                rates.push(rate);
                search.take(rate, judge(rate));
            }
        }
    }
}

fn up_to(capacity: f64) -> impl Fn(f64) -> Verdict {
    move |rate| if rate <= capacity { Verdict::Pass } else { Verdict::Fail }
}

/// One probe of the queue, as the bench makes it: the requests vote as they end, until they have decided.
fn probe(queue: Queue, burstiness: f64, limit: f64, attainment: f64, rate: f64, seed: u32) -> (Verdict, usize) {
    let mut evidence = Evidence::new(attainment, 1, 10.0);
    let most = Evidence::most_votes(attainment) + 1500;
    let mut ends: Vec<(f64, usize, f64, f64)> = queue
        .first_tokens(rate, burstiness, most, seed)
        .into_iter()
        .enumerate()
        .map(|(place, (released, first_token))| (released + first_token + 2.0, place, released, first_token))
        .collect();
    ends.sort_by(|left, right| left.0.total_cmp(&right.0));
    for (ended, place, released, first_token) in ends {
        let ballot = Ballot {
            released,
            ended,
            first_token: Some(first_token),
            missed: if first_token > limit { vec![0] } else { vec![] },
        };
        evidence.add(place, ballot);
        if evidence.opinion() != Opinion::Open {
            break;
        }
    }
    let verdict = match evidence.last_opinion() {
        Opinion::Pass => Verdict::Pass,
        _ => Verdict::Fail,
    };
    (verdict, evidence.votes())
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
    assert_eq!(search(1.0, 0.05, |_| Verdict::Fail).1, Ending::NothingPasses);
    assert_eq!(search(1.0, 0.05, |_| Verdict::Pass).1, Ending::EverythingPasses);
}

#[test]
fn a_client_that_cannot_keep_up_decides_nothing() {
    let (search, ending, rates) = search(
        1.0,
        0.05,
        |rate| if rate > 5.0 { Verdict::Invalid } else { Verdict::Pass },
    );
    assert_eq!(ending, Ending::ClientLimit);
    assert_eq!(search.bracket(), (Some(4.0), None));
    assert_eq!(rates[3..], [8.0, 8.0, 8.0]);
}

#[test]
fn one_wrong_verdict_is_found_out() {
    for wrong in 0..8 {
        let mut number = 0;
        let (found, ending, _) = search(1.0, 0.05, |rate| {
            number += 1;
            let is_met = rate <= 6.1;
            if is_met == (number - 1 != wrong) {
                Verdict::Pass
            } else {
                Verdict::Fail
            }
        });
        let (low, high) = found.bracket();
        assert_eq!(ending, Ending::Found);
        let (low, high) = (low.unwrap(), high.unwrap());
        // A wrong verdict next to the truth moves the pair by no more than that.
        assert!(low <= 6.1 * 1.15 && high >= 6.1 / 1.15, "{wrong}: {low} {high}");
    }
}

#[test]
fn the_search_finds_what_very_many_requests_of_a_queue_say() {
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
            assert_eq!(ending, Ending::Found);
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
        prop_assert_eq!(ending, Ending::Found);
        prop_assert!(low <= capacity && capacity < high, "{} {} {}", low, capacity, high);
        prop_assert!(high <= low * (1.0 + tolerance));
        prop_assert!(rates.len() <= 30, "{} probes", rates.len());
    }

    #[test]
    fn whatever_the_verdicts_the_search_ends_and_its_pair_is_in_order(seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let (found, _, rates) = search(1.0, 0.05, |_| match random.random_range(0..5) {
            0 | 1 => Verdict::Pass,
            2 | 3 => Verdict::Fail,
            _ => Verdict::Invalid,
        });
        prop_assert!(rates.len() <= MOST_PROBES);
        if let (Some(low), Some(high)) = found.bracket() {
            prop_assert!(low < high);
        }
    }
}

#[test]
fn a_burst_tells_where_to_begin_and_too_few_answers_tell_nothing() {
    // Ten a second, and the last ones come late because few are left.
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
