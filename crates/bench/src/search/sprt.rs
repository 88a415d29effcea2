//! Decides one probe of the search by a sequential probability ratio test (SPRT) of the share of good requests. Pure.
//!
//! Wald's test weighs each request for and against "the share is clearly high enough", and ends when one side is 19
//! times likelier. Three rules fit it to requests at a server:
//! - Requests count in the order of their release, because slow ones end last and would be missing from an early count.
//! - Requests released before the first answer do not count, because the server was empty.
//! - Bad requests come in runs while the queue is long. A run counts as little more than one of them.

use std::collections::BTreeMap;

use super::super::stats::overload::QueueGrowth;

/// The outcome of a finished request. Times are in seconds since the start of the probe.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestOutcome {
    /// Release time.
    pub released: f64,
    /// Time of its last token, or of its failure.
    pub ended: f64,
    /// Time to first token; `None` if it failed.
    pub first_token: Option<f64>,
    /// Indices of the objectives that it missed.
    pub missed: Vec<usize>,
}

/// The decision of the test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// More requests are needed.
    Undecided,
    /// Enough requests are good.
    Pass,
    /// Too few requests are good.
    Fail,
}

/// The test of one probe.
#[derive(Debug, Clone)]
pub struct Sprt {
    attainment: f64,
    /// The shortest time in seconds after which a probe can pass: a growing queue needs time to show.
    shortest: f64,
    /// Finished requests that wait for one released earlier.
    out_of_order: BTreeMap<usize, RequestOutcome>,
    /// Index of the next request to count.
    next: usize,
    first_end: f64,
    counted: usize,
    good: usize,
    failed: usize,
    /// Runs of consecutive bad requests.
    bad_runs: usize,
    last_was_bad: bool,
    missed: Vec<usize>,
    span: Option<(f64, f64)>,
    first_tokens: Vec<(f64, f64)>,
}

/// The ratio between the odds of a bad request at which a probe should fail and at which it should pass.
const ODDS_RATIO: f64 = 3.0;
/// The required likelihood ratio: 5 % errors on both sides.
const LIKELIER: f64 = 19.0;
/// Fewest requests for any decision.
const FEWEST: usize = 20;
/// Fewest requests to pass. Requests in a queue depend on each other, so a few are not a sample.
const FEWEST_TO_PASS: usize = 100;

impl Sprt {
    /// A new test. `attainment` is the required share of good requests, in (0, 1); `objectives` is the number of
    /// objectives.
    pub fn new(attainment: f64, objectives: usize, shortest: f64) -> Self {
        Self {
            attainment,
            shortest,
            out_of_order: BTreeMap::new(),
            next: 0,
            first_end: f64::INFINITY,
            counted: 0,
            good: 0,
            failed: 0,
            bad_runs: 0,
            last_was_bad: false,
            missed: vec![0; objectives],
            span: None,
            first_tokens: Vec::new(),
        }
    }

    /// The most requests that a probe needs: about twice as many as when the share equals the required one, which is
    /// the hardest case.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a small positive number"
    )]
    pub fn max_requests(attainment: f64) -> usize {
        let variance = attainment * (1.0 - attainment) * ODDS_RATIO.ln().powi(2);
        ((2.0 * LIKELIER.ln().powi(2) / variance).ceil() as usize).clamp(3 * FEWEST_TO_PASS, 100_000)
    }

    /// Adds the request with this index in the schedule.
    pub fn add(&mut self, place: usize, outcome: RequestOutcome) {
        self.first_end = self.first_end.min(outcome.ended);
        if place >= self.next {
            self.out_of_order.insert(place, outcome);
        }
        while let Some(outcome) = self.out_of_order.remove(&self.next) {
            self.next += 1;
            self.count(&outcome);
        }
    }

    fn count(&mut self, outcome: &RequestOutcome) {
        if outcome.released < self.first_end {
            return;
        }
        let is_bad = outcome.first_token.is_none() || !outcome.missed.is_empty();
        self.counted += 1;
        self.good += usize::from(!is_bad);
        self.failed += usize::from(outcome.first_token.is_none());
        self.bad_runs += usize::from(is_bad && !self.last_was_bad);
        self.last_was_bad = is_bad;
        for &objective in &outcome.missed {
            self.missed[objective] += 1;
        }
        let first = self.span.map_or(outcome.released, |(first, _)| first);
        self.span = Some((first, outcome.released));
        if let Some(first_token) = outcome.first_token {
            self.first_tokens.push((outcome.released, first_token));
        }
    }

    /// The decision so far.
    pub fn decision(&self) -> Decision {
        if self.counted < FEWEST {
            return Decision::Undecided;
        }
        let weight = self.weight();
        if weight >= LIKELIER.ln() {
            return Decision::Fail;
        }
        let has_time = self.span.is_some_and(|(first, last)| last - first >= self.shortest);
        let is_sample = self.counted >= FEWEST_TO_PASS && has_time;
        if weight <= -LIKELIER.ln() && is_sample && !self.is_growing() {
            return Decision::Pass;
        }
        Decision::Undecided
    }

    /// The decision without further requests: the share decides, unless the queue grows.
    pub fn final_decision(&self) -> Decision {
        match self.decision() {
            Decision::Undecided if self.counted == 0 => Decision::Undecided,
            Decision::Undecided if self.share() >= self.attainment && !self.is_growing() => Decision::Pass,
            Decision::Undecided => Decision::Fail,
            decided => decided,
        }
    }

    /// The log likelihood ratio of a share that is clearly too low against one that is clearly high enough.
    fn weight(&self) -> f64 {
        let bad = (self.counted - self.good) as f64;
        let odds = (1.0 - self.attainment) / self.attainment;
        let [low, high] = [odds / ODDS_RATIO.sqrt(), odds * ODDS_RATIO.sqrt()].map(|odds| odds / (1.0 + odds));
        let sum = bad * (high / low).ln() + self.good as f64 * ((1.0 - high) / (1.0 - low)).ln();
        if self.bad_runs == 0 {
            return sum;
        }
        // The length of runs of bad requests relative to chance.
        let excess = bad / self.bad_runs as f64 * self.share();
        sum / excess.max(1.0)
    }

    /// Whether the queue grew during the probe.
    pub fn is_growing(&self) -> bool {
        QueueGrowth::of(&self.first_tokens).is_some_and(QueueGrowth::is_overload)
    }

    /// Number of requests that counted.
    pub fn counted(&self) -> usize {
        self.counted
    }

    /// Share of good requests; 1 without any.
    pub fn share(&self) -> f64 {
        if self.counted == 0 {
            return 1.0;
        }
        self.good as f64 / self.counted as f64
    }

    /// Number of failed requests.
    pub fn failed(&self) -> usize {
        self.failed
    }

    /// Number of requests that missed each objective.
    pub fn missed(&self) -> &[usize] {
        &self.missed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;

    fn outcome(place: usize, is_good: bool) -> RequestOutcome {
        let released = place as f64 / 10.0;
        RequestOutcome {
            released,
            ended: released + 0.1,
            first_token: Some(0.1),
            missed: if is_good { vec![] } else { vec![0] },
        }
    }

    /// The decision on requests that are bad with this probability, and the number of requests it took.
    fn decide(attainment: f64, bad: f64, seed: u64) -> (Decision, usize) {
        let mut random = StdRng::seed_from_u64(seed);
        let mut sprt = Sprt::new(attainment, 1, 0.0);
        for place in 0..Sprt::max_requests(attainment) {
            sprt.add(place, outcome(place, random.random_range(0.0..1.0) >= bad));
            if sprt.decision() != Decision::Undecided {
                break;
            }
        }
        (sprt.final_decision(), sprt.counted())
    }

    #[test]
    fn clear_shares_are_decided_quickly() {
        for attainment in [0.5, 0.9, 0.99] {
            let odds = (1.0 - attainment) / attainment;
            let share = |odds: f64| odds / (1.0 + odds);
            let wrong = |bad: f64, decision| {
                (0..200)
                    .filter(|&seed| decide(attainment, bad, seed).0 == decision)
                    .count()
            };
            let (passes, fails) = (
                wrong(share(odds * 2.0), Decision::Pass),
                wrong(share(odds / 2.0), Decision::Fail),
            );
            assert!(passes <= 20 && fails <= 20, "{attainment}: {passes}, {fails} of 200");
        }
        assert_eq!(decide(0.99, 1.0, 0), (Decision::Fail, FEWEST));
        assert!((240..300).contains(&decide(0.99, 0.0, 0).1));
    }

    #[test]
    fn requests_count_in_release_order() {
        let mut sprt = Sprt::new(0.9, 1, 0.0);
        sprt.add(0, outcome(0, true));
        for place in 3..100 {
            sprt.add(place, outcome(place, true));
        }
        assert_eq!((sprt.counted(), sprt.decision()), (0, Decision::Undecided));
        sprt.add(1, outcome(1, false));
        sprt.add(2, outcome(2, false));
        // The first answer arrived at 0.1 s; only the first request was released before that.
        assert_eq!(sprt.counted(), 99);
        assert_eq!(sprt.missed(), [2]);
    }

    #[test]
    fn requests_at_an_empty_server_do_not_count() {
        let mut sprt = Sprt::new(0.9, 1, 0.0);
        for place in 0..50 {
            let released = place as f64 / 10.0;
            sprt.add(
                place,
                RequestOutcome {
                    ended: released + 2.0,
                    ..outcome(place, true)
                },
            );
        }
        assert_eq!(sprt.counted(), 30);
    }

    #[test]
    fn one_run_of_bad_requests_does_not_fail_a_probe() {
        let decision = |bad: &dyn Fn(usize) -> bool| {
            let mut sprt = Sprt::new(0.99, 1, 0.0);
            for place in 0..150 {
                sprt.add(place, outcome(place, !bad(place)));
            }
            sprt.decision()
        };
        assert_eq!(decision(&|place| (100..106).contains(&place)), Decision::Undecided);
        assert_eq!(decision(&|place| place % 24 == 23), Decision::Fail);
    }

    #[test]
    fn a_probe_passes_only_after_its_shortest_time() {
        let mut sprt = Sprt::new(0.9, 1, 20.0);
        for place in 0..201 {
            sprt.add(place, outcome(place, true));
        }
        assert_eq!(sprt.decision(), Decision::Undecided);
        sprt.add(201, outcome(201, true));
        assert_eq!(sprt.decision(), Decision::Pass);
    }

    #[test]
    fn failures_are_bad_requests() {
        let mut sprt = Sprt::new(0.9, 1, 0.0);
        for place in 0..40 {
            sprt.add(
                place,
                RequestOutcome {
                    first_token: None,
                    ..outcome(place, true)
                },
            );
        }
        assert_eq!((sprt.decision(), sprt.failed()), (Decision::Fail, 39));
    }

    proptest! {
        #[test]
        fn the_order_of_ends_does_not_matter(
            bad in prop::collection::vec(any::<bool>(), 30..80), seed: u64,
        ) {
            let mut places: Vec<usize> = (1..bad.len()).collect();
            let mut random = StdRng::seed_from_u64(seed);
            for place in (1..places.len()).rev() {
                places.swap(place, random.random_range(0..=place));
            }
            let counted = |places: &[usize]| {
                let mut sprt = Sprt::new(0.9, 1, 0.0);
                sprt.add(0, outcome(0, !bad[0]));
                for &place in places {
                    sprt.add(place, outcome(place, !bad[place]));
                }
                (sprt.counted(), sprt.missed().to_vec(), sprt.decision())
            };
            let in_order: Vec<usize> = (1..bad.len()).collect();
            prop_assert_eq!(counted(&places), counted(&in_order));
        }
    }
}
